"""Pretrain a language model with MLX, or warm one up on prompts and completions.

    uv run python utils/pretrain.py --smoke-test           one step on the CPU, no weights
    uv run python utils/pretrain.py --config configs/pretrain/moe_200m.toml
    uv run python utils/pretrain.py --config configs/pretrain/moe_200m_long.toml
    uv run python utils/pretrain.py --config FILE.toml --micro-batch-size 2 --compile false
    uv run python utils/pretrain.py --config configs/pretrain/warm_up.toml
    uv run python utils/pretrain.py --config configs/pretrain/tiny_math.toml --out-dir FOLDER

The options are those of LitGPT's training configuration, with its names and defaults; a file may
nest them as LitGPT does ([train], [eval], [optimizer], ...) or list them flat. Data are folders of
text, packed into full sequences, or JSONL with "prompt" and "completion", the prompt masked.

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

from utils.base.errors import RunError, UserError  # noqa: E402
from utils.base.json_files import write_json  # noqa: E402
from utils.base.say import Parser, complain, say, tell_everything  # noqa: E402
from utils.base.task_progress import Progress  # noqa: E402
from utils.base.text import counted  # noqa: E402
from utils.device import runtime  # noqa: E402
from utils.gradient.shared_prompts import checkpoint_layers  # noqa: E402
from utils.model import embeddings, writing  # noqa: E402
from utils.model.shape import ModelConfig  # noqa: E402
from utils.pretraining import data as pretrain_data  # noqa: E402
from utils.pretraining import litgpt  # noqa: E402
from utils.pretraining import model as pretrain_model  # noqa: E402
from utils.pretraining.data import Rows  # noqa: E402
from utils.pretraining.litgpt import Table  # noqa: E402
from utils.pretraining.ranges import check_numbers  # noqa: E402
from utils.run import checkpoints, folders, ours  # noqa: E402
from utils.run.trackers import Tracker, check_available, make_tracker, rewind  # noqa: E402
from utils.settings import reading  # noqa: E402

Tree = dict[str, Any]
"""Arrays in nested dicts and lists, as MLX keeps weights, gradients and moments."""
Figures = dict[str, float | None]
"""Of a run: name -> number; None where nothing was measured."""
DEFAULT_CONFIG = ROOT / "configs/pretrain/moe_200m.toml"
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
}


@dataclasses.dataclass
class PretrainConfig:
    """Names and defaults of LitGPT's training configuration; what is ours says so."""

    out_dir: str = "./checkpoints"
    """Folder for metrics, checkpoints and the final model."""
    precision: str = "bf16-mixed"
    """bf16-mixed: bf16 compute, float32 weights; bf16-true: bf16 weights; 32-true: float32.
    Moments, gradient norm and loss are float32 in all three."""
    tokenizer_dir: str = "./data/tokenizer"
    """Folder of the tokenizer; "" takes the one of initial_checkpoint_dir."""
    tokenizer_vocab_size: int = 0
    """Ours: if tokenizer_dir does not exist, train a byte-level BPE of this size on the training
    text and save it there; 0 = never."""
    initial_checkpoint_dir: str = ""
    """Start from this model folder instead of fresh weights; [model] is then not needed."""
    data_class_path: str = "litgpt.data.TextFiles"
    """litgpt.data.TextFiles: folders of text; litgpt.data.JSON: JSONL of prompt and completion."""
    train_data_path: str = "./data/custom_text/train"
    """Folder of text files, or a .jsonl file."""
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
    """Sequences per forward and backward pass; gradients are accumulated exactly."""
    max_tokens: int = 320_000
    """Tokens to train on, rounded up to whole updates."""
    max_seq_length: int = 512
    """Tokens per sequence."""
    lr_warmup_steps: int = 5
    """Updates of linear warm-up; then the rate falls to min_lr by a cosine."""
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
        choices = {"precision": PRECISIONS, "compile_mode": COMPILE_MODES, "logger_name": LOGGERS}
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
        if self.global_batch_size % self.micro_batch_size:
            raise UserError(
                f"global_batch_size = {self.global_batch_size}: must be a multiple of "
                f"micro_batch_size = {self.micro_batch_size}"
            )

    def _check_numbers(self) -> None:
        may_be_zero = {"seed", "weight_decay", "min_lr", "num_workers", "tokenizer_vocab_size"}
        may_be_zero |= {"save_interval", "save_total_limit", "eval_interval", "lr_warmup_steps"}
        check_numbers(vars(self), may_be_zero)
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise UserError(f"betas = {self.betas!r}: must be two numbers from 0 up to below 1")
        if 0 < self.tokenizer_vocab_size < 257:
            raise UserError("tokenizer_vocab_size: must be at least 257 (256 bytes, end of text)")
        if self.min_lr > self.lr:
            raise UserError(f"min_lr = {self.min_lr}: must not be above lr = {self.lr}")

    inherited: ClassVar[frozenset[str]] = frozenset()  # what the file says, and not this command

    @property
    def data_class(self) -> str:
        return self.data_class_path.rpartition(".")[2]

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


