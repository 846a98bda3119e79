"""One update of GRPO, or one rollout, measured inside one tool's own environment.

`benchmarks/compare.py` runs this file with the interpreter of that environment:

    PYTHON benchmarks/peers.py CELL.json RESULT.json

CELL.json says what to do (model folder, prompts as ids and as text, group, completion length,
settings of the tool). Stop tokens are off, tokens are counted from the ids that were sampled, and
each stage waits for the device before its clock stops. Every function imports its tool itself.
"""

import json
import resource
import sys
import tempfile
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

STAGES = ("rollout", "scoring", "gradient", "optimizer")
LORA_RANK, LORA_SCALE = 16, 2.0  # our defaults
LEARNING_RATE = 1e-6


def reward_of_ids(ids: list[int]) -> float:
    """Any value with variance: what it says does not change the cost."""
    return zlib.crc32(str(ids).encode()) % 97 / 97


class Clock:
    """Seconds of each stage of each update; what no stage claims is the gradient's."""

    def __init__(self, wait: Callable[[], None]) -> None:
        self.wait = wait
        self.updates: list[dict[str, float]] = []
        self.tokens: list[int] = []
        self.started = 0.0

    def begin(self) -> None:
        self.wait()
        self.started = time.perf_counter()
        self.updates.append(dict.fromkeys(STAGES, 0.0))
        self.tokens.append(0)

    def end(self) -> None:
        self.wait()
        update = self.updates[-1]
        update["seconds"] = time.perf_counter() - self.started
        update["gradient"] = update["seconds"] - sum(update[stage] for stage in STAGES)

    def timed(self, stage: str, function: Callable, within: str = "") -> Callable:
        """`function` with its time charged to `stage`, less what `within` charges meanwhile."""

        def wrapper(*args: Any, **kwargs: Any) -> Any:
            self.wait()
            start, inner = time.perf_counter(), self.updates[-1].get(within, 0.0)
            result = function(*args, **kwargs)
            self.wait()
            inner = self.updates[-1].get(within, 0.0) - inner
            self.updates[-1][stage] += time.perf_counter() - start - inner
            return result

        return wrapper

    def count(self, rows: list) -> None:
        self.tokens[-1] += sum(len(row) for row in rows)


def mlx_clock() -> Clock:
    import mlx.core as mx

    return Clock(mx.synchronize)


def settings_of(cell: dict[str, Any]) -> dict[str, Any]:
    """A copy of the tool's settings, from which each worker takes what it knows."""
    return dict(cell["options"])


def load_mlx(cell: dict[str, Any]) -> tuple[Any, Any]:
    """Model (all of it trainable, or with adapters) and a tokenizer that never stops."""
    from mlx_lm.tokenizer_utils import TokenizerWrapper
    from mlx_lm.tuner.utils import linear_to_lora_layers
    from mlx_lm.utils import load_model
    from transformers import PreTrainedTokenizerFast

    from benchmarks.update_cost import WithoutStop

    model, _ = load_model(Path(cell["model"]))
    if cell["train_type"] == "lora":
        model.freeze()
        shape = {"rank": LORA_RANK, "scale": LORA_SCALE, "dropout": 0.0}
        linear_to_lora_layers(model, -1, shape)
    tokenizer = TokenizerWrapper(PreTrainedTokenizerFast.from_pretrained(cell["model"]))
    return model, WithoutStop(tokenizer)


