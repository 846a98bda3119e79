"""The order of the questions: shuffled, as they are, easy to hard, weighted, mixed."""

import json
import math

import numpy as np
import pytest
from helpers import make_config, make_trainer
from hypothesis import given, settings
from hypothesis import strategies as st

from utils.base.errors import UserError
from utils.data import order as curriculum

WEIGHTS = st.lists(st.floats(0, 100), min_size=1, max_size=60).filter(lambda w: sum(w) > 1e-3)


@settings(max_examples=200, deadline=None)
@given(WEIGHTS, st.integers(0, 2**32))
def test_each_row_comes_as_often_as_its_share_rounded_up_or_down(weights, seed):
    weights = np.array(weights)
    order = curriculum.weighted_order(np.random.default_rng(seed), weights)
    counts = np.bincount(order, minlength=len(weights))
    assert counts.sum() == len(weights)
    share = len(weights) * weights / weights.sum()
    assert (np.abs(counts - share) < 1 + 1e-6).all()
    assert (counts[weights == 0] == 0).all()


def test_the_mean_over_epochs_is_the_share():
    weights = np.array([0.5, 1.0, 2.0, 0.1, 5.0])
    orders = [curriculum.weighted_order(np.random.default_rng(n), weights) for n in range(4000)]
    counts = np.bincount(np.concatenate(orders), minlength=5) / 4000
    assert counts == pytest.approx(5 * weights / weights.sum(), abs=0.03)


def test_a_heavy_row_is_spread_over_the_epoch():
    """Every tenth draw, as far as the others lie evenly: not several times in one update."""
    weights = np.ones(100)
    weights[7] = 11.0  # 10 % of 110
    order = curriculum.weighted_order(np.random.default_rng(0), weights)
    gaps = np.diff(np.flatnonzero(order == 7))
    assert len(gaps) >= 8
    assert 5 <= gaps.min() <= gaps.max() <= 20


def test_rows_beside_each_other_are_rounded_on_their_own():
    """Of two with half a draw each come none, one or two, wherever they stand in the data."""
    weights = np.array([0.5, 0.5, 1.5, 1.5])
    orders = [curriculum.weighted_order(np.random.default_rng(n), weights) for n in range(100)]
    assert {(order < 2).sum() for order in orders} == {0, 1, 2}


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def questions(name, count, **columns):
    return [
        {"question": f"{name} {n}?", "answer": str(n), **{c: f(n) for c, f in columns.items()}}
        for n in range(count)
    ]


def order_of(model_dir, tmp_path, dataset, epochs=2, **settings):
    """The questions of each epoch, as the trainer takes them."""
    trainer = make_trainer(model_dir, dataset, tmp_path / "o", batch_size=2, **settings)
    rows, seen = trainer.train_dataset, []
    for epoch in range(epochs):
        first = epoch * trainer.rollouts_per_epoch
        updates = range(first, first + trainer.rollouts_per_epoch)
        seen.append([rows[i]["question"] for u in updates for i in trainer.prompts_of_update(u)])
    return seen


def test_easy_to_hard_sorts_every_epoch_and_shuffles_ties(model_dir, tmp_path):
    data = write(tmp_path / "d.jsonl", questions("Q", 24, difficulty=lambda n: n % 3))
    first, second = order_of(model_dir, tmp_path, data, curriculum="easy_to_hard")
    for order in (first, second):
        assert [int(q.split()[1][:-1]) % 3 for q in order] == [0] * 8 + [1] * 8 + [2] * 8
    assert first != second
    plain = order_of(model_dir, tmp_path, data, curriculum="easy_to_hard", shuffle=False)
    assert plain[0] == plain[1] == [f"Q {n}?" for r in range(3) for n in range(r, 24, 3)]


def test_the_plain_shuffle_has_not_changed(model_dir, data_dir, tmp_path):
    """Runs that were begun before the curriculum go on in the same order."""
    trainer = make_trainer(model_dir, data_dir, tmp_path / "o", seed=3)
    for epoch in (0, 1):
        assert (trainer.order(epoch) == np.random.default_rng([3, epoch]).permutation(24)).all()


def test_mixing_with_weights_takes_each_set_by_its_share(model_dir, tmp_path):
    large = write(tmp_path / "large.jsonl", questions("L", 30))
    small = write(tmp_path / "small.jsonl", questions("S", 10))
    mix = [{"dataset": large, "weight": 1.0}, {"dataset": small, "weight": 3.0}]
    for order in order_of(model_dir, tmp_path, large, dataset_mix=mix):
        assert len(order) == 40
        counts = {name: order.count(name) for name in order}
        assert [counts[f"S {n}?"] for n in range(10)] == [3] * 10
        assert sum(name[0] == "L" for name in order) == 10
        assert set(counts.values()) == {1, 3}
        quarters = [sum(q[0] == "S" for q in order[i : i + 10]) for i in range(0, 40, 10)]
        assert min(quarters) >= 5, "the small set is spread over the epoch"


