"""Several ranks train as one process does, and end together."""

import json
import os
import shutil
import signal

import mlx.core as mx
import numpy as np
import pytest
from conftest import load_script
from helpers import quiet, timeless, write_toml
from several import ended, start

from utils.device import team

grpo = load_script()
WORKER = os.path.join(os.path.dirname(os.path.dirname(__file__)), "several.py")
REWARDS = """
import os, signal, time

def digest(completion_ids, log_metric, **_):
    found = [float(sum(n * i for n, i in enumerate(ids, 1)) % 101) for ids in completion_ids]
    for value in found:
        log_metric("digest", value)
    return found

def rare(completion_ids, **_):
    return [float(sum(ids) % 5 == 0) for ids in completion_ids]

def at(trainer_state, then):
    if trainer_state.global_step == 1 and os.environ.get("MLX_RANK") == "1":
        then()

def fails(completion_ids, trainer_state, **_):
    at(trainer_state, lambda: 1 / 0)
    return [float(len(ids)) for ids in completion_ids]

def interrupted(completion_ids, trainer_state, **_):
    at(trainer_state, lambda: os.kill(os.getpid(), signal.SIGTERM))
    return [float(len(ids)) for ids in completion_ids]

def killed(completion_ids, trainer_state, **_):
    at(trainer_state, lambda: os.kill(os.getpid(), signal.SIGKILL))
    return [float(len(ids)) for ids in completion_ids]

def stopped(completion_ids, trainer_state, **_):
    at(trainer_state, lambda: os.kill(os.getpid(), signal.SIGSTOP))
    return [float(len(ids)) for ids in completion_ids]
"""
BASE = {
    "dtype": "float32",
    "learning_rate": 1e-4,  # AdamW makes as large a step of rounding as of a gradient
    "eval_samples": 5,
    "eval_subset_size": 0,
    "eval_every_updates": 0,
    "max_train_samples": 7,
    "gradient_accumulation_steps": 3,  # and one prompt in the last update
    "num_epochs": 1,
    "lora_layers": -1,
    "report": False,
}
REFERENCE = {"kl_coeff": 0.1}
FEATURES = {
    "plain": {},
    "dynamic_sampling": {"dynamic_sampling": 2, "reward_funcs": ["rewards.py:rare"]},
    "weights": {"curriculum": "weights", "curriculum_column": "weight"},
    "easy_to_hard": {"curriculum": "easy_to_hard", "curriculum_column": "weight"},
    "kl_target": {**REFERENCE, "kl_target": 0.01, "kl_horizon": 100},
    "kl_in_reward": {**REFERENCE, "kl_placement": "reward"},
    "moving_reference": {**REFERENCE, "ref_sync_updates": 1},
    "num_iterations": {"num_iterations": 2},
    "lora": {"train_type": "lora", "lora_learning_rate": 1e-4, **REFERENCE},
    "entropy": {"entropy_coeff": 0.01, "top_entropy_quantile": 0.5},
    "running_norm": {"reward_running_norm": True, "advantage_estimator": "rloo"},
    "dapo": {
        "loss_type": "dapo",
        "advantage_estimator": "gdpo",
        "reward_funcs": ["rewards.py:digest", "rewards.py:rare"],
    },
    "whitened": {"advantage_estimator": "reinforce_baseline"},
    "stale": {"sync_every_updates": 2},
    "eval_metric": {"eval_metric": "rewards.py:digest"},
}


@pytest.fixture(scope="module")
def questions(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks-data")
    for split, count in (("train", 24), ("test", 10)):
        rows = [
            {"question": f"What is {n} + {n % 3}?", "answer": f"#### {n}", "weight": 1.0 + n % 4}
            for n in range(count)
        ]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "rewards.py").write_text(REWARDS)
    return folder


def settings_file(folder, model, questions, **settings):
    """A TOML file in a folder of its own, and where its run writes."""
    folder.mkdir(parents=True)
    values = {
        "model_name": str(model),
        "dataset": str(questions),
        "output_dir": str(folder / "run"),
        "reward_funcs": ["rewards.py:digest"],
        **settings,
    }
    values["reward_funcs"] = [str(questions / name) for name in values["reward_funcs"]]
    if "eval_metric" in values:
        values["eval_metric"] = str(questions / values["eval_metric"])
    if "train_type" in settings:
        values = {**{k: v for k, v in values.items() if k != "learning_rate"}}
    else:
        values.pop("lora_layers", None)
    return write_toml(folder, quiet(values) | values), folder / "run"


def weights(run):
    return mx.load(str(run / "final" / "model.safetensors"))


def assert_equal(one, other):
    """Logs and weights, but for rounding."""
    records = timeless(one), timeless(other)
    assert len(records[0]) == len(records[1]) > 3
    for mine, theirs in zip(*records, strict=True):
        assert mine.keys() == theirs.keys()
        for name, value in mine.items():
            if isinstance(value, float):
                assert theirs[name] == pytest.approx(value, rel=1e-5, abs=2e-6), name
            else:
                assert theirs[name] == value, name
    mine, theirs = weights(one), weights(other)
    for name, value in mine.items():
        assert np.abs(np.array(value - theirs[name])).max() < 1e-5, name


def train(folder, model, questions, names, sizes):
    """Runs of features by one process and by several; name -> folder, for each size."""
    found = {}
    for size in sizes:
        files = {
            name: settings_file(
                folder / f"{size}" / name, model, questions, **BASE | FEATURES[name]
            )
            for name in names
        }
        listed = folder / f"{size}.json"
        listed.write_text(json.dumps([["--config", path] for path, _ in files.values()]))
        if size == 1:
            assert [grpo.main(["--config", path]) for path, _ in files.values()] == [0] * len(files)
        else:
            assert ended(start(size, folder, WORKER, listed)) == [0] * size, (
                folder / "rank-0.txt"
            ).read_text()
        found[size] = {name: run for name, (_, run) in files.items()}
    return found


