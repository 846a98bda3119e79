"use strict";
// One question over time: the same training or test question at each visit or evaluation.

const questions = { run: 0, data: "", list: [], shown: [], chosen: null, text: "" };

// Training and evaluations on training questions are of the same data.
const dataOf = (set) => (set === "eval test" ? "test questions" : "training questions");

// Questions with their visits, most visited first.
function questionList(run) {
  const found = new Map();
  for (const group of run.groupsOf()) {
    if (dataOf(run.sets[run.groups.set[group]]) !== questions.data) continue;
    const prompt = run.groups.prompt[group];
    if (!found.has(prompt)) found.set(prompt, { prompt, visits: [] });
    found.get(prompt).visits.push(group);
  }
  return [...found.values()].sort(
    (a, b) => b.visits.length - a.visits.length || a.prompt - b.prompt,
  );
}

function drawQuestions() {
  const section = byId("questions");
  if (!page.runs.some((own) => own.count)) {
    section.replaceChildren(noCompletions());
    return;
  }
  const run = page.runs[questions.run];
  const data = [...new Set(run.sets.map(dataOf))];
  if (!data.includes(questions.data))
    questions.data = data.includes("test questions") ? "test questions" : data[0];
  questions.list = questionList(run);
  questions.view = new VirtualList("Questions", 58, questionRow, (i, how) =>
    showQuestion(questions.shown[i]).then(() => reveal(questions.view, byId("question"), how)),
  );
  const again = () => {
    questions.chosen = null;
    drawQuestions();
  };
  const search = searchField(
    { "aria-label": "Search questions", placeholder: "in questions" },
    questions.text,
    searchQuestions,
  );
  const part = questions.data === "test questions" ? "evaluations" : "updates";
  section.replaceChildren(
    make(
      "div",
      { class: "columns two" },
      make(
        "div",
        { class: "found" },
        page.runs.length > 1
          ? select(
              "Run",
              page.runs.map((own, n) => [n, own.label]),
              questions.run,
              (value) => ((questions.run = Number(value)), again()),
            )
          : null,
        data.length > 1
          ? select(
              "Of",
              data.map((name) => [name, name]),
              questions.data,
              (value) => ((questions.data = value), again()),
            )
          : null,
        make("label", { class: "field wide" }, make("span", { text: "Search" }), search),
        make("div", { id: "question-count", role: "status", class: "muted" }),
        partNote(run, part),
        questions.view.element,
      ),
      make(
        "div",
        { id: "question", class: "group" },
        make("div", { id: "visits" }),
        make("div", { id: "visit" }),
      ),
    ),
  );
  searchQuestions(questions.text);
}

async function searchQuestions(text) {
  questions.text = text;
  const run = page.runs[questions.run];
  const wanted = text.toLowerCase();
  const found = [];
  for (const own of questions.list) {
    if (
      !wanted ||
      `${(await run.texts(own.visits.at(-1)))?.question ?? ""}`.toLowerCase().includes(wanted)
    )
      found.push(own);
    if (questions.text !== text) return;
  }
  questions.shown = found;
  byId("question-count").textContent = counted(found.length, "question");
  const at = found.findIndex((own) => own.prompt === questions.chosen);
  questions.view.reset(found.length, Math.max(at, 0));
  if (found.length) showQuestion(found[Math.max(at, 0)]);
  else {
    byId("visits").replaceChildren(
      make("p", { class: "empty", text: "No question has this text." }),
    );
    byId("visit").replaceChildren();
    questions.chosen = null;
  }
}

function questionRow(i) {
  const run = page.runs[questions.run];
  const { visits } = questions.shown[i];
  const text = make("span", { class: "snippet" });
  run.texts(visits.at(-1)).then((texts) => {
    showSnippet(text, texts ? texts.question : null);
  });
  const ends = [visits[0], visits.at(-1)].map((group) => outcome(run, group));
  const facts = [
    make("b", { text: ends.join(" → ") }),
    make("span", { class: "muted right", text: asked(visits.length) }),
  ];
  return listRow(facts, text);
}

function firstRight(run, visits) {
  const first = visits.find((group) => run.right(group)?.right);
  if (first === undefined)
    return visits.some((group) => run.right(group)) ? "never right" : "not judged";
  return `first right at update ${run.groups.update[first]}`;
}

const asked = (times) =>
  times < 3 ? ["", "asked once", "asked twice"][times] : `asked ${times.toLocaleString("en")} times`;

// In a few characters: right of judged, or the mean reward.
function outcome(run, group) {
  const right = run.right(group);
  if (right) return right.known === 1 ? RIGHT[right.right][0] : `${right.right}/${right.known}`;
  return figure(run.mean(run.numbers.reward, group));
}

function showQuestion(question) {
  const run = page.runs[questions.run];
  questions.chosen = question.prompt;
  const { groups, numbers } = run;
  const rows = question.visits.map((group, n) => {
    const right = run.right(group);
    const share = right ? right.right / right.known : null;
    const mean = run.mean(numbers.reward, group);
    const show = () => {
      for (const row of byId("visits").querySelectorAll("tbody tr"))
        row.classList.toggle("chosen", row === rowElement);
      showGroup(byId("visit"), run, group);
    };
    const rowElement = make(
      "tr",
      { onclick: show },
      make(
        "th",
        { scope: "row" },
        make("button", {
          type: "button",
          class: "link",
          text: String(groups.update[group]),
          "aria-label": `Time ${n + 1}, at update ${groups.update[group]}`,
          onclick: show,
        }),
      ),
      make("td", { text: setName(run.sets[groups.set[group]]) }),
      make("td", { text: right ? `${right.right} of ${right.known}` : "–" }),
      make("td", { class: "earned" }, make("i", { style: { width: `${100 * (share ?? 0)}%` } })),
      make("td", { text: figure(mean) }),
      make("td", { text: figure(run.mean(numbers.length, group)) }),
    );
    return rowElement;
  });
  const head = make(
    "tr",
    {},
    ...["Update", "Asked in", "Right", "", "Reward", "Tokens"].map((text) =>
      make("th", { scope: "col", text }),
    ),
  );
  byId("visits").replaceChildren(
    make("h2", {
      text: `Question ${question.prompt} of the ${questions.data}, ${asked(rows.length)}`,
    }),
    make("p", { class: "muted", text: firstRight(run, question.visits) }),
    make(
      "div",
      { class: "scroll visits", tabindex: "0", role: "region", "aria-label": "Each time it was asked" },
      make("table", {}, make("thead", {}, head), make("tbody", {}, ...rows)),
    ),
  );
  rows.at(-1).classList.add("chosen");
  return showGroup(byId("visit"), run, question.visits.at(-1));
}
