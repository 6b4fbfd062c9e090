"use strict";
// The page at `/`: classify images that are dropped, chosen or pasted.

// Each of `photos` has its file, the URL of its preview, the list entry, and in the end `show`, which shows its answer:
// that of the server is `body`, that of the other model `other`, a problem in words `problem`.
const state = { server: null, info: null, card: null, photos: [], shown: null, run: null, explaining: null };
const IMAGES_PER_MAP = 50; // that an explanation costs
const COUNTED = 20; // answers, after which the counts are shown anew
const CONCURRENT = 4; // requests; browsers open up to six connections to a server

/** URL of the classify request of `model`, with `others` as its parameters. */
function classifyUrl(others = {}, model = state.info?.name) {
  const url = new URL("v1/classify", document.baseURI);
  url.searchParams.set("top_k", String(topK()));
  if (model && state.server.models.length > 1) url.searchParams.set("model", model);
  for (const [name, value] of Object.entries(others)) url.searchParams.set(name, value);
  return url.href;
}

/** Requested number of classes; 5 if the field has no number. */
function topK() {
  const value = Math.trunc(Number(byId("top-k").value));
  return value >= 1 ? value : 5;
}

/** Preview and classify `files`, and update the snippets. */
function take(files) {
  if (!files) return;
  if (!files.length) {
    showError("there are no images in this folder");
    return;
  }
  for (const { url } of state.photos) URL.revokeObjectURL(url);
  state.photos = [...files].slice(0, MAX_IMAGES).map(listed);
  const several = state.photos.length > 1;
  byId("left-out").hidden = files.length <= MAX_IMAGES;
  byId("left-out").textContent = `The first ${MAX_IMAGES} of ${files.length}; sopdeploy classify takes all.`;
  showCounts();
  byId("photos").hidden = !several;
  byId("invite").textContent = several ? "Choose other images" : "Choose another image";
  document.body.classList.add("given");
  display(state.photos[0]);
  if (state.info) void askAll();
  else starting = starting.then(() => state.info ?? start()); // `start` classifies the images
}

/** Photo with the list entry of `file`, which shows its answer when it is chosen. */
function listed(file) {
  const photo = { file, url: URL.createObjectURL(file), result: make("span", { className: "result" }) };
  const preview = make("img", { src: photo.url, alt: "", loading: "lazy", decoding: "async" });
  preview.addEventListener("error", () => { preview.style.visibility = "hidden"; }); // else a broken image is shown
  const button = make(
    "button", { type: "button" },
    preview, photo.result,
    make("span", { className: "name" }, pathOf(file)),
  );
  button.addEventListener("click", () => {
    display(photo);
    byId("drop").scrollIntoView({ block: "nearest" });
  });
  return Object.assign(photo, { button, entry: make("li", {}, button) });
}

/** Show the preview of `photo`, and its answer or what is being done. */
function display(photo) {
  state.shown = photo;
  for (const { button } of state.photos) button.setAttribute("aria-current", String(button === photo.button));
  showPreview(photo);
  showSnippets();
  state.explaining?.abort();
  if (photo.show) {
    photo.show();
    void explain(photo);
  } else {
    clearAnswer(); // that of the photo before
    progress(photo, "Waiting");
  }
}

/** Show in words what is being done with `photo`. */
function progress(photo, text) {
  photo.result.textContent = text;
  if (photo !== state.shown) return;
  byId("answer").setAttribute("aria-busy", "true");
  byId("error").hidden = byId("empty").hidden = true;
  byId("progress").textContent = byId("status").textContent = text;
}

/** Classify all photos, several at the same time; newer photos cancel older requests. */
async function askAll() {
  state.run?.abort();
  const run = state.run = new AbortController();
  const { photos } = state;
  const waiting = [...photos];
  let done = 0;
  state.explaining?.abort();
  byId("save").disabled = true;
  for (const photo of photos) {
    Object.assign(photo, { show: null, body: null, other: null, map: null, problem: "" });
    progress(photo, "Waiting");
  }
  await Promise.all(Array.from({ length: CONCURRENT }, async () => {
    for (let photo = waiting.shift(); photo; photo = waiting.shift()) {
      byId("done").textContent = `${done} of ${photos.length}`;
      await ask(photo, run.signal);
      if (run.signal.aborted) return;
      done += 1;
      if (done % COUNTED === 0) showCounts();
    }
    byId("done").textContent = `${done} of ${photos.length}`;
  }));
  if (!run.signal.aborted) showCounts();
  byId("save").disabled = run.signal.aborted;
}

