// node golden.mjs WASM GOLDEN.json: the draws, ids and allowed ids of golden.json as a build of golden.c finds them, as JSON.
import { readFile } from "node:fs/promises";

const [wasm, golden] = process.argv.slice(2);
const { exports: c } = (await WebAssembly.instantiate(await readFile(wasm), {})).instance;
const { draws, ids, allowed } = JSON.parse(await readFile(golden, "utf8"));

function put(bytes) {
  const at = c.malloc(bytes.length + 1);
  new Uint8Array(c.memory.buffer, at).set([...bytes, 0]);
  return at;
}

const text = (string) => (string === null ? 0 : put(new TextEncoder().encode(string)));
const found = {
  draws: draws.map(({ rng_seed, stream_number, x }) => x.map((_, i) => c.golden_draw(rng_seed, stream_number, i + 1) >>> 0)),
  ids: ids.map(({ temperature, top_k, top_p, min_p, repetition_penalty }) => {
    const at = c.malloc(48);
    c.golden_ids(temperature, top_k, top_p, min_p, repetition_penalty, at);
    return Array.from(new Int32Array(c.memory.buffer, at, 12));
  }),
  allowed: allowed.map(({ tokens, allowed, banned, after }) => {
    const bytes = (after.match(/../g) ?? []).map((byte) => parseInt(byte, 16));
    const at = c.malloc(320);
    const size = c.golden_allowed(text(tokens), text(allowed), text(banned), put(bytes), bytes.length, at);
    return Array.from(new Uint8Array(c.memory.buffer, at, size)).flatMap((fits, id) => (fits ? [id] : []));
  }),
};
console.log(JSON.stringify(found));
