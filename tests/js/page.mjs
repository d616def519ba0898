// node page.mjs CHROMIUM URL CALLS.json SHOTS MODEL SLIDER INT8: uses the page at URL as people do; prints what it saw as JSON.
import { readFile } from "node:fs/promises";
import { chromium } from "playwright-core";
import { answer } from "./answer.mjs";

const [executablePath, url, callsFile, shots, model, slider, int8] = process.argv.slice(2);
const args = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"];
const browser = await chromium.launch({ executablePath, args });
const saw = { problems: [], requests: [] };

/** A page in a context of its own, once its first text is there or its model has failed to come. */
async function opened(options = {}, damage = () => {}, query = "") {
  const page = await browser.newPage({ viewport: { width: 1100, height: 900 }, ...options });
  page.setDefaultTimeout(60_000);
  page.on("pageerror", (error) => saw.problems.push(error.message));
  page.on("request", (request) => saw.requests.push(request.url()));
  await damage(page);
  await page.goto(url + query);
  await page.waitForFunction(() => {
    const [status, error] = ["#status", "#error"].map((place) => document.querySelector(place));
    return /^Done/.test(status.textContent) || !error.hidden;
  });
  return page;
}

async function finished(page) {
  await page.waitForFunction(() => /^(Done|Stopped)/.test(document.querySelector("#status").textContent));
  return page.locator("#text").textContent();
}

/** Milliseconds of processor time of the longest task of the page's main thread while it writes lines of any length. */
async function longestTask() {
  const page = await opened({}, (page) => page.route("**/model.onnx", (route) => route.fulfill({ path: int8 })));
  const tracing = await browser.newBrowserCDPSession();
  const events = [];
  tracing.on("Tracing.dataCollected", ({ value }) => events.push(...value));
  const complete = new Promise((resolve) => tracing.once("Tracing.tracingComplete", resolve));
  const traceConfig = { includedCategories: ["toplevel", "blink.user_timing"] };
  await tracing.send("Tracing.start", { transferMode: "ReportEvents", traceConfig });
  await page.evaluate(() => performance.mark("the page")); // Chromium has main threads for other pages as well
  await page.getByLabel("Length").fill("10000");
  await page.getByRole("button", { name: "Write" }).click();
  await finished(page);
  await tracing.send("Tracing.end");
  await complete;
  await tracing.detach();
  const thread = ({ pid, tid }) => `${pid} ${tid}`;
  const main = thread(events.find(({ name }) => name === "the page"));
  await page.close();
  return Math.max(...events.filter((event) => thread(event) === main).map(({ tdur }) => (tdur ?? 0) / 1000));
}

