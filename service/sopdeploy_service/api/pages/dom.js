"use strict";
// DOM helpers: elements are created from nodes and text, never from markup.

const byId = (id) => document.getElementById(id);

/** Create an element; `traits` are its properties, `children` nodes or text. */
function make(tag, traits = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(traits)) {
    if (name.startsWith("--")) element.style.setProperty(name, value);
    else if (name.includes("-") || name === "role") element.setAttribute(name, value);
    else element[name] = value;
  }
  element.append(...children);
  return element;
}

/** Code block with a copy button; `what` is its accessible name. */
function codeBlock(text, what) {
  const button = make("button", { type: "button", "aria-label": `Copy ${what}` }, "Copy");
  button.addEventListener("click", async () => {
    button.textContent = (await copied(text)) ? "Copied" : "Select it";
    setTimeout(() => { button.textContent = "Copy"; }, 1500);
  });
  const pre = make("pre", { tabIndex: 0, role: "region", "aria-label": what }, make("code", {}, text));
  return make("div", { className: "code" }, pre, button);
}

/** Copy `text`; the clipboard API needs https or localhost, `execCommand` is the fallback. */
async function copied(text) {
  if (navigator.clipboard) return navigator.clipboard.writeText(text).then(() => true, () => false);
  const area = make("textarea", { value: text, className: "unseen" });
  document.body.append(area);
  area.select();
  const done = document.execCommand("copy");
  area.remove();
  return done;
}

/** Format `text` as a sentence: capital letter, full stop. */
function sentence(text) {
  const end = /[.!?]$/.test(text) ? "" : ".";
  return text.charAt(0).toUpperCase() + text.slice(1) + end;
}
