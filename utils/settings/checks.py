"""What settings may be: ranges, choices, and combinations that make no sense together.

All of it is checked before anything is loaded; a complaint names key, value and what is allowed.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TypeAlias

from ..base.errors import UserError
from ..base.text import counted, shown
from .reading import refuse_infinite
from .run_settings import Loss, Settings, differs

Complaints: TypeAlias = Iterator[tuple[str, bool]]  # what is wrong, and whether it is

TEXTS = "model_name output_dir dataset train_split test_split"  # must not be empty
LIMITS: dict[str, tuple[Callable[[float], bool], str]] = {
    "above 0 and finite": (
        lambda v: 0 < v < math.inf,
        "learning_rate lora_learning_rate lora_scale max_grad_norm importance_cap "
        "reward_timeout advantage_eps lora_plus_ratio environment_timeout rank_timeout",
    ),
    # Logits divided by less than that may not be finite any more.
    "at least 0.001 and finite": (lambda v: 1e-3 <= v < math.inf, "temperature"),
    "at least 0 and finite": (
        lambda v: 0 <= v < math.inf,
        "kl_coeff weight_decay max_hours max_ckpt_gb wired_limit_gb cache_limit_gb memory_limit_gb "
        "clip_eps_high delta entropy_coeff advantage_clip reward_clip kl_target importance_floor "
        "max_completions_gb",
    ),
    "at least 2 (a group needs another completion to compare with)": (
        lambda v: v >= 2,
        "num_generations",
    ),
    "at least 1": (
        lambda v: v >= 1,
        "lora_rank batch_size gradient_accumulation_steps num_epochs num_iterations "
        "sync_every_updates max_new_tokens max_prompt_length max_completion_length "
        "eval_max_new_tokens logging_steps kl_horizon max_turns max_tool_tokens",
    ),
    "at least 0": (
        lambda v: v >= 0,
        "max_train_samples max_updates top_k eval_steps eval_samples eval_every_updates "
        "eval_subset_size log_completions save_steps save_total_limit rollout_batch_size "
        "reward_workers micro_batch_tokens dynamic_sampling ref_sync_updates "
        "early_stopping_patience watchdog_window plot_every",
    ),
    "at least 0, below 2 ** 64": (lambda v: 0 <= v < 2**64, "seed"),
    "-1 (all) or at least 1": (lambda v: v == -1 or v >= 1, "lora_layers"),
    "above 0, at most 1": (
        lambda v: 0 < v <= 1,
        "top_p top_entropy_quantile ref_sync_alpha",
    ),
    "between 0 and 1": (lambda v: 0 <= v <= 1, "min_p warmup_ratio"),
    "at least 0, below 1": (lambda v: 0 <= v < 1, "lora_dropout adam_beta1 adam_beta2"),
    "above 0, below 1": (lambda v: 0 < v < 1, "clip_eps"),
}
PATHS = "model_name output_dir dataset adapter_path resume chat_template train_split test_split"
CHOICES = {
    "on_environment_error": ("mask", "stop"),
    "dtype": ("auto", "float32", "bfloat16", "float16"),
    "moment_bits": (32, 8),
    "train_type": ("auto", "full", "lora", "dora"),
    "curriculum": ("none", "weights", "easy_to_hard"),
    "importance_sampling_level": ("auto", "token", "sequence"),
    "kl_placement": ("loss", "reward"),
    "importance_mode": ("token_truncate", "token_mask", "sequence_truncate", "sequence_mask"),
    "lr_scheduler_type": ("cosine", "linear", "constant"),
}


# Names of losses that LightRFT has for advantages: group_norm, with that loss.
BROUGHT = ("clip_eps", "clip_eps_high", "importance_sampling_level", "advantage_eps")
ALIASES = ("gspo", "gmpo", "cpgd")
WHITENED = ("reinforce", "reinforce_baseline", "gdpo")  # estimators that end with a normalisation


def follow_loss(c: Settings, losses: Mapping[str, Loss]) -> None:
    """Let what the user did not set be as the loss's paper has it; an alias becomes its loss.

    Raises:
        UserError: an alias beside another loss_type.
    """
    alias = c.advantage_estimator
    if alias in ALIASES:
        if "loss_type" in c.explicit and c.loss_type != alias:
            raise UserError(
                f"advantage_estimator = {alias!r} stands for loss_type = {alias!r} with "
                f"group_norm, but loss_type = {c.loss_type!r}: leave one of them out"
            )
        vars(c).update(loss_type=alias, advantage_estimator="group_norm")
    for name in BROUGHT if c.loss_type in losses else ():
        value = getattr(losses[c.loss_type], name)
        c.bring(name, getattr(type(c), name) if value is None else value)


def contradictions(c: Settings) -> Complaints:
    """Settings that make no sense together; the first complaint is the one that is raised."""
    yield from about_rewards(c)
    yield from about_weights(c)
    yield from about_data(c)
    yield from about_ratios(c)
    yield from about_kl(c)
    yield from about_normalisation(c)
    yield from about_evaluations(c)
    yield from about_completions(c)
    for text in c.stop_strings:
        yield "stop_strings holds an empty string", not text
        yield f"stop string {text!r} is part of reasoning_prefix", text in c.reasoning_prefix


def about_completions(c: Settings) -> Complaints:
    kind, _, count = c.keep_completions.partition(":")
    sampled = kind == "sample" and count.isascii() and count.isdecimal() and int(count) > 0
    yield (
        f"keep_completions = {shown(c.keep_completions)}, allowed are all, none, or sample:N with "
        "N from 1 on, such as sample:2",
        not sampled and c.keep_completions not in ("all", "none"),
    )


def about_rewards(c: Settings) -> Complaints:
    yield "reward_funcs is empty: nothing would be learned", not c.reward_funcs
    yield (
        f"reward_weights has {counted(len(c.reward_weights), 'value')} for "
        f"{len(c.reward_funcs)} reward_funcs: give each one a factor, or leave it out",
        len(c.reward_weights) not in (0, len(c.reward_funcs)),
    )
    yield "reward_funcs names a function twice", len({*c.reward_funcs}) != len(c.reward_funcs)
    for name, given in c.reward_kwargs.items():
        yield (
            f"reward_kwargs names {name!r}, which is not among reward_funcs: "
            f"{', '.join(c.reward_funcs)}",
            name not in c.reward_funcs,
        )
        yield (
            f"reward_kwargs.{name} = {given!r} must be a table such as {{key = value}}",
            not isinstance(given, dict),
        )
    yield (
        "reward_model has no effect unless reward_funcs has reward_model",
        bool(c.reward_model) and "reward_model" not in c.reward_funcs,
    )
    yield (
        "the reward environment is what an environment says: set environment = file.py:Class",
        "environment" in c.reward_funcs and not c.environment,
    )
    yield (
        f"environment = {shown(c.environment)} must be written file.py:Class or module:Class",
        bool(c.environment) and not all(c.environment.rpartition(":")[::2]),
    )
    yield (
        "tools and environment: chat_template = plain has no turns",
        c.has_turns and c.chat_template == "plain",
    )
    yield (
        "remote_rm_url has no effect unless reward_funcs has remote_rm",
        bool(c.remote_rm_url) and "remote_rm" not in c.reward_funcs,
    )


def about_weights(c: Settings) -> Complaints:
    """The weights that are trained, in full or by adapters."""
    yield (
        "adapter_path needs train_type lora or dora",
        bool(c.adapter_path) and (c.train_type == "full"),
    )
    yield (
        "lora_dropout with gradient_checkpointing: a layer computed again would draw another mask, "
        "and its gradient would be wrong; leave one of them out",
        c.lora_dropout > 0 and c.gradient_checkpointing,
    )
    yield (
        f"master_weights = false is for bfloat16 weights, so not with dtype = {c.dtype}",
        not c.master_weights and c.dtype in ("float32", "float16"),
    )


def about_data(c: Settings) -> Complaints:
    """What is asked, in which order, and by what the answers are judged."""
    yield (
        f"eval_metric = {c.eval_metric!r} is neither em nor one of reward_funcs",
        c.eval_metric not in ("em", *c.reward_funcs),
    )
    weighted = [part for part in c.dataset_mix if "weight" in part]
    yield (
        f"curriculum = {c.curriculum} orders all questions by difficulty, so the weights in "
        "dataset_mix would have no effect: leave one of them out",
        c.curriculum == "easy_to_hard" and bool(weighted),
    )
    yield (
        "shuffle = false keeps the order of the data, but weights draw at random: leave one out",
        not c.shuffle and (bool(weighted) or c.curriculum == "weights"),
    )
    yield (
        "max_train_samples has no effect on dataset_mix: write samples = N in its tables",
        bool(c.dataset_mix) and c.max_train_samples > 0,
    )
    yield (
        "dataset_mix: a weight in every table or in none (then each question comes once an epoch)",
        len(weighted) not in (0, len(c.dataset_mix)),
    )


def about_ratios(c: Settings) -> Complaints:
    """The ratio to the old policy: what clips it, and whether it is of a token or a sequence."""
    high = c.clip_eps_high or c.clip_eps
    at_sequence = c.importance_sampling_level == "sequence"
    yield (
        f"delta = {c.delta} bounds PPO's clipped ratio, which loss_type = {c.loss_type} has not",
        bool(c.delta) and not c.loss.dual_clip,
    )
    yield (
        f"delta = {c.delta} must be above 1 + clip_eps_high = {1 + high}, or it would act on good "
        "tokens instead of the clip",
        0 < c.delta <= 1 + high,
    )
    yield (
        f"importance_sampling_level = sequence has no meaning for loss_type = {c.loss_type}, which "
        f"{c.loss.per_token}",
        at_sequence and bool(c.loss.per_token),
    )
    yield (
        "top_entropy_quantile selects tokens, but the gradient of a ratio per sequence goes to all "
        "of them: set importance_sampling_level = token, or another loss_type than gmpo",
        c.top_entropy_quantile < 1 and (at_sequence or c.loss.per_sequence),
    )


def about_kl(c: Settings) -> Complaints:
    """The distance to the reference, and the weight for the distance to the sampler."""
    yield (
        "kl_estimator = k1 in the loss has a gradient of mean zero: set kl_bias_correction = true, "
        "kl_placement = reward, or k2 or k3",
        c.kl_estimator == "k1"
        and c.kl_placement == "loss"
        and not c.kl_bias_correction
        and c.kl_coeff > 0,
    )
    yield (
        "kl_bias_correction is about a gradient, which a penalty in the reward has not",
        c.kl_bias_correction and c.kl_placement == "reward",
    )
    yield (
        f"importance_floor = {c.importance_floor} is above importance_cap = {c.importance_cap}",
        c.importance_floor > c.importance_cap,
    )


def about_normalisation(c: Settings) -> Complaints:
    """How rewards become advantages."""
    kl_in_reward = c.kl_coeff > 0 and c.kl_placement == "reward"
    yield (
        "reward_running_norm_minus_mean needs reward_running_norm",
        c.reward_running_norm_minus_mean and not c.reward_running_norm,
    )
    yield (
        "reward_running_norm_minus_mean needs reward_clip: without it, the baseline of every "
        "advantage_estimator takes the mean out again",
        c.reward_running_norm_minus_mean and not c.reward_clip,
    )
    has_effect = c.advantage_estimator in ("dr_grpo", "rloo") or bool(c.reward_clip) or kl_in_reward
    yield (
        f"reward_running_norm: advantage_estimator = {c.advantage_estimator} divides by a standard "
        "deviation itself; it needs dr_grpo or rloo, reward_clip, or kl_placement = reward",
        c.reward_running_norm and not has_effect,
    )
    yield (
        f"advantages_norm: advantage_estimator = {c.advantage_estimator} does that already",
        c.advantages_norm and c.advantage_estimator in WHITENED,
    )
    if c.advantage_estimator == "gdpo":
        yield from about_gdpo(c, kl_in_reward)


def about_gdpo(c: Settings, kl_in_reward: bool) -> Complaints:
    shaping = [n for n in ("reward_clip", "reward_running_norm") if getattr(c, n)]
    shaping += ["kl_placement = reward"] * kl_in_reward
    yield (
        f"{', '.join(shaping)} acts on the total reward; advantage_estimator = gdpo takes each "
        "reward function by itself",
        bool(shaping),
    )
    yield "advantage_estimator = gdpo needs at least two reward_funcs", len(c.reward_funcs) < 2


def about_evaluations(c: Settings) -> Complaints:
    yield (
        "save_best goes by the evaluations on the test split, and eval_samples = 0 has none",
        c.save_best and not c.eval_samples,
    )
    yield (
        "early_stopping_patience counts evaluations on the test split, which need eval_samples and "
        "eval_steps above 0",
        c.early_stopping_patience > 0 and not (c.eval_samples and c.eval_steps),
    )


MIX_KEYS: dict[str, type] = {
    "dataset": str,
    "dataset_config": str,
    "train_split": str,
    "question_column": str,
    "answer_column": str,
    "weight": float,
    "samples": int,
}


def check_mix(mix: list[dict[str, object]]) -> None:
    """Refuse tables of dataset_mix with unknown keys or impossible values. Raises UserError."""
    names = [part.get("dataset") for part in mix]
    for part in mix:
        for key, value in part.items():
            check_mix_value(key, value)
        if not part.get("dataset"):
            raise UserError(f"dataset_mix: a table without dataset: {part}")
        if names.count(part["dataset"]) > 1:
            raise UserError(f"dataset_mix: {part['dataset']!r} occurs twice")


def check_mix_value(key: str, value: object) -> None:
    kind = MIX_KEYS.get(key)
    if kind is None:
        raise UserError(f"dataset_mix: unknown key {key!r}; known: {', '.join(MIX_KEYS)}")
    if kind is str:
        if not isinstance(value, str):
            raise UserError(f"dataset_mix: {key} = {value!r} must be text")
    elif not is_amount(value, kind):
        raise UserError(f"dataset_mix: {key} = {value!r} must be a number above 0")


def is_amount(value: object, kind: type) -> bool:
    """Whether it is a whole number, or one of this kind, above 0 and finite."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return isinstance(value, int | kind) and 0 < value < math.inf


