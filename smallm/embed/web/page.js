// The script of the page: shows the text that worker.js generates.

const at = (id) => document.getElementById(id);
const MAX_LENGTH = Number(at("maxLength").max);
const MIN_SURPRISAL = Number(at("min-surprisal").value); // nats up to which a character has no colour
const MAX_SURPRISAL = Number(at("max-surprisal").value); // nats from which a character has the full colour
const MAX_BLOCK = 2000; // characters of a block of the text
const MODEL_BYTES = Number(at("loaded").value);
const FIELDS = ["seed", "temperature", "topK", "maxLength", "rngSeed"].map(at); // the ids are option names of `stream`
const worker = new Worker("worker.js", { type: "module" });
let model = null; // its metadata and blockSize once it is loaded
let chosen = null; // the character of the text whose surprisal is shown
let run = null; // the text that is being written: { start, written, again }, again = another text follows
at("status").textContent = "Loading the model…";
at("settings").open = matchMedia("(min-width: 40rem)").matches; // on a phone the text comes first

function showModel() {
  const { metadata, blockSize } = model;
  const { sampling, training, precision } = metadata;
  at("temperature").value = sampling.temperature ?? at("temperature").value;
  at("topK").value = sampling.top_k ?? at("topK").value;
  const { parameters, characters } = training;
  const text = typeof training.text === "string" ? training.text : "some text";
  document.title = at("title").textContent = text.replace(/\.\w+$/, "");
  const size = Number.isSafeInteger(parameters) ? `${count(parameters)} parameters in ` : "";
  const length = Number.isSafeInteger(characters) ? `, ${count(characters)} characters,` : "";
  at("about").textContent =
    `A language model of ${size}${precision}. It was trained on ${text}${length} and continues the text that you enter.`;
  if (metadata.window) at("overflow").add(new Option("slide: fast and exact", "slide", true, true), 0);
  at("overflow-hint").textContent = `beyond ${count(blockSize)} characters`;
  const address = new URLSearchParams(location.search); // a link may set the fields: ?seed=Once&rngSeed=7
  for (const field of FIELDS) field.value = address.get(field.id) ?? field.value;
  at("write").disabled = at("another").disabled = false;
  write(); // a first text, which also lets the browser optimise the module
}

/** Downloads the model while the worker starts. */
async function load() {
  const response = await fetch("model.onnx");
  if (!response.ok) throw new Error(`the server answers ${response.status}`);
  let received = 0;
  const transform = (chunk, controller) => {
    received += chunk.length;
    at("progress").textContent = `${Math.min(100, Math.round((100 * received) / MODEL_BYTES))} %`;
    controller.enqueue(chunk);
  };
  const bytes = await new Response(response.body.pipeThrough(new TransformStream({ transform }))).arrayBuffer();
  worker.postMessage({ bytes }, [bytes]);
}

function count(number) {
  return Number(number).toLocaleString("en");
}

/** The options for `stream` from the fields. Throws for a field without a number. */
function readFields() {
  const options = { overflow: at("overflow").value };
  for (const field of FIELDS.slice(1)) {
    if (field.value.trim() === "" || field.validity.badInput) fail(field, `${field.id} is not a number; enter a number`);
    options[field.id] = Number(field.value);
  }
  if (options.maxLength > MAX_LENGTH) {
    fail(at("maxLength"), `maxLength = ${options.maxLength} is out of range; this page writes at most ${MAX_LENGTH}`);
  }
  return options;
}

/** The name of a setting on the page. */
function label(field) {
  return field === at("seed") ? "" : field.labels[0].textContent;
}

function fail(field, message) {
  throw Object.assign(new Error(message), { field });
}

function write() {
  showError(null);
  try {
    const [seed, options] = [at("seed").value, readFields()];
    run = { start: performance.now(), written: 0, again: false };
    worker.postMessage({ seed, options });
    chosen = null;
    at("text").replaceChildren(document.createElement("div"));
    at("text").lastChild.append(Object.assign(document.createElement("span"), { className: "seed", textContent: seed }));
    at("text").setAttribute("aria-busy", "true"); // screen readers read the text when it is complete
    at("write").textContent = "Stop";
    at("status").textContent = "Writing…";
    at("progress").textContent = "";
  } catch (error) {
    showError(error);
  }
}

