"""The same log-probs and rewards through TRL's trainers and through ours: loss and gradient.

    PYTHON_WITH_TRL benchmarks/parity.py --trl     write tests/fixtures/objectives/trl.json
    uv run python benchmarks/parity.py             compare ours with it, table in RESULTS.md

The first needs an environment with TRL 1.16.0 and PyTorch (CPU), nothing of this project. It runs
the trainers' own `_generate_and_score_completions` and `_compute_loss`; only sampling and the
model's forward pass are replaced, by the numbers of `inputs()`. tests/script/test_parity.py
holds us to what it writes.
"""

import argparse
import dataclasses
import json
import math
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks import results  # noqa: E402

FIXTURE = ROOT / "tests/fixtures/objectives/trl.json"
PROMPTS, GROUP, LONGEST = 3, 4, 9
EOS = 2


@dataclasses.dataclass
class Case:
    """The same objective in our settings and in TRL's."""

    name: str
    ours: dict[str, Any]
    trl: dict[str, Any]
    trainer: str = "grpo"


def clip(low: float, high: float) -> dict[str, float]:
    return {"epsilon": low, "epsilon_high": high}


def importance(mode: str) -> Case:
    return Case(
        f"importance weights, {mode}",
        {"importance_mode": mode, "importance_cap": 1.5, "importance_floor": 0.5},
        {
            "vllm_importance_sampling_mode": mode,
            "vllm_importance_sampling_clip_max": 1.5,
            "vllm_importance_sampling_clip_min": 0.5,
            "loss_type": "grpo",
            "use_vllm": True,
        },
    )


def kl(loss_type: str, corrected: bool, **ours: Any) -> Case:
    trl = {"loss_type": loss_type, "beta": 0.3, "use_bias_correction_kl": corrected}
    if loss_type == "dapo":
        trl |= clip(0.2, 0.28)
    name = f"{loss_type}, k3 in the loss" + (", bias corrected" if corrected else "")
    settings = {"loss_type": loss_type, "kl_coeff": 0.3, "kl_bias_correction": corrected}
    return Case(name, settings | ours, trl)


SEQUENCE = {"importance_sampling_level": "sequence"}
CASES = [
    Case("grpo", {}, {"loss_type": "grpo"}),
    Case("grpo, clip higher", {"clip_eps_high": 0.28}, {"loss_type": "grpo", **clip(0.2, 0.28)}),
    Case("grpo, two-sided", {"delta": 1.5}, {"loss_type": "grpo", "delta": 1.5}),
    Case("grpo, ratio per sequence", SEQUENCE, {"loss_type": "grpo", **SEQUENCE}),
    Case("bnpo", {"loss_type": "bnpo"}, {"loss_type": "bnpo"}),
    Case("dapo", {"loss_type": "dapo"}, {"loss_type": "dapo", **clip(0.2, 0.28)}),
    Case("dr_grpo", {"loss_type": "dr_grpo"}, {"loss_type": "dr_grpo"}),
    Case("gspo", {"loss_type": "gspo"}, {"loss_type": "grpo", **SEQUENCE, **clip(3e-4, 4e-4)}),
    Case(
        "gspo, wider clip",
        {"loss_type": "gspo", "clip_eps": 0.1, "clip_eps_high": 0.2},
        {"loss_type": "grpo", **SEQUENCE, **clip(0.1, 0.2)},
    ),
    Case("gmpo", {"loss_type": "gmpo"}, {}, "gmpo"),
    Case("cispo", {"loss_type": "cispo"}, {"loss_type": "cispo", "epsilon_high": 5.0}),
    Case(
        "cispo, cap 1.3",
        {"loss_type": "cispo", "clip_eps_high": 0.3},
        {"loss_type": "cispo", "epsilon_high": 1.3},
    ),
    Case("sapo", {"loss_type": "sapo"}, {"loss_type": "sapo"}),
    *(kl(loss, corrected) for loss in ("grpo", "dapo", "sapo") for corrected in (False, True)),
    Case(
        "gspo, k3 in the loss, bias corrected",
        {"loss_type": "gspo", "kl_coeff": 0.3, "kl_bias_correction": True},
        {"loss_type": "grpo", **SEQUENCE, **clip(3e-4, 4e-4), "beta": 0.3},
    ),
    Case("gmpo, k3 in the loss", {"loss_type": "gmpo", "kl_coeff": 0.3}, {"beta": 0.3}, "gmpo"),
    *map(importance, ("token_truncate", "token_mask", "sequence_truncate", "sequence_mask")),
    *(
        Case(
            f"{loss}, truncated completions masked",
            {"loss_type": loss, "mask_truncated_completions": True},
            {"loss_type": loss, "mask_truncated_completions": True, **clip(0.2, high)},
        )
        for loss, high in (("grpo", 0.2), ("dapo", 0.28), ("dr_grpo", 0.2))
    ),
    *(
        Case(
            f"{loss}, high-entropy tokens",
            {"loss_type": loss, "top_entropy_quantile": 0.4},
            {"loss_type": loss, "top_entropy_quantile": 0.4, **clip(0.2, high)},
        )
        for loss, high in (("grpo", 0.2), ("dapo", 0.28))
    ),
    Case("grpo, entropy bonus", {"entropy_coeff": 0.1}, {"loss_type": "grpo", "entropy_coef": 0.1}),
    Case(
        "grpo, entropy bonus on high-entropy tokens",
        {"entropy_coeff": 0.1, "top_entropy_quantile": 0.4},
        {"loss_type": "grpo", "entropy_coef": 0.1, "top_entropy_quantile": 0.4},
    ),
    *(
        Case(
            f"grpo, {ours} advantages", {"advantage_estimator": ours}, {"loss_type": "grpo", **trl}
        )
        for ours, trl in (
            ("dr_grpo", {"scale_rewards": "none"}),
            ("batch", {"scale_rewards": "batch"}),
            ("gdpo", {"multi_objective_aggregation": "normalize_then_sum"}),
        )
    ),
    # TRL's RLOO has the ratio of whole sequences, a sum over tokens, which on policy is our dr_grpo
    # times the longest length: compared there, and its advantages.
    Case("rloo, on policy", {"advantage_estimator": "rloo"}, {"beta": 0.0}, "rloo"),
    Case(
        "rloo, on policy, k1 in the reward, reward clip",
        {
            "advantage_estimator": "rloo",
            "kl_coeff": 0.05,
            "kl_estimator": "k1",
            "kl_placement": "reward",
            "reward_clip": 1.5,
        },
        {"beta": 0.05, "reward_clip_range": (-1.5, 1.5)},
        "rloo",
    ),
]


