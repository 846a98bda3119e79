"""The memory plan of a run on this machine, and `--dry-run`."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

from ..base.errors import UserError
from ..base.say import say
from ..base.text import counted, shown
from ..data import files as datafiles
from ..device import runtime
from ..device.cores import are_used, cores
from ..model import loading
from ..model import shape as model_shape
from ..settings import reading
from .plan import GB, HEADROOM, Plan
from .suggestions import planned

EACH = 2  # micro-batches a stream, so that uneven ones are shared out more evenly
SHARE = 0.5  # of the memory, at most


def at_once(trainer: Any) -> int:
    """How many micro-batches to compute together.

    One on the first rollout, whose memory `planning.recalibrate` learns from. Several are not at
    their peaks at the same time: on 2 cores, updates took 0.88 to 1.33 times what is planned for
    one (tests/memory/test_plan.py, benchmarks/plan_accuracy.py), as they do one by one.
    """
    if not are_used(trainer.args) or trainer.update_step < trainer.args.num_iterations:
        return 1
    return max(1, min(EACH * cores(), fitting(trainer.plan)))


def fitting(plan: Plan) -> int:
    """Micro-batches of the planned size that fit beside what is there anyway."""
    constant = plan.resident + plan.summed_gradients
    each = plan.gradients + plan.gradient_peak - constant
    return int((SHARE * plan.budget_bytes - constant) // each)


SIZES = ("rollout_batch_size", "micro_batch_tokens")


def plan_memory(
    config: Any,
    shape: model_shape.ModelShape,
    train_type: str,
    prompt_tokens: int,
    completion_tokens: int,
    trainable_parameters: int | None = None,
) -> Plan:
    """What an update takes on this machine, and the batch sizes that fit.

    Raises:
        UserError: a run that there is no plan for, see `memory.plan`.
    """
    platform = runtime.platform_name()
    auto = 4 if platform == "cpu" else 2
    try:
        return planned(
            shape,
            train_type=train_type,
            lora_rank=config.lora_rank,
            lora_layers=config.lora_layers,
            trainable_parameters=trainable_parameters,
            compiled=config.use_compile,
            entropy_bonus=config.entropy_coeff > 0,
            platform=platform,
            prompts_per_update=config.batch_size * config.gradient_accumulation_steps,
            num_generations=config.num_generations,
            prompt_tokens=prompt_tokens,
            completion_tokens=completion_tokens,
            quantize_for_rollouts=config.quantize_for_rollouts,
            has_reference=config.kl_coeff > 0,
            sync_every_updates=config.sync_every_updates,
            gradient_checkpointing=config.gradient_checkpointing,
            train_dtype_bytes={"float32": 4, "bfloat16": 2, "float16": 2}.get(config.dtype, auto),
            master_bytes=master_bytes(config, shape),
            moment_bytes=8 if config.moment_bits == 32 else 2.03,
            budget_bytes=budget_bytes(config),
            rollout_batch_size=config.rollout_batch_size,
            micro_batch_tokens=config.micro_batch_tokens,
        )
    except ValueError as error:
        raise UserError(str(error)) from None


def plan_of(trainer: Any) -> Plan:
    """Rollout batch and micro-batch sizes that fit this machine's memory."""
    return plan_memory(
        trainer.args,
        loading.read_shape(trainer.loaded.folder),
        trainer.loaded.train_type,
        max(len(row["prompt_ids"]) for row in trainer.train_dataset),
        trainer.sampling.max_tokens,
        trainable_parameters(trainer.model),
    )


def trainable_parameters(model: Any) -> int:
    from mlx.utils import tree_flatten

    weights: Any = tree_flatten(model.trainable_parameters())
    return sum(weight.size for _, weight in weights)


def budget_bytes(config: Any) -> int:
    """What the run may use: the device's memory, or memory_limit_gb where that is less.

    A reward model in a folder takes the size of its weights off, unless it is unloaded.
    """
    device, limit = runtime.device_memory_bytes(), int(config.memory_limit_gb * GB)
    kept = not config.reward_kwargs.get("reward_model", {}).get("unload")
    files = Path(config.reward_model).expanduser().glob("model*.safetensors")
    scorer = sum(f.stat().st_size for f in files) if config.reward_model and kept else 0
    return max(1, (min(device, limit) if limit else device) - scorer)


def master_bytes(config: Any, shape: model_shape.ModelShape) -> int:
    """What the optimizer keeps beside a half-precision weight (utils/gradient/adamw.py)."""
    own = max(shape.bytes_by_dtype, key=lambda name: shape.bytes_by_dtype[name], default="")
    half = config.dtype == "float16" or (config.dtype == "auto" and own == "F16")
    return (4 if half else 2) if config.master_weights else 0


