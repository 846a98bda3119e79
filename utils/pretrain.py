"""Pretrain a language model with MLX, or warm one up on prompts and completions.

    uv run python utils/pretrain.py --smoke-test           one step on the CPU, no weights
    uv run python utils/pretrain.py --config configs/pretrain/moe_200m.toml
    uv run python utils/pretrain.py --config configs/pretrain/moe_200m_long.toml
    uv run python utils/pretrain.py --config FILE.toml --micro-batch-size 2 --compile false
    uv run python utils/pretrain.py --config configs/pretrain/tiny_math.toml --out-dir FOLDER
    uv run python utils/pretrain.py --prompt-from configs/tiny_math.toml --data rows.jsonl
                        a warm start: asked as mlx-grpo.py will ask by that settings file
    uv run python utils/pretrain.py ... --dry-run          memory and updates, writes nothing

The options are those of LitGPT's training configuration, with its names and defaults; a file may
nest them as LitGPT does ([train], [eval], [optimizer], ...) or list them flat. Data are folders of
text, packed into full sequences, or JSONL with "prompt" and "completion", the prompt masked. With
--prompt-from (docs/warm_start.md), they are whatever the trainer reads, and a file that
evaluate_model.py wrote stands for its right answers.

`out_dir` receives metrics.csv, checkpoint-N/ every save_interval updates, and final/, which
`mlx_lm.load` and mlx-grpo.py's model_name take. The same command continues a run that was stopped
from its newest checkpoint (resume = auto) and ends with the weights of one that was not. The recipe
tiny_math, which made models/tiny-math, saves only at its end. A finished model is never replaced
unless --overwrite is typed.
"""

import argparse
import dataclasses
import difflib
import json
import math
import os
import platform
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any, ClassVar

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from utils.device.runtime import preload_blas  # noqa: E402

preload_blas(as_command=__name__ == "__main__")  # MLX binds its BLAS when it is imported

import mlx.core as mx  # noqa: E402
import mlx.nn as nn  # noqa: E402
import mlx.optimizers as optim  # noqa: E402
import numpy as np  # noqa: E402
from mlx.utils import tree_map, tree_unflatten  # noqa: E402
from mlx_lm.utils import save_config, save_model  # noqa: E402
from transformers import PreTrainedTokenizerFast  # noqa: E402

from utils.base.errors import RunError, UserError, readable  # noqa: E402
from utils.base.json_files import read_object, write_json  # noqa: E402
from utils.base.say import Parser, complain, say, tell_everything  # noqa: E402
from utils.base.script import load_script  # noqa: E402
from utils.base.task_progress import Progress  # noqa: E402
from utils.base.text import counted  # noqa: E402
from utils.data.files import Row  # noqa: E402
from utils.data.tokenizer import Tokenizer  # noqa: E402
from utils.device import runtime  # noqa: E402
from utils.gradient.shared_prompts import checkpoint_layers  # noqa: E402
from utils.model import adapters, embeddings, loading, served_prompt, writing  # noqa: E402
from utils.model.shape import ModelConfig, ModelShape, shape_from_config  # noqa: E402
from utils.pretraining import data as pretrain_data  # noqa: E402
from utils.pretraining import litgpt, memory_plan, starting_point, warm_start  # noqa: E402
from utils.pretraining import model as pretrain_model  # noqa: E402
from utils.pretraining.data import Rows  # noqa: E402
from utils.pretraining.litgpt import Table  # noqa: E402
from utils.pretraining.names import ALIASES, own_name, refuse_two_names, settled  # noqa: E402
from utils.pretraining.ranges import check_numbers  # noqa: E402
from utils.pretraining.starting_point import StartingPoint  # noqa: E402
from utils.pretraining.warm_start import Example  # noqa: E402
from utils.rollouts.stop_rule import StopRule  # noqa: E402
from utils.run import checkpoints, folders, ours  # noqa: E402
from utils.run.lock import RunLock  # noqa: E402
from utils.run.trackers import Tracker, check_available, make_tracker, rewind  # noqa: E402
from utils.settings import reading  # noqa: E402
from utils.settings.run_settings import Settings  # noqa: E402

Tree = dict[str, Any]
"""Arrays in nested dicts and lists, as MLX keeps weights, gradients and moments."""
Figures = dict[str, float | None]
"""Of a run: name -> number; None where nothing was measured."""
DEFAULT_CONFIG = ROOT / "configs/pretrain/moe_200m.toml"
WARM_UP = ROOT / "configs/pretrain/warm_up.toml"
# precision -> type of the weights that learn, type of the forward and backward pass
PRECISIONS = {
    "bf16-mixed": (mx.float32, mx.bfloat16),
    "bf16-true": (mx.bfloat16, mx.bfloat16),
    "32-true": (mx.float32, mx.float32),
}
COMPILE_MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")
LOGGERS = ("csv", "tensorboard", "wandb", "none")
SMOKE_TEST = {
    "micro_batch_size": 1,
    "global_batch_size": 1,
    "max_tokens": 64,
    "max_seq_length": 64,
    "precision": "32-true",
    "logger_name": "csv",
    "compile": False,  # compiling costs the CPU more time than one step takes
}
# Settings that change no later update, or only by rounding.
MAY_CHANGE = {
    *("out_dir", "resume", "overwrite", "save_interval", "save_total_limit", "log_interval"),
    *("logger_name", "eval_interval", "eval_max_iters", "final_validation", "val_data_path"),
    *("micro_batch_size", "gradient_checkpointing", "compile", "compile_mode", "num_workers"),
    *("compile_dynamic", "compile_fullgraph", "flash_attention", "flash_attention_force"),
    *("disable_math_fallback", "tokenizer_dir", "initial_checkpoint_dir", "train_data_path"),
    *("prompt_from", "adapter_path"),  # the rows and the weights say what counts of them
}


