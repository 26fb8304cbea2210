// Requests to the server: errors that say whether a retry can help, and the API key if one is required.

import { eventData } from "./sse.js";
import { tabStore } from "./storage.js";

export class ApiError extends Error {
  constructor(message, { status = 0, type = null, code = null } = {}) {
    super(message.replace(/^./, (letter) => letter.toUpperCase()));
    this.status = status;
    this.needsKey = status === 401;
    this.tooLong = code === "context_length_exceeded" || status === 413;
    // A retry of the same request would fail the same way. In a stream the error type says so.
    this.isPermanent =
      status === 200 ? type === "invalid_request_error" : status >= 400 && status < 500 && ![408, 429].includes(status);
  }
}

let promptForKey = null;
let prompting = null; // requests rejected at the same time share one prompt

// `prompt(isRejected)` resolves to a key, or to null if the user cancels.
export function usePromptForKey(prompt) {
  promptForKey = prompt;
}

export async function request(path, { body, signal } = {}) {
  while (true) {
    const key = tabStore.get("api-key");
    const response = await send(path, { body, signal, key });
    if (response.ok) return response;
    const error = await errorOf(response);
    if (!error.needsKey) throw error;
    if (key !== tabStore.get("api-key")) continue; // another request has got a key in the meantime
    prompting ??= promptForKey(Boolean(key)).finally(() => (prompting = null));
    const given = await prompting;
    if (given === null) throw error;
    tabStore.set("api-key", given);
  }
}

async function send(path, { body, signal, key }) {
  const headers = {};
  if (body) headers["Content-Type"] = "application/json";
  if (key) headers["Authorization"] = `Bearer ${key}`;
  try {
    return await fetch(path, { method: body ? "POST" : "GET", headers, body: body && JSON.stringify(body), signal });
  } catch (error) {
    throw signal?.aborted ? error : new ApiError("The server cannot be reached. Is it running?");
  }
}

async function errorOf(response) {
  const error = (await response.json().catch(() => null))?.error;
  const message = error?.message ?? `The server responded with status ${response.status}.`;
  return new ApiError(message, { ...error, status: response.status });
}

// Chunks of a streamed chat completion.
export async function* streamCompletion(body, signal) {
  const options = { stream: true, stream_options: { include_usage: true } };
  const response = await request("/v1/chat/completions", { body: { ...body, ...options }, signal });
  try {
    for await (const data of eventData(response.body)) {
      if (data === "[DONE]") return;
      const chunk = JSON.parse(data);
      if (chunk.error) throw new ApiError(chunk.error.message, { ...chunk.error, status: response.status });
      yield chunk;
    }
  } catch (error) {
    if (signal.aborted || error instanceof ApiError) throw error;
  }
  throw new ApiError("The connection was lost before the answer was complete.");
}
