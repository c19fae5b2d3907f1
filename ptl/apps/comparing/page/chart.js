"use strict";
// Learning curves in SVG: a line a group, a band for the deviation over its runs, and the values under the pointer.

const SVG = "http://www.w3.org/2000/svg";
const DASH = "–";

function format(value) {
  if (value === null || value === undefined) return DASH;
  if (typeof value !== "number") return String(value);
  const size = Math.abs(value);
  if (size !== 0 && (size < 1e-3 || size >= 1e7)) return value.toExponential(3);
  const digits = size === 0 ? 3 : Math.max(0, 3 - Math.floor(Math.log10(size)));
  return value.toLocaleString("en", { minimumFractionDigits: Math.min(digits, 6), maximumFractionDigits: Math.min(digits, 6) });
}

// Both with as many decimals as two digits of the deviation have.
function withDeviation(mean, deviation) {
  if (typeof mean !== "number" || !(deviation >= 1e-6 && deviation < 1e7) || Math.abs(mean) >= 1e7) {
    return [format(mean), format(deviation)];
  }
  const digits = Math.max(0, 1 - Math.floor(Math.log10(deviation)));
  const fixed = { minimumFractionDigits: digits, maximumFractionDigits: digits };
  return [mean.toLocaleString("en", fixed), deviation.toLocaleString("en", fixed)];
}

// Round values that part a range into about `count`.
function ticks(low, high, count) {
  const raw = (high - low) / count || 1;
  const power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 5, 10].map((n) => n * power).find((n) => n >= raw);
  const out = [];
  for (let i = Math.ceil(low / step); i * step <= high + step * 1e-9; i++) out.push(i * step);
  return out;
}

function logTicks(low, high) {
  const out = [];
  for (let power = Math.floor(Math.log10(low)); power <= Math.ceil(Math.log10(high)); power++) {
    for (const n of [1, 2, 5]) {
      const value = n * 10 ** power;
      if (value >= low && value <= high) out.push(value);
    }
  }
  return out.length > 1 ? out : [low, high];
}

function tickText(value) {
  const size = Math.abs(value);
  if (size >= 1e6 || (size > 0 && size < 1e-3)) return value.toExponential(0);
  return String(Number(value.toPrecision(6)));
}

function svg(parent, name, attributes, text) {
  const element = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  if (text !== undefined) element.textContent = text;
  parent.append(element);
  return element;
}

// `lines`: [{tag, color, dashed, curve: [steps, means, deviations or nothing]}]
function drawChart(box, lines, log) {
  box.replaceChildren();
  const width = box.clientWidth, height = box.clientHeight;
  const root = svg(box, "svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": "learning curves" });
  const usable = lines
    .map((line) => ({ ...line, points: pointsOf(line.curve, log) }))
    .filter((line) => line.points.length);
  if (!usable.length) {
    svg(root, "text", { x: width / 2, y: height / 2, "text-anchor": "middle", class: "empty" },
      lines.length ? "no values that this scale can show" : "tick a group that has this metric");
    return;
  }
  const scale = scales(usable, width, height, log);
  axes(root, scale);
  for (const line of usable) if (line.curve[2]) svg(root, "path", { class: "band", fill: line.color, d: bandPath(line.points, scale) });
  for (const line of [...usable].reverse()) {
    const d = line.points.map((p, i) => `${i ? "L" : "M"}${scale.x(p.step).toFixed(1)} ${scale.y(p.mean).toFixed(1)}`);
    svg(root, "path", { class: "line", stroke: line.color, d: d.join(""), "data-tag": line.tag,
      ...(line.dashed ? { "stroke-dasharray": "7 4" } : {}) });
    if (line.points.length < 30) {
      for (const p of line.points) svg(root, "circle", { cx: scale.x(p.step), cy: scale.y(p.mean), r: 2.5, fill: line.color });
    }
  }
  follow(box, root, usable, scale);
}

function pointsOf(curve, log) {
  const out = [];
  for (let i = 0; i < curve[0].length; i++) {
    const mean = curve[1][i], deviation = curve[2] ? curve[2][i] : 0;
    if (log && mean <= 0) continue;
    const low = mean - deviation;
    out.push({ step: curve[0][i], mean, deviation, low: log && low <= 0 ? mean : low, high: mean + deviation });
  }
  return out;
}

