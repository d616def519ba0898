// The script of the page: loads the model and shows the text that it generates.

const at = (id) => document.getElementById(id);
const MAX_LENGTH = Number(at("maxLength").max);
const MAX_SURPRISAL = Number(at("max-surprisal").value); // nats at which a character gets the full colour
const LOADED_BYTES = Number(at("loaded").value);
const FIELDS = ["seed", "temperature", "topK", "maxLength", "rngSeed"].map(at); // the ids are option names of `stream`
let lm;
let run = null; // the running generation: { stopped }

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
    `A language model of ${parameters ? `${count(parameters)} parameters in ` : ""}${precision}. It was trained on ${text}` +
    `${characters ? `, ${count(characters)} characters,` : ""} and continues the text that you enter.`;
  if (lm.metadata.window) at("overflow").add(new Option("slide: fast and exact", "slide", true, true), 0);
  at("overflow-hint").textContent = `beyond ${count(lm.blockSize)} characters`;
  at("status").textContent = "Ready";
  at("progress").textContent = "";
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

function fail(field, message) {
  throw Object.assign(new Error(message), { field });
}

async function write() {
  showError(null);
  const current = (run = { stopped: false });
  let written = 0;
  let pending = document.createDocumentFragment();
  const output = at("text");
  try {
    const seed = at("seed").value;
    const chunks = lm.stream(seed, readFields());
    output.replaceChildren(Object.assign(document.createElement("span"), { className: "seed", textContent: seed }));
    output.setAttribute("aria-busy", "true"); // screen readers read the text when it is complete
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
    for await (const chunk of chunks) {
      if (current.stopped) break;
      pending.append(coloured(chunk));
      written++;
      if (performance.now() - shown > 30) {
        show();
        at("progress").textContent = speed();
      }
    }
    at("progress").textContent = written ? speed() : "";
    at("status").textContent = `${current.stopped ? "Stopped" : "Done"}: ${count(written)} characters`;
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

function coloured({ text, surprisal }) {
  const element = document.createElement("span");
  element.textContent = text;
  element.title = `${surprisal.toFixed(2)} nats`;
  element.style.setProperty("--surprisal", Math.round(Math.min(100, (100 * surprisal) / MAX_SURPRISAL)));
  return element;
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