/** Send `photo` and show the response in the list, and as the answer if the photo is chosen. */
async function ask(photo, signal) {
  const { body, code, problem, reply, milliseconds: total } = await answer(photo, classifyUrl(), signal);
  if (signal.aborted) return;
  const other = byId("beside").value;
  if (body) {
    void followSwap(reply.getResponseHeader("X-Model-Digest"));
    const timing = reply.getResponseHeader("Server-Timing") ?? "";
    if (!state.explaining) why.seconds = (IMAGES_PER_MAP * Number(/infer;dur=([\d.]+)/.exec(timing)?.[1] ?? 20)) / 1000;
    photo.body = body;
    photo.show = () => {
      clearAnswer();
      showAnswer(body);
      showTime(timing, total);
      if (photo.other) showOther(photo.other.name, photo.other.body, photo.other.problem);
      if (photo.map) showMap(photo.map, body.classes[0].label);
      byId("report").hidden = !state.server.keeps;
      byId("report-note").textContent = photo.reported ?? "";
    };
  } else {
    photo.problem = problem;
    photo.show = () => showError(problem, code);
  }
  photo.result.textContent = body ? inShort(body) : sentence(problem);
  photo.entry.classList.toggle("failed", !body);
  if (photo === state.shown) photo.show();
  if (body && other) await askOther(photo, other, signal);
  if (photo === state.shown && !signal.aborted) void explain(photo);
}

/** Send `photo` to `url`; return the JSON of a successful response as `body`, or the `problem` in words. */
async function answer(photo, url, signal, onProgress = progress) {
  const started = performance.now();
  let reply = null;
  let body = null;
  try {
    reply = await send(photo, url, signal, onProgress);
    body = JSON.parse(reply.responseText);
  } catch {
    reply = null;
  }
  if (reply?.status === 200) return { body, reply, milliseconds: performance.now() - started };
  const again = reply?.getResponseHeader("Retry-After");
  let problem = "the server cannot be reached or closed the connection; check that it is running";
  if (reply) problem = again ? `${body?.detail} (retry in ${again} s)` : body?.detail;
  if (reply?.status === 401) {
    askForKey();
    problem = noKey();
  }
  return { problem, code: body?.code, reply };
}

const silently = () => {}; // the answer is shown already

/** Ask the model `name`, too, and show its answer beside the first one. */
async function askOther(photo, name, signal) {
  const { body, problem } = await answer(photo, classifyUrl({}, name), signal, silently);
  if (signal.aborted) return;
  photo.other = { name, body, problem };
  const differs = body && body.classes[0]?.label !== photo.body.classes[0]?.label;
  photo.entry.classList.toggle("differs", Boolean(differs));
  if (differs) photo.result.textContent = `${inShort(photo.body)} · ${name}: ${inShort(body)}`;
  if (photo === state.shown) showOther(name, body, problem);
}

/** Ask which parts of `photo` decide, if the user wants to know, and show how far the server probably is. */
async function explain(photo) {
  if (!byId("explain").checked || !photo.body?.classes.length || photo.map) return;
  state.explaining?.abort();
  const { signal } = state.explaining = new AbortController();
  showWhy(why.seconds);
  const { body, problem, milliseconds: total } = await answer(photo, classifyUrl({ explain: "true" }), signal, silently);
  if (signal.aborted) return;
  showWhy(0);
  if (body) {
    why.seconds = total / 1000;
    photo.map = body.explanation;
    showMap(photo.map, photo.body.classes[0].label);
    byId("status").textContent = byId("map").getAttribute("aria-label");
  } else {
    byId("why").hidden = false;
    byId("why-bar").value = 0;
    byId("why-text").textContent = sentence(problem);
  }
}

