"""The memory plan of a run on this machine."""

from typing import TYPE_CHECKING

from ..base.errors import UserError
from ..device import runtime
from ..model import loading
from ..model import shape as model_shape
from ..settings.run_settings import Settings
from .plan import GB, Plan
from .suggestions import planned

if TYPE_CHECKING:  # `--dry-run` needs none of it
    import mlx.nn as nn


def plan_memory(
    config: Settings,
    shape: model_shape.ModelShape,
    train_type: str,
    prompt_tokens: int,
    completion_tokens: int,
    trainable_parameters: int | None = None,
) -> Plan:
    """What an update takes on this machine, and the batch sizes that fit.

    Raises:
        UserError: a run that there is no plan for, see `plan.make_plan`.
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
            shares_prompts=shape.state is None,
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


def plan_of(
    config: Settings, loaded: loading.LoadedModel, prompt_tokens: int, completion_tokens: int
) -> Plan:
    """The plan for a model that is loaded, whose prompts and completions are at most so long."""
    return plan_memory(
        config,
        loading.read_shape(loaded.folder),
        loaded.train_type,
        prompt_tokens,
        completion_tokens,
        trainable_parameters(loaded.model),
    )


def trainable_parameters(model: "nn.Module") -> int:
    from mlx.utils import tree_flatten

    weights: list = tree_flatten(model.trainable_parameters())  # type: ignore[assignment]
    return sum(weight.size for _, weight in weights)


def budget_bytes(config: Settings) -> int:
    """What the run may use: the device's memory, or memory_limit_gb where that is less.

    A reward model in a folder takes the size of its weights off, unless it is unloaded.
    """
    device, limit = runtime.device_memory_bytes(), int(config.memory_limit_gb * GB)
    kept = not config.reward_kwargs.get("reward_model", {}).get("unload")
    files = config.located(config.reward_model).glob("model*.safetensors")
    scorer = sum(f.stat().st_size for f in files) if config.reward_model and kept else 0
    return max(1, (min(device, limit) if limit else device) - scorer)


def master_bytes(config: Settings, shape: model_shape.ModelShape) -> int:
    """What the optimizer keeps beside a half-precision weight (utils/gradient/adamw.py)."""
    own = max(shape.bytes_by_dtype, key=lambda name: shape.bytes_by_dtype[name], default="")
    half = config.dtype == "float16" or (config.dtype == "auto" and own == "F16")
    return (4 if half else 2) if config.master_weights else 0
