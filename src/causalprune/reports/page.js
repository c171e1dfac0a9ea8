"use strict";
// Draws the figures of a report from the JSON in the page. Text that came from a run never becomes markup: what
// goes into Plotly, which reads tags, has its brackets escaped, and everything else is set as text.
const told = JSON.parse(document.getElementById("data").textContent);
const MARKS = ["circle", "square", "diamond", "triangle-up", "x", "star", "cross", "triangle-down"];
const DASHES = ["solid", "dash", "dot", "dashdot"];
const ROLES = ["q_a", "q_b", "kv_a", "kv_b", "q", "k", "v", "g", "o", "gate", "up", "down"];
const config = { displayModeBar: false, responsive: true };

const plain = (text) => String(text).replaceAll("&", "&amp;").replaceAll("<", "&lt;").replaceAll(">", "&gt;");
const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();
const number = (value) => {
  if (value === null || value === undefined) return "not known";
  return Number(value.toPrecision(4)).toString().replace("-", "−");
};
const unique = (values) => [...new Set(values)];
const short = (text, room = 48) => (text.length > room ? `${text.slice(0, room - 1)}…` : text);
const chosen = (name, run) => document.querySelector(`select[data-choose="${name}"][data-run="${run}"]`)?.value;

function element(tag, text, attributes = {}) {
  const made = document.createElement(tag);
  if (text) made.textContent = text;
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  return made;
}

/** A figure with a caption, ready for Plotly; the label says what it shows to those who do not see it. */
function figure(place, title, detail, label) {
  const made = element("figure", "", { class: "plot" });
  const caption = element("figcaption", `${title} `);
  caption.append(element("small", detail));
  const canvas = element("div", "", { role: "img", "aria-label": label });
  made.append(caption, canvas);
  place.append(made);
  return canvas;
}

function layout(more = {}) {
  const axis = { gridcolor: colour("line"), zerolinecolor: colour("soft"), linecolor: colour("line"), automargin: true };
  const { xaxis, yaxis, ...rest } = more;
  return {
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", height: 300, showlegend: false, dragmode: false,
    font: { family: getComputedStyle(document.body).fontFamily, size: 12, color: colour("ink") },
    margin: { l: 8, r: 8, t: 8, b: 8 },
    hoverlabel: { bgcolor: colour("card"), bordercolor: colour("soft"), font: { color: colour("ink") }, align: "left" },
    xaxis: { ...axis, ...xaxis }, yaxis: { ...axis, ...yaxis }, ...rest,
  };
}

const KNOWN = ["wanda", "cap", "causal", "sparsegpt", "shrink", "random", "magnitude"];

/** The look of every method: known criteria have their own colours in every report, variants of one differ in the dash. */
function looks(names) {
  const taken = new Map();
  return new Map(names.map((name, i) => {
    const criterion = KNOWN.find((known) => name.split(": ").at(-1).startsWith(known));
    const hue = criterion ? KNOWN.indexOf(criterion) : 7;
    const nth = taken.get(hue) ?? 0;
    taken.set(hue, nth + 1);
    return [name, { colour: `c${hue}`, symbol: MARKS[i % 8], dash: DASHES[nth % 4] }];
  }));
}

function legend(place, styles) {
  const list = element("ul", "", { class: "legend", "aria-label": "Methods" });
  for (const [name, look] of styles) {
    const item = element("li");
    const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
    svg.setAttribute("width", "26"); svg.setAttribute("height", "10"); svg.setAttribute("aria-hidden", "true");
    const line = document.createElementNS("http://www.w3.org/2000/svg", "line");
    for (const [key, value] of Object.entries({ x1: 0, x2: 26, y1: 5, y2: 5, "stroke-width": 3, stroke: colour(look.colour) })) line.setAttribute(key, value);
    if (look.dash !== "solid") line.setAttribute("stroke-dasharray", look.dash === "dash" ? "6 3" : "2 3");
    svg.append(line);
    item.append(svg, short(name));
    list.append(item);
  }
  place.append(list);
}

/** What lies along the axis of shares. */
const taken = (models) => ({ title: { text: models.some((m) => m.removed) ? "zeros, or parameters removed, %" : "zeros, %" }, zeroline: false, rangemode: "tozero" });