def test_mixing_without_weights_asks_everything_once(model_dir, tmp_path):
    one = write(tmp_path / "one.jsonl", questions("1", 7))
    two = write(
        tmp_path / "two.jsonl", [{"problem": f"2 {n}?", "result": str(n)} for n in range(5)]
    )
    mix = [
        {"dataset": one, "samples": 4},
        {"dataset": two, "question_column": "problem", "answer_column": "result"},
    ]
    config = make_config(model_dir, one, tmp_path / "o", dataset_mix=mix, eval_samples=2)
    trainer = make_trainer(model_dir, one, tmp_path / "o", dataset_mix=mix, eval_samples=2)
    assert config.dataset_mix == mix
    found = sorted((row["data_source"], row["question"]) for row in trainer.train_dataset)
    expected = [(one, f"1 {n}?") for n in range(4)] + [(two, f"2 {n}?") for n in range(5)]
    assert found == sorted(expected)
    assert [row["question"] for row in trainer.eval_dataset] == ["1 6?"], "the last tenth of one"


def test_weights_of_questions_within_mixed_sets(model_dir, tmp_path):
    one = write(tmp_path / "one.jsonl", questions("1", 8, w=lambda n: int(n == 0)))
    two = write(tmp_path / "two.jsonl", questions("2", 8, w=lambda n: 1))
    mix = [{"dataset": one, "weight": 1}, {"dataset": two, "weight": 1}]
    (order,) = order_of(
        model_dir,
        tmp_path,
        one,
        epochs=1,
        dataset_mix=mix,
        curriculum="weights",
        curriculum_column="w",
    )
    assert order.count("1 0?") == 8
    assert sorted(q for q in order if q[0] == "2") == [f"2 {n}?" for n in range(8)]


BAD = {
    "no column": ({"curriculum": "weights"}, "row 1: no column 'difficulty'"),
    "no number": (
        {"curriculum": "weights", "curriculum_column": "question"},
        "row 1: question = 'Q 0[?]' must be a number, at least 0",
    ),
    "negative weight": (
        {"curriculum": "weights", "curriculum_column": "negative"},
        "row 2: negative = -1.0 must be a number, at least 0",
    ),
    "no end": (
        {"curriculum": "easy_to_hard", "curriculum_column": "endless"},
        "row 1: endless = -inf must be a number, finite",
    ),
    "nothing but zeros": ({"curriculum": "weights", "curriculum_column": "zero"}, "every zero is"),
    "dead column": ({"curriculum_column": "zero"}, "no effect with curriculum = none"),
    "no such curriculum": ({"curriculum": "hard"}, "allowed: none, weights, easy_to_hard"),
    "weights in order": (
        {"curriculum": "weights", "curriculum_column": "w", "shuffle": False},
        "shuffle = false keeps the order",
    ),
    "unknown key": ({"dataset_mix": [{"datset": "x"}]}, "unknown key 'datset'; known: dataset,"),
    "no data set": ({"dataset_mix": [{"weight": 1}]}, "without dataset"),
    "weight 0": ({"dataset_mix": [{"dataset": "x", "weight": 0}]}, "weight = 0 must be a number"),
    "half a sample": ({"dataset_mix": [{"dataset": "x", "samples": 1.5}]}, "samples = 1.5 must be"),
    "a number": ({"dataset_mix": [{"dataset": 1}]}, "dataset = 1 must be text"),
    "not tables": ({"dataset_mix": ["x"]}, "dataset_mix = 'x' must be a table"),
    "twice": ({"dataset_mix": [{"dataset": "x"}, {"dataset": "x"}]}, "'x' occurs twice"),
    "some weights": (
        {"dataset_mix": [{"dataset": "x"}, {"dataset": "y", "weight": 1}]},
        "a weight in every table or in none",
    ),
    "two orders": (
        {"dataset_mix": [{"dataset": "x", "weight": 1}], "curriculum": "easy_to_hard"},
        "orders all questions by difficulty",
    ),
    "samples": ({"dataset_mix": [{"dataset": "x"}], "max_train_samples": 3}, "write samples = N"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_makes_no_sense_is_refused(grpo, model_dir, tmp_path, case):
    settings, complaint = BAD[case]
    rows = questions(
        "Q", 4, negative=lambda n: -n, zero=lambda n: 0, w=lambda n: n, endless=lambda n: -math.inf
    )
    data = write(tmp_path / "d.jsonl", rows)
    with pytest.raises(UserError, match=complaint):
        grpo.load_questions(make_config(model_dir, data, tmp_path / "o", **settings), "train")


def test_a_mix_says_what_to_evaluate_on(grpo, tmp_path):
    mix = f'dataset_mix=[{{dataset = "{tmp_path}"}}]'
    with pytest.raises(UserError, match="set dataset too, on which the run is evaluated"):
        grpo.read_config(None, [mix])
    assert grpo.read_config(None, [mix, "eval_samples=0"]).dataset_mix


def test_a_question_that_comes_twice_in_an_update_is_sampled_anew(model_dir, data_dir, tmp_path):
    trainer = make_trainer(model_dir, data_dir, tmp_path / "o")
    ids = [c.ids for c in trainer.generate_responses([3, 5, 3])]
    assert ids[:8] == [c.ids for c in trainer.generate_responses([3, 5])]
    assert not any(first in ids[8:] for first in ids[:4])
