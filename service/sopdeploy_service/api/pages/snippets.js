"use strict";
// The request for exactly this picture, in three languages; each runs as it stands.

/** Return `text` as one word of a POSIX shell. */
const shellWord = (text) => `'${text.replaceAll("'", "'\\''")}'`;
/** Return `text` as a string of Python and JavaScript; both read JSON's. */
const quoted = (text) => JSON.stringify(text);

/** Show [name, node] pairs as tabs; where they are already there only the nodes change, so no focus is lost. */
function showTabs(pairs) {
  if (!byId("languages").hasChildNodes()) makeTabs(pairs.map(([name]) => name));
  for (const [name, node] of pairs) byId(`code-${name}`).replaceChildren(node);
}

/** Make a tab and a panel for each of `names`; arrow keys go from tab to tab. */
function makeTabs(names) {
  const tabs = names.map((name) => make(
    "button", { type: "button", id: `tab-${name}`, role: "tab", "aria-controls": `code-${name}` }, name));
  const panels = names.map((name) => make(
    "div", { id: `code-${name}`, role: "tabpanel", "aria-labelledby": `tab-${name}` }));
  const select = (place) => tabs.forEach((tab, other) => {
    tab.setAttribute("aria-selected", String(other === place));
    tab.tabIndex = other === place ? 0 : -1;
    panels[other].hidden = other !== place;
  });
  tabs.forEach((tab, place) => {
    tab.addEventListener("click", () => select(place));
    tab.addEventListener("keydown", (event) => {
      const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
      if (!step) return;
      const next = (place + step + tabs.length) % tabs.length;
      select(next);
      tabs[next].focus();
    });
  });
  byId("languages").replaceChildren(...tabs);
  byId("snippets").replaceChildren(...panels);
  select(0);
}

/** Return [language, code] pairs that send the file `name` of media type `type` to `url`. */
function snippets(url, name, type) {
  return [
    ["curl", `curl --data-binary ${shellWord("@" + name)} \\
  --header ${shellWord("Content-Type: " + type)} \\
  ${shellWord(url)}
`],
    ["Python", `import json
import urllib.request
from pathlib import Path

request = urllib.request.Request(
    ${quoted(url)},
    data=Path(${quoted(name)}).read_bytes(),
    headers={"Content-Type": ${quoted(type)}},
)
with urllib.request.urlopen(request) as reply:
    for entry in json.load(reply)["classes"]:
        print(entry["label"], entry["probability"])
`],
    ["JavaScript", `import { readFile } from "node:fs/promises";

const reply = await fetch(${quoted(url)}, {
  method: "POST",
  headers: { "Content-Type": ${quoted(type)} },
  body: await readFile(${quoted(name)}),
});
for (const { label, probability } of (await reply.json()).classes) {
  console.log(label, probability);
}
`],
  ];
}
