"""Style and script of the page of :mod:`trix.superposition.viz.dashboard`. The script searches and sorts, and shows nothing."""

from trix.superposition.viz.passages import DARK_PASSAGE_STYLE

STYLE = f"""
:root {{ color-scheme: light dark; --text: #1a202c; --back: #ffffff; --line: #cbd5e0; --soft: #5f6b7a; --bar: #4a5568;
  --link: #2b6cb0 }}
@media (prefers-color-scheme: dark) {{
  :root {{ --text: #e2e8f0; --back: #171b23; --line: #3b4556; --soft: #a0aec0; --bar: #90a4c0; --link: #7db4f0 }}
  {DARK_PASSAGE_STYLE}
}}
body {{ color: var(--text); background: var(--back) }} a {{ color: var(--link) }} .muted {{ color: var(--soft) }}
h2 {{ border-color: var(--line) }} dd {{ overflow-wrap: anywhere }}
section {{ border: 1px solid var(--line); border-radius: 6px; padding: .7rem .9rem; margin: 1rem 0;
  content-visibility: auto; contain-intrinsic-size: auto 900px }}
section:target {{ outline: 2px solid var(--link) }} h3 {{ margin-top: 0 }} h4 {{ margin: .8rem 0 .2rem }}
.facts {{ display: grid; grid-template-columns: repeat(auto-fill, minmax(min(190px, 100%), 1fr)); gap: 0 1.2rem }}
.facts ol {{ list-style: none; padding: 0; margin: 0; font-size: 14px }}
.bars {{ display: block; width: 100%; max-width: 480px; height: 70px; fill: var(--bar); border-bottom: 1px solid var(--bar) }}
.passage {{ margin: .15rem 0; padding: .15rem 0 .15rem .6rem; border-left: 2px solid var(--line) }}
.list {{ max-height: 26rem; overflow: auto; border: 1px solid var(--line); padding: 0 .6rem }}
thead th {{ position: sticky; top: 0; background: var(--back) }}
th button {{ font: inherit; color: inherit; background: none; border: 0; padding: 0; cursor: pointer }}
th[aria-sort=ascending] button::after {{ content: " ▲" }} th[aria-sort=descending] button::after {{ content: " ▼" }}
input {{ font: inherit }} :focus-visible {{ outline: 2px solid var(--link); outline-offset: 2px }}
@media (max-width: 600px) {{
  body {{ margin: 1rem auto; padding: 0 .7rem }} dl {{ grid-template-columns: 1fr }} dd {{ margin: 0 0 .4rem }}
}}
"""

SCRIPT = """
"use strict";
const body = document.querySelector("#list tbody");
const entries = [...body.rows].map(row => {
  const link = row.querySelector("a");
  return {row, number: link.textContent, card: document.getElementById("l" + link.textContent)};
});
const search = document.getElementById("search"), found = document.getElementById("found");
function filter() {
  const wanted = search.value.trim().toLowerCase();
  let count = 0;
  for (const {row, number, card} of entries) {
    const isNumber = /^[0-9]+$/.test(wanted);
    const isShown = isNumber ? number === wanted : (row.textContent + card.textContent).toLowerCase().includes(wanted);
    row.hidden = card.hidden = !isShown;
    count += isShown;
  }
  found.textContent = count + " of " + entries.length;
}
let waiting;
search.addEventListener("input", () => { clearTimeout(waiting); waiting = setTimeout(filter, 200); });
document.getElementById("tools").hidden = false;
const heads = [...document.querySelectorAll("#list th")];
function sort(column) {
  const isNumeric = column < 4;
  const head = heads[column];
  const before = head.getAttribute("aria-sort");
  const isDown = before ? before === "ascending" : isNumeric && column > 0;
  for (const other of heads) other.removeAttribute("aria-sort");
  head.setAttribute("aria-sort", isDown ? "descending" : "ascending");
  const key = entry => entry.row.cells[column].textContent;
  const compare = isNumeric ? (a, b) => parseFloat(key(a)) - parseFloat(key(b)) : (a, b) => key(a).localeCompare(key(b));
  entries.sort((a, b) => (isDown ? -1 : 1) * compare(a, b));
  body.append(...entries.map(entry => entry.row));
}
heads.forEach((head, column) => {
  const button = document.createElement("button");
  button.type = "button";
  button.append(...head.childNodes);
  button.addEventListener("click", () => sort(column));
  head.append(button);
});
"""
