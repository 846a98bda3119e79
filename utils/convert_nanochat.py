"""Convert a nanochat checkpoint to the MLX folder that the presets nanochat_* train.

    uv run --extra nanochat python utils/convert_nanochat.py --help

Nothing in the checkpoint is trusted: weights are read with weights_only=True, the pickled
tokenizer by an unpickler that knows a single name, and the result holds no pickle.
"""

from __future__ import annotations

import argparse
import json
import pickle
import re
import shlex
import sys
import zipfile
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from utils.base.errors import RunError, UserError  # noqa: E402
from utils.base.say import Parser, complain, say, tell_everything  # noqa: E402
from utils.convert_model import refuse_to_replace  # noqa: E402
from utils.device.runtime import preload_blas  # noqa: E402
from utils.model.shape import ModelConfig  # noqa: E402
from utils.model.tiktoken_wrapper import TiktokenTokenizerWrapper  # noqa: E402

if TYPE_CHECKING:
    import mlx.core as mx
    import mlx.nn as nn
    import numpy as np

COMMAND = "uv run --extra nanochat python utils/convert_nanochat.py"
DEFAULT_OUTPUT = "models/nanochat-mlx"
LAST_COMMIT = "2c4473d (11 January 2026)"  # of nanochat/gpt.py without resid_lambdas
EXAMPLES = f"""\
a checkpoint directory holds model_NNNNNN.pt and meta_NNNNNN.json; tokenizer.pkl lies there too,
or in tokenizer/ up to two folders above, which is where nanochat itself puts it

examples:
  {COMMAND} \\
      --checkpoint-dir ~/.cache/nanochat/chatsft_checkpoints/d20
      the newest step, to {DEFAULT_OUTPUT}, which the presets nanochat_test and nanochat_grpo
      train
  {COMMAND} \\
      --checkpoint-dir ~/.cache/nanochat/chatsft_checkpoints/d32 \\
      --output-dir models/nanochat-d32-mlx
      for the presets nanochat_d32_test and nanochat_d32
  {COMMAND} \\
      --checkpoint-dir FOLDER --step 650 --dtype float32 --force
      a certain step, with weights as precise as in the checkpoint, over what was there

nanochat changes: models trained after its commit {LAST_COMMIT} compute what mlx-lm
does not, and are refused. docs/nanochat.md has the whole way from download to training"""

# Parameters and settings of newer nanochat models, and what mlx-lm would leave out without them.
NEWER = {
    "resid_lambdas": "learned scales of the residual stream",
    "x0_lambdas": "a learned skip from the embeddings to each layer",
    "v0_lambdas": "value embeddings",
    "value_embed": "value embeddings",
    "value_embeds": "value embeddings",
    "ve_gate": "gates of value embeddings",
    "smear_gate": "smear, the mixing with the previous token",
    "smear_lambda": "smear, the mixing with the previous token",
    "backout_lambda": "backout, the subtraction of a middle layer",
    "bigram_lambdas": "bigram embeddings",
    "window_pattern": "sliding attention windows",
}
CONFIG_KEYS = ("sequence_len", "vocab_size", "n_layer", "n_head", "n_kv_head", "n_embd")
TABLES = ("transformer.wte.weight", "lm_head.weight")
MAX_PICKLE_BYTES = 64 * 2**20  # nanochat's, of 65,536 tokens, takes one MB


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="convert_nanochat.py",
        description="Convert a nanochat checkpoint to an MLX folder that the trainer reads.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--checkpoint-dir", type=Path, required=True, metavar="FOLDER", help="with model_*.pt")
    add("--step", type=int, help="default: the newest")
    add("--tokenizer", type=Path, metavar="FILE", help="tokenizer.pkl, where it lies elsewhere")
    add(
        "--output-dir",
        type=Path,
        default=Path(DEFAULT_OUTPUT),
        metavar="FOLDER",
        help=f"default {DEFAULT_OUTPUT}",
    )
    add(
        "--dtype",
        choices=("bfloat16", "float32"),
        default="bfloat16",
        help="of the weights; default bfloat16, in which nanochat computes",
    )
    add("--force", action="store_true", help="replace an existing model folder")
    return parser