def inputs() -> dict[str, Any]:
    """Ragged completions with log-probs that leave every clip, two rewards, some of them None."""
    rng = np.random.default_rng(7)
    rows = PROMPTS * GROUP
    shape = (rows, LONGEST)
    lengths = rng.integers(2, LONGEST + 1, rows)
    lengths[:2] = 1, LONGEST
    old = -rng.gamma(2.0, 0.6, shape)
    rewards = np.round(rng.normal(size=(rows, 2)), 2)
    rewards[4:8] = 0.5, 1.0  # a group without signal
    rewards[1, 0] = rewards[9, 1] = rewards[10] = math.nan
    found = {
        "lengths": lengths,
        "stopped": (rng.random(rows) < 0.6).astype(int),
        "rewards": rewards,
        "old": old,
        "logprobs": old + 0.4 * rng.normal(size=shape),
        "ref": old + 0.5 * rng.normal(size=shape),
        "sampler": old + 0.3 * rng.normal(size=shape),
        "entropies": rng.gamma(2.0, 0.5, shape),
    }
    return {name: np.round(value, 4).tolist() for name, value in found.items()}


def run_trl() -> None:
    """Write what TRL makes of the inputs in every case."""
    import torch
    import trl

    given = inputs()
    cases = [{"name": case.name, **trl_result(case, given)} for case in CASES]
    values = {"trl": trl.__version__, "torch": torch.__version__, "inputs": given, "cases": cases}
    FIXTURE.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(values).replace('{"name"', '\n{"name"').replace("NaN", "null")
    FIXTURE.write_text(text + "\n", encoding="utf-8")


