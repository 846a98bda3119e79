"use strict";
// Evaluations question by question, before and after; and runs side by side.

const OUTCOMES = [
  ["fixed", "fixed", "wrong before, right after"],
  ["broken", "broken", "right before, wrong after"],
  ["right", "kept right", "right both times"],
  ["wrong", "kept wrong", "wrong both times"],
];
const evaluations = { before: null, after: null, set: "eval test", outcome: "fixed", text: "" };

// Every kept evaluation as [value, text, {run, set, update}].
function evaluationChoices() {
  return page.runs.flatMap((run) =>
    evaluated(run, evaluations.set).map((update) => [
      `${run.number}:${update}`,
      `${page.runs.length > 1 ? `${run.label}, ` : ""}update ${update}`,
      { run, set: evaluations.set, update },
    ]),
  );
}

function drawEvaluations() {
  const section = byId("evaluations");
  const sets = [...new Set(page.runs.flatMap((run) => run.sets))].filter((name) =>
    name.startsWith("eval"),
  );
  if (!sets.length) {
    section.replaceChildren(
      make("p", { class: "empty", text: "No evaluation's answers were kept." }),
    );
    return;
  }
  if (!sets.includes(evaluations.set)) evaluations.set = sets[0];
  const choices = evaluationChoices();
  const known = (value) => choices.find(([own]) => own === value);
  const last = page.runs
    .map((run) => choices.filter(([, , own]) => own.run === run).at(-1)?.[0])
    .filter(Boolean);
  if (!known(evaluations.before))
    evaluations.before = page.runs.length > 1 ? last[0] : choices[0][0];
  if (!known(evaluations.after)) evaluations.after = last.at(-1);
  const changed = (name) => (value) => {
    evaluations[name] = value;
    drawEvaluations();
  };
  const options = choices.map(([value, text]) => [value, text]);
  const [before, after] = [known(evaluations.before)[2], known(evaluations.after)[2]];
  const found = paired(before, after);
  evaluations.found = { before, after, ...found };
  evaluations.list = new VirtualList("Questions", 58, pairRow, (i, how) =>
    showPair(found[evaluations.outcome][i]).then(() =>
      reveal(evaluations.list, byId("pair"), how),
    ),
  );
  if (!found[evaluations.outcome].length)
    evaluations.outcome = OUTCOMES.find(([name]) => found[name].length)?.[0] ?? "fixed";
  section.replaceChildren(
    make(
      "div",
      { class: "controls" },
      sets.length > 1
        ? select(
            "Of",
            sets.map((name) => [name, setName(name)]),
            evaluations.set,
            changed("set"),
          )
        : null,
      select("Before", options, evaluations.before, changed("before")),
      select("After", options, evaluations.after, changed("after")),
    ),
    ...page.runs.map((run) => partNote(run, "evaluations")).filter(Boolean),
    pairSummary(before, after, found),
    make(
      "div",
      { class: "columns two" },
      make("div", { class: "found" }, outcomeChoice(found), evaluations.list.element),
      make("div", { id: "pair", class: "group" }),
    ),
  );
  showOutcome();
}

function outcomeChoice(found) {
  const options = OUTCOMES.map(([name, text]) => [name, `${text} ${found[name].length}`]);
  return choice("What became of the question", options, evaluations.outcome, (name) => {
    evaluations.outcome = name;
    showOutcome();
  });
}

function showOutcome() {
  const pairs = evaluations.found[evaluations.outcome];
  evaluations.list.element.scrollTop = 0;
  evaluations.list.reset(pairs.length, pairs.length ? 0 : -1);
  if (pairs.length) showPair(pairs[0]);
  else byId("pair").replaceChildren(make("p", { class: "empty", text: "There is none." }));
}