def run_ours(cell: dict[str, Any]) -> dict[str, Any]:
    """This project's train_step."""
    from utils.base.script import load_script
    from utils.device.runtime import provenance

    grpo = load_script()
    import mlx.core as mx

    folder = Path(cell["folder"])
    overrides = [f"model_name={cell['model']}", f"dataset={folder}", f"output_dir={folder}/out"]
    overrides += [f"train_type={cell['train_type']}", "stop_strings=[]", "eval_samples=0"]
    overrides += ['system_prompt=""', f"num_generations={cell['group']}", "temperature=1.0"]
    overrides += [f"batch_size={cell['prompts']}", "gradient_accumulation_steps=1"]
    overrides += [f"max_new_tokens={cell['tokens']}", f"dtype={cell['dtype']}"]
    options = settings_of(cell)
    shares = options.pop("shared_prompts", True)
    overrides += [f"{key}={json.dumps(value)}" for key, value in options.items()]
    preset = str(ROOT / "configs/default.toml")
    trainer = grpo.build_trainer(grpo.read_config(preset, overrides), "")
    given = {tuple(ids) for ids in cell["ids"]}
    assert {tuple(row["prompt_ids"]) for row in trainer.train_dataset} == given
    trainer.reward_funcs = {
        "reward": lambda completion_ids, **_: [reward_of_ids(ids) for ids in completion_ids]
    }
    trainer.sampler.stop.eos_ids = set()  # every completion has full length
    if not shares:
        trainer.scorer.sharing_problem = lambda *_: "switched off, to compare"
    clock = mlx_clock()
    sample = clock.timed("rollout", trainer.generate_responses)

    def generate(*args: Any, **kwargs: Any) -> Any:
        responses = sample(*args, **kwargs)
        clock.count([response.ids for response in responses])
        return responses

    trainer.generate_responses = generate
    trainer.compute_rewards = clock.timed("scoring", trainer.compute_rewards)
    trainer.apply_gradients = clock.timed("optimizer", trainer.apply_gradients)
    held, pulse = [0], trainer.run.pulse

    def watched_pulse(phase: str) -> None:  # between blocks of decode steps and micro-batches
        held.append(mx.get_active_memory() + mx.get_cache_memory())
        pulse(phase)

    trainer.run.pulse = watched_pulse
    for step in range(cell["updates"] + 1):
        if step == 1:
            mx.reset_peak_memory()
            held.clear()
        clock.begin()
        record = trainer.train_step(trainer.prompts_of_update(step))[-1]
        clock.end()
        held.append(mx.get_active_memory() + mx.get_cache_memory())
        assert not record["skipped"]
    # The check that the figures are of right results: sampler and trainer agree.
    return mlx_result(
        clock,
        sampler_mismatch=record["sampler_mismatch"],
        held_bytes=max(held),  # active and cached, the most that was seen
        revision=provenance(ROOT)["git_revision"],
    )


def run_mlx_lm(cell: dict[str, Any]) -> dict[str, Any]:
    """mlx_lm.batch_generate on the same rows: rollouts only."""
    import mlx.core as mx
    from mlx_lm.generate import batch_generate
    from mlx_lm.sample_utils import make_sampler

    model, tokenizer = load_mlx(cell)
    model.eval()
    clock = mlx_clock()
    rows = cell["prompts"] * cell["group"]
    options = {name: rows for name, value in cell["options"].items() if value == "rows"}

    def generate(prompts: list[list[int]]) -> None:
        answer = batch_generate(
            model,
            tokenizer,
            prompts,
            max_tokens=cell["tokens"],
            sampler=make_sampler(temp=1.0),
            return_token_ids=True,
            **options,
        )
        clock.count(answer.token_ids)

    for step in range(cell["updates"] + 1):
        if step == 1:
            mx.reset_peak_memory()
        chosen = cell["ids"][step * cell["prompts"] :][: cell["prompts"]]
        prompts = [ids for ids in chosen for _ in range(cell["group"])]
        clock.begin()
        clock.timed("rollout", generate)(prompts)
        clock.end()
    return mlx_result(clock, missing=("scoring", "gradient", "optimizer", "seconds"))