@dataclasses.dataclass
class PretrainConfig:
    """Names and defaults of LitGPT's training configuration; what is ours says so."""

    out_dir: str = "./checkpoints"
    """Folder for metrics, checkpoints and the final model."""
    precision: str = "bf16-mixed"
    """bf16-mixed: bf16 compute, float32 weights; bf16-true: bf16 weights; 32-true: float32.
    Moments, gradient norm and loss are float32 in all three. Ours: auto, 32-true on a CPU and
    bf16-mixed elsewhere."""
    tokenizer_dir: str = "./data/tokenizer"
    """Folder of the tokenizer; "" takes the one of initial_checkpoint_dir."""
    tokenizer_vocab_size: int = 0
    """Ours: if tokenizer_dir does not exist, train a byte-level BPE of this size on the training
    text and save it there; 0 = never."""
    initial_checkpoint_dir: str = ""
    """Start from this model folder instead of fresh weights; [model] is then not needed."""
    prompt_from: str = ""
    """Ours: a settings file of mlx-grpo.py, as whose run the model is asked: system prompt, chat
    template, reasoning prefix, stop strings. Model, adapters and lengths are those of that file
    where they are not set here."""
    train_type: str = "auto"
    """Ours: full, lora, dora; auto is as in prompt_from, or full without it."""
    adapter_path: str = ""
    """Ours: adapters to start from."""
    lora_rank: int = 16
    """Ours: rank of the adapters."""
    lora_scale: float = 2.0
    """Ours: factor on the adapters' output."""
    lora_layers: int = -1
    """Ours: adapt the last so many layers; -1 all."""
    lora_keys: list[str] = dataclasses.field(default_factory=list)
    """Ours: names inside a layer to adapt; empty: every linear layer."""
    lora_dropout: float = 0.0
    """Ours: dropout on the adapters' input."""
    data_class_path: str = "litgpt.data.TextFiles"
    """litgpt.data.TextFiles: folders of text; litgpt.data.JSON: JSONL of prompt and completion."""
    train_data_path: str = "./data/custom_text/train"
    """Folder of text files, or a .jsonl file; with prompt_from whatever the trainer reads."""
    val_data_path: str = "./data/custom_text/val"
    """The same for validation; read only if eval_interval or final_validation ask for it."""
    text_suffixes: list[str] = dataclasses.field(default_factory=lambda: [".txt"])
    """Ours: endings of the files that count as text."""
    use_chat_template: bool = False
    """Ours, JSONL: put the prompt through the tokenizer's chat template as a user message."""
    num_workers: int = 2
    """No effect: rows are made before training and lie in memory."""
    global_batch_size: int = 128
    """Sequences per optimizer update."""
    micro_batch_size: int = 4
    """Sequences per forward and backward pass; gradients are accumulated exactly. 0: as many as
    memory allows (ours)."""
    max_tokens: int = 320_000
    """Tokens to train on, padding included, rounded up to whole updates."""
    num_epochs: int = 0
    """Ours: passes over the data, in place of max_tokens; 0 = by max_tokens."""
    max_updates: int = 0
    """Ours: at most so many updates; 0 = all."""
    max_seq_length: int = 512
    """Tokens per sequence."""
    lr_warmup_steps: int = 5
    """Updates of linear warm-up; then the rate falls to min_lr by a cosine."""
    warmup_ratio: float = 0.0
    """Ours: part of the updates to warm up in, in place of lr_warmup_steps; 0 = by that."""
    min_lr: float = 0.0
    """The learning rate at the end."""
    max_norm: float = 1.0
    """Gradients are clipped to this global norm."""
    gradient_checkpointing: bool = False
    """Keep only the inputs of each layer for the backward pass: less memory, a third slower."""
    save_interval: int = 500
    """Updates between checkpoints; 0 = none."""
    save_total_limit: int = 2
    """Ours: how many checkpoints are kept; 0 = all."""
    log_interval: int = 1
    """Updates between rows of the log."""
    eval_interval: int = 0
    """Updates between validations; 0 = none. LitGPT's eval.interval."""
    eval_max_iters: int = 100
    """Micro-batches per validation at most. LitGPT's eval.max_iters."""
    final_validation: bool = False
    """Validate once more when training has ended."""
    resume: str = "auto"
    """auto: the newest checkpoint in out_dir, if there is one; none; or a checkpoint folder."""
    overwrite: bool = False
    """Ours: replace what an earlier run left in out_dir; in a file, only a run on the same data."""
    seed: int = 42
    """Seed of fresh weights and of the order of the data."""
    compile: bool = True
    """Compile the step with mx.compile; pays on a GPU, false is faster on a CPU."""
    compile_mode: str = "reduce-overhead"
    """No effect: mx.compile has one mode."""
    compile_dynamic: bool = True
    """No effect: every batch has the same shape."""
    compile_fullgraph: bool = False
    """No effect: mx.compile always takes the whole step."""
    flash_attention: bool = True
    """No effect: mlx-lm's models always call MLX's fused attention."""
    flash_attention_force: bool = False
    """No effect, likewise."""
    disable_math_fallback: bool = False
    """No effect, likewise."""
    logger_name: str = "csv"
    """csv (metrics.csv in out_dir), tensorboard, wandb or none."""
    optimizer_class_path: str = "torch.optim.AdamW"
    """torch.optim.AdamW; by MLX's own AdamW."""
    lr: float = 3e-4
    """Peak learning rate."""
    lora_lr: float = 0.0
    """Ours: that of adapters; 0 = lr. An lr that is typed counts for them too."""
    weight_decay: float = 0.01
    """AdamW's weight decay, on every weight as in torch."""
    betas: list[float] = dataclasses.field(default_factory=lambda: [0.9, 0.999])
    """AdamW's decay of both moments; the default is torch's."""
    eps: float = 1e-8
    """AdamW's epsilon; the default is torch's."""
    model: Table = dataclasses.field(default_factory=dict)
    """The table [model]: LitGPT's model options, or config.json of an mlx-lm model type."""

    def __post_init__(self) -> None:
        self._check_numbers()
        choices = {"precision": (*PRECISIONS, "auto"), "compile_mode": COMPILE_MODES}
        choices |= {"logger_name": LOGGERS, "train_type": ("auto", "full", "lora", "dora")}
        for name, allowed in choices.items():
            if (value := getattr(self, name)) not in allowed:
                near = difflib.get_close_matches(value, allowed, n=1)
                hint = f"; did you mean {near[0]!r}?" if near else ""
                raise UserError(f"{name} = {value!r}: must be one of {', '.join(allowed)}{hint}")
        if self.optimizer_class_path.rpartition(".")[2] != "AdamW":
            raise UserError(
                f"optimizer.class_path = {self.optimizer_class_path!r}: only torch.optim.AdamW"
            )
        if self.data_class not in ("TextFiles", "JSON"):
            raise UserError(
                f"data.class_path = {self.data_class_path!r}: must be litgpt.data.TextFiles or "
                "litgpt.data.JSON"
            )
        if self.micro_batch_size and self.global_batch_size % self.micro_batch_size:
            raise UserError(
                f"global_batch_size = {self.global_batch_size}: must be a multiple of "
                f"micro_batch_size = {self.micro_batch_size}"
            )

    def _check_numbers(self) -> None:
        may_be_zero = {"seed", "weight_decay", "min_lr", "num_workers", "tokenizer_vocab_size"}
        may_be_zero |= {"save_interval", "save_total_limit", "eval_interval", "lr_warmup_steps"}
        may_be_zero |= {"micro_batch_size", "num_epochs", "max_updates", "warmup_ratio"}
        may_be_zero |= {"lora_dropout", "lora_lr"}
        numbers = {name: value for name, value in vars(self).items() if name != "lora_layers"}
        check_numbers(numbers, may_be_zero)
        self._check_added_numbers()
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise UserError(f"betas = {self.betas!r}: must be two numbers from 0 up to below 1")
        if 0 < self.tokenizer_vocab_size < 257:
            raise UserError("tokenizer_vocab_size: must be at least 257 (256 bytes, end of text)")
        if self.min_lr > self.lr:
            raise UserError(f"min_lr = {self.min_lr}: must not be above lr = {self.lr}")

    def _check_added_numbers(self) -> None:
        if self.lora_layers != -1 and self.lora_layers < 1:
            raise UserError(f"lora_layers = {self.lora_layers}: must be -1 (all) or at least 1")
        for name in ("lora_dropout", "warmup_ratio"):
            if (value := getattr(self, name)) >= 1:
                raise UserError(f"{name} = {value}: must be below 1")
        if self.lora_dropout and self.gradient_checkpointing:
            raise UserError(
                "lora_dropout with gradient_checkpointing: a layer computed again would draw "
                "another mask; leave one of them out"
            )

    explicit: ClassVar[frozenset[str]] = frozenset()  # what file or command say
    inherited: ClassVar[frozenset[str]] = frozenset()  # what the file says, and not this command

    @property
    def data_class(self) -> str:
        return self.data_class_path.rpartition(".")[2]

    @property
    def asks_as_grpo(self) -> bool:
        return bool(self.prompt_from)

    @property
    def has_adapters(self) -> bool:
        return self.train_type in ("lora", "dora")

    @property
    def validates(self) -> bool:
        return bool(self.eval_interval) or self.final_validation


