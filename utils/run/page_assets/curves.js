"use strict";
// Curves of the log, one plot for each figure or family of figures, all runs in each.

const PANELS = [
  ["Reward", ["reward_mean"], "mean of the completions of an update"],
  ["Exact match", ["em"], "greedy answers to the same questions; the band is the 95 % interval"],
  ["Spread of rewards", ["reward_std"], "standard deviation within a group; 0 teaches nothing"],
  [
    "Groups without signal",
    ["groups_without_signal"],
    "share whose completions all earned the same",
  ],
  ["Loss", ["loss"], "near 0 by construction with one update a rollout"],
  ["Policy reward", ["policy_reward"], "mean of ratio x advantage"],
  ["KL to the reference", ["kl"], "how far the policy has moved"],
  ["Entropy", ["entropy"], "of the sampler, per token; near 0 it explores no more"],
  ["Clipped tokens", ["clip_low", "clip_high"], "share that the loss clips, below and above"],
  [
    "Sampler mismatch",
    ["sampler_mismatch"],
    "mean |log ratio| of training and sampling, per token",
  ],
  ["Importance weight", ["importance_weight"], "mean; 1 where sampler and policy agree"],
  ["Importance capped", ["importance_capped"], "share of tokens at the cap"],
  [
    "Length",
    ["completion_length", "completion_length_max", "length 10%", "length 50%", "length 90%"],
    "sampled tokens: mean, longest, and quantiles of what was kept",
  ],
  ["Cut off", ["truncation_rate"], "share of completions that hit the limit"],
  ["Learning rate", ["lr"], ""],
  ["Gradient norm", ["grad_norm"], "before clipping"],
  ["Left out", ["skipped"], "share of updates that were not finite"],
  ["Tokens per second", ["tokens_per_second"], "sampled, during rollouts"],
  ["Memory, GB", ["peak_memory_gb", "active_memory_gb", "cache_memory_gb"], ""],
];
const NOT_SHOWN = new Set(["update", "batch_step", "seconds", "tokens"]);
const DASHES = [[], [8, 4], [2, 3], [10, 3, 2, 3], [4, 4]];

const curves = { smoothing: 0, log: false, x: "update", plots: [], range: null, syncing: false };

// [title, figures, about] of what any run has.
function panels() {
  const names = new Set(page.runs.flatMap((run) => run.figures));
  names.add("em");
  for (const part of ["10%", "50%", "90%"]) names.add(`length ${part}`);
  const rest = [...names].filter((name) => !NOT_SHOWN.has(name));
  const taken = new Set(PANELS.flatMap(([, figures]) => figures));
  const own = rest
    .filter((name) => name.startsWith("reward/"))
    .map((name) => [`Reward: ${name.slice(7)}`, [name], ""]);
  const stages = rest.filter((name) => name.startsWith("seconds_"));
  const others = rest.filter((name) => !taken.has(name) && !/^reward\/|^seconds_/.test(name));
  const all = [
    PANELS[0],
    scorePanel(),
    ...own,
    ...PANELS.slice(2),
    ["Seconds by stage", stages, "of an update"],
    ...others.map((name) => [name, [name], ""]),
  ];
  return all
    .map(([title, figures, about]) => [
      title,
      figures.filter((name) => page.runs.some((run) => has(run, name))),
      about,
    ])
    .filter(([, figures]) => figures.length);
}

// What evaluations count, by its own name where it is not exact match.
function scorePanel() {
  const metrics = new Set(page.runs.map((run) => run.metric));
  if (metrics.has("em")) return PANELS[1];
  const about = "mean of greedy answers to the same questions";
  return [`Evaluation: ${[...metrics].join(", ")}`, ["em"], about];
}

const has = (run, figure) => points(run, figure).y.some((value) => value !== null);

// {x: updates, y, low, high} of a figure.
function points(run, name) {
  run.points ??= new Map();
  if (!run.points.has(name)) run.points.set(name, computed(run, name));
  return run.points.get(name);
}

function computed(run, name) {
  if (name === "em") {
    const found = run.evaluations.filter((record) => record.split === "test");
    const x = found.map((record) => record.update);
    const y = found.map((record) => record.em ?? null);
    if (run.metric !== "em") return { x, y };
    const edges = found.map((r) => (r.em === null ? [null, null] : wilson(r.em, r.em_subset)));
    return { x, y, low: edges.map((edge) => edge[0]), high: edges.map((edge) => edge[1]) };
  }
  if (name.startsWith("length ")) return quantiles(run, Number.parseInt(name.slice(7), 10) / 100);
  return { x: run.records.map((r) => r.update), y: run.records.map((r) => r[name] ?? null) };
}

