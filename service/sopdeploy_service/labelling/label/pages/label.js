"use strict";
// The label page: one photograph at a time, with those selected beside it; a grid of those with a suggested class; those with a label.

const RESERVED = "gnsuxz"; // keys of the other buttons
const KEYS = [..."123456789", ..."abcdefghijklmnopqrstuvwxyz"].filter((key) => !RESERVED.includes(key));
const MANY = 10; // classes; more have a filter, and are sorted by name behind the most probable ones
const ON_TOP = 5; // most probable ones of many classes
const state = { photograph: null, classes: [], next: [], selected: new Set(), from: 0, busy: false };
const NEW_CLASS = "?"; // name of the grid of photographs that may be a new class
const grid = { grids: [], name: "", chosen: new Set(), from: 0 };
const labelled = { photographs: [], wrong: new Set() }; // `wrong` are those that get another label
const urls = new Map(); // promises of the URLs of loaded photographs, by their IDs
const waiting = []; // IDs of photographs to load, and the functions that resolve their promises
const AT_ONCE = 3; // photographs that are loaded: a browser has six connections, of which labels need one
let loading = 0;

const SESSION = { "X-Session": [...crypto.getRandomValues(new Uint32Array(4))].join("-") }; // another page gets other photographs

/** Fetch JSON from `path`, with `body` as a POST; throws an Error with the message of the server. */
async function ask(path, body) {
  const post = { method: "POST", headers: { ...SESSION, "Content-Type": "application/json" }, body: JSON.stringify(body) };
  const reply = await fetch(path, body ? post : { headers: SESSION }).catch(() => { throw new Error("the server does not respond; start it again"); });
  const text = await reply.text();
  if (reply.ok) return JSON.parse(text);
  const isJson = reply.headers.get("content-type") === "application/json";
  const detail = isJson ? JSON.parse(text).detail : text;
  throw Object.assign(new Error(typeof detail === "string" ? detail : "the server refuses this label"), { status: reply.status });
}

/** Send `bodies` to `path` in turn and show what the server returns last; keys have no effect before; return the problem. */
async function send(path, bodies = [undefined]) {
  if (state.busy) return "busy";
  setBusy(true);
  let problem = "", last = null;
  try {
    for (const body of bodies) last = await ask(path, body);
  } catch (error) {
    problem = error.message;
    if (error.status === 409) last = await ask("state").catch(() => last); // labelled in another tab
  }
  if (last) await show(last);
  for (const id of ["error", "grid-error"]) {
    byId(id).textContent = sentence(problem);
    byId(id).hidden = !problem;
  }
  setBusy(false);
  return problem;
}

/** Say that a request is under way, or that keys have an effect. */
function setBusy(busy) {
  state.busy = busy;
  byId("main").setAttribute("aria-busy", String(busy));
}

/** Label the selected photographs, or without any the one that is shown. */
function label(kind, name = "") {
  const shown = state.photograph ? [state.photograph.id] : [];
  const ids = state.selected.size ? [...state.selected] : shown;
  if (ids.length) void send("label", ids.map((id) => ({ id, kind, name })));
}

/** Select the photographs with `ids`, and say how many they are. */
function select(ids) {
  state.selected = new Set(ids);
  state.next.forEach((id, place) => byId("next").children[place].setAttribute("aria-pressed", String(state.selected.has(id))));
  byId("selection").textContent = ids.length
    ? `${ids.length} selected: all of them get the next label.`
    : state.next.length > 1 ? "Select several to label them together." : "";
}

/** Select the thumbnail at `place` or not any more; with `range`, also those from the last one up to it. */
function toggle(place, range) {
  const [first, last] = [place, range ? state.from : place].sort((one, other) => one - other);
  const ids = state.next.slice(first, last + 1);
  const isSelected = !range && state.selected.has(state.next[place]);
  state.from = place;
  select(isSelected ? [...state.selected].filter((id) => !ids.includes(id)) : [...new Set([...state.selected, ...ids])]);
}