// Both shares with intervals, the four counts and the paired test.
function pairSummary(before, after, found) {
  const size = (name) => found[name].length;
  const total = OUTCOMES.reduce((sum, [name]) => sum + size(name), 0);
  if (!total) return make("p", { class: "muted", text: "No question was judged in both." });
  const share = (names) => names.reduce((sum, name) => sum + size(name), 0) / total;
  const text = (value) => {
    const [low, high] = wilson(value, total);
    return `${percent(value)} [${percent(low)}, ${percent(high)}]`;
  };
  const p = signTest(size("fixed"), size("broken"));
  return make(
    "div",
    {},
    make(
      "p",
      { class: "result" },
      make("b", { text: text(share(["broken", "right"])) }),
      " → ",
      make("b", { text: text(share(["fixed", "right"])) }),
      make("span", {
        class: "muted",
        text: ` right of ${counted(total, "question")}, 95 % intervals; ${pValue(p)} (paired exact sign test)`,
      }),
    ),
    make(
      "div",
      {
        class: "split",
        role: "img",
        "aria-label": OUTCOMES.map(([name, own]) => `${own}: ${size(name)}`).join(", "),
      },
      ...OUTCOMES.filter(([name]) => size(name)).map(([name, own, about]) =>
        make("span", {
          class: name,
          style: { flexGrow: String(size(name)) },
          "data-tip": `${own}, ${about}: ${size(name)}`,
          text: `${own} ${size(name)}`,
        }),
      ),
    ),
    differentData(before.run, after.run)
      ? make("p", {
          class: "warning",
          text: "These runs had different data: questions are paired by their place in it.",
        })
      : null,
  );
}

function differentData(a, b) {
  return a !== b && a.versions.data_sha256 !== b.versions.data_sha256;
}

function pairRow(i) {
  const { before, after } = evaluations.found;
  const [first, second] = evaluations.found[evaluations.outcome][i];
  const text = make("span", { class: "snippet" });
  const facts = make("span", { class: "facts" });
  Promise.all([before.run.texts(first), after.run.texts(second)]).then(([was, is]) => {
    const read = (texts) => texts?.completions[0]?.parsed ?? "–";
    facts.append(make("b", { text: read(was) }), " → ", make("b", { text: read(is) }));
    if (is) facts.append(make("span", { class: "muted right", text: `expected ${is.answer}` }));
    showSnippet(text, is || was ? (is ?? was).question : null);
  });
  return make("div", { class: "row" }, facts, text);
}

// The answers of both evaluations to a question, side by side.
async function showPair(pair) {
  const mine = (evaluations.showing = {});
  const sides = [evaluations.found.before, evaluations.found.after].map(({ run, update }, n) => ({
    run,
    update,
    group: pair[n],
  }));
  for (const side of sides) {
    side.texts = await side.run.texts(side.group);
    side.tokens = rollouts.colour === "none" ? null : await side.run.tokens(side.group);
  }
  if (evaluations.showing !== mine) return;
  const texts = sides[1].texts ?? sides[0].texts;
  const columns = sides.map(({ run, update, group, texts: own, tokens }) => {
    const title = make("p", {
      class: "muted",
      text: `${page.runs.length > 1 ? `${run.label}, ` : ""}update ${update}`,
    });
    return make(
      "div",
      {},
      title,
      completionCard(run, group, run.first[group], {
        texts: own,
        tokens,
        chosen: -1,
        mean: null,
        many: false,
      }),
    );
  });
  byId("pair").replaceChildren(
    ...questionHead(texts),
    colourChoice(sides[1].run, sides[1].group, () => showPair(pair)),
    make("div", { class: "pair" }, ...columns),
  );
}

// Runs side by side.

function drawCompare() {
  const rows = [
    ["Exact match before", (run) => scoreText(run, testScores(run)[0])],
    ["Exact match after", (run) => scoreText(run, testScores(run).at(-1))],
    ["Best", (run) => scoreText(run, best(run))],
    ...(page.runs.length > 1 ? [[`Against ${page.runs[0].label}`, against]] : []),
    ["Reward", (run) => ends(run, "reward_mean")],
    ["Updates", (run) => updatesText(run)],
    ["Time", (run) => duration(run.records.at(-1)?.seconds)],
    [
      "Seconds an update",
      (run) =>
        figure(run.records.length ? run.records.at(-1).seconds / run.records.at(-1).update : null),
    ],
    ["Tokens a second", (run) => figure(mean(run, "tokens_per_second"))],
    ["Length", (run) => ends(run, "completion_length")],
    [
      "Peak memory, GB",
      (run) => figure(Math.max(...run.records.map((r) => r.peak_memory_gb ?? 0))),
    ],
    ["Completions", (run) => keptText(run)],
    ["Folder", (run) => run.folder],
    ...versionRows(),
  ];
  const name = page.runs.some((run) => run.metric !== "em") ? "Score" : "Exact match";
  const head = make(
    "tr",
    {},
    make("td"),
    ...page.runs.map((run) =>
      make("th", { scope: "col" }, swatch(run), make("span", { text: run.label })),
    ),
  );
  const body = rows.map(([title, text]) =>
    make(
      "tr",
      {},
      make("th", { scope: "row", text: title.replace("Exact match", name) }),
      ...page.runs.map((run) => make("td", { text: String(text(run)) })),
    ),
  );
  byId("compare").replaceChildren(
    make(
      "div",
      { class: "scroll", tabindex: "0", role: "region", "aria-label": "Runs" },
      make("table", { class: "compared" }, make("thead", {}, head), make("tbody", {}, ...body)),
    ),
    make("h2", { text: "Settings" }),
    ...settingsSection(),
  );
}

