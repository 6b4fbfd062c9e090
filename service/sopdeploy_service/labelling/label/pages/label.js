"use strict";
// The label page: a grid of photographs that are probably of a class; then one at a time, with those selected beside it.

const RESERVED = "gnsuxz"; // keys of the other buttons
const WORTH_A_GRID = 8; // photographs of a class; with fewer, the page begins with one photograph
const MAX_CELLS = 48; // labelled photographs that are shown at once
const KEYS = [..."123456789", ..."abcdefghijklmnopqrstuvwxyz"].filter((key) => !RESERVED.includes(key));
const state = { photograph: null, classes: [], next: [], selected: new Set(), from: 0, busy: false };
const grid = { grids: [], name: "", others: new Set() }; // `others` are cells of another class
const past = { labelled: [], classes: [], name: "", start: 0, wrong: new Set() }; // labels; `name` null is "not one of ours"
const urls = new Map(); // promises of the URLs of loaded photographs, by their IDs

const SESSION = { "X-Session": [...crypto.getRandomValues(new Uint32Array(4))].join("-") }; // another page gets other photographs

/** Fetch JSON from `path`, with `body` as a POST; throws an Error with the message of the server. */
async function ask(path, body) {
  const post = { method: "POST", headers: { ...SESSION, "Content-Type": "application/json" }, body: JSON.stringify(body) };
  const reply = await fetch(path, body ? post : { headers: SESSION }).catch(() => { throw new Error("the server does not answer; start it again"); });
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
    ? `${ids.length} selected: the next label is that of all.`
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
  const url = photograph ? await load(photograph.id) : ""; // until then, thumbnails are those of the old `state`
  Object.assign(state, { photograph, classes, next: next.next, from: 0 });
  byId("photo").src = url;
  byId("zoom").hidden = !photograph;
  byId("next").replaceChildren(...state.next.map(thumbnail));
  select([...state.selected].filter((id) => state.next.includes(id)));
  const needed = new Set([...state.next, ...cells(), ...labelledCells()]);
  for (const id of [...urls.keys()].filter((one) => !needed.has(one))) {
    void load(id).then(URL.revokeObjectURL);
    urls.delete(id);
  }
  byId("empty").hidden = Boolean(photograph);
  byId("command").textContent = next.command;
  byId("then").hidden = classes.length === 0; // all were skipped
  byId("first").hidden = !photograph || classes.length > 0;
  byId("sampled").hidden = !photograph?.sampled;
  byId("unknown").hidden = photograph?.known !== false;
  byId("reported").hidden = !photograph?.reported;
  byId("reported").replaceChildren(make("strong", {}, "Reported as wrong. "),
    ...(photograph?.suggested ? ["A person suggests: ", make("bdi", {}, photograph.suggested)] : []));
  byId("progress").textContent = `${done} done in this session, ${left} left`;
  byId("bar").value = done / Math.max(1, done + left);
  byId("classes").replaceChildren(...classes.map(classButton));
  byId("undo").disabled = done === 0;
  byId("new").hidden = byId("not-ours").disabled = byId("skip").disabled = !photograph;
  byId("name").value = "";
}

/** URL of the bytes of the photograph `id`, which is loaded once; empty if it cannot be loaded. */
function load(id) {
  const url = async (reply) => (reply.ok ? URL.createObjectURL(await reply.blob()) : "");
  if (!urls.has(id)) urls.set(id, fetch(`images/${id}`).then(url).catch(() => ""));
  return urls.get(id);
}

/** Button that selects the photograph `id`. */
function thumbnail(id, place) {
  const image = make("img", { alt: "" });
  void load(id).then((url) => { image.src = url; });
  const button = make("button", { type: "button", "aria-label": `Photograph ${place + 1}`, "aria-pressed": "false" }, image);
  button.addEventListener("click", (event) => toggle(place, event.shiftKey));
  return button;
}

/** List entry of one class; the first ones have keys. */
function classButton({ name, probability }, place) {
  const button = make(
    "button", { type: "button", disabled: !state.photograph, "--part": probability ?? 0 },
    make("kbd", {}, KEYS[place] ?? ""),
    make("bdi", { className: "name" }, name),
    make("span", { className: "percent" }, probability === null ? "" : `${(100 * probability).toFixed(0)} %`),
  );
  button.addEventListener("click", () => label("class", name));
  return make("li", {}, button);
}