# (settings, when they have no effect, why) for what was set on purpose.
DEAD: tuple[tuple[str, Callable[[Settings], bool], str], ...] = (
    (
        "kl_estimator kl_placement kl_bias_correction kl_target kl_horizon ref_sync_updates "
        "ref_sync_alpha",
        lambda c: c.kl_coeff == 0,
        "kl_coeff = 0",
    ),
    (
        "max_turns max_tool_tokens environment_timeout on_environment_error",
        lambda c: not c.has_turns,
        "completions of one turn: set environment or tools",
    ),
    ("kl_horizon", lambda c: c.kl_target == 0, "kl_target = 0"),
    ("ref_sync_alpha", lambda c: c.ref_sync_updates == 0, "ref_sync_updates = 0"),
    (
        "clip_eps",
        lambda c: c.loss.clip_eps is None,
        "a loss_type without a lower clip",
    ),
    (
        "clip_eps_high",
        lambda c: c.loss.clip_eps_high is None,
        "a loss_type without a clip",
    ),
    (
        "clip_eps clip_eps_high delta",
        lambda c: c.num_iterations == 1,
        "num_iterations = 1, where the ratio to the old policy is 1",
    ),
    (
        "advantage_eps",
        lambda c: c.advantage_estimator not in ("group_norm", "batch", "gdpo"),
        "an advantage_estimator without a group's standard deviation",
    ),
)


