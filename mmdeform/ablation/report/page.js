"use strict";

// The table: sorted by a click on a title, or by #sort=TITLE, #sort=-TITLE in the address.
const heads = [...document.querySelectorAll("#rows thead th")];
const body = document.querySelector("#rows tbody");
const original = [...body.rows];

function sortBy(head, descending) {
  const index = heads.indexOf(head);
  const numeric = head.classList.contains("number");
  const value = (row) => row.cells[index].dataset.value;
  const compare = (a, b) =>
    numeric ? Number(a) - Number(b) : a.localeCompare(b, "en", { numeric: true });
  const known = original.filter((row) => value(row) !== "");
  known.sort((a, b) => (descending ? -1 : 1) * compare(value(a), value(b)));
  body.append(...known, ...original.filter((row) => value(row) === ""));
  for (const other of heads) other.removeAttribute("aria-sort");
  head.setAttribute("aria-sort", descending ? "descending" : "ascending");
}

function sortByAddress() {
  if (!location.hash.startsWith("#sort=")) return;
  const key = decodeURIComponent(location.hash.slice("#sort=".length));
  const named = (title) => heads.find((head) => head.dataset.key === title);
  const head = named(key) ?? (key.startsWith("-") ? named(key.slice(1)) : undefined);
  if (head) sortBy(head, head.dataset.key !== key);
}

for (const head of heads) {
  head.querySelector("button").addEventListener("click", () => {
    // Of numbers the largest is wanted first, of names the first.
    const before = head.getAttribute("aria-sort");
    const descending = before ? before === "ascending" : head.classList.contains("number");
    sortBy(head, descending);
    const key = encodeURIComponent((descending ? "-" : "") + head.dataset.key);
    history.replaceState(null, "", `#sort=${key}`);
  });
}
window.addEventListener("hashchange", sortByAddress);
sortByAddress();

// The curves. A row keeps its colour and dash in all of them.
const COLORS = ["#1f77b4", "#ff7f0e", "#2ca02c", "#d62728", "#9467bd", "#8c564b", "#e377c2",
  "#17becf", "#bcbd22", "#7f7f7f"];
const DASHES = ["solid", "dash", "dot", "dashdot"];
const curves = JSON.parse(document.getElementById("curve-data").textContent);
const order = original.map((row) => row.dataset.row);
// plotly reads some HTML in names.
const escaped = (text) =>
  text.replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");

function traces({ row, epoch, mean, std, n }) {
  const place = order.indexOf(row);
  const color = COLORS[place % COLORS.length];
  const dash = DASHES[Math.floor(place / COLORS.length) % DASHES.length];
  const common = { x: epoch, legendgroup: row, type: "scatter", name: escaped(row) };
  const edge = { ...common, mode: "lines", line: { width: 0 }, hoverinfo: "skip", showlegend: false };
  const shift = (sign) => mean.map((m, i) => (m === null ? null : m + sign * (std[i] ?? 0)));
  const spread = std.map((s) => (s === null ? "" : ` ± ${s.toPrecision(3)}`));
  return [
    { ...edge, y: shift(-1) },
    { ...edge, y: shift(1), fill: "tonexty", fillcolor: `${color}2e` },
    { ...common, y: mean, mode: epoch.length > 1 ? "lines" : "markers", line: { color, dash },
      marker: { color }, customdata: n.map((count, i) => [count, spread[i]]),
      hovertemplate: "%{y:.4g}%{customdata[1]} (n = %{customdata[0]})" },
  ];
}

function draw({ name, rows }) {
  const layout = {
    xaxis: { title: { text: "epoch" }, rangemode: "tozero" },
    yaxis: { title: { text: escaped(name) } },
    margin: { l: 70, r: 20, t: 20, b: 50 },
    hovermode: "x unified",
    showlegend: true,
  };
  // The button that is removed uploads the plot.
  const config = { responsive: true, displaylogo: false, modeBarButtonsToRemove: ["sendChartToCloud"] };
  Plotly.react("plot", rows.flatMap(traces), layout, config);
}

if (curves.length) {
  const select = document.getElementById("curve");
  select.append(...curves.map(({ name }) => new Option(name)));
  select.addEventListener("change", () => draw(curves[select.selectedIndex]));
  draw(curves[0]);
} else {
  document.getElementById("curves").hidden = true;
}
