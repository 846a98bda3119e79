"""The comparison with peers measures the work it says, and its tables do the right arithmetic."""

import argparse
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import compare, learning_curves, peers, targets, trl_curves

ROOT = Path(__file__).resolve().parents[2]
CELL = {
    "tool": "ours",
    "setting": "best cpu",
    "option": [],
    "shape": "tiny",
    "dtype": "float32",
    "bits": 0,
    "train_type": "full",
    "prompts": 2,
    "group": 3,
    "prompt_tokens": 40,
    "tokens": 9,
    "updates": 2,
    "blas": "fast",
    "python": "",
    "run": "test",
}


@pytest.mark.parametrize(
    ("tool", "setting"),
    [("ours", "best cpu"), pytest.param("mlx-lm", "best", marks=pytest.mark.long)],
)
def test_a_cell_samples_every_token_it_is_asked_for(monkeypatch, tmp_path, tool, setting):
    monkeypatch.setattr(compare, "CACHE", tmp_path)
    cell = argparse.Namespace(**{**CELL, "tool": tool, "setting": setting})
    record = compare.measure(cell)
    assert record["sampled"] == [2 * 3 * 9] * 2
    assert len(record["raw"]) == 2
    rate = record["sampled"][0] / record["rollout"]
    assert record["tokens_per_second"] == pytest.approx(rate, rel=0.5)
    if tool == "ours":
        assert record["sampler_mismatch"] < 1e-4
        for update in record["raw"]:
            stages = sum(update[stage] for stage in peers.STAGES)
            assert stages == pytest.approx(update["seconds"], abs=1e-3)
            assert min(update[stage] for stage in peers.STAGES) > 0


def test_a_stage_within_another_is_charged_once():
    clock = peers.Clock(lambda: None)
    clock.begin()
    now = iter([0.0, 1.0, 3.0, 10.0])  # outer starts, inner starts, inner ends, outer ends

    def tick():
        return next(now)

    inner = clock.timed("rollout", lambda: None)
    outer = clock.timed("scoring", inner, within="rollout")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(peers.time, "perf_counter", tick)
        outer()
    assert clock.updates[-1]["rollout"] == 2.0
    assert clock.updates[-1]["scoring"] == 8.0


def record_of(tool, setting="best", **values):
    work = {"run": "r", "device": "d", "shape": "s", "dtype": "bfloat16", "train_type": "full"}
    work |= {
        "bits": 0,
        "options": {},
        "prompts": 4,
        "group": 16,
        "prompt_tokens": 150,
        "tokens": 256,
        "blas": None,
    }
    stages = dict.fromkeys((*peers.STAGES, "seconds", "tokens_per_second"))
    more = {
        "parameters": 10**9,
        "peak_bytes": 10**9,
        "raw": [{}],
        "versions": {"torch": "1"},
        "command": "c",
    }
    return {"tool": tool, "setting": setting, **work, **stages, **more, **values}


def test_limits_are_weights_per_step_and_six_flops_per_parameter_and_token():
    limits = record_of("limits", copy_bytes_per_second=4e12, flops_per_second=800e12)
    ours = record_of("ours", parameters=1.5e9, weight_bytes=3e9)
    found = compare.limits_for(ours, [limits, ours])
    assert found["rollout"] == pytest.approx(256 * 3e9 / 4e12)
    assert found["tokens_per_second"] == pytest.approx(64 / (3e9 / 4e12))
    assert found["gradient"] == pytest.approx(6 * 1.5e9 * 64 * 406 / 800e12)
    other_run = record_of("limits", copy_bytes_per_second=1, flops_per_second=1, run="q")
    assert compare.limits_for(ours, [other_run]) is None


def test_ratios_are_against_our_fastest_best_setting_of_the_same_run():
    slow = record_of("ours", "best", seconds=9.0, tokens_per_second=50.0)
    ours = record_of("ours", "best cpu", seconds=2.0, tokens_per_second=100.0)
    trl = record_of("trl", seconds=5.0, tokens_per_second=40.0)
    elsewhere = record_of("trl", run="q", seconds=5.0, tokens_per_second=40.0)
    lines = compare.tables([slow, ours, trl, elsewhere])
    rows = [line.split(" | ") for line in lines if line.startswith("| trl, best")]
    assert [rows[0][2], rows[0][8]] == ["2.50", "2.50"]
    assert [rows[1][2], rows[1][8]] == ["", ""]


def test_the_newest_record_of_a_cell_counts():
    old, new = record_of("trl", seconds=5.0), record_of("trl", seconds=6.0)
    assert compare.newest([old, record_of("ours"), new])[0]["seconds"] == 6.0