/** IDs of the photographs in the grid of the chosen class. */
const cells = () => grid.grids.find(({ name }) => name === grid.name)?.ids ?? [];

/** Show the view of the button `chosen`: the grid, one photograph, or the labels. */
function view(chosen) {
  const views = { "as-grid": "grid", "one-by-one": "main", "as-labelled": "labelled" };
  for (const [button, panel] of Object.entries(views)) {
    byId(panel).hidden = button !== chosen;
    byId(button).setAttribute("aria-pressed", String(button === chosen));
  }
}

/** Load the grids again; show that of `name` or, if it is empty, the largest one, whose size is returned. */
async function loadGrids(name = "") {
  grid.grids = (await ask("grids").catch(() => ({ grids: [] }))).grids;
  const largest = grid.grids.reduce((one, other) => (other.count > one.count ? other : one), { name: "", count: 0 });
  chooseGrid(grid.grids.some((one) => one.name === name) ? name : largest.name);
  return largest.count;
}

/** Show the photographs that are probably of the class `name`, all chosen. */
function chooseGrid(name) {
  Object.assign(grid, { name, others: new Set() });
  byId("grid-title").replaceChildren(...(name ? ["Are these ", make("bdi", {}, name), "?"] : ["Photographs that are probably of a class"]));
  byId("grid-work").hidden = !name;
  byId("no-grid").hidden = Boolean(name);
  byId("kinds").replaceChildren(...grid.grids.map(({ name: other, count }) => {
    const button = make("button", { type: "button", "aria-pressed": String(other === name) }, make("bdi", {}, other), ` ${count}`);
    button.addEventListener("click", () => chooseGrid(other));
    return button;
  }));
  byId("cells").replaceChildren(...cells().map((id, place) => cell(id, place, grid.others, true, showChosen)));
  showChosen();
}

/** Button of the photograph `id`, number `place` of a grid; it is pressed unless its being in `chosen` is `isOut`. */
function cell(id, place, chosen, isOut, onChange) {
  const image = make("img", { alt: "" });
  void load(id).then((url) => { image.src = url; });
  const isPressed = () => String(chosen.has(id) !== isOut);
  const button = make("button", { type: "button", "aria-label": `Photograph ${place + 1}`, "aria-pressed": isPressed() }, image);
  button.addEventListener("click", () => {
    if (!chosen.delete(id)) chosen.add(id);
    button.setAttribute("aria-pressed", isPressed());
    onChange();
  });
  return button;
}

/** Say what the button of the grid does. */
function showChosen() {
  const all = cells().length, left = all - grid.others.size;
  byId("kind").textContent = `${left} of ${all} chosen`;
  byId("accept").textContent = `Label ${left} as ${grid.name}`;
  byId("accept").disabled = left === 0;
}

/** Label the chosen photographs of the grid, and show what is left. */
async function accept() {
  const { name } = grid;
  const ids = cells().filter((id) => !grid.others.has(id));
  const problem = await send("label", ids.map((id) => ({ id, kind: "class", name })));
  if (!problem && !(await loadGrids())) view("one-by-one");
}

/** The labelled photographs of the chosen label. */
const ofLabel = () => past.labelled.find(({ name }) => name === past.name);

/** IDs of those that are shown. */
const labelledCells = () => ofLabel()?.ids ?? [];

/** Words for a label; `name` null is none of the classes. */
const words = (name) => make("bdi", {}, name ?? "Not one of ours");

/** Load the labels from number `start` on, and show those of the class `name` or, without any, of the first. */
async function loadLabels(name = past.name, start = 0) {
  const problem = await ask(`labelled?start=${start}`).then((labels) => showLabels(labels, name), (error) => error.message);
  sayLabelProblem(problem);
}

