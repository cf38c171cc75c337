// Theme, sorting, filtering, printing, and the plots. Without this script the page is a plain document with everything in it.
"use strict";

const root = document.documentElement;
const systemDark = matchMedia("(prefers-color-scheme: dark)");

// A page opened from disk may not have a store.
const store = {
  get() { try { return localStorage.getItem("optiscope-theme"); } catch { return null; } },
  set(value) { try { localStorage.setItem("optiscope-theme", value); } catch { /* remembered until the page closes */ } },
};
let theme = ["light", "dark"].includes(store.get()) ? store.get() : null;
if (theme) root.style.colorScheme = theme;

addEventListener("DOMContentLoaded", () => {
  for (const control of document.querySelectorAll(".control[hidden]")) control.hidden = false;
  themeButton(document.getElementById("theme"));
  const table = document.getElementById("matrix-table");
  if (table) { sortable(table); filterable(table); }
  for (const data of document.querySelectorAll("script.plot-data")) {
    const item = JSON.parse(data.textContent);
    // Where fingers scroll, a plot that takes every drag would hold the page.
    if (matchMedia("(pointer: coarse)").matches) withoutDrag(item);
    Bokeh.embed.embed_item(item);
  }
  if (matchMedia("(max-width: 60rem)").matches) document.querySelector("nav details").open = false;
});

function themeButton(button) {
  const dark = () => (theme ?? (systemDark.matches ? "dark" : "light")) === "dark";
  const show = () => {
    button.textContent = dark() ? "Light" : "Dark";
    button.setAttribute("aria-label", `Show the page in ${dark() ? "light" : "dark"} colours`);
  };
  button.addEventListener("click", () => {
    theme = dark() ? "light" : "dark";
    root.style.colorScheme = theme;
    store.set(theme);
    show();
  });
  systemDark.addEventListener("change", show);
  show();
}

function sortable(table) {
  const headers = [...table.tHead.rows[0].cells];
  headers.forEach((header, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...header.childNodes);
    header.append(button);
    header.setAttribute("aria-sort", "none");
    button.addEventListener("click", () => {
      const down = header.getAttribute("aria-sort") === "ascending";
      for (const other of headers) other.setAttribute("aria-sort", "none");
      header.setAttribute("aria-sort", down ? "descending" : "ascending");
      sort(table.tBodies[0], column, down ? -1 : 1);
    });
  });
}

function sort(body, column, direction) {
  const key = (row) => row.cells[column].dataset.v === undefined ? row.cells[column].textContent : parseFloat(row.cells[column].dataset.v);
  const compare = (a, b) => {
    if (typeof a === "string") return direction * a.localeCompare(b, "en", { numeric: true });
    if (Number.isNaN(a) || Number.isNaN(b)) return Number.isNaN(a) - Number.isNaN(b); // what was not recorded stays at the end
    return direction * (a > b) - direction * (a < b);
  };
  body.append(...[...body.rows].map((row) => [key(row), row]).sort(([a], [b]) => compare(a, b)).map(([, row]) => row));
}

function filterable(table) {
  const name = document.getElementById("filter-name");
  const operator = document.getElementById("filter-operator");
  const count = document.getElementById("filter-count");
  const rows = [...table.tBodies[0].rows];
  const filter = () => {
    const text = name.value.trim().toLowerCase();
    let shown = 0;
    for (const row of rows) {
      row.hidden = !row.cells[0].textContent.toLowerCase().includes(text) || (operator.value !== "" && row.cells[1].textContent !== operator.value);
      shown += !row.hidden;
    }
    count.textContent = `${shown} of ${rows.length}`;
  };
  name.addEventListener("input", filter);
  operator.addEventListener("change", filter);
  filter();
}

function withoutDrag(value) {
  if (value === null || typeof value !== "object") return;
  if (value.attributes && "active_drag" in value.attributes) value.attributes.active_drag = null;
  Object.values(value).forEach(withoutDrag);
}

let closed = [];
addEventListener("beforeprint", () => {
  closed = [...document.querySelectorAll("main details:not([open])")];
  for (const details of closed) details.open = true;
});
addEventListener("afterprint", () => { for (const details of closed) details.open = false; });
