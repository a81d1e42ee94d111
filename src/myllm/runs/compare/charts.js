// Draws the curves of a comparison, and sorts its tables. Everything is drawn at the size it is shown in, with the
// page's own colors, so that it is legible on a phone and follows dark mode.
"use strict";

const AXES = {step: "Step", tokens: "Tokens", hours: "Time", flops: "FLOPs"};
const LABELS = {step: "step", tokens: "tokens", hours: "hours of training", flops: "FLOPs of training"};
const RANGES = {all: "All", half: "Last half", tenth: "Last tenth"};
const FROM = {all: 0, half: 0.5, tenth: 0.9};
const LEFT = 60, RIGHT = 14, TOP = 10, BOTTOM = 40;
const view = {axis: "step", range: "all", hidden: new Set(), sorted: new Map()};
let data;

// ---- Numbers as text

function short(value) {
  const size = Math.abs(value);
  if (size >= 1e15) return value.toExponential(1).replace("e+", "e");
  for (const [unit, one] of [["T", 1e12], ["B", 1e9], ["M", 1e6], ["k", 1e3]])
    if (size >= one) return `${+(value / one).toPrecision(3)}${unit}`;
  return size && size < 1e-3 ? value.toExponential(1) : `${+value.toPrecision(3)}`;
}

function text(value, unit) {
  if (unit === "percent") return `${(100 * value).toFixed(1)} %`;
  return unit === "loss" ? value.toFixed(4) : short(value);
}

function ticks(low, high, count) {
  const rough = (high - low) / count || 1;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map(factor => factor * power).find(size => size >= rough);
  const found = [];
  for (let index = Math.ceil(low / step); index * step <= high + 1e-9 * step; index++) found.push(index * step);
  return found;
}

// ---- Elements

function element(name, attributes = {}, content = "") {
  const node = ["svg", "g", "path", "line", "text", "circle", "title"].includes(name)
    ? document.createElementNS("http://www.w3.org/2000/svg", name) : document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  if (content) node.textContent = content;
  return node;
}

const color = index => `var(--c${index % 8})`;
const dashes = index => index < 8 ? "none" : "6 4";

// ---- One chart

function visible(chart) {
  const last = Math.max(0, ...data.charts.flatMap(({curves}) => curves.map(curve => curve?.[view.axis]?.at(-1) ?? 0)));
  const from = last * FROM[view.range];
  return {from, last, curves: chart.curves.map((curve, index) => {
    if (!curve || !curve[view.axis] || view.hidden.has(index)) return null;
    const points = curve[view.axis].map((x, at) => [x, curve.value[at]]).filter(([, y]) => !chart.log || y > 0);
    const first = points.findIndex(([x]) => x >= from);
    return first < 0 ? [] : [...between(points[first - 1], points[first], from), ...points.slice(first)];
  })};
}

// The point at x on the line from one point to the next.
function between(one, next, x) {
  if (!one || next[0] === x) return [];
  const share = (x - one[0]) / (next[0] - one[0]);
  return [[x, one[1] + share * (next[1] - one[1])]];
}

function limits(curves, log) {
  const values = curves.flatMap(points => (points ?? []).map(point => point[1]));
  if (!values.length) return null;
  const scale = log ? Math.log : value => value;
  let [low, high] = [scale(Math.min(...values)), scale(Math.max(...values))];
  const margin = 0.04 * (high - low) || 0.02 * Math.abs(high) || 1;
  return [low - margin, high + margin];
}

