// A small part of Markdown, as elements: paragraphs, headings, lists, quotes, rules, code, bold and italics.
//
// What a model writes is a stranger's text. So there is no innerHTML here, and no element that loads or leads anywhere:
// HTML, links and images stay the text that they are.

import { copyButton, make } from "./elements.js";

const FENCE = /^( {0,3})(`{3,}(?!.*`)|~{3,})[ \t]*(\S*)/;
const HEADING = /^ {0,3}(#{1,6})(?:[ \t]+|$)/;
const ITEM = /^( *)([-*+]|\d{1,9}[.)])(?:[ \t]+|$)/;
const QUOTE = /^ {0,3}> ?/;
const RULE = /^ {0,3}(?:(?:-[ \t]*){3,}|(?:\*[ \t]*){3,}|(?:_[ \t]*){3,})$/;
const ESCAPED = "\\`*_#+-.!>~|";
const DEEPEST = 6; // lists in lists, bold in italics: beyond this, text stays plain

const indentation = (line) => line.length - line.trimStart().length;

function startsBlock(line) {
  const item = ITEM.exec(line);
  return (
    FENCE.test(line) || HEADING.test(line) || QUOTE.test(line) || RULE.test(line) ||
    (item !== null && !/^\d+[.)]/.test(item[2])) || item?.[2] === "1." // "in 1999." doesn't begin a list
  );
}

/** Cut lines into blocks: objects with `kind`, the lines `from` and `to`, and what the kind needs. */
function cut(lines) {
  const blocks = [];
  for (let at = 0; at < lines.length; ) {
    const line = lines[at];
    if (line.trim() === "") {
      at += 1;
      continue;
    }
    const block = fence(lines, at) ?? simple(line, at) ?? quote(lines, at) ?? list(lines, at) ?? paragraph(lines, at);
    block.from = at;
    blocks.push(block);
    at = block.to;
  }
  return blocks;
}

function fence(lines, at) {
  const [, indent, mark, language] = FENCE.exec(lines[at]) ?? [];
  if (mark === undefined) return null;
  let to = at + 1;
  const ends = (line) => indentation(line) < 4 && line.trim().startsWith(mark) && !/[^`~]/.test(line.trim());
  while (to < lines.length && !ends(lines[to])) to += 1;
  const inside = lines.slice(at + 1, to).map((line) => line.slice(Math.min(indentation(line), indent.length)));
  return { kind: "code", language, text: inside.join("\n"), to: to + 1 };
}

function simple(line, at) {
  const heading = HEADING.exec(line);
  if (heading) {
    const [start, marks] = heading;
    return { kind: "heading", level: marks.length, text: line.slice(start.length).trim(), to: at + 1 };
  }
  return RULE.test(line) ? { kind: "rule", to: at + 1 } : null;
}

function quote(lines, at) {
  let to = at;
  while (to < lines.length && QUOTE.test(lines[to])) to += 1;
  return to === at ? null : { kind: "quote", lines: lines.slice(at, to).map((line) => line.replace(QUOTE, "")), to };
}

function list(lines, at) {
  const first = ITEM.exec(lines[at]);
  if (!first) return null;
  const ordered = first[2].length > 1;
  const least = first[1].length + 1; // what is further right belongs to an item: models indent by two, three or four
  const items = [];
  let offset = 0;
  let to = at;
  for (let next = at, blank = false; next < lines.length; next += 1) {
    const line = lines[next];
    if (line.trim() === "") {
      blank = true;
      items.at(-1).push("");
      continue;
    }
    const item = ITEM.exec(line);
    if (item && item[1].length <= least && !RULE.test(line)) {
      if (item[2].length > 1 !== ordered) break;
      items.push([line.slice(item[0].length)]);
      offset = item[0].length;
    } else if (indentation(line) > least) {
      items.at(-1).push(line.slice(Math.min(indentation(line), offset)));
    } else if (blank || startsBlock(line)) {
      break;
    } else {
      items.at(-1).push(line);
    }
    blank = false;
    to = next + 1;
  }
  return { kind: "list", ordered, start: ordered ? parseInt(first[2], 10) : null, items, to };
}

function paragraph(lines, at) {
  let to = at + 1;
  while (to < lines.length && lines[to].trim() !== "" && !startsBlock(lines[to])) to += 1;
  return { kind: "paragraph", text: lines.slice(at, to).map((line) => line.trim()).join("\n"), to };
}

function render(block, depth) {
  switch (block.kind) {
    case "code": {
      const pre = make("pre", { tabindex: "0", "aria-label": `Code ${block.language}` }, make("code", {}, block.text));
      const head = make("div", { class: "code-head" }, block.language || "code", copyButton("Copy", () => block.text));
      return make("div", { class: "code" }, head, pre);
    }
    case "heading":
      return make(`h${Math.min(block.level + 3, 6)}`, {}, ...inline(block.text)); // h3 is whose turn it is
    case "rule":
      return make("hr");
    case "quote":
      return make("blockquote", {}, ...inner(block.lines, depth));
    case "list": {
      const items = block.items.map((lines) => make("li", {}, ...inner(lines, depth)));
      return block.ordered ? make("ol", { start: String(block.start) }, ...items) : make("ul", {}, ...items);
    }
    default:
      return make("p", {}, ...inline(block.text));
  }
}

function inner(lines, depth) {
  if (depth >= DEEPEST) return [make("p", {}, lines.join("\n"))];
  return cut(lines).map((block) => render(block, depth + 1));
}

const isWord = (character) => character !== undefined && /[\p{L}\p{N}]/u.test(character);
const isSpace = (character) => character === undefined || /\s/.test(character);

function runLength(text, at) {
  let end = at;
  while (text[end] === text[at]) end += 1;
  return end - at;
}

/** Return where the closing mark of `size` characters begins, or -1. A run of three closes one and two. */
function closing(text, from, mark, size) {
  for (let at = text.indexOf(mark, from); at >= 0; ) {
    const run = runLength(text, at);
    const end = at + run;
    const fits = run === size || (run === 3 && mark !== "`");
    const free = mark === "`" || (!isSpace(text[at - 1]) && (mark === "*" || !isWord(text[end])));
    if (fits && free && at > from) return end - size;
    at = text.indexOf(mark, end);
  }
  return -1;
}