function scales(lines, width, height, log) {
  let first = Infinity, last = -Infinity, low = Infinity, high = -Infinity;
  for (const line of lines) {
    for (const p of line.points) {
      first = Math.min(first, p.step); last = Math.max(last, p.step);
      low = Math.min(low, p.low); high = Math.max(high, p.high);
    }
  }
  if (last === first) { first -= 1; last += 1; }
  if (high === low) { const by = Math.abs(high) * 0.05 || 1; low -= log ? 0 : by; high += by; }
  const of = log ? Math.log : (value) => value;
  const values = log ? logTicks(low, high) : ticks(low, high, 6);
  const margin = { left: 12 + 7 * Math.max(...values.map((v) => tickText(v).length)), right: 14, top: 10, bottom: 40 };
  const across = width - margin.left - margin.right, down = height - margin.top - margin.bottom;
  return {
    margin, width, height, values, first, last,
    steps: ticks(first, last, Math.max(2, Math.floor(across / 90))),
    x: (step) => margin.left + (across * (step - first)) / (last - first),
    y: (value) => margin.top + down * (1 - (of(value) - of(low)) / (of(high) - of(low) || 1)),
    step: (x) => first + ((x - margin.left) / across) * (last - first),
  };
}

function axes(root, scale) {
  const { margin, width, height } = scale;
  for (const value of scale.values) {
    const y = scale.y(value);
    svg(root, "line", { class: "grid", x1: margin.left, x2: width - margin.right, y1: y, y2: y });
    svg(root, "text", { x: margin.left - 6, y: y + 4, "text-anchor": "end" }, tickText(value));
  }
  for (const step of scale.steps) {
    svg(root, "text", { x: scale.x(step), y: height - margin.bottom + 18, "text-anchor": "middle" }, step.toLocaleString("en"));
  }
  svg(root, "text", { x: width - margin.right, y: height - 4, "text-anchor": "end" }, "optimizer step");
}

function bandPath(points, scale) {
  const at = (p, value) => `${scale.x(p.step).toFixed(1)} ${scale.y(value).toFixed(1)}`;
  return `M${points.map((p) => at(p, p.high)).join("L")}L${[...points].reverse().map((p) => at(p, p.low)).join("L")}Z`;
}

// The nearest point of each line beside a cursor that follows the pointer.
function follow(box, root, lines, scale) {
  const cursor = svg(root, "line", { class: "cursor", y1: scale.margin.top, y2: scale.height - scale.margin.bottom, visibility: "hidden" });
  const tip = document.createElement("div");
  tip.className = "tip";
  tip.hidden = true;
  box.append(tip);
  root.addEventListener("pointerleave", () => { tip.hidden = true; cursor.setAttribute("visibility", "hidden"); });
  root.addEventListener("pointermove", (event) => {
    const x = event.clientX - root.getBoundingClientRect().left;
    if (x < scale.margin.left - 4 || x > scale.width - scale.margin.right + 4) return;
    const step = scale.step(x);
    cursor.setAttribute("x1", x); cursor.setAttribute("x2", x); cursor.setAttribute("visibility", "visible");
    tip.replaceChildren(textOf("div", `step ${Math.round(step).toLocaleString("en")}`));
    for (const line of lines) {
      const p = nearest(line.points, step);
      const row = document.createElement("div");
      const value = p.deviation ? withDeviation(p.mean, p.deviation).join(" ± ") : format(p.mean);
      row.append(swatch(line), `${line.tag}  ${value}`);
      tip.append(row);
    }
    tip.hidden = false;
    const right = x > scale.width / 2;
    tip.style.left = right ? "auto" : `${x + 14}px`;
    tip.style.right = right ? `${scale.width - x + 14}px` : "auto";
  });
}

function nearest(points, step) {
  let low = 0, high = points.length - 1;
  while (high - low > 1) {
    const middle = (low + high) >> 1;
    if (points[middle].step < step) low = middle; else high = middle;
  }
  return step - points[low].step <= points[high].step - step ? points[low] : points[high];
}

function textOf(name, text, kind) {
  const element = document.createElement(name);
  element.textContent = text;
  if (kind) element.className = kind;
  return element;
}

function swatch(line) {
  const mark = document.createElement("span");
  mark.className = line.dashed ? "swatch dashed" : "swatch";
  mark.style.borderColor = line.color;
  return mark;
}