const scenarios = {
  async calls() {
    const page = await opened();
    const calls = JSON.parse(await readFile(callsFile, "utf8"));
    return page.evaluate(`(async () => {
      const { LanguageModel } = await import("${url}smallm.js");
      return (${answer})(LanguageModel, "${url}model.onnx", ${JSON.stringify(calls)});
    })()`);
  },

  async mouse() {
    const page = await opened();
    await page.getByLabel("Seed text").fill("Zoë sings to ");
    await page.getByLabel("Temperature").fill("0.9");
    await page.getByLabel("Candidates").fill("20");
    await page.getByLabel("Length").fill("200");
    await page.getByLabel("Random seed").fill("7");
    await page.getByRole("button", { name: "Write" }).click();
    const text = await finished(page);
    const spans = page.locator("#text span:not(.seed)");
    const surprisals = await spans.evaluateAll((all) => all.map((x) => [x.title, x.style.getPropertyValue("--surprisal")]));
    const [status, progress, footer] = await Promise.all(
      ["#status", "#progress", "footer"].map((place) => page.locator(place).textContent()),
    );
    const title = [await page.title(), await page.locator("h1").textContent()];
    const colour = () => spans.evaluateAll((all) => all.map((x) => getComputedStyle(x).backgroundColor).filter((x) => x !== "rgba(0, 0, 0, 0)").length);
    const coloured = [await colour()];
    await page.getByLabel("Colours").uncheck();
    coloured.push(await colour());
    await page.getByLabel("Colours").check();
    const live = await page.locator("#text").evaluate((x) => [x.ariaLive, x.ariaBusy]);
    if (shots) await page.screenshot({ path: `${shots}/desktop.png`, fullPage: true });
    await page.emulateMedia({ colorScheme: "dark" });
    if (shots) await page.screenshot({ path: `${shots}/dark.png`, fullPage: true });
    return { text, surprisals, status, progress, footer, live, title, coloured };
  },

  async keyboard() {
    const page = await opened();
    const press = async (...keys) => {
      for (const key of keys) await page.keyboard.press(key);
    };
    const focused = () => page.evaluate(() => document.activeElement.id);
    const order = [];
    for (let i = 0; i < 12; i++) {
      await press("Tab");
      order.push(await focused());
    }
    await press(...Array(11).fill("Shift+Tab"), "Control+a");
    await page.keyboard.type("an old owl ");
    await press(...Array(6).fill("Tab"), "Control+a");
    await page.keyboard.type("60");
    await press("Enter");
    const text = await finished(page);
    await press("Control+a");
    await page.keyboard.type("100000");
    await press("Enter");
    await page.waitForFunction(() => document.querySelectorAll("#text span").length > 100);
    await press("Escape");
    const stopped = await finished(page);
    await page.locator("#text").focus();
    await press("ArrowRight", "ArrowRight", "ArrowLeft", "ArrowRight");
    const [value, title] = [await page.locator("#value").textContent(), await page.locator("#text .chosen").getAttribute("title")];
    return { order, text, stopped, status: await page.locator("#status").textContent(), value, title };
  },

  /** The first text, which the page writes by itself, with fields from the address. */
  async first() {
    const page = await opened({}, undefined, "?seed=Zo%C3%AB%20&maxLength=80&rngSeed=9");
    return [await page.locator("#text").textContent(), await page.locator("#text").evaluate((x) => x.ariaLive)];
  },

  async another() {
    const page = await opened();
    await page.getByLabel("Seed text").fill("an old owl ");
    await page.getByLabel("Length").fill("100000");
    await page.getByRole("button", { name: "Write" }).click();
    await page.waitForFunction(() => document.querySelectorAll("#text span").length > 100);
    await page.getByLabel("Length").fill("40");
    await page.getByRole("button", { name: "Another" }).click();
    await page.waitForFunction(() => document.querySelector("#status").textContent === "Done: 40 characters");
    const another = [await page.getByLabel("Random seed").inputValue(), await page.locator("#text").textContent()];
    await page.getByLabel("Length").fill("100000");
    await page.getByRole("button", { name: "Write" }).click();
    await page.getByLabel("Length").fill("30");
    await page.getByLabel("Seed text").press("Control+Enter"); // writes, also while a text is written
    await page.waitForFunction(() => document.querySelector("#status").textContent === "Done: 30 characters");
    return another;
  },

  async window() {
    const page = await opened({}, (page) => page.route("**/model.onnx", (route) => route.fulfill({ path: slider })));
    await page.getByLabel("Seed text").fill("Zoë");
    await page.getByLabel("Length").fill("100");
    await page.getByRole("button", { name: "Write" }).click();
    return [await page.getByLabel("Long texts").inputValue(), await finished(page)];
  },

  async int8() {
    const page = await opened({}, (page) => page.route("**/model.onnx", (route) => route.fulfill({ path: int8 })));
    await page.getByLabel("Seed text").fill("Zoë");
    await page.getByLabel("Length").fill("2000");
    await page.getByRole("button", { name: "Write" }).click();
    return finished(page);
  },

  /** The least of three texts: other programs can lengthen a task even in processor time. */
  async longestTask() {
    return Math.min(await longestTask(), await longestTask(), await longestTask());
  },

  async narrow() {
    const page = await opened({ viewport: { width: 360, height: 740 }, hasTouch: true });
    await page.getByLabel("Seed text").fill("x".repeat(300));
    const folded = !(await page.getByLabel("Length").isVisible());
    await page.getByText("Settings").tap();
    await page.getByLabel("Length").fill("150");
    await page.getByRole("button", { name: "Write" }).tap();
    await finished(page);
    if (shots) await page.screenshot({ path: `${shots}/narrow.png`, fullPage: true });
    await page.locator("#text span:not(.seed)").nth(2).tap();
    const value = await page.locator("#value").textContent();
    await page.getByText("Settings").tap();
    if (shots) await page.screenshot({ path: `${shots}/folded.png` });
    return { folded, value, ...(await page.evaluate(() => ({ page: document.documentElement.scrollWidth, window: innerWidth }))) };
  },

  async mistakes() {
    const page = await opened();
    const seen = {};
    const usual = { seed: "a", temperature: "0.8", topK: "0", maxLength: "10", rngSeed: "1" };
    const mistakes = [
      ["temperature", "-1"], ["topK", "2.5"], ["maxLength", "-5"], ["maxLength", "1e12"], ["rngSeed", "4294967296"],
      ["temperature", ""], ["seed", "lone \ud800"],
    ];
    for (const [id, value] of mistakes) {
      await page.evaluate((values) => {
        for (const [id, value] of Object.entries(values)) document.getElementById(id).value = value;
      }, { ...usual, [id]: value });
      await page.getByRole("button", { name: "Write" }).click();
      const alert = page.getByRole("alert");
      await alert.waitFor();
      const marked = await page.locator("[aria-invalid]").evaluateAll((all) => all.map((x) => x.id));
      seen[`${id} ${value}`] = [await alert.textContent(), marked, await page.evaluate(() => document.activeElement.id)];
      if (shots) await page.screenshot({ path: `${shots}/mistake.png`, fullPage: true });
    }
    await page.locator("#seed").fill("");
    await page.getByRole("button", { name: "Write" }).click();
    seen.empty = [(await finished(page)).length, await page.locator("#error").isHidden()];
    return seen;
  },

  async models() {
    const seen = {};
    const bytes = await readFile(model);
    const bodies = {
      missing: { status: 404, body: "no" },
      truncated: { body: bytes.subarray(0, bytes.length / 2) },
      text: { body: Buffer.from("<!doctype html><p>Not here</p>") },
      empty: { body: Buffer.alloc(0) },
    };
    for (const [name, body] of Object.entries(bodies)) {
      const page = await opened({}, (page) => page.route("**/model.onnx", (route) => route.fulfill(body)));
      seen[name] = [await page.getByRole("alert").textContent(), await page.locator("#write").isDisabled()];
      await page.close();
    }
    return seen;
  },
};

for (const [name, scenario] of Object.entries(scenarios)) {
  try {
    saw[name] = await scenario();
  } catch (error) {
    saw[name] = { failed: error.message };
  }
}
await browser.close();
console.log(JSON.stringify(saw));
