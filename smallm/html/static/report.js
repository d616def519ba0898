// Shows the values of a chart's lines under the mouse or a finger, or step by step with the arrow keys. Opens all details
// for printing.

for (const svg of document.querySelectorAll("[data-chart]")) {
  const { x, lines } = JSON.parse(svg.dataset.chart);
  const pointer = svg.querySelector(".pointer");
  const values = svg.parentElement.querySelector(".values");
  const stops = [...new Set(lines.flatMap(({ points }) => points.map((point) => point[0])))].sort((a, b) => a - b);
  let current = -1;

  const nearest = (list, at, place) =>
    list.reduce((best, one) => (Math.abs(place(one) - at) < Math.abs(place(best) - at) ? one : best));
  const shown = (value) => value.toLocaleString("en", { maximumSignificantDigits: 5 });

  function show(across) {
    const stop = nearest(stops, across, (one) => one);
    if (stop === stops[current]) return;
    current = stops.indexOf(stop);
    const reached = lines.filter(({ points }) => points.length && stop <= points.at(-1)[0]);
    const found = reached.map((line) => ({ line, point: nearest(line.points, stop, (point) => point[0]) }));
    pointer.setAttribute("x1", stop);
    pointer.setAttribute("x2", stop);
    pointer.style.visibility = "visible";
    const at = nearest(found, stop, ({ point }) => point[0]).point[2];
    const parts = found.map(({ line, point }) => {
      const part = document.createElement("span");
      part.className = `c${line.colour % 8}`;
      part.textContent = `${line.name} ${shown(point[3])}${point[2] === at ? "" : ` at ${shown(point[2])}`}`;
      return part;
    });
    values.replaceChildren(`${x} ${shown(at)}: `, ...parts);
  }

  function point(event) {
    const across = new DOMPoint(event.clientX, event.clientY).matrixTransform(svg.getScreenCTM().inverse()).x;
    if (stops.length) show(across);
  }

  svg.addEventListener("pointermove", point);
  svg.addEventListener("pointerdown", point);
  svg.addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (!step || !stops.length) return;
    event.preventDefault();
    show(stops[Math.max(0, Math.min(stops.length - 1, current + step))]);
  });
}

// The samples of a run: a slider shows one of them at a time. Without scripts they are a list.

for (const history of document.querySelectorAll(".history")) {
  const samples = [...history.children];
  if (samples.length < 2) continue;
  const slider = document.createElement("input");
  Object.assign(slider, { type: "range", min: 0, max: samples.length - 1, value: samples.length - 1 });
  slider.setAttribute("aria-label", "Sample, from the first to the last evaluation");
  const show = () => {
    samples.forEach((sample, number) => (sample.hidden = number !== Number(slider.value)));
    slider.setAttribute("aria-valuetext", samples[slider.value].querySelector("figcaption").textContent);
  };
  slider.addEventListener("input", show);
  history.before(slider);
  show();
}

addEventListener("beforeprint", () => document.querySelectorAll("details").forEach((one) => (one.open = true)));