/** Lines of one task: value or difference against the share that was taken, with intervals; a method's points are moved apart a little. */
function lines(models, task, which, styles, methodOf) {
  const step = Math.max(...models.map((m) => m.share), 0.1) * 0.012;
  return [...styles].map(([name, look], i) => {
    const own = models.filter((m) => methodOf(m) === name && m.cells[task.key]).sort((a, b) => a.share - b.share);
    const cells = own.map((m) => (which === "value" ? m.cells[task.key] : m.cells[task.key].dense));
    const at = cells.map((cell) => cell && (which === "value" ? cell.value : cell.difference));
    const reach = (from, to) => cells.map((_, j) => (from(j) === null || to(j) === null ? 0 : from(j) - to(j)));
    const value = (j) => at[j] ?? null, high = (j) => cells[j]?.high ?? null, low = (j) => cells[j]?.low ?? null;
    const text = own.map((m, j) => `${plain(short(m.label))}<br>${number(value(j))} [${number(low(j))}, ${number(high(j))}]`);
    return {
      type: "scatter", mode: "lines+markers", name: plain(name), text, hovertemplate: "%{text}<extra></extra>",
      x: own.map((m) => m.share * 100 + (i - (styles.size - 1) / 2) * step * 100), y: at,
      error_y: { type: "data", symmetric: false, array: reach(high, value), arrayminus: reach(value, low), thickness: 1.3, width: 3, color: colour(look.colour) },
      line: { color: colour(look.colour), width: 2, dash: look.dash }, marker: { color: colour(look.colour), size: 8, symbol: look.symbol },
    };
  });
}

function scores(place, run, r, tasks = run.tasks) {
  const which = tasks === run.tasks ? document.querySelector(`input[name="shown-${r}"]:checked`).value : "value";
  const pruned = run.models.filter((m) => m.criterion !== "dense");
  const dense = run.models.find((m) => m.criterion === "dense");
  const styles = looks(unique(pruned.map((m) => m.method)));
  legend(place, styles);
  for (const task of tasks) {
    const canvas = figure(place, short(task.task), `${task.unit}, ${task.higher_is_better ? "higher" : "lower"} is better`,
      `${task.task}: ${which === "value" ? "value" : "difference to dense"} against sparsity, by method. The numbers are in the table of the verdict.`);
    const traces = lines(pruned, task, which, styles, (m) => m.method);
    const level = which === "value" ? dense?.cells[task.key] : { value: 0, low: 0, high: 0 };
    const values = traces.flatMap((t) => t.y).filter((v) => v > 0);
    const log = which === "value" && !task.higher_is_better && Math.max(...values) > 8 * Math.min(...values);
    const shapes = [], annotations = [];
    if (level && level.value !== null) {
      const bar = { type: "line", xref: "paper", x0: 0, x1: 1, y0: level.value, y1: level.value, line: { color: colour("soft"), width: 1.5, dash: "dot" } };
      shapes.push(bar);
      if (level.low !== null) shapes.push({ type: "rect", xref: "paper", x0: 0, x1: 1, y0: level.low, y1: level.high, fillcolor: colour("soft"), opacity: 0.13, line: { width: 0 }, layer: "below" });
      annotations.push({ xref: "paper", x: 0, y: log ? Math.log10(level.value) : level.value, xanchor: "left", yanchor: "bottom", text: "dense", showarrow: false, font: { color: colour("soft") } });
    }
    Plotly.newPlot(canvas, traces, layout({
      shapes, annotations, xaxis: taken(pruned),
      yaxis: { type: log ? "log" : "linear", dtick: log ? 1 : undefined, zeroline: false },
    }), config);
  }
}

/** The chosen models of all runs, task by task. */
function runs(place) {
  const all = told.runs.flatMap((run) => run.models.map((m) => ({ ...m, series: `${run.name}: ${m.method}` })));
  const pruned = all.filter((m) => m.criterion !== "dense");
  const styles = looks(unique(pruned.map((m) => m.series)));
  const tasks = new Map(told.runs.flatMap((run) => run.tasks).map((task) => [task.key, task]));
  legend(place, styles);
  for (const task of tasks.values()) {
    const canvas = figure(place, short(task.task), task.unit, `${task.task} against sparsity, all runs. The numbers are in the tables of the runs.`);
    const traces = lines(pruned, task, "value", styles, (m) => m.series);
    const values = traces.flatMap((t) => t.y).filter((v) => v > 0);
    const log = !task.higher_is_better && Math.max(...values) > 8 * Math.min(...values);
    Plotly.newPlot(canvas, traces, layout({ xaxis: taken(pruned), yaxis: { type: log ? "log" : "linear", dtick: log ? 1 : undefined, zeroline: false } }), config);
  }
}

const diverging = () => [[0, colour("low")], [0.5, colour("mid")], [1, colour("high")]];

/** Panels of a view: heads, whole blocks beside them, and each other kind of parts. */
function panels(units) {
  const blocks = ["attention", "mlp", "layer"], found = new Map();
  for (const unit of units) {
    const block = blocks.includes(unit.kind);
    const name = block ? "block" : unit.kind;
    if (!found.has(name)) found.set(name, []);
    found.get(name).push({ ...unit, column: block ? unit.kind : unit.index });
  }
  return found;
}

