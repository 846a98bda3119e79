"""Build small trainers in tests."""

import contextlib
import ctypes
import dataclasses
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

# isort: off
from conftest import ROOT, load_script  # first: it loads a BLAS before MLX is imported

# isort: on
import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_map
from mlx_lm.models import qwen2

from utils import pretrain
from utils.data.completion import Completion
from utils.device import cores, fast
from utils.gradient.micro_batch import MicroBatch
from utils.model.tiktoken_wrapper import CHAT_TOKENS
from utils.run import evaluation

QUIET = {
    "use_compile": False,
    "eval_samples": 0,
    "eval_subset_size": 0,
    "system_prompt": "",
    "num_generations": 4,
    "gradient_accumulation_steps": 2,
    "max_new_tokens": 12,
    "eval_max_new_tokens": 12,
    "temperature": 1.0,
    "quantize_for_rollouts": False,
    "save_steps": 0,
    "learning_rate": 1e-3,
    "max_grad_norm": 1.0,
}

STATE_SPACE = {"state_size": 16, "conv_kernel": 4, "use_bias": False, "use_conv_bias": True}
LOW_RANKS = ("a_low_rank_dim", "v_low_rank_dim", "gate_low_rank_dim", "decay_low_rank_dim")
WITHOUT_ATTENTION = {
    "mamba": {**STATE_SPACE, "time_step_rank": 4},
    "mamba2": {
        **STATE_SPACE,
        "num_heads": 8,
        "n_groups": 2,
        "layer_norm_epsilon": 1e-5,
        "time_step_limit": [0.0, 100.0],
        "time_step_rank": 4,
    },
    "rwkv7": {"norm_eps": 1e-5, "head_dim": 32, **dict.fromkeys(LOW_RANKS, 8)},
}
"""What a configuration of these has beside the usual."""


def quiet(values):
    """QUIET for these settings: a file with adapters needs no learning_rate, and may not have one
    without lora_learning_rate."""
    config = os.path.join(values["model_name"], "config.json")
    quantized = os.path.isfile(config) and "quantization" in Path(config).read_text()
    adapters = values.get("train_type") in ("lora", "dora") or values.get("adapter_path")
    return {k: v for k, v in QUIET.items() if k != "learning_rate" or not (adapters or quantized)}


def mostly_long(cases, *kept):
    """Cases of a parametrization, of which a plain `pytest` runs only those `kept`."""
    cases = [*cases]
    assert all(case in cases for case in kept)
    parts = [case if isinstance(case, tuple) else (case,) for case in cases]
    marks = [() if case in kept else pytest.mark.long for case in cases]
    return [pytest.param(*p, marks=mark) for p, mark in zip(parts, marks, strict=True)]


def make_config(model_dir, data_dir, output_dir, **settings):
    """The script's configuration, small and quiet, through the same path as the command line."""
    grpo = load_script()
    values = {
        "model_name": str(model_dir),
        "dataset": str(data_dir),
        "output_dir": str(output_dir),
        **settings,
    }
    return grpo.read_config(write_toml(Path(output_dir).parent, quiet(values) | values), [])


def write_toml(folder, values):
    """A TOML file of `values` (JSON literals are TOML literals, tables apart)."""

    def literal(value):
        if isinstance(value, dict):
            pairs = (f"{json.dumps(k)} = {literal(v)}" for k, v in value.items())
            return "{" + ", ".join(pairs) + "}"
        if isinstance(value, list):
            return "[" + ", ".join(map(literal, value)) + "]"
        return json.dumps(value, ensure_ascii=True)

    path = Path(folder) / "settings.toml"
    path.write_text("".join(f"{key} = {literal(value)}\n" for key, value in values.items()))
    return str(path)


def vowels(completions, **_):
    """A reward with variance on random text: the share of vowels and digits."""
    texts = [c[0]["content"] for c in completions]
    return [sum(ch in "aeiou0123456789" for ch in t) / max(len(t), 1) for t in texts]


def digest(completion_ids, **_):
    """A reward that differs between any two completions, however odd they are."""
    return [float(sum(n * i for n, i in enumerate(ids, 1)) % 101) for ids in completion_ids]


def make_trainer(model_dir, data_dir, output_dir, reward=vowels, **settings):
    """A trainer whose reward varies, ready for train_step."""
    grpo = load_script()
    config = make_config(model_dir, data_dir, output_dir, **settings)
    trainer = grpo.build_trainer(config, "test")
    if reward is not None:
        trainer.reward_funcs = {"vowels": reward}
    return trainer