/** Rows of the CSV file: those that `sopdeploy classify` writes, with the answers of another model beside them. */
function rows() {
  const cells = (body) => [body?.classes[0]?.label ?? "", body?.classes[0]?.probability.toFixed(4) ?? "", String(body?.known ?? "")];
  const other = state.photos.find((photo) => photo.other)?.other.name;
  const columns = ["class", "probability", "known"];
  const all = (body) => (isMultiLabel(body) ? [body.classes.map(({ label }) => label).join("; "), ...cells(body).slice(1)] : cells(body));
  return [
    ["image", ...columns, "error", ...(other ? columns.map((column) => `${column} ${other}`) : [])],
    ...state.photos.map((photo) => [pathOf(photo.file), ...all(photo.body), photo.problem, ...(other ? all(photo.other?.body) : [])]),
  ];
}

/** Whether `body` lists all classes above their thresholds. */
const isMultiLabel = (body) => Boolean(body && state.info.thresholds);

/** Send the photo that is shown once more, to be kept for a label; the class `name` is a suggestion. */
async function report(name) {
  const photo = state.shown;
  const { signal } = new AbortController();
  const { problem } = await answer(photo, classifyUrl({ reported: name }), signal, silently);
  photo.reported = problem ? sentence(problem) : "Sent. If there is room, it waits for a label.";
  if (photo !== state.shown) return;
  byId("report-note").textContent = photo.reported;
  if (!problem) byId("right").value = "";
}

/** Send `photo` to `url`; `fetch` would not tell when the upload ends. */
function send(photo, url, signal, onProgress) {
  return new Promise((resolve, reject) => {
    const request = new XMLHttpRequest();
    request.open("POST", url);
    const headers = keyHeaders({ "Content-Type": typeOf(photo.file) });
    for (const [name, value] of Object.entries(headers)) request.setRequestHeader(name, value);
    request.upload.addEventListener("progress", ({ loaded, total }) =>
      onProgress(photo, `Uploading, ${Math.floor((100 * loaded) / total)} %`));
    request.upload.addEventListener("load", () => onProgress(photo, "Classifying"));
    request.addEventListener("load", () => resolve(request));
    for (const end of ["error", "abort"]) request.addEventListener(end, reject);
    signal.addEventListener("abort", () => request.abort());
    onProgress(photo, "Uploading");
    request.send(photo.file);
  });
}

const typeOf = (file) => file?.type || "application/octet-stream";

/** Show a photo with a frame around the crop of the network. */
function showPreview({ file, url }) {
  byId("frame").hidden = byId("map").hidden = true;
  byId("preview").src = url;
  byId("preview").alt = `Preview of ${file.name}`;
  byId("file-note").textContent = `${file.name}, ${Math.max(1, Math.round(file.size / 1000)).toLocaleString("en")} kB`;
}

byId("preview").addEventListener("load", () => {
  const { naturalWidth: width, naturalHeight: height } = byId("preview");
  const rules = state.info?.preprocess;
  const whole = rules?.fit === "pad" || rules?.fit === "squash";
  const share = rules ? rules.crop / rules.resize : 1; // of the shorter side, or of both
  const side = (length) => (rules?.fit === "squash-crop" ? length : Math.min(width, height)) * share;
  byId("crop").style.width = whole ? "100%" : `${(100 * side(width)) / width}%`;
  byId("crop").style.height = whole ? "100%" : `${(100 * side(height)) / height}%`;
  const padded = rules?.fit === "pad" ? Math.max(width, height) : 0; // the map covers the border, too
  byId("map").style.width = padded ? `${(100 * padded) / width}%` : "100%";
  byId("map").style.height = padded ? `${(100 * padded) / height}%` : "100%";
  byId("preview").style.imageOrientation = rules?.exif_orientation === false ? "none" : "from-image";
  byId("frame").hidden = false;
  const seen = { pad: "The network sees the whole image, padded to a square.", squash: "The network sees the whole image, resized to a square." };
  byId("file-note").append(`, ${width} × ${height}. ${seen[rules?.fit] ?? "The frame shows the input of the network."}`);
});

