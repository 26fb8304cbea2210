// Renders streamed Markdown. The server returns sanitized HTML; only blocks that may still change are requested again,
// and only nodes that differ are replaced, so that the time is linear and a selection is kept.

import { request } from "./api.js";

const INTERVAL = 100; // minimum milliseconds between renderings
const REST = 4; // and at least this many times the duration of the last one
const MAX_LENGTH = 50_000; // limit of the server on one rendering

export class MarkdownView {
  #node;
  #onDrawn;
  #text = "";
  #drawn = null; // the text shown
  #settledText = 0; // length of the text of finished blocks
  #settledNodes = 0; // and the number of their nodes
  #loop = null;
  #drawing = null;
  #ended = false;

  constructor(node, onDrawn = () => {}) {
    this.#node = node;
    this.#onDrawn = onDrawn;
  }

  update(text) {
    this.#text = text;
    this.#loop ??= this.#follow();
  }

  // The last rendering takes the whole text, because links may be defined at its end.
  async end(text) {
    this.#ended = true;
    this.#text = text;
    await this.#drawing;
    if (text.length <= MAX_LENGTH) this.#settledText = this.#settledNodes = 0;
    await this.#draw();
  }

  async #follow() {
    while (!this.#ended && this.#drawn !== this.#text) {
      const started = performance.now();
      await (this.#drawing = this.#draw());
      const pause = Math.max(INTERVAL, REST * (performance.now() - started));
      await new Promise((resolve) => setTimeout(resolve, pause));
    }
    this.#loop = null;
  }

  async #draw() {
    const text = this.#text;
    const { finished, open, consumed } = await render(text.slice(this.#settledText));
    patchChildren(this.#node, this.#settledNodes, [...finished, ...open]);
    this.#settledNodes += finished.length;
    this.#settledText += consumed;
    this.#drawn = text;
    this.#onDrawn();
  }
}

// Nodes of the finished and the open blocks; if rendering fails, the text is shown as it is.
async function render(text) {
  try {
    if (text.length > MAX_LENGTH) throw new Error("too long");
    const { finished, open, consumed } = await (await request("/render", { body: { text } })).json();
    return { finished: nodesOf(finished), open: nodesOf(open), consumed };
  } catch {
    return { finished: [], open: [element("p", [text], "plain")], consumed: 0 };
  }
}

function nodesOf(blocks) {
  const template = document.createElement("template");
  template.innerHTML = blocks.map((html) => html.trim()).join("");
  for (const table of template.content.querySelectorAll("table")) {
    const frame = element("div", [], "table");
    table.replaceWith(frame);
    frame.append(table);
  }
  // Scrollable elements must be focusable for the keyboard.
  for (const node of template.content.querySelectorAll("pre, .table")) node.tabIndex = 0;
  return [...template.content.childNodes];
}

function patchChildren(parent, from, fresh) {
  let old = parent.childNodes[from] ?? null;
  for (const node of fresh) {
    const next = old?.nextSibling ?? null;
    if (old) patch(old, node);
    else parent.append(node);
    old = next;
  }
  while (old) {
    const next = old.nextSibling;
    old.remove();
    old = next;
  }
}

function patch(old, fresh) {
  if (old.isEqualNode(fresh)) return;
  if (old.nodeType === Node.TEXT_NODE && fresh.nodeType === Node.TEXT_NODE) {
    let same = 0;
    while (same < old.length && old.data[same] === fresh.data[same]) same++;
    old.replaceData(same, old.length - same, fresh.data.slice(same));
  } else if (old.cloneNode(false).isEqualNode(fresh.cloneNode(false))) {
    patchChildren(old, 0, [...fresh.childNodes]);
  } else {
    old.replaceWith(fresh);
  }
}

export function element(tag, children = [], className = "") {
  const node = document.createElement(tag);
  if (className) node.className = className;
  node.append(...children);
  return node;
}