def run_training(model_dir, data_dir, output_dir, prepare=lambda trainer: None, **settings):
    """A whole run as the command starts it, after `prepare(trainer)`: (exit code, trainer)."""
    grpo = load_script()
    settings = {"reward_funcs": ["helpers:digest"], **settings}
    config = make_config(model_dir, data_dir, output_dir, **settings)
    build, built = grpo.build_trainer, []

    def build_and_prepare(*args):
        built.append(build(*args))
        prepare(built[0])
        return built[0]

    with mock.patch.object(grpo, "build_trainer", build_and_prepare):
        code = grpo.start(config, "python mlx-grpo.py")
    return code, built[0]


def stop_in_evaluation(update, split=None):
    """Ctrl-C while the evaluation (of `split`, or any) after this update runs; see `stop_after`."""

    def prepare(trainer):
        def evaluate(which="test", call=trainer.evaluate):
            trainer.run.interrupted = trainer.update_step == update and split in (None, which)
            return call(which)

        trainer.evaluate = evaluate

    return prepare


def stop_after(update):
    """Ctrl-C once this many updates are done, as a `prepare` of run_training."""

    def prepare(trainer):
        after_update = trainer.run.after_update

        def and_stop(*args):
            after_update(*args)
            trainer.run.interrupted = trainer.update_step >= update

        trainer.run.after_update = and_stop

    return prepare


def read_log(output_dir):
    lines = (Path(output_dir) / "training_log.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def flat(weights):
    """Dotted name -> array of a tree of arrays."""
    return dict(tree_flatten(weights))


def tree(folder):
    """Every path below a folder with what tells that it was touched (Python's caches apart)."""
    found = {}
    for path in Path(folder).rglob("*"):
        if "__pycache__" not in path.parts:
            stat = path.lstat()
            is_file = path.is_file()
            touched = (stat.st_size, stat.st_mtime_ns) if is_file else "folder"
            found[str(path.relative_to(folder))] = touched
    return found


def typed_in_a_shell(line, folder, **environment):
    """Run a command line as a person would: in a shell, with this Python first on the path."""
    inherited = {k: v for k, v in os.environ.items() if k not in ("UV", "MLX_GRPO_CONFIG")}
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**inherited, "PATH": path, **environment}
    return subprocess.run(
        line, shell=True, cwd=folder, env=environment, capture_output=True, text=True, timeout=120
    )


def stop_pretraining(patch, step):
    """Ctrl-C in utils/pretrain.py after so many updates."""
    train_step = pretrain.Trainer.train_step

    def stops(trainer):
        if trainer.step == step:
            raise KeyboardInterrupt
        return train_step(trainer)

    patch.setattr(pretrain.Trainer, "train_step", stops)


def kill_pretraining(arguments, once_there_is):
    """A run of utils/pretrain.py in a process that is killed when a file or folder has come."""
    words = [sys.executable, str(ROOT / "utils/pretrain.py"), *arguments]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "env": os.environ}
    with subprocess.Popen(words, **quiet) as process:
        deadline = time.monotonic() + 60
        while not once_there_is.exists() and time.monotonic() < deadline:
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL


SLOW = {
    *("mlx_lm", "mlx_vlm", "transformers", "tokenizers", "datasets", "pyarrow", "pandas", "torch"),
    *("huggingface_hub", "httpx2", "math_verify", "sympy", "tensorboardX", "wandb", "matplotlib"),
}  # what takes long to import: a program that answers at once has none of them


def imports_of(*words, folder):
    """A program run by Python: (what came of it, the packages that it imported)."""
    command = [sys.executable, "-X", "importtime", *map(str, words)]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    lines = [line for line in done.stderr.splitlines() if line.startswith("import time:")]
    return done, {line.rpartition("|")[2].strip().partition(".")[0] for line in lines}


def spy_on_gradients(trainer):
    """Collects (batch as it was used, statistics) of every gradient, and what clipping gets."""
    calls, gradients = [], []
    inner, apply = trainer.loss_and_grad, trainer.apply_gradients

    def loss_and_grad(batch):
        seen = dataclasses.replace(batch)
        result = inner(batch)
        calls.append((seen, result[0][1], result[0][2]))
        return result

    def apply_gradients(loss, grads, number):
        gradients.append(flat(grads))
        return apply(loss, grads, number)

    trainer.loss_and_grad, trainer.apply_gradients = loss_and_grad, apply_gradients
    return calls, gradients