def check(c: Settings, **tables: Iterable[str]) -> None:
    """Check every value and combination of an MLXGRPOConfig, of some of whose settings the values
    are names in `tables`.

    Raises:
        UserError: the first complaint.
    """
    check_sizes(c)
    estimators = (*tables.pop("advantage_estimator"), *ALIASES)
    check_values(c, {**tables, "advantage_estimator": estimators, **CHOICES})
    check_mix(c.dataset_mix)
    refuse(contradictions(c))


def refuse(complaints: Complaints) -> None:
    for complaint, wrong in complaints:
        if wrong:
            raise UserError(complaint)


def check_values(c: Settings, choices: Mapping[str, Iterable[str | int]]) -> None:
    """Each setting by itself."""
    for name in TEXTS.split():
        if not getattr(c, name).strip():
            raise UserError(f"{name} = {shown(getattr(c, name))} must be text that is not empty")
    for rule, (holds, names) in LIMITS.items():
        for name in names.split():
            if not holds(getattr(c, name)):
                raise UserError(f"{name} = {shown(getattr(c, name))} must be {rule}")
    for name, value in vars(c).items():
        refuse_infinite(name, value)
    for name, allowed in choices.items():
        if getattr(c, name) not in allowed:
            listed = ", ".join(map(str, allowed))
            raise UserError(f"{name} = {shown(getattr(c, name))}, allowed: {listed}")


