"""The step and the run: optimizer, schedule, adapters, counters, logs, checkpoints, resuming."""

import itertools
import json
import math
import shutil
import time
from functools import partial

import mlx.core as mx
import mlx.optimizers as optim
import mlx_lm
import numpy as np
import pytest
from conftest import make_model
from helpers import (
    RESUMED,
    completion,
    digest,
    flat,
    make_config,
    make_trainer,
    mostly_long,
    poison,
    read_log,
    run_training,
    snapshot,
    spy_on_gradients,
    stop_after,
    timeless,
)
from mlx.utils import tree_flatten, tree_map

from utils.base.errors import RunError, UserError
from utils.data import order
from utils.gradient import adamw
from utils.model import writing
from utils.run import checkpoints
from utils.run import log as runlog

TOKENS = [list(range(3, 60))]


def logits(model):
    return np.array(model(mx.array(TOKENS)).astype(mx.float32))


def load_logits(folder, **how):
    return logits(mlx_lm.load(str(folder), **how)[0])


# The optimizer.


def test_adamw_is_corrected_for_its_bias_from_the_first_step(model_dir, data_dir, tmp_path):
    lr, beta1, beta2, decay = 0.01, 0.8, 0.95, 0.1
    trainer = make_trainer(
        model_dir,
        data_dir,
        tmp_path / "o",
        learning_rate=lr,
        lr_scheduler_type="constant",
        warmup_ratio=0.0,
        adam_beta1=beta1,
        adam_beta2=beta2,
        weight_decay=decay,
        max_grad_norm=1e9,
    )
    name = "model.layers.0.mlp.up_proj.weight"
    w = np.array(flat(trainer.model.parameters())[name], np.float64)
    m = v = np.zeros_like(w)
    generator = np.random.default_rng(0)
    for t in (1, 2, 3):
        g = generator.normal(size=w.shape)
        grads = tree_map(mx.zeros_like, trainer.optimizer.masters(trainer.model))
        grads["model"]["layers"][0]["mlp"]["up_proj"]["weight"] = mx.array(g, mx.float32)
        trainer.apply_gradients(0.0, grads, t)
        m, v = beta1 * m + (1 - beta1) * g, beta2 * v + (1 - beta2) * g**2
        corrected = (m / (1 - beta1**t)) / (np.sqrt(v / (1 - beta2**t)) + 1e-8)
        w = w * (1 - lr * decay) - lr * corrected
        assert np.array(flat(trainer.model.parameters())[name]) == pytest.approx(w, abs=2e-6)
        if t == 1:
            assert corrected == pytest.approx(np.sign(g), abs=1e-3), "a whole learning rate"


def test_the_global_norm_is_clipped(model_dir, data_dir, tmp_path):
    trainer = make_trainer(model_dir, data_dir, tmp_path / "o", max_grad_norm=0.25)
    seen = []
    trainer.optimizer.update = lambda _, grads, lr, clip: seen.append((flat(grads), clip))
    count = sum(x.size for _, x in tree_flatten(trainer.optimizer.masters(trainer.model)))
    for size, expected in ((0.1, 0.25), (1e-5, 1e-5 * math.sqrt(count))):
        grads = tree_map(
            lambda w, size=size: mx.full(w.shape, size), trainer.optimizer.masters(trainer.model)
        )
        norm, _ = trainer.apply_gradients(0.0, grads, 1)
        assert norm == pytest.approx(size * math.sqrt(count), rel=1e-4)
        got, clip = seen[-1]
        clipped = clip * math.sqrt(sum((x**2).sum().item() for x in got.values()))
        assert clipped == pytest.approx(expected, rel=1e-4)


def test_bfloat16_weights_move_at_1e_6_only_through_float32_masters(model_dir, data_dir, tmp_path):
    trainer = make_trainer(
        model_dir,
        data_dir,
        tmp_path / "o",
        dtype="bfloat16",
        learning_rate=1e-6,
        lr_scheduler_type="constant",
        warmup_ratio=0.0,
    )
    start = flat(trainer.model.parameters())
    master = flat(trainer.optimizer.masters(trainer.model))
    assert {x.dtype for x in start.values()} == {mx.bfloat16}
    grads = tree_map(lambda w: mx.full(w.shape, 0.01), trainer.optimizer.masters(trainer.model))
    half = tree_map(lambda g: g.astype(mx.bfloat16), grads)
    plain, weights = optim.AdamW(1e-6, bias_correction=True), trainer.model.parameters()
    for number in range(1, 101):
        trainer.apply_gradients(0.0, grads, number)
        weights = plain.apply_gradients(half, weights)
        mx.eval(weights, plain.state)
    after = flat(trainer.optimizer.masters(trainer.model))
    for name, value in master.items():
        assert mx.allclose(value - after[name], mx.array(1e-4), rtol=0.1), name

    def moved(weights):
        changed = sum((weights[name] != x).sum().item() for name, x in start.items())
        return changed / sum(x.size for x in start.values())

    assert moved(flat(trainer.model.parameters())) > 5 * moved(flat(weights))
    for name, value in flat(trainer.model.parameters()).items():
        assert mx.array_equal(value, after[name].astype(mx.bfloat16))


# The schedule.


