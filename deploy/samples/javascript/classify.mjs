// Classifies JPEG files with a sopdeploy bundle in Node: onnxruntime-web and mozjpeg (WebAssembly).
//
//   node classify.mjs BUNDLE IMAGE...   prints the best class of each image
//   node classify.mjs BUNDLE --golden   reproduces the golden examples; exit code 1 if one differs
//
// EXIF rotation is not applied. All after decoding is the code of the pages that `sopdeploy web` writes.

import { readFile } from "node:fs/promises";
import { createRequire } from "node:module";
import decodeJpeg, { init } from "@jsquash/jpeg/decode.js";
import * as ort from "onnxruntime-web";
import { decide, distance, openNetwork, preprocess } from "../../../export/sopdeploy_export/web/page/classify.mjs";

const read = async (path) => new Uint8Array(await readFile(path));
const readJson = async (path) => JSON.parse(new TextDecoder().decode(await read(path)));

// Node has no ImageData, which the decoder returns.
globalThis.ImageData ??= class {
  constructor(data, width, height) {
    Object.assign(this, { data, width, height });
  }
};

async function startDecoder() {
  const path = createRequire(import.meta.url).resolve("@jsquash/jpeg/codec/dec/mozjpeg_dec.wasm");
  await init(await WebAssembly.compile(await read(path)));
}

const best = (logits, site) => decide(Float32Array.from(logits), site).classes[0]?.label ?? "none of the classes";

// Compare decoded pixels, logits of the stored pixels and the class of the decoded ones.
async function reproduces(bundle, site, example, tolerance, network) {
  const found = preprocess(await decodeJpeg((await read(`${bundle}/${example.jpeg}`)).buffer), site.preprocess);
  const stored = await read(`${bundle}/${example.pixels}`);
  const levels = distance(found, stored);
  const difference = distance(await network(stored), example.logits);
  const same = best(await network(found), site) === best(example.logits, site);
  const outcome = same ? "same class" : "another class";
  console.log(`${example.jpeg}: pixels within ${levels}, logits within ${difference} of ${tolerance}, ${outcome}`);
  return levels <= 1 && difference <= tolerance && same;
}

async function main([bundle, ...images]) {
  if (images.length === 0) {
    console.error("usage: classify.mjs BUNDLE IMAGE... or classify.mjs BUNDLE --golden");
    return 2;
  }
  await startDecoder();
  const site = { ...(await readJson(`${bundle}/manifest.json`)), labels: await readJson(`${bundle}/labels.json`) };
  const network = await openNetwork(ort, await read(`${bundle}/model.onnx`), site);
  if (images[0] === "--golden") {
    const golden = await readJson(`${bundle}/golden.json`);
    const done = [];
    for (const example of golden.examples) done.push(await reproduces(bundle, site, example, golden.tolerance, network));
    return done.every(Boolean) ? 0 : 1;
  }
  for (const image of images) {
    const pixels = preprocess(await decodeJpeg((await read(image)).buffer), site.preprocess);
    console.log(`${image}: ${best(await network(pixels), site)}`);
  }
  return 0;
}

process.exitCode = await main(process.argv.slice(2)).catch((error) => {
  console.error(`error: ${error.message}`);
  return 2;
});