// Of the lengths of an update's completions, where completions were kept.
function quantiles(run, share) {
  const lengths = new Map();
  const training = run.sets.indexOf("train");
  for (const group of training < 0 ? [] : run.groupsOf(training)) {
    const update = run.groups.update[group];
    if (!lengths.has(update)) lengths.set(update, []);
    const end = run.first[group] + run.groups.size[group];
    for (let i = run.first[group]; i < end; i++) lengths.get(update).push(run.numbers.length[i]);
  }
  const x = [...lengths.keys()].sort((a, b) => a - b);
  const y = x.map((update) => {
    const sorted = lengths.get(update).sort((a, b) => a - b);
    return sorted[Math.round(share * (sorted.length - 1))];
  });
  return { x, y };
}

// Updates as positions on the axis that is chosen.
function placed(run, updates) {
  if (curves.x === "update") return updates;
  const known = axis(run);
  return updates.map((update) => between(known, update));
}

// [[update, value]] of the chosen axis, from 0 on.
function axis(run) {
  const pairs = [[0, 0]];
  let tokens = 0;
  let before = 0;
  for (const record of run.records) {
    tokens += (record.tokens ?? 0) * (record.update - before);
    before = record.update;
    const value = curves.x === "hours" ? record.seconds / 3600 : tokens;
    pairs.push([record.update, value]);
  }
  return pairs;
}

function between(pairs, update) {
  let low = 0;
  let high = pairs.length - 1;
  while (low < high) {
    const middle = (low + high + 1) >> 1;
    if (pairs[middle][0] <= update) low = middle;
    else high = middle - 1;
  }
  const [a, b] = [pairs[low], pairs[low + 1]];
  if (!b) return a[1];
  return a[1] + ((b[1] - a[1]) * (update - a[0])) / (b[0] - a[0]);
}

// Exponential moving average that starts without a pull to 0.
function smoothed(values) {
  const keep = curves.smoothing;
  let sum = 0;
  let weight = 0;
  return values.map((value) => {
    if (value === null) return null;
    sum = keep * sum + (1 - keep) * value;
    weight = keep * weight + (1 - keep);
    return sum / weight;
  });
}

const positive = (values) =>
  curves.log ? values.map((v) => (v !== null && v > 0 ? v : null)) : values;
const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

// Of a figure as a person knows it.
function nameOf(run, name) {
  if (name !== "em") return name;
  return run.metric === "em" ? "exact match" : run.metric;
}

function faded(colour, part) {
  const number = Number.parseInt(colour.slice(1), 16);
  return `rgba(${number >> 16}, ${(number >> 8) & 255}, ${number & 255}, ${part})`;
}

// What uPlot draws for a panel: its aligned data and its series.
function drawing(figures) {
  const tables = [];
  const series = [
    {
      label: { update: "update", hours: "hours", tokens: "tokens" }[curves.x],
      value: (_, x) => figure(x, 4),
    },
  ];
  const bands = [];
  const runs = page.runs.filter((run) => run.shown);
  for (const run of runs) {
    figures.forEach((name, n) => {
      const { x, y, low, high } = points(run, name);
      if (!y.some((value) => value !== null)) return;
      const at = placed(run, x);
      const colour = page.runs.length > 1 ? run.colour : COLOURS[n % COLOURS.length];
      const label = [
        page.runs.length > 1 ? run.label : "",
        figures.length > 1 || page.runs.length < 2 ? nameOf(run, name) : "",
      ];
      const line = {
        label: plain(label.filter(Boolean).join(": ")),
        stroke: colour,
        width: 2,
        dash: page.runs.length > 1 ? DASHES[n % DASHES.length] : [],
        spanGaps: true,
        points: { show: y.length < 40, size: 5 },
        value: (plot, value, own, i) => {
          if (!low || value === null) return figure(value, 4);
          return `${percent(value)} [${percent(plot.data[own + 2][i])}, ${percent(plot.data[own + 1][i])}]`;
        },
      };
      const averaged = curves.smoothing > 0 && name !== "em";
      if (averaged) {
        series.push({
          ...line,
          label: `${line.label} (raw)`,
          stroke: faded(colour, 0.25),
          width: 1,
          points: { show: false },
          raw: true,
        });
        tables.push([at, positive(y)]);
      }
      series.push(line);
      tables.push([at, positive(averaged ? smoothed(y) : y)]);
      if (low) {
        const hidden = {
          label: line.label,
          stroke: "transparent",
          points: { show: false },
          value: () => "",
          raw: true,
        };
        series.push({ ...hidden, label: "high" }, { ...hidden, label: "low" });
        tables.push([at, positive(high)], [at, positive(low)]);
        bands.push({ series: [series.length - 2, series.length - 1], fill: faded(colour, 0.14) });
      }
    });
  }
  // A run that was resumed may have told of an update twice: its curve goes by the last word.
  return { data: tables.length ? uPlot.join(tables.map(sorted)) : [[]], series, bands };
}