/** Show the request in each language. */
function showSnippets() {
  const name = state.shown?.file.name ?? "photo.jpg";
  const type = state.shown ? typeOf(state.shown.file) : "image/jpeg";
  const url = classifyUrl(byId("explain").checked ? { explain: "true" } : {});
  showTabs(snippets(url, name, type, key !== "").map(([language, code]) =>
    [language, codeBlock(code, `${language} code`)]));
}

for (const id of ["file", "camera"]) {
  byId(id).addEventListener("change", (event) => {
    take(event.target.files);
    event.target.value = ""; // allow choosing the same file again
  });
}
byId("folder").addEventListener("change", (event) => {
  take(imagesOf(event.target.files));
  event.target.value = "";
});
for (const id of ["top-k", "beside"]) {
  byId(id).addEventListener("change", () => {
    showSnippets();
    if (state.shown) void askAll();
  });
}
byId("explain").addEventListener("change", () => {
  showSnippets();
  state.explaining?.abort();
  showWhy(0);
  for (const photo of state.photos) photo.map = null;
  byId("map").hidden = true;
  if (state.shown) void explain(state.shown);
});
byId("use-camera").addEventListener("click", () => void openCamera((file) => take([file])));
byId("no-camera").addEventListener("click", () => {
  closeCamera();
  byId("use-camera").focus();
});
byId("order").addEventListener("change", showCounts);
byId("save").addEventListener("click", () => save("answers.csv", csv(rows())));
byId("report-form").addEventListener("submit", (event) => {
  event.preventDefault();
  void report(byId("right").value.trim());
});
closeCamera();
document.addEventListener("paste", (event) => {
  if (event.clipboardData?.files.length) take(event.clipboardData.files);
});
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
  void filesOf(event.dataTransfer).then(take);
});

byId("models").addEventListener("change", (event) => choose(event.target.value));

/** Switch to the model `name`. */
async function choose(name) {
  try {
    const card = await fetchJson(`v1/card?model=${encodeURIComponent(name)}`);
    if (byId("models").value !== name) return; // another model was chosen in the meantime
    state.card = card;
  } catch (problem) {
    if (byId("models").value !== name) return;
    if (state.info) byId("models").value = state.info.name; // which answers from now on, too
    showError(problem.message);
    return;
  }
  state.info = state.server.models.find((model) => model.name === name);
  byId("top-k").max = String(state.info.num_labels);
  const others = state.server.models.filter((model) => model.name !== name).map((model) => model.name);
  const beside = byId("beside").value;
  byId("beside").replaceChildren(make("option", { value: "" }, "none"), ...others.map((other) => make("option", {}, other)));
  byId("beside").value = others.includes(beside) ? beside : "";
  showAbout(state.info, state.card, state.server.server);
  showSnippets();
  if (state.shown) {
    showPreview(state.shown);
    void askAll();
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
    showAbout(info, card, server.server);
    byId("top-k").max = String(info.num_labels);
    byId("status").textContent = `${name} was replaced: now ${info.bundle}`;
  } catch (problem) {
    showError(`the model was replaced, but its information cannot be loaded: ${problem.message}`);
  }
}

/** Offer the example photographs of the server, which classify themselves on a click. */
async function offerExamples() {
  const { names } = await fetchJson("examples");
  const buttons = await Promise.all(names.map(async (name, number) => {
    const reply = await fetch(`examples/${number}`, { headers: keyHeaders() });
    if (!reply.ok) return null;
    const file = new File([await reply.blob()], name, { type: reply.headers.get("content-type") });
    const button = make("button", { type: "button", "aria-label": `Example ${number + 1}` },
      make("img", { src: URL.createObjectURL(file), alt: "" }));
    button.addEventListener("click", () => take([file]));
    return button;
  }));
  byId("examples").replaceChildren(...buttons.filter(Boolean));
  byId("try").hidden = byId("examples").hidden = !buttons.some(Boolean);
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
  byId("chooser").hidden = byId("beside-chooser").hidden = names.length < 2;
  await choose(names[0]);
  await offerExamples().catch(() => {}); // the page works without
}

onKey(() => { starting = start(); });
let starting = start();
