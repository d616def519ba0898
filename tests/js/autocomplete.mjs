// node autocomplete.mjs CHROMIUM URL: types into the field of examples/autocomplete.html; prints what it saw as JSON.
// SMALLM_SHOTS names a folder for screenshots.
import { chromium } from "playwright-core";

const [executablePath, url] = process.argv.slice(2);
const args = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"];
const browser = await chromium.launch({ executablePath, args });
const page = await browser.newPage({ viewport: { width: 390, height: 500 } });
const saw = { problems: [], texts: [] };
page.setDefaultTimeout(60_000);
page.on("pageerror", (error) => saw.problems.push(error.message));
await page.goto(url);
const field = page.getByLabel("Text");
const proposal = page.locator("#proposal");
const proposed = () => page.waitForFunction(() => document.querySelector("#proposal").textContent);

await field.pressSequentially("an old owl s");
await proposed();
saw.proposal = await proposal.textContent();
if (process.env.SMALLM_SHOTS) await page.screenshot({ path: `${process.env.SMALLM_SHOTS}/autocomplete.png` });
await field.press("Tab");
saw.accepted = await field.inputValue();
saw.focused = await page.evaluate(() => document.activeElement.id);
await field.fill("the moon");
await proposed();
await field.press("Escape");
saw.escaped = [await proposal.textContent(), await field.inputValue()];
await field.press("Tab"); // without a proposal
saw.left = await page.evaluate(() => document.activeElement.id);
await browser.close();
console.log(JSON.stringify(saw));
