// Two answers to one message side by side, in random order, and the buttons of a vote on them.

import { element, MarkdownView } from "./markdown.js";

const CHOICES = [
  { choice: "first", label: "A is better", key: "a" },
  { choice: "second", label: "B is better", key: "b" },
  { choice: "tie", label: "Tie", key: "t" },
  { choice: "both_bad", label: "Both bad", key: "n" },
];

// Which of two answers a vote keeps: its place; null for neither. After a tie it is the first, which is a random one.
const KEPT = { first: 0, second: 1, tie: 0, both_bad: null };

export function keptPlace(choice) {
  return KEPT[choice];
}

// `show(index, text)` takes the index of the answer in the reply; `places` are the indices in the order shown.
export function addComparison(parent, { onDrawn }) {
  const places = Math.random() < 0.5 ? [0, 1] : [1, 0];
  const bodies = places.map(() => element("div", [], "body waiting"));
  const answers = bodies.map((body, place) => {
    const node = element("article", [element("h3", ["AB"[place]]), body], "message assistant");
    node.ariaLabel = `Answer ${"AB"[place]}`;
    return node;
  });
  const node = element("section", [element("div", answers, "answers")], "comparison");
  node.ariaLabel = "Two answers";
  const drawings = bodies.map((body) => new MarkdownView(body, onDrawn));
  parent.querySelectorAll(".again").forEach((button) => button.remove());
  parent.append(node);
  return {
    places,
    show: (index, text) => drawings[places.indexOf(index)].update(text),
    // Shows both whole texts, by index, and resolves to the choice; `signal` ends the wait with null.
    askForVote(texts, signal) {
      places.forEach((index, place) => {
        bodies[place].classList.remove("waiting");
        drawings[place].end(texts[index]);
      });
      return new Promise((resolve) => {
        const bar = voteBar(resolve, signal);
        node.append(bar);
        onDrawn();
        if (!document.activeElement?.value) bar.focus(); // so that its keys work, unless a draft is being typed
      });
    },
    remove: () => node.remove(),
  };
}

function voteBar(resolve, signal) {
  const ended = new AbortController();
  const end = (choice) => {
    ended.abort();
    bar.remove();
    resolve(choice);
  };
  const buttons = CHOICES.map(({ choice, label, key }) => {
    const button = element("button", [label, " ", element("kbd", [key.toUpperCase()])]);
    button.type = "button";
    button.ariaKeyShortcuts = key.toUpperCase();
    button.addEventListener("click", () => end(choice));
    return button;
  });
  const press = (event) => {
    const isTyping = event.target.matches("input, textarea") || document.querySelector("dialog[open]");
    if (isTyping || event.ctrlKey || event.metaKey || event.altKey || event.repeat) return;
    const found = CHOICES.find(({ key }) => key === event.key.toLowerCase());
    if (found) end(found.choice);
  };
  document.addEventListener("keydown", press, { signal: ended.signal });
  signal.addEventListener("abort", () => end(null), { signal: ended.signal });
  const bar = element("div", buttons, "vote");
  bar.tabIndex = -1;
  bar.role = "group";
  bar.ariaLabel = "Which answer is better?";
  return bar;
}
