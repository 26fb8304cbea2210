import { element, renderMarkdown } from "./markdown.js";

const $ = (id) => document.getElementById(id);
const KEPT = ["temperature", "top-p", "seed", "max-tokens", "system"];

let messages = []; // the conversation, as the API takes it
let running = null; // AbortController of the answer that is being written

// Asking

async function ask() {
  const controller = (running = new AbortController());
  const seed = $("seed").value === "" ? Math.floor(Math.random() * 2 ** 31) : Number($("seed").value);
  const view = addAnswer();
  const started = performance.now();
  let text = "";
  let finish = null;
  let usage = null;
  hideError();
  showRunning(true);
  try {
    for await (const chunk of completion(seed, controller.signal)) {
      const choice = chunk.choices[0];
      usage = chunk.usage ?? usage;
      if (choice?.delta?.content) view.show((text += choice.delta.content));
      finish = choice?.finish_reason ?? finish;
    }
    if (finish === null) throw new Error("The connection ended before the answer did.");
  } catch (error) {
    if (controller.signal.aborted) finish = "stopped";
    else showError(error);
  }
  if (running !== controller) return; // a new chat has begun meanwhile
  running = null;
  showRunning(false);
  if (text || finish) {
    messages.push({ role: "assistant", content: text });
    view.end(text, { finish, seed, usage, seconds: (performance.now() - started) / 1000 });
  } else {
    view.remove();
  }
}

async function* completion(seed, signal) {
  const system = $("system").value.trim();
  const body = {
    messages: system ? [{ role: "system", content: system }, ...messages] : messages,
    temperature: Number($("temperature").value),
    top_p: Number($("top-p").value),
    seed,
    stream: true,
    stream_options: { include_usage: true },
  };
  if ($("max-tokens").value !== "") body.max_tokens = Number($("max-tokens").value);
  let response;
  try {
    response = await fetch("/v1/chat/completions", {
      method: "POST",
      headers: { "Content-Type": "application/json" },
      body: JSON.stringify(body),
      signal,
    });
  } catch (error) {
    throw signal.aborted ? error : new Error("The server cannot be reached. Is it running?");
  }
  if (!response.ok) {
    const told = await response.json().catch(() => null);
    throw new Error(told?.error?.message ?? `The server answered ${response.status}.`);
  }
  let pending = "";
  for await (const piece of pieces(response.body.pipeThrough(new TextDecoderStream()).getReader())) {
    pending += piece;
    const events = pending.split("\n\n");
    pending = events.pop();
    for (const event of events) {
      const data = event.replace(/^data: /, "");
      if (data === "[DONE]") return;
      const chunk = JSON.parse(data);
      if (chunk.error) throw new Error(chunk.error.message);
      yield chunk;
    }
  }
}

async function* pieces(reader) {
  while (true) {
    const { done, value } = await reader.read();
    if (done) return;
    yield value;
  }
}

// Conversation

function addQuestion(text) {
  $("welcome").hidden = true;
  $("messages").append(element("div", [text], "message user"));
  messages.push({ role: "user", content: text });
}

function addAnswer() {
  const body = element("div", [], "body waiting");
  const node = element("div", [body], "message assistant");
  document.querySelectorAll(".again").forEach((button) => button.remove());
  $("messages").append(node);
  scrollDown(true);
  let frame = 0;
  const draw = (text) => {
    body.replaceChildren(renderMarkdown(text));
    scrollDown();
  };
  return {
    show(text) {
      cancelAnimationFrame(frame);
      frame = requestAnimationFrame(() => draw(text));
    },
    end(text, outcome) {
      cancelAnimationFrame(frame);
      draw(text);
      body.classList.remove("waiting");
      if (!text) body.append(element("p", ["(an empty answer)"], "help"));
      node.append(describe(text, outcome));
      scrollDown();
    },
    remove() {
      node.remove();
    },
  };
}

function describe(text, { finish, seed, usage, seconds }) {
  const tokens = usage?.completion_tokens;
  const notes = [`seed ${seed}`];
  if (tokens) notes.unshift(`${tokens} tokens`, `${(tokens / seconds).toFixed(1)} tokens/s`);
  if (finish === "length") notes.push("cut at the longest length");
  if (finish === "stopped") notes.push("stopped");
  if (finish === null) notes.push("incomplete");
  const copy = element("button", ["Copy"]);
  copy.addEventListener("click", () => copyText(text, copy));
  const again = element("button", ["Answer again"], "again");
  again.addEventListener("click", answerAgain);
  return element("div", [copy, again, ...notes.map((note) => element("span", [note]))], "meta");
}