function described(unit, shares, label) {
  const said = [
    `layer ${unit.layer}, ${unit.kind} ${unit.index}`,
    `Δ ${number(unit.delta)} [${number(unit.low)}, ${number(unit.high)}]`,
  ];
  if (unit.importance !== null) said.push(`I ${number(unit.importance)}`);
  const share = unit.kind === "head" ? shares?.[unit.layer]?.[unit.index] : undefined;
  if (share !== undefined) said.push(`pruned ${number(share * 100)} % of its weights (${plain(short(label))})`);
  return said.join("<br>");
}

function effects(place, run, r) {
  if (!run.effects.length) return;
  const view = run.effects[Number(chosen("view", r) ?? 0)], label = chosen("heads", r), shares = run.heads[label];
  for (const [kind, units] of panels(view.units)) {
    const columns = unique(units.map((u) => u.column)), rows = Math.max(...units.map((u) => u.layer)) + 1;
    if (kind !== "block") columns.sort((a, b) => a - b);
    const z = Array.from({ length: rows }, () => columns.map(() => null)), text = z.map((row) => row.map(() => ""));
    for (const unit of units) {
      const at = columns.indexOf(unit.column);
      z[unit.layer][at] = unit.delta;
      text[unit.layer][at] = described(unit, shares, label ?? "");
    }
    const sizes = units.map((u) => Math.abs(u.delta ?? 0)).sort((a, b) => a - b);
    const top = sizes[Math.ceil(0.98 * (sizes.length - 1))] || sizes.at(-1) || 1;
    const names = { head: "Heads", block: "Whole blocks", kv_group: "KV groups", neurons: "Neuron groups", expert: "Experts" };
    const canvas = figure(place, names[kind] ?? kind, `${view.exact ? "exact" : "estimate"}, ${view.effect}; colours end at ±${number(top)}`,
      `Heatmap of the effect of ${units.length} parts by layer and ${kind}. The numbers are in the table below.`);
    canvas.parentElement.style.flexGrow = Math.max(1, Math.min(4, columns.length / 6));
    canvas.parentElement.style.maxWidth = `${Math.max(240, columns.length * 64 + 90)}px`;
    canvas.dataset.kind = kind;
    Plotly.newPlot(canvas, [{
      type: "heatmap", z, x: columns, y: z.map((_, i) => i), text, hovertemplate: "%{text}<extra></extra>", hoverongaps: false,
      xgap: 1, ygap: 1, zmid: 0, zmin: -top, zmax: top, colorscale: diverging(),
      colorbar: { orientation: "h", thickness: 9, len: 0.9, y: 0, yanchor: "top", ypad: 12, title: { text: `Δ, ${view.unit}`, side: "bottom" }, outlinewidth: 0, nticks: 5 },
    }], layout({
      height: Math.max(320, Math.min(820, 120 + rows * 16)), xaxis: { title: { text: kind === "block" ? "" : plain(kind) }, side: "top", showgrid: false, zeroline: false, type: kind === "block" ? "category" : "linear" },
      yaxis: { title: { text: "layer" }, autorange: "reversed", showgrid: false, zeroline: false }, plot_bgcolor: colour("none"),
    }), config);
  }
}

function scatter(place, run) {
  const exact = run.effects.find((own) => own.exact);
  if (!exact) return;
  const key = (u) => `${u.kind} ${u.layer} ${u.index}`;
  const known = new Map(exact.units.filter((u) => u.delta !== null).map((u) => [key(u), u]));
  for (const other of run.effects.filter((own) => !own.exact)) {
    const pairs = other.units.filter((u) => u.delta !== null && known.has(key(u))).map((u) => [known.get(key(u)), u]);
    const canvas = figure(place, short(`${other.name} against ${exact.name}`), `${pairs.length} parts`, `Scatter of estimated against exact effects of ${pairs.length} parts.`);
    const ends = pairs.flat().map((u) => u.delta), low = Math.min(...ends), high = Math.max(...ends);
    Plotly.newPlot(canvas, [{
      type: "scatter", mode: "markers", x: pairs.map(([a]) => a.delta), y: pairs.map(([, b]) => b.delta), marker: { color: colour("c0"), size: 6, opacity: 0.7 },
      text: pairs.map(([a, b]) => `layer ${a.layer}, ${a.kind} ${a.index}<br>exact ${number(a.delta)}<br>estimate ${number(b.delta)}`), hovertemplate: "%{text}<extra></extra>",
    }], layout({
      height: 380, xaxis: { title: { text: plain(`exact Δ, ${exact.unit}`) } }, yaxis: { title: { text: plain(`estimated Δ, ${other.unit}`) } },
      shapes: [{ type: "line", x0: low, y0: low, x1: high, y1: high, line: { color: colour("soft"), dash: "dot", width: 1 } }],
    }), config);
  }
}

