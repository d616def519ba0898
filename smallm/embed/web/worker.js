// Runs the model for page.js. It receives { bytes } of the model, { seed, options } to write a text and { stop: true } to end
// it, and answers with { metadata, blockSize } once the model is loaded, { pieces, done, stopped } while it writes, or { error }.
import { LanguageModel } from "./smallm.js";

const SEND_AFTER = 30; // milliseconds between messages to the page
let running = null; // the AbortController of the text that is being written
let receive; // takes the bytes; smallm.wasm is loaded meanwhile
const loading = LanguageModel.load(new Promise((resolve) => (receive = resolve)));

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

onmessage = ({ data }) => {
  if (data.bytes) receive(data.bytes);
  else if (data.stop) running?.abort();
  else write(data.seed, data.options);
};

loading.then(
  ({ metadata, blockSize }) => postMessage({ metadata, blockSize }),
  ({ message }) => postMessage({ error: message }),
);