/** Show the photograph, classes and progress of `next`, a response of the server. */
async function show(next) {
  const { photograph, classes, done, left } = next;
  const url = photograph ? await load(photograph.id, true) : ""; // until then, thumbnails are those of the old `state`
  Object.assign(state, { photograph, classes: inOrder(classes), next: next.next, from: 0 });
  byId("photo").src = url;
  byId("zoom").hidden = !photograph;
  byId("next").replaceChildren(...state.next.map(thumbnail));
  select([...state.selected].filter((id) => state.next.includes(id)));
  const needed = new Set([...state.next, ...cells(), ...labelled.photographs.map(({ id }) => id)]);
  [...urls.keys()].filter((id) => !needed.has(id)).forEach(unload);
  byId("empty").hidden = Boolean(photograph);
  byId("command").textContent = next.command;
  byId("then").hidden = classes.length === 0; // all were skipped
  byId("first").hidden = !photograph || classes.length > 0;
  byId("decides").hidden = !photograph?.decides;
  byId("unknown").hidden = photograph?.known !== false;
  byId("reported").hidden = !photograph?.reported;
  byId("reported").replaceChildren(make("strong", {}, "Reported as wrong. "),
    ...(photograph?.suggested ? ["A person suggests: ", make("bdi", {}, photograph.suggested)] : []));
  byId("progress").textContent = `${done} done in this session, ${left} left${next.progress && `; ${next.progress}`}`;
  byId("bar").value = done / Math.max(1, done + left);
  const hadFocus = byId("classes").contains(document.activeElement);
  byId("classes").replaceChildren(...state.classes.map(classButton));
  byId("main").classList.toggle("many", classes.length > MANY);
  byId("filter").value = "";
  filter();
  if (hadFocus) byId("main").focus({ preventScroll: true }); // no button, which a space would press
  byId("undo").disabled = done === 0;
  byId("new").hidden = byId("not-ours").disabled = byId("skip").disabled = !photograph;
  byId("name").value = "";
}

/** URL of the bytes of the photograph `id`, which is loaded once; empty if it cannot be loaded. */
function load(id, isNext = false) {
  if (!urls.has(id)) urls.set(id, new Promise((resolve) => { waiting.push({ id, resolve }); }));
  if (isNext) waiting.sort((one, other) => (other.id === id) - (one.id === id)); // before thumbnails
  loadWaiting();
  return urls.get(id);
}

/** Load photographs that wait, a few at once. */
function loadWaiting() {
  while (loading < AT_ONCE && waiting.length) {
    const { id, resolve } = waiting.shift();
    const url = async (reply) => (reply.ok ? URL.createObjectURL(await reply.blob()) : "");
    loading += 1;
    void fetch(`images/${id}`).then(url).catch(() => "").then((loaded) => {
      loading -= 1;
      resolve(loaded);
      loadWaiting();
    });
  }
}

/** Forget the photograph `id`, and do not load it if it waits. */
function unload(id) {
  const place = waiting.findIndex((one) => one.id === id);
  if (place < 0) void urls.get(id).then(URL.revokeObjectURL);
  else waiting.splice(place, 1);
  urls.delete(id);
}

/** Image of the photograph `id`, as soon as it is loaded. */
function picture(id) {
  const image = make("img", { alt: "" });
  void load(id).then((url) => { image.src = url; });
  return image;
}

/** Button that selects the photograph `id`. */
function thumbnail(id, place) {
  const image = picture(id);
  const button = make("button", { type: "button", "aria-label": `Photo ${place + 1}`, "aria-pressed": "false" }, image);
  button.addEventListener("click", (event) => toggle(place, event.shiftKey));
  return button;
}

/** Sort `classes`, the most probable one first; of many classes, those behind the first ones by name. */
function inOrder(classes) {
  if (classes.length <= MANY) return classes;
  const rest = classes.slice(ON_TOP);
  return [...classes.slice(0, ON_TOP), ...rest.sort((one, other) => one.name.localeCompare(other.name))];
}

/** Show the classes with the text of the filter in their names; return the first one. */
function filter() {
  const text = byId("filter").value.trim().toLocaleLowerCase();
  const found = state.classes.map(({ name }) => name.toLocaleLowerCase().includes(text));
  found.forEach((isFound, place) => { byId("classes").children[place].hidden = !isFound; });
  byId("no-match").hidden = found.length === 0 || found.includes(true);
  return text ? state.classes[found.indexOf(true)] : undefined;
}

/** List entry of one class; the first ones have keys. */
function classButton({ name, probability }, place) {
  const button = make(
    "button", { type: "button", title: name, disabled: !state.photograph, "--part": probability ?? 0 },
    make("kbd", {}, KEYS[place] ?? ""),
    make("bdi", { className: "name" }, name),
    make("span", { className: "percent" }, probability === null || (state.classes.length > MANY && probability < 0.005) ? "" : `${(100 * probability).toFixed(0)} %`),
  );
  button.addEventListener("click", () => label("class", name));
  return make("li", {}, button);
}

