// Classifies JPEG files with a sopdeploy bundle in Node: onnxruntime-web and mozjpeg (WebAssembly).
//
//   node classify.mjs BUNDLE IMAGE...   prints the best class of each image
//   node classify.mjs BUNDLE --golden   reproduces the golden examples; exit code 1 if one differs
//
// EXIF rotation is not applied.

import { readFile } from "node:fs/promises";
import { createRequire } from "node:module";
import decodeJpeg, { init } from "@jsquash/jpeg/decode.js";
import * as ort from "onnxruntime-web";

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

const triangle = (x) => Math.max(0, 1 - Math.abs(x));

function cubic(x) {
  x = Math.abs(x);
  if (x < 1) return (1.5 * x - 2.5) * x * x + 1;
  return x < 2 ? ((-0.5 * x + 2.5) * x - 4) * x + 2 : 0;
}

// Pillow's resampling: the source positions and weights of each target position.
function taps(from, to, interpolation) {
  const [filter, support] = interpolation === "bicubic" ? [cubic, 2] : [triangle, 1];
  const scale = from / to;
  const stretch = Math.max(1, scale);
  const reach = support * stretch;
  return Array.from({ length: to }, (_, target) => {
    const center = (target + 0.5) * scale;
    const first = Math.max(0, Math.trunc(center - reach + 0.5));
    const end = Math.min(from, Math.trunc(center + reach + 0.5));
    const raw = Array.from({ length: end - first }, (_, i) => filter((first + i - center + 0.5) / stretch));
    const sum = raw.reduce((a, b) => a + b, 0);
    return { first, weights: raw.map((weight) => weight / sum) };
  });
}

const rounded = (value) => Math.min(255, Math.max(0, Math.floor(value + 0.5)));

// RGBA or RGB pixels in, RGB pixels out: the columns or, with `down`, the rows resampled at `positions`, rounded to 8 bits.
function resample({ width, height, data }, positions, down) {
  const channels = data.length / (width * height);
  const [wide, tall] = down ? [width, positions.length] : [positions.length, height];
  const [along, across] = down ? [channels * width, channels] : [channels, channels * width];
  const found = new Uint8Array(3 * wide * tall);
  for (let y = 0, to = 0; y < tall; y++) {
    for (let x = 0; x < wide; x++) {
      const { first, weights } = positions[down ? y : x];
      const start = first * along + (down ? x : y) * across;
      for (let channel = 0; channel < 3; channel++, to++) {
        let sum = 0;
        for (let i = 0; i < weights.length; i++) sum += weights[i] * data[start + i * along + channel];
        found[to] = rounded(sum);
      }
    }
  }
  return { width: wide, height: tall, data: found };
}

function resize(image, width, height, interpolation) {
  const columns = taps(image.width, width, interpolation);
  const rows = taps(image.height, height, interpolation);
  // Pillow 13 starts with the rows if that removes more; earlier versions start with the columns.
  const removed = image.height - height;
  if (removed > 0 && removed > 2 * (image.width - width)) return resample(resample(image, rows, true), columns, false);
  return resample(resample(image, columns, false), rows, true);
}

// Half to even, as in Python.
function nearest(value) {
  const low = Math.floor(value);
  return value - low === 0.5 ? low + (low & 1) : Math.round(value);
}

// The network's input (crop, crop, 3) by the rules `preprocess` of the manifest.
function preprocess(image, rules) {
  const { crop, fit = "crop", decoding = "full", antialias = true } = rules;
  if (decoding !== "full") {
    throw new Error("this program decodes all pixels of a JPEG; train with preprocess.decoding=full");
  }
  if (!antialias) throw new Error("this program resizes with antialiasing, as Pillow does");
  const [shorter, longer] = [image.width, image.height].sort((a, b) => a - b);
  let [small, large] = [crop, crop];
  if (fit === "crop") [small, large] = [rules.resize, Math.max(1, Math.trunc((rules.resize * longer) / shorter))];
  if (fit === "squash-crop") small = large = rules.resize;
  if (fit === "pad") small = Math.max(1, nearest((crop * shorter) / longer));
  const size = image.width <= image.height ? [small, large] : [large, small];
  const resized = resize(image, ...size, rules.interpolation);
  const left = nearest((resized.width - crop) / 2);
  const top = nearest((resized.height - crop) / 2);
  const input = new Uint8Array(3 * crop * crop);
  for (let y = 0; y < crop; y++) {
    for (let x = 0; x < crop; x++) {
      const [column, row] = [x + left, y + top];
      const inside = column >= 0 && column < resized.width && row >= 0 && row < resized.height;
      const start = 3 * (row * resized.width + column);
      input.set(inside ? resized.data.subarray(start, start + 3) : rules.background, 3 * (y * crop + x));
    }
  }
  return input;
}

async function openNetwork(bundle, manifest) {
  ort.env.wasm.numThreads = 1;
  const options = { extra: { session: { x64quantprecision: "1" } } }; // int8 is exact also without VNNI
  const session = await ort.InferenceSession.create(await read(`${bundle}/model.onnx`), options);
  const side = manifest.preprocess.crop;
  const [input, output] = [manifest.inputs[0].name, manifest.outputs[0].name];
  return async (pixels) => {
    const values = await session.run({ [input]: new ort.Tensor("uint8", pixels, [1, side, side, 3]) });
    return values[output].data;
  };
}

const best = (logits) => logits.indexOf(logits.reduce((a, b) => Math.max(a, b)));
const smallest = -3.4028234663852886e38; // in golden.json, for the logit -Infinity of a masked class
const distance = (a, b) => a.reduce((most, value, i) => Math.max(most, Math.abs(value - b[i])), 0);

// Compare decoded pixels, logits of the stored pixels and the class of the decoded ones.
async function reproduces(bundle, rules, example, tolerance, network) {
  const found = preprocess(await decodeJpeg((await read(`${bundle}/${example.jpeg}`)).buffer), rules);
  const stored = await read(`${bundle}/${example.pixels}`);
  const levels = distance(found, stored);
  const difference = distance((await network(stored)).map((logit) => Math.max(logit, smallest)), example.logits);
  const same = best(await network(found)) === best(Float32Array.from(example.logits));
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
  const manifest = await readJson(`${bundle}/manifest.json`);
  const network = await openNetwork(bundle, manifest);
  if (images[0] === "--golden") {
    const golden = await readJson(`${bundle}/golden.json`);
    const done = [];
    for (const example of golden.examples) {
      done.push(await reproduces(bundle, manifest.preprocess, example, golden.tolerance, network));
    }
    return done.every(Boolean) ? 0 : 1;
  }
  const labels = await readJson(`${bundle}/labels.json`);
  for (const image of images) {
    const pixels = preprocess(await decodeJpeg((await read(image)).buffer), manifest.preprocess);
    console.log(`${image}: ${labels[best(await network(pixels))]}`);
  }
  return 0;
}

process.exitCode = await main(process.argv.slice(2)).catch((error) => {
  console.error(`error: ${error.message}`);
  return 2;
});
