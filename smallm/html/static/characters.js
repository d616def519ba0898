// Shows the details of the character under the pointer or the keyboard's cursor, for each text of the page.

(() => {
  "use strict";

  const points = (text) => Array.from(text).length; // characters as Python counts them, not UTF-16 units

  const visible = (character) => ({ "\n": "↵", "\t": "⇥", " ": "␣" })[character] ?? character;

  async function readDetails(element) {
    const { characters: n, expected: K, names, data } = JSON.parse(element.textContent);
    const packed = Uint8Array.from(atob(data), (c) => c.charCodeAt(0));
    const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("deflate"));
    const bytes = await new Response(stream).arrayBuffer();
    const view = new DataView(bytes);
    return (index) => {
      const hundredths = view.getUint16(2 * index, true);
      const alternatives = [];
      for (let k = 0; k < K; k++) {
        const name = names[view.getUint16(2 * (n + k * n + index), true)];
        const p = (view.getUint8(2 * (n + K * n) + k * n + index) / 255) ** 2;
        if (name) alternatives.push({ name, p });
      }
      return { nats: hundredths === 0xffff ? null : hundredths / 100, alternatives };
    };
  }

  /** The index of the last number not above a value; the numbers ascend from 0. */
  function lastUpTo(numbers, value) {
    let low = 0;
    for (let high = numbers.length; high - low > 1; ) {
      const middle = (low + high) >> 1;
      if (numbers[middle] <= value) low = middle;
      else high = middle;
    }
    return low;
  }

  /** Converts between the index of a character and its position in the document. */
  function readPositions(text) {
    const elements = [...text.querySelectorAll("[data-at]")];
    const starts = elements.map((element) => Number(element.dataset.at));
    const total = starts.length ? starts.at(-1) + points(elements.at(-1).textContent) : 0;

    function* nodes(span) {
      const walker = document.createTreeWalker(span, NodeFilter.SHOW_TEXT);
      while (walker.nextNode()) yield walker.currentNode;
    }

    function rangeOf(index) {
      const number = lastUpTo(starts, index);
      let left = index - starts[number];
      for (const node of nodes(elements[number])) {
        const characters = Array.from(node.data);
        if (left < characters.length) {
          const offset = characters.slice(0, left).join("").length;
          const range = document.createRange();
          range.setStart(node, offset);
          range.setEnd(node, offset + characters[left].length);
          return range;
        }
        left -= characters.length;
      }
      return null;
    }

    function indexOf(node, offset) {
      const span = node.parentElement?.closest("[data-at]");
      if (!span || node.nodeType !== Node.TEXT_NODE) return null;
      let index = Number(span.dataset.at);
      for (const other of nodes(span)) {
        if (other === node) return index + points(node.data.slice(0, offset));
        index += points(other.data);
      }
      return null;
    }

    const within = ({ left, right, top, bottom }, x, y) => left <= x && x <= right && top <= y && y <= bottom;

    /** The index of the character under a point. The browser gives the caret, which stands between two characters. */
    function indexAt(x, y) {
      const caret = document.caretPositionFromPoint?.(x, y);
      const range = caret ? null : document.caretRangeFromPoint?.(x, y);
      const [node, offset] = caret ? [caret.offsetNode, caret.offset] : [range?.startContainer, range?.startOffset];
      const near = node && text.contains(node) ? indexOf(node, offset) : null;
      if (near === null) return null;
      for (const index of [near, near - 1]) {
        const rects = index >= 0 && index < total ? rangeOf(index)?.getClientRects() : null;
        if (rects && [...rects].some((rect) => within(rect, x, y))) return index;
      }
      return null;
    }

    const lines = [0]; // index of the first character of each line
    Array.from(text.textContent).forEach((character, index) => character === "\n" && lines.push(index + 1));

    /** Line and column of an index, both counted from 1. */
    function lineAndColumn(index) {
      const line = lastUpTo(lines, index);
      return [line + 1, index - lines[line] + 1];
    }

    return { total, rangeOf, indexAt, lineAndColumn, marked: elements.filter((element) => element.id) };
  }

  function percent(p) {
    if (p < 1e-5) return "less than 0.001 %";
    return `${Number((100 * p).toPrecision(p < 0.1 ? 1 : 2))} %`;
  }

  function element(tag, className, ...content) {
    const made = document.createElement(tag);
    if (className) made.className = className;
    made.append(...content);
    return made;
  }

  async function explain(container) {
    const text = container.querySelector(".text");
    const panel = container.querySelector(".detail");
    const details = await readDetails(container.querySelector("script"));
    const { total, rangeOf, indexAt, lineAndColumn, marked } = readPositions(text);
    const cursor = element("span", "cursor");
    let current = null;

    function show(index) {
      const range = rangeOf(index);
      if (!range) return;
      current = index;
      const { nats, alternatives } = details(index);
      const character = range.toString();
      const shown = visible(character);
      const [line, column] = lineAndColumn(index);
      const surprisal =
        nats === null ? "the first character is not predicted" : `${nats.toFixed(2)} nats, probability ${percent(Math.exp(-nats))}`;
      const list = element("ol", "");
      for (const { name, p } of alternatives) {
        const content = [element("code", "", visible(name)), ` ${percent(p)}`];
        const item = element("li", visible(name) === shown ? "actual" : "", ...content);
        item.style.setProperty("--share", `${100 * p}%`);
        list.append(item);
      }
      const position = element("p", "", element("code", "actual", shown), ` line ${line}, column ${column}: ${surprisal}`);
      panel.replaceChildren(position, ...(alternatives.length ? [list] : []));
      panel.hidden = false;
      const box = range.getClientRects()[0] ?? range.getBoundingClientRect();
      const base = text.getBoundingClientRect();
      Object.assign(cursor.style, {
        left: `${box.left - base.left - text.clientLeft}px`,
        top: `${box.top - base.top - text.clientTop}px`,
        width: `${box.width}px`,
        height: `${box.height}px`,
      });
      if (!cursor.isConnected) text.append(cursor);
    }

    function hide() {
      panel.hidden = true;
      cursor.remove();
      current = null;
    }

    function go(index) {
      show(Math.max(0, Math.min(total - 1, index)));
      cursor.scrollIntoView({ block: "nearest" });
    }

    function goToSpan(step) {
      const starts = marked.map((span) => Number(span.dataset.at));
      const at = current ?? -1;
      const next = step > 0 ? starts.find((start) => start > at) : starts.findLast((start) => start < at);
      if (next !== undefined) go(next);
    }

    const keys = {
      ArrowRight: () => go((current ?? -1) + 1),
      ArrowLeft: () => go((current ?? 1) - 1),
      n: () => goToSpan(1),
      p: () => goToSpan(-1),
      Escape: hide,
    };
    const point = (event) => {
      const index = indexAt(event.clientX, event.clientY);
      if (index !== null && index !== current) show(index);
    };
    text.addEventListener("pointermove", point);
    text.addEventListener("click", point);
    text.addEventListener("focus", () => current === null && text.matches(":focus-visible") && go(0));
    text.addEventListener("keydown", (event) => {
      if (event.ctrlKey || event.metaKey || event.altKey || !keys[event.key]) return;
      event.preventDefault();
      keys[event.key]();
    });
    addEventListener("resize", () => current !== null && show(current));
    addEventListener("hashchange", () => {
      const span = marked.find((span) => `#${span.id}` === location.hash);
      if (span) show(Number(span.dataset.at));
    });
  }

  for (const container of document.querySelectorAll(".characters")) explain(container);
})();
