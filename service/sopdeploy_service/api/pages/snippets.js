"use strict";
// Code that sends the current request, in three languages.

/** Quote `text` for a POSIX shell. */
const shellWord = (text) => `'${text.replaceAll("'", "'\\''")}'`;
/** Quote `text` for Python and JavaScript. */
const quoted = (text) => JSON.stringify(text);

/** Show [name, node] pairs as tabs; existing tabs are kept, so that focus is kept. */
function showTabs(pairs) {
  if (!byId("languages").hasChildNodes()) makeTabs(pairs.map(([name]) => name));
  for (const [name, node] of pairs) byId(`code-${name}`).replaceChildren(node);
}

/** Create a tab and a panel per name; arrow keys move between tabs. */
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

/** [language, code] pairs that send the file `name` of media type `type` to `url`, with the key in $KEY if `hasKey`. */
function snippets(url, name, type, hasKey) {
  return [
    ["curl", `curl --data-binary ${shellWord("@" + name)} \\
  --header ${shellWord("Content-Type: " + type)} \\
${hasKey ? '  --header "Authorization: Bearer $KEY" \\\n' : ""}  ${shellWord(url)}
`],
    ["Python", `import json
${hasKey ? "import os\n" : ""}import urllib.request
from pathlib import Path

request = urllib.request.Request(
    ${quoted(url)},
    data=Path(${quoted(name)}).read_bytes(),
    headers={"Content-Type": ${quoted(type)}${hasKey ? ', "Authorization": "Bearer " + os.environ["KEY"]' : ""}},
)
with urllib.request.urlopen(request) as reply:
    for entry in json.load(reply)["classes"]:
        print(entry["label"], entry["probability"])
`],
    ["JavaScript", `import { readFile } from "node:fs/promises";

const reply = await fetch(${quoted(url)}, {
  method: "POST",
  headers: { "Content-Type": ${quoted(type)}${hasKey ? ", Authorization: `Bearer ${process.env.KEY}`" : ""} },
  body: await readFile(${quoted(name)}),
});
for (const { label, probability } of (await reply.json()).classes) {
  console.log(label, probability);
}
`],
  ];
}