def recalibrate(trainer: Any, micro_batches: list[dict[str, Any]]) -> None:
    """Plan again with what the first update took, and say so where that changes anything.

    Micro-batches become smaller when such as these, at the planned size, would not fit the machine;
    and larger when the plan had cut the update into more than fit.
    """
    from .meter import tokens_read  # which imports this module

    plan = trainer.plan
    used = max((tokens_read(batch) for batch in micro_batches), default=0)
    if not used or plan.settings.micro_batch_tokens:
        return
    base = plan.resident + plan.summed_gradients
    # Completions may have been shorter than they can be.
    more = max(1.0, plan.micro_batch_tokens / used)
    factor = (trainer.log.meter.peak() - base) / (plan.gradient_peak - base) * more
    needed = base + factor * (plan.gradient_needed - base)
    tight = needed > HEADROOM * plan.budget_bytes
    safe = len(micro_batches) > 1 and used > 0.8 * plan.micro_batch_tokens and factor < 0.9
    if tight or safe:
        trainer.measured_factor = round(min(max(factor, 0.5), 5.0), 2)
        apply_factor(trainer)


def apply_factor(trainer: Any) -> None:
    """Plan with the trainer's `measured_factor`, which a checkpoint keeps."""
    old = trainer.plan
    wanted = dataclasses.replace(old.settings, measured_factor=trainer.measured_factor)
    new = planned(old.shape, **vars(wanted))
    # Sizes that ran out of memory and were halved stay so.
    kept: Any = {name: min(getattr(old, name), getattr(new, name)) for name in old.halved}
    new = dataclasses.replace(new, **kept, halved=old.halved)
    if new.micro_batch_tokens != old.micro_batch_tokens:
        trainer.plan = new
        say(
            f"plan      the first update took {trainer.measured_factor:.2f} times what was planned "
            f"for its micro-batches: {new.micro_batch_tokens:,} tokens each from here on, not "
            f"{old.micro_batch_tokens:,}"
        )


def halved_sizes(trainer: Any) -> dict[str, int]:
    """What a run that goes on from here need not find out again."""
    return {name: getattr(trainer.plan, name) for name in trainer.plan.halved}


def keep_halved(trainer: Any, before: dict[str, Any], sizes: dict[str, int]) -> None:
    """Sizes that memory ran out with in an earlier run, unless the settings `before` were others.

    Raises:
        ValueError: they are none.
    """
    if not all(name in SIZES and type(size) is int and size > 0 for name, size in sizes.items()):
        raise ValueError(f"halved = {shown(sizes)}")
    asked = reading.recorded(trainer.args)
    kept = {n: min(size, getattr(trainer.plan, n)) for n, size in sizes.items()}
    kept = {n: size for n, size in kept.items() if before.get(n, 0) == asked[n]}
    if kept:
        trainer.plan = dataclasses.replace(trainer.plan, **kept, halved=tuple(sorted(kept)))
        text = ", ".join(f"{name} = {size}" for name, size in sorted(kept.items()))
        say(f"plan      {text}, since memory ran out with more")


def memory_advice(trainer: Any) -> str:
    """What to set after the gradient ran out of memory, from the mildest on."""
    plan = trainer.plan
    # Planned again for three quarters of it: the plan was too low, or the rest of the machine needs
    # more than it leaves.
    budget = int(0.75 * plan.needed / HEADROOM)
    smaller = dataclasses.replace(plan.settings, budget_bytes=min(budget, plan.budget_bytes))
    return " or ".join(planned(plan.shape, **vars(smaller)).suggestions)


def dry_run(config: Any) -> int:
    """Print the resolved settings and the plan from config.json and safetensors headers alone."""
    shape = loading.read_shape(loading.find_model(config.model_name) or config.model_name)
    train_type = loading.resolve_train_type(config, shape.quantized_bits is not None)
    completion = min(config.max_new_tokens, config.max_completion_length)
    plan = plan_memory(config, shape, train_type, config.max_prompt_length, completion)
    for name, value in reading.recorded(config).items():
        say(f"{name} = {json.dumps(value, ensure_ascii=False)}")
    say(
        f"\ntrain_type resolves to {train_type}. An upper bound: prompts count as "
        f"max_prompt_length = {config.max_prompt_length} tokens."
    )
    say(plan.table())
    say(planned_updates(config))
    return 0


def planned_updates(config: Any) -> str:
    """The length of the run, from the number of questions if that can be known offline."""
    questions = config.max_train_samples
    sources = datafiles.sources(config, "train")
    if all(datafiles.local_path(source.dataset) for source in sources):
        rows = sum(len(datafiles.read_dataset(source, "train")) for source in sources)
        questions = min(rows, questions) if questions else rows
    if not questions:
        names = ", ".join(source.dataset for source in sources)
        return f"updates: known once {names} is loaded (max_train_samples = 0: all of it)"
    prompts = config.batch_size * config.gradient_accumulation_steps
    updates = config.num_epochs * math.ceil(questions / prompts) * config.num_iterations
    updates = min(updates, config.max_updates or updates)
    rollouts = math.ceil(updates / config.num_iterations)
    asked = min(rollouts * prompts, config.num_epochs * questions)
    if config.dynamic_sampling:  # in every round, all of them could be replaced
        asked = rollouts * min(prompts * (1 + config.dynamic_sampling), questions)
    completions = asked * config.num_generations
    return (
        f"updates: {updates:,} on at most {counted(questions, 'question')}, "
        f"at most {completions * config.max_new_tokens:,} sampled tokens"
    )
