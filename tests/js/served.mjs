// node served.mjs CHROMIUM URL: writes a text in the page that `smallm serve` serves, on a desktop and on a phone.
// SMALLM_SHOTS names a folder for screenshots.
import { chromium } from "playwright-core";

const [executablePath, url] = process.argv.slice(2);
const args = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"];
const browser = await chromium.launch({ executablePath, args });
const saw = { problems: [], texts: [] };
const sizes = { desktop: { width: 1280, height: 900 }, phone: { width: 390, height: 844 } };
for (const [name, viewport] of Object.entries(sizes)) {
  const page = await browser.newPage({ viewport });
  page.setDefaultTimeout(60_000);
  page.on("pageerror", (error) => saw.problems.push(error.message));
  await page.goto(url);
  await page.waitForFunction(() => /^Done/.test(document.querySelector("#status").textContent)); // the first text
  await page.getByLabel("Seed text").fill("the moon ");
  if (name === "phone") await page.getByText("Settings").click();
  await page.getByLabel("Temperature").fill("0.8");
  await page.getByLabel("Length").fill("200");
  await page.getByRole("button", { name: "Write" }).click();
  await page.waitForFunction(() => /^Done/.test(document.querySelector("#status").textContent));
  saw.texts.push(await page.locator("#text").textContent());
  await page.getByLabel("Random seed").fill("4294967295"); // the longest that the button Another draws
  const cut = await page.getByLabel("Random seed").evaluate((field) => field.scrollWidth > field.clientWidth);
  if (cut) saw.problems.push(`${name}: a random seed is cut off`);
  const tooWide = await page.evaluate(() => document.documentElement.scrollWidth > innerWidth);
  if (tooWide) saw.problems.push(`${name}: wider than the window`);
  if (process.env.SMALLM_SHOTS) await page.screenshot({ path: `${process.env.SMALLM_SHOTS}/${name}.png`, fullPage: true });
}
await browser.close();
console.log(JSON.stringify(saw));