@pytest.mark.parametrize("kind", ["cosine", "linear", "constant"])
@pytest.mark.parametrize(("warmup_ratio", "warmup"), [(0.0, 1), (0.3, 3), (0.59, 5), (1.0, 10)])
def test_learning_rates_of_all_updates(model_dir, data_dir, tmp_path, kind, warmup_ratio, warmup):
    trainer = make_trainer(
        model_dir,
        data_dir,
        tmp_path / "o",
        learning_rate=0.5,
        lr_scheduler_type=kind,
        warmup_ratio=warmup_ratio,
        max_updates=10,
    )
    assert trainer.total_updates == 10
    for update in range(1, 11):
        done = (update - warmup) / (11 - warmup) if update > warmup else 0.0
        expected = {"cosine": (1 + math.cos(math.pi * done)) / 2, "linear": 1 - done, "constant": 1}
        factor = expected[kind] * min(1.0, update / warmup)
        assert trainer.lr_schedule(update) == pytest.approx(0.5 * factor, abs=1e-12)
    assert trainer.lr_schedule(warmup) == 0.5
    assert trainer.lr_schedule(11) == pytest.approx(0.5 * (kind == "constant")), "after the last"


@pytest.mark.parametrize("kind", ["cosine", "linear", "constant"])
@pytest.mark.parametrize("warmup_ratio", [0.0, 0.1, 0.34, 0.5, 0.99, 1.0])
def test_no_update_has_a_learning_rate_of_0(kind, warmup_ratio):
    """Its whole rollout would be wasted: of a run of two updates, half of what it sampled."""
    for updates in (1, 2, 3, 7, 10, 1000):
        rate = partial(adamw.learning_rate, 0.5, updates, warmup_ratio, kind)
        rates = [rate(update) for update in range(1, updates + 1)]
        assert min(rates) > 0.5 / (5 * updates**2), updates
        assert max(rates) == 0.5, updates
    assert adamw.learning_rate(0.5, 2, 0.1, "cosine", 2) == pytest.approx(0.25), "half way to 0"


@pytest.mark.parametrize(
    ("settings", "updates", "steps"),
    [
        ({}, 12, 24),
        ({"gradient_accumulation_steps": 1}, 24, 24),
        ({"batch_size": 5}, 3, 5),  # batches of 5, 5 | 5, 5 | 4
        ({"batch_size": 7, "gradient_accumulation_steps": 1, "num_epochs": 2}, 8, 8),
        ({"batch_size": 5, "num_epochs": 3, "num_iterations": 2}, 18, 15),
        ({"max_train_samples": 5}, 3, 5),
        ({"max_updates": 4}, 4, 8),
        ({"max_updates": 5, "num_iterations": 2}, 5, 6),  # the last rollout is used once
        ({"max_updates": 99}, 12, 24),
        ({"max_prompt_length": 33}, 8, 16),  # 8 longer questions are left out
    ],
    ids=range(10),
)
def test_the_number_of_updates(model_dir, data_dir, tmp_path, settings, updates, steps):
    defaults = {"num_generations": 2, "max_new_tokens": 1, "logging_steps": 1}
    code, trainer = run_training(model_dir, data_dir, tmp_path / "o", **defaults, **settings)
    assert code == 0
    assert (trainer.total_updates, trainer.update_step, trainer.step) == (updates, updates, steps)
    records = [r for r in read_log(tmp_path / "o") if "loss" in r]
    used = [r["lr"] for r in records]
    if "num_iterations" not in settings:
        assert used == [trainer.lr_schedule(u) for u in range(1, updates + 1)]
    assert (records[-1]["update"], records[-1]["batch_step"]) == (updates, steps)


def test_an_epoch_shows_each_question_once_in_an_order_of_its_own(model_dir, data_dir, tmp_path):
    trainer = make_trainer(model_dir, data_dir, tmp_path / "o", num_epochs=2, batch_size=5)
    rollouts = [trainer.prompts_of_update(n) for n in range(6)]
    assert [len(prompts) for prompts in rollouts] == [10, 10, 4, 10, 10, 4]
    first, second = ([*a, *b, *c] for a, b, c in (rollouts[:3], rollouts[3:]))
    assert sorted(first) == sorted(second) == list(range(24))
    assert first != second
    other = make_trainer(model_dir, data_dir, tmp_path / "o", batch_size=5, seed=1)
    assert other.prompts_of_update(0) != rollouts[0]


# Updates that are left out, and updates that say nothing.


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_an_update_that_is_not_finite_changes_nothing(model_dir, data_dir, tmp_path, capsys, what):
    trainer = make_trainer(model_dir, data_dir, tmp_path / "o", digest)
    trainer.train_step([0, 1])
    before = snapshot(trainer)
    healthy = poison(trainer, **{what: True})
    (record,) = trainer.train_step([2, 3])
    assert snapshot(trainer) == before
    assert record["skipped"] == 1
    assert not math.isfinite(record["loss"] if what == "loss" else record["grad_norm"])
    assert "update 2: " in capsys.readouterr().out
    assert trainer.update_step == record["update"] == 2
    trainer.loss_and_grad = healthy
    (record,) = trainer.train_step([4, 5])
    assert (record["update"], record["skipped"]) == (3, 0)
    assert record["lr"] == trainer.lr_schedule(3), "the schedule has advanced"
    assert snapshot(trainer) != before


def test_five_bad_updates_in_a_row_stop_the_run(model_dir, data_dir, tmp_path):
    trainer = make_trainer(model_dir, data_dir, tmp_path / "o", digest)
    healthy = poison(trainer, loss=True)
    for _ in range(4):
        trainer.train_step([0, 1])
    bad, trainer.loss_and_grad = trainer.loss_and_grad, healthy
    trainer.train_step([0, 1])
    trainer.loss_and_grad = bad
    for _ in range(4):
        trainer.train_step([0, 1])
    assert trainer.run.state.bad_updates == 4, "the good one in between began the count anew"
    trainer.args.eval_samples = trainer.args.eval_subset_size = 0
    with pytest.raises(RunError, match="five updates in a row"):
        trainer.train()
    assert trainer.run.state.bad_updates == 5


