"""Trackers: no value is lost on the way, and a missing package is found before anything loads."""

import csv
import dataclasses
import json
import resource
import shutil
import struct
import sys

import numpy as np
import pytest
from helpers import mostly_long, read_log, run_training, stop_in_evaluation

from utils.base.errors import UserError
from utils.run import trackers

TRAIN = {"update": 1, "loss": 0.5, "kl": None, "rewards": {"int": 0.25}}
EVAL = {"update": 1, "split": "test", "em": 0.3, "em_subset": 200}

FAKE_WANDB = """
calls = []
Histogram = lambda values: ("histogram", sorted(values))
Table = lambda columns, data: ("table", columns, data)
class Run:
    id, starting_step = "abc", 0
    def define_metric(self, *a, **k): calls.append(("metric", a, k))
    def log(self, row, step): calls.append(("log", row, step))
    def finish(self): calls.append(("finish",))
def init(**k):
    calls.append(("init", k))
    run = Run()
    if k.get("resume") == "allow" and k.get("id") == Run.id:  # as W&B does, which tells by its step
        run.starting_step = 1 + max(call[2] for call in calls if call[0] == "log")
    return run
"""

FAKE_TENSORBOARDX = """
scalars = []
class SummaryWriter:
    def __init__(self, logdir): self.logdir = logdir
    def add_scalar(self, name, value, global_step): scalars.append((name, value, global_step))
    def close(self): scalars.append("closed")
"""


@pytest.fixture
def fake_package(monkeypatch, tmp_path):
    """Install a module of this source under this name, for one test."""

    def install(name, source):
        (tmp_path / "packages").mkdir(exist_ok=True)
        (tmp_path / "packages" / f"{name}.py").write_text(source)
        monkeypatch.syspath_prepend(tmp_path / "packages")
        monkeypatch.delitem(sys.modules, name, raising=False)
        return lambda: sys.modules.pop(name)

    return install


