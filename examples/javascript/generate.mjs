// Generates text with an exported model through onnxruntime-web, without any code of smallm. Works in Node and in browsers.
//
//   npm install onnxruntime-web
//   node generate.mjs path/to/export "Once upon a time" 300
//
// The model reads ids and returns the logits of the next id. JavaScript cannot read the metadata of an ONNX file, so sizes
// and vocabulary come from smallm.json beside it: ids 0 to 255 are bytes, ids from 256 up are the UTF-8 bytes that
// `tokens` lists in hexadecimal, separated by spaces. A text longer than the context ends here.

/** The vocabulary: id -> bytes, and bytes (as text of one character per byte) -> id. */
export function readVocabulary(tokens) {
  const hex = tokens.split(" ").filter(Boolean);
  const bytes = [...Array(256).keys()].map((byte) => [byte]);
  bytes.push(...hex.map((token) => token.match(/../g).map((pair) => parseInt(pair, 16))));
  return { bytes, ids: new Map(bytes.map((each, id) => [String(each), id])) };
}

/** Text -> ids. Of a character without an id of its own, the longest known prefix becomes an id, down to single bytes. */
export function encode(vocabulary, text) {
  const ids = [];
  for (const character of text) {
    let rest = [...new TextEncoder().encode(character)];
    while (rest.length) {
      let length = rest.length;
      while (!vocabulary.ids.has(String(rest.slice(0, length)))) length--;
      ids.push(vocabulary.ids.get(String(rest.slice(0, length))));
      rest = rest.slice(length);
    }
  }
  return ids;
}

/** Draws an id from the topK most probable ones; `random` returns a number in [0, 1). */
export function sample(logits, { temperature = 0.8, topK = 40, random = Math.random } = {}) {
  const least = Float32Array.from(logits).sort()[Math.max(0, logits.length - topK)];
  const largest = logits.reduce((a, b) => Math.max(a, b));
  const weights = Array.from(logits, (logit) => (logit < least ? 0 : Math.exp((logit - largest) / temperature)));
  let left = random() * weights.reduce((a, b) => a + b);
  return weights.findIndex((weight) => (left -= weight) < 0);
}

/** Yields new text. `ort` is the module onnxruntime-web, `config` the content of smallm.json. */
export async function* generate(ort, session, config, seed, maxLength, options = {}) {
  const vocabulary = readVocabulary(config.tokens);
  const decoder = new TextDecoder(); // holds back the bytes of incomplete characters
  const int64 = (values) => new ort.Tensor("int64", BigInt64Array.from(values, BigInt), [1, values.length]);
  const empty = () => new ort.Tensor("float32", new Float32Array(0), [1, config.n_kv_head, 0, config.head_dim]);
  let ids = encode(vocabulary, seed || config.start_text);
  let length = 0; // ids in the KV cache
  let outputs;
  for (let i = 0; i < maxLength && length + ids.length <= config.block_size; i++) {
    length += ids.length;
    const feeds = { input_ids: int64(ids), attention_mask: int64(Array(length).fill(1)) };
    for (let layer = 0; layer < config.n_layer; layer++) {
      for (const kind of ["key", "value"]) {
        feeds[`past_key_values.${layer}.${kind}`] = outputs?.[`present.${layer}.${kind}`] ?? empty();
      }
    }
    outputs = await session.run(feeds);
    const logits = outputs.logits.data.subarray((ids.length - 1) * config.vocab_size); // the last position of (1, T, V)
    ids = [sample(logits, options)];
    yield decoder.decode(Uint8Array.from(vocabulary.bytes[ids[0]]), { stream: true });
  }
}

async function main([folder, seed = "", maxLength = "300"]) {
  const ort = await import("onnxruntime-web");
  const { readFile } = await import("node:fs/promises");
  const config = JSON.parse(await readFile(`${folder}/smallm.json`, "utf8"));
  const session = await ort.InferenceSession.create(await readFile(`${folder}/model.onnx`), { logSeverityLevel: 3 });
  process.stdout.write(seed);
  for await (const text of generate(ort, session, config, seed, Number(maxLength))) process.stdout.write(text);
  process.stdout.write("\n");
  process.exit(0); // onnxruntime-web keeps its worker threads
}

if (globalThis.process?.argv[1] && import.meta.url === new URL(`file://${process.argv[1]}`).href) {
  await main(process.argv.slice(2));
}