def check_output(output: Path, force: bool) -> None:
    """Refuse to write over anything but a model folder that may be replaced."""
    if not output.exists() and not output.is_symlink():
        return
    if not force:
        raise UserError(f"{output} exists already; --force replaces it")
    refuse_to_replace(output)


def find_step(folder: Path, wanted: int | None) -> tuple[Path, Path]:
    """The files of one step, the newest by default: (model_NNNNNN.pt, meta_NNNNNN.json)."""
    if not folder.is_dir():
        raise UserError(f"--checkpoint-dir {folder} is no folder")
    steps = steps_in(folder)
    step = steps[-1] if wanted is None else wanted
    if step not in steps:
        raise UserError(f"{folder} has no step {step}, only {', '.join(map(str, steps))}")
    model, meta = folder / f"model_{step:06d}.pt", folder / f"meta_{step:06d}.json"
    if not meta.is_file():
        raise UserError(f"{meta} is missing: the model's shape stands in it")
    return model, meta


def steps_in(folder: Path) -> list[int]:
    """The steps that have weights, at least one, in order."""
    names = (re.fullmatch(r"model_(\d+)\.pt", path.name) for path in folder.iterdir())
    steps = sorted(int(name[1]) for name in names if name)
    if not steps:
        below = sorted({str(path.parent) for path in folder.glob("*/**/model_*.pt")})
        hint = f"; there are some in {', '.join(below)}" if below else ""
        raise UserError(f"{folder} has no model_NNNNNN.pt{hint}")
    return steps


def find_tokenizer(folder: Path) -> Path:
    resolved = folder.resolve()
    places = [folder, *(parent / "tokenizer" for parent in [resolved, *resolved.parents[:2]])]
    found = next((p / "tokenizer.pkl" for p in places if (p / "tokenizer.pkl").is_file()), None)
    if not found:
        looked = ", ".join(str(place) for place in places)
        raise UserError(f"no tokenizer.pkl in {looked}; say where it is with --tokenizer")
    return found


def read_config(meta: Path) -> dict[str, int]:
    """nanochat's model_config, all of it positive numbers. Raises UserError."""
    values, differences = read_meta(meta)
    if differences:
        raise UserError(not_the_same(meta, differences))
    sizes = {key: value for key, value in values.items() if type(value) is int and value >= 1}
    if wrong := [f"{key} = {value!r}" for key, value in values.items() if key not in sizes]:
        raise UserError(f"{meta}: {', '.join(wrong)} must be positive whole numbers")
    check_heads(meta, sizes)
    return sizes


def check_heads(meta: Path, sizes: dict[str, int]) -> None:
    width, heads, kv_heads = sizes["n_embd"], sizes["n_head"], sizes["n_kv_head"]
    if width % heads or heads % kv_heads or width // heads % 2:
        raise UserError(
            f"{meta}: n_embd = {width}, n_head = {heads}, n_kv_head = {kv_heads} do not divide "
            "into heads of an even width"
        )


def read_meta(meta: Path) -> tuple[dict[str, object], list[str]]:
    """The settings that mlx-lm knows, and names of those that it does not."""
    try:
        config = json.loads(meta.read_text(encoding="utf-8"))["model_config"]
        newer = [f"{NEWER[key]} ({key})" for key in config if key in NEWER]
        values = {key: config[key] for key in CONFIG_KEYS}
        unknown = sorted(set(config) - set(CONFIG_KEYS) - set(NEWER))
    except (OSError, ValueError, TypeError, KeyError) as error:
        reason = f"lacks {error}" if isinstance(error, KeyError) else f"is no such file: {error}"
        raise UserError(f"{meta} {reason}; nanochat writes model_config there") from None
    return values, newer + unknown


def not_the_same(where: Path, differences: list[str]) -> str:
    return (
        f"{where}: this model does what mlx-lm's nanochat architecture does not: "
        f"{'; '.join(differences)}. Models of nanochat up to commit {LAST_COMMIT} convert"
    )