/** Replace the children of `id`, and keep the place of the keyboard, if it was among them. */
function replaceButtons(id, children) {
  const hadFocus = byId(id).contains(document.activeElement);
  byId(id).replaceChildren(...children);
  const next = byId(id).querySelector("[aria-pressed=true]") ?? byId(id).querySelector("button");
  if (hadFocus) next?.focus({ preventScroll: true });
}

/** IDs of the photographs in the grid of the chosen class. */
const cells = () => grid.grids.find(({ name }) => name === grid.name)?.ids ?? [];

const VIEWS = { grid: "as-grid", main: "one-by-one", labelled: "as-labelled" }; // sections, and the buttons that show them

/** Show the section `shown` of `VIEWS`. */
function view(shown) {
  for (const [section, button] of Object.entries(VIEWS)) {
    byId(section).hidden = section !== shown;
    byId(button).setAttribute("aria-pressed", String(section === shown));
  }
}

/** Load the grids again; show that of `name` or, if it is empty, the largest one. */
async function loadGrids(name = "") {
  const before = grid.name;
  grid.grids = (await ask("grids").catch(() => ({ grids: [] }))).grids;
  if (grid.name !== before) name = grid.name; // chosen while they were loaded
  const largest = grid.grids.reduce((one, other) => (other.count > one.count ? other : one), { name: "", count: 0 });
  chooseGrid(grid.grids.some((one) => one.name === name) ? name : largest.name);
}

/** Show the photographs with the suggested class `name`, none chosen: a suggestion is no label. */
function chooseGrid(name) {
  Object.assign(grid, { name, chosen: new Set(), from: 0 });
  const title = { "": ["Photos with a suggested class"], [NEW_CLASS]: ["Are some of these a new class?"] };
  byId("grid-title").replaceChildren(...(title[name] ?? ["Which of these are ", make("bdi", {}, name), "?"]));
  byId("grid-note").textContent = name === NEW_CLASS
    ? "The network rejected these, and they look alike. Choose those that show one new class; with Shift, also those in between. Then type its name."
    : "The surest ones first. Choose those that show it; with Shift, also those in between. Many can show something else.";
  byId("grid-name").hidden = name !== NEW_CLASS;
  byId("grid-name").value = "";
  byId("grid-work").hidden = !name;
  byId("no-grid").hidden = Boolean(name);
  replaceButtons("kinds", grid.grids.map(({ name: other, count }) => {
    const button = make("button", { type: "button", "aria-pressed": String(other === name) }, make("bdi", {}, other === NEW_CLASS ? "a new class?" : other), ` ${count}`);
    button.addEventListener("click", () => chooseGrid(other));
    return button;
  }));
  byId("cells").replaceChildren(...cells().map(cell));
  showChosen();
}

/** Button of the photograph `id` in the grid: pressed if it is chosen. */
function cell(id, place) {
  const image = picture(id);
  const button = make("button", { type: "button", "aria-label": `Photo ${place + 1}`, "aria-pressed": "false" }, image);
  button.addEventListener("click", (event) => {
    const [first, last] = [place, event.shiftKey ? grid.from : place].sort((one, other) => one - other);
    const isChosen = event.shiftKey || !grid.chosen.has(id);
    cells().slice(first, last + 1).forEach((one) => (isChosen ? grid.chosen.add(one) : grid.chosen.delete(one)));
    grid.from = place;
    showChosen();
  });
  return button;
}

/** Show which cells are chosen, and what the button of the grid does. */
function showChosen() {
  const ids = cells(), count = grid.chosen.size;
  ids.forEach((id, place) => byId("cells").children[place].setAttribute("aria-pressed", String(grid.chosen.has(id))));
  byId("kind").textContent = `${count} of ${ids.length} chosen`;
  byId("accept").textContent = `Label ${count} as ${grid.name === NEW_CLASS ? "a new class" : grid.name}`;
  byId("accept").disabled = count === 0;
}

/** Label the chosen photographs of the grid, and show what is left. */
async function accept() {
  const name = grid.name === NEW_CLASS ? byId("grid-name").value : grid.name;
  const problem = await send("label", [...grid.chosen].map((id) => ({ id, kind: "class", name })));
  if (problem) return;
  await loadGrids(grid.name);
  if (!grid.grids.length) view("main");
}

/** Show `reply`, the photographs that have a label, none of them touched. */
function showLabelled({ photographs, classes }) {
  Object.assign(labelled, { photographs, wrong: new Set() });
  byId("no-labels").hidden = photographs.length > 0;
  byId("labelled-work").hidden = photographs.length === 0;
  byId("all-classes").replaceChildren(...classes.map((name) => make("option", { value: name })));
  replaceButtons("labels", photographs.map(labelledCell));
  byId("right").value = "";
  showWrong();
}

