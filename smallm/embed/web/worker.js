// Runs the model for page.js. It receives { seed, options } to write a text and { stop: true } to end it, and answers with
// { metadata, blockSize } once the model is loaded, { pieces, done, stopped } while it writes, or { error }.
import { LanguageModel } from "./smallm.js";

const SEND_AFTER = 30; // milliseconds between messages to the page
const WARM_UP = 300; // characters
let running = null; // the AbortController of the text that is being written
const loading = load();

async function load() {
  const response = await fetch("model.onnx");
  if (!response.ok) throw new Error(`cannot load model.onnx: the server answers ${response.status}; reload the page`);
  const parts = [];
  let received = 0;
  for (const reader = response.body.getReader(); ; ) {
    const { done, value } = await reader.read();
    if (done) break;
    parts.push(value);
    postMessage({ received: (received += value.length) });
  }
  return LanguageModel.load(await new Blob(parts).arrayBuffer());
}

async function write(seed, options) {
  const lm = await loading;
  running?.abort();
  running = new AbortController();
  const { signal } = running;
  let pieces = [];
  let sent = -Infinity; // the first character is shown at once
  try {
    for await (const piece of lm.stream(seed, { ...options, signal })) {
      pieces.push(piece);
      if (performance.now() - sent < SEND_AFTER) continue;
      postMessage({ pieces });
      pieces = [];
      sent = performance.now();
    }
  } catch (error) {
    if (!signal.aborted) return postMessage({ error: error.message });
  }
  postMessage({ pieces, done: true, stopped: signal.aborted });
}

/** Writes a text that is not shown: browsers optimise code while it runs, so the next text is fast from its beginning. */
async function warmUp(lm) {
  running = new AbortController();
  const { signal } = running;
  try {
    for await (const _ of lm.stream("", { maxLength: WARM_UP, signal }));
  } catch {} // an error of the model is reported with the next text
}

onmessage = ({ data }) => {
  if (data.stop) running?.abort();
  else write(data.seed, data.options);
};

loading.then(
  (lm) => {
    postMessage({ metadata: lm.metadata, blockSize: lm.blockSize });
    if (!running) warmUp(lm);
  },
  ({ message }) => postMessage({ error: message }),
);
