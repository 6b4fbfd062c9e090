// The preprocessing, the network and the decision of a bundle, for browsers and Node; reproduces `sopdeploy.images` and
// `sopdeploy.decision`. `site` has the fields of manifest.json that are named here, and `labels`.

// Pillow's filters, with the support on each side (libImaging/Resample.c).
const FILTERS = {
  bilinear: [(x) => (x < 1 ? 1 - x : 0), 1],
  bicubic: [(x) => (x < 1 ? (1.5 * x - 2.5) * x * x + 1 : x < 2 ? (((x - 5) * x + 8) * x - 4) * -0.5 : 0), 2],
};
const BITS = 22; // of the fraction of a weight, as in Pillow
const MAX_ASPECT_RATIO = 16; // of a longer strip, only the visible part is resized

// The source positions and the fixed-point weights of `target` positions, from `low` to `high` of `size` positions.
function taps(size, low, high, target, interpolation) {
  const [filter, support] = FILTERS[interpolation];
  const scale = Math.fround(high - low) / target;
  const stretch = Math.max(1, scale);
  const reach = support * stretch;
  return Array.from({ length: target }, (_, position) => {
    const center = low + (position + 0.5) * scale;
    const first = Math.max(0, Math.trunc(center - reach + 0.5));
    const end = Math.min(size, Math.trunc(center + reach + 0.5));
    const raw = Array.from({ length: end - first }, (_, i) => filter(Math.abs((i + first - center + 0.5) * (1 / stretch))));
    const sum = raw.reduce((a, b) => a + b, 0);
    return { first, weights: raw.map((weight) => Math.sign(weight) * Math.floor(Math.abs(weight / sum) * 2 ** BITS + 0.5)) };
  });
}

// An image {width, height, data} of RGB or RGBA pixels, resampled to RGB along its rows (`down` false) or its columns.
function resample({ width, height, data }, positions, down) {
  const channels = data.length / (width * height);
  const [wide, tall] = down ? [width, positions.length] : [positions.length, height];
  const [along, across] = down ? [channels * width, channels] : [channels, channels * width];
  const found = new Uint8ClampedArray(3 * wide * tall);
  for (let y = 0, to = 0; y < tall; y++) {
    for (let x = 0; x < wide; x++) {
      const { first, weights } = positions[down ? y : x];
      const start = first * along + (down ? x : y) * across;
      for (let channel = 0; channel < 3; channel++, to++) {
        let sum = 1 << (BITS - 1);
        for (let i = 0, at = start + channel; i < weights.length; i++, at += along) sum += weights[i] * data[at];
        found[to] = sum >> BITS;
      }
    }
  }
  return { width: wide, height: tall, data: found };
}

// The box [left, top, right, bottom] of an image, resized; each pass rounds to 8 bits.
function resize(image, [left, top, right, bottom], width, height, interpolation) {
  const columns = taps(image.width, left, right, width, interpolation);
  const rows = taps(image.height, top, bottom, height, interpolation);
  // Pillow 13 starts with the pass that removes more, and earlier ones with the rows.
  const removed = image.height - height;
  if (removed > 0 && removed > 2 * (image.width - width)) return resample(resample(image, rows, true), columns, false);
  return resample(resample(image, columns, false), rows, true);
}

// Half to even, as in Python.
function nearest(value) {
  const low = Math.floor(value);
  return value - low === 0.5 ? low + (low & 1) : Math.round(value);
}

function resizedSize({ width, height }, { crop, resize, fit }) {
  if (fit === "squash") return [crop, crop];
  const [shorter, longer] = width <= height ? [width, height] : [height, width];
  const [short, long] = fit === "pad"
    ? [Math.max(1, nearest((crop * shorter) / longer)), crop]
    : [resize, Math.max(1, Math.trunc((resize * longer) / shorter))];
  return width <= height ? [short, long] : [long, short];
}

/** The input of the network (crop, crop, 3) uint8, of an upright RGBA image {width, height, data}. */
export function preprocess(image, rules) {
  const { crop, fit, interpolation } = rules;
  const size = resizedSize(image, rules);
  const [left, top] = size.map((side) => nearest((side - crop) / 2));
  if (fit === "crop" && Math.max(...size) > MAX_ASPECT_RATIO * rules.resize) {
    const [x, y] = [image.width / size[0], image.height / size[1]];
    const box = [left * x, top * y, Math.min(image.width, (left + crop) * x), Math.min(image.height, (top + crop) * y)];
    return resize(image, box.map(Math.fround), crop, crop, interpolation).data;
  }
  const resized = resize(image, [0, 0, image.width, image.height], ...size, interpolation);
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

/** Type, values and shape of the input tensor of one image; the network itself normalizes. */
export const tensorOf = (pixels, { crop }) => ["uint8", Uint8Array.from(pixels), [1, crop, crop, 3]];

/** A function from pixels to logits (C,) Float32Array; `ort` is onnxruntime-web, `model` the bytes of model.onnx. */
export async function openNetwork(ort, model, site, provider = "wasm") {
  ort.env.wasm.numThreads = 1;
  // With this option int8 is exact also on processors without VNNI.
  const session = await ort.InferenceSession.create(model, {
    executionProviders: [provider], extra: { session: { x64quantprecision: "1" } },
  });
  const [input, output] = [site.inputs[0].name, site.outputs[0].name];
  return async (pixels) => {
    const tensor = new ort.Tensor(...tensorOf(pixels, site.preprocess));
    return (await session.run({ [input]: tensor }, [output]))[output].data;
  };
}

/** The answer to one image as the server gives it: classes, best first, `known`, `score` and `stable`; null is "no rule". */
export function decide(logits, { labels, decision, stability }) {
  const order = Array.from(logits.keys()).sort((a, b) => logits[b] - logits[a]);
  const largest = logits[order[0]];
  const energy = largest + Math.log(logits.reduce((sum, value) => sum + Math.exp(value - largest), 0));
  const { thresholds, rejection } = decision ?? {};
  const classes = order
    .map((index) => ({ index, probability: thresholds ? 1 / (1 + Math.exp(-logits[index])) : Math.exp(logits[index] - energy) }))
    .filter(({ index, probability }) => !thresholds || probability >= thresholds[index])
    .map(({ index, probability }) => ({ label: labels[index], probability }));
  const { threshold = null } = stability ?? {}; // null also if no answer is stable
  const stable = stability ? threshold !== null && largest - logits[order[1]] > threshold : null;
  if (!rejection) return { classes, known: null, score: null, stable };
  const score = rejection.score === "energy" ? energy : Math.exp(largest - energy);
  return { classes, known: score >= rejection.threshold, score, stable };
}

/** The largest absolute difference of two arrays of numbers; Infinity if they have different lengths. */
export function distance(found, expected) {
  if (found.length !== expected.length) return Infinity;
  return found.reduce((most, value, i) => Math.max(most, Math.abs(value - expected[i])), 0);
}