/** Button of a photograph with its label: pressed if the label is wrong. */
function labelledCell({ id, name, held_out: isHeldOut }) {
  const image = picture(id);
  const label = make("bdi", {}, name ?? "Not one of ours");
  const button = make("button", { type: "button", "aria-pressed": "false", title: isHeldOut ? "Held out from training" : "" }, image, label);
  button.addEventListener("click", () => {
    if (!labelled.wrong.delete(id)) labelled.wrong.add(id);
    button.setAttribute("aria-pressed", String(labelled.wrong.has(id)));
    showWrong();
  });
  return button;
}

/** Say how many labels change. */
function showWrong() {
  const count = labelled.wrong.size;
  byId("change").textContent = `Change ${count} ${count === 1 ? "label" : "labels"}`;
  byId("change").disabled = byId("change-none").disabled = count === 0;
}

/** Read the list again, or change the labels of the touched photographs to `bodies` first; show the problem. */
async function readLabelled(bodies = []) {
  let problem = "", reply = null;
  try {
    for (const body of bodies) reply = await ask("correct", body);
  } catch (error) {
    problem = error.message;
    reply = null; // the list tells what has changed
  }
  reply ??= await ask("labelled").catch((error) => { problem ||= error.message; });
  if (reply) showLabelled(reply);
  byId("labelled-error").textContent = sentence(problem);
  byId("labelled-error").hidden = !problem;
}

/** Change the labels of the touched photographs to `name`, null for none of ours. */
const correct = (name) => readLabelled([...labelled.wrong].map((id) => ({ id, name })));

/** Show the photograph at `url` as large as it is. */
function enlarge(url) {
  byId("large").src = url;
  byId("enlarged").showModal();
}

byId("accept").addEventListener("click", () => void accept());
byId("zoom").addEventListener("click", () => enlarge(byId("photo").src));
byId("one-by-one").addEventListener("click", () => {
  if (!byId("labelled").hidden) void send("state"); // a correction can have made a class
  view("main");
});
byId("as-grid").addEventListener("click", () => {
  view("grid");
  void loadGrids(grid.name);
});
byId("as-labelled").addEventListener("click", () => {
  view("labelled");
  void readLabelled();
});
byId("correct").addEventListener("submit", (event) => {
  event.preventDefault();
  void correct(byId("right").value);
});
byId("change-none").addEventListener("click", () => void correct(null));
byId("new").addEventListener("submit", (event) => {
  event.preventDefault();
  byId("name").blur(); // so that the next key is a label
  label("class", byId("name").value);
});
byId("filter").addEventListener("input", filter);
byId("find").addEventListener("submit", (event) => {
  event.preventDefault();
  const found = filter();
  if (!found) return;
  byId("filter").blur();
  label("class", found.name);
});
byId("not-ours").addEventListener("click", () => label("unknown"));
byId("skip").addEventListener("click", () => label("skip"));
byId("undo").addEventListener("click", () => send("undo", [{}]));
document.addEventListener("keydown", (event) => {
  if (byId("enlarged").open) return; // which Escape closes
  if (event.key === "Escape" && !event.target.matches("input")) select([]);
  if (event.key === "Escape") {
    if (event.target.matches("input")) event.target.blur();
    byId("filter").value = "";
    filter();
  }
  if (event.target.matches("input") || event.repeat || event.ctrlKey || event.metaKey || event.altKey) return;
  const key = event.key.toLowerCase();
  const place = KEYS.indexOf(key);
  const isOne = !byId("main").hidden; // not a view of many photographs
  const shown = isOne ? byId("photo") : event.target.closest(".cells button, .labelled button")?.firstChild;
  if (key === "z" && shown) enlarge(shown.src);
  else if (key === "g") byId(byId("grid").hidden ? "as-grid" : "one-by-one").click();
  else if (!isOne) return; // the other keys are about one photograph
  else if (key === "n") byId("name").focus();
  else if (key === "/") byId("filter").focus();
  else if (key === "x") label("unknown");
  else if (key === "s") label("skip");
  else if (key === "u") void send("undo", [{}]);
  else if (place >= 0 && place < state.classes.length) label("class", state.classes[place].name);
  else return;
  event.preventDefault();
});

void send("state").then(() => byId("grid").setAttribute("aria-busy", "false"));
