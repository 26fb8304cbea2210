// The chat page: its controls and event handlers.

import { addAnswer, addNote, addQuestion } from "./answer.js";
import { ApiError, request, streamCompletion, usePromptForKey } from "./api.js";
import { Conversation } from "./conversation.js";
import { browserStore } from "./storage.js";

const $ = (id) => document.getElementById(id);
const KEPT = ["temperature", "top-p", "seed", "max-tokens", "system"];

const conversation = new Conversation();
let running = null; // AbortController of the answer in progress
let contextLength = null;
let dropped = null; // the note in the conversation that marks which messages are no longer sent

// Asking

async function ask() {
  const controller = (running = new AbortController());
  const seed = $("seed").value === "" ? Math.floor(Math.random() * 2 ** 31) : Number($("seed").value);
  const view = addAnswer($("messages"), { onDrawn: scrollDown });
  const started = performance.now();
  hideError();
  showRunning(true);
  scrollDown(true);
  const answer = { text: "", finish: null, usage: null, error: null };
  const { start } = conversation;
  do {
    await write(answer, view, seed, controller.signal);
  } while (running === controller && answer.error?.tooLong && !answer.text && dropOldest(1));
  if (running !== controller) return; // a new chat was started in the meantime
  running = null;
  showRunning(false);
  conversation.partial = "";
  const { text, finish, usage, error } = answer;
  if (text || finish) {
    const isFull = finish === "length" && contextLength !== null && usage?.total_tokens >= contextLength - 1;
    const outcome = { finish, isFull, seed, usage, seconds: (performance.now() - started) / 1000 };
    conversation.turns.push({ role: "assistant", content: text, outcome });
    view.end(text, outcome, answerActions(outcome));
  } else {
    view.remove();
  }
  if (error?.tooLong) {
    conversation.start = start; // the question alone does not fit
    showDropped();
  }
  if (error) showFailure(error);
  save();
}

async function write(answer, view, seed, signal) {
  answer.error = null;
  try {
    for await (const chunk of streamCompletion(completionBody(seed), signal)) {
      const choice = chunk.choices[0];
      answer.usage = chunk.usage ?? answer.usage;
      answer.finish = choice?.finish_reason ?? answer.finish;
      if (!choice?.delta?.content) continue;
      answer.text += choice.delta.content;
      conversation.partial = answer.text;
      view.show(answer.text);
    }
  } catch (error) {
    if (signal.aborted) answer.finish = "stopped";
    else answer.error = error;
  }
}

function completionBody(seed) {
  const system = $("system").value.trim();
  const body = {
    messages: [...(system ? [{ role: "system", content: system }] : []), ...conversation.messages()],
    temperature: Number($("temperature").value),
    top_p: Number($("top-p").value),
    seed,
  };
  if ($("max-tokens").value !== "") body.max_tokens = Number($("max-tokens").value);
  return body;
}

function submit() {
  const text = $("question").value.trim();
  if (!text || running) return;
  if (!$("settings-form").checkValidity()) {
    $("settings").showModal();
    $("settings-form").reportValidity();
    return;
  }
  // A failed question stays in the conversation until a new one replaces it.
  if (conversation.isUnanswered) removeLast();
  conversation.turns.push({ role: "user", content: text });
  addQuestion($("messages"), text);
  $("welcome").hidden = true;
  $("question").value = "";
  save();
  ask();
}

function answerAgain() {
  if (running) return;
  if (conversation.last?.role === "assistant") removeLast();
  $("question").focus();
  ask();
}

function removeLast() {
  conversation.removeLast();
  $("messages").lastElementChild.remove();
  showDropped();
}

// The model's context

// Stops sending the `count` oldest questions and their answers, and adds a note after them.
function dropOldest(count) {
  let hasDropped = false;
  for (let i = 0; i < count && conversation.dropOldest(); i++) hasDropped = true;
  showDropped();
  return hasDropped;
}

function showDropped() {
  dropped?.remove();
  dropped = null;
  if (conversation.start === 0) return;
  const text = "The messages above no longer fit the model’s context and are no longer sent.";
  dropped = addNote($("messages"), text, $("messages").children[conversation.start]);
}

function answerActions({ isFull }) {
  const actions = [{ label: "Answer again", run: answerAgain }];
  const questions = conversation.messages().filter(({ role }) => role === "user").length;
  if (isFull && questions > 1) {
    const half = Math.floor(questions / 2);
    const run = () => !running && (dropOldest(half), answerAgain());
    actions.push({ label: "Drop the oldest messages and answer again", run });
  }
  return actions;
}

// Errors: a transient one can be retried; a permanent one puts the question back for editing.

