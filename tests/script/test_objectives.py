"""What defines the objectives: by hand, by exact expectation, and by what must change nothing.

TRL's own numbers are in tests/script/test_parity.py.
"""

import dataclasses
import itertools
import math
from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest
from helpers import (
    RESUMED,
    as_batch,
    as_rollout,
    completion,
    digest,
    flat,
    gradient,
    make_config,
    make_trainer,
    micro_batches,
    mostly_long,
    read_log,
    relative_difference,
    rollout,
    run_training,
    snapshot,
    stop_after,
    timeless,
)
from mlx.utils import tree_map

from utils.base.errors import UserError
from utils.settings import checks

LOSSES = ["grpo", "bnpo", "dapo", "dr_grpo", "gspo", "gmpo", "cpgd", "cispo", "sapo", "reinforce"]
ESTIMATORS = ["group_norm", "dr_grpo", "batch", "rloo", "reinforce", "reinforce_baseline", "gdpo"]


def random_batch(rows=6, tokens=7, seed=0, moved=0.3):
    """Ragged sequences whose policy has moved away from its anchor; and the log-probs."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, tokens + 1, rows)
    old = -rng.gamma(2.0, 0.6, (rows, tokens))
    batch = {
        "mask": np.arange(tokens) < lengths[:, None],
        "advantages": rng.normal(size=rows),
        "weights": 1 / (rows * lengths),
        "old_logprobs": old,
        "sampler_logprobs": old + 0.2 * rng.normal(size=old.shape),
    }
    batch = as_batch(**{n: mx.array(np.asarray(x, np.float32)) for n, x in batch.items()})
    return batch, mx.array((old + moved * rng.normal(size=old.shape)).astype(np.float32))


def loss_and_gradient(grpo, batch, logprobs, **settings):
    config = grpo.MLXGRPOConfig(**settings)
    loss, grad = mx.value_and_grad(lambda x: grpo.grpo_loss(x, batch, config)[0])(logprobs)
    return loss.item(), np.array(grad)


# Losses.


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("level", ["sequence", "token"])
def test_gspo_is_grpo_at_length_1(grpo, seed, level):
    batch, logprobs = random_batch(rows=30, tokens=1, seed=seed)
    clip = {"clip_eps": 0.1, "clip_eps_high": 0.2}
    ours = loss_and_gradient(
        grpo, batch, logprobs, loss_type="gspo", importance_sampling_level=level, **clip
    )
    loss, grad = loss_and_gradient(grpo, batch, logprobs, **clip)
    assert ours[0] == pytest.approx(loss, rel=1e-6)
    assert ours[1] == pytest.approx(grad, abs=1e-7)
    assert 0 < (grad == 0).sum() < grad.size, "some are clipped"


@pytest.mark.parametrize("seed", range(5))
def test_gspo_token_has_the_value_and_gradient_of_gspo(grpo, seed):
    """With one advantage per sequence (arXiv:2507.18071, section 4.3)."""
    batch, logprobs = random_batch(seed=seed)
    both = [
        loss_and_gradient(
            *(grpo, batch, logprobs),
            loss_type="gspo",
            importance_sampling_level=level,
            clip_eps=0.1,
            importance_cap=1e-3,  # the importance weight of all tokens, or it would differ in one
            importance_floor=1e-3,
        )
        for level in ("sequence", "token")
    ]
    assert both[0][0] == pytest.approx(both[1][0], rel=1e-5)
    assert both[0][1] == pytest.approx(both[1][1], rel=1e-4, abs=1e-9)


@pytest.mark.parametrize("loss_type", LOSSES)
def test_on_policy_every_loss_has_the_policy_gradient(grpo, loss_type):
    """At ratio 1 clips and gates are open: -A grad log pi, as the loss averages tokens."""
    batch, _ = random_batch()
    batch.old_logprobs = None
    logprobs = batch.sampler_logprobs
    _, grad = loss_and_gradient(grpo, batch, logprobs, loss_type=loss_type)
    expected = -batch.advantages[:, None] * batch.mask * batch.weights[:, None]
    assert grad == pytest.approx(np.array(expected), abs=1e-6)


@pytest.mark.parametrize("loss_type", LOSSES)
@pytest.mark.parametrize("level", ["auto", "token", "sequence"])
@pytest.mark.parametrize("mode", ["token_truncate", "sequence_mask"])
def test_without_an_anchor_no_clip_width_acts(grpo, loss_type, level, mode):
    """Which is why it is refused with num_iterations = 1, whatever samples: to the last bit."""
    if level == "sequence" and loss_type in ("gmpo", "cpgd", "reinforce"):
        pytest.skip("refused")
    batch, logprobs = random_batch(moved=0.6)
    batch.old_logprobs = None
    how = {"loss_type": loss_type, "importance_sampling_level": level, "importance_mode": mode}
    delta = {"delta": 1.01} if loss_type in ("grpo", "bnpo", "dapo", "dr_grpo", "gspo") else {}
    narrow = {"clip_eps": 1e-3, "clip_eps_high": 1e-3, **delta}
    results = [
        loss_and_gradient(grpo, batch, logprobs, **how, **clip)
        for clip in (narrow, {"clip_eps": 0.9, "clip_eps_high": 9.0})
    ]
    assert results[0][0] == results[1][0]
    assert (results[0][1] == results[1][1]).all()
    assert np.abs(results[0][1]).max() > 0


def test_losses_differ_once_the_policy_has_moved(grpo):
    batch, logprobs = random_batch(rows=40, moved=0.6)
    settings = {name: {"loss_type": name} for name in LOSSES} | {"cispo": {"loss_type": "cispo"}}
    settings["cispo"]["clip_eps_high"] = 0.2  # 5 times as likely is not reached here
    grads = {
        name: loss_and_gradient(grpo, batch, logprobs, **how)[1] for name, how in settings.items()
    }
    same = {
        (a, b)
        for a, b in itertools.combinations(LOSSES, 2)
        if np.abs(grads[a] - grads[b]).max() < 1e-6
    }
    # These differ in `weights`, which are given here.
    assert same == {("grpo", "bnpo"), ("grpo", "dr_grpo"), ("bnpo", "dr_grpo")}


@pytest.mark.parametrize(
    ("log_ratio", "advantage", "moves"),
    [
        (0.1, 2.0, True),
        (0.3, 2.0, False),
        (-0.3, 2.0, True),
        (-0.3, -2.0, False),
        (0.3, -2.0, True),
    ],
)
def test_cpgd_by_hand(grpo, log_ratio, advantage, moves):
    """-A log pi, stopped at old + log(1 +- eps); the gradient is A, however far the ratio went."""
    batch, _ = one_token(advantage)
    loss, grad = loss_and_gradient(grpo, batch, mx.array([[-1.0 + log_ratio]]), loss_type="cpgd")
    bound = math.log(1.2) if advantage > 0 else math.log(0.8)
    stopped = min(log_ratio, bound) if advantage > 0 else max(log_ratio, bound)
    assert loss == pytest.approx(-advantage * (-1 + stopped), rel=1e-5)
    assert grad.item() == pytest.approx(-advantage if moves else 0)


def one_token(advantage):
    batch = {"mask": [[1.0]], "advantages": [advantage], "weights": [1.0]}
    batch |= {"old_logprobs": [[-1.0]], "sampler_logprobs": [[-1.0]]}
    return as_batch(**{name: mx.array(x) for name, x in batch.items()}), mx.array([[-1.0]])


def test_reinforce_by_hand_and_without_a_ratio(grpo):
    batch, _ = one_token(2.0)
    for moved in (0.0, 3.0):
        logprobs = mx.array([[-1.0 - moved]])
        loss, grad = loss_and_gradient(grpo, batch, logprobs, loss_type="reinforce")
        assert loss == pytest.approx(2.0 * (1 + moved), rel=1e-6)
        assert grad.item() == pytest.approx(-2.0)


@pytest.mark.parametrize(
    ("loss_type", "ratio", "advantage", "held"),
    [
        ("cispo", 10.0, 1.0, 0.5),  # weight 5 of 10
        ("cispo", 4.0, 1.0, 0.0),
        ("sapo", 1.0, 1.0, 0.0),
        ("sapo", 2.0, 1.0, 1 - 4 / (1 + math.exp(-1)) * (1 - 1 / (1 + math.exp(-1)))),
        ("gmpo", 1.6, 1.0, 1.0),
        ("gmpo", 1.4, 1.0, 0.0),
        ("cpgd", 0.7, -1.0, 1.0),
        ("reinforce", 9.0, 1.0, 0.0),
        ("grpo", 0.1, 0.0, 0.0),  # an advantage of 0 pulls nowhere
    ],
)
def test_what_clip_and_gate_hold_back_is_logged(grpo, loss_type, ratio, advantage, held):
    batch, _ = one_token(advantage)
    logprobs = mx.array([[-1.0 + math.log(ratio)]])
    _, sums = grpo.grpo_loss(logprobs, batch, grpo.MLXGRPOConfig(loss_type=loss_type))
    name = "clip_high" if advantage > 0 else "clip_low"
    assert sums[name].item() == pytest.approx(held, abs=1e-6)
    assert sums["clip_low"].item() + sums["clip_high"].item() == pytest.approx(held, abs=1e-6)


@pytest.mark.parametrize(
    ("settings", "ratio", "held"),
    [
        ({"delta": 3.0}, 2.9, 0.0),
        ({"delta": 3.0}, 3.1, 1.0),
        ({"loss_type": "gmpo", "clip_eps": 0.2, "clip_eps_high": 0.5}, math.exp(-0.3), 1.0),
        ({"loss_type": "gmpo", "clip_eps": 0.5, "clip_eps_high": 0.2}, math.exp(-0.3), 0.0),
    ],
)
def test_what_a_bad_token_is_held_back_by(grpo, settings, ratio, held):
    """It is logged as such, and then it has no gradient."""
    batch, _ = one_token(-1.0)

    def loss(logprobs):
        return grpo.grpo_loss(logprobs, batch, grpo.MLXGRPOConfig(**settings))

    logprobs = mx.array([[-1.0 + math.log(ratio)]])
    (_, sums), gradient = mx.value_and_grad(loss)(logprobs)
    assert (sums["clip_low"].item(), sums["clip_high"].item()) == (held, 0.0)
    assert (gradient.item() == 0) == bool(held)


def test_the_penalty_is_for_tokens_without_a_policy_gradient_too(grpo):
    batch, logprobs = one_token(1.0)
    batch.ref_logprobs, batch.selected = mx.array([[-1.5]]), mx.array([[0.0]])
    loss, _ = loss_and_gradient(grpo, batch, logprobs, kl_coeff=0.5, kl_estimator="k2")
    assert loss == pytest.approx(0.5 * 0.5 * 0.5**2)


def test_log_ratios_beyond_20_count_as_20(grpo):
    """Or a single token that left the policy would make loss and gradient infinite."""
    batch, _ = one_token(-1.0)
    batch.sampler_logprobs = mx.array([[-101.0]])
    for settings, weight in ({}, 2.0), ({"importance_cap": 1e9}, math.exp(20)):
        config = grpo.MLXGRPOConfig(**settings)
        loss, sums = grpo.grpo_loss(mx.array([[99.0]]), batch, config)
        assert sums["policy_reward"].item() == pytest.approx(-math.exp(20), rel=1e-5)
        assert sums["sampler_mismatch"].item() == 20
        assert loss.item() == pytest.approx(weight * math.exp(20), rel=1e-5)
    config = grpo.MLXGRPOConfig(importance_mode="sequence_truncate", importance_cap=1e12)
    weights, _ = grpo.importance_weights(mx.array([[20.0, 20.0]]), mx.ones((1, 2)), config)
    assert weights.item() == pytest.approx(math.exp(20), rel=1e-5), "nor a sequence of them"


@pytest.mark.parametrize("mode", ["truncate", "mask"])
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_importance_weights_below_their_floor(grpo, level, mode):
    config = grpo.MLXGRPOConfig(importance_mode=f"{level}_{mode}", importance_floor=0.5)
    mismatch = mx.log(mx.array([[0.25], [1.0], [4.0]]))
    weights, outside = grpo.importance_weights(mismatch, mx.ones((3, 1)), config)
    limits = [0.5, 1.0, 2.0] if mode == "truncate" else [0.0, 1.0, 0.0]
    assert weights[:, 0].tolist() == pytest.approx(limits)
    assert outside[:, 0].tolist() == [True, False, True]


AVERAGES = {"sequence": [1 / 2, 1 / 6], "token": [1 / 4, 1 / 4], "constant": [1 / 10, 1 / 10]}


@pytest.mark.parametrize(
    ("loss_type", "average"),
    [
        *((name, "sequence") for name in ("grpo", "gspo", "gmpo", "cpgd", "sapo")),
        *((name, "token") for name in ("bnpo", "dapo", "cispo", "reinforce")),
        ("dr_grpo", "constant"),
    ],
)
def test_how_each_loss_is_averaged(grpo, loss_type, average):
    """As docs/objectives.md has it: 1 and 3 tokens, where there could have been 5."""
    weights = grpo.token_weights(np.array([1, 3]), loss_type, 5)
    assert weights == pytest.approx(AVERAGES[average])


# What must change nothing.

VARIANTS = [
    *({"loss_type": name} for name in LOSSES),
    {"importance_sampling_level": "sequence"},
    {"loss_type": "gspo", "importance_sampling_level": "token"},
    {"importance_mode": "sequence_truncate"},
    {"importance_mode": "sequence_mask"},
    {"importance_mode": "token_mask", "importance_cap": 1.02},
    {"entropy_coeff": 0.1},
    {"loss_type": "dapo", "top_entropy_quantile": 0.3},
    {"top_entropy_quantile": 0.3, "entropy_coeff": 0.1},
    {"mask_truncated_completions": True},
    {"kl_coeff": 0.3, "kl_estimator": "k2"},
    {"kl_coeff": 0.3, "kl_bias_correction": True, "loss_type": "gspo"},
    {"kl_coeff": 0.3, "kl_estimator": "k1", "kl_bias_correction": True},
]


SHORT = [{"loss_type": name} for name in ("grpo", "gspo", "gmpo", "cispo")]
SHORT += [{"mask_truncated_completions": True}, {"kl_coeff": 0.3, "kl_estimator": "k2"}]
SHORT += [{"importance_mode": "sequence_mask"}, {"top_entropy_quantile": 0.3, "entropy_coeff": 0.1}]


@pytest.mark.parametrize("settings", mostly_long(VARIANTS, *SHORT), ids=map(str, VARIANTS))
def test_padding_and_micro_batches_change_nothing(model_dir, data_dir, tmp_path, settings):
    """Off the policy, where clips and weights act."""
    trainer = make_trainer(model_dir, data_dir, tmp_path / "o", **settings)
    rows, responses, advantages = rollout(trainer)
    if trainer.args.mask_truncated_completions:
        for i, response in enumerate(responses):
            why = "length" if i % 3 == 0 else "stop"
            responses[i] = dataclasses.replace(response, finish_reason=why)
    sample = rows, responses, advantages

    def prepared(tokens):
        batches = micro_batches(trainer, sample, tokens)
        for batch in batches:
            current = trainer.compute_grpo_loss(batch)[2]
            batch.old_logprobs = 1.02 * current
            batch.ref_logprobs = 0.9 * current
        if not trainer.args.kl_coeff:
            for batch in batches:
                batch.ref_logprobs = None
        trainer.select_tokens(batches)
        return batches

    loss, whole = gradient(trainer, prepared(10**6))
    for tokens in (1, 90):
        batches = prepared(tokens)
        assert len(batches) > 1
        part_loss, parts = gradient(trainer, batches)
        assert relative_difference(whole, parts) <= 2e-5
        assert part_loss == pytest.approx(loss, rel=1e-4, abs=1e-5)


def test_the_quantile_is_that_of_the_whole_update(model_dir, data_dir, tmp_path):
    trainer = make_trainer(model_dir, data_dir, tmp_path / "o", top_entropy_quantile=0.25)
    batches = micro_batches(trainer, rollout(trainer), 60)
    trainer.select_tokens(batches)
    chosen = [(b.selected * b.mask).sum().item() for b in batches]
    counts = [b.mask.sum().item() for b in batches]
    assert sum(chosen) == pytest.approx(0.25 * sum(counts), abs=1)
    shares = [c / n for c, n in zip(chosen, counts, strict=True)]
    assert max(shares) - min(shares) > 0.1, "not a quarter of each micro-batch"


def test_tokens_of_one_entropy_are_all_selected(model_dir, data_dir, tmp_path):
    settings = {"top_entropy_quantile": 0.5, "entropy_coeff": 0.1, "max_new_tokens": 1}
    trainer = make_trainer(model_dir, data_dir, tmp_path / "o", **settings)
    [batch] = trainer.select_tokens(micro_batches(trainer, rollout(trainer, rows=[0])))
    assert batch.selected.tolist() == [[1.0]] * 4, "the first tokens of one prompt"
    assert batch.entropy_weight.item() == pytest.approx(0.1 / 4)


def test_truncated_tokens_are_not_in_the_normaliser(model_dir, data_dir, tmp_path):
    settings = {"loss_type": "dapo", "mask_truncated_completions": True}
    trainer = make_trainer(model_dir, data_dir, tmp_path / "o", **settings)
    rows, responses, advantages = rollout(trainer)
    responses = [
        dataclasses.replace(c, finish_reason="length" if i in (1, 5) else "stop")
        for i, c in enumerate(responses)
    ]
    batches = micro_batches(trainer, (rows, responses, advantages))
    used = sum((b.mask * b.weights[:, None]).sum().item() for b in batches)
    assert used == pytest.approx(1), "a mean over the tokens that are trained"
    assert sum(len(b.mask) for b in batches) == len(rows) - 2


@pytest.mark.parametrize("loss_type", LOSSES)
def test_what_masked_completions_count_in(model_dir, data_dir, tmp_path, loss_type):
    """As in TRL 1.16 and docs/objectives.md: in the number of completions, not in that of tokens.
    Three completions of 3, 5 and 2 tokens, of which the second is masked."""
    settings = {"loss_type": loss_type, "mask_truncated_completions": True}
    trainer = make_trainer(model_dir, data_dir, tmp_path / "o", **settings)
    cut = [completion([7] * 3), completion([7] * 5, finish_reason="length"), completion([7] * 2)]
    batches = micro_batches(trainer, (trainer.train_dataset[:3], cut, [1.0, 1.0, -1.0]))
    pairs = [(b.completion.tolist(), b.weights.tolist()) for b in batches]
    found = {i: w for numbers, weights in pairs for i, w in zip(numbers, weights, strict=True)}
    over_tokens = {0: 1 / 5, 2: 1 / 5}
    over_completions = {0: 1 / (3 * 3), 2: 1 / (3 * 2)}
    longest = trainer.sampling.max_tokens
    expected = {
        **dict.fromkeys(["bnpo", "dapo", "cispo", "reinforce"], over_tokens),
        "dr_grpo": dict.fromkeys((0, 2), 1 / (3 * longest)),
    }.get(loss_type, over_completions)
    assert found == pytest.approx(expected)


def test_masked_completions_count_in_their_group(grpo):
    """0 and 1 are one deviation apart with them, not three equal rewards."""
    s = scores(grpo, [[1.0, 1.0, 1.0, 0.0]])
    s.completions[0, 3] = dataclasses.replace(s.completions[0, 3], finish_reason="length")
    a = grpo.MLXGRPOConfig(mask_truncated_completions=True)
    found = grpo.estimate_advantages(s, [0, 0, 0], 0.0, a)
    assert found[0, :3] == pytest.approx(0.25 / (0.5 + 1e-4))


def test_the_quantile_of_an_update_without_tokens(model_dir, data_dir, tmp_path):
    """Every completion is truncated and left out: nothing to train on, no error."""
    settings = {"mask_truncated_completions": True, "top_entropy_quantile": 0.5}
    trainer = make_trainer(
        model_dir, data_dir, tmp_path / "o", max_new_tokens=1, stop_strings=[], **settings
    )
    trainer.sampler.stop.eos_ids = set()
    before = flat(tree_map(mx.array, trainer.optimizer.masters(trainer.model)))
    [record] = trainer.train_step([0, 1])
    assert (record["truncation_rate"], record["skipped"]) == (1, 0)
    after = flat(trainer.optimizer.masters(trainer.model))
    assert all(mx.array_equal(after[name], value) for name, value in before.items())


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_equal_rewards_teach_nothing(model_dir, data_dir, tmp_path, estimator):
    funcs = ["helpers:vowels", "helpers:digest"]
    trainer = make_trainer(
        model_dir,
        data_dir,
        tmp_path / "o",
        reward=None,
        advantage_estimator=estimator,
        reward_funcs=funcs,
    )
    trainer.reward_funcs = {
        name: lambda completions, **_: [0.7] * len(completions) for name in funcs
    }
    before = tree_map(mx.array, trainer.optimizer.masters(trainer.model))
    [record] = trainer.train_step([0, 1])
    assert record["grad_norm"] == 0
    assert record["groups_without_signal"] == 1
    assert all(
        mx.array_equal(x, flat(before)[name])
        for name, x in flat(trainer.optimizer.masters(trainer.model)).items()
    )


# Advantages.


def scores(grpo, rewards, lengths=None, **extra):
    rewards = np.array(rewards, float)
    lengths = np.ones_like(rewards) if lengths is None else np.array(lengths)
    values = np.stack(extra.pop("values", [rewards]), axis=-1)
    cells = np.empty(rewards.shape, object)
    cells[...] = [[completion([7] * int(n)) for n in row] for row in lengths]
    return grpo.Rollout(np.arange(len(rewards)), cells, values, rewards)


DEFAULTS = SimpleNamespace(advantage_eps=1e-4, reward_weights=[])


def expected_gradient(grpo, estimator, outcomes, logits, group):
    """E[mean of A grad log pi] over every group that a categorical policy can sample, exactly."""
    policy = np.exp(logits) / np.exp(logits).sum()
    score = np.eye(len(policy)) - policy  # grad log pi(x) by the logits, a row per x
    total = np.zeros(len(policy))
    for sample in itertools.product(range(len(policy)), repeat=group):
        rewards = np.array([[outcomes[x] for x in sample]])
        advantages = grpo.ADVANTAGES[estimator](scores(grpo, rewards), DEFAULTS)[0]
        total += policy[[*sample]].prod() * (advantages @ score[[*sample]]) / group
    return total, policy * (outcomes - policy @ outcomes)  # and grad E[R]


@pytest.mark.parametrize("group", [2, 3, 4])
def test_rloo_is_unbiased_and_the_groups_mean_shrinks_by_its_size(grpo, group):
    rng = np.random.default_rng(group)
    outcomes, logits = rng.normal(size=3), rng.normal(size=3)
    found, truth = expected_gradient(grpo, "rloo", outcomes, logits, group)
    assert found == pytest.approx(truth, abs=1e-12)
    found, _ = expected_gradient(grpo, "dr_grpo", outcomes, logits, group)
    assert found == pytest.approx(truth * (group - 1) / group, abs=1e-12)
    found, _ = expected_gradient(grpo, "group_norm", outcomes, logits, group)
    assert np.abs(found - truth).max() > 0.01, "dividing by the standard deviation is not unbiased"


def test_batch_advantages_by_hand(grpo):
    s = scores(grpo, [[0, 1], [0, 3]])
    std = np.std([0, 1, 0, 3], ddof=1)
    expected = np.array([[-0.5, 0.5], [-1.5, 1.5]]) / (std + 1e-4)
    assert grpo.ADVANTAGES["batch"](s, DEFAULTS) == pytest.approx(expected)
    found = grpo.ADVANTAGES["batch"](s, SimpleNamespace(advantage_eps=1.0))
    assert found == pytest.approx(expected * (std + 1e-4) / (std + 1))


@pytest.mark.filterwarnings("ignore:Mean of empty slice", "ignore:Degrees of freedom")
@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("rewards", [[[np.nan, np.nan]] * 2, [[1.0, np.nan], [np.nan, np.nan]]])
def test_without_rewards_to_compare_the_advantage_is_0(grpo, estimator, rewards):
    """NaN would leave the completions out of the KL penalty, too."""
    a = grpo.MLXGRPOConfig(advantage_estimator=estimator)
    assert not grpo.estimate_advantages(scores(grpo, rewards), [0, 0, 0], 0.0, a).any()


def test_reinforce_whitens_over_tokens(grpo):
    rewards, lengths = [[1.0, 0.0], [0.0, 0.0]], [[3, 1], [2, 4]]
    s = scores(grpo, rewards, lengths)
    tokens = np.repeat(np.ravel(rewards), np.ravel(lengths))
    expected = (np.array(rewards) - tokens.mean()) / tokens.std()
    assert grpo.ADVANTAGES["reinforce"](s, DEFAULTS) == pytest.approx(expected, rel=1e-6)
    centre = np.array([[0.5, -0.5], [0.0, 0.0]])
    tokens = np.repeat(centre.ravel(), np.ravel(lengths))
    expected = (centre - tokens.mean()) / tokens.std()
    assert grpo.ADVANTAGES["reinforce_baseline"](s, DEFAULTS) == pytest.approx(expected, rel=1e-6)


IN_GROUPS = ["group_norm", "dr_grpo", "batch", "rloo", "gdpo"]


def several_functions(rng, weights, groups=6, size=5):
    """Values of three functions, (F, P, G): some groups have equal ones, whose mean is not exact,
    in some the functions outweigh each other; and which groups have a signal."""
    values = rng.choice([0.1, 0.3, 0.7, 1.0, -0.2], (3, groups, size))
    values[:, 0] = rng.choice([0.1, 0.7, 1.1], (3, 1))
    values[:, 1] = 1 / 3
    values[:, 2, :4] = values[:, 2, 4:]
    values[1, 3] = values[2, 3] = 0.3
    values[0, 3] = 0.1
    signal = (np.ptp(values, axis=2) > 0).any(axis=0)
    assert not signal[:4].any()
    totals = np.tensordot(weights, values, axes=1)
    return values, totals, signal & (np.ptp(totals, axis=1) > 1e-9)


@pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0), (0.1, 0.2, 0.7), (0.1, 0.2, -0.3)])
@pytest.mark.parametrize("estimator", IN_GROUPS)
@pytest.mark.parametrize("shaping", [{}, {"advantages_norm": True}, {"reward_running_norm": True}])
def test_a_group_without_signal_has_exactly_no_advantage(grpo, estimator, weights, shaping):
    """Not 1e-17, with which its rows would be trained, and counted as if they had a signal. Where
    the advantages are whitened, all its rows have the same."""
    allowed = {"advantages_norm": ["group_norm", "dr_grpo", "batch", "rloo"]}
    allowed["reward_running_norm"] = ["dr_grpo", "rloo"]
    if any(estimator not in allowed[name] for name in shaping):
        pytest.skip("refused")
    rng, settings = np.random.default_rng(0), {"advantage_estimator": estimator, **shaping}
    funcs = ["int", "xmlcount", "soft_format"]
    a = grpo.MLXGRPOConfig(reward_funcs=funcs, reward_weights=list(weights), **settings)
    for _ in range(100):
        values, totals, signal = several_functions(rng, weights)
        s = scores(grpo, totals, rng.integers(1, 9, totals.shape), values=values)
        moments = grpo.running_moments([0, 0.0, 0.0], totals)
        found = grpo.estimate_advantages(s, moments, 0.0, a)
        quiet = found[~signal] if estimator != "gdpo" else found[:4]
        if "advantages_norm" in shaping:
            assert (quiet == quiet.ravel()[0]).all()
        else:
            assert (quiet == 0).all()
        assert (found[signal] != 0).any(axis=1).all()


@pytest.mark.parametrize("settings", [{}, {"advantages_norm": True}])
@pytest.mark.parametrize("estimator", ["group_norm", "dr_grpo", "batch", "rloo"])
def test_whitening_moves_no_group_where_the_mean_is_0(grpo, estimator, settings):
    """Completions of one length: the mean over tokens is 0, and 0 stays 0."""
    rng = np.random.default_rng(1)
    a = grpo.MLXGRPOConfig(advantage_estimator=estimator, **settings)
    baseline = grpo.MLXGRPOConfig(advantage_estimator="reinforce_baseline")
    for _ in range(100):
        rewards = rng.choice([0.1, 0.3, 0.7, 1.1], (5, 6))
        rewards[0] = 0.1
        s = scores(grpo, rewards, np.full(rewards.shape, 7))
        for config in (a, baseline):
            found = grpo.estimate_advantages(s, [0, 0, 0], 0.0, config)
            assert (found[0] == 0).all()
            assert np.abs(found[1:]).max() > 0.1


@pytest.mark.parametrize("estimator", ["reinforce", "reinforce_baseline"])
def test_whitened_over_the_update_a_group_of_equal_rewards_has_a_signal(grpo, estimator):
    """Unlike in a group: docs/objectives.md says so. Equal everywhere, none has one."""
    lengths = np.array([[3, 1, 2], [9, 1, 1]])
    s = scores(grpo, [[0.7, 0.7, 0.7], [1.0, 0.0, 0.0]], lengths)
    found = grpo.ADVANTAGES[estimator](s, DEFAULTS)
    assert (found[0] == found[0, 0]).all()
    assert abs(found[0, 0]) > 0.1
    whitened = grpo.MLXGRPOConfig(advantages_norm=True)
    found = grpo.estimate_advantages(s, [0, 0, 0], 0.0, whitened)
    assert (found[0] == found[0, 0]).all()
    assert abs(found[0, 0]) > 0.1
    s = scores(grpo, np.full((2, 3), 0.7), lengths)
    assert not grpo.ADVANTAGES[estimator](s, DEFAULTS).any()


@pytest.mark.parametrize("estimator", IN_GROUPS)
def test_a_reward_at_the_mean_of_its_group_has_no_advantage(grpo, estimator):
    """(0.1 + 0.2 + 0.3) / 3 is 2.8e-17 away from 0.2."""
    rewards = np.array([[0.1, 0.2, 0.3], [0.7, 0.1, 0.4], [5.1, -5.1, 0.0]])
    found = grpo.ADVANTAGES[estimator](scores(grpo, rewards), DEFAULTS)
    assert found[[0, 1, 2], [1, 2, 2]].tolist() == [0, 0, 0]
    assert np.count_nonzero(found) == 6


def test_functions_that_outweigh_each_other_leave_nothing(grpo):
    up, down = np.array([[0.0, 1.0], [0.0, 1.0]]), np.array([[1.0, 0.0], [0.0, 3.0]])
    s = scores(grpo, up + down, values=[up, up, down])
    config = SimpleNamespace(advantage_eps=0.0, reward_weights=[0.1, 0.2, 0.3])
    found = grpo.ADVANTAGES["gdpo"](s, config)
    assert found[0].tolist() == [0, 0]
    assert found[1, 1] == -found[1, 0] > 1


@pytest.mark.parametrize("size", [1e-6, 1.0, 1e9])
def test_what_rounding_makes_of_equal_rewards_is_no_signal(grpo, size):
    """0.1 + 0.2 is not 0.3; of large rewards the difference is larger than many a signal."""
    apart = np.array([[0.1 + 0.2, 0.3, 0.3], [0.3, 0.3, 0.5]]) * size
    assert grpo.has_signal(apart).tolist() == [False, True]
    assert not grpo.group_advantages(apart)[0].any()
    empty = np.array([[np.nan, np.nan], [np.nan, 3.0], [-2.0, np.nan]])
    assert grpo.has_signal(empty * size).tolist() == [False] * 3


def test_gdpo_does_not_let_one_reward_drown_another(grpo):
    small, large = [[0.0, 0.1, 0.0, 0.1]], [[100.0, 100.0, 0.0, 0.0]]
    s = scores(grpo, np.add(small, large), values=[small, large])
    advantages = grpo.ADVANTAGES["gdpo"](s, DEFAULTS)[0]
    assert advantages[1] > 1
    assert advantages[2] < -1
    assert abs(advantages[0] - advantages[3]) < 1e-2, "one point each"
    alone = grpo.group_advantages(np.add(small, large))[0]
    assert alone[0] > 0.8 > -0.8 > alone[3]
    weighted = SimpleNamespace(advantage_eps=1e-4, reward_weights=[3.0, 1.0])
    total = 3 * grpo.group_advantages(np.array(small)) + grpo.group_advantages(np.array(large))
    expected = total / (total.std(ddof=1) + 1e-4)
    assert grpo.ADVANTAGES["gdpo"](s, weighted) == pytest.approx(expected), "by their weights"


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_a_completion_that_no_function_values_counts_nowhere(grpo, estimator):
    rewards = np.array([[1.0, 0.0, 3.0, np.nan], [0.5, 2.0, 1.0, 0.0]])
    lengths = np.array([[2, 3, 4, 99], [1, 1, 2, 5]])
    found = grpo.ADVANTAGES[estimator](scores(grpo, rewards, lengths), DEFAULTS)
    assert found[0, 3] == 0
    assert np.isfinite(found).all()
    without = lengths.copy()
    without[0, 3] = 1
    again = grpo.ADVANTAGES[estimator](scores(grpo, rewards, without), DEFAULTS)
    assert again == pytest.approx(found), "its length plays no part"
    if estimator in ("group_norm", "dr_grpo", "rloo"):
        three = grpo.ADVANTAGES[estimator](scores(grpo, rewards[:1, :3]), DEFAULTS)
        assert found[0, :3] == pytest.approx(three[0])


@pytest.mark.parametrize("seed", range(3))
def test_running_moments_are_those_of_all_rewards_however_they_came(grpo, seed):
    rng = np.random.default_rng(seed)
    rewards = rng.normal(3, 2, (12, 4))
    rewards[2, 1] = rewards[5] = np.nan
    moments = [0.0, 0.0, 0.0]
    for part in np.split(rewards, [1, 2, 5, 6, 11]):
        moments = grpo.running_moments(moments, part)
    seen = rewards[~np.isnan(rewards)]
    squares = ((seen - seen.mean()) ** 2).sum()
    assert moments == pytest.approx([seen.size, seen.mean(), squares])


def test_rewards_are_normalised_then_clipped_then_penalised(grpo):
    config = grpo.MLXGRPOConfig(
        advantage_estimator="dr_grpo",
        reward_running_norm=True,
        reward_running_norm_minus_mean=True,
        reward_clip=1.0,
        advantage_clip=0.75,
    )
    rewards, penalty = np.array([[1.0, 3.0, 9.0, 3.0]]), np.array([[0.1, 0.2, 0.3, 0.4]])
    moments = [5, 2.0, 16.0]  # a standard deviation of 2
    shaped = np.clip((rewards - 2) / 2, -1, 1) - penalty
    expected = np.clip(shaped - shaped.mean(), -0.75, 0.75)
    found = grpo.estimate_advantages(scores(grpo, rewards), moments, penalty, config)
    assert found == pytest.approx(expected)


def test_whitened_advantages_have_mean_0_and_variance_1_over_tokens(grpo):
    rng = np.random.default_rng(0)
    rewards, lengths = rng.normal(size=(3, 4)), rng.integers(1, 9, (3, 4))
    config = grpo.MLXGRPOConfig(advantage_estimator="rloo", advantages_norm=True)
    found = grpo.estimate_advantages(scores(grpo, rewards, lengths), [0.0] * 3, 0.0, config)
    tokens = np.repeat(found.ravel(), lengths.ravel())
    assert (tokens.mean(), tokens.std()) == pytest.approx((0, 1), abs=1e-6)
    config.advantage_clip = 0.5
    clipped = grpo.estimate_advantages(scores(grpo, rewards, lengths), [0.0] * 3, 0.0, config)
    assert clipped == pytest.approx(np.clip(found, -0.5, 0.5)), "the clip comes last"


# The KL penalty.


def reverse_kl(grpo, estimator, corrected):
    """E[grad of the penalty] over a categorical policy, exactly, and grad KL(policy, reference)."""
    rng = np.random.default_rng(1)
    logits, ref = mx.array(rng.normal(size=5)), mx.array(rng.normal(size=5))
    ref = ref - mx.logsumexp(ref)
    config = grpo.MLXGRPOConfig(
        kl_coeff=1.0,
        kl_estimator=estimator,
        kl_bias_correction=corrected,
        kl_placement="loss" if corrected or estimator != "k1" else "reward",
    )
    policy = mx.softmax(logits)

    def penalty(logits):
        logprobs = logits - mx.logsumexp(logits)
        batch = as_batch(
            mask=mx.ones((5, 1)),
            weights=policy,  # every outcome once, with its probability
            sampler_logprobs=mx.stop_gradient(logprobs)[:, None],
            ref_logprobs=ref[:, None],
        )
        return grpo.grpo_loss(logprobs[:, None], batch, config)[0]

    def kl(logits):
        logprobs = logits - mx.logsumexp(logits)
        return (mx.exp(logprobs) * (logprobs - ref)).sum()

    return (
        penalty(logits).item(),
        kl(logits).item(),
        *(np.array(mx.grad(f)(logits)) for f in (penalty, kl)),
    )


@pytest.mark.parametrize(
    ("estimator", "corrected", "right_value", "right_gradient"),
    [
        ("k1", False, True, False),
        ("k2", False, False, True),
        ("k3", False, True, False),
        ("k1", True, True, True),
        ("k3", True, True, True),
    ],
)
def test_which_kl_estimates_have_the_value_and_the_gradient_of_the_kl(
    grpo, estimator, corrected, right_value, right_gradient
):
    value, true_value, found, truth = reverse_kl(grpo, estimator, corrected)
    assert (abs(value - true_value) < 1e-5) == right_value
    assert (np.abs(found - truth).max() < 1e-5) == right_gradient
    if estimator == "k1" and not corrected:
        assert np.abs(found).max() < 1e-6, "of mean zero: that is why it is refused in the loss"


def test_the_controller_follows_its_target(grpo):
    assert grpo.adapted_kl_coeff(0.1, 0.05, 0.01, 0.5) == pytest.approx(0.1 * (1 + 0.2 * 0.5))
    assert grpo.adapted_kl_coeff(0.1, 0.0, 0.01, 0.5) == pytest.approx(0.1 * (1 - 0.2 * 0.5))
    assert grpo.adapted_kl_coeff(0.1, 0.011, 0.01, 1.0) == pytest.approx(0.11)
    assert grpo.adapted_kl_coeff(0.1, 0.01, 0.01, 1.0) == pytest.approx(0.1)


@pytest.mark.parametrize("use_compile", [False, True])
def test_an_adaptive_coefficient_reaches_the_gradient(model_dir, data_dir, tmp_path, use_compile):
    """Also in a compiled step, where a number would have become a constant."""

    def same(completions, **_):
        return [1.0] * len(completions)  # so that the loss is the penalty alone

    settings = {"quantize_for_rollouts": True, "kl_coeff": 0.5, "use_compile": use_compile}
    trainer = make_trainer(
        model_dir, data_dir, tmp_path / "o", same, kl_target=1e-4, kl_horizon=8, **settings
    )
    trainer.lr_schedule = lambda _: 0.0  # the same policy again
    losses = [trainer.train_step([0, 1])[0] for _ in range(2)]
    assert [record["kl_coeff"] for record in losses] == pytest.approx([0.5, 0.6])
    assert losses[0]["loss"] > 1e-3
    trainer.run.state.kl_coeff = 0.0
    assert trainer.train_step([0, 1])[0]["loss"] == 0


def test_the_penalty_in_the_reward_is_the_sum_over_tokens(grpo, model_dir, data_dir, tmp_path):
    trainer = make_trainer(
        model_dir,
        data_dir,
        tmp_path / "o",
        kl_coeff=0.1,
        kl_estimator="k1",
        kl_placement="reward",
        quantize_for_rollouts=True,
        mask_truncated_completions=False,
    )
    rows, responses, _ = rollout(trainer)

    def kl_of():
        penalty = trainer.kl_penalty(as_rollout(trainer, rows, responses), {})
        return penalty[:, 0] / trainer.run.state.kl_coeff

    found = kl_of()
    for i in (0, 3, 11):  # each by itself
        [batch] = micro_batches(trainer, (rows[i : i + 1], responses[i : i + 1], [1.0]))
        width = batch.mask.shape[1]
        policy, ref = (
            grpo.token_logprobs(model, batch.tokens, width, 1.0)[0]
            for model in (trainer.model, trainer.ref_model)
        )
        assert found[i] == pytest.approx(((policy - ref) * batch.mask).sum().item(), abs=1e-4)
    trainer.scorer.splits = trainer.scorer.shares = False  # an unknown architecture
    assert kl_of() == pytest.approx(found, abs=1e-4)

    def rescored(model, batch, call=trainer.rescored):
        far = model is trainer.ref_model
        return (mx.full(batch.mask.shape, -1000.0), None) if far else call(model, batch)

    trainer.rescored = rescored
    lengths = [len(response.ids) for response in responses]
    assert kl_of() == pytest.approx([20 * n for n in lengths]), "at most 20 each"


def test_an_adaptive_coefficient_reaches_the_reward(
    grpo, model_dir, data_dir, tmp_path, monkeypatch
):
    settings = {"kl_coeff": 0.1, "kl_target": 0.01, "kl_placement": "reward"}
    trainer = make_trainer(
        model_dir, data_dir, tmp_path / "o", quantize_for_rollouts=True, **settings
    )
    trainer.run.state.kl_coeff, seen = 0.5, []

    def estimate(rollout, moments, penalty, args, call=grpo.estimate_advantages):
        seen.append((rollout, penalty))
        return call(rollout, moments, penalty, args)

    monkeypatch.setattr(grpo, "estimate_advantages", estimate)
    [record] = trainer.train_step([0, 1])
    [(sampled, penalty)] = seen
    total = 0.5 * record["kl"] * sampled.lengths.sum()
    assert penalty.sum() == pytest.approx(total)
    assert total > 1e-3


def test_the_kl_in_the_log_is_per_token_wherever_it_is_placed(model_dir, data_dir, tmp_path):
    settings = {"kl_coeff": 0.1, "quantize_for_rollouts": True}
    kl = []
    for place in ("loss", "reward"):
        trainer = make_trainer(
            model_dir, data_dir, tmp_path / place, kl_placement=place, **settings
        )
        kl.append(trainer.train_step([0, 1])[0]["kl"])
    assert kl[0] == pytest.approx(kl[1], rel=1e-3)
    assert kl[0] > 1e-4


def test_the_controller_goes_by_the_last_update_on_a_rollout(model_dir, data_dir, tmp_path):
    """Before the first one, policy and reference are the same."""
    settings = {"kl_coeff": 0.1, "kl_target": 1e-9, "num_iterations": 2, "learning_rate": 0.01}
    trainer = make_trainer(model_dir, data_dir, tmp_path / "o", digest, **settings)
    first, second = trainer.train_step([0, 1])
    assert first["kl"] < 1e-9 < 1e-6 < second["kl"]
    assert trainer.run.state.kl_coeff > 0.1


# Dynamic sampling.


def sometimes_dull(completions, question, **_):
    """Questions whose number is divisible by 3 give no signal, whatever the answer."""
    numbers = [int(q.rstrip("?").split()[-1]) for q in question]
    return [0.0 if n % 3 == 0 else d for n, d in zip(numbers, digest_of(completions), strict=True)]


def digest_of(completions):
    return [float(sum(map(ord, c[0]["content"])) % 101) for c in completions]


def numbers_of(trainer, record=None):
    rows = [trainer.train_dataset[i] for i in trainer.rollout.prompts]
    return [int(row["question"].rstrip("?").split()[-1]) for row in rows]


DYNAMIC = {"dynamic_sampling": 9, "batch_size": 3, "gradient_accumulation_steps": 2}


def test_dull_groups_are_replaced_from_the_stream(grpo, model_dir, data_dir, tmp_path):
    trainer = make_trainer(
        model_dir, data_dir, tmp_path / "o", sometimes_dull, log_completions=99, **DYNAMIC
    )
    stream, _ = trainer.order.draw(24, 0, set())
    number = [int(row["question"].rstrip("?").split()[-1]) for row in trainer.train_dataset]
    bright = [row for row in stream if number[row] % 3]
    batch = trainer.prompts_of_update(0)
    assert batch == stream[:6]
    [record] = trainer.train_step(batch)
    used = set(numbers_of(trainer))
    assert used == {number[row] for row in bright[:6]}, "the first six with signal, no other"
    last = stream.index(bright[5])
    assert trainer.run.state.drawn == last + 1
    assert record["resampled_prompts"] == last + 1 - 6
    assert record["reward/vowels"] == pytest.approx(record["reward_mean"]), "of the new groups"
    assert record["groups_without_signal"] == 0
    assert trainer.rollout.completions.size == 24
    assert trainer.prompts_of_update(1)[0] == stream[last + 1], "the next update goes on there"


def test_dynamic_sampling_is_bounded_and_the_schedule_stays(model_dir, data_dir, tmp_path):
    calls = []

    def dull(completions, **_):
        calls.append(len(completions))
        return [1.0] * len(completions)

    settings = {**DYNAMIC, "dynamic_sampling": 2}
    trainer = make_trainer(model_dir, data_dir, tmp_path / "o", dull, **settings)
    plain = make_trainer(
        model_dir, data_dir, tmp_path / "p", dull, **DYNAMIC | {"dynamic_sampling": 0}
    )
    assert trainer.total_updates == plain.total_updates == 4
    [record] = trainer.train_step(trainer.prompts_of_update(0))
    assert calls == [24, 24, 24]
    assert record["resampled_prompts"] == 12
    assert record["groups_without_signal"] == 1
    trainer.args.dynamic_sampling = 9
    calls.clear()
    [record] = trainer.train_step(trainer.prompts_of_update(1))
    assert sum(calls) == 24 * 4, "no prompt twice in an update: 24 in all, then it stops"
    assert record["update"] == 2
    rows, _ = trainer.order.draw(10, trainer.run.state.drawn, set())
    [record] = trainer.train_step(rows)
    assert record["resampled_prompts"] == 14, "in the last round there are four for ten places"


def test_what_a_reward_says_of_one_round_is_not_shown_beside_another(model_dir, data_dir, tmp_path):
    def telling(completions, log_extra, question, **_):
        log_extra("asked", list(question))
        return sometimes_dull(completions, question)

    trainer = make_trainer(model_dir, data_dir, tmp_path / "o", telling, **DYNAMIC)
    rows = trainer.prompts_of_update(0)
    [record] = trainer.train_step(rows)
    assert record["resampled_prompts"] > 0
    assert trainer.rewards.shown() == {}


def test_the_stream_wraps_with_a_new_order_each_time(model_dir, data_dir, tmp_path):
    trainer = make_trainer(model_dir, data_dir, tmp_path / "o", **DYNAMIC)
    first, position = trainer.order.draw(24, 0, set())
    second, position = trainer.order.draw(24, position, set())
    assert (sorted(first), sorted(second), position) == ([*range(24)], [*range(24)], 48)
    assert first != second
    across, _ = trainer.order.draw(6, 21, set())
    assert len(set(across)) == 6, "no row twice in an update, also where two passes meet"
    assert across[:3] == first[21:]
    assert sorted(trainer.order.draw(24, 12, set())[0]) == [*range(24)], "from anywhere, all"


def extra_state(trainer):
    return trainer.run.state.drawn, trainer.run.state.reward_moments, trainer.run.state.kl_coeff


KEPT = {
    "dynamic": DYNAMIC | {"reward_funcs": ["test_objectives:sometimes_dull"]},
    "running norm": {"reward_running_norm": True, "advantage_estimator": "rloo"},
    "adaptive, in the loss": {"kl_coeff": 0.1, "kl_target": 1e-3, "kl_horizon": 50},
    "adaptive, in the reward": {
        "kl_coeff": 0.1,
        "kl_target": 1e-3,
        "kl_horizon": 50,
        "kl_placement": "reward",
        "kl_estimator": "k1",
    },
    "moving reference": {"kl_coeff": 0.1, "ref_sync_updates": 2, "ref_sync_alpha": 0.3},
    "moving reference, adapters": {
        "kl_coeff": 0.1,
        "ref_sync_updates": 2,
        "train_type": "lora",
        "lora_learning_rate": 0.01,
    },
}


IN_SHORT = ("dynamic", "running norm", "adaptive, in the loss", "moving reference")


@pytest.mark.parametrize("name", mostly_long(KEPT, *IN_SHORT))
def test_what_an_objective_remembers_survives_a_stop(model_dir, data_dir, tmp_path, name):
    """Stopped in the middle of a rollout and resumed, the run is the one that never stopped."""
    settings = {k: v for k, v in RESUMED.items() if k != "lora_learning_rate"} | KEPT[name]
    settings["max_updates"] = 5
    _, whole = run_training(model_dir, data_dir, tmp_path / "whole", **settings)

    def interrupt(trainer):
        def compute_rewards(*args, call=trainer.compute_rewards):
            result = call(*args)
            trainer.run.interrupted = trainer.update_step == 3
            return result

        trainer.compute_rewards = compute_rewards

    code, stopped = run_training(model_dir, data_dir, tmp_path / "parts", interrupt, **settings)
    assert (code, stopped.update_step) == (130, 3)
    _, resumed = run_training(model_dir, data_dir, tmp_path / "parts", resume="auto", **settings)
    assert extra_state(resumed) == extra_state(whole) != extra_state(stopped) or "moving" in name
    assert snapshot(resumed) == snapshot(whole)
    assert timeless(tmp_path / "parts") == timeless(tmp_path / "whole")
    if whole.ref_model is not None:
        parts = flat(resumed.ref_model.parameters())
        for key, value in flat(whole.ref_model.parameters()).items():
            assert mx.array_equal(parts[key], value)


# Settings.


def test_papers_fill_in_what_is_not_set(grpo):
    widths = {
        name: (config.clip_eps, config.clip_eps_high)
        for name in LOSSES
        for config in [grpo.MLXGRPOConfig(loss_type=name)]
    }
    assert widths == {
        **dict.fromkeys(LOSSES, (0.2, 0.0)),
        "dapo": (0.2, 0.28),
        "gspo": (3e-4, 4e-4),
        "gmpo": (0.4, 0.4),
        "cispo": (0.2, 4.0),
    }
    mine = grpo.MLXGRPOConfig(loss_type="gspo", clip_eps=0.2, clip_eps_high=0.3)
    assert (mine.clip_eps, mine.clip_eps_high) == (0.2, 0.3), "also where it is the usual default"
    assert grpo.MLXGRPOConfig(loss_type="gspo").importance_sampling_level == "sequence"


def test_what_has_no_effect_may_be_written_down_at_its_default(model_dir, data_dir, tmp_path):
    settings = {"clip_eps": 0.2, "kl_estimator": "k3", "ref_sync_alpha": 0.6}
    make_trainer(model_dir, data_dir, tmp_path / "o", **settings)
    for name, other in ("clip_eps", 0.1), ("kl_estimator", "k2"), ("ref_sync_alpha", 0.5):
        with pytest.raises(UserError, match=f"^{name} has no effect with"):
            make_trainer(model_dir, data_dir, tmp_path / "o", **settings | {name: other})


def test_the_prefix_leaves_room_for_a_token(grpo):
    config = grpo.MLXGRPOConfig(max_completion_length=5)
    assert checks.room_for_sampling(config, 4) == 1
    with pytest.raises(UserError, match=r"leaves no room after reasoning_prefix \(5 tokens\)"):
        checks.room_for_sampling(config, 5)


@pytest.mark.parametrize("alias", ["gspo", "gmpo", "cpgd"])
def test_an_alias_is_a_loss_with_group_norm(grpo, model_dir, data_dir, tmp_path, alias):
    given, meant = (
        make_config(model_dir, data_dir, tmp_path / "o", **settings)
        for settings in ({"advantage_estimator": alias}, {"loss_type": alias})
    )
    assert given == meant
    assert (given.loss_type, given.advantage_estimator) == (alias, "group_norm")
    assert given.advantage_eps == (1e-6 if alias == "cpgd" else 1e-4)
    both = {"advantage_estimator": alias, "loss_type": alias}
    assert make_config(model_dir, data_dir, tmp_path / "o", **both) == meant
    with pytest.raises(UserError, match="stands for loss_type"):
        grpo.MLXGRPOConfig(advantage_estimator=alias, loss_type="grpo")


def test_every_loss_and_estimator_trains(model_dir, data_dir, tmp_path):
    """A whole run each, two updates on every rollout; the log has all figures."""
    both = [("loss_type", n) for n in LOSSES] + [("advantage_estimator", n) for n in ESTIMATORS]
    for key, name in both:
        settings = {key: name}
        settings |= {"num_iterations": 2, "max_updates": 2, "max_new_tokens": 4}
        settings |= {"reward_funcs": ["helpers:digest", "helpers:vowels"]}
        code, _ = run_training(model_dir, data_dir, tmp_path / f"{key}-{name}", **settings)
        assert code == 0
        [record] = [r for r in read_log(tmp_path / f"{key}-{name}") if "loss" in r]
        assert record["grad_norm"] > 0
        assert record["skipped"] == 0


def test_a_stop_between_updates_is_enough_for_nothing_to_be_lost(model_dir, data_dir, tmp_path):
    settings = {k: v for k, v in RESUMED.items() if k != "lora_learning_rate"} | KEPT["dynamic"]
    settings["max_updates"] = 4
    _, whole = run_training(model_dir, data_dir, tmp_path / "whole", **settings)
    run_training(model_dir, data_dir, tmp_path / "parts", stop_after(2), **settings)
    _, resumed = run_training(model_dir, data_dir, tmp_path / "parts", resume="auto", **settings)
    assert snapshot(resumed) == snapshot(whole)
    assert extra_state(resumed) == extra_state(whole)


def test_what_is_selected_is_selected_again_when_memory_runs_out(model_dir, data_dir, tmp_path):
    """The update is cut up anew, in halves, and gives the same loss."""
    records = []
    for fails in (False, True):
        trainer = make_trainer(
            model_dir, data_dir, tmp_path / "o", top_entropy_quantile=0.5, entropy_coeff=0.1
        )
        inner, failures = trainer.loss_and_grad, [1] * fails

        def loss_and_grad(batch, inner=inner, failures=failures):
            if failures:
                failures.pop()
                raise RuntimeError("[malloc] unable to allocate")
            return inner(batch)

        trainer.loss_and_grad = loss_and_grad
        records += trainer.train_step([0, 1])
    whole, halves = records
    assert halves["loss"] == pytest.approx(whole["loss"], rel=1e-4)
    assert halves["grad_norm"] == pytest.approx(whole["grad_norm"], rel=1e-4)


def test_a_kl_that_is_not_finite_does_not_reach_the_coefficient(model_dir, data_dir, tmp_path):
    trainer = make_trainer(
        model_dir, data_dir, tmp_path / "o", kl_coeff=0.1, kl_target=0.01, kl_horizon=8
    )
    for kl in (math.nan, math.inf, None):
        trainer.move_reference([{"update": 1, "kl": kl}], 8)
        assert trainer.run.state.kl_coeff == 0.1
    trainer.move_reference([{"update": 1, "kl": 1.0}], 8)
    assert trainer.run.state.kl_coeff == pytest.approx(0.12)