def import_torch() -> ModuleType:
    try:
        import torch
    except ImportError as error:
        raise UserError(
            "reading .pt files needs torch: uv sync --extra nanochat, "
            'or pip install "mlx-grpo[nanochat]"'
        ) from error
    if tuple(int(part) for part in version("torch").split(".")[:2]) < (2, 6):
        # CVE-2025-32434: weights_only=True did not hold
        raise UserError("torch before 2.6 can be made to run code by a .pt file; upgrade torch")
    return torch


def refused_imports(torch: ModuleType, path: Path) -> str:
    """What a .pt file wanted to import, as torch lists it without doing it; "" if it cannot."""
    try:
        names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except (pickle.UnpicklingError, RuntimeError, OSError, EOFError, ValueError, LookupError):
        return ""
    return f"wants to import {', '.join(map(printable, names))}" if names else ""


def load_state(torch: ModuleType, path: Path) -> dict[object, object]:
    """The state dict of a .pt file, without running what the file may contain."""
    if not zipfile.is_zipfile(path):
        raise UserError(f"{path} is not what torch.save writes: damaged, or only half downloaded?")
    try:
        # mmap: the checkpoint of a large model never lies in memory twice
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        what = refused_imports(torch, path) or f"is no file of weights: {printable(error)}"
        raise UserError(f"{path} {what}. Weights need no code, and nothing was run") from None
    except (RuntimeError, OSError, EOFError, ValueError, LookupError, TypeError) as error:
        raise UserError(f"{path} is damaged: {printable(error)}") from None
    if not isinstance(state, dict) or not state:
        raise UserError(f"{path} holds {type(state).__name__}, not parameters by name")
    return state


def read_weights(path: Path) -> dict[str, np.ndarray]:
    """Name -> float32 array of every parameter of a .pt file. Raises UserError."""
    torch = import_torch()
    weights = {}
    for name, value in load_state(torch, path).items():
        if not (
            isinstance(name, str)
            and isinstance(value, torch.Tensor)
            and value.layout == torch.strided
            and value.is_floating_point()
        ):
            raise UserError(f"{path}: {printable(name)} is no parameter of floating-point numbers")
        # torch.compile prepends this to every name
        weights[name.removeprefix("_orig_mod.")] = value.detach().float().numpy()
    return weights


def printable(value: object) -> str:
    """Text from an untrusted file, on one line and without control characters."""
    line = str(value).strip().split("\n")[0]
    return line[:120].encode("unicode_escape").decode()


class PickledEncoding:
    """Stands in for tiktoken's Encoding: takes the state, does nothing with it."""

    state: object = None

    def __setstate__(self, state: object) -> None:
        self.state = state


class RefusedImport(Exception):
    """The pickle names something else than tiktoken's Encoding; the message is its name."""


class EncodingUnpickler(pickle.Unpickler):
    """Knows one name. Every import of a pickle, hence every call it can make, comes here."""

    def find_class(self, module: str, name: str) -> type[PickledEncoding]:
        if (module, name) != ("tiktoken.core", "Encoding"):
            raise RefusedImport(printable(f"{module}.{name}"))
        return PickledEncoding


def read_encoding(path: Path) -> tuple[dict[bytes, int], str, dict[str, int]]:
    """(ranks, pattern, special tokens) of a pickled tiktoken Encoding. Raises UserError."""
    try:
        if path.stat().st_size > MAX_PICKLE_BYTES:
            raise UserError(f"{path} is larger than {MAX_PICKLE_BYTES >> 20} MB: no tokenizer")
        with path.open("rb") as file:
            encoding = EncodingUnpickler(file).load()
    except RefusedImport as error:
        raise UserError(
            f"{path} wants to import {error}; a tokenizer is tiktoken.core.Encoding and nothing "
            "else. Nothing was imported or run: do not trust this file"
        ) from None
    except (pickle.UnpicklingError, EOFError, OSError, ValueError, TypeError) as error:
        raise UserError(f"{path} is no pickled tokenizer: {printable(error)}") from None
    except (LookupError, AttributeError, ImportError, OverflowError, MemoryError) as error:
        raise UserError(f"{path} is a damaged pickle: {printable(error)}") from None
    state = encoding.state if type(encoding) is PickledEncoding else encoding
    if isinstance(state, str):
        raise UserError(f"{path} only names tiktoken's encoding {printable(state)}, not nanochat's")
    return check_state(path, state)