def rows(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_nothing_asked_for_keeps_nothing(tmp_path):
    tracker = trackers.make_tracker([], tmp_path / "run", "name", {})
    tracker.log(TRAIN)
    tracker.close()
    assert not (tmp_path / "run").exists()


def test_csv_keeps_training_and_evaluation_apart(tmp_path):
    tracker = trackers.make_tracker(["csv"], tmp_path / "run", "name", {})
    tracker.log(TRAIN)
    tracker.log(EVAL)
    tracker.log({**TRAIN, "update": 2, "kl": 0.125})
    tracker.close()
    training = rows(tmp_path / "run" / "metrics.csv")
    assert [(r["update"], r["kl"], r["rewards/int"]) for r in training] == [
        ("1", "", "0.25"),
        ("2", "0.125", "0.25"),
    ]
    evaluation = rows(tmp_path / "run" / "metrics_eval.csv")
    assert evaluation == [{"update": "1", "split": "test", "em": "0.3", "em_subset": "200"}]


def test_csv_gains_a_column_without_losing_a_row(tmp_path):
    tracker = trackers.CSVTracker(tmp_path)
    tracker.log({"update": 1, "loss": 0.5})
    tracker.log({"update": 2, "note": 'a,"b"\nc', "ids": [1, 2]})
    tracker.log({"update": 3, "loss": 0.25})
    assert rows(tmp_path / "metrics.csv") == [
        {"update": "1", "loss": "0.5", "note": "", "ids": ""},
        {"update": "2", "loss": "", "note": 'a,"b"\nc', "ids": json.dumps([1, 2])},
        {"update": "3", "loss": "0.25", "note": "", "ids": ""},
    ]
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.csv"]


def test_csv_of_a_resumed_run_continues(tmp_path):
    trackers.CSVTracker(tmp_path).log({"update": 1, "loss": 0.5})
    trackers.CSVTracker(tmp_path).log({"loss": 0.25, "update": 2})
    assert rows(tmp_path / "metrics.csv") == [
        {"update": "1", "loss": "0.5"},
        {"update": "2", "loss": "0.25"},
    ]


def test_wandb_gets_numbers_over_the_update(tmp_path, fake_package):
    forget = fake_package("wandb", FAKE_WANDB)
    tracker = trackers.make_tracker(["wandb"], tmp_path / "run", "my-run", {"seed": 3})
    tracker.log(TRAIN)
    tracker.log(EVAL)
    tracker.close()
    calls = forget().calls
    expected = {
        "project": "mlx-grpo",
        "name": "my-run",
        "config": {"seed": 3},
        "dir": str(tmp_path / "run"),
    }
    assert calls[0] == ("init", expected)
    assert ("metric", ("*",), {"step_metric": "update"}) in calls
    logged = [call[1:] for call in calls if call[0] == "log"]
    assert logged == [
        ({"update": 1, "train/loss": 0.5, "train/rewards/int": 0.25}, 3),
        ({"update": 1, "eval/test/em": 0.3, "eval/test/em_subset": 200.0}, 5),
    ]
    assert calls[-1] == ("finish",)


@pytest.mark.parametrize(
    ("settings", "variables", "place", "said"),
    [
        ({}, {}, {"project": "mlx-grpo"}, "project mlx-grpo (the default)"),
        (
            {"wandb_project": "sums", "wandb_entity": "ann"},
            {"WANDB_PROJECT": "others", "WANDB_ENTITY": "ann"},
            {"project": "sums", "entity": "ann"},
            "project sums (wandb_project; WANDB_PROJECT does not count), entity ann (wandb_entity)",
        ),
        (
            {"wandb_project": "", "wandb_entity": ""},
            {"WANDB_PROJECT": "others", "WANDB_ENTITY": "team"},
            {"project": "others", "entity": "team"},
            "project others (WANDB_PROJECT), entity team (WANDB_ENTITY)",
        ),
    ],
)
def test_a_run_goes_to_the_project_that_is_set(
    settings, variables, place, said, tmp_path, fake_package, monkeypatch, capsys
):
    for name in ("WANDB_PROJECT", "WANDB_ENTITY"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    forget = fake_package("wandb", FAKE_WANDB)
    trackers.make_tracker(["wandb"], tmp_path / "run", "my-run", settings).close()
    _, given = forget().calls[0]
    assert {name: given[name] for name in ("project", "entity") if name in given} == place
    assert capsys.readouterr().out == f"wandb     {said}\n"


def test_a_resumed_run_goes_on_with_its_run_at_wandb(tmp_path, fake_package):
    """What was sent before the kill is not sent again; what was not is."""
    forget = fake_package("wandb", FAKE_WANDB)
    records = [{"update": n, "loss": n / 8} for n in (1, 2, 3)]
    evaluation = {"update": 2, "split": "test", "em": 0.5}
    killed = trackers.make_tracker(["wandb"], tmp_path, "my-run", {})
    killed.log(records[0])
    killed.log(records[1])
    resumed = trackers.make_tracker(["wandb"], tmp_path, "my-run", {}, since=1, records=records[:1])
    for record in (records[1], evaluation, records[2]):
        resumed.log(record)
    calls = forget().calls
    assert [call[1].get("id") for call in calls if call[0] == "init"] == [None, "abc"]
    logged = [call[1] for call in calls if call[0] == "log"]
    assert [sorted(row.items()) for row in logged] == [
        [("train/loss", 0.125), ("update", 1)],
        [("train/loss", 0.25), ("update", 2)],
        [("eval/test/em", 0.5), ("update", 2)],
        [("train/loss", 0.375), ("update", 3)],
    ]


def test_fan_out_passes_on_and_closes_all_even_after_an_error(tmp_path, fake_package):
    forget = fake_package("tensorboardX", FAKE_TENSORBOARDX)
    tracker = trackers.make_tracker(["csv", "tensorboard", "csv"], tmp_path, "name", {})
    assert len(tracker.trackers) == 2
    tracker.log(EVAL)
    tracker.trackers[0].close = lambda: 1 / 0
    with pytest.raises(ZeroDivisionError):
        tracker.close()
    assert forget().scalars == [
        ("eval/test/em", 0.3, 1),
        ("eval/test/em_subset", 200.0, 1),
        "closed",
    ]
    assert len(rows(tmp_path / "metrics_eval.csv")) == 1


def shown_by_tensorboard(folder):
    """(tag, step, value) as TensorBoard shows them: the start of a session voids what was written
    from its step on (event_accumulator.py, _CheckForRestartAndMaybePurge)."""
    event_pb2 = pytest.importorskip("tensorboardX.proto.event_pb2")
    found = []
    for path in sorted(folder.iterdir()):
        data = path.read_bytes()
        while data:  # length (8 bytes), its checksum (4), the event, its checksum (4)
            (length,) = struct.unpack("<Q", data[:8])
            event = event_pb2.Event.FromString(data[12 : 12 + length])
            if event.session_log.status == event_pb2.SessionLog.START:
                found = [known for known in found if known[1] < event.step]
            found += [(v.tag, event.step, v.simple_value) for v in event.summary.value]
            data = data[16 + length :]
    return found


def test_tensorboard_event_file_holds_the_values(tmp_path, capsys):
    pytest.importorskip("tensorboardX")
    tracker = trackers.make_tracker(["tensorboard"], tmp_path, "name", {})
    said = capsys.readouterr().out
    assert said == f"view      uvx tensorboard --logdir {tmp_path / 'tensorboard'}\n"
    tracker.log({**TRAIN, "update": 7})
    tracker.close()
    shown = shown_by_tensorboard(tmp_path / "tensorboard")
    assert shown == [("train/loss", 7, 0.5), ("train/rewards/int", 7, 0.25)]


def killed_after_three(output, kept):
    """A `prepare` of run_training: killed after update 3, the checkpoints after `kept` are lost."""

    def prepare(trainer):
        def generate(rows, call=trainer.generate_responses):
            if trainer.update_step == 3:
                for update in range(kept + 1, 4):
                    shutil.rmtree(output / f"checkpoint-{2 * update}")
                raise KeyboardInterrupt  # as a kill does: nothing is saved
            return call(rows)

        trainer.generate_responses = generate

    return prepare


@pytest.mark.parametrize("kept", mostly_long([0, 2, 3], 2))
def test_without_a_log_a_resumed_run_tracks_nothing_twice(model_dir, data_dir, tmp_path, kept):
    pytest.importorskip("tensorboardX")
    settings = {"max_updates": 4, "eval_samples": 3, "eval_steps": 2, "max_new_tokens": 2}
    settings |= {"save_steps": 2, "save_total_limit": 0, "log_jsonl": False}
    settings["report_to"] = ["csv", "tensorboard"]
    run_training(model_dir, data_dir, tmp_path / "whole", **settings)
    output = tmp_path / "o"
    with pytest.raises(KeyboardInterrupt):
        run_training(model_dir, data_dir, output, killed_after_three(output, kept), **settings)
    assert run_training(model_dir, data_dir, output, resume="auto", **settings)[0] == 0
    for name in ("metrics.csv", "metrics_eval.csv"):
        with (output / name).open() as ours, (tmp_path / "whole" / name).open() as whole:
            updates, expected = ([r["update"] for r in csv.DictReader(f)] for f in (ours, whole))
        assert updates == expected
    ours, expected = (
        [row[:2] for row in shown_by_tensorboard(folder / "tensorboard")]
        for folder in (output, tmp_path / "whole")
    )
    assert ours == expected


def test_without_a_log_what_an_interrupted_evaluation_follows_is_tracked_once(
    model_dir, data_dir, tmp_path
):
    settings = {"max_updates": 4, "eval_samples": 3, "eval_steps": 2, "max_new_tokens": 2}
    settings |= {"log_jsonl": False, "report_to": ["csv"]}

    output = tmp_path / "o"
    assert run_training(model_dir, data_dir, output, stop_in_evaluation(3), **settings)[0] == 130
    assert run_training(model_dir, data_dir, output, resume="auto", **settings)[0] == 0
    for name, updates in ("metrics.csv", "1234"), ("metrics_eval.csv", "01234"):
        with (output / name).open() as file:
            assert [row["update"] for row in csv.DictReader(file)] == list(updates)


@pytest.mark.parametrize("kept", mostly_long([0, 1, 2, 3], 2))
def test_tensorboard_of_a_resumed_run_shows_each_record_once(model_dir, data_dir, tmp_path, kept):
    """Killed after update 3, and gone on with from there or before (0: there is no checkpoint)."""
    pytest.importorskip("tensorboardX")
    output = tmp_path / "o"
    settings = {"max_updates": 4, "eval_samples": 3, "eval_steps": 2, "max_new_tokens": 2}
    settings |= {"save_steps": 2, "save_total_limit": 0, "report_to": ["tensorboard"]}

    with pytest.raises(KeyboardInterrupt):
        run_training(model_dir, data_dir, output, killed_after_three(output, kept), **settings)
    before = shown_by_tensorboard(output / "tensorboard")
    assert max(step for _, step, _ in before) == 3
    assert run_training(model_dir, data_dir, output, resume="auto", **settings)[0] == 0
    shown = shown_by_tensorboard(output / "tensorboard")
    expected = []
    for record in read_log(output):
        part = f"eval/{record['split']}/em" if "split" in record else "train/loss"
        value = record[part.rpartition("/")[2]]
        expected.append((part, record["update"], pytest.approx(value, abs=1e-6)))
    assert [row for row in shown if row[0] in ("eval/test/em", "train/loss")] == expected
    assert len({row[:2] for row in shown}) == len(shown), "nothing twice"


def test_unknown_name_is_refused_with_the_nearest():
    with pytest.raises(UserError, match="did you mean 'tensorboard'"):
        trackers.check_available(["csv", "tensorbord"])


def test_missing_package_names_its_extra(monkeypatch):
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda name: None)
    trackers.check_available(["csv"])
    with pytest.raises(ImportError, match="uv sync --extra tensorboard, or pip install") as info:
        trackers.make_tracker(["tensorboard"], None, "name", {})
    assert "'.[tensorboard]'" in str(info.value)


def test_a_folder_of_an_earlier_run_is_no_package(monkeypatch, tmp_path):
    (tmp_path / "wandb" / "latest-run").mkdir(parents=True)
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    with pytest.raises(trackers.MissingExtra, match="--extra wandb"):
        trackers.check_available(["wandb"])


def test_a_resumed_run_reads_its_log_whatever_is_in_it(tmp_path):
    """Names and notes may hold what Python takes for the end of a line, and JSON does not."""
    log = tmp_path / "training_log.jsonl"
    record = {"update": 1, "metric/a\u2028b": 1.0}
    log.write_text(json.dumps(record, ensure_ascii=False) + "\n", encoding="utf-8")
    tracker = trackers.CSVTracker(tmp_path)
    tracker.log(record)
    tracker.log(record | {"update": 2})
    metrics = tmp_path / "metrics.csv"
    metrics.write_bytes(metrics.read_bytes() + b"\xff\n")
    records, end = trackers.read_log(log)
    assert (records, end + 1) == ([record], log.stat().st_size)
    trackers.rewind(tmp_path, records, -1)
    with metrics.open(newline="", encoding="utf-8") as file:
        assert [row["update"] for row in csv.DictReader(file)] == ["1"]


PICTURES = trackers.Pictures(
    7,
    {"rewards": np.array([0.0, 2.0]), "lengths": np.array([3, 5])},
    ["completion", "reward"],
    [["<script>alert(1)</script>\n# no heading", 2.0], ["b", None]],
)


def test_pictures_come_every_so_many_updates(model_dir, data_dir, tmp_path, fake_package):
    forget = fake_package("wandb", FAKE_WANDB)
    settings = {"max_updates": 5, "plot_every": 2, "report_to": ["wandb"], "logging_steps": 3}
    code, trainer = run_training(model_dir, data_dir, tmp_path / "o", **settings)
    logged = [call[1:] for call in forget().calls if call[0] == "log"]
    assert [step for _, step in logged] == sorted(step for _, step in logged)
    shown = [row for row, _ in logged if "train/completions" in row]
    assert (code, [row["update"] for row in shown]) == (0, [2, 4])
    for row in shown:
        (_, columns, data), (_, rewards) = row["train/completions"], row["train/rewards"]
        assert len(data) == len(rewards) == 8
        table = [dict(zip(columns, cells, strict=True)) for cells in data]
        assert sorted(cells["reward"] for cells in table) == rewards
        assert sorted(cells["length"] for cells in table) == row["train/lengths"][1]
        assert {cells["update"] for cells in table} == {row["update"]}
        questions = {question["question"] for question in trainer.train_dataset}
        assert {cells["question"] for cells in table} < questions


def test_completions_without_a_reward_have_an_empty_cell_and_no_place_in_the_histogram(
    model_dir, data_dir, tmp_path, fake_package
):
    forget = fake_package("wandb", FAKE_WANDB)
    settings = {"max_updates": 1, "plot_every": 1, "report_to": ["wandb"]}
    settings["reward_funcs"] = ["helpers:digest", "test_trackers:none"]
    run_training(model_dir, data_dir, tmp_path / "o", **settings)
    logged = [call[1] for call in forget().calls if call[0] == "log"]
    (row,) = [values for values in logged if "train/completions" in values]
    assert "train/rewards/test_trackers:none" not in row
    assert len(row["train/rewards/helpers:digest"][1]) == 8
    assert {cells[-1] for cells in row["train/completions"][2]} == {None}


def none(completions, **_):
    return [None] * len(completions)


def test_tensorboard_shows_text_as_it_stands_and_histograms(tmp_path):
    event_pb2 = pytest.importorskip("tensorboardX.proto.event_pb2")
    tracker = trackers.TensorBoardTracker(tmp_path, 0, [])
    tracker.show(PICTURES)
    tracker.close()
    found = {}
    (path,) = (tmp_path / "tensorboard").glob("events*")
    data = path.read_bytes()
    while data:
        (length,) = struct.unpack("<Q", data[:8])
        event = event_pb2.Event.FromString(data[12 : 12 + length])
        found |= {value.tag: (event.step, value) for value in event.summary.value}
        data = data[16 + length :]
    step, histogram = found["train/rewards"]
    assert (step, histogram.histo.num, histogram.histo.sum) == (7, 2, 2)
    step, text = found["train/completions/text_summary"]
    (text,) = text.tensor.string_val
    assert text.decode().splitlines()[:3] == [
        "    completion: <script>alert(1)</script>",
        "    # no heading",
        "    reward: 2.0",
    ]


def fails(*_, **__):
    raise ConnectionError("no network")


def leaves(*_, **__):
    raise SystemExit(3)


@pytest.mark.parametrize("where", ["init", "log", "finish", "define_metric"])
@pytest.mark.parametrize("how", [fails, leaves])
def test_a_tracker_that_fails_stops_no_run_and_says_so_once(
    model_dir, data_dir, tmp_path, fake_package, capsys, where, how
):
    forget = fake_package("wandb", FAKE_WANDB)
    import wandb

    setattr(wandb if where == "init" else wandb.Run, where, how)
    settings = {"max_updates": 3, "report_to": ["csv", "wandb"], "plot_every": 1}
    code, _ = run_training(model_dir, data_dir, tmp_path / "o", **settings)
    forget()
    out = capsys.readouterr().out
    what = "no network" if how is fails else "sys.exit(3)"
    assert (code, out.count("report_to = 'wandb' failed"), out.count(what)) == (0, 1, 1)
    assert len(rows(tmp_path / "o" / "metrics.csv")) == 3, "the others go on"
    notes = [note for record in read_log(tmp_path / "o") for note in record.get("notes", [])]
    assert any(what in note for note in notes) == (where != "finish")


def test_a_row_that_the_disk_refuses_spoils_no_other(tmp_path):
    notes = []
    tracker = trackers.make_tracker(["csv"], tmp_path, "name", {}, note=notes.append)
    tracker.log(TRAIN)
    path = tmp_path / "metrics.csv"
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 3, limits[1]))
        tracker.log({**TRAIN, "update": 2})
        tracker.log({**TRAIN, "update": 3})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    tracker.log({**TRAIN, "update": 4})
    assert [row["update"] for row in rows(path)] == ["1", "4"]
    assert len(notes) == 1
    assert "File too large" in notes[0]