def prepare_tokenizer(config: PretrainConfig, smoke_test: bool) -> PreTrainedTokenizerFast:
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
    if not smoke_test:
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
    check_paths(config)
    if not config.initial_checkpoint_dir and not config.model:
        raise UserError("[model] is missing (or initial_checkpoint_dir, to start from a model)")
    table = litgpt.model_config(config.model)
    if config.initial_checkpoint_dir:
        pretrain_model.check_folder(config.initial_checkpoint_dir)
    else:
        pretrain_model.architecture({"vocab_size": 64, **table})  # before anything is written
    tokenizer = prepare_tokenizer(config, smoke_test)
    if config.initial_checkpoint_dir:
        model, model_config = pretrain_model.load_folder(config.initial_checkpoint_dir)
    else:
        model_config = {"vocab_size": -(-len(tokenizer) // 64) * 64, **table}
        model = pretrain_model.new_model(model_config, config.seed)
    check_model(config, model, model_config)
    vocab_size = model_config.get("vocab_size", len(tokenizer))
    rows = [prepare_rows(config, tokenizer, "train_data_path", vocab_size)]
    if config.validates:
        rows.append(prepare_rows(config, tokenizer, "val_data_path", vocab_size))
    return Materials(model, model_config, tokenizer, rows[0], rows[1] if rows[1:] else None)


def check_model(config: PretrainConfig, model: nn.Module, model_config: ModelConfig) -> None:
    """Raises: UserError: rows that are too long for it, or a type that it can't compute in here."""
    block = model_config.get("max_position_embeddings", config.max_seq_length)
    if config.max_seq_length > block:
        raise UserError(
            f"max_seq_length = {config.max_seq_length}: more than the model's block_size = {block}"
        )
    if config.precision == "32-true" or mx.default_device().type != mx.DeviceType.cpu:
        return
    if pretrain_model.has_experts(model):
        raise UserError(
            f"precision = {config.precision!r}: MLX has experts on the CPU in float32 only; "
            "--precision 32-true"
        )
    say("note: bf16 is slow on a CPU; --precision 32-true is many times faster there")


# Training


def learning_rate(step: int, steps: int, config: PretrainConfig) -> float:
    """Rate of update `step`, counted from 1: linear to lr, then cosine to min_lr at `steps`."""
    warmup = min(config.lr_warmup_steps, steps)
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
        self.steps = -(-config.max_tokens // (config.global_batch_size * self.rows.length))
        self.step = 0
        storage, self.compute = PRECISIONS[config.precision]
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
        embeddings.sum_in_float32(self.model)
        if config.gradient_checkpointing:
            checkpoint_layers(self.model)
        wrap = mx.compile if config.compile else (lambda function: function)
        self._grad = wrap(mx.value_and_grad(self._loss))
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
        total = count = 0.0
        for start in range(0, min(len(rows), size * self.config.eval_max_iters), size):
            tokens, mask = self.batch(rows, np.arange(start, min(start + size, len(rows))))
            loss = self._eval(self.params, tokens, mask, mx.array(1.0))
            total += float(loss)
            count += float(mask.sum())
        return total / count

    def weights_into_model(self, dtype: mx.Dtype | None = None) -> nn.Module:
        params = self.params if dtype is None else self.cast(self.params, dtype)
        self.model.update(params)
        mx.eval(self.model.parameters())
        return self.model


# Checkpoints


def save_folder(folder: Path, trainer: Trainer, materials: Materials, dtype: mx.Dtype) -> None:
    """A complete model folder for `mlx_lm.load`."""
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
        save_folder(folder, trainer, materials, PRECISIONS[config.precision][0])
        counters = {"step": trainer.step, "data": data, "config": dataclasses.asdict(config)}
        checkpoints.write_state(folder, counters, arrays)
        folders.seal(folder)
    folders.drop_replaced(Path(config.out_dir))
    folders.prune(Path(config.out_dir), config.save_total_limit)
    return path


def load_checkpoint(folder: Path, trainer: Trainer, data: str) -> None:
    """Bring a fresh trainer to where the checkpoint was written.

    Raises:
        UserError: it cannot be read, or a setting or the data would change the rest of the run.
    """
    try:
        counters, arrays = checkpoints.read_state(folder)
        weights: dict[str, mx.array] = {}
        for file in sorted(folder.glob("model*.safetensors")):
            weights |= mx.load(str(file))  # type: ignore[arg-type]
        refuse_changes(folder, counters, trainer.config, data)
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
    if smoke_test:
        mx.set_default_device(mx.cpu)
        config = smoke_config(config)
    out_dir = Path(config.out_dir)
    folders.refuse_unwritable(out_dir, "out_dir")
    check_available(trackers_of(config))
    checkpoint = None if smoke_test else find_checkpoint(config)
    if kernels := runtime.keep_compiled_kernels():
        say(kernels)
    started = time.perf_counter()
    materials = prepare(config, smoke_test)
    trainer = Trainer(config, materials)
    record: dict[str, object] = {**describe(trainer, materials)}
    data = "" if smoke_test else materials.train.fingerprint()
    if checkpoint is not None:
        load_checkpoint(checkpoint, trainer, data)
        rewind(out_dir, None, trainer.step)
        say(f"continuing from {checkpoint}")
    folders.claim(out_dir, overwrite=config.overwrite, key="out_dir")
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


def make_parser(cls: type) -> argparse.ArgumentParser:
    parser = Parser(
        usage="pretrain.py [--config FILE] [--smoke-test] [--SETTING VALUE ...]",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--config", type=Path, default=DEFAULT_CONFIG, help="TOML file (default: %(default)s)"
    )
    parser.add_argument("--output-dir", dest="out_dir", help=argparse.SUPPRESS)
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
    settings = [(f.name, getattr(arguments, f.name)) for f in dataclasses.fields(cls)]
    return arguments, arguments.overrides + [f"{k}={v}" for k, v in settings if v is not None]


def resolve(path: Path, overrides: list[str]) -> PretrainConfig:
    """The file's settings, nested or flat, then the overrides.

    Raises:
        UserError: whatever is wrong with them.
    """
    values: Table = {}
    types = reading.types_of(PretrainConfig)
    for key, value in read_file(path).items():
        if key not in types:
            near = difflib.get_close_matches(key, [*types, *litgpt.TABLES], n=1)
            hint = f"; did you mean {near[0]!r}?" if near else "; `--help` lists the keys"
            raise UserError(f"unknown key {key!r} in {path}{hint}")
        values[key] = reading.check_type(key, value, types[key])
    for override in overrides:
        key, equals, text = override.partition("=")
        key = key.strip()
        if key not in types or not equals:
            reading.resolve(PretrainConfig, None, [override])  # raises with the nearest name
        values[key] = reading.parse_text(key, text.strip(), types[key])
    config = PretrainConfig(**values)
    typed = {override.partition("=")[0].strip() for override in overrides}
    vars(config)["inherited"] = frozenset(values) - typed
    return config


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    tell_everything()
    early = Parser(add_help=False, allow_abbrev=False)
    early.add_argument("--config", type=Path, default=DEFAULT_CONFIG)
    path = early.parse_known_args(argv)[0].config
    config: PretrainConfig | None = None
    try:
        if is_recipe(path):
            from utils.pretraining import tiny_math_model

            arguments, overrides = parse(argv, tiny_math_model.TinyMathConfig)
            if arguments.smoke_test:
                raise UserError("--smoke-test: not for the recipe tiny_math; use --data-only")
            recipe = reading.resolve(tiny_math_model.TinyMathConfig, path, overrides)
            tiny_math_model.run(recipe, arguments.data_only)
        else:
            arguments, overrides = parse(argv, PretrainConfig)
            if arguments.data_only:
                raise UserError("--data-only: only the recipe tiny_math makes data")
            config = resolve(path, overrides)
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