def test_a_run_that_diverges_ends_with_exit_code_1(typed, grpo, monkeypatch, tmp_path):
    sound = grpo.grpo_loss

    def diverging(*args, **options):
        loss, sums = sound(*args, **options)
        return loss * math.nan, sums

    monkeypatch.setattr(grpo, "grpo_loss", diverging)
    code, out, err, _ = typed(reward_funcs=["helpers:digest"])
    assert code == 1
    assert "five updates in a row were not finite" in err
    assert "stopped   after update 5, saved in" in out
    records = read_log(tmp_path / "out")
    assert [(r["update"], r["loss"], r["skipped"]) for r in records] == [
        (update, None, 1) for update in range(1, 6)
    ]


def test_groups_without_spread_cost_no_backward_pass(model_dir, data_dir, tmp_path):
    def same(completions, **_):
        return [1.0] * len(completions)

    trainer = make_trainer(model_dir, data_dir, tmp_path / "o", same)
    calls, _ = spy_on_gradients(trainer)
    before = snapshot(trainer)
    (record,) = trainer.train_step([0, 1])
    assert calls == []
    assert (record["update"], record["loss"], record["grad_norm"]) == (1, 0.0, 0.0)
    assert record["groups_without_signal"] == 1.0
    assert record["lr"] == trainer.lr_schedule(1)
    assert snapshot(trainer) == before, "no momentum yet"


def test_groups_without_spread_stay_in_the_normaliser(model_dir, data_dir, tmp_path):
    def first_prompt_only(completions, answer, **_):
        return [float(n) if a == answer[0] else 0.0 for n, a in enumerate(answer)]

    trainer = make_trainer(model_dir, data_dir, tmp_path / "o", first_prompt_only)
    calls, _ = spy_on_gradients(trainer)
    (record,) = trainer.train_step([0, 1])
    ((batch, _, _),) = calls
    lengths = np.array(batch.mask.sum(axis=1))
    assert len(lengths) == 4, "the sequences of one group"
    assert np.array(batch.weights) == pytest.approx(1 / (8 * lengths)), "of 8 sequences"
    assert record["groups_without_signal"] == 0.5


@pytest.mark.parametrize(
    "settings", [{"kl_coeff": 0.1}, {"entropy_coeff": 0.1}, {"top_entropy_quantile": 0.5}]
)
def test_with_another_pull_they_stay_in_the_gradient(model_dir, data_dir, tmp_path, settings):
    """Of a reference or an entropy bonus; and a quantile is that of all tokens."""

    def same(completions, **_):
        return [1.0] * len(completions)

    trainer = make_trainer(model_dir, data_dir, tmp_path / "o", same, **settings)
    calls, _ = spy_on_gradients(trainer)
    trainer.train_step([0, 1])
    assert sum(batch.mask.shape[0] for batch, _, _ in calls) == 8


# Adapters.


@pytest.mark.parametrize(
    ("base", "train_type"),
    mostly_long(itertools.product(["float", "4bit"], ["lora", "dora"]), ("4bit", "lora")),
)
def test_adapters_from_the_first_update_to_the_fused_model(
    model_dir, quantized_dir, data_dir, tmp_path, monkeypatch, capsys, train_type, base
):
    """Folders that mlx_lm.load, mlx_lm.fuse and a next run read, with the same logits each."""
    folder = model_dir if base == "float" else quantized_dir
    automatic = base == "4bit" and train_type == "lora"
    settings = {
        "train_type": "auto" if automatic else train_type,
        "lora_learning_rate": 0.01,
        "lora_rank": 4,
        "max_updates": 3,
        "save_steps": 2,
        "eval_samples": 2,
    }
    code, trainer = run_training(folder, data_dir, tmp_path / "o", **settings)
    assert code == 0
    assert "fused     scores 0.000, base with adapters 0.000" in capsys.readouterr().out
    assert trainer.loaded.train_type == train_type
    assert max(r["lr"] for r in read_log(tmp_path / "o") if "lr" in r) == 0.01
    assert {x.dtype for x in flat(trainer.model.trainable_parameters()).values()} == {mx.float32}

    trained = logits(trainer.model)
    assert np.abs(trained - load_logits(folder)).max() > 0.1, "something was learnt"
    final, checkpoint = tmp_path / "o" / "final", tmp_path / "o" / "checkpoint-6"
    for adapters in (checkpoint, final / "adapters"):
        assert load_logits(folder, adapter_path=str(adapters)) == pytest.approx(trained, abs=1e-5)
    assert load_logits(final) == pytest.approx(trained, abs=1e-4)
    assert "quantization" not in json.loads((final / "config.json").read_text())

    fused = tmp_path / "fused"
    words = f"fuse --model {folder} --adapter-path {checkpoint} --save-path {fused} --dequantize"
    monkeypatch.setattr("sys.argv", words.split())
    from mlx_lm import fuse

    fuse.main()
    assert load_logits(fused) == pytest.approx(trained, abs=1e-4)

    again = make_trainer(
        folder, data_dir, tmp_path / "again", adapter_path=str(checkpoint), kl_coeff=0.1
    )
    assert again.loaded.train_type == train_type
    assert logits(again.model) == pytest.approx(trained, abs=1e-5)
    assert logits(again.ref_model) == pytest.approx(load_logits(folder), abs=0), "without adapters"