/** Show `labels`, a response of the server, of the class `name`. */
function showLabels({ labelled, classes, start }, name) {
  const shown = labelled.some((one) => one.name === name) ? name : labelled[0]?.name;
  Object.assign(past, { labelled, classes, start, name: shown, wrong: new Set() });
  const ids = labelledCells(), count = ofLabel()?.count ?? 0;
  byId("labelled-work").hidden = labelled.length === 0;
  byId("no-labels").hidden = labelled.length > 0;
  byId("labels").replaceChildren(...labelled.map((one) => {
    const button = make("button", { type: "button", "aria-pressed": String(one.name === shown) }, words(one.name), ` ${one.count}`);
    button.addEventListener("click", () => void loadLabels(one.name));
    return button;
  }));
  byId("labelled-cells").replaceChildren(...ids.map((id, place) => cell(id, start + place, past.wrong, false, showWrong)));
  byId("later").disabled = start === 0;
  byId("older").disabled = start + ids.length >= count;
  byId("right-labels").replaceChildren(...[...classes, null].filter((one) => one !== shown).map((one) => {
    const button = make("button", { type: "button" }, words(one));
    button.addEventListener("click", () => void correct(one));
    return button;
  }));
  showWrong();
}

/** Let the buttons of the right label work if a photograph is chosen. */
function showWrong() {
  for (const button of byId("labelled-work").querySelectorAll("#right-labels button, #new-right button")) button.disabled = past.wrong.size === 0;
}

/** Show `problem`, or none. */
function sayLabelProblem(problem) {
  byId("labelled-error").textContent = sentence(problem ?? "");
  byId("labelled-error").hidden = !problem;
}

/** Give the chosen photographs the label `name`. */
async function correct(name) {
  const kind = name === null ? "unknown" : "class";
  let problem = "";
  try {
    for (const id of past.wrong) await ask("correct", { id, kind, name: name ?? "" });
  } catch (error) {
    problem = error.message;
  }
  await loadLabels();
  if (problem) sayLabelProblem(problem);
}

/** Show the photograph at `url` as large as it is. */
function enlarge(url) {
  byId("large").src = url;
  byId("enlarged").showModal();
}

byId("accept").addEventListener("click", () => void accept());
byId("zoom").addEventListener("click", () => enlarge(byId("photo").src));
byId("one-by-one").addEventListener("click", () => {
  view("one-by-one");
  void send("state"); // with the classes of corrections
});
byId("as-labelled").addEventListener("click", () => {
  view("as-labelled");
  void loadLabels();
});
byId("later").addEventListener("click", () => void loadLabels(past.name, Math.max(0, past.start - MAX_CELLS)));
byId("older").addEventListener("click", () => void loadLabels(past.name, past.start + MAX_CELLS));
byId("new-right").addEventListener("submit", (event) => {
  event.preventDefault();
  void correct(byId("right-name").value).then(() => { byId("right-name").value = ""; });
});
byId("as-grid").addEventListener("click", () => {
  view("as-grid");
  void loadGrids(grid.name);
});
byId("new").addEventListener("submit", (event) => {
  event.preventDefault();
  byId("name").blur(); // so that the next key is a label
  label("class", byId("name").value);
});
byId("not-ours").addEventListener("click", () => label("unknown"));
byId("skip").addEventListener("click", () => label("skip"));
byId("undo").addEventListener("click", () => send("undo", [{}]));
document.addEventListener("keydown", (event) => {
  if (byId("enlarged").open) return; // which Escape closes
  if (event.key === "Escape" && event.target.tagName !== "INPUT") select([]);
  if (event.key === "Escape") byId("name").blur();
  if (event.target.tagName === "INPUT" || event.repeat || event.ctrlKey || event.metaKey || event.altKey) return;
  const key = event.key.toLowerCase();
  const place = KEYS.indexOf(key);
  const isGrid = byId("main").hidden;
  const shown = isGrid ? event.target.closest(".cells button")?.firstChild : byId("photo");
  if (key === "z" && shown) enlarge(shown.src);
  else if (key === "g") byId(byId("grid").hidden ? "as-grid" : "one-by-one").click();
  else if (isGrid) return; // the other keys are about one photograph
  else if (key === "n") byId("name").focus();
  else if (key === "x") label("unknown");
  else if (key === "s") label("skip");
  else if (key === "u") void send("undo", [{}]);
  else if (place >= 0 && place < state.classes.length) label("class", state.classes[place].name);
  else return;
  event.preventDefault();
});

void send("state").then(async () => {
  if ((await loadGrids()) >= WORTH_A_GRID) view("as-grid");
  byId("grid").setAttribute("aria-busy", "false");
});
