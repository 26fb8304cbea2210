// Server-sent events, as the HTML standard defines the stream: https://html.spec.whatwg.org/#event-stream-interpretation

// The data of each event of a byte stream. An event truncated by the end of the stream is dropped.
export async function* eventData(stream) {
  let data = [];
  for await (const line of lines(stream)) {
    if (line === "") {
      if (data.length) yield data.join("\n");
      data = [];
      continue;
    }
    const colon = line.indexOf(":");
    const field = colon < 0 ? line : line.slice(0, colon);
    if (field === "data") data.push(colon < 0 ? "" : line.slice(colon + 1).replace(/^ /, ""));
  }
}

// Lines end with LF, CRLF or CR; a CR at the end of a chunk may be the first half of a CRLF.
async function* lines(stream) {
  const reader = stream.getReader();
  const decoder = new TextDecoder(); // buffers characters split between chunks, and drops a byte order mark
  let rest = "";
  try {
    while (true) {
      const { done, value } = await reader.read();
      rest += done ? decoder.decode() : decoder.decode(value, { stream: true });
      const complete = rest.split(done ? /\r\n|\n|\r/ : /\r\n|\n|\r(?!$)/);
      rest = complete.pop();
      yield* complete;
      if (done) return;
    }
  } finally {
    await reader.cancel().catch(() => {}); // the consumer may stop before the end
  }
}
