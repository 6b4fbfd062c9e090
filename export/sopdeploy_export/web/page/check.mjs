// Replays the examples in `check/` in this browser, step by step; `sopdeploy web` reads the report.

import { checkNetwork, classify, decode, hasWebGpu, openSite, readBlob, readBytes, readJson } from "./browser.mjs";
import { decide, distance, preprocess, tensorOf } from "./classify.mjs";

const UNITS = {
  decode: "gray levels", resize: "gray levels", normalization: "gray levels", network: "in a logit",
  classes: "in a probability or the score", all: "of the spread of the logits",
  webgpu: "in a logit",
};

const rms = (values) => Math.sqrt(values.reduce((sum, value) => sum + value ** 2, 0) / values.length);

// Root mean square difference of logits, relative to their spread, as in `sopdeploy.bundle.golden`.
function drift(found, expected, tolerance) {
  const mean = expected.reduce((a, b) => a + b, 0) / expected.length;
  return rms(expected.map((value, i) => value - found[i])) / Math.max(tolerance, rms(expected.map((value) => value - mean)));
}

function compareTensors([type, data, shape], pixels, { crop }) {
  return type === "uint8" && String(shape) === String([1, crop, crop, 3]) ? distance(data, pixels) : Infinity;
}

// The largest difference of a probability or the score; Infinity if the classes, `known` or `stable` differ.
function compareAnswers(found, expected) {
  const facts = ({ classes, known, stable }) => JSON.stringify([classes.map(({ label }) => label), known, stable]);
  const numbers = ({ classes, score }) => [score ?? 0, ...classes.map(({ probability }) => probability)];
  return facts(found) === facts(expected) ? distance(numbers(found), numbers(expected)) : Infinity;
}

async function replay(opened, { file, size: [width, height], logits, answer }, bounds) {
  const { site, network } = opened;
  const rules = site.preprocess;
  const path = `check/${file}`;
  const [image, data, pixels] = [await readBlob(path), await readBytes(`${path}.rgba`), await readBytes(`${path}.rgb`)];
  const steps = {
    decode: async () => distance((await decode(image, rules)).data, data),
    resize: () => distance(preprocess({ width, height, data }, rules), pixels),
  };
  let ms = [];
  if (logits) {
    const input = await readBytes(`${path}.input`);
    steps.normalization = () => compareTensors(tensorOf(input, rules), input, rules);
    steps.network = async () => distance(await network(input), logits);
    steps.classes = () => compareAnswers(decide(Float32Array.from(logits), site), answer);
    steps.all = async () => {
      const result = await classify(image, opened);
      ms = [result.ms];
      return drift(result.logits, logits, bounds.network);
    };
  }
  const rows = [];
  for (const [step, run] of Object.entries(steps)) {
    const row = { example: file, step, found: null, bound: bounds[step], error: "" };
    rows.push(row);
    await Promise.resolve().then(run).then((found) => (row.found = found), (error) => (row.error = String(error)));
  }
  return { rows, ms };
}

export const fails = ({ found, bound }) => !(found !== null && found <= bound);

function describe({ example, step, found, bound, error }) {
  const difference = error || (Number.isFinite(found) ? `it differs by ${found} ${UNITS[step]}` : "another result");
  return `${example}: the step \`${step}\` fails in this browser: ${difference} (bound ${bound})`;
}

/** Every step of every example with the difference found, milliseconds of whole images, and the first failure or "". */
export async function check() {
  const report = { rows: [], ms: [], failure: "" };
  addEventListener("securitypolicyviolation", ({ violatedDirective, blockedURI }) => {
    report.failure = `the page fails in this browser: its policy forbids ${violatedDirective} ${blockedURI}`;
  });
  try {
    const [opened, { bounds, examples }] = [await openSite(), await readJson("check/check.json")];
    for (const example of examples) {
      const { rows, ms } = await replay(opened, example, bounds);
      report.rows.push(...rows);
      report.ms.push(...ms);
    }
    if (await hasWebGpu()) report.rows.push({ ...(await checkNetwork(await openSite("webgpu"))), step: "webgpu", error: "" });
    const steps = Object.keys(bounds); // a wrong step also changes those after it
    const [first] = report.rows.filter(fails).sort((a, b) => steps.indexOf(a.step) - steps.indexOf(b.step));
    report.failure ||= first ? describe(first) : "";
  } catch (error) {
    report.failure ||= `the page fails in this browser: ${error}`;
  }
  return report;
}
