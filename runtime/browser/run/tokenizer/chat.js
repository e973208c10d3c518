// Chats in the form ChatML. No chat template is run here: the form is used only if it gives the bundle's
// golden chats.

const START = "<|im_start|>";
const END = "<|im_end|>";

/** The form of a chat: `<|im_start|>ROLE\nCONTENT<|im_end|>\n` for each message. */
export class ChatMl {
  constructor(tokenizer, start, end, opening) {
    this.tokenizer = tokenizer;
    this.start = start;
    this.end = end;
    /** The ids that come first where a chat has no system message: the template's own one, or nothing. */
    this.opening = opening;
  }

  /**
   * Return the form of a bundle's chats.
   *
   * @param {import("./tokenizer.js").Tokenizer} tokenizer
   * @param {object} document text.json, as plain data
   * @returns {ChatMl | null} null if the bundle has no golden chats, or others
   */
  static of(tokenizer, document) {
    const [start, end] = [START, END].map((content) => tokenizer.added.tokens.get(content)?.id);
    const chats = document.chats ?? [];
    if (start === undefined || end === undefined || chats.length === 0) return null;
    const form = new ChatMl(tokenizer, start, end, []);
    const plain = chats.find(({ messages }) => messages[0].role !== "system");
    if (plain !== undefined) {
      const body = form.encode(plain.messages, plain.add_generation_prompt);
      form.opening = plain.ids.slice(0, Math.max(0, plain.ids.length - body.length));
    }
    const same = chats.every(({ messages, add_generation_prompt: prompted, ids }) =>
      form.encode(messages, prompted).join() === ids.join());
    return same ? form : null;
  }

  /**
   * Return the ids of a chat. What a message spells stays text.
   *
   * @param {{role: string, content: string}[]} messages
   * @param {boolean} [prompted] whether the beginning of an answer ends it
   * @returns {number[]}
   */
  encode(messages, prompted = true) {
    const text = (each) => this.tokenizer.encode(each, { around: false });
    const ids = messages[0].role === "system" ? [] : [...this.opening];
    for (const { role, content } of messages) {
      ids.push(this.start, ...text(`${role}\n${content}`), this.end, ...text("\n"));
    }
    if (prompted) ids.push(this.start, ...text("assistant\n"));
    return ids;
  }
}