def run_mlx_lm_lora(cell: dict[str, Any]) -> dict[str, Any]:
    """mlx-lm-lora's train_grpo. It samples `batch_size` = prompts rows at a time."""
    import mlx.core as mx
    import mlx.optimizers as optim
    from mlx_lm_lora.trainer import grpo_trainer

    model, tokenizer = load_mlx(cell)
    clock = mlx_clock()
    sample = clock.timed("rollout", grpo_trainer.generate_grpo)
    score = grpo_trainer.calculate_rewards_and_advantages

    def generate(*args: Any, **kwargs: Any) -> Any:
        if len(clock.updates) == 1:
            mx.reset_peak_memory()
        clock.begin()
        completions, _, indices = sample(*args, **kwargs)
        clock.count([completion.tolist() for completion in completions])
        return completions, [str(completion.tolist()) for completion in completions], indices

    class Optimizer(optim.AdamW):
        def update(self, model: Any, gradients: Any) -> None:
            mx.eval(gradients)
            clock.timed("optimizer", self._update)(model, gradients)

        def _update(self, model: Any, gradients: Any) -> None:
            super().update(model, gradients)
            mx.eval(model.parameters(), self.state)

    class Report:
        def on_train_loss_report(self, info: dict[str, Any]) -> None:
            clock.end()

    grpo_trainer.generate_grpo = generate
    grpo_trainer.calculate_rewards_and_advantages = clock.timed("scoring", score)
    options = settings_of(cell)
    warmup = options.pop("warmup", 1)
    with tempfile.TemporaryDirectory() as folder:
        arguments = grpo_trainer.GRPOTrainingArgs(
            batch_size=cell["prompts"],
            iters=cell["updates"] + warmup,
            group_size=cell["group"],
            max_completion_length=cell["tokens"],
            temperature=1.0,
            steps_per_report=1,
            steps_per_save=10**9,
            adapter_file=f"{folder}/adapters.safetensors",
            **options,
        )
        grpo_trainer.train_grpo(
            model,
            None,
            tokenizer,
            Optimizer(LEARNING_RATE),
            [(ids, [0], "", "") for ids in cell["ids"]],
            reward_funcs=[lambda completions, **_: [reward_of_ids(c) for c in completions]],
            args=arguments,
            training_callback=Report(),
            end_answer_token="",
        )
    return mlx_result(clock, warmup)


def run_unsloth(cell: dict[str, Any]) -> dict[str, Any]:
    """Unsloth's GRPO trainer on MLX; its optimizer runs inside the compiled gradient step."""
    import os

    os.environ["UNSLOTH_ZOO_DISABLE_GPU_INIT"] = "1"  # off Apple silicon it would ask for PyTorch
    import mlx.core as mx
    from transformers import PreTrainedTokenizerFast
    from unsloth_zoo.mlx import generate as sampler
    from unsloth_zoo.mlx import grpo
    from unsloth_zoo.mlx.trainer import MLXGRPOConfig, MLXGRPOTrainer

    model, _ = load_mlx(cell)
    # Ids up to the model's vocabulary are sampled: stop at one that is in none.
    tokenizer = PreTrainedTokenizerFast.from_pretrained(cell["model"])
    clock = mlx_clock()
    sample = clock.timed("rollout", sampler.generate_batch)

    def generate(*args: Any, **kwargs: Any) -> Any:
        kwargs["defaults"] = sampler.GenerationDefaults(
            max_tokens=cell["tokens"], stop_token_ids=()
        )
        results = sample(*args, **kwargs)
        clock.count([result.token_ids for result in results])
        return results

    def begin_generation(plan: Any, visit: int) -> Any:
        if len(clock.updates) == 1:
            mx.reset_peak_memory()
        clock.begin()
        return scored(plan, visit)

    class Steps:
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            mx.eval(model.parameters())
            clock.end()

    scored = clock.timed("scoring", grpo.GRPOBatchPlan._generate, within="rollout")
    sampler.generate_batch = generate
    grpo.GRPOBatchPlan._generate = begin_generation
    grpo.cut_completion = lambda ids, *_, **__: (list(ids), False)
    options = settings_of(cell)
    rows = options.pop("rows", cell["prompts"] * cell["group"])
    with tempfile.TemporaryDirectory() as folder:
        arguments = MLXGRPOConfig(
            per_device_train_batch_size=rows,
            gradient_accumulation_steps=cell["prompts"] * cell["group"] // rows,
            num_generations=cell["group"],
            max_completion_length=cell["tokens"],
            max_steps=cell["updates"] + 1,
            learning_rate=LEARNING_RATE,
            output_dir=folder,
            **options,
        )
        trainer = MLXGRPOTrainer(
            model,
            tokenizer,
            [{"prompt": text} for text in cell["texts"]],
            args=arguments,
            reward_funcs=[lambda completion_ids, **_: [reward_of_ids(c) for c in completion_ids]],
            callbacks=[Steps()],
        )
        trainer.train()
    return mlx_result(clock, missing=("optimizer",))