def test_wandb_itself_takes_it_all_offline(tmp_path, monkeypatch):
    """The package, where it is installed: with a run that is gone on with."""
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    notes = []
    for since in (0, 7):
        tracker = trackers.make_tracker(["wandb"], tmp_path, "n", {}, since, note=notes.append)
        tracker.log({**TRAIN, "update": 7})
        tracker.show(PICTURES)
        tracker.log({**EVAL, "update": 7})
        tracker.close()
    assert notes == []
    (table,) = {p.read_text() for p in tmp_path.rglob("completions*.table.json")}
    assert json.loads(table)["data"] == PICTURES.rows


def test_trackio_itself_takes_it_all_on_this_machine(tmp_path, monkeypatch, capsys):
    """The package, where it is installed: each record once, also where a run is gone on with."""
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    trackio = pytest.importorskip("trackio")
    notes = []
    for since, update in ((0, 6), (7, 7)):
        tracker = trackers.make_tracker(["trackio"], tmp_path, "n", {}, since, note=notes.append)
        for again in range(6, update + 1):
            tracker.log({**TRAIN, "update": again})
            tracker.show(dataclasses.replace(PICTURES, update=again))
            tracker.log({**EVAL, "update": again})
        tracker.close()
    assert notes == []
    (run,) = trackio.Api().runs("mlx-grpo")
    rows = trackio.SQLiteStorage.get_logs("mlx-grpo", run.name, run_id=run.id)
    logged = [(row["step"], key) for row in rows for key in row if "/" in key]
    assert sorted(logged) == sorted(
        (update, key)
        for update in (6, 7)
        for key in (
            *("train/loss", "train/rewards/int", "eval/test/em", "eval/test/em_subset"),
            *("train/rewards", "train/lengths", "train/completions"),
        )
    )