async function copyText(text, button) {
  try {
    await navigator.clipboard.writeText(text);
    button.textContent = "Copied";
  } catch {
    button.textContent = "Copying is not allowed here";
  }
  setTimeout(() => (button.textContent = "Copy"), 1500);
}

function answerAgain() {
  if (running) return;
  if (messages.at(-1)?.role === "assistant") {
    messages.pop();
    $("messages").lastElementChild.remove();
  }
  ask();
}

function newChat() {
  running?.abort();
  running = null;
  messages = [];
  $("messages").replaceChildren();
  $("welcome").hidden = false;
  hideError();
  showRunning(false);
  $("question").focus();
}

// Follow the text down, unless the reader has scrolled up.
let following = true;
function scrollDown(force = false) {
  following ||= force;
  if (following) $("scroll").scrollTop = $("scroll").scrollHeight;
}
$("scroll").addEventListener("scroll", () => {
  const view = $("scroll");
  following = view.scrollHeight - view.scrollTop - view.clientHeight < 60;
});

// State of the page

function showRunning(is) {
  $("messages").setAttribute("aria-busy", is); // a screen reader waits for the whole answer
  $("send").hidden = is;
  $("stop").hidden = !is;
  updateComposer();
}

function updateComposer() {
  const question = $("question");
  question.style.height = "auto";
  question.style.height = `${question.scrollHeight}px`;
  $("send").disabled = !question.value.trim() || running !== null;
}

function showError(error) {
  $("error-text").textContent = error.message.replace(/^./, (letter) => letter.toUpperCase());
  $("retry").hidden = messages.length === 0;
  $("error").hidden = false;
  scrollDown(true);
}

function hideError() {
  $("error").hidden = true;
}

function applySettings() {
  $("temperature-value").textContent = Number($("temperature").value).toFixed(2);
  $("top-p-value").textContent = Number($("top-p").value).toFixed(2);
  const theme = document.querySelector("input[name=theme]:checked").value;
  document.documentElement.dataset.theme = theme;
  const kept = Object.fromEntries(KEPT.map((id) => [id, $(id).value]));
  localStorage.setItem("maxlm", JSON.stringify({ ...kept, theme }));
}

function restoreSettings() {
  let kept = {};
  try {
    kept = JSON.parse(localStorage.getItem("maxlm")) ?? {};
  } catch {
    // What is stored cannot be read: begin with the defaults.
  }
  for (const id of KEPT) if (typeof kept[id] === "string") $(id).value = kept[id];
  const theme = [...document.getElementsByName("theme")].find((input) => input.value === kept.theme);
  if (theme) theme.checked = true;
  applySettings();
}

async function showModel() {
  try {
    const { data } = await (await fetch("/v1/models")).json();
    $("model-name").textContent = data[0].id;
    $("max-tokens").max = data[0].max_model_len - 1;
    document.title = `${data[0].id} - maxlm chat`;
  } catch {
    showError(new Error("The server cannot be reached. Is it running?"));
  }
}

// Events

$("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  const text = $("question").value.trim();
  if (!text || running) return;
  // A question that failed stays in the conversation; a new one takes its place.
  if (messages.at(-1)?.role === "user") {
    messages.pop();
    $("messages").lastElementChild.remove();
  }
  addQuestion(text);
  $("question").value = "";
  ask();
});
$("question").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    $("composer").requestSubmit();
  }
});
$("question").addEventListener("input", updateComposer);
$("stop").addEventListener("click", () => {
  running?.abort();
  $("question").focus();
});
$("retry").addEventListener("click", answerAgain);
$("dismiss").addEventListener("click", hideError);
$("new-chat").addEventListener("click", newChat);
$("open-settings").addEventListener("click", () => $("settings").showModal());
$("settings").addEventListener("input", applySettings);
$("settings").addEventListener("click", (event) => {
  if (event.target === $("settings")) $("settings").close(); // the backdrop
});

restoreSettings();
updateComposer();
showModel();