function sorted([x, y]) {
  const pairs = new Map(x.map((value, i) => [value, y[i]]));
  const keys = [...pairs.keys()].sort((a, b) => a - b);
  return [keys, keys.map((key) => pairs.get(key))];
}

function drawMarks(plot) {
  const { ctx, bbox } = plot;
  ctx.save();
  ctx.textAlign = "left";
  ctx.font = `${11 * devicePixelRatio}px system-ui, sans-serif`;
  let before = -Infinity;
  let row = 0;
  for (const { run, mark, number } of curves.marks) {
    if (!run.shown) continue;
    const [at] = placed(run, [mark.update]);
    const { min, max } = plot.scales.x;
    if (at < min || at > max) continue;
    const x = Math.round(plot.valToPos(at, "x", true));
    ctx.strokeStyle = ctx.fillStyle = css(mark.kind === "note" ? "--note" : "--muted");
    ctx.setLineDash([4 * devicePixelRatio, 4 * devicePixelRatio]);
    ctx.lineWidth = devicePixelRatio;
    ctx.beginPath();
    ctx.moveTo(x, bbox.top);
    ctx.lineTo(x, bbox.top + bbox.height);
    ctx.stroke();
    row = x - before < 14 * devicePixelRatio ? row + 1 : 0; // numbers of close ones below each other
    before = x;
    const y = bbox.top + (11 + 12 * row) * devicePixelRatio;
    ctx.fillText(String(number), x + 3 * devicePixelRatio, y);
  }
  ctx.restore();
}

// Room around a curve, also around one that is level.
function upright(_, low, high) {
  if (low === null) return [0, 1];
  const pad = 0.05 * (high - low) || 0.1 * Math.abs(low) || 0.1;
  return uPlot.rangeNum(low - pad, high + pad, 0, false);
}

// Room for the longest label of an axis.
const widthOf = (_, labels) => 18 + 7 * Math.max(3, ...(labels ?? []).map((text) => text.length));

function plotOptions(figures, width, { series, bands }) {
  const line = {
    stroke: () => css("--muted"),
    grid: { stroke: () => css("--line"), width: 1 },
    ticks: { stroke: () => css("--line"), width: 1 },
    font: "12px system-ui, sans-serif",
  };
  const compact = new Intl.NumberFormat("en", { notation: "compact", maximumSignificantDigits: 4 });
  const short = (_, values) =>
    values.map((v) =>
      v === null ? "" : v !== 0 && Math.abs(v) < 1e-3 ? v.toExponential() : compact.format(v),
    );
  const shares = figures[0] === "em" && page.runs.every((run) => run.metric === "em");
  const parts = (_, values) => values.map((v) => (v === null ? "" : `${figure(100 * v)}%`));
  return {
    width,
    height: Math.round(Math.min(320, Math.max(190, width * 0.46))),
    series,
    bands,
    scales: { x: { time: false }, y: curves.log ? { distr: 3 } : { range: upright } },
    axes: [
      { ...line, values: short },
      { ...line, values: shares ? parts : short, size: widthOf },
    ],
    cursor: {
      sync: { key: "curves", setSeries: false },
      drag: { x: true, y: false },
      focus: { prox: 24 },
    },
    focus: { alpha: 0.35 },
    hooks: { drawAxes: [drawMarks], setScale: [zoomed] },
  };
}

// One plot was zoomed: so are the others.
function zoomed(plot, scale) {
  if (scale !== "x" || curves.syncing || !plot.ready) return;
  const { min, max } = plot.scales.x;
  const all = plot.data[0];
  curves.range = min <= all[0] && max >= all.at(-1) ? null : [min, max];
  curves.syncing = true;
  for (const { plot: other } of curves.plots) if (other && other !== plot) zoom(other);
  curves.syncing = false;
}

