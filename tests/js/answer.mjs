// The language of the tests: a list of calls, each [name, ...arguments], and for each its result.

/** calls -> for each {value} or {error}. Needs nothing but its arguments, so a browser can be sent its source. */
export async function answer(LanguageModel, model, calls, options = {}) {
  const lm = await LanguageModel.load(model, options);
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
  const load = (source) => LanguageModel.load(source);
  const loadBytes = (bytes) => LanguageModel.load(Uint8Array.from(bytes));
  const loadAndWrite = async (source) => (await load(source)).generate("a", { maxLength: 5, rngSeed: 1 });
  const all = async (stream) => {
    let text = "";
    for await (const piece of stream) text += piece.text;
    return text;
  };
  const branches = async (n, seed, options, ...branches) => {
    const stream = lm.stream(seed, options);
    for (let i = 0; i < n; i++) await stream.next();
    const streams = [...branches.map((random) => stream.branch(random)), stream];
    return Promise.all(streams.map(all));
  };
  const aborted = async (milliseconds, seed, options) => {
    const stream = lm.stream(seed, { ...options, signal: AbortSignal.timeout(milliseconds) });
    let text = "";
    const begun = performance.now();
    try {
      for await (const piece of stream) text += piece.text;
    } catch (error) {
      return [error.name, text.length, performance.now() - begun];
    }
  };
  const released = async () => {
    const other = await LanguageModel.load(model);
    await other.release();
    return other.generate("a");
  };
  const own = { branches, aborted, released, pieces, first, together, facts, load, loadBytes, loadAndWrite };
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