# Model, tokenizer, data


@dataclasses.dataclass
class Materials:
    """What a run trains, and on what."""

    model: nn.Module
    model_config: ModelConfig
    tokenizer: PreTrainedTokenizerFast
    train: Rows
    val: Rows | None
    start: StartingPoint | None = None
    """Where the trainer's code loads and writes it: with prompt_from, or adapters."""


def prepare_tokenizer(
    config: PretrainConfig, smoke_test: bool, *, writes: bool
) -> PreTrainedTokenizerFast:
    """The folder's tokenizer, that of the initial model, or one trained on the training text."""
    option = "tokenizer_dir" if config.tokenizer_dir else "initial_checkpoint_dir"
    given = getattr(config, option)
    folder = Path(given)
    if given and folder.is_dir():
        return pretrain_data.load_tokenizer(given, option)
    if config.initial_checkpoint_dir:
        raise UserError(
            f"tokenizer_dir = {given!r}: there is no such folder, and the model of "
            "initial_checkpoint_dir knows no other tokenizer than its own, which "
            "--tokenizer-dir '' takes"
        )
    if smoke_test and not config.tokenizer_vocab_size:
        config = dataclasses.replace(config, tokenizer_vocab_size=512)
    if not config.tokenizer_vocab_size:
        raise UserError(
            f"tokenizer_dir = {config.tokenizer_dir!r}: no such folder; set tokenizer_vocab_size "
            "to train a tokenizer on the training text"
        )
    tokenizer = pretrain_data.train_tokenizer(training_texts(config), config.tokenizer_vocab_size)
    if writes:
        tokenizer.save_pretrained(folder)
        say(f"trained a tokenizer of {len(tokenizer)} tokens: {folder}")
    return tokenizer


def training_texts(config: PretrainConfig) -> list[str]:
    path, option = config.train_data_path, "train_data_path"
    if config.data_class == "JSON":
        return [part for pair in pretrain_data.read_pairs(path, option) for part in pair]
    files = pretrain_data.text_files(path, config.text_suffixes, option)
    return list(pretrain_data.read_texts(files))


def prepare_rows(
    config: PretrainConfig, tokenizer: PreTrainedTokenizerFast, option: str, vocab_size: int
) -> Rows:
    path, length = getattr(config, option), config.max_seq_length
    if config.data_class == "JSON":
        pairs = pretrain_data.read_pairs(path, option)
        chat = config.use_chat_template
        rows = pretrain_data.pair_rows(tokenizer, pairs, length, chat, option)
    else:
        files = pretrain_data.text_files(path, config.text_suffixes, option)
        rows = pretrain_data.text_rows(tokenizer, files, length, option)
    if (largest := int(rows.tokens.max())) >= vocab_size:  # MLX does not check bounds
        raise UserError(f"[model] vocab_size = {vocab_size}: the text has token {largest}")
    return rows


def check_paths(config: PretrainConfig) -> None:
    """Raises: UserError: data that are not of data.class_path's kind, or not there."""
    for option in (
        ("train_data_path", "val_data_path") if config.validates else ("train_data_path",)
    ):
        path = Path(getattr(config, option))
        is_json = path.suffix == ".jsonl"
        if is_json != (config.data_class == "JSON"):
            wanted = "a .jsonl file" if config.data_class == "JSON" else "a folder of text files"
            other = "TextFiles" if config.data_class == "JSON" else "JSON"
            raise UserError(
                f"{option} = {str(path)!r}: data.class_path = {config.data_class_path!r} wants "
                f"{wanted} (the other kind is litgpt.data.{other})"
            )
        if not path.exists():
            raise UserError(f"{option} = {str(path)!r}: does not exist")


def prepare(config: PretrainConfig, smoke_test: bool) -> Materials:
    if config.asks_as_grpo or config.has_adapters:
        return prepare_as_grpo(config)
    tokenizer, model_config = read_tokenizer_and_table(config, smoke_test)
    if config.initial_checkpoint_dir:
        model, model_config = pretrain_model.load_folder(config.initial_checkpoint_dir)
    else:
        model = pretrain_model.new_model(model_config, config.seed)
    check_model(config, model, model_config)
    vocab_size = model_config.get("vocab_size", len(tokenizer))
    rows = [prepare_rows(config, tokenizer, "train_data_path", vocab_size)]
    if config.validates:
        rows.append(prepare_rows(config, tokenizer, "val_data_path", vocab_size))
    return Materials(model, model_config, tokenizer, rows[0], rows[1] if rows[1:] else None)


