"use strict";
// The request for exactly this picture, in three languages; each runs as it stands.

/** Return `text` as one word of a POSIX shell. */
const shellWord = (text) => `'${text.replaceAll("'", "'\\''")}'`;
/** Return `text` as a string of Python and JavaScript; both read JSON's. */
const quoted = (text) => JSON.stringify(text);

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
