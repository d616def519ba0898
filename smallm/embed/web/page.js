// The page's script: loads the model, and writes into the page what it writes.

const at = (id) => document.getElementById(id);
const MOST_LENGTH = Number(at("maxLength").max);
const MOST_SURPRISE = Number(at("most-surprise").value); // nats from which a character has the full colour
const LOADED_BYTES = Number(at("loaded").value);
const FIELDS = ["seed", "temperature", "topK", "maxLength", "rngSeed"].map(at); // named as `stream` names them
let lm;
let run = null; // the one that writes: { stopped }

async function load() {
  let received = 0;
  at("status").textContent = "Loading the model…";
  async function download(path) {
    const response = await fetch(path);
    if (!response.ok) throw new Error(`cannot load ${path}: the server answers ${response.status}; reload the page`);
    const parts = [];
    for (const reader = response.body.getReader(); ; ) {
      const { done, value } = await reader.read();
      if (done) return new Uint8Array(await new Blob(parts).arrayBuffer());
      parts.push(value);
      received += value.length;
      at("progress").textContent = `${Math.min(100, Math.round((100 * received) / LOADED_BYTES))} %`;
    }
  }
  const [ort, { LanguageModel }, wasm, model] = await Promise.all([
    import("./onnxruntime/ort.js"),
    import("./smallm.js"),
    download("onnxruntime/ort.wasm"),
    download("model.onnx"),
  ]);
  ort.env.wasm.wasmBinary = wasm.buffer;
  lm = await LanguageModel.load(model, { ort });
  const { sampling, training, precision } = lm.metadata;
  at("temperature").value = sampling.temperature ?? at("temperature").value;
  at("topK").value = sampling.top_k ?? at("topK").value;
  const { text = "some text", parameters, characters } = training;
  at("about").textContent =
    `A language model of ${parameters ? `${count(parameters)} parameters in ` : ""}${precision}. It has read ${text}` +
    `${characters ? `, ${count(characters)} characters,` : ""} and goes on with what you begin.`;
  if (lm.metadata.window) at("overflow").add(new Option("slide: fast and exact", "slide", true, true), 0);
  at("overflow-hint").textContent = `past ${count(lm.blockSize)} characters`;
  at("status").textContent = "Ready";
  at("progress").textContent = "";
}

function count(number) {
  return Number(number).toLocaleString("en");
}

/** What the fields say, for `stream`; an empty number is the field's own. */
function readFields() {
  const options = { overflow: at("overflow").value };
  for (const field of FIELDS.slice(1)) {
    if (field.value.trim() === "" || field.validity.badInput) fail(field, `${field.id} is not a number; type one`);
    options[field.id] = Number(field.value);
  }
  if (options.maxLength > MOST_LENGTH) {
    fail(at("maxLength"), `maxLength = ${options.maxLength} is out of range; this page writes at most ${MOST_LENGTH}`);
  }
  return options;
}

function fail(field, message) {
  throw Object.assign(new Error(message), { field });
}

async function write() {
  showError(null);
  const mine = (run = { stopped: false });
  let written = 0;
  let pending = document.createDocumentFragment();
  const output = at("text");
  try {
    const seed = at("seed").value;
    const pieces = lm.stream(seed, readFields());
    output.replaceChildren(Object.assign(document.createElement("span"), { className: "seed", textContent: seed }));
    output.setAttribute("aria-busy", "true"); // it is read out when it is whole
    at("write").textContent = "Stop";
    at("status").textContent = "Writing…";
    const start = performance.now();
    const speed = () => `${count(Math.round((1000 * written) / (performance.now() - start)))} characters per second`;
    let shown = start;
    const show = () => {
      output.append(pending);
      pending = document.createDocumentFragment();
      shown = performance.now();
    };
    for await (const piece of pieces) {
      if (mine.stopped) break;
      pending.append(coloured(piece));
      written++;
      if (performance.now() - shown > 30) {
        show();
        at("progress").textContent = speed();
      }
    }
    at("progress").textContent = written ? speed() : "";
    at("status").textContent = `${mine.stopped ? "Stopped" : "Done"}: ${count(written)} characters`;
    show();
  } catch (error) {
    output.append(pending);
    at("status").textContent = at("progress").textContent = "";
    showError(error);
  }
  output.setAttribute("aria-busy", "false");
  at("write").textContent = "Write";
  run = null;
}

function coloured({ text, surprise }) {
  const element = document.createElement("span");
  element.textContent = text;
  element.title = `${surprise.toFixed(2)} nats`;
  element.style.setProperty("--surprise", Math.round(Math.min(100, (100 * surprise) / MOST_SURPRISE)));
  return element;
}

/** Says it below the form, and marks the field that it is about. */
function showError(error) {
  const message = error?.message ?? "";
  const names = ({ id }) => message.startsWith(`${id} `) || message.startsWith(`the ${id} text `);
  const culprit = error?.field ?? FIELDS.find(names);
  for (const field of FIELDS) {
    field.removeAttribute("aria-invalid");
    field.removeAttribute("aria-describedby");
  }
  culprit?.setAttribute("aria-invalid", "true");
  culprit?.setAttribute("aria-describedby", "error");
  culprit?.focus();
  at("error").textContent = message;
  at("error").hidden = !message;
}

function stopOrWrite() {
  if (run) run.stopped = true;
  else write();
}

at("form").addEventListener("submit", (event) => {
  event.preventDefault();
  if (lm) stopOrWrite();
});
at("seed").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) at("form").requestSubmit();
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape" && run) run.stopped = true;
});
at("another").addEventListener("click", () => {
  at("rngSeed").value = crypto.getRandomValues(new Uint32Array(1))[0];
  if (!run) write();
});

load().then(
  () => (at("write").disabled = at("another").disabled = false),
  (error) => {
    at("status").textContent = at("progress").textContent = "";
    showError(error);
  },
);