function showPieces(pieces) {
  let block = at("text").lastChild;
  for (const piece of pieces) {
    if (block.lastChild.textContent.endsWith("\n") || block.childElementCount > MAX_BLOCK) {
      at("text").append((block = document.createElement("div"))); // only the last block is laid out again
    }
    block.append(coloured(piece));
  }
  run.written += pieces.length;
  const speed = (1000 * run.written) / (performance.now() - run.start);
  if (run.written) at("progress").textContent = `${count(Math.round(speed))} characters per second`;
}

function finish() {
  at("text").setAttribute("aria-busy", "false");
  at("write").textContent = "Write";
  const { again } = run;
  run = null;
  if (again) write();
}

worker.onmessage = ({ data }) => {
  if (data.metadata) {
    model = data;
    showModel();
  }
  if (data.pieces) showPieces(data.pieces);
  if (data.done) at("status").textContent = `${data.stopped ? "Stopped" : "Done"}: ${count(run.written)} characters`;
  if (data.error) {
    at("status").textContent = at("progress").textContent = "";
    showError(new Error(data.error));
  }
  if (run && (data.done || data.error)) finish();
};
worker.onerror = () => worker.onmessage({ data: { error: "cannot start worker.js; reload the page" } });
load().catch(({ message }) => worker.onmessage({ data: { error: `cannot load model.onnx: ${message}; reload the page` } }));

function coloured({ text, surprisal }) {
  const element = document.createElement("span");
  element.textContent = text;
  element.title = `${surprisal.toFixed(2)} nats`;
  const share = (surprisal - MIN_SURPRISAL) / (MAX_SURPRISAL - MIN_SURPRISAL);
  element.style.setProperty("--surprisal", Math.round(100 * Math.min(1, Math.max(0, share))));
  return element;
}

/** Shows the surprisal of a character below the text, for touch and keyboard. */
function choose(element) {
  if (!element?.title) return;
  chosen?.classList.remove("chosen");
  chosen = element;
  chosen.classList.add("chosen");
  chosen.scrollIntoView({ block: "nearest" });
  const probability = (100 * Math.exp(-parseFloat(chosen.title))).toPrecision(2);
  at("value").textContent = `${JSON.stringify(chosen.textContent)}: ${chosen.title}, a probability of ${Number(probability)} %`;
}

/** The character before (step = -1) or after (1) the chosen one. */
function neighbour(step) {
  const characters = [...at("text").querySelectorAll("span:not(.seed)")];
  return characters[chosen ? characters.indexOf(chosen) + step : 0];
}

/** Shows the message below the form and marks the field that it concerns. */
function showError(error) {
  const message = error?.message ?? "";
  const names = ({ id }) => message.startsWith(`${id} `) || message.startsWith(`the ${id} text `);
  const field = error?.field ?? FIELDS.find(names);
  for (const each of FIELDS) {
    each.removeAttribute("aria-invalid");
    each.removeAttribute("aria-describedby");
  }
  field?.setAttribute("aria-invalid", "true");
  field?.setAttribute("aria-describedby", "error");
  field?.focus();
  if (field?.closest("details")) at("settings").open = true;
  at("error").textContent = field && label(field) ? message.replace(field.id, label(field)) : message;
  at("error").hidden = !message;
}

function stop() {
  worker.postMessage({ stop: true });
}

/** Writes a text, after stopping the one that is being written. */
function writeAnew() {
  at("text").setAttribute("aria-live", "polite"); // the first text, which no one asked for, is not read aloud
  if (!run) return write();
  run.again = true;
  stop();
}

at("form").addEventListener("submit", (event) => {
  event.preventDefault();
  if (run) stop();
  else if (model) writeAnew();
});
at("seed").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey) && model) writeAnew();
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape" && run) stop();
});
at("another").addEventListener("click", () => {
  at("rngSeed").value = crypto.getRandomValues(new Uint32Array(1))[0];
  writeAnew();
});
at("text").addEventListener("click", ({ target }) => choose(target));
at("text").addEventListener("keydown", (event) => {
  const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
  if (!step) return;
  event.preventDefault();
  choose(neighbour(step));
});
at("colours").addEventListener("change", () => at("text").classList.toggle("plain", !at("colours").checked));
at("copy").addEventListener("click", async () => {
  try {
    await navigator.clipboard.writeText(at("text").textContent);
    at("copy").textContent = "Copied";
    setTimeout(() => (at("copy").textContent = "Copy"), 2000);
  } catch {
    getSelection().selectAllChildren(at("text")); // the browser allows no access to the clipboard
    at("copy").textContent = "Selected";
  }
});