MEMORY = ("peak_memory_gb", "active_memory_gb", "cache_memory_gb")
TIMES = ("seconds", "tokens_per_second", *MEMORY)  # what two equal runs differ in


def timeless(output_dir):
    """The log without what depends on the clock or on the memory of the moment."""
    return [
        {k: v for k, v in record.items() if not k.startswith(TIMES)}
        for record in read_log(output_dir)
    ]


def rollout(trainer, rows=(0, 1, 2)):
    """Sampled completions of ragged lengths with random advantages: (rows, completions, A)."""
    generator = np.random.default_rng(3)
    completions = [
        cut_off(completion, int(generator.integers(1, len(completion.ids) + 1)))
        for completion in trainer.generate_responses(list(rows))
    ]
    group = trainer.args.num_generations
    repeated = [trainer.train_dataset[r] for r in rows for _ in range(group)]
    return repeated, completions, generator.normal(size=len(completions))


def cut_off(completion, length):
    """Its first tokens."""
    parts = {name: getattr(completion, name)[:length] for name in ("ids", "logprobs", "mask")}
    return dataclasses.replace(completion, **parts)


def completion(ids, logprobs=None, mask=None, text="", finish_reason="stop"):
    """One that was sampled, unless the mask says otherwise."""
    logprobs = [-1.0] * len(ids) if logprobs is None else logprobs
    return Completion(ids, logprobs, mask or [1] * len(ids), finish_reason, text)


def as_rollout(trainer, rows, completions, rewards=None):
    """A rollout of one completion a row (of the training set)."""
    numbers = {row["question"]: i for i, row in enumerate(trainer.train_dataset)}
    cells = np.empty((len(completions), 1), object)
    cells[:, 0] = completions
    rewards = np.zeros(cells.shape) if rewards is None else rewards
    prompts = np.array([numbers[row["question"]] for row in rows], int)
    return load_script().Rollout(prompts, cells, rewards[..., None], rewards)


def micro_batches(trainer, sample, tokens=None):
    """Of (rows, completions, advantages), as the trainer cuts an update, by a budget of tokens."""
    if tokens is not None:
        plan = dataclasses.replace(trainer.memory.plan, micro_batch_tokens=tokens)
        trainer.memory.plan = plan
    rows, completions, advantages = sample
    return trainer.micro_batches(
        as_rollout(trainer, rows, completions), np.array(advantages)[:, None]
    )


def as_batch(**arrays):
    """A micro-batch of which only these arrays matter."""
    shape = arrays["mask"].shape
    rest = {"tokens": mx.zeros((shape[0], shape[1] + 1), mx.int32)}
    rest |= dict.fromkeys(("advantages", "weights", "completion"), mx.zeros(shape[0]))
    return MicroBatch(**{"sampler_logprobs": mx.zeros(shape), **rest, **arrays})


def gradient(trainer, batches):
    """Loss and summed gradient of some micro-batches."""
    loss_and_grad = trainer.make_loss_and_grad()
    total, loss = tree_map(mx.zeros_like, trainer.optimizer.masters(trainer.model)), 0.0
    for batch in batches:
        (part, _, _), grads = loss_and_grad(batch)
        total = tree_map(mx.add, total, grads)
        loss += part.item()
    return loss, dict(tree_flatten(total))


def relative_difference(one, other):
    """max |dg| / max |g| over all parameters."""
    largest = max(mx.abs(g).max().item() for g in one.values())
    assert largest > 1e-4, "a zero gradient would make any comparison pass"
    return max(mx.abs(one[k] - other[k]).max().item() for k in one) / largest


@contextlib.contextmanager
def one_operation_at_a_time():
    """A memory limit of one byte makes the CPU's queue wait for every operation, so that the peak
    is that of the computation, and not of a queue that is longer on a busy machine.
    """
    limit = mx.set_memory_limit(1)
    try:
        yield
    finally:
        mx.set_memory_limit(limit)


def snapshot(trainer):
    """Weights, masters and moments as bytes, to compare bit by bit."""
    parts = {
        "weights": trainer.model.parameters(),
        "masters": trainer.optimizer.masters(trainer.model),
        "optimizer": trainer.optimizer.state,
    }
    return {n: np.array(x.astype(mx.float32)).tobytes() for n, x in flat(parts).items()}