def test_the_command_leaves_out_interpreter_and_run(monkeypatch):
    words = ["x", "--tool", "trl", "--python", "/p", "--setting", "best float32", "--run", "r"]
    monkeypatch.setattr(sys, "argv", words)
    assert compare.command_line() == "benchmarks/compare.py --tool trl --setting 'best float32'"


def test_a_target_is_met_only_by_both_its_parts():
    gpu = {"device": "NVIDIA H200", "shape": "1.5b"}
    ours = record_of("ours", seconds=1.9, tokens_per_second=12_000.0, **gpu)
    other = record_of("mlx-lm", tokens_per_second=8_000.0, **gpu)
    trl = record_of("trl", seconds=5.0, **gpu)
    slow = record_of("trl", "default", seconds=9.0, **gpu)  # the fastest of TRL's counts
    rows = targets.table([ours, other, trl, slow])
    assert rows[3].endswith("12,000 tok/s, 1.50x (8,000) (run r) | met |")
    assert rows[4].endswith("1.90 s, 2.63x (TRL 5.00 s) (run r) | met |")
    assert "not measured" in rows[5]
    close = record_of("mlx-lm", tokens_per_second=9_000.0, **gpu)
    assert "**not met**" in targets.table([ours, close])[3]


def test_targets_are_met_within_a_run():
    gpu = {"device": "NVIDIA H200", "shape": "1.5b"}
    fast = record_of("ours", run="a", seconds=1.5, **gpu)
    near = record_of("trl", run="a", seconds=3.0, **gpu)
    slow = record_of("ours", run="b", seconds=3.0, **gpu)
    far = record_of("trl", run="b", seconds=9.0, **gpu)
    alone = record_of("ours", run="c", seconds=0.1, **gpu)
    cpu = record_of("ours", run="d", device="x86, 2 cores")
    records = [fast, near, slow, far, alone, cpu]
    assert targets.runs(records, on_cpu=False) == [[alone], [slow, far], [fast, near]]
    assert targets.runs(records, on_cpu=True) == [[cpu]]
    row = targets.table(records)[4]
    assert "3.00 s, 3.00x (TRL 9.00 s) (run b); 1.50 s, 2.00x (TRL 3.00 s) (run a)" in row
    assert row.endswith("| **not met** |"), "fast enough in one run, far enough ahead in the other"
    both = [fast, record_of("trl", run="a", seconds=9.0, **gpu), slow, far]
    assert targets.table(both)[4].endswith("| met |")


def test_results_are_generated_from_the_records():
    before = compare.results.RESULTS.read_text(encoding="utf-8")
    command = [sys.executable, "benchmarks/compare.py", "--table-only"]
    subprocess.run(command, cwd=ROOT, check=True)
    after = compare.results.RESULTS.read_text(encoding="utf-8")
    compare.results.RESULTS.write_text(before, encoding="utf-8")
    assert after == before


@pytest.mark.parametrize(
    ("module", "tables"),
    [(trl_curves, ["trl-curves"]), (learning_curves, ["rl-results", "learning"])],
    ids=["trl", "learning"],
)
def test_curves_are_tabled_from_the_records(monkeypatch, module, tables):
    """Every table of theirs, in every file that has one."""
    files = [compare.results.RESULTS, ROOT / "README.md", ROOT / "models/tiny-math/README.md"]
    before = [path.read_text(encoding="utf-8") for path in files]
    written = []
    write = compare.results.write_section
    monkeypatch.setattr(
        compare.results, "write_section", lambda *words: (written.append(words[0]), write(*words))
    )
    monkeypatch.setattr(module, "draw", lambda records: None)  # needs matplotlib
    monkeypatch.setattr(sys, "argv", ["benchmark", "--draw-only"])
    module.main()
    assert written == tables
    assert [path.read_text(encoding="utf-8") for path in files] == before


def test_area_is_the_mean_height_of_a_curve():
    assert trl_curves.area([(0, 0.0), (10, 1.0)]) == 0.5
    assert trl_curves.area([(0, 1.0), (10, 1.0), (30, 0.0)]) == pytest.approx(2 / 3)


def test_trl_gets_the_prompts_and_rates_of_our_run(tmp_path):
    job = trl_curves.job_for_trl(3, tmp_path)
    trainer = trl_curves.our_trainer(trl_curves.MODEL, 3, tmp_path)
    updates = job["config"]["max_steps"]
    assert updates == trainer.total_updates
    first = [trainer.train_dataset[i] for i in trainer.prompts_of_update(0)]
    assert job["ids"][:8] == [row["prompt_ids"] for row in first]
    assert job["answers"][:8] == [row["answer"] for row in first]
    assert len(job["ids"]) == 8 * updates
    assert job["lr"][29] == trainer.peak_learning_rate == max(job["lr"])
    encoded = [trainer.tokenizer.encode(text, add_special_tokens=False) for text in job["texts"]]
    assert encoded == job["ids"]