def read_tokenizer_and_table(
    config: PretrainConfig, smoke_test: bool = False, *, writes: bool = True
) -> tuple[PreTrainedTokenizerFast, ModelConfig]:
    """And config.json of the model: of fresh weights by the table [model]."""
    check_paths(config)
    if not config.initial_checkpoint_dir and not config.model:
        raise UserError("[model] is missing (or initial_checkpoint_dir, to start from a model)")
    table = litgpt.model_config(config.model)
    if config.initial_checkpoint_dir:
        table = pretrain_model.check_folder(config.initial_checkpoint_dir)
    else:
        pretrain_model.architecture({"vocab_size": 64, **table})  # before anything is written
    tokenizer = prepare_tokenizer(config, smoke_test, writes=writes and not smoke_test)
    return tokenizer, {"vocab_size": -(-len(tokenizer) // 64) * 64, **table}


def read_preset(config: PretrainConfig) -> Settings:
    """The trainer's settings: those of prompt_from, or its defaults.

    Raises:
        UserError: the file is not there, or is none of the trainer's.
    """
    grpo = load_script()
    if not config.prompt_from:
        return grpo.MLXGRPOConfig(system_prompt="", reasoning_prefix="", stop_strings=[])
    try:
        return grpo.read_config(os.path.expanduser(config.prompt_from), [])
    except UserError as error:
        raise UserError(f"prompt_from = {config.prompt_from!r}: {error}") from None


def filled(config: PretrainConfig) -> PretrainConfig:
    """What is left open, as prompt_from has it and as this device needs it."""
    if config.precision == "auto":
        on_cpu = mx.default_device().type == mx.DeviceType.cpu
        config = replaced(config, precision="32-true" if on_cpu else "bf16-mixed")
    if not config.asks_as_grpo:
        refuse_idle(config, "full" if config.train_type == "auto" else config.train_type)
        return config
    preset = read_preset(config)
    changes = {name: getattr(preset, name) for name in starting_point.FROM_PRESET}
    changes |= {"initial_checkpoint_dir": preset.model_name, "data_class_path": "litgpt.data.JSON"}
    changes |= {"max_seq_length": preset.max_prompt_length + preset.max_new_tokens}
    if "initial_checkpoint_dir" in config.explicit and config.initial_checkpoint_dir:
        del changes["initial_checkpoint_dir"]
        changes["adapter_path"] = ""  # which is for the preset's model
    explicit = config.explicit - {"initial_checkpoint_dir"}
    return replaced(config, **{k: v for k, v in changes.items() if k not in explicit})


def refuse_idle(config: PretrainConfig, train_type: str) -> None:
    """Raises UserError for settings of adapters where there are none."""
    of_adapters = [name for name in starting_point.FROM_PRESET if name != "train_type"]
    idle = [name for name in of_adapters if name in config.explicit and getattr(config, name)]
    idle += ["lora_lr"] if "lora_lr" in config.explicit - config.inherited else []
    if idle and train_type == "full":
        raise UserError(
            f"{', '.join(idle)} has no effect with train_type = full: leave it out, or set "
            "train_type = lora"
        )


def replaced(config: PretrainConfig, **changes: object) -> PretrainConfig:
    """`dataclasses.replace`, after which only what was said counts as that."""
    result = dataclasses.replace(config, **changes)  # type: ignore[arg-type]
    vars(result).update(explicit=config.explicit, inherited=config.inherited)
    return result


def prepare_as_grpo(config: PretrainConfig) -> Materials:
    """The model as the trainer loads it, and the examples as it would ask for them."""
    preset = read_preset(config)
    settings = settings_for(config, preset)
    examples = read_examples(config, preset)
    loaded = loading.load_model(settings)
    config = within(config, loaded.context)
    check_model(config, loaded.model, loaded.config)
    rows, asked = rows_for(config, settings, examples, loaded.tokenizer, loaded.vocabulary)
    start = StartingPoint(settings, loaded, asked, preset if config.asks_as_grpo else None)
    val = rows[1] if rows[1:] else None
    return Materials(loaded.model, loaded.config, bare(loaded.tokenizer), rows[0], val, start)


def bare(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    """Without mlx-lm's wrapper."""
    inner: PreTrainedTokenizerFast = vars(tokenizer).get("_tokenizer", tokenizer)
    return inner


def settings_for(config: PretrainConfig, preset: Settings) -> Settings:
    """How the trainer's code is to load the model."""
    if not config.initial_checkpoint_dir:
        raise UserError("initial_checkpoint_dir is missing: adapters need a model to start from")
    own = {name: getattr(config, name) for name in starting_point.FROM_PRESET}
    model = config.initial_checkpoint_dir
    settings = starting_point.settings_of(preset, model, config.seed, **own)
    quantized = shape_of(config, {}).quantized_bits is not None
    settings.train_type = loading.resolve_train_type(settings, quantized)
    refuse_idle(config, settings.train_type)
    settings.dtype = starting_point.dtype_of(config.precision, settings.train_type)
    return settings


def options_of(config: PretrainConfig) -> list[str]:
    """The settings that name data which are read."""
    return ["train_data_path", *(["val_data_path"] if config.validates else [])]


def read_examples(config: PretrainConfig, preset: Settings) -> list[list[Example]]:
    """Of the data to train and to validate on, before gigabytes are read."""
    if not config.asks_as_grpo:
        check_paths(config)
        return []
    read = warm_start.read_examples
    return [read(preset, getattr(config, option), option) for option in options_of(config)]


def within(config: PretrainConfig, context: int) -> PretrainConfig:
    """Rows no longer than the model's context, where the user said nothing of their length."""
    if not config.asks_as_grpo or "max_seq_length" in config.explicit:
        return config
    return replaced(config, max_seq_length=min(config.max_seq_length, context))


def rows_for(
    config: PretrainConfig,
    settings: Settings,
    examples: list[list[Example]],
    tokenizer: Tokenizer,
    vocabulary: int,
) -> tuple[list[Rows], list[Row]]:
    """Tokens to train and to validate on, and the first examples that GRPO would ask for."""
    options = options_of(config)
    if not config.asks_as_grpo:
        return [prepare_rows(config, bare(tokenizer), name, vocabulary) for name in options], []
    stop = StopRule(tokenizer, settings.stop_strings, settings.reasoning_prefix)
    encoder = warm_start.Encoder(tokenizer, vocabulary, settings, stop)
    each, length, end = list(map(encoder.rows, examples)), config.max_seq_length, min(stop.eos_ids)
    pairs = zip(each, options, strict=True)
    padded = [warm_start.as_rows(rows, length, end, option) for rows, option in pairs]
    return padded, each[0][: served_prompt.FIRST_ROWS]


# What it takes


def update_of(
    config: PretrainConfig, shape: ModelShape, train_type: str, row_tokens: int
) -> memory_plan.Update:
    storage, compute = (dtype.size for dtype in PRECISIONS[config.precision])
    return memory_plan.Update(
        shape,
        train_type,
        storage if train_type == "full" else 4,
        compute,
        config.global_batch_size,
        row_tokens,
        config.gradient_checkpointing,
        runtime.platform_name(),
        runtime.device_memory_bytes(),
        config.lora_rank,
        config.lora_layers,
    )


def shape_of(config: PretrainConfig, model_config: ModelConfig) -> ModelShape:
    """Of the model to start from, or of the table [model].

    Raises:
        UserError: a table that there is no plan for.
    """
    name = config.initial_checkpoint_dir
    if name:
        return loading.read_shape(loading.find_model(name) or name)
    try:
        return shape_from_config(model_config, 4)
    except ValueError as error:
        raise UserError(f"[model]: its memory can't be planned ({error})") from None


def sized(config: PretrainConfig, materials: Materials) -> PretrainConfig:
    """With a micro_batch_size that fits, where it is 0, and the rate of what is trained."""
    train_type = materials.start.loaded.train_type if materials.start else "full"
    if train_type != "full" and config.lora_lr:
        config = replaced(config, lr=config.lora_lr)
    if config.micro_batch_size:
        return config
    shape = shape_of(config, materials.model_config)
    update = update_of(config, shape, train_type, materials.train.length)
    trainable = starting_point.trainable_size(materials.model)
    plan = memory_plan.planned(dataclasses.replace(update, trainable=trainable))
    say(f"plan: micro_batch_size = {plan.micro_batch_size}, about {readable(plan.needed)}")
    return replaced(config, micro_batch_size=plan.micro_batch_size)


def dry_run(config: PretrainConfig) -> None:
    """Print what the run would take, from config.json, headers and data; nothing is written."""
    config = filled(config)
    folders.refuse_unwritable(Path(config.out_dir), "out_dir")
    look = look_as_grpo if config.asks_as_grpo or config.has_adapters else look_as_litgpt
    config, shape, train_type, rows = look(config)
    width = rows[0].length if rows else config.max_seq_length
    update = update_of(config, shape, train_type, width)
    say(f"model: {config.initial_checkpoint_dir or '[model]'}, {shape.parameters:,} parameters")
    say(f"train_type resolves to {train_type}, precision is {config.precision}")
    say(memory_plan.planned(update, config.micro_batch_size).table())
    say(planned_updates(config, rows))


def planned_updates(config: PretrainConfig, rows: list[Rows]) -> str:
    if not rows:
        return f"updates: known once {config.initial_checkpoint_dir} is loaded from the hub"
    steps, size = update_count(config, rows[0]), config.global_batch_size
    targets = round(rows[0].mask.sum() * steps * size / len(rows[0]))
    return (
        f"updates: {steps:,} of {counted(size, 'row')} on {counted(len(rows[0]), 'row')} of "
        f"{rows[0].length} tokens: {steps * size * rows[0].length:,} tokens with padding, of which "
        f"about {targets:,} are trained"
    )


def look_as_grpo(config: PretrainConfig) -> tuple[PretrainConfig, ModelShape, str, list[Rows]]:
    """Shape, train type and rows without the weights; no rows where the tokenizer is on the hub."""
    preset = read_preset(config)
    settings = settings_for(config, preset)
    shape, train_type = shape_of(config, {}), settings.train_type
    examples = read_examples(config, preset)
    folder = loading.find_model(settings.model_name)
    if folder is None:
        return config, shape, train_type, []
    if settings.adapter_path:
        adapters.check_folder(settings, folder)
    model_config = read_object(folder / "config.json")
    config = within(config, loading.context_of(model_config))
    check_length(config, loading.context_of(model_config))
    tokenizer = loading.read_tokenizer(settings, folder)
    rows, _ = rows_for(config, settings, examples, tokenizer, shape.vocab_size)
    return config, shape, train_type, rows


def look_as_litgpt(config: PretrainConfig) -> tuple[PretrainConfig, ModelShape, str, list[Rows]]:
    tokenizer, model_config = read_tokenizer_and_table(config, writes=False)
    shape = shape_of(config, model_config)
    rows = [prepare_rows(config, tokenizer, o, shape.vocab_size) for o in options_of(config)]
    return config, shape, "full", rows


def check_model(config: PretrainConfig, model: nn.Module, model_config: ModelConfig) -> None:
    """Raises: UserError: rows that are too long for it, or a type that it can't compute in here."""
    check_length(config, model_config.get("max_position_embeddings", config.max_seq_length))
    if config.precision == "32-true" or mx.default_device().type != mx.DeviceType.cpu:
        return
    if pretrain_model.has_experts(model):
        raise UserError(
            f"precision = {config.precision!r}: MLX has experts on the CPU in float32 only; "
            "--precision 32-true"
        )
    say("note: bf16 is slow on a CPU; --precision 32-true is many times faster there")


def check_length(config: PretrainConfig, block: int) -> None:
    """Raises: UserError: rows that are longer than what the model was made for."""
    if config.max_seq_length > block:
        raise UserError(
            f"max_seq_length = {config.max_seq_length}: more than the model's block_size = {block}"
        )


# Training


def update_count(config: PretrainConfig, rows: Rows) -> int:
    """Updates of the run: by passes over the data, or by tokens."""
    size = config.global_batch_size
    steps = -(-config.num_epochs * len(rows) // size)
    if not config.num_epochs:
        steps = -(-config.max_tokens // (size * rows.length))
    return min(steps, config.max_updates or steps)


def learning_rate(step: int, steps: int, config: PretrainConfig) -> float:
    """Rate of update `step`, counted from 1: linear to lr, then cosine to min_lr at `steps`."""
    warmup = min(config.lr_warmup_steps, steps)
    if config.warmup_ratio:
        warmup = max(1, int(steps * config.warmup_ratio))
    if step <= warmup:
        return config.lr * step / warmup
    progress = (step - warmup) / (steps - warmup)
    return config.min_lr + (config.lr - config.min_lr) * 0.5 * (1 + math.cos(math.pi * progress))


def total_loss(model: nn.Module, tokens: mx.array, mask: mx.array) -> mx.array:
    """Summed cross-entropy of the targets that `mask` (B, T) marks; tokens (B, T+1)."""
    logits = model(tokens[:, :-1]).astype(mx.float32)  # (B, T, V)
    losses = nn.losses.cross_entropy(logits, tokens[:, 1:])  # (B, T)
    return (losses * mask).sum()


class Trainer:
    """Weights, optimizer and the position in the data.

    The weights that learn live in `params`, outside the model, which gets them in the precision of
    the computation.
    """

    def __init__(self, config: PretrainConfig, materials: Materials) -> None:
        self.config, self.model, self.rows = config, materials.model, materials.train
        self.steps = update_count(config, self.rows)
        self.step = 0
        storage, self.compute = PRECISIONS[config.precision]
        self.has_adapters = materials.start is not None and materials.start.has_adapters
        if self.has_adapters:
            storage = self.compute = mx.float32  # as the trainer has adapters
        self.storage = storage
        self.params = self.cast(self.model.trainable_parameters(), storage)
        self.optimizer = optim.AdamW(
            learning_rate=config.lr,
            betas=config.betas,
            eps=config.eps,
            weight_decay=config.weight_decay,
            bias_correction=True,
        )
        self.optimizer.init(self.cast(self.params, mx.float32))
        mx.eval(self.params, self.optimizer.state)
        self.model.train()  # which a model from a folder is not
        embeddings.sum_in_float32(self.model)
        if config.gradient_checkpointing:
            checkpoint_layers(self.model)
        wrap = mx.compile if config.compile else (lambda function: function)
        # Dropout draws: its random state goes in and out, or it would be compiled in as a constant.
        gradient = mx.value_and_grad(self._loss)
        if config.compile and config.lora_dropout:
            self._grad = mx.compile(gradient, inputs=mx.random.state, outputs=mx.random.state)
        else:
            self._grad = wrap(gradient)
        self._eval = wrap(self._loss)
        self._apply = wrap(self._update)

    @staticmethod
    def cast(tree: Tree, dtype: mx.Dtype) -> Tree:
        def convert(x: mx.array) -> mx.array:
            return x.astype(dtype) if mx.issubdtype(x.dtype, mx.floating) else x

        converted: Tree = tree_map(convert, tree)
        return converted

    def _loss(self, params: Tree, tokens: mx.array, mask: mx.array, count: mx.array) -> mx.array:
        self.model.update(self.cast(params, self.compute))
        return total_loss(self.model, tokens, mask) / count

    def _update(
        self, params: Tree, state: Tree, grads: Tree, rate: mx.array
    ) -> tuple[Tree, Tree, mx.array]:
        """AdamW in float32, whatever the weights are kept in."""
        grads, norm = optim.clip_grad_norm(self.cast(grads, mx.float32), self.config.max_norm)
        self.optimizer.state = state
        self.optimizer.learning_rate = rate
        new = self.optimizer.apply_gradients(grads, self.cast(params, mx.float32))
        new = tree_map(lambda x, old: x.astype(old.dtype), new, params)
        return new, self.optimizer.state, norm

    def batch(self, rows: Rows, index: np.ndarray) -> tuple[mx.array, mx.array]:
        return mx.array(rows.tokens[index]), mx.array(rows.mask[index].astype(np.float32))

    def gradients(self, index: np.ndarray) -> tuple[mx.array, Tree]:
        """Mean loss and its gradient over the rows `index`, one micro-batch at a time.

        Each micro-batch is divided by the targets of the whole batch, so that the sum is the
        gradient of the mean over all of them, however they are spread.
        """
        count = mx.array(max(int(self.rows.mask[index].sum()), 1), dtype=mx.float32)
        loss, grads = mx.array(0.0), Tree()
        size = self.config.micro_batch_size
        for start in range(0, len(index), size):
            tokens, mask = self.batch(self.rows, index[start : start + size])
            part, new = self._grad(self.params, tokens, mask, count)
            new = self.cast(new, mx.float32)
            grads = tree_map(mx.add, grads, new) if grads else new
            loss = loss + part
            mx.eval(loss, grads)
        return loss, grads

    def train_step(self) -> dict[str, float]:
        """One update.

        Raises:
            RunError: loss or gradient is not finite.
        """
        size = self.config.global_batch_size
        if self.config.lora_dropout:  # of its own for each update, so that a resumed run draws it
            drawn = np.random.SeedSequence((self.config.seed, self.step))
            mx.random.seed(int(drawn.generate_state(1, np.uint64)[0]))
        index = pretrain_data.batch_rows(len(self.rows), size, self.step, self.config.seed)
        loss, grads = self.gradients(index)
        rate = learning_rate(self.step + 1, self.steps, self.config)
        # Old references go before the evaluation, so that MLX can reuse their memory.
        self.params, self.optimizer.state, norm = self._apply(
            self.params, self.optimizer.state, grads, mx.array(rate)
        )
        del grads
        mx.eval(self.params, self.optimizer.state, norm)
        self.step += 1
        figures = {"loss": float(loss), "lr": rate, "grad_norm": float(norm)}
        if not all(map(math.isfinite, figures.values())):
            raise RunError(
                f"update {self.step}: loss {figures['loss']}, gradient norm "
                f"{figures['grad_norm']}: not finite; a lower lr or more lr_warmup_steps may help"
            )
        return figures

    def validate(self, rows: Rows) -> float:
        """Mean loss per target of the first eval_max_iters micro-batches of `rows`."""
        size = self.config.micro_batch_size
        self.model.eval()  # without dropout
        total = count = 0.0
        for start in range(0, min(len(rows), size * self.config.eval_max_iters), size):
            tokens, mask = self.batch(rows, np.arange(start, min(start + size, len(rows))))
            loss = self._eval(self.params, tokens, mask, mx.array(1.0))
            total += float(loss)
            count += float(mask.sum())
        self.model.train()
        return total / count

    def weights_into_model(self, dtype: mx.Dtype | None = None) -> nn.Module:
        params = self.params if dtype is None else self.cast(self.params, dtype)
        self.model.update(params)
        mx.eval(self.model.parameters())
        return self.model


# Checkpoints


def save_folder(folder: Path, trainer: Trainer, materials: Materials, dtype: mx.Dtype) -> None:
    """A complete model folder for `mlx_lm.load`; of adapters, these alone."""
    if materials.start is not None:
        materials.start.write(folder, trainer.weights_into_model(dtype))
        return
    tokenizer = materials.tokenizer
    end = {"eos_token_id": tokenizer.eos_token_id}
    save_model(folder, trainer.weights_into_model(dtype))
    name = {"torch_dtype": str(dtype).rpartition(".")[2]}
    save_config({**materials.model_config, **end, **name}, folder / "config.json")
    write_json(folder / "generation_config.json", end)
    tokenizer.save_pretrained(folder)


def save_checkpoint(trainer: Trainer, materials: Materials, data: str) -> Path:
    """The weights that learn, moments, random state and position; `data` names the rows."""
    config = trainer.config
    path = Path(config.out_dir) / f"checkpoint-{trainer.step}"
    arrays = {f"optimizer.{k}": v for k, v in writing.flat(trainer.optimizer.state).items()}
    arrays["random"] = mx.array(np.array(mx.random.state[0]))  # type: ignore[index]
    with folders.written_aside(path) as folder:
        save_folder(folder, trainer, materials, trainer.storage)
        counters: Table = {"step": trainer.step, "data": data}
        counters |= {"config": dataclasses.asdict(config), "base_sha256": base_of(materials)}
        checkpoints.write_state(folder, counters, arrays)
        folders.seal(folder)
    folders.drop_replaced(Path(config.out_dir))
    folders.prune(Path(config.out_dir), config.save_total_limit)
    return path


def base_of(materials: Materials) -> str:
    """The fingerprint of what adapters are on; empty where all weights are in a checkpoint."""
    start = materials.start
    return start.loaded.fingerprint if start is not None and start.has_adapters else ""


def load_checkpoint(folder: Path, trainer: Trainer, data: str, base: str) -> None:
    """Bring a fresh trainer to where the checkpoint was written.

    Raises:
        UserError: it cannot be read, or a setting or the data would change the rest of the run.
    """
    try:
        counters, arrays = checkpoints.read_state(folder)
        weights: dict[str, mx.array] = {}
        kind = "adapters" if trainer.has_adapters else "model"
        for file in sorted(folder.glob(f"{kind}*.safetensors")):
            weights |= mx.load(str(file))  # type: ignore[arg-type]
        refuse_changes(folder, counters, trainer.config, data)
        if counters.get("base_sha256", base) != base:
            raise UserError(
                f"resume: the base of its adapters has changed since {folder} was written: put "
                "the old model back, or start anew in another --out-dir"
            )
        restore(trainer, counters["step"], weights, arrays)
    except UserError:
        raise
    except Exception as error:  # a manifest is no signature: anybody can write a checkpoint
        detail = f"{type(error).__name__}: {str(error)[:500]}"
        raise UserError(f"resume: checkpoint {folder} cannot be read: {detail}") from error


def restore(
    trainer: Trainer, step: int, weights: dict[str, mx.array], arrays: dict[str, mx.array]
) -> None:
    if type(step) is not int or step < 0:
        raise ValueError(f"step = {step!r}")
    state = {k.partition(".")[2]: v for k, v in arrays.items() if k.startswith("optimizer.")}
    for own, read in (
        (writing.flat(trainer.params), weights),
        (writing.flat(trainer.optimizer.state), state),
    ):
        for name, value in own.items():
            if read[name].shape != value.shape:
                raise ValueError(f"{name} has the shape {read[name].shape}")
    high, low = np.array(arrays["random"]).tolist()
    trainer.step = step
    trainer.params = tree_unflatten([(n, weights[n]) for n in writing.flat(trainer.params)])
    trainer.optimizer.state = tree_unflatten(list(state.items()))
    mx.random.seed(high << 32 | low)


def refuse_changes(folder: Path, counters: Table, config: PretrainConfig, data: str) -> None:
    """Raise UserError where settings or data would change the rest of the checkpoint's run."""
    now = dataclasses.asdict(config)
    changed = [
        f"{key} (was {old!r}, is {now.get(key)!r})"
        for key, old in counters["config"].items()
        if key not in MAY_CHANGE and now.get(key) != old
    ]
    if changed or counters["data"] != data:
        what = ", ".join(changed) or "the training data"
        raise UserError(
            f"resume: {folder} was made with other settings: {what}; set them back, choose "
            "another --out-dir, or --overwrite"
        )


# The run


def find_checkpoint(config: PretrainConfig) -> Path | None:
    """Where to resume from.

    Raises:
        UserError: out_dir holds a run that is not to be continued.
    """
    folder = Path(config.out_dir)
    names = {"final", *folders.files_of_trackers(trackers_of(config))}
    folders.refuse_obstacles(folder, "out_dir", names)
    if config.overwrite:
        refuse_to_overwrite(config, ours.remains(folder))
        return None
    finished = (folder / "final").exists() and not folders.found(folder)
    if config.resume == "auto" and finished:
        raise UserError(
            f"out_dir = {config.out_dir!r} holds a finished run and no checkpoint: choose another "
            "--out-dir, or --overwrite it"
        )
    if config.resume != "none":
        with folders.as_user_error(folder, "out_dir"):
            return folders.to_resume(folder, config.resume)
    if ours.remains(folder):
        raise UserError(
            f"out_dir = {config.out_dir!r} already holds a run: --resume auto continues it, "
            "--overwrite replaces it"
        )
    return None


def refuse_to_overwrite(config: PretrainConfig, old: list[Path]) -> None:
    """Raises UserError where overwriting would delete what no run wrote, or this one reads; or a
    run on other data or of another model, for which --overwrite was not typed."""
    sources = ("initial_checkpoint_dir", "tokenizer_dir", "train_data_path", "val_data_path")
    for name in sources:
        source = os.path.realpath(getattr(config, name) or "/")
        if any(Path(source).is_relative_to(os.path.realpath(path)) for path in old):
            raise UserError(f"overwrite would delete {name}: choose another out_dir")
    folders.refuse_to_delete_additions(old, "out_dir")
    if not old or "overwrite" not in config.inherited:
        return
    before, now = settings_of(Path(config.out_dir)), dataclasses.asdict(config)
    made_of = ("initial_checkpoint_dir", "train_data_path", "data_class_path", "model")
    changed = [name for name in made_of if before.get(name) != now[name]]
    if changed:
        raise UserError(
            f"out_dir = {config.out_dir!r} holds a run that was made of something else "
            f"({', '.join(changed)}), and overwrite = true is in the settings file only: choose "
            "another --out-dir, or type --overwrite"
        )


def settings_of(folder: Path) -> Table:
    """What the run in a folder was told; empty where it does not say."""
    finished = ours.read_object(folder / "final" / ours.PRETRAINED).get("settings")
    found: Table = finished if isinstance(finished, dict) else folders.settings_of(folder)
    return found


def trackers_of(config: PretrainConfig) -> list[str]:
    return [] if config.logger_name == "none" else [config.logger_name]


def describe(trainer: Trainer, materials: Materials) -> Figures:
    """Prints what is about to happen; returns the figures for the record."""
    total, active = pretrain_model.parameter_counts(trainer.model, materials.model_config)
    rows, config = materials.train, trainer.config
    kind = materials.model_config.get("model_type")
    say(
        f"{kind}: {total:,} parameters, {active:,} active per token; {config.precision} on "
        f"{mx.default_device()}"
    )
    passes = trainer.steps * config.global_batch_size / len(rows)
    say(
        f"training data: {counted(len(rows), 'row')} of {rows.length} tokens; "
        f"{counted(trainer.steps, 'update')} of {counted(config.global_batch_size, 'row')}, "
        f"{passes:.2f} passes"
    )
    figures: Figures = {"parameters": total, "active_parameters": active}
    figures |= {"train_rows": len(rows), "row_tokens": rows.length, "updates": trainer.steps}
    if materials.val is not None:
        entropy = materials.val.unigram_entropy()
        say(f"validation data: {len(materials.val):,} rows; unigram entropy {entropy:.4f} nats")
        figures |= {"val_rows": len(materials.val), "val_unigram_entropy": round(entropy, 4)}
    return figures


def log_validation(trainer: Trainer, materials: Materials, tracker: Tracker) -> float:
    assert materials.val is not None
    loss = trainer.validate(materials.val)
    say(f"update {trainer.step}: validation loss {loss:.4f}, perplexity {math.exp(loss):.2f}")
    tracker.log({"update": trainer.step, "split": "val", "loss": loss})
    return loss


def fit(trainer: Trainer, materials: Materials, tracker: Tracker, data: str) -> Figures:
    """Train to the end with logs, validations and checkpoints; the figures of the run.

    data: fingerprint of the rows for the checkpoints; "" saves none.
    """
    config, rows = trainer.config, materials.train
    batch_tokens, speeds = config.global_batch_size * rows.length, []
    figures: dict[str, float] = {}
    with Progress(trainer.steps, "update", done=trainer.step) as shown:
        while trainer.step < trainer.steps:
            start = time.perf_counter()
            figures = trainer.train_step()
            speeds.append(batch_tokens / (time.perf_counter() - start))
            shown.step(figures=f"loss {figures['loss']:.3f}, {speeds[-1]:,.0f} tokens/s")
            log_update(trainer, tracker, figures, speeds[-1])
            if is_due(trainer.step, config.eval_interval) and trainer.step < trainer.steps:
                shown.stage("validating")
                log_validation(trainer, materials, tracker)
            if data and is_due(trainer.step, config.save_interval):
                shown.stage("saving")
                say(f"saved {save_checkpoint(trainer, materials, data)}")
            shown.stage("training")
    result: Figures = {"train_loss": figures.get("loss")}
    if materials.val is not None:
        result["val_loss"] = log_validation(trainer, materials, tracker)
    median = float(np.median(speeds)) if speeds else 0.0
    peak = round(mx.get_peak_memory() / 1e9, 2)
    return result | {"tokens_per_second": round(median, 1), "peak_memory_gb": peak}


def is_due(step: int, interval: int) -> bool:
    return interval > 0 and step % interval == 0


def log_update(
    trainer: Trainer, tracker: Tracker, figures: dict[str, float], tokens_per_second: float
) -> None:
    """A row of the log every log_interval updates, and for the last one."""
    step, config = trainer.step, trainer.config
    if not is_due(step, config.log_interval) and step < trainer.steps:
        return
    tokens = step * config.global_batch_size * trainer.rows.length
    peak = round(mx.get_peak_memory() / 1e9, 3)
    speed = {"tokens_per_second": round(tokens_per_second, 1), "peak_memory_gb": peak}
    tracker.log({"update": step, "tokens": tokens, **figures, **speed})


def run(config: PretrainConfig, smoke_test: bool) -> None:
    if smoke_test and (config.asks_as_grpo or config.has_adapters):
        raise UserError("--smoke-test: not for a warm start; use --dry-run, or --max-updates 1")
    if smoke_test:
        mx.set_default_device(mx.cpu)
        config = smoke_config(config)
    config = filled(config)
    folders.refuse_unwritable(Path(config.out_dir), "out_dir")
    with RunLock(Path(config.out_dir)) as lock:
        train(config, smoke_test, lock)


def train(config: PretrainConfig, smoke_test: bool, lock: RunLock) -> None:
    """The run, in a folder that no other run holds."""
    out_dir = Path(config.out_dir)
    check_available(trackers_of(config))
    checkpoint = None if smoke_test else find_checkpoint(config)
    if kernels := runtime.keep_compiled_kernels():
        say(kernels)
    started = time.perf_counter()
    materials = prepare(config, smoke_test)
    config = sized(config, materials)
    trainer = Trainer(config, materials)
    record: dict[str, object] = {**describe(trainer, materials)}
    data = "" if smoke_test else materials.train.fingerprint()
    if checkpoint is not None:
        load_checkpoint(checkpoint, trainer, data, base_of(materials))
        rewind(out_dir, None, trainer.step)
        say(f"continuing from {checkpoint}")
    folders.claim(out_dir, overwrite=config.overwrite, lock=lock, key="out_dir")
    recorded = dataclasses.asdict(config)
    tracker = make_tracker(
        trackers_of(config), out_dir, out_dir.name, recorded, since=trainer.step + 1
    )
    figures = fit(trainer, materials, tracker, data)
    tracker.close()
    seconds = round(time.perf_counter() - started, 1)
    say(json.dumps(figures))
    if smoke_test:
        say(f"smoke test passed in {seconds} s: one step, no weights saved, {out_dir} has its log")
        return
    names = ("mlx", "mlx-lm", "transformers", "tokenizers", "numpy")
    record |= figures | {"seconds": seconds, "device": mx.default_device().type.name}
    record["versions"] = {"python": platform.python_version()} | {n: version(n) for n in names}
    record["settings"] = dataclasses.asdict(config)
    with folders.written_aside(out_dir / "final") as folder:
        if materials.start is not None:
            materials.start.write_final(folder, trainer.weights_into_model(trainer.compute))
        else:
            save_folder(folder, trainer, materials, trainer.compute)
        write_json(folder / ours.PRETRAINED, record)
        ours.sign(folder)
    folders.drop_replaced(out_dir)
    say(f"saved {out_dir / 'final'} after {seconds} s")


def smoke_config(config: PretrainConfig) -> PretrainConfig:
    """One tiny step; text that never changes stands in for data that are not there."""
    changes: Table = dict(SMOKE_TEST)
    changes["out_dir"] = str(Path(config.out_dir) / "smoke_test")
    changes |= {"eval_interval": 0, "final_validation": False, "overwrite": True}
    if not Path(config.train_data_path).exists():
        say(f"smoke test: {config.train_data_path} does not exist, using models/tiny-math's text")
        changes["data_class_path"] = "litgpt.data.TextFiles"
        text = str(ROOT / "models/tiny-math")
        changes["train_data_path"], changes["text_suffixes"] = text, [".jsonl"]
    return dataclasses.replace(config, **changes)


# The command line


def read_file(path: Path) -> Table:
    return litgpt.flatten(reading.read_toml(path))


def is_recipe(path: Path) -> bool:
    """Whether the file is for the recipe of models/tiny-math."""
    name = reading.read_toml(path, DEFAULT_CONFIG.parent).get("recipe")
    if name not in (None, "tiny_math"):
        raise UserError(f"recipe = {name!r}: the only recipe is 'tiny_math'")
    return name is not None


def add_settings(parser: argparse.ArgumentParser, cls: type) -> None:
    """`--kebab-case` for every field; a bare flag of a boolean means true."""
    docs, add = reading.field_docs(cls), parser.add_argument_group("settings").add_argument
    for field in dataclasses.fields(cls):
        names = ["--" + field.name.replace("_", "-")]
        if field.name == "eval_interval":
            names.append("--interval")  # its name in LitGPT's table [eval]
        nargs, const = ("?", "true") if field.type is bool else (None, None)
        text = docs[field.name].replace("%", "%%")
        if field.default is not dataclasses.MISSING:
            text += f" (default: {field.default!r})"
        add(*names, dest=field.name, help=text, metavar="VALUE", nargs=nargs, const=const)


def aliases_of(cls: type) -> list[str]:
    """The recipe has names of its own."""
    return [*ALIASES] if cls is PretrainConfig else []


def make_parser(cls: type) -> argparse.ArgumentParser:
    parser = Parser(
        usage="pretrain.py [--config FILE] [--smoke-test | --dry-run] [--SETTING VALUE ...]",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--config",
        type=Path,
        default=DEFAULT_CONFIG,
        help=f"TOML file (default: %(default)s; with --prompt-from {WARM_UP})",
    )
    if cls is not PretrainConfig:
        parser.add_argument("--output-dir", dest="out_dir", help=argparse.SUPPRESS)
    for alias in aliases_of(cls):
        text = f"the trainer's name of --{ALIASES[alias].replace('_', '-')}"
        parser.add_argument(f"--{alias.replace('_', '-')}", dest=alias, metavar="VALUE", help=text)
    parser.add_argument(
        "--smoke-test",
        action="store_true",
        help="one step in float32 on the CPU with 64 tokens; saves no weights",
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        dest="overrides",
        help="override one setting; repeatable, e.g. --set compile=false",
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="print the plan (memory, updates), write nothing"
    )
    parser.add_argument("--data-only", action="store_true", help="tiny_math only: train nothing")
    add_settings(parser, cls)
    return parser


def parse(argv: list[str], cls: type) -> tuple[argparse.Namespace, list[str]]:
    """Arguments, and the settings among them as key=value in the order of precedence."""
    parser = make_parser(cls)
    arguments, unknown = parser.parse_known_args(argv)
    if unknown:
        known = [name for action in parser._actions for name in action.option_strings]
        near = difflib.get_close_matches(unknown[0].partition("=")[0], known, n=1)
        hint = f"; did you mean {near[0]}?" if near else "; --help lists the options"
        raise UserError(f"unknown argument {unknown[0]}{hint}")
    keys = [*(field.name for field in dataclasses.fields(cls)), *aliases_of(cls)]
    settings = [(key, getattr(arguments, key)) for key in keys]
    return arguments, arguments.overrides + [f"{k}={v}" for k, v in settings if v is not None]


def resolve(path: Path, overrides: list[str]) -> PretrainConfig:
    """The file's settings, nested or flat, then the overrides.

    Raises:
        UserError: whatever is wrong with them.
    """
    values: Table = {}
    types = reading.types_of(PretrainConfig)
    in_file = read_file(path)
    refuse_two_names(in_file, str(path))
    for name, value in in_file.items():
        if (key := own_name(name)) not in types:
            near = difflib.get_close_matches(key, [*types, *ALIASES, *litgpt.TABLES], n=1)
            hint = f"; did you mean {near[0]!r}?" if near else "; `--help` lists the keys"
            raise UserError(f"unknown key {key!r} in {path}{hint}")
        values[key] = reading.check_type(name, value, types[key])
    typed = [override.partition("=")[0].strip() for override in overrides]
    refuse_two_names(typed, "the command")
    for name, override in zip(typed, overrides, strict=True):
        if (key := own_name(name)) not in types or "=" not in override:
            reading.resolve(PretrainConfig, None, [override])  # raises with the nearest name
        values[key] = reading.parse_text(name, override.partition("=")[2].strip(), types[key])
    said = {*map(own_name, typed)}
    values |= settled(values, said)
    config = PretrainConfig(**values)
    vars(config).update(explicit=frozenset(values), inherited=frozenset(values) - said)
    return config


def config_file(argv: list[str]) -> Path:
    """The settings file: with --prompt-from the one of a warm start, if none is named."""
    early = Parser(add_help=False, allow_abbrev=False)
    early.add_argument("--config", type=Path)
    early.add_argument("--prompt-from")
    given = early.parse_known_args(argv)[0]
    default: Path = WARM_UP if given.prompt_from else DEFAULT_CONFIG
    return given.config or default


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    tell_everything()
    path = config_file(argv)
    config: PretrainConfig | None = None
    try:
        if is_recipe(path):
            from utils.pretraining import tiny_math_model

            arguments, overrides = parse(argv, tiny_math_model.TinyMathConfig)
            if arguments.smoke_test or arguments.dry_run:
                name = "--smoke-test" if arguments.smoke_test else "--dry-run"
                raise UserError(f"{name}: not for the recipe tiny_math; use --data-only")
            recipe = reading.resolve(tiny_math_model.TinyMathConfig, path, overrides)
            tiny_math_model.run(recipe, arguments.data_only)
        else:
            arguments, overrides = parse(argv, PretrainConfig)
            if arguments.data_only:
                raise UserError("--data-only: only the recipe tiny_math makes data")
            config = resolve(path, overrides)
            if arguments.dry_run:
                dry_run(config)
            else:
                run(config, arguments.smoke_test)
    except (UserError, RunError) as error:
        complain(f"error: {error}")
        return error.exit_code
    except KeyboardInterrupt:
        say(f"\ninterrupted; {what_continues(config)}")
        return 130
    return 0


def what_continues(config: PretrainConfig | None) -> str:
    """What the person can type who has just interrupted a run (None: of a recipe)."""
    if config is None:
        return "the recipe saves only at its end: the same command starts anew"
    newest = folders.found(Path(config.out_dir))[-1:]
    if not newest:
        return "no checkpoint was saved yet: the same command starts anew"
    if config.overwrite or config.resume != "auto":
        return f"--resume auto without --overwrite continues from {newest[0]}"
    return f"the same command continues from {newest[0]}"


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    sys.exit(main())
