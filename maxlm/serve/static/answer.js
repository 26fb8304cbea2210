// The turns of the conversation on the page.

import { element, MarkdownView } from "./markdown.js";

export function addQuestion(parent, text) {
  const node = element("article", [text], "message user");
  node.ariaLabel = "You";
  parent.append(node);
}

export function addNote(parent, text, before) {
  const node = element("p", [text], "note");
  parent.insertBefore(node, before ?? null);
  return node;
}

// An answer that is shown as it streams, followed by its notes and buttons.
export function addAnswer(parent, { onDrawn }) {
  const body = element("div", [], "body waiting");
  const node = element("article", [body], "message assistant");
  node.ariaLabel = "Model";
  parent.querySelectorAll(".again").forEach((button) => button.remove());
  parent.append(node);
  const drawing = new MarkdownView(body, onDrawn);
  return {
    show: (text) => drawing.update(text),
    end(text, outcome, actions) {
      body.classList.remove("waiting");
      node.append(describe(text, outcome, actions));
      if (text) drawing.end(text);
      else body.replaceChildren(element("p", ["(an empty answer)"], "help"));
      onDrawn();
    },
    remove: () => node.remove(),
  };
}

const ENDINGS = new Map([
  ["length", "truncated at the token limit"],
  ["stopped", "stopped"],
  [null, "incomplete"],
]);

function describe(text, { finish, seed, usage, seconds, note }, actions) {
  const tokens = usage?.completion_tokens;
  const notes = [];
  if (tokens) notes.push(`${tokens} tokens`, `${(tokens / seconds).toFixed(1)} tokens/s`);
  if (seed !== undefined) notes.push(`seed ${seed}`);
  if (ENDINGS.has(finish)) notes.push(ENDINGS.get(finish));
  if (note) notes.push(note);
  const copy = element("button", ["Copy"]);
  copy.addEventListener("click", () => copyText(text, copy));
  const buttons = actions.map(({ label, run }) => {
    const button = element("button", [label], "again");
    button.addEventListener("click", run);
    return button;
  });
  return element("div", [copy, ...buttons, ...notes.map((note) => element("span", [note]))], "meta");
}

async function copyText(text, button) {
  const isCopied = (await writeClipboard(text)) || copySelection(text);
  button.textContent = isCopied ? "Copied" : "Copying is not allowed";
  button.focus();
  setTimeout(() => (button.textContent = "Copy"), 1500);
}

// The clipboard is available only on https or localhost, and with the user's permission.
async function writeClipboard(text) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    return false;
  }
}

function copySelection(text) {
  const field = element("textarea", [], "hidden");
  field.value = text;
  document.body.append(field);
  field.select();
  const isCopied = document.execCommand("copy");
  field.remove();
  return isCopied;
}
