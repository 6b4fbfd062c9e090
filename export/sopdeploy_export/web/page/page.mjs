// The page: shows the classes of dropped, pasted or chosen images and of pictures of the camera.

import { checkNetwork, classify, hasWebGpu, openSite } from "./browser.mjs";

const SHOWN = 5; // classes
const byId = (id) => document.getElementById(id);
const percent = (value) => `${(100 * value).toFixed(1)} %`;

function entry({ label, probability }) {
  const item = document.createElement("li");
  const bar = Object.assign(document.createElement("meter"), { value: probability });
  bar.setAttribute("aria-hidden", "true");
  item.append(`${label} ${percent(probability)}`, bar);
  return item;
}

function describe({ classes, known, score, stable }, ms) {
  const facts = [`${Math.round(ms[0] + ms[1])} ms`];
  if (known !== null) facts.unshift(`${known ? "known" : "probably none of the classes"} (score ${score.toFixed(3)})`);
  if (stable !== null) facts.unshift(stable ? "stable" : "not stable: another device may give another class");
  if (classes.length === 0) facts.unshift("none of the classes");
  return facts.join(" · ");
}

// One image at a time; the last one waits.
function startQueue(opened) {
  let [running, next] = [false, null];
  return async (source) => {
    next = source;
    if (running) return;
    running = true;
    while ((source = next)) {
      next = null;
      byId("classes").setAttribute("aria-busy", "true");
      byId("classes").replaceChildren();
      try {
        const { answer, ms } = await classify(source, opened);
        byId("classes").replaceChildren(...answer.classes.slice(0, SHOWN).map(entry));
        byId("status").textContent = describe(answer, ms);
      } catch (error) {
        byId("status").textContent = `This image cannot be read: ${error.message}`;
      }
      byId("classes").setAttribute("aria-busy", "false");
    }
    running = false;
  };
}

function connect(submit) {
  const show = (file) => {
    if (!file) return;
    URL.revokeObjectURL(byId("shown").src);
    Object.assign(byId("shown"), { src: URL.createObjectURL(file), hidden: false });
    submit(file);
  };
  byId("file").addEventListener("change", (event) => show(event.target.files[0]));
  addEventListener("paste", (event) => show(event.clipboardData.files[0]));
  addEventListener("dragover", (event) => event.preventDefault());
  addEventListener("drop", (event) => {
    event.preventDefault();
    show(event.dataTransfer.files[0]);
  });
  byId("take").addEventListener("click", async () => {
    const canvas = new OffscreenCanvas(byId("video").videoWidth, byId("video").videoHeight);
    canvas.getContext("2d").drawImage(byId("video"), 0, 0);
    show(await canvas.convertToBlob()); // a PNG: no further loss
  });
  byId("camera").addEventListener("click", async () => {
    try {
      byId("video").srcObject = await navigator.mediaDevices.getUserMedia({ video: { facingMode: "environment" } });
      byId("video").hidden = byId("take").hidden = false;
    } catch (error) {
      byId("status").textContent = `The camera cannot be used: ${error.message}`;
    }
  });
}

// The network must give the logits of the export on this device, too.
async function openChecked(provider) {
  const opened = await openSite(provider);
  const { found, bound } = await checkNetwork(opened);
  if (!(found <= bound)) throw new Error(`a logit deviates by ${found}, the bound is ${bound}`);
  return { ...opened, provider };
}

async function openFastest() {
  try {
    if (await hasWebGpu()) return await openChecked("webgpu");
  } catch (error) {
    console.info(`WebGPU is not used: ${error.message}`);
  }
  return openChecked("wasm");
}

try {
  if ("serviceWorker" in navigator) navigator.serviceWorker.register("worker.js");
  const opened = await openFastest();
  byId("name").textContent = document.title = opened.site.project;
  byId("status").textContent = opened.provider === "webgpu" ? "Ready, on the GPU" : "Ready";
  connect(startQueue(opened));
} catch (error) {
  byId("status").textContent = `This browser cannot run the network: ${error.message}`;
}