function zoom(plot) {
  const all = plot.data[0];
  const [min, max] = curves.range || [all[0], all.at(-1)];
  plot.batch(() => plot.setScale("x", { min, max: max > min ? max : min + 1 }));
}

function summary(title, figures) {
  const parts = [];
  for (const run of page.runs.filter((own) => own.shown)) {
    for (const name of figures) {
      const { x, y } = points(run, name);
      const known = y.map((value, i) => [x[i], value]).filter(([, value]) => value !== null);
      if (!known.length) continue;
      const [first, last] = [known[0], known.at(-1)];
      const ends = `${figure(first[1])} at update ${first[0]}, ${figure(last[1])} at update ${last[0]}`;
      parts.push(`${run.label} ${name}: ${ends}`);
    }
  }
  return plain(`${title}. ${parts.join(". ")}. Arrow keys read values.`);
}

function makePlot(item) {
  const { box, figures, title } = item;
  item.plot?.destroy();
  item.plot = null;
  const made = drawing(figures);
  box.setAttribute("aria-label", summary(title, figures));
  if (made.data[0].length === 0) return;
  const plot = new uPlot(plotOptions(figures, box.clientWidth, made), made.data, box);
  item.plot = plot;
  box.classList.add("drawn");
  for (const [i, row] of [...plot.root.querySelectorAll(".u-legend .u-series")].entries()) {
    if (made.series[i].raw) row.style.display = "none";
  }
  plot.ready = true;
  if (curves.range) {
    curves.syncing = true;
    zoom(plot);
    curves.syncing = false;
  }
}

// Arrow keys move the cursor, which every plot shows.
function readByKey(event, item) {
  const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
  if (!item.plot) return;
  if (event.key === "Escape") {
    curves.range = null;
    zoom(item.plot);
  }
  if (!step) return;
  event.preventDefault();
  const { plot } = item;
  const x = plot.data[0];
  const at = Math.min(Math.max((plot.cursor.idx ?? -1) + step, 0), x.length - 1);
  plot.setCursor({ left: plot.valToPos(x[at], "x"), top: 10 });
  const values = plot.series
    .map((own, i) =>
      i && !own.raw && plot.data[i][at] != null
        ? `${own.label} ${own.value(plot, plot.data[i][at], i, at)}`
        : "",
    )
    .filter(Boolean);
  announce(`${plot.series[0].label} ${figure(x[at])}: ${values.join(", ")}`);
}

function redrawCurves() {
  for (const item of curves.plots) if (item.seen) makePlot(item);
}

// What is drawn of a run that goes on: new points in the same plots, where nothing else is new.
function updateCurves() {
  const [had, marked] = [JSON.stringify(curves.shown), JSON.stringify(curves.told)];
  collect();
  if (JSON.stringify(curves.shown) !== had || JSON.stringify(curves.told) !== marked) {
    const { scrollY } = window;
    drawCurves();
    window.scrollTo(0, scrollY);
    return;
  }
  for (const item of curves.plots) {
    if (!item.seen) continue;
    const made = drawing(item.figures);
    if (!item.plot || item.plot.series.length !== made.series.length) makePlot(item);
    else {
      item.box.setAttribute("aria-label", summary(item.title, item.figures));
      curves.syncing = true;
      item.plot.setData(made.data, !curves.range);
      curves.syncing = false;
    }
  }
}

function collect() {
  for (const run of page.runs) run.points = new Map();
  curves.marks = page.runs
    .flatMap((run) => run.marks.map((mark) => ({ run, mark })))
    .sort((a, b) => a.mark.update - b.mark.update);
  curves.marks.forEach((own, i) => (own.number = i + 1));
  curves.told = curves.marks.map(({ mark }) => mark);
  curves.shown = panels();
}

