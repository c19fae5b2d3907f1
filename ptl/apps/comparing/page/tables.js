"use strict";
// The tables, what they sort by, which curves are drawn.

const data = JSON.parse(document.getElementById("data").textContent);
const ENDED = ["finished", "stopped"];
const MOST_TICKED = 8;
const state = {
  metric: data.shown[0] || data.drawn[0],
  log: false,
  ticked: new Set(data.groups.slice(0, MOST_TICKED).map((group) => group.tag)),
  sort: { groups: null, runs: null },
  filter: "",
};
const order = new Map(data.groups.map((group, i) => [group.tag, i]));

function look(tag) {
  const i = order.get(tag);
  return { tag, color: data.colors[i % data.colors.length], dashed: Math.floor(i / data.colors.length) % 2 === 1 };
}

// ---- columns: {title, help, word, value: row -> number | text | null, cell: (row, td) -> fills it} ----

function metricNames() {
  return data.shown.includes(state.metric) || !state.metric ? data.shown : [...data.shown, state.metric];
}

function plainColumn(title, value, more = {}) {
  return { title, value, cell: (row, td) => td.append(more.word ? (value(row) ?? DASH) : format(value(row))), ...more };
}

function spreadColumn(title, spread, more = {}) {
  return {
    title,
    value: (row) => spread(row)?.mean ?? null,
    cell: (row, td) => {
      const found = spread(row);
      const apart = found && found.deviation !== null;
      const [mean, deviation] = apart ? withDeviation(found.mean, found.deviation) : [format(found?.mean)];
      td.append(mean);
      if (apart) td.append(textOf("span", ` ± ${deviation}`, "deviation"));
      const n = row.complete || Object.values(row.status).reduce((a, b) => a + b, 0);
      if (found && found.n && found.n !== n) td.append(textOf("span", ` (n=${found.n})`, "count"));
    },
    ...more,
  };
}

function groupColumns() {
  const columns = [{ title: "group", word: true, value: (row) => order.get(row.tag), cell: tickCell }];
  for (const [short, key] of data.keys) {
    columns.push(plainColumn(short, (row) => row.config[key] ?? null, { word: true, help: key }));
  }
  columns.push({ title: "runs", word: true, value: (row) => statusText(row.status), cell: statusCell });
  for (const name of metricNames()) {
    const better = data.better[name];
    columns.push(spreadColumn(`${name} final`, (row) => row.metrics[name]?.final, { better }));
    if (better) columns.push(spreadColumn(`${name} best`, (row) => row.metrics[name]?.best, { better }));
  }
  for (const [fact, title] of data.facts) columns.push(spreadColumn(title, (row) => row.facts[fact]));
  columns.push(plainColumn("device-hours", (row) => row.device_hours));
  if (data.priced) columns.push(plainColumn("cost", (row) => row.cost));
  return columns.filter((column, i) => !i || data.groups.some((row) => column.value(row) !== null));
}

function runColumns() {
  const columns = [
    plainColumn("run", (row) => row.name, { word: true, long: true, help: (row) => row.where }),
    plainColumn("group", (row) => row.group, { word: true, value: (row) => order.get(row.group) }),
  ];
  for (const [short, key] of data.seeds) columns.push(plainColumn(short, (row) => row.seeds[key] ?? null, { word: true, help: key }));
  columns.push({ title: "status", word: true, value: (row) => row.status,
    cell: (row, td) => td.append(textOf("span", row.status, ENDED.includes(row.status) ? "" : "bad")) });
  columns.push(plainColumn("error", (row) => row.error, { word: true, long: true, help: (row) => row.error }));
  for (const key of ["attempts", "step"]) {
    columns.push({ title: key, value: (row) => row[key], cell: (row, td) => td.append(row[key] === null ? DASH : row[key].toLocaleString("en")) });
  }
  for (const name of metricNames()) {
    const better = data.better[name];
    columns.push(plainColumn(`${name} final`, (row) => row.metrics[name]?.[0] ?? null, { better }));
    if (better) columns.push(plainColumn(`${name} best`, (row) => row.metrics[name]?.[1] ?? null, { better }));
  }
  for (const [fact, title] of [...data.facts, ["device_hours", "device-hours"]]) {
    columns.push(plainColumn(title, (row) => row.facts[fact] ?? null));
  }
  if (data.priced) columns.push(plainColumn("cost", (row) => row.cost));
  return columns.filter((column, i) => !i || data.runs.some((row) => column.value(row) !== null));
}

function statusText(counts) {
  return Object.entries(counts).map(([status, count]) => `${count} ${status}`).join(", ");
}

function statusCell(row, td) {
  Object.entries(row.status).forEach(([status, count], i) => {
    if (i) td.append(", ");
    td.append(textOf("span", `${count} ${status}`, ENDED.includes(status) ? "" : "bad"));
  });
}

function tickCell(row, td) {
  const label = textOf("label", "", "tick");
  const box = document.createElement("input");
  box.type = "checkbox";
  box.checked = state.ticked.has(row.tag);
  box.addEventListener("change", () => {
    if (box.checked) state.ticked.add(row.tag); else state.ticked.delete(row.tag);
    chart();
  });
  label.append(box, swatch(look(row.tag)), textOf("span", row.tag, "lead"));
  td.append(label);
}

