// Shows the report of check.mjs; at the address `#report`, sends it to `sopdeploy web`.

import { readJson } from "./browser.mjs";
import { check } from "./check.mjs";

const report = await check();
if (location.hash === "#report") await fetch("report", { method: "POST", body: JSON.stringify(report) });
const { bounds } = await readJson("check/check.json");
const fails = ({ step, found }) => found === null || !(found <= bounds[step]);
document.getElementById("rows").append(...report.rows.map((result) => {
  const row = document.createElement("tr");
  const cells = [result.example, result.step, result.error || String(result.found), bounds[result.step], fails(result) ? "differs" : ""];
  row.append(...cells.map((text) => Object.assign(document.createElement("td"), { textContent: text })));
  return row;
}));
document.getElementById("status").textContent = report.error || report.rows.some(fails)
  ? `This browser does not compute what the server computes. ${report.error}`
  : "This browser computes what the server computes.";
