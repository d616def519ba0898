// node golden.mjs SMALLM_JS GOLDEN.json: the draws, ids and allowed ids of golden.json as this host finds them, as JSON.
import { readFile } from "node:fs/promises";
import { pathToFileURL } from "node:url";

const [module, golden] = process.argv.slice(2);
const { AllowedCharacters, Rng, Vocabulary, mix, applyRepetitionPenalty, sample } = await import(pathToFileURL(module));
const { draws, ids, allowed } = JSON.parse(await readFile(golden, "utf8"));

/** 256 logits that any host computes exactly: multiples of 2 ** -21 from -4 to 4. */
function goldenLogits(step) {
  return Float32Array.from({ length: 256 }, (_, id) => (mix(256 * step + id) >>> 8) * 2 ** -21 - 4);
}

const found = {
  draws: draws.map(({ rng_seed, stream_number, x }) => {
    const rng = new Rng(rng_seed, stream_number);
    return x.map(() => rng.uniform());
  }),
  ids: ids.map(({ temperature, top_k: topK, top_p: topP, min_p: minP, repetition_penalty }) => {
    const rng = new Rng(7);
    const taken = [];
    for (let step = 0; step < 12; step++) {
      const logits = applyRepetitionPenalty(goldenLogits(step % 3), taken.slice(-8), repetition_penalty);
      taken.push(sample(logits, rng.uniform(), { temperature, topK, topP, minP }));
    }
    return taken;
  }),
  allowed: allowed.map(({ tokens, allowed, banned, after }) => {
    const pending = (after.match(/../g) ?? []).map((byte) => parseInt(byte, 16));
    const may = new AllowedCharacters(new Vocabulary(tokens), allowed ?? undefined, banned).after(pending);
    return may.flatMap((fits, id) => (fits ? [id] : []));
  }),
};
console.log(JSON.stringify(found));