def test_two_ranks_train_as_one_process(tmp_path, model_dir, questions):
    runs = train(tmp_path, model_dir, questions, ["plain"], [1, 2])
    assert_equal(runs[1]["plain"], runs[2]["plain"])
    assert (tmp_path / "rank-1.txt").read_text() == ""  # rank 0 alone speaks


@pytest.mark.long
@pytest.mark.parametrize("size", [2, 3])
def test_every_feature_stays_in_step(tmp_path, model_dir, questions, size):
    """All with 2 ranks; every fourth with more, for each takes as long."""
    names = [*FEATURES][:: 1 if size == 2 else 4]
    runs = train(tmp_path, model_dir, questions, names, [1, size])
    for name in names:
        assert_equal(runs[1][name], runs[size][name])


# What ends one rank ends all.


def settings_of(tmp_path, model_dir, questions, function, **more):
    settings = {**BASE, "eval_samples": 0, "reward_funcs": [f"rewards.py:{function}"], **more}
    return settings_file(tmp_path / "settings", model_dir, questions, **settings)


@pytest.mark.parametrize(
    ("function", "code", "told"),
    [
        ("fails", 1, "division by zero"),
        pytest.param("interrupted", 143, "reason    SIGTERM", marks=pytest.mark.long),
    ],
)
def test_one_ends_all_with_what_is_saved(tmp_path, model_dir, questions, function, code, told):
    path, run = settings_of(tmp_path, model_dir, questions, function)
    started = start(3, tmp_path, "mlx-grpo.py", "--config", path)
    assert ended(started) == [code] * 3
    said = (tmp_path / "rank-0.txt").read_text()
    assert told in said
    # The first update was done by all, and the second by none.
    state = json.loads((run / "checkpoint-3" / "trainer_state.json").read_text())
    assert state["update_step"] == 1


@pytest.mark.long
@pytest.mark.parametrize(
    ("function", "told"), [("killed", "rank 1 is gone"), ("stopped", "rank 1 has")]
)
def test_a_lost_rank_ends_the_others(tmp_path, model_dir, questions, function, told):
    path, _ = settings_of(tmp_path, model_dir, questions, function, rank_timeout=3.0)
    started = start(3, tmp_path, "mlx-grpo.py", "--config", path)
    assert ended([started[0], started[2]]) == [1, 1]
    for rank in (0, 2):
        assert told in (tmp_path / f"rank-{rank}.txt").read_text()
    started[1].send_signal(signal.SIGCONT)  # it wakes up alone, and ends as well
    assert ended([started[1]]) == [-signal.SIGKILL if function == "killed" else 1]


def test_a_rank_that_does_not_come_is_named(tmp_path, model_dir, questions):
    path, run = settings_of(tmp_path, model_dir, questions, "digest", rank_timeout=1.0)
    started = start(3, tmp_path, "mlx-grpo.py", "--config", path, ranks=[0])
    assert ended(started) == [2]
    assert "ranks 1, 2 did not come within 1 s" in (tmp_path / "rank-0.txt").read_text()
    assert not run.exists()


@pytest.mark.long
def test_another_number_of_ranks_goes_on_to_the_same_end(tmp_path, model_dir, questions):
    settings = {**BASE, "save_steps": 3}
    path, whole = settings_file(tmp_path / "whole", model_dir, questions, **settings)
    assert grpo.main(["--config", path]) == 0
    path, run = settings_file(tmp_path / "begun", model_dir, questions, **settings)
    begun = "mlx-grpo.py", "--config", path
    assert ended(start(2, tmp_path, *begun, "--set", "max_hours=1e-9")) == [0, 0]
    for saved in ("final", "checkpoint-6", "checkpoint-7"):
        shutil.rmtree(run / saved, ignore_errors=True)
    assert ended(start(3, tmp_path, *begun, "--resume")) == [0, 0, 0]
    assert_equal(whole, run)


# Where ranks are.


def test_the_place_is_what_mlx_launch_says(tmp_path):
    hosts = tmp_path / "hosts"
    hosts.write_text('[["10.0.0.1:32323"], ["10.0.0.2:32324"]]')
    place = team.Place({"MLX_RANK": "1", "MLX_HOSTFILE": str(hosts)})
    assert (place.backend, place.rank, place.size) == ("ring", 1, 2)
    assert place.address == ("10.0.0.1", 32322)
    nccl = {"NCCL_HOST_IP": "10.0.0.1", "NCCL_PORT": "12345", "MLX_WORLD_SIZE": "8"}
    place = team.Place({"MLX_RANK": "0", **nccl})
    assert (place.backend, place.size, place.address) == ("nccl", 8, ("10.0.0.1", 12344))
    hosts.write_text('[[null, "rdma_en2"], ["rdma_en2", null]]')
    jaccl = {"MLX_IBV_DEVICES": str(hosts), "MLX_JACCL_COORDINATOR": "10.0.0.1:32323"}
    place = team.Place({"MLX_RANK": "0", **jaccl})
    assert (place.backend, place.size, place.address) == ("jaccl", 2, ("10.0.0.1", 32322))
    with pytest.raises(team.UserError, match="--ranks or --hostfile"):
        team.Place({"MLX_RANK": "0"})


def test_arrays_are_summed_in_pieces(monkeypatch):
    monkeypatch.setattr(team, "PIECE", 10)
    arrays = {name: mx.zeros(size) for name, size in zip("abcde", (4, 6, 1, 30, 2), strict=True)}
    assert team.pieces(arrays) == [["a"], ["b", "c"], ["d", "e"]]