def test_dropout_acts_in_the_gradient_alone(model_dir, data_dir, tmp_path, grpo):
    settings = {"train_type": "lora", "lora_dropout": 0.5, "lora_learning_rate": 0.02}
    trainer = make_trainer(model_dir, data_dir, tmp_path / "o", digest, **settings)
    for name, module in trainer.model.named_modules():
        if "lora_b" in module:  # as if trained, so that dropout would show from the start
            module.lora_b = mx.random.normal(module.lora_b.shape, key=mx.random.key(len(name)))
    for update in range(2):
        for batch in trainer.micro_batches(trainer.roll_out([3, 4], {}), np.ones((2, 4))):
            width = batch.mask.shape[1]
            forward = grpo.token_logprobs(trainer.model, batch.tokens, width, 1.0)[0]
            gap = mx.abs(forward - batch.sampler_logprobs) * batch.mask
            assert gap.max().item() < 1e-3, f"before update {update + 1}"
        (record,) = trainer.train_step([0, 1])
        assert record["sampler_mismatch"] > 0.1, "the gradient's forward pass drops"


def test_only_the_gradient_sees_the_model_in_training_mode(model_dir, data_dir, tmp_path):
    """Some models sample by kernels that have no gradient, and ask `self.training` for it."""
    trainer = make_trainer(model_dir, data_dir, tmp_path / "o")
    modes = []

    def noted(name, call):
        def note_and_call(*args):
            modes.append((name, {m.training for _, m in trainer.model.named_modules()}))
            return call(*args)

        return note_and_call

    trainer.sampler = noted("rollout", trainer.sampler)
    trainer.loss_and_grad = noted("gradient", trainer.loss_and_grad)
    trainer.train_step([0, 1])
    trainer.train_step([2, 3])
    assert modes == [("rollout", {False}), ("gradient", {True})] * 2


def test_dropout_is_decided_by_the_seed(model_dir, data_dir, tmp_path):
    def weights(global_seed, **settings):
        settings = {"train_type": "lora", "lora_learning_rate": 0.02, "seed": 3, **settings}
        trainer = make_trainer(model_dir, data_dir, tmp_path / "o", digest, **settings)
        for rows in ([0, 1], [2, 3]):
            mx.random.seed(global_seed)
            trainer.train_step(rows)
        return snapshot(trainer)

    dropped = weights(1, lora_dropout=0.4)
    assert weights(2, lora_dropout=0.4) == dropped
    assert weights(1) != dropped


@pytest.mark.parametrize("use_compile", [False, True])
def test_all_updates_on_a_rollout_drop_the_same(model_dir, data_dir, tmp_path, use_compile):
    """Another mask would move the ratio to the anchor; the next rollout has another."""
    settings = {"train_type": "lora", "lora_dropout": 0.5, "lora_learning_rate": 1e-9}
    settings |= {"num_iterations": 2, "use_compile": use_compile}
    trainer = make_trainer(model_dir, data_dir, tmp_path / "o", digest, **settings)
    for name, module in trainer.model.named_modules():
        if "lora_b" in module:
            module.lora_b = mx.random.normal(module.lora_b.shape, key=mx.random.key(len(name)))
    rollout = trainer.roll_out([0, 1], {})
    calls, _ = spy_on_gradients(trainer)
    for trainer.run.state.rollout in (0, 1):
        trainer.learn(rollout, np.arange(8).reshape(2, 4) - 3.5)
    passes = np.array_split([mx.sum(logprobs).item() for _, _, logprobs in calls], 4)
    assert passes[1] == pytest.approx(passes[0], rel=1e-5)
    assert passes[2] != pytest.approx(passes[0], rel=1e-3)
    assert passes[3] == pytest.approx(passes[2], rel=1e-5)


def test_gradient_checkpointing_with_adapters_changes_nothing(model_dir, data_dir, tmp_path):
    results = []
    for checkpointing in (False, True):
        settings = {"train_type": "lora", "gradient_checkpointing": checkpointing}
        trainer = make_trainer(
            model_dir, data_dir, tmp_path / "o", digest, lora_learning_rate=0.01, **settings
        )
        _, gradients = spy_on_gradients(trainer)
        for rows in ([0, 1], [2, 3]):
            trainer.train_step(rows)
        results.append(gradients[1])
    plain, recomputed = results
    largest = max(mx.abs(g).max().item() for g in plain.values())
    assert {name.rpartition(".")[2] for name in plain} == {"lora_a", "lora_b"}
    assert largest > 1e-3
    for name, gradient in plain.items():
        assert mx.abs(gradient - recomputed[name]).max().item() <= 1e-5 * largest


def test_gradient_checkpointing_with_dropout_is_refused(model_dir, data_dir, tmp_path):
    settings = {"lora_dropout": 0.1, "gradient_checkpointing": True, "train_type": "lora"}
    with pytest.raises(UserError, match="another mask"):
        make_config(model_dir, data_dir, tmp_path / "o", **settings)


# What is written, and when.


def counted(output_dir):
    records = read_log(output_dir)
    training = [(r["update"], r["batch_step"]) for r in records if "loss" in r]
    evaluations = [(r["split"], r["update"]) for r in records if "em" in r]
    return training, evaluations


