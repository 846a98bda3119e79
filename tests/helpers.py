"""Build small trainers in tests."""

import json
from pathlib import Path

from conftest import load_script

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
            return "{" + ", ".join(f"{k} = {literal(v)}" for k, v in value.items()) + "}"
        return json.dumps(value, ensure_ascii=True)

    path = Path(folder) / "settings.toml"
    path.write_text("".join(f"{key} = {literal(value)}\n" for key, value in values.items()))
    return str(path)


def vowels(completions, **_):
    """A reward with variance on random text: the share of vowels and digits."""
    texts = [c[0]["content"] for c in completions]
    return [sum(ch in "aeiou0123456789" for ch in t) / max(len(t), 1) for t in texts]


def make_trainer(model_dir, data_dir, output_dir, reward=vowels, **settings):
    """A trainer whose reward varies, ready for train_step."""
    grpo = load_script()
    config = make_config(model_dir, data_dir, output_dir, **settings)
    trainer = grpo.build_trainer(config, "test")
    if reward is not None:
        trainer.reward_funcs = {"vowels": reward}
    return trainer


def read_log(output_dir):
    lines = (Path(output_dir) / "training_log.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]
