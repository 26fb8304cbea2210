// The chat page: its controls and event handlers.

import { addAnswer, addNote, addQuestion } from "./answer.js";
import { ApiError, request, streamCompletion, usePromptForKey } from "./api.js";
import { addComparison, keptPlace } from "./comparison.js";
import { Conversation } from "./conversation.js";
import { browserStore } from "./storage.js";

const $ = (id) => document.getElementById(id);
const KEPT = ["temperature", "top-p", "seed", "max-tokens", "system"];

const conversation = new Conversation();
let running = null; // AbortController of the answer in progress
let contextLength = null;
let takesVotes = false;
let dropped = null; // the note in the conversation that marks which messages are no longer sent

// Asking

async function ask() {
  const controller = (running = new AbortController());
  const settings = samplingSettings();
  const isVote = takesVotes && $("compare").checked;
  const view = (isVote ? addComparison : addAnswer)($("messages"), { onDrawn: scrollDown });
  const started = performance.now();
  hideError();
  showRunning(true);
  scrollDown(true);
  const answers = Array.from({ length: isVote ? 2 : 1 }, () => ({ text: "", finish: null }));
  const reply = { answers, usage: null, error: null };
  const show = isVote ? view.show : (_, text) => view.show((conversation.partial = text));
  const { start } = conversation;
  do {
    await write(reply, show, settings, controller.signal);
  } while (running === controller && reply.error?.tooLong && !answers[0].text && dropOldest(1));
  const kept = isVote ? await vote(reply, view, settings, controller.signal) : answers[0];
  if (isVote) view.remove();
  if (running !== controller) return; // a new chat was started in the meantime
  running = null;
  showRunning(false);
  conversation.partial = "";
  const { usage, error } = reply;
  if (kept && (kept.text || kept.finish)) {
    const { text, finish } = kept;
    const isFull = finish === "length" && contextLength !== null && usage?.total_tokens >= contextLength - 1;
    const seconds = (performance.now() - started) / 1000;
    const outcome = isVote ? { finish, note: kept.note } : { finish, isFull, seed: settings.seed, usage, seconds };
    conversation.turns.push({ role: "assistant", content: text, outcome });
    const shown = isVote ? addAnswer($("messages"), { onDrawn: scrollDown }) : view;
    shown.end(text, outcome, answerActions(outcome));
  } else if (!isVote) {
    view.remove();
  }
  if (error?.tooLong) {
    conversation.start = start; // the question alone does not fit
    showDropped();
  }
  if (error) showFailure(error);
  else if (!kept) takeBack();
  if (isVote) $("question").focus();
  save();
}

async function write(reply, show, settings, signal) {
  reply.error = null;
  try {
    const body = { messages: messagesToSend(), ...settings, n: reply.answers.length };
    for await (const chunk of streamCompletion(body, signal)) {
      reply.usage = chunk.usage ?? reply.usage;
      const choice = chunk.choices[0];
      if (!choice) continue;
      const answer = reply.answers[choice.index];
      answer.finish = choice.finish_reason ?? answer.finish;
      if (!choice.delta?.content) continue;
      answer.text += choice.delta.content;
      show(choice.index, answer.text);
    }
  } catch (error) {
    if (signal.aborted) for (const answer of reply.answers) answer.finish ??= "stopped";
    else reply.error = error;
  }
}

// The answer that the conversation goes on with, after a vote if there can be one; null for neither.
async function vote({ answers, error }, view, sampling, signal) {
  if (error || signal.aborted) return null;
  const shown = view.places.map((index) => answers[index]);
  const reason = whyNoVote(shown);
  if (reason) return { ...(shown.find(({ text }) => text.trim()) ?? shown[0]), note: `no vote: ${reason}` };
  while (true) {
    const choice = await view.askForVote(answers.map(({ text }) => text), signal);
    if (choice === null) return null;
    try {
      hideError();
      const body = { messages: messagesToSend(), answers: shown.map(({ text }) => text), choice, sampling };
      await request("/v1/votes", { body });
      const place = keptPlace(choice);
      return place === null ? null : { ...shown[place], note: choice === "tie" ? "tie" : "chosen of two" };
    } catch (error) {
      showError(`${error.message} Vote again, or stop.`);
    }
  }
}

// What would teach nothing, or to stop in the middle.
function whyNoVote(answers) {
  const texts = answers.map(({ text }) => text.trim());
  if (texts.includes("")) return "an answer was empty";
  if (texts[0] === texts[1]) return "both answers were the same";
  return answers.some(({ finish }) => finish !== "stop") ? "an answer was truncated at the token limit" : "";
}

function messagesToSend() {
  const system = $("system").value.trim();
  return [...(system ? [{ role: "system", content: system }] : []), ...conversation.messages()];
}

function samplingSettings() {
  const seed = $("seed").value === "" ? Math.floor(Math.random() * 2 ** 31) : Number($("seed").value);
  const settings = { temperature: Number($("temperature").value), top_p: Number($("top-p").value), seed };
  if ($("max-tokens").value !== "") settings.max_tokens = Number($("max-tokens").value);
  return settings;
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
  takeBack();
  const context = contextLength === null ? "context" : `context of ${contextLength} tokens`;
  const tooLong = `This message is longer than the model’s ${context}. Shorten it, or the system message in the settings.`;
  showError(error.tooLong ? tooLong : error.message);
}

// Puts the last question back for editing.
function takeBack() {
  if (!conversation.isUnanswered || $("question").value) return;
  $("question").value = conversation.last.content;
  removeLast();
  $("welcome").hidden = conversation.turns.length > 0;
  updateComposer();
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
  const compare = $("compare").checked;
  browserStore.set("maxlm", { ...Object.fromEntries(KEPT.map((id) => [id, $(id).value])), compare, theme });
}

function restoreSettings() {
  const kept = browserStore.get("maxlm") ?? {};
  for (const id of KEPT) if (typeof kept[id] === "string") $(id).value = kept[id];
  $("compare").checked = kept.compare === true;
  const theme = [...document.getElementsByName("theme")].find((input) => input.value === kept.theme);
  if (theme) theme.checked = true;
  applySettings();
}

async function showModel() {
  try {
    const { data } = await (await request("/v1/models")).json();
    contextLength = data[0].max_model_len;
    takesVotes = data[0].takes_votes === true;
    $("votes").hidden = !takesVotes;
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
