// Charts of any page: lines with marks over two axes. The page defines `data.titles`, {method: title}, and `$`.

// --- svg: marks and colors as in `look` in pictures.py

function svg(tag, attributes, parent) {
  const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  if (parent) parent.append(node);
  return node;
}

const SHAPES = [ // radius about 5: circle, square, triangle, diamond, triangle down, plus, cross, star
  "M-4.6 0a4.6 4.6 0 1 0 9.2 0a4.6 4.6 0 1 0 -9.2 0Z",
  "M-4.1 -4.1H4.1V4.1H-4.1Z",
  "M0 -5.4L5.2 4H-5.2Z",
  "M0 -5.8L5.2 0L0 5.8L-5.2 0Z",
  "M0 5.4L5.2 -4H-5.2Z",
  "M-1.8 -5.2H1.8V-1.8H5.2V1.8H1.8V5.2H-1.8V1.8H-5.2V-1.8H-1.8Z",
  "M-5 -2.6L-2.6 -5L0 -2.4L2.6 -5L5 -2.6L2.4 0L5 2.6L2.6 5L0 2.4L-2.6 5L-5 2.6L-2.4 0Z",
  "M0 -6L1.6 -2.1L5.7 -1.9L2.5 .8L3.5 4.9L0 2.6L-3.5 4.9L-2.5 .8L-5.7 -1.9L-1.6 -2.1Z",
];

function look(method) {
  const i = Object.keys(data.titles).indexOf(method), hollow = i % 16 >= 8;
  return {
    color: `var(--c${i % 8})`, dash: hollow ? "5 4" : "none",
    shape: SHAPES[hollow ? (i + 4) % 8 : i % 8], fill: hollow ? "var(--card)" : `var(--c${i % 8})`,
  };
}

function mark(method, x, y, parent) {
  const { color, shape, fill } = look(method);
  const style = `fill:${fill};stroke:${color};stroke-width:1.4;stroke-linejoin:round`;
  return svg("path", { d: shape, transform: `translate(${x} ${y})`, style }, parent);
}

// --- axes

function linearTicks(low, high, count) {
  const rough = (high - low) / count, power = 10 ** Math.floor(Math.log10(rough));
  const step = power * [1, 2, 5, 10].find((m) => m * power >= rough);
  const ticks = [];
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high + 1e-9 * step; i++) ticks.push(+(i * step).toPrecision(12));
  return ticks;
}

function logTicks(low, high) {
  const ticks = [], decades = Math.log10(high / low), every = Math.ceil(decades / 9);
  const marks = decades > 5 ? [1] : decades > 2.6 ? [1, 3] : [1, 2, 5];
  for (let k = every * Math.floor(Math.log10(low) / every); k <= Math.log10(high); k += every)
    for (const m of marks) ticks.push(+`${m}e${k}`);
  const within = ticks.filter((t) => t >= low && t <= high);
  return within.length > 2 ? within : linearTicks(low, high, 5); // of a range too narrow for round numbers of a logarithm
}

function tickText(t) {
  return t && (Math.abs(t) < 1e-4 || Math.abs(t) >= 1e6) ? t.toExponential().replace("e+", "e") : t;
}

function extent(values, log) { // with some air, and room around a single value
  let low = Math.min(...values), high = Math.max(...values);
  if (log) return low === high ? [low / 2, high * 2] : [low / (high / low) ** 0.06, high * (high / low) ** 0.06];
  const air = (high - low) * 0.05 || Math.abs(high) * 0.05 || 1;
  return [low - air, high + air];
}

// --- one chart: series {method, line: [[x, y]], points: [{x, y, bar: [x0, x1, y0, y1], tip}], band: [[x, low, high]]}

// points beyond xEdge or yEdge are left out, and said so