def check_state(path: Path, state: object) -> tuple[dict[bytes, int], str, dict[str, int]]:
    """Only dictionaries of the right types go on. Raises UserError."""
    fields = {"name": str, "pat_str": str, "mergeable_ranks": dict, "special_tokens": dict}
    if type(state) is not dict or set(state) != set(fields):
        raise UserError(f"{path} holds no Encoding of {', '.join(fields)}")
    if wrong := [key for key, kind in fields.items() if type(state[key]) is not kind]:
        raise UserError(f"{path}: {', '.join(wrong)} has the wrong type")
    for field, kind in (("mergeable_ranks", bytes), ("special_tokens", str)):
        if not all(type(k) is kind and type(v) is int for k, v in state[field].items()):
            raise UserError(f"{path}: {field} must map {kind.__name__} to int")
    return state["mergeable_ranks"], state["pat_str"], state["special_tokens"]


def make_tokenizer(path: Path, vocab_size: int) -> TiktokenTokenizerWrapper:
    encoding = read_encoding(path)
    try:
        tokenizer = TiktokenTokenizerWrapper(*encoding)
    except ImportError as error:
        raise UserError(str(error)) from None
    except ValueError as error:  # tiktoken's, of a pattern that is no regular expression, too
        raise UserError(f"{path}: {printable(error)}") from None
    if tokenizer.vocab_size != vocab_size:
        raise UserError(
            f"{path} has {tokenizer.vocab_size:,} tokens, the model {vocab_size:,}: "
            "they do not belong together"
        )
    return tokenizer


def mlx_config(config: dict[str, int], tokenizer: TiktokenTokenizerWrapper) -> ModelConfig:
    """config.json of mlx-lm's nanochat architecture."""
    return {
        "model_type": "nanochat",
        "hidden_size": config["n_embd"],
        "num_hidden_layers": config["n_layer"],
        "num_attention_heads": config["n_head"],
        "num_key_value_heads": config["n_kv_head"],
        "vocab_size": config["vocab_size"],
        "max_position_embeddings": config["sequence_len"],
        "intermediate_size": 4 * config["n_embd"],
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": sorted(tokenizer.eos_token_ids),
    }