def mlx_result(clock: Clock, warmup: int = 1, missing: tuple = (), **more: Any) -> dict[str, Any]:
    import mlx.core as mx

    return {
        "updates": [
            {name: None if name in missing else value for name, value in update.items()}
            for update in clock.updates[warmup:]
        ],
        "tokens": clock.tokens[warmup:],
        "first_seconds": clock.updates[0]["seconds"],
        "peak_bytes": mx.get_peak_memory(),
        "versions": versions("mlx", "mlx-lm", "mlx-lm-lora", "unsloth_zoo", "transformers"),
        **more,
    }


def torch_wait() -> None:
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()


def run_trl(cell: dict[str, Any]) -> dict[str, Any]:
    """TRL's GRPOTrainer with its own generation (transformers; no vLLM)."""
    import torch
    from datasets import Dataset
    from transformers import PreTrainedTokenizerFast, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    tokenizer = PreTrainedTokenizerFast.from_pretrained(cell["model"])
    assert tokenizer(cell["texts"])["input_ids"] == cell["ids"]
    options = settings_of(cell)
    torch.set_num_threads(options.pop("threads", torch.get_num_threads()))
    rows = cell["prompts"] * cell["group"]
    micro = min(options.pop("per_device_train_batch_size", 8), rows)
    never = 10**6  # an id that no vocabulary has: nothing ends a completion early
    with tempfile.TemporaryDirectory() as folder:
        arguments = GRPOConfig(
            output_dir=folder,
            num_generations=cell["group"],
            max_completion_length=cell["tokens"],
            per_device_train_batch_size=micro,
            gradient_accumulation_steps=rows // micro,
            max_steps=cell["updates"] + 1,
            learning_rate=LEARNING_RATE,
            generation_kwargs={"eos_token_id": never} | options.pop("generation_kwargs", {}),
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
            use_cpu=not torch.cuda.is_available(),
            **options,
        )
        clock = Clock(torch_wait)

        class Steps(TrainerCallback):
            def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
                if len(clock.updates) == 1 and torch.cuda.is_available():
                    torch.cuda.reset_peak_memory_stats()
                clock.begin()

            def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
                torch_wait()
                self.started = time.perf_counter()

            def on_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
                torch_wait()
                clock.updates[-1]["optimizer"] += time.perf_counter() - self.started

            def on_step_end(self, *args: Any, **kwargs: Any) -> None:
                clock.end()

        trainer = GRPOTrainer(
            model=cell["model"],
            args=arguments,
            processing_class=tokenizer,
            reward_funcs=[lambda completion_ids, **_: [reward_of_ids(c) for c in completion_ids]],
            train_dataset=Dataset.from_dict({"prompt": cell["texts"]}),
            peft_config=peft_lora() if cell["train_type"] == "lora" else None,
            callbacks=[Steps()],
        )
        trainer.eos_token_ids = [never]
        sample = clock.timed("rollout", trainer._generate_single_turn)

        def generate(*args: Any, **kwargs: Any) -> Any:
            ids, logprobs = sample(*args, **kwargs)
            clock.count(ids)
            return ids, logprobs

        trainer._generate_single_turn = generate
        trainer._generate_and_score_completions = clock.timed(
            "scoring", trainer._generate_and_score_completions, within="rollout"
        )
        trainer.train()
    return torch_result(clock)


def peft_lora() -> Any:
    from peft import LoraConfig

    return LoraConfig(r=LORA_RANK, lora_alpha=LORA_RANK * LORA_SCALE, target_modules="all-linear")


