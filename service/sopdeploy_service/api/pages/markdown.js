"use strict";
// The subset of Markdown that model cards use; everything else is shown as text.

/** Nodes of the Markdown `text`: headings, lists, indented and fenced code, paragraphs. */
function markdown(text) {
  const nodes = [];
  let lines = [];
  let fenced = false;
  const flush = () => {
    if (lines.length) nodes.push(block(lines, fenced));
    lines = [];
  };
  for (const line of text.split("\n")) {
    if (line.startsWith("```")) {
      flush();
      fenced = !fenced;
    } else if (!fenced && (line.trim() === "" || kind(line, lines) !== kind(lines[0], []))) {
      flush();
      if (line.trim()) lines.push(line);
    } else {
      lines.push(line);
    }
  }
  flush();
  return nodes;
}

/** Kind of `line`; indented lines after a list entry belong to the list. */
function kind(line, before) {
  if (line === undefined) return "nothing";
  if (/^#{1,6} /.test(line)) return `heading ${line}`;
  if (/^[-*] /.test(line) || (/^[-*] /.test(before[0] ?? "") && /^ {2}\S/.test(line))) return "list";
  return /^ {4}/.test(line) ? "code" : "text";
}

/** Node of `lines` of one kind. */
function block(lines, fenced) {
  const what = fenced ? "code" : kind(lines[0], []);
  if (what === "code") {
    const text = lines.map((line) => (fenced ? line : line.slice(4))).join("\n");
    return make("pre", { tabIndex: 0 }, make("code", {}, text));
  }
  if (what === "list") {
    const entries = lines.join("\n").split(/^[-*] /m).slice(1);
    return make("ul", {}, ...entries.map((entry) => make("li", {}, ...spans(entry))));
  }
  if (what === "text") return make("p", {}, ...spans(lines.join("\n")));
  return make("h3", {}, ...spans(lines[0].replace(/^#+ /, "")));
}

/** Nodes of the `code` and **strong** parts of a line. */
function spans(text) {
  return text.split(/(`[^`]+`|\*\*[^*]+\*\*)/).filter(Boolean).map((part) => {
    if (/^`[^`]+`$/.test(part)) return make("code", {}, part.slice(1, -1));
    return /^\*\*[^*]+\*\*$/.test(part) ? make("strong", {}, part.slice(2, -2)) : part;
  });
}