def test_actions_fire_after_the_update_in_which_their_count_grew(model_dir, data_dir, tmp_path):
    """10 batches in updates of 4, 4 and 2: `step` is 4, 8 and 10."""
    run_training(
        model_dir,
        data_dir,
        tmp_path / "o",
        max_train_samples=10,
        gradient_accumulation_steps=4,
        logging_steps=5,
        eval_steps=3,
        eval_samples=3,
        eval_every_updates=2,
        eval_subset_size=3,
        save_steps=5,
        max_new_tokens=2,
        eval_max_new_tokens=2,
    )
    training, evaluations = counted(tmp_path / "o")
    assert training == [(2, 8), (3, 10)]
    # Step 10 calls for an evaluation too, but after the last update there is one in any case.
    assert evaluations == [("test", 0), ("test", 1), ("train", 2), ("test", 2), ("test", 3)]
    checkpoints = sorted(path.name for path in (tmp_path / "o").glob("checkpoint-*"))
    assert checkpoints == ["checkpoint-10", "checkpoint-8"]


def test_each_action_can_be_turned_off(model_dir, data_dir, tmp_path):
    off = {"eval_samples": 4, "eval_steps": 0, "eval_every_updates": 0, "save_steps": 0}
    run_training(model_dir, data_dir, tmp_path / "o", max_updates=2, log_jsonl=True, **off)
    training, evaluations = counted(tmp_path / "o")
    assert training == [(1, 2), (2, 4)]
    assert evaluations == [("test", 0), ("test", 2)]
    assert not list((tmp_path / "o").glob("checkpoint-*"))


@pytest.mark.parametrize(("limit", "kept"), [(2, ["8", "10"]), (0, ["2", "4", "6", "8", "10"])])
def test_the_newest_checkpoints_are_kept(model_dir, data_dir, tmp_path, limit, kept):
    settings = {"max_updates": 5, "save_steps": 1, "save_total_limit": limit}
    run_training(model_dir, data_dir, tmp_path / "o", **settings)
    found = {path.name for path in (tmp_path / "o").iterdir() if path.is_dir()}
    assert found == {*(f"checkpoint-{n}" for n in kept), "completions", "final"}


def test_checkpoints_and_final_are_complete_models(model_dir, data_dir, tmp_path, grpo):
    seen = {}

    def prepare(trainer):
        save = trainer.save_checkpoint

        def save_checkpoint(path):
            save(path)
            seen[path] = logits(trainer.model)

        trainer.save_checkpoint = save_checkpoint

    settings = {"max_updates": 2, "save_steps": 2, "learning_rate": 0.01}
    _, trainer = run_training(model_dir, data_dir, tmp_path / "o", prepare, **settings)
    assert [path.name for path in seen] == ["checkpoint-2", "checkpoint-4"]
    seen[tmp_path / "o" / "final"] = logits(trainer.model)
    for folder, expected in seen.items():
        model, tokenizer = mlx_lm.load(str(folder))
        assert np.array_equal(logits(model), expected)
        user = trainer.train_dataset[0]["prompt"][-1:]
        asked = tokenizer.apply_chat_template(user, add_generation_prompt=True)
        assert asked == trainer.train_dataset[0]["prompt_ids"], "what is served is as trained"
        generation = json.loads((folder / "generation_config.json").read_text())
        assert generation == {"eos_token_id": [2], "stop_strings": ["</answer>"]}
    assert not list((tmp_path / "o").glob(".*")), "nothing half written is left"
    state = json.loads((tmp_path / "o" / "checkpoint-4" / "trainer_state.json").read_text())
    assert (state["step"], state["update_step"]) == (4, 2)


def test_stop_strings_join_a_generation_config_and_none_leaves_it_alone(data_dir, tmp_path):
    folder = make_model(tmp_path / "m")
    settings = {"eos_token_id": 2, "top_k": 20, "stop_strings": ["of an earlier run"]}
    (folder / "generation_config.json").write_text(json.dumps(settings))
    for stops, expected in ((["x", "y"], {"stop_strings": ["x", "y"]}), ([], {})):
        output = tmp_path / f"o{len(stops)}"
        run_training(folder, data_dir, output, max_updates=1, stop_strings=stops)
        found = json.loads((output / "final" / "generation_config.json").read_text())
        assert found == {"eos_token_id": 2, "top_k": 20, **expected}
    writing.write_stop_strings(tmp_path, ["x"], {5, 2})  # where the model has no such file
    found = json.loads((tmp_path / "generation_config.json").read_text())
    assert found == {"eos_token_id": [2, 5], "stop_strings": ["x"]}, "EOS still ends a text"


LOGGED = {
    *("update", "batch_step", "lr", "loss", "grad_norm", "policy_reward", "kl", "skipped"),
    *("reward_mean", "reward_std", "reward/helpers:digest", "groups_without_signal"),
    *("completion_length", "completion_length_max", "truncation_rate", "tokens", "entropy"),
    *("clip_low", "clip_high", "importance_weight", "importance_capped", "sampler_mismatch"),
    *("tokens_per_second", "seconds", "seconds_rollout", "seconds_rewards", "seconds_gradient"),
    *("peak_memory_gb", "active_memory_gb", "cache_memory_gb"),
}