function showFailure(error) {
  if (error.needsKey) return showError("The server requires an API key.", { label: "Enter the key", run: answerAgain });
  if (!error.isPermanent) return showError(error.message, { label: "Try again", run: answerAgain });
  if (conversation.isUnanswered && !$("question").value) {
    $("question").value = conversation.last.content;
    removeLast();
    $("welcome").hidden = conversation.turns.length > 0;
    updateComposer();
  }
  const context = contextLength === null ? "context" : `context of ${contextLength} tokens`;
  const tooLong = `This message is longer than the model’s ${context}. Shorten it, or the system message in the settings.`;
  showError(error.tooLong ? tooLong : error.message);
}

function showError(text, action = null) {
  $("error-text").textContent = text;
  $("retry").hidden = action === null;
  $("retry").textContent = action?.label ?? "";
  $("retry").onclick = action?.run;
  $("error").hidden = false;
  scrollDown(true);
}

function hideError() {
  $("error").hidden = true;
}

// Ask for the API key; null if the user cancels.
function promptForKey(isRejected) {
  $("key-help").textContent = isRejected
    ? "The server does not accept this key."
    : "This server requires a key. It is kept until this tab is closed.";
  $("api-key").value = "";
  $("key").returnValue = "";
  $("key").showModal();
  return new Promise((resolve) => {
    const close = () => resolve($("key").returnValue === "given" ? $("api-key").value : null);
    $("key").addEventListener("close", close, { once: true });
  });
}

// Conversation

function newChat() {
  running?.abort();
  running = null;
  conversation.clear();
  dropped = null;
  $("messages").replaceChildren();
  $("welcome").hidden = false;
  hideError();
  showRunning(false);
  save();
  $("question").focus();
}

function restoreConversation() {
  $("question").value = conversation.restore();
  for (const { role, content, outcome } of conversation.turns) {
    if (role === "user") addQuestion($("messages"), content);
    else addAnswer($("messages"), { onDrawn: scrollDown }).end(content, outcome, answerActions(outcome));
  }
  $("welcome").hidden = conversation.turns.length > 0;
  showDropped();
  scrollDown(true);
  if (conversation.isUnanswered) {
    showError("The page was reloaded before the answer arrived.", { label: "Try again", run: answerAgain });
  }
}

function save() {
  conversation.save($("question").value);
}

// Scroll along with the text, unless the user has scrolled up.
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
  const hadFocus = document.activeElement === $("stop");
  $("messages").setAttribute("aria-busy", is); // a screen reader waits for the whole answer
  $("send").hidden = is;
  $("stop").hidden = !is;
  if (hadFocus) $("question").focus();
  updateComposer();
}

function updateComposer() {
  const question = $("question");
  question.style.height = "auto";
  question.style.height = `${question.scrollHeight}px`;
  $("send").disabled = !question.value.trim() || running !== null;
}

function applySettings() {
  $("temperature-value").textContent = Number($("temperature").value).toFixed(2);
  $("top-p-value").textContent = Number($("top-p").value).toFixed(2);
  const theme = document.querySelector("input[name=theme]:checked").value;
  document.documentElement.dataset.theme = theme;
  browserStore.set("maxlm", { ...Object.fromEntries(KEPT.map((id) => [id, $(id).value])), theme });
}

function restoreSettings() {
  const kept = browserStore.get("maxlm") ?? {};
  for (const id of KEPT) if (typeof kept[id] === "string") $(id).value = kept[id];
  const theme = [...document.getElementsByName("theme")].find((input) => input.value === kept.theme);
  if (theme) theme.checked = true;
  applySettings();
}

async function showModel() {
  try {
    const { data } = await (await request("/v1/models")).json();
    contextLength = data[0].max_model_len;
    $("model-name").textContent = data[0].id;
    $("max-tokens").max = contextLength - 1;
    document.title = `${data[0].id} - maxlm chat`;
  } catch (error) {
    const label = error.needsKey ? "Enter the key" : "Try again";
    const text = error instanceof ApiError ? error.message : "The server does not say which model it serves.";
    showError(text, error.isPermanent && !error.needsKey ? null : { label, run: () => (hideError(), showModel()) });
  }
}

// Events

$("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  submit();
});
$("question").addEventListener("keydown", (event) => {
  // The Enter that commits an input method's composition does not send; Safari shows it only in the key code.
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing && event.keyCode !== 229) {
    event.preventDefault();
    submit();
  }
});
$("question").addEventListener("input", updateComposer);
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape" && !event.isComposing && !document.querySelector("dialog[open]")) running?.abort();
});
$("stop").addEventListener("click", () => running?.abort());
$("dismiss").addEventListener("click", () => {
  hideError();
  $("question").focus();
});
$("new-chat").addEventListener("click", newChat);
$("open-settings").addEventListener("click", () => $("settings").showModal());
$("settings").addEventListener("input", applySettings);
$("settings").addEventListener("click", (event) => {
  if (event.target === $("settings")) $("settings").close(); // the backdrop
});
$("key-cancel").addEventListener("click", () => $("key").close());
document.addEventListener("visibilitychange", save); // also before the page is left or reloaded

usePromptForKey(promptForKey);
restoreSettings();
restoreConversation();
updateComposer();
showModel();
