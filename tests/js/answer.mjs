// One language for all hosts: a list of calls, each [name, ...arguments], and for each what came of it.

/** calls -> for each {value} or {error}. Needs nothing but its arguments, so a browser can be sent its source. */
export async function answer(LanguageModel, ort, model, calls) {
  const lm = await LanguageModel.load(model, { ort });
  const pieces = async (...args) => {
    const all = [];
    for await (const piece of lm.stream(...args)) all.push(piece);
    return all;
  };
  const first = async (n, ...args) => {
    let text = "";
    for await (const piece of lm.stream(...args)) {
      text += piece.text;
      if (--n === 0) break;
    }
    return text;
  };
  const together = (...all) => Promise.all(all.map((args) => lm.generate(...args)));
  const facts = () => ({ blockSize: lm.blockSize, vocabSize: lm.vocabSize, metadata: lm.metadata });
  const load = (source) => LanguageModel.load(source, { ort });
  const loadBytes = (bytes) => LanguageModel.load(Uint8Array.from(bytes), { ort });
  const loadAndWrite = async (source) => (await load(source)).generate("a", { maxLength: 5, rngSeed: 1 });
  const own = { pieces, first, together, facts, load, loadBytes, loadAndWrite };
  const answers = [];
  for (const [name, ...args] of calls) {
    try {
      const value = await (own[name] ? own[name](...args) : lm[name](...args));
      answers.push({ value: value instanceof Float64Array ? Array.from(value) : value });
    } catch (error) {
      answers.push({ error: `${error.name}: ${error.message}` });
    }
  }
  return answers;
}