def test_a_training_record_has_every_figure(model_dir, data_dir, tmp_path):
    """And they say what the rollout was, which is taken from the trainer here."""
    rollouts = []

    def prepare(trainer):
        generate = trainer.generate_responses
        trainer.generate_responses = lambda rows: rollouts.append(generate(rows)) or rollouts[-1]

    settings = {"max_updates": 2, "logging_steps": 4, "stop_strings": ["t", "0"]}
    settings |= {"max_new_tokens": 30, "kl_coeff": 0.1, "eval_samples": 3}
    _, trainer = run_training(model_dir, data_dir, tmp_path / "o", prepare, **settings)
    first, record, last = read_log(tmp_path / "o")
    assert set(record) == LOGGED
    assert record["lr"] == trainer.lr_schedule(2), "of the newest update, not a mean"
    assert all(isinstance(value, int | float) for value in record.values())
    assert (record["update"], record["batch_step"]) == (2, 4)
    responses = [response for rollout in rollouts for response in rollout]
    lengths = [len(r.ids) for r in responses]
    assert len(set(lengths)) > 3
    assert record["completion_length"] == pytest.approx(np.mean(lengths))
    assert record["tokens"] == pytest.approx(sum(lengths) / 2)
    cut = [r.finish_reason == "length" for r in responses]
    assert record["truncation_rate"] == pytest.approx(np.mean(cut))
    rewards = np.array(digest([r.ids for r in responses])).reshape(4, 4)
    assert record["reward_mean"] == record["reward/helpers:digest"] == pytest.approx(rewards.mean())
    assert record["reward_std"] == pytest.approx(rewards.std(axis=1, ddof=1).mean())
    entropies = [-np.mean([x for r in rollout for x in r.logprobs]) for rollout in rollouts]
    assert record["entropy"] == pytest.approx(np.mean(entropies))
    assert record["seconds"] > record["seconds_rollout"] > 0
    assert record["peak_memory_gb"] > record["active_memory_gb"] > 0
    assert record["cache_memory_gb"] >= 0
    keys = {"update", "batch_step", "split", "em", "em_subset", "truncation_rate"}
    assert set(first) == set(last) == keys
    assert (first["update"], last["update"], last["split"], last["em_subset"]) == (0, 2, "test", 3)


def test_what_is_no_number_is_null_in_the_log(grpo, tmp_path):
    log = runlog.RunLog(grpo.MLXGRPOConfig(output_dir=str(tmp_path)))
    log.write({"update": 1, "loss": math.nan, "grad_norm": math.inf, "lr": 0.5, "kl": None})
    assert log.path.read_text() == (
        '{"update": 1, "loss": null, "grad_norm": null, "lr": 0.5, "kl": null}\n'
    )


def test_shares_are_of_the_tokens_that_they_are_about():
    """4 of an update's 8 tokens had a gradient: those without advantage can't be clipped."""
    sums = runlog.TokenSums()
    sums.add({"clip_low": 1.0, "policy_reward": 2.0, "importance_weight": 3.0}, mx.ones((1, 3)))
    sums.add({"clip_low": 1.0, "policy_reward": 2.0, "importance_weight": 1.0}, mx.ones((1, 1)))
    means = sums.means(8)
    assert (means["clip_low"], means["policy_reward"]) == (0.25, 0.5)
    assert means["importance_weight"] == 1.0


def test_policy_reward_is_the_mean_of_ratio_times_advantage(grpo, model_dir, data_dir, tmp_path):
    trainer = make_trainer(
        model_dir, data_dir, tmp_path / "o", digest, num_iterations=2, learning_rate=0.01
    )
    calls, _ = spy_on_gradients(trainer)
    records = trainer.train_step([0, 1])
    for record, (batch, _, logprobs) in zip(records, calls, strict=True):
        ratio = mx.exp(logprobs - (logprobs if batch.old_logprobs is None else batch.old_logprobs))
        rewards = (ratio * batch.advantages[:, None] * batch.mask).sum()
        expected = (rewards / batch.mask.sum()).item()
        assert record["policy_reward"] == pytest.approx(expected, abs=1e-5)
        assert record["kl"] is None
        sampled = record["tokens_per_second"] * record["seconds_rollout"]
        assert sampled == pytest.approx(record["tokens"])


# Evaluation.


def test_the_evaluated_questions_are_the_same_for_every_seed(model_dir, data_dir, tmp_path):
    asked = []
    for seed in (0, 1):
        trainer = make_trainer(model_dir, data_dir, tmp_path / "o", seed=seed, eval_samples=5)
        rows = order.subset(trainer.eval_dataset, 5)
        responses, same = (trainer.answers(rows) for _ in range(2))
        assert [r.ids for r in same] == [r.ids for r in responses], "greedy"
        asked.append([row["question"] for row in rows])
    assert asked[0] == asked[1]
    assert len({*asked[0]}) == 5
    every = order.subset(trainer.eval_dataset, 0)
    assert [row["question"] for row in every[:5]] == asked[0], "a larger subset holds a smaller one"


@pytest.mark.parametrize(("metric", "expected"), [("em", 0.6), ("helpers:vowels", None)])
def test_exact_match_or_a_reward_is_the_metric(
    grpo, model_dir, data_dir, tmp_path, metric, expected
):
    settings = {"eval_metric": metric, "reward_funcs": ["int", "helpers:vowels"]}
    settings |= {"eval_samples": 10, "eval_subset_size": 5}
    trainer = make_trainer(model_dir, data_dir, tmp_path / "o", None, **settings)
    (tmp_path / "o").mkdir()

    def say(row):
        number = int(row["answer"])
        return f"so <answer> {number if number < 6 else 'blue'}.00 </answer>"

    trainer.sampler = lambda policy, questions, keys, how: [
        completion([5], text=say(row), finish_reason="stop" if n else "length")
        for n, row in enumerate(questions)
    ]
    score = trainer.evaluate("test")
    if expected is None:
        from helpers import vowels

        texts = [[{"content": say(row)}] for row in trainer.eval_dataset]
        expected = np.mean(vowels(texts))
    assert score == pytest.approx(expected)
    assert trainer.evaluate_em(trainer.eval_dataset) == pytest.approx(expected)
    trainer.evaluate("train")
    test, train = read_log(tmp_path / "o")
    assert (test["em_subset"], train["em_subset"]) == (10, 5)
    assert (test["split"], train["split"]) == ("test", "train")
    assert test["truncation_rate"] == pytest.approx(0.1)


