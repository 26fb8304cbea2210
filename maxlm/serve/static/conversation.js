// The turns of the conversation, kept across a reload of the page.

import { tabStore } from "./storage.js";

export class Conversation {
  turns = []; // {role, content}; answers have an `outcome` too
  start = 0; // turns before this one no longer fit the model's context and are not sent
  partial = ""; // the answer in progress

  // The messages to send to the API.
  messages() {
    return this.turns.slice(this.start).map(({ role, content }) => ({ role, content }));
  }

  get last() {
    return this.turns.at(-1);
  }

  get isUnanswered() {
    return this.last?.role === "user";
  }

  // Stops sending the oldest question and its answer; false if only the last question is left.
  dropOldest() {
    const next = this.turns.findIndex((turn, index) => index > this.start && turn.role === "user");
    if (next < 0) return false;
    this.start = next;
    return true;
  }

  removeLast() {
    const turn = this.turns.pop();
    this.start = Math.min(this.start, this.turns.length);
    return turn;
  }

  clear() {
    this.turns = [];
    this.start = 0;
    this.partial = "";
  }

  save(draft) {
    tabStore.set("conversation", { turns: this.turns, start: this.start, partial: this.partial, draft });
  }

  // The draft of the next question. The part of an answer that a reload interrupted is kept.
  restore() {
    const kept = tabStore.get("conversation");
    if (!Array.isArray(kept?.turns)) return "";
    this.turns = kept.turns;
    this.start = kept.start;
    if (kept.partial) this.turns.push({ role: "assistant", content: kept.partial, outcome: { finish: null } });
    return kept.draft ?? "";
  }
}