def check_sizes(c: Settings) -> None:
    """Numbers that MLX can index with, and names that a file system takes."""
    for name, value in vars(c).items():
        if name != "seed" and isinstance(value, int) and abs(value) >= 2**31:
            raise UserError(f"{name} = {shown(value)} must be below 2 ** 31")
    for name in PATHS.split():
        path = getattr(c, name).encode(errors="replace")
        if len(path) > 3000 or any(len(part) > 240 for part in path.split(b"/")):
            raise UserError(f"{name} = {shown(getattr(c, name))} is too long for a file name")


def room_for_sampling(c: Settings, prefix_tokens: int) -> int:
    """Tokens that may follow the reasoning prefix. Raises UserError if there are none."""
    room = c.max_completion_length - prefix_tokens
    if room < 1:
        raise UserError(
            f"max_completion_length = {c.max_completion_length} leaves no room after "
            f"reasoning_prefix ({prefix_tokens} tokens)"
        )
    return room


def refuse_dead_settings(c: Settings, train_type: str) -> None:
    """Refuse what was set on purpose and could have no effect."""
    refuse(dead_settings(c, train_type))


def dead_settings(c: Settings, train_type: str) -> Complaints:
    yield (
        "dataset_mix is trained on; set dataset too, on which the run is evaluated (or "
        "eval_samples = 0)",
        bool(c.dataset_mix and c.eval_samples) and "dataset" not in c.explicit,
    )
    yield (
        "curriculum_column has no effect with curriculum = none: leave it out",
        "curriculum_column" in c.explicit and c.curriculum == "none",
    )
    if train_type in ("lora", "dora"):
        yield from dead_with_adapters(c, train_type)
    elif train_type == "full":
        yield from dead_without_adapters(c)
    yield from dead_by_another(c)