def test_an_answer_that_a_metric_does_not_value_counts_nowhere(model_dir, data_dir, tmp_path):
    settings = {"eval_metric": "helpers:digest", "reward_funcs": ["helpers:digest"]}
    trainer = make_trainer(model_dir, data_dir, tmp_path / "o", None, **settings)

    def first_two(completions, **_):
        return [1.0, 2.0] + [None] * (len(completions) - 2)

    trainer.reward_funcs = {"helpers:digest": first_two}
    assert trainer.evaluate_em(trainer.train_dataset, 5) == 1.5


def test_questions_that_the_trainer_has_not_seen_can_be_evaluated(
    grpo, model_dir, data_dir, tmp_path
):
    """As from a notebook, with rows as `load_questions` gives them."""
    trainer = make_trainer(model_dir, data_dir, tmp_path / "o", None, eval_samples=10)
    rows = grpo.load_questions(trainer.args, "test")
    assert "prompt_ids" not in rows[0]
    numbers = {tuple(row["prompt_ids"]): row["answer"] for row in trainer.eval_dataset}
    trainer.sampler = lambda policy, questions, keys, how: [
        completion([5], text=f"<answer>{numbers[tuple(row['prompt_ids'])]}</answer>")
        for row in questions
    ]
    assert trainer.evaluate_em(rows, 5) == trainer.evaluate_em(trainer.eval_dataset, 5) == 1
    with pytest.raises(UserError, match="holds no questions"):
        trainer.evaluate_em([])


def test_only_evaluations_on_the_test_split_decide_what_is_best(
    model_dir, data_dir, tmp_path, monkeypatch
):
    settings = {"save_best": True, "eval_samples": 3, "eval_subset_size": 3}
    trainer = make_trainer(model_dir, data_dir, tmp_path / "o", **settings)
    asked = []
    monkeypatch.setattr(checkpoints, "keep_best", lambda _: asked.append(split))
    for split in ("test", "train"):
        trainer.evaluate(split)
    assert asked == ["test"]


@pytest.mark.parametrize(("cut", "warned"), [(0, False), (1, True)])
def test_many_answers_cut_off_are_warned_of(
    grpo, model_dir, data_dir, tmp_path, capsys, cut, warned
):
    settings = {"eval_samples": 10, "eval_max_new_tokens": 128}
    trainer = make_trainer(model_dir, data_dir, tmp_path / "o", **settings)
    (tmp_path / "o").mkdir()
    trainer.sampler = lambda policy, questions, keys, how: [
        completion([5], finish_reason="length" if n < cut else "stop")
        for n in range(len(questions))
    ]
    trainer.evaluate()
    trainer.evaluate()
    assert capsys.readouterr().out.count("eval_max_new_tokens = 128") == warned, "once a run"


def test_every_run_ends_with_before_and_after(model_dir, data_dir, tmp_path, capsys):
    settings = {"max_updates": 1, "eval_samples": 4, "eval_subset_size": 3, "eval_every_updates": 1}
    _, trainer = run_training(model_dir, data_dir, tmp_path / "o", **settings)
    out = capsys.readouterr().out
    assert "exact match 0.0% -> 0.0% after 1 update" in out
    assert [r["split"] for r in read_log(tmp_path / "o") if "split" in r] == [
        "test",
        "train",
        "test",
    ]
    assert [r["em_subset"] for r in trainer.run.log.history] == [4, 4], "of the test questions"


# Stopping and going on.


@pytest.mark.parametrize("quantize_for_rollouts", mostly_long([False, True], True))
@pytest.mark.parametrize("sync_every_updates", mostly_long([1, 3], 3))
@pytest.mark.parametrize("num_iterations", [1, 2])
@pytest.mark.parametrize("train_type", ["full", "lora"])
def test_a_resumed_run_is_the_run_that_never_stopped(
    model_dir,
    data_dir,
    tmp_path,
    train_type,
    num_iterations,
    sync_every_updates,
    quantize_for_rollouts,
):
    """Weights, moments, log and final model are the same to the last bit."""
    settings = RESUMED | {
        "train_type": train_type,
        "num_iterations": num_iterations,
        "sync_every_updates": sync_every_updates,
        "quantize_for_rollouts": quantize_for_rollouts,
    }
    if train_type == "full":
        del settings["lora_learning_rate"]
    _, whole = run_training(model_dir, data_dir, tmp_path / "whole", **settings)
    output = tmp_path / "parts"
    stop = 4 if num_iterations == 1 else 2  # between two refreshes of the sampling policy
    code, stopped = run_training(model_dir, data_dir, output, stop_after(stop), **settings)
    assert code == 130
    assert stopped.update_step == stop
    code, resumed = run_training(model_dir, data_dir, output, resume="auto", **settings)
    assert code == 0
    assert snapshot(resumed) == snapshot(whole)
    assert snapshot(resumed) != snapshot(stopped)
    assert timeless(output) == timeless(tmp_path / "whole")
    assert resumed.run.log.history == whole.run.log.history
    for file in ("model.safetensors", "config.json"):
        parts = [folder / "final" / file for folder in (tmp_path / "whole", output)]
        assert parts[0].read_bytes() == parts[1].read_bytes()