function chart(host, { series, logY, xTitle, yTitle, corner, fromZero, xEdge = Infinity, yEdge = Infinity }) {
  const width = Math.max(host.clientWidth, 260), narrow = width < 560, height = narrow ? 400 : 500;
  const box = { left: 52, right: width - (narrow ? 10 : 16), top: 26, bottom: height - 46 };
  host.replaceChildren();
  const root = svg("svg", { viewBox: `0 0 ${width} ${height}`, height, role: "img", "aria-label": `${yTitle} against ${xTitle}` }, host);
  const inside = (p) => p.x <= xEdge && p.y <= yEdge;
  let all = series.flatMap((s) => s.points), outside = [];
  if (all.some(inside)) { // else one far away is shown alone
    outside = series.filter((s) => !s.points.every(inside)).map((s) => data.titles[s.method]);
    all = all.filter(inside);
  }
  if (!all.length) {
    svg("text", { x: width / 2, y: height / 2, "text-anchor": "middle" }, root).textContent = "no method is shown";
    return;
  }
  const [x0, x1] = extent(all.flatMap((p) => p.bar.slice(0, 2)).concat(fromZero ? [0] : []), false);
  let [y0, y1] = extent(all.flatMap((p) => p.bar.slice(2)), logY);
  if (corner) y0 /= (y1 / y0) ** 0.07; // room for it below all points
  const xLow = fromZero ? 0 : x0;
  const X = (x) => box.left + ((x - xLow) / (x1 - xLow)) * (box.right - box.left);
  const scaled = logY ? Math.log : (y) => y;
  const Y = (y) => box.bottom - ((scaled(y) - scaled(y0)) / (scaled(y1) - scaled(y0))) * (box.bottom - box.top);

  for (const t of linearTicks(xLow, x1, narrow ? 5 : 9)) {
    svg("line", { x1: X(t), x2: X(t), y1: box.top, y2: box.bottom, stroke: "var(--grid)" }, root);
    svg("text", { x: X(t), y: box.bottom + 17, "text-anchor": "middle" }, root).textContent = t;
  }
  for (const t of logY ? logTicks(y0, y1) : linearTicks(y0, y1, 7)) {
    svg("line", { x1: box.left, x2: box.right, y1: Y(t), y2: Y(t), stroke: "var(--grid)" }, root);
    svg("text", { x: box.left - 7, y: Y(t) + 4, "text-anchor": "end" }, root).textContent = tickText(t);
  }
  svg("text", { x: box.right, y: height - 9, "text-anchor": "end", class: "title" }, root).textContent = xTitle;
  svg("text", { x: 2, y: 14, class: "title" }, root).textContent = yTitle;

  const spots = [], taken = [], groups = {}, clip = `${host.id}-box`;
  svg("rect", { x: box.left, y: box.top - 7, width: box.right - box.left + 8, height: box.bottom - box.top + 14 }, svg("clipPath", { id: clip }, root));
  if (outside.length) {
    const text = svg("text", { x: box.right - 4, y: box.top + 12, "text-anchor": "end" }, root);
    text.textContent = `some points lie outside: ${outside.length > 1 ? `of ${outside.length} methods` : outside[0]}`;
    taken.push([box.right - text.getComputedTextLength() - 8, box.top, box.right, box.top + 16]);
  }
  for (const s of series) {
    const { color, dash } = look(s.method), group = (groups[s.method] = svg("g", { "data-method": s.method, "clip-path": `url(#${clip})` }, root));
    const path = (points) => points.map(([x, y]) => `${X(x)},${Y(y)}`).join(" ");
    if (s.band) {
      const edge = [...s.band.map((b) => [b[0], b[2]]), ...s.band.map((b) => [b[0], b[1]]).reverse()];
      svg("polygon", { points: path(edge), style: `fill:${color};opacity:.16` }, group);
    }
    svg("polyline", { points: path(s.line), style: `fill:none;stroke:${color};stroke-width:1.8;stroke-dasharray:${dash}` }, group);
    s.line.slice(1).forEach(([x, y], i) => { // labels keep off the lines
      const [u, v] = s.line[i], n = Math.ceil(Math.hypot(X(x) - X(u), Y(y) - Y(v)) / 7);
      for (let k = 0; k <= n; k++) {
        const px = X(u) + (k / n) * (X(x) - X(u)), py = Y(v) + (k / n) * (Y(y) - Y(v));
        taken.push([px - 1, py - 1, px + 1, py + 1]);
      }
    });
    for (const p of s.points.filter((p) => all.includes(p))) {
      const px = X(p.x), py = Y(p.y), [left, right, low, high] = p.bar, style = `stroke:${color};stroke-width:1.2`;
      if (left < right) svg("line", { x1: X(left), x2: X(right), y1: py, y2: py, style }, group);
      if (low < high && !s.band) svg("line", { x1: px, x2: px, y1: Y(low), y2: Y(high), style }, group);
      mark(s.method, px, py, group);
      spots.push({ px, py, tip: p.tip, method: s.method, onLine: s.line.some(([x, y]) => x === p.x && y === p.y) });
      taken.push([px - 6, py - 6, px + 6, py + 6]);
    }
  }
  if (corner) {
    const text = svg("text", { x: box.right - 4, y: box.bottom - 8, "text-anchor": "end" }, root);
    text.textContent = corner;
    taken.push([box.right - text.getComputedTextLength() - 8, box.bottom - 24, box.right, box.bottom]);
  }
  for (const s of series) label(s, spots.filter((p) => p.method === s.method), box, taken, groups[s.method]);
  hover(host, root, spots, groups);
}

