"use strict";
// The page at `/`: from a picture that is dropped, chosen or pasted to its answer.

const state = { server: null, info: null, card: null, file: null, request: null };

/** Return the URL that classifies, as the page asks it. */
function classifyUrl() {
  const url = new URL("v1/classify", document.baseURI);
  url.searchParams.set("top_k", String(topK()));
  if (state.info && state.server.models.length > 1) url.searchParams.set("model", state.info.name);
  if (state.card?.experts) url.searchParams.set("gates", "true");
  return url.href;
}

/** Return the number of classes asked for, 5 where the field holds no number. */
function topK() {
  const value = Math.trunc(Number(byId("top-k").value));
  return value >= 1 ? value : 5;
}

/** Take `file` as the picture: preview, answer, snippets. */
function take(file) {
  if (!file) return;
  state.file = file;
  showPreview(file);
  showSnippets();
  if (state.info) void ask();
  else starting = starting.then(() => state.info ?? start()); // whatever starts well asks for the picture
}

/** Send the picture and show what comes back; a newer picture makes an older answer worthless. */
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
      showAnswer(body, state.card?.experts ?? 0);
      showTime(reply.headers.get("Server-Timing") ?? "", total);
    } else {
      const again = reply.headers.get("Retry-After");
      showError(again ? `${body.detail} (again in ${again} s)` : body.detail, body.code);
    }
  } catch {
    if (request.signal.aborted) return;
    showError("the server cannot be reached, or it closed the connection; is it still running?");
  }
  byId("answer").setAttribute("aria-busy", "false");
}

const typeOf = (file) => file?.type || "application/octet-stream";

/** Show `file`, framed where the network will see it. */
function showPreview(file) {
  URL.revokeObjectURL(byId("preview").src);
  byId("frame").hidden = true;
  byId("preview").src = URL.createObjectURL(file);
  byId("preview").alt = `Preview of ${file.name}`;
  byId("invite").textContent = "Drop another photo";
  byId("file-note").textContent = `${file.name}, ${Math.max(1, Math.round(file.size / 1000)).toLocaleString("en")} kB`;
}

byId("preview").addEventListener("load", () => {
  const { naturalWidth: width, naturalHeight: height } = byId("preview");
  const rules = state.info?.preprocess;
  const side = Math.min(width, height) * (rules ? rules.crop / rules.resize : 1);
  byId("crop").style.width = `${(100 * side) / width}%`;
  byId("crop").style.height = `${(100 * side) / height}%`;
  byId("preview").style.imageOrientation = rules?.exif_orientation === false ? "none" : "from-image";
  byId("frame").hidden = false;
  byId("file-note").append(`, ${width} × ${height}. The frame shows what the network sees.`);
});

/** Show the request for the picture in each language. */
function showSnippets() {
  const name = state.file?.name ?? "photo.jpg";
  const type = state.file ? typeOf(state.file) : "image/jpeg";
  showTabs(snippets(classifyUrl(), name, type).map(([language, code]) =>
    [language, codeBlock(code, `${language} code`)]));
}

byId("file").addEventListener("change", (event) => {
  take(event.target.files[0]);
  event.target.value = ""; // the same file may be chosen again
});
byId("top-k").addEventListener("change", () => {
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

/** Let the model `name` answer from now on. */
async function choose(name) {
  try {
    const card = await fetchJson(`v1/card?model=${encodeURIComponent(name)}`);
    if (byId("models").value !== name) return; // another one was chosen meanwhile
    state.card = card;
  } catch (problem) {
    showError(problem.message);
    return;
  }
  state.info = state.server.models.find((model) => model.name === name);
  byId("top-k").max = String(state.info.labels);
  showAbout(state.info, state.card, state.server.server);
  showSnippets();
  if (state.file) {
    showPreview(state.file);
    void ask();
  }
}

/** Read anew what is shown of the model where `digest`, of the bundle that answered, is not that one's: it was swapped. */
async function followSwap(digest) {
  const name = state.info?.name;
  if (!digest || digest === state.info?.id) return;
  try {
    const server = await fetchJson("info");
    const card = await fetchJson(`v1/card?model=${encodeURIComponent(name)}`);
    const info = server.models.find((model) => model.name === name);
    if (state.info?.name !== name || !info) return; // another one was chosen meanwhile, or it is gone
    Object.assign(state, { server, card, info });
    showAbout(info, card, server.server);
    byId("top-k").max = String(info.labels);
    byId("status").textContent = `${name} was replaced: ${info.bundle} answers now`;
  } catch (problem) {
    showError(`the model was replaced, and what is shown of it is the one before: ${problem.message}`);
  }
}

/** Ask the server which models it has and show the first. */
async function start() {
  byId("error").hidden = true;
  showSnippets();
  try {
    state.server = await fetchJson("info");
  } catch (problem) {
    showError(`the server does not say what it serves: ${problem.message}`);
    return;
  }
  const names = state.server.models.map((model) => model.name);
  byId("models").replaceChildren(...names.map((name) => make("option", {}, name)));
  byId("chooser").hidden = names.length < 2;
  if (names.length) await choose(names[0]);
  else showError("no model is loaded; this server cannot answer yet");
}

onKey(() => { starting = start(); });
let starting = start();
