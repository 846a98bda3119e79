"""Build small trainers in tests."""

import json
import os
import subprocess
import sys
from pathlib import Path
from unittest import mock

from conftest import load_script
from mlx.utils import tree_flatten

QUIET = {
    "use_compile": False,
    "eval_samples": 0,
    "eval_subset_size": 0,
    "system_prompt": "",
    "num_generations": 4,
    "gradient_accumulation_steps": 2,
    "max_new_tokens": 12,
    "temperature": 1.0,
    "quantize_for_rollouts": False,
    "save_steps": 0,
    "learning_rate": 1e-3,
    "max_grad_norm": 1.0,
}


def make_config(model_dir, data_dir, output_dir, **settings):
    """The script's configuration, small and quiet, through the same path as the command line."""
    grpo = load_script()
    values = {
        "model_name": str(model_dir),
        "dataset": str(data_dir),
        "output_dir": str(output_dir),
        **QUIET,
        **settings,
    }
    return grpo.read_config(write_toml(Path(output_dir).parent, values), [])


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
            trainer.interrupted = trainer.update_step == update and split in (None, which)
            return call(which)

        trainer.evaluate = evaluate

    return prepare


def stop_after(update):
    """Ctrl-C once this many updates are done, as a `prepare` of run_training."""

    def prepare(trainer):
        after_update = trainer.after_update

        def and_stop(*args):
            after_update(*args)
            trainer.interrupted = trainer.update_step >= update

        trainer.after_update = and_stop

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


def spy_on_gradients(trainer):
    """Collects (batch as it was used, statistics) of every gradient, and what clipping gets."""
    calls, gradients = [], []
    inner, apply = trainer.loss_and_grad, trainer.apply_gradients

    def loss_and_grad(batch):
        seen = dict(batch)
        result = inner(batch)
        calls.append((seen, result[0][1], result[0][2]))
        return result

    def apply_gradients(loss, grads):
        gradients.append(flat(grads))
        return apply(loss, grads)

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