function label(s, spots, box, taken, group) { // beside the first of its points where there is room; else the legend serves
  if (!spots.length) return;
  const drawn = spots.filter((p) => p.onLine);
  const text = svg("text", { class: "direct", style: `fill:${look(s.method).color}` }, group);
  text.textContent = data.titles[s.method];
  const w = text.getComputedTextLength(), ends = [...drawn.slice(-1), ...drawn.slice(0, -1), ...spots.filter((p) => !p.onLine)];
  for (const { px, py } of ends)
    for (const [x, y] of [[px + 10, py + 4], [px - 10 - w, py + 4], [px + 6, py - 9], [px + 6, py + 17], [px - 6 - w, py - 9],
                          [px - 6 - w, py + 17], [px - w / 2, py - 11], [px - w / 2, py + 19]]) {
      const mine = [x - 2, y - 11, x + w + 2, y + 4];
      const clear = mine[0] >= box.left && mine[2] <= box.right && mine[1] >= box.top && mine[3] <= box.bottom &&
        !taken.some((b) => mine[0] < b[2] && b[0] < mine[2] && mine[1] < b[3] && b[1] < mine[3]);
      if (!clear) continue;
      text.setAttribute("x", x);
      text.setAttribute("y", y);
      taken.push(mine);
      return;
    }
  text.remove();
}

function hover(host, root, spots, groups) {
  const tip = document.createElement("div");
  tip.className = "tip";
  tip.hidden = true;
  host.append(tip);
  const leave = () => { tip.hidden = true; focus(null); };
  const focus = (method) => Object.entries(groups).forEach(([m, g]) => g.classList.toggle("dim", method !== null && m !== method));
  const move = (event) => {
    const at = root.getBoundingClientRect(), x = event.clientX - at.left, y = event.clientY - at.top;
    const far = (p) => Math.hypot(p.px - x, p.py - y);
    const near = spots.reduce((a, b) => (far(b) < far(a) ? b : a));
    if (far(near) > 26) return leave();
    const [title, ...lines] = near.tip, bold = document.createElement("b");
    bold.textContent = title;
    tip.replaceChildren(bold, ...lines.flatMap((line) => [line, document.createElement("br")]));
    tip.hidden = false;
    tip.style.left = `${Math.max(0, Math.min(near.px + 14, host.clientWidth - tip.offsetWidth))}px`;
    tip.style.top = `${near.py + 14 + tip.offsetHeight > root.clientHeight ? near.py - 14 - tip.offsetHeight : near.py + 14}px`;
    focus(near.method);
  };
  root.onpointermove = root.onpointerdown = move;
  root.onpointerleave = leave;
  host.focusOn = focus;
}

// --- controls

function choice(group, chosen) { // buttons of which one is pressed
  group.onclick = (event) => {
    const button = event.target.closest("button");
    if (!button) return;
    for (const b of group.children) b.setAttribute("aria-pressed", b === button);
    chosen(button.dataset.value);
  };
}

function fillLegend(legend, methods, hidden, draw) { // buttons that hide and show the methods of the chart before it
  const host = legend.previousElementSibling;
  for (const method of methods) {
    const button = document.createElement("button");
    button.dataset.method = method;
    const icon = svg("svg", { width: 26, height: 14, "aria-hidden": "true" }, button);
    svg("line", { x1: 0, x2: 26, y1: 7, y2: 7, style: `stroke:${look(method).color};stroke-width:1.8;stroke-dasharray:${look(method).dash}` }, icon);
    mark(method, 13, 7, icon);
    button.append(data.titles[method]);
    button.onclick = () => { hidden.delete(method) || hidden.add(method); draw(); };
    button.onpointerenter = () => host.focusOn && !hidden.has(method) && host.focusOn(method);
    button.onpointerleave = () => host.focusOn && host.focusOn(null);
    legend.append(button);
  }
  const all = document.createElement("button");
  all.className = "all";
  all.textContent = "all / none";
  all.onclick = () => { hidden.size ? hidden.clear() : methods.forEach((method) => hidden.add(method)); draw(); };
  legend.append(all);
}

function pressLegends(hidden) {
  document.querySelectorAll(".legend button[data-method]").forEach((b) => b.setAttribute("aria-pressed", !hidden.has(b.dataset.method)));
}