function drawCurves() {
  const section = byId("curves");
  for (const { plot } of curves.plots) plot?.destroy();
  collect();
  const grid = make("div", { class: "plots" });
  curves.plots = curves.shown.map(([title, figures, about]) => {
    const box = make("div", {
      class: "plot",
      tabindex: "0",
      role: "img",
      "aria-label": summary(title, figures),
    });
    const item = { title, figures, box, seen: false, plot: null };
    box.addEventListener("keydown", (event) => readByKey(event, item));
    grid.append(
      make(
        "figure",
        {},
        make(
          "figcaption",
          {},
          make("b", { text: title }),
          " ",
          make("span", { class: "muted", text: about }),
        ),
        box,
      ),
    );
    return item;
  });
  section.replaceChildren(...differenceTable(), curveControls(), ...marksList(), grid);
  if (!curves.plots.length)
    grid.append(make("p", { class: "empty", text: "The log holds no figures yet." }));
  // A plot is drawn when it comes into view.
  curves.observer?.disconnect();
  curves.observer = new IntersectionObserver(
    (entries) => {
      for (const entry of entries) {
        const item = curves.plots.find((own) => own.box === entry.target);
        if (!entry.isIntersecting || !item || item.seen) continue;
        item.seen = true;
        makePlot(item);
      }
    },
    { rootMargin: "300px" },
  );
  curves.sizes?.disconnect();
  curves.sizes = new ResizeObserver((entries) => {
    for (const { target } of entries) {
      const { plot } = curves.plots.find((own) => own.box === target) || {};
      if (plot && target.clientWidth && plot.width !== target.clientWidth) {
        plot.setSize({ width: target.clientWidth, height: plot.height });
      }
    }
  });
  for (const { box } of curves.plots) {
    curves.observer.observe(box);
    curves.sizes.observe(box);
  }
}

function curveControls() {
  const slider = make("input", {
    type: "range",
    min: "0",
    max: "0.98",
    step: "0.02",
    "aria-label": "Smoothing",
  });
  slider.value = curves.smoothing;
  const value = make("output", { text: curves.smoothing.toFixed(2) });
  slider.addEventListener("input", () => {
    curves.smoothing = Number(slider.value);
    value.textContent = curves.smoothing.toFixed(2);
    redrawCurves();
  });
  const log = make("input", { type: "checkbox", checked: curves.log });
  log.addEventListener("change", () => {
    curves.log = log.checked;
    redrawCurves();
  });
  const over = [
    ["update", "update"],
    ["hours", "hours"],
    ["tokens", "tokens sampled"],
  ];
  return make(
    "div",
    { class: "controls" },
    make("label", { class: "field" }, make("span", { text: "Smoothing" }), slider, value),
    select("Over", over, curves.x, (chosen) => {
      curves.x = chosen;
      curves.range = null;
      redrawCurves();
    }),
    make("label", { class: "field" }, log, make("span", { text: "Log scale" })),
    make("button", {
      type: "button",
      text: "Whole range",
      onclick: () => {
        curves.range = null;
        redrawCurves();
      },
    }),
    make("span", {
      class: "muted hint",
      text: "Drag over a plot to zoom, double-click to see all.",
    }),
  );
}

function marksList() {
  if (!curves.marks.length) return [];
  const rows = curves.marks.map(({ run, mark, number }) =>
    make(
      "li",
      { class: mark.kind, value: number },
      make("span", {
        text: `${page.runs.length > 1 ? `${run.label}, ` : ""}update ${mark.update}: `,
      }),
      make("span", { text: mark.text.replace(/^update \d+: /, "") }),
    ),
  );
  const list = make("ol", { class: "marks" }, ...rows);
  const title = make("summary", { text: `${counted(rows.length, "mark")} on the curves` });
  return [make("details", { open: rows.length <= 6 }, title, list)];
}

// Settings that tell the runs apart.
function differenceTable() {
  if (page.runs.length < 2) return [];
  const names = differences();
  if (!names.length)
    return [make("p", { class: "muted", text: "The settings of these runs are the same." })];
  return [settingsTable(names)];
}

function settingsTable(names) {
  const head = make(
    "tr",
    {},
    make("th", { scope: "col", text: "Setting" }),
    ...page.runs.map((run) =>
      make("th", { scope: "col" }, swatch(run), make("span", { text: run.label })),
    ),
  );
  const rows = names.map((name) =>
    make(
      "tr",
      {},
      make("th", { scope: "row", text: name }),
      ...page.runs.map((run) =>
        make("td", {}, make("code", { text: settingText(run.settings[name]) })),
      ),
    ),
  );
  return make(
    "div",
    { class: "scroll", tabindex: "0", role: "region", "aria-label": "Settings that differ" },
    make("table", { class: "settings" }, make("thead", {}, head), make("tbody", {}, ...rows)),
  );
}

const swatch = (run) =>
  make("i", { class: "swatch", style: { background: run.colour }, "aria-hidden": "true" });