def dead_with_adapters(c: Settings, train_type: str) -> Complaints:
    yield (
        f"master_weights has no effect with train_type = {train_type}, whose adapters are "
        "float32: leave it out",
        "master_weights" in c.explicit,
    )
    in_file = "learning_rate" in c.inherited and not c.from_preset
    yield (
        f"learning_rate = {short(c.learning_rate)} has no effect on adapters (train_type = "
        f"{train_type}), and the settings file does not say which rate they get: write "
        f"lora_learning_rate = {short(c.lora_learning_rate)} (the default) or another into it, or "
        "leave learning_rate out",
        in_file and "lora_learning_rate" not in c.explicit,
    )


def dead_without_adapters(c: Settings) -> Complaints:
    of_adapters = sorted(name for name in c.explicit if name.startswith("lora_"))
    yield (
        f"{', '.join(of_adapters)} has no effect with train_type = full: leave it out",
        bool(of_adapters),
    )
    yield (
        "ref_sync_updates: small steps would be rounded away in the 4-bit reference of full "
        "fine-tuning; set quantize_for_rollouts = false",
        c.ref_sync_updates > 0 and c.quantize_for_rollouts,
    )


def short(rate: float) -> str:
    """2e-5, as people write it."""
    return f"{rate:g}".replace("e-0", "e-")


def dead_by_another(c: Settings) -> Complaints:
    """Settings that the value of another one leaves without effect."""
    for names, without_effect, why in DEAD:
        dead = [n for n in names.split() if n in c.explicit and differs(c, n)]
        complaint = f"{', '.join(dead)} has no effect with {why}: leave it out"
        yield complaint, bool(dead) and without_effect(c)