def run_torch(cell: dict[str, Any]) -> dict[str, Any]:
    """Forward and backward of PyTorch alone: rows x (prompt + completion) tokens, no optimizer."""
    import torch
    from transformers import AutoModelForCausalLM

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForCausalLM.from_pretrained(
        cell["model"], dtype=getattr(torch, cell["dtype"]), attn_implementation="sdpa"
    ).to(device)
    rows, micro = cell["prompts"] * cell["group"], cell["options"]["micro_rows"]
    total, kept = len(cell["ids"][0]) + cell["tokens"], cell["tokens"]
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(3, 400, (rows, total), generator=generator).to(device)
    advantages = torch.randn(rows, 1, generator=generator).to(device)

    def loss_of(tokens: Any, advantages: Any) -> Any:
        logits = model(input_ids=tokens, logits_to_keep=kept + 1, use_cache=False).logits
        logits = logits[:, :-1].float()  # (B, kept, V)
        chosen = logits.gather(-1, tokens[:, -kept:, None])[..., 0]
        logprobs = chosen - logits.logsumexp(-1)
        ratio = torch.exp(logprobs - logprobs.detach())
        return -(ratio * advantages).sum() / (rows * kept)

    if cell["options"].get("compile"):
        loss_of = torch.compile(loss_of)
    clock = Clock(torch_wait)
    for step in range(cell["updates"] + 1):
        if step == 1 and device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        clock.begin()
        for start in range(0, rows, micro):
            part = slice(start, start + micro)
            loss_of(tokens[part], advantages[part]).backward()
        clock.end()
        model.zero_grad(set_to_none=False)
    return torch_result(clock, missing=("rollout", "scoring", "optimizer", "seconds"))


def torch_result(clock: Clock, missing: tuple = ()) -> dict[str, Any]:
    import torch

    peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None
    return {
        "updates": [
            {name: None if name in missing else value for name, value in update.items()}
            for update in clock.updates[1:]
        ],
        "tokens": clock.tokens[1:],
        "first_seconds": clock.updates[0]["seconds"],
        "peak_bytes": peak,
        "versions": versions("torch", "trl", "transformers", "accelerate", "peft"),
    }


def run_limits(cell: dict[str, Any]) -> dict[str, Any]:
    """What the machine can do: copy bandwidth (read + written) and rate of a square product."""
    import mlx.core as mx

    on_cpu = mx.default_device() == mx.Device(mx.cpu)
    dtype = getattr(mx, cell["dtype"])
    array = mx.ones((1 << (24 if on_cpu else 29),), mx.uint32)  # 64 MB or 2 GB
    size = 1024 if on_cpu else 8192
    square = mx.random.normal((size, size)).astype(dtype)
    mx.eval(array, square)
    copy = best_seconds(lambda: mx.eval(array + 1))
    product = best_seconds(lambda: mx.eval(square @ square))
    return {
        "copy_bytes_per_second": 2 * array.nbytes / copy,
        "flops_per_second": 2 * size**3 / product,
        "versions": versions("mlx"),
    }


def best_seconds(work: Callable[[], None], repeats: int = 10) -> float:
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return min(times)


def versions(*names: str) -> dict[str, str]:
    from importlib import metadata

    found = {}
    for name in names:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return {"python": sys.version.split()[0], **found}


def device_name() -> str:
    """Name of the accelerator, or of the processor; never of the host."""
    if "mlx.core" in sys.modules:
        import mlx.core as mx

        if mx.default_device() != mx.Device(mx.cpu):
            return str(mx.device_info()["device_name"])
    elif "torch" in sys.modules:
        import torch

        if torch.cuda.is_available():
            return torch.cuda.get_device_name()
    return processor_name()


def processor_name() -> str:
    import os
    import platform

    name, info = platform.machine(), Path("/proc/cpuinfo")
    if info.is_file():
        lines = info.read_text().splitlines()
        name = next((x.split(":")[1].strip() for x in lines if x.startswith("model name")), name)
    return f"{name}, {os.cpu_count()} cores"


RUNNERS: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "ours": run_ours,
    "mlx-lm": run_mlx_lm,
    "mlx-lm-lora": run_mlx_lm_lora,
    "unsloth": run_unsloth,
    "trl": run_trl,
    "torch": run_torch,
    "limits": run_limits,
}


def main() -> None:
    cell = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    if cell["blas"]:  # MLX's CPU wheel has a slow BLAS; peers get the fast one too unless told not
        from utils.device.runtime import preload_blas

        cell["blas"] = preload_blas()
    result = RUNNERS[cell["tool"]](cell)
    result["blas"] = cell["blas"] or None
    result["device"] = device_name()
    result["rss_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    Path(sys.argv[2]).write_text(json.dumps(result), encoding="utf-8")


if __name__ == "__main__":
    main()