@pytest.mark.parametrize("sync_every_updates", [1, 3])
def test_an_update_that_was_interrupted_is_done_again(
    model_dir, data_dir, tmp_path, sync_every_updates
):
    """Ctrl-C in the middle of the rollout of update 4, for which the sampler was just refreshed."""
    settings = RESUMED | {"quantize_for_rollouts": True, "sync_every_updates": sync_every_updates}
    del settings["lora_learning_rate"]
    _, whole = run_training(model_dir, data_dir, tmp_path / "whole", **settings)

    def interrupt(trainer):
        def generate_responses(rows, call=trainer.generate_responses):
            trainer.run.interrupted = trainer.update_step == 3
            return call(rows)

        trainer.generate_responses = generate_responses

    parts = tmp_path / "parts"
    code, stopped = run_training(model_dir, data_dir, parts, interrupt, **settings)
    assert (code, stopped.update_step) == (130, 3)
    _, resumed = run_training(model_dir, data_dir, parts, resume="auto", **settings)
    assert snapshot(resumed) == snapshot(whole)
    assert timeless(parts) == timeless(tmp_path / "whole")


def test_a_resumed_bfloat16_run_keeps_its_masters(model_dir, data_dir, tmp_path):
    settings = {"dtype": "bfloat16", "max_updates": 3, "learning_rate": 1e-4, "max_new_tokens": 4}
    _, whole = run_training(model_dir, data_dir, tmp_path / "whole", **settings)
    run_training(model_dir, data_dir, tmp_path / "parts", stop_after(2), **settings)
    _, resumed = run_training(model_dir, data_dir, tmp_path / "parts", resume="auto", **settings)
    assert snapshot(resumed) == snapshot(whole)


def test_a_run_resumes_with_dropout_and_4_bit_weights(quantized_dir, data_dir, tmp_path):
    settings = {"lora_dropout": 0.2, "max_updates": 3, "lora_learning_rate": 0.01}
    parts = tmp_path / "parts"
    _, whole = run_training(quantized_dir, data_dir, tmp_path / "whole", **settings)
    run_training(quantized_dir, data_dir, parts, stop_after(1), **settings)
    _, resumed = run_training(quantized_dir, data_dir, parts, resume="auto", **settings)
    assert snapshot(resumed) == snapshot(whole)
    assert timeless(parts) == timeless(tmp_path / "whole")


def test_max_hours_stops_after_an_update_and_the_run_can_go_on(
    model_dir, data_dir, tmp_path, capsys, monkeypatch
):
    settings = {"max_updates": 4, "eval_samples": 3}
    settings["logging_steps"] = 5
    _, whole = run_training(model_dir, data_dir, tmp_path / "whole", **settings)
    capsys.readouterr()
    clock, passed = time.perf_counter, [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: clock() + passed[0])

    def tired(trainer):
        train_step = trainer.train_step

        def slow_second(batch):
            passed[0] += 3600 * (trainer.update_step == 1)
            return train_step(batch)

        trainer.train_step = slow_second

    output = tmp_path / "parts"
    code, stopped = run_training(model_dir, data_dir, output, tired, max_hours=1, **settings)
    assert (code, stopped.update_step) == (0, 2)
    assert [r["update"] for r in timeless(output) if "loss" in r] == [2], "what waited is logged"
    out = capsys.readouterr().out
    assert "checkpoint-4" in out
    assert "mlx-grpo.py --resume" in out
    assert "after 2 updates" in out
    page = output / "report.html"
    assert out.splitlines()[-1] == f"reason    max_hours = 1 reached; look at {page}"
    assert load_logits(output / "final") == pytest.approx(logits(stopped.model), abs=1e-5)
    again = settings | {"resume": "auto", "max_hours": 1}  # the command that was printed
    code, resumed = run_training(model_dir, data_dir, output, **again)
    assert (code, resumed.update_step) == (0, 4)
    assert snapshot(resumed) == snapshot(whole)
    assert timeless(output) == timeless(tmp_path / "whole"), "as if it had never stopped"


def test_a_change_that_would_alter_the_rest_of_the_run_is_refused(model_dir, data_dir, tmp_path):
    settings = {"max_updates": 3, "max_new_tokens": 2}
    run_training(model_dir, data_dir, tmp_path / "o", stop_after(1), **settings)
    with pytest.raises(UserError, match=r"temperature \(was 1.0, is 0.9\)"):
        run_training(
            model_dir, data_dir, tmp_path / "o", resume="auto", temperature=0.9, **settings
        )
    code, _ = run_training(
        model_dir, data_dir, tmp_path / "o", resume="auto", rollout_batch_size=3, **settings
    )
    assert code == 0


def test_a_rope_base_written_by_transformers_5_is_read(model_dir, data_dir, tmp_path, grpo):
    """mlx-lm's llama ignores `rope_parameters` and would train with the default of 10000."""
    folder = tmp_path / "model"
    shutil.copytree(model_dir, folder)
    config = json.loads((folder / "config.json").read_text())
    del config["rope_theta"]
    config["rope_parameters"] = {"rope_theta": 777.0, "rope_type": "default"}
    (folder / "config.json").write_text(json.dumps(config))
    loaded = grpo.load_model(make_config(folder, data_dir, tmp_path / "o"))
    assert loaded.model.args.rope_theta == 777.0
    assert loaded.config["rope_theta"] == 777.0, "and final/ will say so"