def trl_trainer(case: Case, given: dict[str, Any], folder: str) -> Any:
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer
    from trl.experimental.gmpo import GMPOConfig, GMPOTrainer

    trainers = {
        "grpo": (GRPOTrainer, GRPOConfig),
        "gmpo": (GMPOTrainer, GMPOConfig),
        "rloo": (RLOOTrainer, RLOOConfig),
    }
    make, config = trainers[case.trainer]
    settings = {name: value for name, value in case.trl.items() if name != "use_vllm"}
    args = config(
        output_dir=folder,
        use_cpu=True,
        bf16=False,
        report_to="none",
        per_device_train_batch_size=PROMPTS * GROUP,
        num_generations=GROUP,
        gradient_accumulation_steps=1,
        steps_per_generation=1,
        num_iterations=2,
        max_completion_length=LONGEST,
        gradient_checkpointing=False,
        **settings,
    )
    columns = [
        [None if math.isnan(x) else x for x in c] for c in zip(*given["rewards"], strict=True)
    ]

    def first(prompts: Any, completions: Any, **_: Any) -> list:
        return columns[0]

    def second(prompts: Any, completions: Any, **_: Any) -> list:
        return columns[1]

    data = Dataset.from_list([{"prompt": "1"}] * PROMPTS)
    trainer = make(
        str(ROOT / "models/tiny-math"), reward_funcs=[first, second], args=args, train_dataset=data
    )
    trainer.use_vllm = case.trl.get("use_vllm", False)
    trainer.current_gradient_accumulation_steps = 1
    return trainer


def trl_result(case: Case, given: dict[str, Any]) -> dict[str, Any]:
    """TRL's advantages, loss and the gradient by the log-probs of the current policy."""
    import torch

    with tempfile.TemporaryDirectory() as folder:
        trainer = trl_trainer(case, given, folder)
    width = max(given["lengths"])
    table = {name: torch.tensor(given[name], dtype=torch.float64) for name in NUMBERS}
    # On policy where the objectives are the same only there.
    current = table["old" if case.trainer == "rloo" else "logprobs"][:, :width].clone()
    current.requires_grad_(True)
    entropies = table["entropies"][:, :width].clone().requires_grad_(True)
    scoring = [True]

    def forward(model: Any, *_: Any, **__: Any) -> tuple:
        if not scoring[0]:
            return current, entropies, None
        which = "ref" if model is getattr(trainer, "ref_model", None) else "old"
        return table[which][:, :width], None, None

    ids = completion_ids(given)
    texts, prompts = ["x"] * len(ids), [[5]] * len(ids)
    sampled = [row[:n] for row, n in zip(given["sampler"], given["lengths"], strict=True)]
    generated = (prompts, ids, None, texts, sampled, {}, None, None)
    trainer._generate = lambda _: (prompts, ids, texts) if case.trainer == "rloo" else generated
    trainer._get_per_token_logps_and_entropies = forward
    trainer.model.train()
    batch = trainer._generate_and_score_completions([{"prompt": "1"}] * len(ids))
    scoring[0] = False
    loss = trainer._compute_loss(trainer.model, batch)
    loss.backward()
    bonus = torch.zeros_like(entropies) if entropies.grad is None else entropies.grad
    return {
        "advantages": rounded(batch["advantages"]),
        "loss": loss.item(),
        "gradient": rounded(current.grad),
        "entropy_gradient": rounded(bonus) if case.ours.get("entropy_coeff") else None,
    }


NUMBERS = ("old", "logprobs", "ref", "sampler", "entropies")


def completion_ids(given: dict[str, Any]) -> list[list[int]]:
    return [
        [7] * (n - 1) + [EOS if stopped else 7]
        for n, stopped in zip(given["lengths"], given["stopped"], strict=True)
    ]


def rounded(values: Any) -> list:
    return np.round(np.asarray(values.detach().numpy(), np.float64), 9).tolist()


