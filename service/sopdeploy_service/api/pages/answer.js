"use strict";
// The prediction for one image: classes, warnings, timing.

const WARNINGS = {
  alpha_flattened: "Transparent pixels were replaced by the background color of the network.",
  exif_rotated: "The image was rotated by its EXIF orientation.",
  first_frame_only: "Only the first frame of the animation was classified.",
  sixteen_bit_scaled: "16-bit channels were scaled to 8 bits.",
};
const NONE_OF_THESE = "Probably none of these";
const STAGES = { receive: "receive", decode_queue: "wait", decode: "decode", queue: "queue", infer: "infer", explain: "explain", rest: "connection" };

const percent = (value) => (value < 0.0005 ? "< 0.1 %" : `${(100 * value).toFixed(1)} %`);
const milliseconds = (value) => `${value.toFixed(value < 99.5 ? 1 : 0)} ms`;

/** Show `body`, the JSON of a successful response. */
function showAnswer(body) {
  byId("classes").replaceChildren(...body.classes.map((entry) => classBar(entry, body.known)));
  byId("warnings").replaceChildren(
    ...body.warnings.map((code) => make("li", {}, WARNINGS[code] ?? sentence(code.replaceAll("_", " ")))),
  );
  byId("unknown").hidden = body.known !== false;
  byId("classes").classList.toggle("unlikely", body.known === false);
  byId("none").hidden = body.classes.length > 0;
  byId("closest").textContent = body.classes[0]?.label ?? "";
  const isUnknown = body.known === false;
  const classes = body.classes.map(({ label, probability }) => (isUnknown ? label : `${label} ${percent(probability)}`));
  const lead = isUnknown ? `${NONE_OF_THESE}; closest` : "Prediction";
  byId("status").textContent = classes.length === 0 ? byId("none").textContent : `${lead}: ${classes.join(", ")}`;
  byId("tag").textContent = inShort(body);
  byId("tag").hidden = false;
}

/** Answer in a few words. */
function inShort({ classes: [best], known }) {
  if (!best) return "No class";
  return known === false ? NONE_OF_THESE : `${best.label} ${percent(best.probability)}`;
}

/** List entry of one class; probabilities of an image that is not `known` say nothing. */
function classBar({ label, probability }, known) {
  const name = make("bdi", { className: "label" }, label);
  if (known === false) return make("li", {}, name);
  return make(
    "li", {},
    name,
    make("span", { className: "percent" }, percent(probability)),
    make("span", { className: "track", "aria-hidden": "true" }, make("span", { "--part": probability })),
  );
}

/** Show the stages of a `Server-Timing` header; the rest of the `total` milliseconds is shown as connection. */
function showTime(header, total) {
  const stages = [...header.matchAll(/([\w-]+);dur=([\d.]+)/g)].map(([, name, time]) => [name, Number(time)]);
  const served = stages.reduce((sum, [, time]) => sum + time, 0);
  stages.push(["rest", Math.max(0, total - served)]);
  const whole = Math.max(total, served);
  let from = 0;
  byId("waterfall").replaceChildren(...stages.map(([name, time]) => {
    const bar = make("span", { className: name, "--from": from / whole, "--part": time / whole });
    from += time;
    return make(
      "li", {},
      make("span", {}, STAGES[name] ?? name),
      make("span", { className: "lane", "aria-hidden": "true" }, bar),
      make("span", { className: "ms" }, milliseconds(time)),
    );
  }));
  byId("total").textContent = milliseconds(whole);
  byId("time").hidden = false;
}

const why = { seconds: 1, timer: 0 }; // that an explanation probably takes: as long as the last one

/** Show that an explanation is made, which probably takes `seconds`, or with 0 that none is. */
function showWhy(seconds) {
  clearInterval(why.timer);
  byId("why").hidden = seconds === 0;
  if (seconds === 0) return;
  byId("why-text").textContent = `Finding the parts that decide, about ${Math.max(1, Math.round(seconds))} s`;
  const started = performance.now();
  const tick = () => { byId("why-bar").value = Math.min(0.97, (performance.now() - started) / (1000 * seconds)); };
  tick();
  why.timer = setInterval(tick, 100);
}

/** Show the answer of another model, `name`, beside the one that is shown: `body`, or why there is none. */
function showOther(name, body, problem) {
  byId("other").hidden = byId("this-model").hidden = !name;
  byId("other-model").textContent = name;
  byId("other-classes").replaceChildren(...(body?.classes ?? []).map((entry) => classBar(entry, body.known)));
  byId("other-classes").classList.toggle("unlikely", body?.known === false);
  const none = body?.classes.length === 0 ? "No class reaches its threshold." : "";
  byId("other-note").textContent = problem ? sentence(problem) : body?.known === false ? `${NONE_OF_THESE}.` : none;
}

/** Draw `losses`, rows of probabilities that `label` loses without a part of the image, over the image: red where it loses most, dark where nothing. */
function showMap(losses, label) {
  const cells = losses.flat();
  const largest = Math.max(...cells, Number.MIN_VALUE);
  const pixels = cells.map((loss) => Math.max(0, loss / largest)).flatMap((share) => [255 * share, 40 * share, 0, 110 + 80 * share]);
  byId("map").getContext("2d").putImageData(new ImageData(new Uint8ClampedArray(pixels), losses[0].length), 0, 0);
  byId("map").setAttribute("aria-label", `Parts of the image on which ${label} depends`);
  byId("map").hidden = false;
}

/** Remove the previous prediction. */
function clearAnswer() {
  byId("map").hidden = byId("tag").hidden = true;
  showWhy(0);
  showOther("");
  byId("report").hidden = true;
  for (const id of ["classes", "warnings", "waterfall"]) byId(id).replaceChildren();
  for (const id of ["time", "error", "empty", "none", "unknown"]) byId(id).hidden = true;
  byId("status").textContent = byId("progress").textContent = "";
  byId("answer").setAttribute("aria-busy", "false");
}

/** Show an error; `code` is its stable error code. */
function showError(text, code) {
  clearAnswer();
  byId("error").replaceChildren(sentence(text), ...(code ? [make("small", {}, code)] : []));
  byId("error").hidden = false;
}
