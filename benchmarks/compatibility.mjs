// Runs a model file in a JavaScript package of ONNX Runtime, for compatibility.py.
// node compatibility.mjs MODULES PACKAGE MODEL TASK -> one line of JSON: logits, written
import { readFileSync } from "node:fs";
import { createRequire } from "node:module";
import { join } from "node:path";
import { pathToFileURL } from "node:url";

const [modules, name, path, taskPath] = process.argv.slice(2);
const folder = join(modules, name);
const entry = name === "onnxruntime-web" ? join(folder, "dist", "ort.wasm.min.mjs") : null;
const ort = entry ? await import(pathToFileURL(entry)) : createRequire(join(modules, "x.js"))(name);
const task = JSON.parse(readFileSync(taskPath, "utf8"));
if (entry) ort.env.wasm.numThreads = 1;

const session = await ort.InferenceSession.create(readFileSync(path), { logSeverityLevel: 4 });
const past = Array.from({ length: task.n_layer }, (_, i) => [`${i}.key`, `${i}.value`]).flat();
const ids64 = (values) => new ort.Tensor("int64", BigInt64Array.from(values, BigInt), [1, values.length]);
const empty = () => new ort.Tensor("float32", new Float32Array(0), [1, task.n_kv_head, 0, task.head_dim]);

// ids: the new ids; cache: name -> tensor with this number of positions. Returns one row of logits for each new id.
async function step(ids, cache, positions) {
  const feeds = { input_ids: ids64(ids), attention_mask: ids64(new Array(positions + ids.length).fill(1)) };
  for (const part of past) feeds[`past_key_values.${part}`] = cache[part];
  const outputs = await session.run(feeds);
  for (const part of past) cache[part] = outputs[`present.${part}`];
  const [, rows, columns] = outputs.logits.dims;
  return Array.from({ length: rows }, (_, i) => Array.from(outputs.logits.data.slice(i * columns, (i + 1) * columns)));
}

const fresh = () => Object.fromEntries(past.map((part) => [part, empty()]));
const logits = await step(task.ids, fresh(), 0);
const cache = fresh(), written = [];
let following = (await step(task.seed, cache, 0)).at(-1);
for (let i = 0; i < task.new; i++) {
  written.push(following.indexOf(Math.max(...following)));
  [following] = await step(written.slice(-1), cache, task.seed.length + i);
}
console.log(JSON.stringify({ logits, written }));
