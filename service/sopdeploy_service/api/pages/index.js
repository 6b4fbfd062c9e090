"use strict";
// The page at `/`: classify an image that is dropped, chosen or pasted.

const state = { server: null, info: null, card: null, file: null, request: null };

/** URL of the classify request. */
function classifyUrl() {
  const url = new URL("v1/classify", document.baseURI);
  url.searchParams.set("top_k", String(topK()));
  if (state.info && state.server.models.length > 1) url.searchParams.set("model", state.info.name);
  if (state.card?.components) url.searchParams.set("gates", "true");
  if (state.info?.class_maps && byId("explain").checked) url.searchParams.set("explain", "true");
  return url.href;
}

/** Requested number of classes; 5 if the field has no number. */
function topK() {
  const value = Math.trunc(Number(byId("top-k").value));
  return value >= 1 ? value : 5;
}

/** Preview and classify `file`, and update the snippets. */
function take(file) {
  if (!file) return;
  state.file = file;
  showPreview(file);
  showSnippets();
  if (state.info) void ask();
  else starting = starting.then(() => state.info ?? start()); // `start` classifies the image
}

/** Send the image and show the response; a newer image cancels an older request. */
async function ask() {
  state.request?.abort();
  const request = new AbortController();
  state.request = request;
  byId("answer").setAttribute("aria-busy", "true");
  byId("status").textContent = "Classifying";
  const started = performance.now();
  try {
    const headers = keyHeaders({ "Content-Type": typeOf(state.file) });
    const sent = { method: "POST", headers, body: state.file, signal: request.signal };
    const reply = await fetch(classifyUrl(), sent);
    const body = await reply.json();
    const total = performance.now() - started;
    if (request.signal.aborted) return;
    clearAnswer();
    if (reply.status === 401) {
      askForKey();
      showError(noKey(), body.code);
    } else if (reply.ok) {
      void followSwap(reply.headers.get("X-Model-Digest"));
      showAnswer(body, state.card?.components ?? 0);
      showTime(reply.headers.get("Server-Timing") ?? "", total);
    } else {
      const again = reply.headers.get("Retry-After");
      showError(again ? `${body.detail} (retry in ${again} s)` : body.detail, body.code);
    }
  } catch {
    if (request.signal.aborted) return;
    showError("the server cannot be reached or closed the connection; check that it is running");
  }
  byId("answer").setAttribute("aria-busy", "false");
}

const typeOf = (file) => file?.type || "application/octet-stream";

/** Show `file` with a frame around the crop of the network. */
function showPreview(file) {
  URL.revokeObjectURL(byId("preview").src);
  byId("frame").hidden = byId("map").hidden = true;
  byId("preview").src = URL.createObjectURL(file);
  byId("preview").alt = `Preview of ${file.name}`;
  byId("invite").textContent = "Drop another image";
  byId("file-note").textContent = `${file.name}, ${Math.max(1, Math.round(file.size / 1000)).toLocaleString("en")} kB`;
}

byId("preview").addEventListener("load", () => {
  const { naturalWidth: width, naturalHeight: height } = byId("preview");
  const rules = state.info?.preprocess;
  const whole = rules?.fit === "pad" || rules?.fit === "squash";
  const side = Math.min(width, height) * (rules ? rules.crop / rules.resize : 1);
  byId("crop").style.width = whole ? "100%" : `${(100 * side) / width}%`;
  byId("crop").style.height = whole ? "100%" : `${(100 * side) / height}%`;
  byId("preview").style.imageOrientation = rules?.exif_orientation === false ? "none" : "from-image";
  byId("frame").hidden = false;
  const seen = { pad: "The network sees the whole image, padded to a square.", squash: "The network sees the whole image, resized to a square." };
  byId("file-note").append(`, ${width} × ${height}. ${seen[rules?.fit] ?? "The frame shows the input of the network."}`);
});

/** Show the request in each language. */
function showSnippets() {
  const name = state.file?.name ?? "photo.jpg";
  const type = state.file ? typeOf(state.file) : "image/jpeg";
  showTabs(snippets(classifyUrl(), name, type).map(([language, code]) =>
    [language, codeBlock(code, `${language} code`)]));
}

byId("file").addEventListener("change", (event) => {
  take(event.target.files[0]);
  event.target.value = ""; // allow choosing the same file again
});
for (const id of ["top-k", "explain"]) byId(id).addEventListener("change", () => {
  showSnippets();
  if (state.file) void ask();
});
document.addEventListener("paste", (event) => take(event.clipboardData?.files[0]));
document.addEventListener("dragover", (event) => {
  event.preventDefault();
  document.body.classList.add("over");
});
document.addEventListener("dragleave", (event) => {
  if (!event.relatedTarget) document.body.classList.remove("over");
});
document.addEventListener("drop", (event) => {
  event.preventDefault();
  document.body.classList.remove("over");
  take(event.dataTransfer?.files[0]);
});

byId("models").addEventListener("change", (event) => choose(event.target.value));

/** Switch to the model `name`. */
async function choose(name) {
  try {
    const card = await fetchJson(`v1/card?model=${encodeURIComponent(name)}`);
    if (byId("models").value !== name) return; // another model was chosen in the meantime
    state.card = card;
  } catch (problem) {
    showError(problem.message);
    return;
  }
  state.info = state.server.models.find((model) => model.name === name);
  byId("top-k").max = String(state.info.labels);
  byId("explain-row").hidden = !state.info.class_maps;
  showAbout(state.info, state.card, state.server.server);
  showSnippets();
  if (state.file) {
    showPreview(state.file);
    void ask();
  }
}

/** Reload the model information if the model was replaced: `digest`, the bundle of the response, is then a new one. */
async function followSwap(digest) {
  const name = state.info?.name;
  if (!digest || digest === state.info?.id) return;
  try {
    const server = await fetchJson("info");
    const card = await fetchJson(`v1/card?model=${encodeURIComponent(name)}`);
    const info = server.models.find((model) => model.name === name);
    if (state.info?.name !== name || !info) return; // another model was chosen in the meantime, or it was unloaded
    Object.assign(state, { server, card, info });
    byId("explain-row").hidden = !info.class_maps;
    showAbout(info, card, server.server);
    byId("top-k").max = String(info.labels);
    byId("status").textContent = `${name} was replaced: now ${info.bundle}`;
  } catch (problem) {
    showError(`the model was replaced, but its information cannot be loaded: ${problem.message}`);
  }
}

/** Load the list of models and show the first. */
async function start() {
  byId("error").hidden = true;
  showSnippets();
  try {
    state.server = await fetchJson("info");
  } catch (problem) {
    showError(`the list of models cannot be loaded: ${problem.message}`);
    return;
  }
  const names = state.server.models.map((model) => model.name);
  byId("models").replaceChildren(...names.map((name) => make("option", {}, name)));
  byId("chooser").hidden = names.length < 2;
  if (names.length) await choose(names[0]);
  else showError("no model is loaded");
}

onKey(() => { starting = start(); });
let starting = start();