def crop_padding(weights: dict[str, np.ndarray], vocab_size: int) -> int:
    """Cut the rows past the vocabulary, whose logits nanochat cuts too. Returns their number."""
    padded = -(-vocab_size // 64) * 64
    for name in TABLES:
        if name in weights and weights[name].shape[:1] == (padded,):
            weights[name] = weights[name][:vocab_size]
    return padded - vocab_size


def check_names(path: Path, weights: dict[str, np.ndarray], expected: dict[str, mx.array]) -> None:
    """Every parameter in its shape, none missing, none left over. Raises UserError."""
    left_over = sorted(weights.keys() - expected.keys())
    refuse_newer(path, left_over)
    missing = sorted(expected.keys() - weights.keys())
    shapes = [
        f"{name} {weights[name].shape} instead of {tuple(expected[name].shape)}"
        for name in sorted(weights.keys() & expected.keys())
        if weights[name].shape != tuple(expected[name].shape)
    ]
    problems = {"missing": missing, "left over": left_over, "of another shape": shapes}
    if found := [f"{what}: {some(names)}" for what, names in problems.items() if names]:
        raise UserError(f"{path} does not fit its meta file. Parameters {'; '.join(found)}")


def refuse_newer(path: Path, names: list[str]) -> None:
    """Raise UserError where parameters are known to be those of newer models."""
    parts = {part for name in names for part in name.split(".")}
    if newer := [f"{what} ({key})" for key, what in NEWER.items() if key in parts]:
        raise UserError(not_the_same(path, newer))


def some(names: list[str]) -> str:
    more = f" and {len(names) - 4} more" if len(names) > 4 else ""
    return ", ".join(printable(name) for name in names[:4]) + more


def build_model(path: Path, config: ModelConfig, dtype: str) -> tuple[nn.Module, int]:
    """mlx-lm's model with the weights of `path`, and how many padding rows were cut."""
    import mlx.core as mx
    from mlx.utils import tree_flatten
    from mlx_lm.models import nanochat

    model = nanochat.Model(nanochat.ModelArgs.from_dict(config))
    weights = read_weights(path)
    cut = crop_padding(weights, config["vocab_size"])
    check_names(path, weights, dict(tree_flatten(model.parameters())))
    converted = []
    for name in sorted(weights):
        converted.append((name, mx.array(weights.pop(name)).astype(getattr(mx, dtype))))
        mx.eval(converted[-1][1])  # so that one float32 copy is alive at a time
    model.load_weights(converted)
    return model, cut


def try_model(folder: Path, tokenizer: TiktokenTokenizerWrapper) -> str:
    """What the written model answers, greedily. Raises RunError if it computes NaN."""
    import mlx.core as mx
    from mlx_lm.generate import generate_step
    from mlx_lm.utils import load_model

    model: nn.Module = load_model(folder)[0]
    prompt = mx.array(tokenizer.conversation_ids([{"role": "user", "content": "Hello"}], True))
    if not mx.isfinite(model(prompt[None])).all().item():
        raise RunError("the converted model computes NaN or inf; are the weights damaged?")
    ids: list[int] = []
    for token, _ in generate_step(prompt, model, max_tokens=16):
        if int(token) in tokenizer.eos_token_ids:
            break
        ids.append(int(token))
    return tokenizer.decode(ids)


def convert(args: argparse.Namespace) -> str:
    """Convert as the arguments say, all checks before anything is written. Returns a summary."""
    from mlx_lm.utils import get_total_parameters, save_config, save_model

    from utils.run.folders import written_aside

    path, meta = find_step(args.checkpoint_dir, args.step)
    config = read_config(meta)
    pickled = args.tokenizer or find_tokenizer(args.checkpoint_dir)
    tokenizer = make_tokenizer(pickled, config["vocab_size"])
    converted = mlx_config(config, tokenizer)
    model, cut = build_model(path, converted, args.dtype)
    parameters = get_total_parameters(model)
    with written_aside(args.output_dir) as folder:
        save_model(folder, model, donate_model=True)
        save_config(converted, config_path=folder / "config.json")
        tokenizer.save_pretrained(folder)
        answer = try_model(folder, tokenizer)
    padding = f"; {cut} padding rows of the vocabulary cut" if cut else ""
    return (
        f"{args.output_dir}: {path.name}, {config['n_layer']} layers, {parameters:,} parameters "
        f"in {args.dtype}\n"
        f"checked: no parameter missing or left over{padding}\n"
        f"tokenizer: {tokenizer.vocab_size:,} tokens from {pickled}\n"
        f"to 'Hello' it answers {answer!r}"
    )


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code: 0, 2 for input to correct, 1 for a conversion that failed, 130."""
    args = build_parser().parse_args(argv)
    args.checkpoint_dir = args.checkpoint_dir.expanduser()
    tell_everything()
    try:
        check_output(args.output_dir, args.force)
        preload_blas()
        summary = convert(args)
    except (UserError, RunError) as error:
        complain(f"error: {error}")
        return error.exit_code
    except OSError as error:
        complain(f"error: {error}")
        return 1
    except KeyboardInterrupt:
        complain("interrupted: nothing was written")
        return 130
    train = shlex.join(["--set", f"model_name={args.output_dir}"])
    say(f"{summary}\nTrain it with: {train}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