// ---- a table ----

function compare(a, b) {
  if (typeof a === "number" && typeof b === "number") return a - b;
  const x = Number(a), y = Number(b);
  if (a !== "" && b !== "" && !Number.isNaN(x) && !Number.isNaN(y)) return x - y;
  return String(a).localeCompare(String(b), "en", { numeric: true });
}

const missing = (value) => value === null || value === undefined || value === "nan";

function sorted(rows, columns, sort) {
  const column = sort && columns.find((found) => found.title === sort.title);
  if (!column) return rows;
  const sign = sort.descending ? -1 : 1;
  // What is not known comes last either way.
  return [...rows].sort((a, b) => {
    const x = column.value(a), y = column.value(b);
    if (missing(x) || missing(y)) return missing(x) - missing(y);
    return sign * compare(x, y);
  });
}

function bestOf(rows, column) {
  if (!column.better || rows.length < 2) return null;
  const values = rows.map(column.value).filter((value) => typeof value === "number");
  return values.length ? values.reduce((a, b) => (column.better === "min" ? Math.min(a, b) : Math.max(a, b))) : null;
}

function table(id, all, columns) {
  const words = state.filter.toLowerCase().split(/\s+/).filter(Boolean);
  const rows = all.filter((row) => words.every((word) => row.search.includes(word)));
  const sort = state.sort[id];
  const head = document.createElement("tr");
  for (const column of columns) {
    const th = textOf("th", "", column.word ? "word" : "");
    th.scope = "col";
    if (sort?.title === column.title) th.setAttribute("aria-sort", sort.descending ? "descending" : "ascending");
    const button = textOf("button", column.title);
    button.type = "button";
    if (typeof column.help === "string") button.title = column.help;
    button.addEventListener("click", () => {
      state.sort[id] = { title: column.title, descending: sort?.title === column.title ? !sort.descending : column.better === "max" };
      tables();
      document.querySelector(`#${id} th[aria-sort] button`).focus();
    });
    th.append(button);
    head.append(th);
  }
  const best = columns.map((column) => bestOf(rows, column));
  const body = document.createElement("tbody");
  for (const row of sorted(rows, columns, sort)) {
    const tr = document.createElement("tr");
    columns.forEach((column, i) => {
      const td = textOf("td", "", [column.word && "word", column.long && "long", best[i] !== null && column.value(row) === best[i] && "best"].filter(Boolean).join(" "));
      if (typeof column.help === "function") td.title = column.help(row) ?? "";
      column.cell(row, td);
      tr.append(td);
    });
    body.append(tr);
  }
  const thead = document.createElement("thead");
  thead.append(head);
  document.getElementById(id).replaceChildren(thead, body);
}

// ---- the page ----

function tables() {
  table("groups", data.groups, groupColumns());
  table("runs", data.runs, runColumns());
}

function chart() {
  const curves = data.curves[state.metric] || {};
  const ticked = data.groups.filter((group) => state.ticked.has(group.tag));
  const lines = ticked.filter((group) => curves[group.tag]).map((group) => ({ ...look(group.tag), curve: curves[group.tag] }));
  drawChart(document.getElementById("chart"), lines, state.log);
  document.getElementById("legend").replaceChildren(...ticked.map((group) => {
    const item = document.createElement("span");
    const none = curves[group.tag] ? "" : " (not logged)";
    item.append(swatch(look(group.tag)), `${group.tag}  ${group.label}${none}`);
    return item;
  }));
}

function start() {
  document.title = `Comparison of ${data.title}`;
  document.getElementById("title").textContent = `Comparison of ${data.title}`;
  const ended = data.runs.filter((run) => ENDED.includes(run.status)).length;
  const rest = data.runs.length - ended;
  document.getElementById("lead").textContent =
    rest ? `${rest} of the runs failed or ${rest === 1 ? "is not at its end" : "are not at their end"}.` : "Every run came to its end.";
  const found = new Map(data.groups.map((group) => [group.tag, group]));
  for (const group of data.groups) group.search = `${group.tag} ${group.label} ${statusText(group.status)}`.toLowerCase();
  for (const run of data.runs) run.search = `${run.name} ${run.where} ${found.get(run.group).search} ${run.status} ${run.error ?? ""}`.toLowerCase();
  const select = document.getElementById("metric");
  for (const name of data.drawn) select.append(new Option(name, name, false, name === state.metric));
  select.addEventListener("change", () => { state.metric = select.value; chart(); tables(); });
  document.getElementById("log").addEventListener("change", (event) => { state.log = event.target.checked; chart(); });
  document.getElementById("filter").addEventListener("input", (event) => { state.filter = event.target.value; tables(); });
  document.getElementById("notes").replaceChildren(...data.notes.map((note) => textOf("li", note)));
  tables();
  chart();
  let width = window.innerWidth;
  window.addEventListener("resize", () => { if (window.innerWidth !== width) { width = window.innerWidth; chart(); } });
}

start();
