// Times the start of the web kit's page beside an empty page, each in a new browser, in turn:
// node benchmarks/page_start.mjs KIT [ROUNDS]
// Prints for both the milliseconds from the start of the navigation to the first picture, and for the kit also to the loaded
// model and to the first character on the screen. Medians, the least value in parentheses.
import { createServer } from "node:http";
import { readFile } from "node:fs/promises";
import { createRequire } from "node:module";
import { extname, join } from "node:path";

const [kit, rounds = "7"] = process.argv.slice(2);
const { chromium } = createRequire(new URL("../tests/js/x.js", import.meta.url))("playwright-core");
const TYPES = { ".html": "text/html", ".js": "text/javascript", ".css": "text/css", ".wasm": "application/wasm" };
const EMPTY = '<!doctype html><title>x</title><link rel="icon" href="data:,"><p>x</p>';

const server = createServer(async ({ url }, response) => {
  const name = new URL(url, "http://x").pathname.replace(/\/$/, "/index.html");
  response.setHeader("content-type", TYPES[extname(name)] ?? "application/octet-stream");
  response.end(name === "/empty.html" ? EMPTY : await readFile(join(kit, name)));
});
await new Promise((resolve) => server.listen(0, "127.0.0.1", resolve));

/** Runs in the page before its scripts. */
function watch() {
  globalThis.times = {};
  const note = (name, is) => is && (times[name] ??= performance.now());
  new MutationObserver(() => {
    note("model", document.querySelector("#write")?.disabled === false);
    if (!times.character && note("character", document.querySelector("#text span:not(.seed)"))) {
      requestAnimationFrame(() => setTimeout(() => note("shown", true)));
    }
  }).observe(document, { childList: true, subtree: true, attributes: true });
}

async function start(path, done) {
  const args = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"];
  const executablePath = process.env.CHROMIUM ?? "/usr/bin/chromium";
  const browser = await chromium.launch({ executablePath, args });
  const page = await browser.newPage();
  await page.addInitScript(watch);
  await page.goto(`http://127.0.0.1:${server.address().port}/${path}`);
  await page.waitForFunction(done);
  const found = await page.evaluate(() => ({
    picture: performance.getEntriesByName("first-contentful-paint")[0].startTime,
    ...times,
  }));
  await browser.close();
  return found;
}

const all = { empty: [], kit: [] };
for (let round = 0; round < Number(rounds); round++) {
  all.empty.push(await start("empty.html", () => performance.getEntriesByName("first-contentful-paint").length));
  all.kit.push(await start("", () => times.shown && performance.getEntriesByName("first-contentful-paint").length));
}
for (const [name, runs] of Object.entries(all)) {
  const figures = Object.keys(runs[0]).map((key) => {
    const sorted = runs.map((run) => run[key]).sort((a, b) => a - b);
    return `${key} ${Math.round(sorted[sorted.length >> 1])} (${Math.round(sorted[0])})`;
  });
  console.log(`${name}: ${figures.join(", ")}`);
}
server.close();
