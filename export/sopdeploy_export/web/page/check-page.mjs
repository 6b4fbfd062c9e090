// Shows the report of check.mjs; at the address `#report`, sends it to `sopdeploy web`.

import { check, fails } from "./check.mjs";

const { rows, ms, failure } = await check();
document.getElementById("rows").append(...rows.map((result) => {
  const row = document.createElement("tr");
  const cells = [result.example, result.step, result.error || Number(result.found?.toPrecision(3)), result.bound, fails(result) ? "fails" : ""];
  row.append(...cells.map((text) => Object.assign(document.createElement("td"), { textContent: text })));
  return row;
}));
document.getElementById("status").textContent = failure || "This browser computes what the server computes.";
if (location.hash === "#report") {
  await fetch("report", { method: "POST", body: JSON.stringify({ failure, steps: rows.length, ms }) });
}