/** Return the content of a code span without the space on each side that lets it begin or end with a backtick. */
function unpadded(content) {
  const padded = content.startsWith(" ") && content.endsWith(" ") && content.trim() !== "";
  return padded ? content.slice(1, -1) : content;
}

/** Return a text as nodes: code, bold, italics, lines. Marks without a partner stay as they are. */
function inline(text, depth = 0) {
  const nodes = [];
  const alone = new Set(); // marks that have no partner from here on: without this, many of them take quadratic time
  let plain = "";
  const push = (node) => {
    if (plain) nodes.push(plain);
    plain = "";
    nodes.push(node);
  };
  for (let at = 0; at < text.length; ) {
    const mark = text[at];
    if (mark === "\\" && at + 1 < text.length && ESCAPED.includes(text[at + 1])) {
      plain += text[at + 1];
      at += 2;
      continue;
    }
    if (mark === "\n") {
      push(make("br"));
      at += 1;
      continue;
    }
    if (mark !== "`" && mark !== "*" && mark !== "_") {
      plain += mark;
      at += 1;
      continue;
    }
    const run = runLength(text, at);
    const size = mark === "`" ? run : Math.min(run, 2);
    const inside = at + size;
    const opens =
      mark === "`" || (run <= 3 && !isSpace(text[at + run]) && (mark === "*" || !isWord(text[at - 1])));
    const kind = `${mark}${size}`;
    const close = opens && depth < DEEPEST && !alone.has(kind) ? closing(text, inside, mark, size) : -1;
    if (close < 0) {
      if (opens) alone.add(kind);
      plain += text.slice(at, at + run);
      at += run;
      continue;
    }
    const content = text.slice(inside, close);
    if (mark === "`") push(make("code", {}, unpadded(content)));
    else push(make(size === 2 ? "strong" : "em", {}, ...inline(content, depth + 1)));
    at = close + size;
  }
  if (plain) nodes.push(plain);
  return nodes;
}

/** Shows a text that grows. Blocks that stay the same keep their elements, so that a selection in them stays too. */
export class MarkdownView {
  #sources = [];

  /** @param {Element} element has one child for each block */
  constructor(element) {
    this.element = element;
  }

  /** Show a text, and return how many blocks it has. */
  update(text) {
    const lines = text.replace(/\r\n?/g, "\n").split("\n");
    const blocks = cut(lines);
    const sources = blocks.map((block) => lines.slice(block.from, block.to).join("\n"));
    let same = 0;
    while (same < sources.length && sources[same] === this.#sources[same]) same += 1;
    while (this.element.children.length > same) this.element.lastElementChild.remove();
    this.element.append(...blocks.slice(same).map((block) => render(block, 0)));
    this.#sources = sources;
    return blocks.length;
  }

  /** Return the text of a block, for reading aloud. */
  spoken(number) {
    const block = this.element.children[number];
    return block.querySelector(":scope > pre")?.textContent ?? block.textContent;
  }
}