const testScores = (run) => run.evaluations.filter((record) => record.split === "test");
const best = (run) =>
  testScores(run).reduce(
    (top, record) => (record.em !== null && (!top || record.em > top.em) ? record : top),
    null,
  );

function scoreText(run, record) {
  if (!record || record.em === null) return "–";
  const at = ` at update ${record.update}`;
  if (run.metric !== "em") return `${figure(record.em)} (${run.metric})${at}`;
  return `${withInterval(run, record)}${at}`;
}

// The paired test of the last evaluations of a run and the first one.
function against(run) {
  if (run === page.runs[0]) return "–";
  const [before, after] = [page.runs[0], run].map((own) => ({
    run: own,
    set: "eval test",
    update: evaluated(own, "eval test").at(-1),
  }));
  if (before.update === undefined || after.update === undefined) return "no answers kept";
  const { fixed, broken, right, wrong } = paired(before, after);
  const total = fixed.length + broken.length + right.length + wrong.length;
  if (!total) return "no question in common";
  const note = differentData(before.run, after.run) ? ", but the data differ" : "";
  return `better on ${fixed.length}, worse on ${broken.length} of ${total.toLocaleString("en")}, ${pValue(signTest(fixed.length, broken.length))}${note}`;
}

function ends(run, name) {
  const known = run.records
    .map((record) => record[name])
    .filter((value) => value !== null && value !== undefined);
  return known.length ? `${figure(known[0])} → ${figure(known.at(-1))}` : "–";
}

function mean(run, name) {
  const known = run.records
    .map((record) => record[name])
    .filter((value) => value !== null && value !== undefined);
  return known.length ? known.reduce((a, b) => a + b, 0) / known.length : null;
}

const updatesText = (run) =>
  `${run.last.toLocaleString("en")}${run.finished ? "" : ", not finished"}`;

function keptText(run) {
  const { text, tokens } = run.kept;
  const parts = [run.all > run.count ? `${run.countText} in this page` : run.countText];
  if (run.count && text < 1) parts.push(`texts of ${percent(text, 0)} of the groups in this page`);
  if (run.count && tokens < 1)
    parts.push(`probabilities of tokens of ${percent(tokens, 0)} of the groups`);
  return parts.join(", ");
}

function versionRows() {
  const names = ["device", "platform", "python", "mlx", "mlx-lm", "git_revision"];
  return names
    .filter((name) => page.runs.some((run) => run.versions[name] !== undefined))
    .map((name) => [name, (run) => String(run.versions[name] ?? "–").slice(0, 60)]);
}

function settingsSection() {
  const all = [...new Set(page.runs.flatMap((run) => Object.keys(run.settings)))].sort();
  const differing = differences();
  const box = make("div");
  let only = page.runs.length > 1 && differing.length > 0;
  const search = make("input", {
    type: "search",
    placeholder: "name of a setting",
    "aria-label": "Search settings",
  });
  const show = () => {
    const names = (only ? differing : all).filter((name) => name.includes(search.value.trim()));
    box.replaceChildren(
      names.length ? settingsTable(names) : make("p", { class: "empty", text: "There is none." }),
    );
  };
  search.addEventListener("input", show);
  show();
  const toggle = make("input", { type: "checkbox", checked: only });
  toggle.addEventListener("change", () => {
    only = toggle.checked;
    show();
  });
  return [
    make(
      "div",
      { class: "controls" },
      search,
      page.runs.length > 1
        ? make(
            "label",
            { class: "field" },
            toggle,
            make("span", { text: "Only those that differ" }),
          )
        : null,
    ),
    box,
  ];
}