def our_result(case: Case, given: dict[str, Any]) -> dict[str, Any]:
    """The same of ours, through the functions that the trainer calls."""
    import mlx.core as mx

    from utils.base.script import load_script
    from utils.gradient.micro_batch import MicroBatch

    grpo = load_script()
    args = grpo.MLXGRPOConfig(**case.ours)
    lengths = np.array(given["lengths"])
    table = {name: np.array(given[name], np.float32) for name in NUMBERS}
    mask = (np.arange(LONGEST) < lengths[:, None]).astype(np.float32)
    rollout, penalty = our_rollout(grpo, given), 0.0
    if args.kl_placement == "reward" and args.kl_coeff:
        estimate = grpo.KL[args.kl_estimator](mx.array(table["ref"] - table["old"]))
        penalty = args.kl_coeff * (np.array(estimate) * mask).sum(axis=1)
        penalty = penalty.reshape(PROMPTS, GROUP)
    advantages = grpo.estimate_advantages(rollout, [0.0] * 3, penalty, args).reshape(-1)
    if args.mask_truncated_completions:
        kept = np.array(given["stopped"])
        lengths, mask = lengths * kept, mask * kept[:, None]
    on_policy = case.trainer == "rloo"
    loss_type = "dr_grpo" if on_policy else args.loss_type
    arrays = {
        "tokens": np.zeros(mask.shape),
        "mask": mask,
        "sampler_logprobs": table["sampler" if "use_vllm" in case.trl else "old"],
        "advantages": advantages,
        "weights": grpo.token_weights(lengths, loss_type, LONGEST),
        "completion": np.arange(len(mask)),
        "old_logprobs": table["old"],
        **({"ref_logprobs": table["ref"]} if args.kl_coeff and not on_policy else {}),
    }
    batch = MicroBatch(**{n: mx.array(np.asarray(x, np.float32)) for n, x in arrays.items()})
    entropies = mx.array(table["entropies"])

    class Trainer:
        def __init__(self) -> None:
            self.args, self.model = args, None
            self.run = SimpleNamespace(state=SimpleNamespace(rollout=0))

        def rescored(self, *_: Any) -> tuple:
            return None, entropies

    grpo.MLXGRPOTrainer.select_tokens(Trainer(), [batch])
    bonus = entropies if args.entropy_coeff else None

    def loss_of(logprobs: Any, entropies: Any) -> Any:
        return grpo.grpo_loss(logprobs, batch, args, None if bonus is None else entropies)[0]

    current = mx.array(table["old" if on_policy else "logprobs"])
    loss, grads = mx.value_and_grad(loss_of, argnums=(0, 1))(current, entropies)
    scale = LONGEST if on_policy else 1
    return {
        "advantages": advantages,
        "loss": None if on_policy else loss.item(),
        "gradient": np.array(grads[0]) * scale,
        "entropy_gradient": None if bonus is None else np.array(grads[1]),
    }


def our_rollout(grpo: Any, given: dict[str, Any]) -> Any:
    """Totals as `compute_rewards` makes them: None adds nothing, a row of None is NaN."""
    from utils.data.completion import Completion

    values = np.array(given["rewards"], np.float64)  # (B, F)
    totals = np.where(np.isnan(values).all(axis=1), np.nan, np.nansum(values, axis=1))
    ids = [[7] * n for n in given["lengths"]]
    completions = [Completion(own, [-1.0] * len(own), [1] * len(own), "stop", "") for own in ids]
    return grpo.Rollout(
        prompts=np.arange(PROMPTS),
        completions=np.array(completions, object).reshape(PROMPTS, GROUP),
        values=values.reshape(PROMPTS, GROUP, 2),
        rewards=totals.reshape(PROMPTS, GROUP),
    )


def differences() -> dict[str, dict[str, float | None]]:
    """Largest differences from TRL in every case: advantages, loss, gradient."""
    fixture = json.loads(FIXTURE.read_text(encoding="utf-8"))
    given = fixture["inputs"]
    given["rewards"] = [[math.nan if x is None else x for x in row] for row in given["rewards"]]
    width, cases = max(given["lengths"]), {case["name"]: case for case in fixture["cases"]}
    found = {}
    for case in CASES:
        ours, theirs = our_result(case, given), cases[case.name]

        def largest(name: str, ours: Any = ours, theirs: Any = theirs) -> float | None:
            if ours[name] is None:
                return None
            one, other = np.array(ours[name]), np.array(theirs[name])
            if one.ndim == 2:
                one = one[:, :width]
            return float(np.abs(one - other).max())

        gradients = [largest("gradient"), largest("entropy_gradient") or 0.0]
        found[case.name] = {
            "advantages": largest("advantages"),
            "loss": largest("loss"),
            "gradient": max(g for g in gradients if g is not None),
            "size": float(np.abs(np.array(theirs["gradient"])).max()),
        }
    return found


def rows(found: dict[str, dict[str, float | None]]) -> list[str]:
    lines = [
        "| objective | advantages | loss | gradient | largest gradient |",
        "|---|---|---|---|---|",
    ]
    for name, parts in found.items():
        cells = ["" if x is None else f"{x:.0e}" for x in parts.values()]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trl", action="store_true", help="run TRL (in its own environment)")
    if parser.parse_args().trl:
        run_trl()
        return 0
    lines = rows(differences())
    results.write_section("parity", lines)
    print("\n".join(lines))
    return 0


if __name__ == "__main__":
    sys.exit(main())
