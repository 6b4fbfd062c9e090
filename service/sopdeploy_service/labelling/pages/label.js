"use strict";
// The label page: shows one photograph, sends its label, and shows the next one.

const RESERVED = "nsux"; // keys of the other buttons
const KEYS = [..."123456789", ..."abcdefghijklmnopqrstuvwxyz"].filter((key) => !RESERVED.includes(key));
const state = { photograph: null, classes: [], busy: false, url: "" };

/** Fetch JSON from `path`, with `body` as a POST; throws an Error with the message of the server. */
async function ask(path, body) {
  const post = { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body) };
  const reply = await fetch(path, body ? post : {}).catch(() => { throw new Error("the server does not answer; start it again"); });
  const text = await reply.text();
  if (reply.ok) return JSON.parse(text);
  const isJson = reply.headers.get("content-type") === "application/json";
  const detail = isJson ? JSON.parse(text).detail : text;
  throw Object.assign(new Error(typeof detail === "string" ? detail : "the server refuses this label"), { status: reply.status });
}

/** Send `body` to `path` and show what the server returns; keys have no effect before it is shown. */
async function send(path, body) {
  if (state.busy) return;
  setBusy(true);
  let problem = "";
  try {
    await show(await ask(path, body));
  } catch (error) {
    problem = error.message;
    if (error.status === 409) await show(await ask("state")); // labelled in another tab
  } finally {
    byId("error").textContent = sentence(problem);
    byId("error").hidden = !problem;
    setBusy(false);
  }
}

/** Say that a request is under way, or that keys have an effect. */
function setBusy(busy) {
  state.busy = busy;
  byId("main").setAttribute("aria-busy", String(busy));
}

/** Label the photograph that is shown. */
const label = (kind, name = "") => state.photograph && send("label", { id: state.photograph.id, kind, name });

/** Show the photograph, classes and progress of `next`, a response of the server. */
async function show(next) {
  const { photograph, classes, done, left } = next;
  Object.assign(state, { photograph, classes });
  const url = photograph ? await load(photograph.id) : "";
  URL.revokeObjectURL(state.url);
  state.url = byId("photo").src = url;
  byId("photo").hidden = !photograph;
  byId("empty").hidden = Boolean(photograph);
  byId("sampled").hidden = !photograph?.sampled;
  byId("unknown").hidden = photograph?.known !== false;
  byId("progress").textContent = `${done} done in this session, ${left} left`;
  byId("bar").value = done / Math.max(1, done + left);
  byId("classes").replaceChildren(...classes.map(classButton));
  byId("undo").disabled = done === 0;
  byId("not-ours").disabled = byId("skip").disabled = !photograph;
  byId("name").value = "";
}

/** URL of the bytes of the photograph `id`. */
async function load(id) {
  const reply = await fetch(`images/${id}`);
  return reply.ok ? URL.createObjectURL(await reply.blob()) : "";
}

/** List entry of one class; the first ones have keys. */
function classButton({ name, probability }, place) {
  const button = make(
    "button", { type: "button", disabled: !state.photograph, "--part": probability ?? 0 },
    make("kbd", {}, KEYS[place] ?? ""),
    make("span", { className: "name" }, name),
    make("span", { className: "percent" }, probability === null ? "" : `${(100 * probability).toFixed(0)} %`),
  );
  button.addEventListener("click", () => label("class", name));
  return make("li", {}, button);
}

byId("new").addEventListener("submit", (event) => {
  event.preventDefault();
  byId("name").blur(); // so that the next key is a label
  void label("class", byId("name").value);
});
byId("not-ours").addEventListener("click", () => label("unknown"));
byId("skip").addEventListener("click", () => label("skip"));
byId("undo").addEventListener("click", () => send("undo", {}));
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") byId("name").blur();
  if (event.target === byId("name") || event.repeat || event.ctrlKey || event.metaKey || event.altKey) return;
  const key = event.key.toLowerCase();
  const place = KEYS.indexOf(key);
  if (key === "n") byId("name").focus();
  else if (key === "x") void label("unknown");
  else if (key === "s") void label("skip");
  else if (key === "u") void send("undo", {});
  else if (place >= 0 && place < state.classes.length) void label("class", state.classes[place].name);
  else return;
  event.preventDefault();
});

void send("state");
