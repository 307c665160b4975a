// A table of class "sortable" is sorted by a click on a column's name, and filtered by the words typed above it.
"use strict";
for (const table of document.querySelectorAll("table.sortable")) {
  const body = table.tBodies[0], heads = [...table.tHead.rows[0].cells], rows = [...body.rows];
  const said = rows.map(row => row.textContent.toLowerCase());

  const number = text => Number(text.replaceAll(",", "").replace(/%$/, ""));
  // Numbers come before words, and what is empty last, whichever way the rest is turned.
  const rank = text => text === "" ? 2 : Number.isNaN(number(text)) ? 1 : 0;
  const compare = (a, b) => rank(a) === 0 ? number(a) - number(b) : a < b ? -1 : a > b ? 1 : 0;
  heads.forEach((head, column) => {
    const button = document.createElement("button");
    button.append(...head.childNodes);
    head.append(button);
    button.addEventListener("click", () => {
      const way = head.ariaSort === "ascending" ? -1 : 1;
      for (const other of heads) other.ariaSort = null;
      head.ariaSort = way === 1 ? "ascending" : "descending";
      const keyed = rows.map(row => [row.cells[column].textContent.trim(), row]);
      keyed.sort(([a], [b]) => rank(a) - rank(b) || way * compare(a, b));
      body.append(...keyed.map(([, row]) => row));
    });
  });

  const filter = document.createElement("input"), shown = document.createElement("output");
  filter.type = "search";
  filter.placeholder = filter.ariaLabel = "Words that a row must have";
  filter.addEventListener("input", () => {
    const words = filter.value.toLowerCase().split(/\s+/);
    rows.forEach((row, index) => row.hidden = !words.every(word => said[index].includes(word)));
    const left = rows.filter(row => !row.hidden).length;
    shown.textContent = left === rows.length ? "" : ` ${left.toLocaleString("en")} of ${rows.length.toLocaleString("en")}`;
  });
  table.closest(".scroll").before(filter, shown);
}
