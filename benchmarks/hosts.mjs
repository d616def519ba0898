// Generates a text in a JavaScript host, for hosts.py: prints the seed, then the characters as they are generated.
// node hosts.mjs HOST MODULES MODEL TASK [CHROMIUM]
// HOST: node, chromium or transformers. MODULES: the node_modules folder with its packages. MODEL: the folder of the
// Node kit, the address of the web kit's page, or an export folder. TASK: JSON with seed, length, temperature, top_k,
// rng_seed. CHROMIUM: the browser.
import { createRequire } from "node:module";
import { join } from "node:path";
import { pathToFileURL } from "node:url";

const [host, modules, model, taskText, executablePath] = process.argv.slice(2);
const { seed, length, temperature, top_k: topK, rng_seed: rngSeed } = JSON.parse(taskText);
const require = createRequire(join(modules, "x.js"));

const hosts = {
  async node() {
    const { LanguageModel } = await import(pathToFileURL(join(model, "smallm.js")));
    const lm = await LanguageModel.load(join(model, "model.onnx"));
    process.stdout.write(seed);
    for await (const { text } of lm.stream(seed, { maxLength: length, temperature, topK, rngSeed })) {
      process.stdout.write(text);
    }
  },

  // The page updates its text for several characters at a time. The seed is printed when the browser has started. The text
  // is the second one: the page writes a first one by itself.
  async chromium() {
    const { chromium } = require("playwright-core");
    const args = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"];
    const browser = await chromium.launch({ executablePath, args });
    process.stdout.write(seed);
    const page = await browser.newPage();
    await page.exposeFunction("wrote", (text) => void process.stdout.write(text));
    await page.goto(`${model}?maxLength=300`);
    await page.waitForFunction(() => /^Done/.test(document.querySelector("#status").textContent));
    await page.evaluate((values) => {
      for (const [id, value] of Object.entries(values)) document.getElementById(id).value = value;
      const output = document.getElementById("text");
      let shown = values.seed.length;
      new MutationObserver(() => {
        const text = output.textContent;
        if (text.length > shown) window.wrote(text.slice(shown));
        shown = text.length;
      }).observe(output, { childList: true, subtree: true });
      document.getElementById("write").click();
    }, { seed, temperature, topK, maxLength: length, rngSeed });
    await page.waitForFunction(() => /^Done/.test(document.querySelector("#status").textContent));
    await browser.close();
  },

  async transformers() {
    const { BaseStreamer, env, pipeline } = require("@huggingface/transformers");
    env.allowRemoteModels = false;
    const options = { dtype: "fp32", session_options: { intraOpNumThreads: 1 } };
    const generator = await pipeline("text-generation", model, options);
    class Streamer extends BaseStreamer {
      started = false; // the first ids are the prompt

      put([ids]) {
        process.stdout.write(this.started ? generator.tokenizer.decode(ids) : seed);
        this.started = true;
      }

      end() {}
    }
    const streamer = new Streamer();
    await generator(seed, { max_new_tokens: length, do_sample: true, temperature, top_k: topK, streamer });
  },
};

await hosts[host]();