function draw(card, chart) {
  card.querySelector("svg")?.remove();
  const width = card.clientWidth - 24, height = Math.max(220, Math.min(360, Math.round(width * 0.5)));
  const {from, last, curves} = visible(chart);
  const found = limits(curves, chart.log);
  const svg = element("svg", {height, viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": chart.title});
  card.append(svg);
  if (!found) {
    svg.append(element("text", {x: width / 2, y: height / 2, "text-anchor": "middle"}, "no curve on this axis"));
    card.plot = null;
    return;
  }
  const [low, high] = found, scale = chart.log ? Math.log : value => value, back = chart.log ? Math.exp : value => value;
  const toX = x => LEFT + (width - LEFT - RIGHT) * (x - from) / (last - from || 1);
  const toY = y => TOP + (height - TOP - BOTTOM) * (high - scale(y)) / (high - low);
  for (const y of ticks(back(low), back(high), 6)) {
    if (chart.log && y <= 0) continue;
    svg.append(element("line", {class: "gridline", x1: LEFT, x2: width - RIGHT, y1: toY(y), y2: toY(y)}));
    const label = chart.unit === "percent" ? `${+(100 * y).toPrecision(3)} %` : short(y);
    svg.append(element("text", {x: LEFT - 8, y: toY(y) + 4, "text-anchor": "end"}, label));
  }
  for (const x of ticks(from, last, Math.max(3, Math.floor(width / 110))))
    svg.append(element("text", {x: toX(x), y: height - 22, "text-anchor": "middle"}, short(x)));
  svg.append(element("text", {x: (LEFT + width - RIGHT) / 2, y: height - 5, "text-anchor": "middle"}, LABELS[view.axis]));
  curves.forEach((points, index) => {
    if (!points?.length) return;
    const path = points.map(([x, y], at) => `${at ? "L" : "M"}${toX(x).toFixed(1)} ${toY(y).toFixed(1)}`).join("");
    svg.append(element("path", {
      d: path, fill: "none", stroke: color(index), "stroke-width": 2, "stroke-linejoin": "round", "stroke-dasharray": dashes(index),
    }));
    if (points.length === 1 || (chart.dots && points.length <= 40))
      for (const [x, y] of points) if (x > from || !from) svg.append(element("circle", {cx: toX(x), cy: toY(y), r: 3, fill: color(index)}));
    markRestarts(svg, index, from, toX, height);
  });
  card.plot = {svg, curves, toX, width, from, last, height, unit: chart.unit};
}

function markRestarts(svg, index, from, toX, height) {
  const restarts = data.runs[index].restarts;
  (restarts[view.axis] ?? []).forEach((x, at) => {
    if (x < from) return;
    const mark = element("path", {class: "restart", d: `M${toX(x)} ${height - BOTTOM - 8}l5 8h-10z`, fill: color(index)});
    mark.append(element("title", {}, `${data.runs[index].name}: restart before step ${restarts.step[at]}`));
    svg.append(mark);
  });
}

function point(card, event) {
  card.querySelector(".tip")?.remove();
  card.querySelector(".cursor")?.remove();
  if (!card.plot || !event) return;
  const {svg, curves, toX, width, from, last, height, unit} = card.plot;
  const at = (event.clientX - svg.getBoundingClientRect().left - LEFT) / (width - LEFT - RIGHT);
  if (at < 0 || at > 1) return;
  const x = from + at * (last - from);
  svg.append(element("line", {class: "cursor", x1: toX(x), x2: toX(x), y1: TOP, y2: height - BOTTOM}));
  const tip = element("div", {class: "tip", style: at < 0.5 ? "right: 14px" : `left: ${LEFT}px`});
  tip.append(element("div", {}, `${short(x)} ${LABELS[view.axis]}`));
  curves.forEach((points, index) => {
    if (!points?.length || x > points.at(-1)[0] * 1.02 + 1e-9) return;
    const nearest = points.reduce((best, next) => Math.abs(next[0] - x) < Math.abs(best[0] - x) ? next : best);
    const line = element("div");
    line.append(element("span", {style: `color: ${color(index)}`}, data.runs[index].name), element("b", {}, text(nearest[1], unit)));
    tip.append(line);
  });
  card.append(tip);
}

// ---- The page

function choices(id, options, chosen, choose) {
  const group = document.getElementById(id);
  group.replaceChildren(...Object.entries(options).map(([key, label]) => {
    const button = element("button", {type: "button", "aria-pressed": key === chosen}, label);
    button.onclick = () => { choose(key); show(); };
    return button;
  }));
}

function legend() {
  document.getElementById("legend").replaceChildren(...data.runs.map((run, index) => {
    const button = element("button", {type: "button", "aria-pressed": !view.hidden.has(index)});
    const swatch = element("svg", {width: 26, height: 8, "aria-hidden": true});
    swatch.append(element("line", {
      x1: 0, x2: 26, y1: 4, y2: 4, stroke: color(index), "stroke-width": 3, "stroke-dasharray": dashes(index),
    }));
    button.append(swatch, element("span", {}, run.name));
    button.onclick = () => {
      view.hidden.has(index) ? view.hidden.delete(index) : view.hidden.add(index);
      show();
    };
    return button;
  }));
}

function show() {
  choices("axis", AXES, view.axis, key => view.axis = key);
  choices("range", RANGES, view.range, key => view.range = key);
  legend();
  for (const card of document.querySelectorAll(".chart")) draw(card, card.chart);
}

function sort(table, column, descending) {
  const rows = [...table.tBodies[0].rows];
  const key = row => {
    const cell = row.cells[column];
    return cell.dataset.number === undefined ? cell.textContent : Number(cell.dataset.number);
  };
  const compare = (one, other) => {
    const [a, b] = [key(one), key(other)];
    if (a === "" || b === "") return (a === "") - (b === "") || 0; // what is not known comes last
    const order = typeof a === "number" && typeof b === "number" ? a - b : String(a).localeCompare(String(b));
    return descending ? -order : order;
  };
  table.tBodies[0].append(...rows.sort(compare));
  [...table.tHead.rows[0].cells].forEach((cell, index) => {
    if (index === column) cell.setAttribute("aria-sort", descending ? "descending" : "ascending");
    else cell.removeAttribute("aria-sort");
  });
}

function start() {
  data = JSON.parse(document.getElementById("data").textContent);
  const room = document.getElementById("charts");
  const resized = new ResizeObserver(() => document.querySelectorAll(".chart").forEach(card => draw(card, card.chart)));
  room.replaceChildren(...data.charts.map(chart => {
    const card = element("div", {class: "card chart"});
    card.chart = chart;
    card.append(element("h3", {}, chart.title));
    card.onpointermove = card.onpointerdown = event => point(card, event);
    card.onpointerleave = () => point(card, null);
    return card;
  }));
  resized.observe(room);
  document.querySelectorAll(".sortable").forEach((table, index) => {
    [...table.tHead.rows[0].cells].forEach((cell, column) => {
      cell.firstChild.onclick = () => {
        const descending = cell.getAttribute("aria-sort") === "ascending";
        view.sorted.set(index, [column, descending]);
        sort(table, column, descending);
      };
    });
    if (view.sorted.has(index)) sort(table, ...view.sorted.get(index));
  });
  show();
}

document.addEventListener("swapped", start); // `myllm report --watch` has replaced the page's content
start();
