// Server-sent events, read from the body of a POST (EventSource can only GET).

/**
 * Yield the data of each event of a stream of bytes.
 *
 * Comments and other fields are passed over. An event that no empty line ends is dropped, as the standard says.
 *
 * @param {ReadableStream<Uint8Array>} body it is cancelled if the caller stops early
 */
export async function* events(body) {
  const reader = body.getReader();
  const decoder = new TextDecoder();
  let rest = "";
  let data = [];
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      rest += decoder.decode(value, { stream: true });
      const held = rest.endsWith("\r") ? 1 : 0; // it may be the first half of a line's end
      const lines = rest.slice(0, rest.length - held).split(/\r\n|\r|\n/);
      rest = lines.pop() + "\r".repeat(held);
      for (const line of lines) {
        if (line.startsWith("data:")) {
          data.push(line.slice(line.startsWith("data: ") ? 6 : 5));
        } else if (line === "" && data.length) {
          const whole = data.join("\n");
          data = [];
          yield whole;
        }
      }
    }
  } finally {
    reader.cancel().catch(() => {}); // else the server would go on writing
  }
}
