"""The look of a report's page, beside that of all pages, and the script that sorts its tables."""

from __future__ import annotations

STYLE = """
body { max-width: 80rem; }
section { padding-top: 2.25rem; }
section:first-child { padding-top: .5rem; }
section:first-child > p:not([class]) { font: 500 clamp(1.1rem, 2.4vw, 1.3rem)/1.45 ui-serif, Georgia, Cambria, serif;
  max-width: 58rem; }
nav { margin-top: 2.25rem; padding-top: 1rem; border-top: 1px solid var(--line); }
nav ol { columns: 16rem; max-width: none; }
.pair { display: flex; flex-wrap: wrap; gap: .5rem 2.5rem; align-items: flex-start; margin: 1.25rem 0 .25rem; }
.pair figure { flex: 1 1 30rem; max-width: 52rem; margin: 0; min-width: min(100%, 18rem); }
.pair .box { flex: 1 1 min-content; margin: 0; padding: 0; }
figure img { display: block; width: 100%; height: auto; background: #fff; border-radius: 4px; }
figcaption { margin-top: .35rem; }
.plot { overflow-x: auto; }
.box { display: inline-block; max-width: 100%; margin: 1.5rem 0 .25rem; padding-right: 2.5rem; vertical-align: top; }
td:not(.words) { white-space: nowrap; }
td.words { max-width: 36rem; }
.box:focus-visible { outline-offset: 4px; }
caption { font-weight: 600; color: var(--ink); }
th, td { padding: .3rem 0 .3rem 1.1rem; text-align: right; }
th:first-child, td:first-child { padding-left: 0; }
th.words, td.words { text-align: left; }
tbody th { font-weight: 500; min-width: 8rem; max-width: 18rem; }
tbody tr:hover > * { background: var(--raised); }
thead th { vertical-align: bottom; }
thead button { position: relative; padding: 0 1em 0 0; border: 0; color: inherit; background: none; font: inherit;
  text-align: inherit; cursor: pointer; }
thead button::after { content: "\\2195"; position: absolute; right: 0; bottom: 0; width: 1em; color: var(--other);
  text-align: center; }
th[aria-sort=ascending] button::after { content: "\\2191"; color: var(--answer); }
th[aria-sort=descending] button::after { content: "\\2193"; color: var(--answer); }
pre { max-width: 52rem; }
ul { max-width: 52rem; }
@media (prefers-color-scheme: dark) { figure img { filter: invert(.9) hue-rotate(180deg); } }
@media (max-width: 40rem) {
  figure img { width: 30rem; }
  .box { padding: 0; }
  tbody th { position: sticky; left: 0; min-width: 6rem; max-width: 9rem; background: var(--paper); }
}
@media print {
  body { max-width: none; padding: 0; font-size: 10pt; }
  nav, thead button::after { display: none; }
  table { font-size: 7.5pt; }
  h2, caption { break-after: avoid; }
  figure { break-inside: avoid; }
  figure img { filter: none; }
}
"""

SCRIPT = """
"use strict";
// A heading sorts its column, numbers from the largest and words from A; the third time the rows are as they were.
const number = /^[<+]?\\s*(-?\\d[\\d,]*(?:\\.\\d+)?)/;
for (const table of document.querySelectorAll("table.sorts")) {
  const body = table.tBodies[0], heads = [...table.tHead.rows[0].cells], rows = [...body.rows];
  const text = (row, place) => row.cells[place].textContent.trim();
  heads.forEach((head, place) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...head.childNodes);
    head.append(button);
    const filled = rows.filter(row => !["", "\\u2013"].includes(text(row, place)));
    const isNumbers = filled.every(row => number.test(text(row, place)));
    const value = row => Number(number.exec(text(row, place))[1].replaceAll(",", ""));
    const rising = isNumbers ? (a, b) => value(a) - value(b) : (a, b) => text(a, place).localeCompare(text(b, place));
    const orders = isNumbers ? ["descending", "ascending"] : ["ascending", "descending"];
    button.addEventListener("click", () => {
      const order = orders[orders.indexOf(head.getAttribute("aria-sort")) + 1];
      heads.forEach(other => other.removeAttribute("aria-sort"));
      const sorted = [...filled].sort((a, b) => order === "ascending" ? rising(a, b) : rising(b, a));
      if (order) head.setAttribute("aria-sort", order);
      body.append(...(order ? [...sorted, ...rows.filter(row => !filled.includes(row))] : rows));
    });
  });
}
"""
