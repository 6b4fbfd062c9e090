// The files of this folder in a browser: opens the network, decodes and classifies images.

import { decide, distance, openNetwork, preprocess } from "./classify.mjs";

async function get(name) {
  const response = await fetch(name);
  if (!response.ok) throw new Error(`${name}: ${response.status} ${response.statusText}`);
  return response;
}

export const readJson = async (name) => (await get(name)).json();
export const readBytes = async (name) => new Uint8Array(await (await get(name)).arrayBuffer());
export const readBlob = async (name) => (await get(name)).blob();

/** The site with its network on the processor (`wasm`) or on a GPU (`webgpu`). */
export async function openSite(provider = "wasm") {
  const [site, ort] = [await readJson("site.json"), await import(`./ort.${provider}.min.mjs`)];
  return { site, network: await openNetwork(ort, await readBytes("model.onnx"), site, provider) };
}

/** Whether the folder has the files for WebGPU, and this browser a GPU for them. */
export async function hasWebGpu() {
  return (await readJson("site.json")).webgpu && Boolean(await navigator.gpu?.requestAdapter());
}

/** The largest difference of a logit from those of the export for the first golden example, and its bound. */
export async function checkNetwork({ network }) {
  const { bounds, examples: [{ file, logits }] } = await readJson("check/check.json");
  return { example: file, found: distance(await network(await readBytes(`check/${file}.input`)), logits), bound: bounds.network };
}

/** The upright RGBA pixels of an image file, on the background; color profiles are ignored, as in training. */
export async function decode(source, { background }) {
  const bitmap = await createImageBitmap(source, { colorSpaceConversion: "none" });
  const { width, height } = bitmap;
  const context = new OffscreenCanvas(width, height).getContext("2d", { willReadFrequently: true });
  context.fillStyle = `rgb(${background.join(" ")})`;
  context.fillRect(0, 0, width, height);
  context.drawImage(bitmap, 0, 0);
  bitmap.close();
  return context.getImageData(0, 0, width, height);
}

/** Logits and answer of one image, with the milliseconds that decoding and resizing, and the network take. */
export async function classify(source, { site, network }) {
  const start = performance.now();
  const pixels = preprocess(await decode(source, site.preprocess), site.preprocess);
  const ready = performance.now();
  const logits = await network(pixels);
  return { logits, answer: decide(logits, site), ms: [ready - start, performance.now() - ready] };
}