def poison(trainer, *, loss=False, gradient=False):
    """Makes every loss or one number of every gradient not finite from now on."""
    inner = trainer.loss_and_grad

    def poisoned(batch):
        (value, sums, logprobs), grads = inner(batch)
        if gradient:
            grads["model"]["norm"]["weight"] = grads["model"]["norm"]["weight"] * math.inf
        return (value * (math.nan if loss else 1), sums, logprobs), grads

    trainer.loss_and_grad = poisoned
    return inner


RESUMED = {
    "max_updates": 6,
    "logging_steps": 3,  # not a multiple of the 2 batches of an update: some wait for their record
    "eval_samples": 4,
    "eval_steps": 4,
    "eval_every_updates": 3,
    "eval_subset_size": 4,
    "eval_max_new_tokens": 4,
    "learning_rate": 0.01,
    "lora_learning_rate": 0.01,
    "max_new_tokens": 6,
}


def both(*prepares):
    def prepare(trainer):
        for one in prepares:
            one(trainer)

    return prepare


def lose_the_right_to_write_everywhere():
    """Root ignores the permissions of folders, unless CAP_DAC_OVERRIDE (1) is dropped."""
    pr_capbset_drop = 24
    ctypes.CDLL(None).prctl(pr_capbset_drop, 1, 0, 0, 0)


def improving(trainer):
    """Evaluations that get better with every update."""
    score_by(trainer, lambda: trainer.update_step / 10)


def score_by(trainer, score):
    """Evaluations in which `score()` is the share of right answers."""

    def evaluate(split="test", call=trainer.evaluate):
        def scored(*_, **__):
            return {"em": score(), "em_subset": 3, "truncation_rate": 0.0}

        with mock.patch.object(evaluation, "score", scored):
            return call(split)

    trainer.evaluate = evaluate


def keys_for(grpo, count):
    return np.stack([grpo.random_key(7, n, ()) for n in range(count)])


def sample(grpo, loaded, prompts, rows=None, keys=None, stops=(), places=0, **how):
    model, tokenizer = loaded
    fast.switch_on(model)  # as load_model does
    rows = list(range(len(prompts))) if rows is None else rows
    keys = keys_for(grpo, len(rows)) if keys is None else keys
    how = grpo.Sampling(**{"temperature": 1.0, "max_tokens": 30, **how})
    stop = grpo.StopRule(tokenizer, stops)
    reader = grpo.Reader(stop, len(rows), places or len(rows), how.max_tokens)
    return cores.in_turns([grpo.sample_batch(model, prompts, rows, keys, how, reader)])[0]


def random_prompts(*lengths):
    generator = np.random.default_rng(5)
    return [generator.integers(3, 380, length).tolist() for length in lengths]


RANKS = {bytes([i]): i for i in range(256)} | {b"he": 256, b"ll": 257, b"hell": 258}


PATTERN = r"\p{L}+|\p{N}{1,2}|\s+|[^\s\p{L}\p{N}]+"


SPECIAL = {name: 259 + i for i, name in enumerate(CHAT_TOKENS)}


QWEN_1_5B = {
    "model_type": "qwen2",
    "hidden_size": 1536,
    "num_hidden_layers": 28,
    "num_attention_heads": 12,
    "num_key_value_heads": 2,
    "intermediate_size": 8960,
    "vocab_size": 151936,
    "tie_word_embeddings": True,
}


TINY = {
    "model_type": "qwen2",
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 128,
    "vocab_size": 96,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
}


def tiny_model(config=TINY, dtype=mx.float32):
    mx.random.seed(0)
    model = qwen2.Model(qwen2.ModelArgs.from_dict(config))
    model.set_dtype(dtype)
    mx.eval(model.parameters())
    return model


def the_message(code, out, err, expected_code=2):
    """The one message on stderr, after the checks that hold for every refusal."""
    assert code == expected_code, err
    assert err.startswith("error: "), err
    assert err.count("error: ") == 1
    assert "Traceback" not in err
    assert len(err.splitlines()) <= 6, err
    return err


def assert_names(message, *parts):
    missing = [part for part in parts if part not in message]
    assert not missing, f"{missing} not in: {message}"


def change_json(folder, name="config.json", **changes):
    values = json.loads((folder / name).read_text()) | changes
    (folder / name).write_text(json.dumps({k: v for k, v in values.items() if v is not None}))