function zeros(place, run, r) {
  const wanted = Number(chosen("zeros", r));
  const own = run.models.filter((m) => run.zeros[m.label] && m.sparsity === wanted);
  const labels = own.length ? own.map((m) => m.label) : Object.keys(run.zeros);
  const top = Math.max(...labels.flatMap((label) => run.zeros[label].map(([, , n, zero]) => zero / n)));
  for (const label of labels) {
    const rows = run.zeros[label], layers = Math.max(...rows.map(([layer]) => layer)) + 1;
    const columns = ROLES.filter((role) => rows.some((row) => row[1] === role));
    const z = Array.from({ length: layers }, () => columns.map(() => null));
    for (const [layer, role, n, zero] of rows) z[layer][columns.indexOf(role)] = (100 * zero) / n;
    const all = rows.reduce((sum, [, , n, zero]) => [sum[0] + n, sum[1] + zero], [0, 0]);
    const canvas = figure(place, short(label), `${number((100 * all[1]) / all[0])} % in all`, `Share of zeros of ${label} by layer and matrix. A summary is in the table below.`);
    Plotly.newPlot(canvas, [{
      type: "heatmap", z, x: columns, y: z.map((_, i) => i), zmin: 0, zmax: 100 * top, xgap: 1, ygap: 1, hoverongaps: false,
      hovertemplate: "layer %{y}, %{x}: %{z:.2f} % zeros<extra></extra>", colorscale: [[0, colour("mid")], [1, colour("c0")]],
      colorbar: { thickness: 8, len: 0.9, ticksuffix: " %", outlinewidth: 0 },
    }], layout({ height: Math.max(260, 80 + layers * 11), xaxis: { side: "top", showgrid: false }, yaxis: { autorange: "reversed", showgrid: false, zeroline: false, title: { text: "layer" } } }), config);
  }
}

function doses(place, run, r) {
  const own = run.doses[chosen("doses", r) ?? Object.keys(run.doses)[0]];
  const depth = Math.max(1, ...own.groups.map((g) => g.layer));
  for (const part of ["attention", "mlp"]) {
    const groups = own.groups.filter((g) => g.part === part);
    const canvas = figure(place, part === "mlp" ? "MLP or experts" : "Attention", "one line per layer, early light to late dark", `Divergence against sparsity of each layer's ${part}. The numbers are in the table below.`);
    Plotly.newPlot(canvas, groups.map((g) => ({
      type: "scatter", mode: "lines+markers", x: own.sparsities.map((s) => 100 * s), y: g.nats, opacity: 0.3 + (0.7 * g.layer) / depth,
      line: { color: colour(part === "mlp" ? "c1" : "c0"), width: 2 }, text: g.nats.map((v) => `layer ${g.layer}: ${number(v)} nats per token`), hovertemplate: "%{text}<extra></extra>",
    })), layout({ xaxis: { title: { text: "zeros in this part, %" } }, yaxis: { title: { text: "nats per token" }, rangemode: "tozero" } }), config);
  }
}

/** The first task alone, beside the verdict. */
const first = (place, run, r) => scores(place, run, r, run.tasks.slice(0, 1));

const DRAW = { scores, first, effects, scatter, zeros, doses, runs };

function draw(place) {
  for (const old of place.querySelectorAll(".js-plotly-plot")) Plotly.purge(old);
  place.replaceChildren();
  const run = told.runs[Number(place.dataset.run ?? 0)];
  DRAW[place.dataset.plot](place, run, Number(place.dataset.run ?? 0));
}

async function drawAll() {
  for (const place of document.querySelectorAll("[data-plot]")) {
    draw(place);
    await new Promise((done) => setTimeout(done)); // the page stays alive between figures
  }
  document.documentElement.dataset.drawn = String(Math.round(performance.now()));
}

const NEEDS = { view: ["effects"], heads: ["effects"], zeros: ["zeros"], doses: ["doses"] };
document.addEventListener("change", ({ target }) => {
  const names = target.matches('input[name^="shown-"]') ? ["scores"] : NEEDS[target.dataset.choose] ?? [];
  const run = target.dataset.run ?? target.name.split("-")[1];
  for (const name of names) draw(document.querySelector(`[data-plot="${name}"][data-run="${run}"]`));
});
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawAll);
drawAll();
