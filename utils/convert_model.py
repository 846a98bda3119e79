"""Convert models: into an MLX folder, quantized if wished, and out of it to GGUF; and check them.

    uv run python utils/convert_model.py --hf-path Qwen/Qwen2.5-1.5B-Instruct --quantize
    uv run --extra gguf python utils/convert_model.py --hf-path model.gguf
    uv run --extra gguf python utils/convert_model.py --hf-path outputs/run/final --to gguf
    uv run python utils/convert_model.py --hf-path outputs/run/final/adapters --to peft

The result appears only when the converted model has been loaded again, has generated text, and its
log-probs of a fixed text have been compared with those of the source.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import shlex
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from utils.base.errors import (  # noqa: E402
    DiskError,
    RunError,
    UserError,
    disk_errors_named,
    nearest_existing,
)
from utils.base.json_files import read_object  # noqa: E402
from utils.base.say import Parser, complain, say, tell_everything  # noqa: E402
from utils.data import files  # noqa: E402
from utils.device import runtime  # noqa: E402
from utils.model import (  # noqa: E402
    gguf_file,
    gguf_weights,
    lm_studio,
    peft_adapters,
    served_prompt,
    vision,
)
from utils.model import shape as model_shape  # noqa: E402
from utils.model.conversion_check import compare, describe, read_fixed_text, read_source  # noqa: E402
from utils.model.hf_config import translate_config  # noqa: E402
from utils.model.shape import ModelConfig  # noqa: E402

if TYPE_CHECKING:
    import mlx.nn as nn
    from mlx_lm.tokenizer_utils import TokenizerWrapper

DEFAULT_OUTPUT = "utils/mlx_model"
COMMAND = "uv run python utils/convert_model.py"
EXAMPLES = f"""examples:
  {COMMAND} --hf-path Qwen/Qwen2.5-1.5B-Instruct --quantize
      4 bits: a quarter of the memory, trained by LoRA. About 0.9 GB on disk, 3 GB downloaded.
  {COMMAND} --hf-path Qwen/Qwen2.5-1.5B-Instruct --dtype bfloat16
      half precision, which full fine-tuning needs
  {COMMAND} --hf-path ./my-model -q --bits 8 --output-dir models/my-model-8bit
  {COMMAND} --hf-path ./my-model -q --quant-predicate mixed_4_6
      4 bits, but 6 for the layers that suffer most
  {COMMAND} --hf-path mlx-community/some-4bit-model --dequantize
  uv run --extra gguf python utils/convert_model.py --hf-path model.gguf
      a file of llama.cpp; its numbers are unpacked, or stay packed with --keep-quantized
  uv run --extra gguf python utils/convert_model.py --hf-path outputs/run/final --to gguf
      a file for llama.cpp, Ollama and LM Studio, asked as it was trained
  {COMMAND} --hf-path BASE --adapter-path outputs/run/checkpoint-100
      adapters, also PEFT's, merged into their model
  {COMMAND} --hf-path outputs/run/final/adapters --to peft

train the result with --set model_name={DEFAULT_OUTPUT}, or a preset that names it"""

# What each quantization mode can store; the first of each is its default.
GROUP_SIZES = {"affine": (64, 32, 128), "mxfp4": (32,), "nvfp4": (16,), "mxfp8": (32,)}
BITS = {"affine": (4, 2, 3, 5, 6, 8), "mxfp4": (4,), "nvfp4": (4,), "mxfp8": (8,)}
RECIPES = ("mixed_2_6", "mixed_3_4", "mixed_3_6", "mixed_4_6")
QUANT_METHODS = (  # of Hugging Face checkpoints, which mlx-lm's load_model can read
    "awq", "bitnet", "compressed-tensors", "fp8", "gptq", "modelopt", "mxfp4", "mxfp8",
)  # fmt: skip
FOR_MLX = (
    "quantize bits group_size q_mode quant_predicate keep_quantized dtype eos_token upload_repo"
)
USED_BY = {  # options that only some results have
    "gguf": ("gguf_type", "dequantize", "adapter_path", "revision", "trust_remote_code"),
    "peft": ("base",),
    "mlx": (*FOR_MLX.split(), "dequantize", "adapter_path", "revision", "trust_remote_code"),
}
TOKENIZERS = ("tokenizer.*", "tokenization*", "*vocab*", "spiece*", "*.model", "*.tiktoken")
MODELFILE = ".Modelfile"  # beside a GGUF file, for Ollama
GGUF_TYPES = ("f16", "q8_0", "bf16", "f32")


# mlx-lm and MLX read untrusted files without checks of their own, and fail in all of these ways.
READ_ERRORS = (
    OSError, ValueError, RuntimeError, LookupError, TypeError, AttributeError, ImportError,
    ArithmeticError, AssertionError,
)  # fmt: skip


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="convert_model.py",
        description="Convert a Hugging Face model or a GGUF file to an MLX folder, or a trained "
        "model to GGUF or PEFT's format, and check that it works.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add_source_options(parser)
    add_weight_options(parser)
    add_output_options(parser)
    return parser


def add_source_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("source").add_argument
    add(
        "--hf-path",
        required=True,
        metavar="MODEL",
        help="name on the hub, a local folder, or a local .gguf file",
    )
    add(
        "--adapter-path",
        type=Path,
        metavar="FOLDER",
        help="LoRA or DoRA adapters, of a run, mlx-lm or PEFT, to merge into the model first",
    )
    add("--revision", metavar="NAME", help="branch, tag or commit on the hub; default: its main")
    add(
        "--trust-remote-code",
        action="store_true",
        help="run Python code that comes with the model; only for models you trust",
    )


def add_weight_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("weights").add_argument
    add("-q", "--quantize", action="store_true", help="quantize the weights (to 4 bits)")
    add("--bits", type=int, choices=sorted(BITS["affine"]), help="with --quantize; default 4")
    add(
        "--group-size",
        type=int,
        choices=(16, 32, 64, 128),
        help="weights that share a scale, with --quantize; default: the mode's, 64 for affine",
    )
    add(
        "--q-mode",
        choices=tuple(BITS),
        help="how numbers are stored, with --quantize: affine (default; any bits), or the "
        "floating-point formats mxfp4, nvfp4 and mxfp8, which fix bits and group size",
    )
    add(
        "--quant-predicate",
        choices=RECIPES,
        metavar="RECIPE",
        help=f"fewer bits for most layers and more for sensitive ones: {', '.join(RECIPES)}",
    )
    add("--dequantize", action="store_true", help="turn a quantized model into a plain one")
    add(
        "--keep-quantized",
        action="store_true",
        help="of a GGUF file: leave packed what MLX's quantization holds exactly "
        f"({', '.join(gguf_weights.PACKINGS)})",
    )
    add(
        "--dtype",
        choices=("float16", "bfloat16", "float32"),
        help="of what is not quantized; default: as in the checkpoint; of a quantized GGUF file "
        "bfloat16, with --keep-quantized float16",
    )


def add_output_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("result").add_argument
    add(
        "--to",
        choices=tuple(USED_BY),
        default="mlx",
        help="mlx (default): a folder for training and mlx-lm; gguf: a file for llama.cpp, Ollama "
        "and LM Studio; peft: adapters as PEFT keeps them",
    )
    add(
        "--gguf-type",
        choices=GGUF_TYPES,
        help="how a GGUF file stores matrices; default f16. f32 and bf16 keep such models exact",
    )
    add(
        "--base",
        metavar="MODEL",
        help="with --to peft: the model that PEFT is to load, instead of the one that was trained",
    )
    add(
        "--output-dir",
        "--output",
        type=Path,
        metavar="PATH",
        help=f"default {DEFAULT_OUTPUT}; with --to gguf a file NAME.gguf, or a folder for it, "
        "default models/NAME-TYPE.gguf; with --to peft a folder, default models/NAME-peft",
    )
    add(
        "--lm-studio",
        metavar="PUBLISHER/NAME",
        help="put the result where LM Studio finds it, instead of --output-dir",
    )
    add("--force", action="store_true", help="replace an existing model folder or file")
    add(
        "--eos-token",
        metavar="TOKEN",
        help="the token that ends a text, instead of the checkpoint's, such as '<|im_end|>'",
    )
    add("--upload-repo", metavar="OWNER/NAME", help="upload the result to the hub afterwards")


def check_arguments(args: argparse.Namespace) -> None:
    """Refuse what cannot work before anything is downloaded. Raises UserError."""
    check_format(args)
    check_quantization(args)
    args.output_dir = place_of(args)
    if args.to == "peft":
        check_adapters(args)
    else:
        check_source(args)
    check_output(args)
    if args.upload_repo:
        check_upload(args.upload_repo)


def check_format(args: argparse.Namespace) -> None:
    """Refuse options that the wanted result does not have."""
    every = {name for names in USED_BY.values() for name in names}
    for name in sorted(every - {*USED_BY[args.to]}):
        if getattr(args, name) not in (None, False):
            fits = " or ".join(f"--to {to}" for to, names in USED_BY.items() if name in names)
            raise UserError(f"--{name.replace('_', '-')} goes with {fits}, not with --to {args.to}")
    check_lm_studio(args)


def check_lm_studio(args: argparse.Namespace) -> None:
    if args.lm_studio is not None and args.output_dir:
        raise UserError("--lm-studio and --output-dir exclude each other: both say where")
    if args.lm_studio is not None and args.to == "peft":
        raise UserError("LM Studio does not read adapters: leave out --lm-studio, or --to peft")


def place_of(args: argparse.Namespace) -> Path:
    """Where the result goes: a folder, or a file of GGUF."""
    file = f"{own_name(args.hf_path)}-{args.gguf_type or GGUF_TYPES[0]}.gguf"
    if args.lm_studio is not None:
        folder = lm_studio.place(args.lm_studio)
        return folder / file if args.to == "gguf" else folder
    defaults = {
        "mlx": DEFAULT_OUTPUT,
        "gguf": f"models/{file}",
        "peft": f"models/{own_name(args.hf_path)}-peft",
    }
    place: Path = (args.output_dir or Path(defaults[args.to])).expanduser()
    if args.to == "gguf" and place.suffix.lower() != ".gguf":
        return place / file
    return place


def own_name(source: str) -> str:
    """Of a model in a run's folder: run-final, not final."""
    parts = list(Path(source).expanduser().parts)
    name = parts.pop() if parts else "model"
    part = name
    while parts and (part in ("final", "best", "adapters") or part.startswith("checkpoint-")):
        part = parts.pop()
        name = f"{part}-{name}" if part.strip("./~") else name
    return name.strip("./~") or "model"


def check_adapters(args: argparse.Namespace) -> None:
    """--to peft takes adapters as mlx-lm keeps them. Raises UserError for anything else."""
    folder = Path(args.hf_path).expanduser()
    if none := without_adapters(folder):
        raise UserError(
            f"--to peft writes adapters, and {none}. A whole model in Hugging Face's layout needs "
            "no conversion for PEFT"
        )
    config = read_object(folder / "adapter_config.json")
    if "peft_type" in config:
        raise UserError(f"{args.hf_path} holds adapters of PEFT already")


def without_adapters(folder: Path) -> str:
    """Why a folder can't be taken as one of adapters, and which one can; empty where it can."""
    if (folder / peft_adapters.CONFIG).is_file():
        return ""
    inside = folder / "adapters"
    hint = f"; {inside} does" if (inside / peft_adapters.CONFIG).is_file() else ""
    return f"{folder} holds none (no {peft_adapters.CONFIG}){hint}"


def check_quantization(args: argparse.Namespace) -> None:
    """Refuse contradictory options, then fill in the defaults of the mode."""
    refuse_contradictions(args)
    given = given_for_quantization(args)
    if given and not args.quantize:
        raise UserError(f"{' and '.join(given)} need --quantize")
    mode = args.q_mode or "affine"
    if args.quant_predicate and (mode != "affine" or args.bits):
        raise UserError(
            f"--quant-predicate {args.quant_predicate} chooses the bits of each layer in the "
            f"affine mode: leave out {'--bits' if args.bits else '--q-mode ' + mode}"
        )
    choose(args, "bits", mode, BITS[mode])
    choose(args, "group_size", mode, GROUP_SIZES[mode])
    args.q_mode = mode


def refuse_contradictions(args: argparse.Namespace) -> None:
    flags = {
        "--quantize": args.quantize,
        "--dequantize": args.dequantize,
        "--keep-quantized": args.keep_quantized,
    }
    chosen = [flag for flag, given in flags.items() if given]
    if len(chosen) > 1:
        raise UserError(f"{' and '.join(chosen)} exclude each other")
    if args.keep_quantized and args.dtype == "bfloat16":
        raise UserError(
            "--keep-quantized keeps a GGUF file's scales, which bfloat16 would round: use --dtype "
            "float16 (the default with it) or float32"
        )


def given_for_quantization(args: argparse.Namespace) -> list[str]:
    flags = {
        "--bits": args.bits,
        "--group-size": args.group_size,
        "--q-mode": args.q_mode,
        "--quant-predicate": args.quant_predicate,
    }
    return [flag for flag, value in flags.items() if value is not None]


def choose(args: argparse.Namespace, name: str, mode: str, allowed: tuple[int, ...]) -> None:
    value = getattr(args, name)
    if value is not None and value not in allowed:
        flag, choices = name.replace("_", "-"), ", ".join(map(str, sorted(allowed)))
        raise UserError(f"--{flag} {value} does not go with --q-mode {mode}, which has {choices}")
    setattr(args, name, value or allowed[0])


def check_source(args: argparse.Namespace) -> None:
    name, source = args.hf_path, Path(args.hf_path).expanduser()
    if args.revision and source.exists():
        raise UserError(f"--revision is for models on the hub, and {name} is on this machine")
    if args.to == "gguf":
        gguf_file.check_installed()
    if args.adapter_path and (none := without_adapters(args.adapter_path.expanduser())):
        raise UserError(f"--adapter-path takes adapters, and {none}")
    if gguf_file.is_gguf(source):
        check_gguf_source(args)
        return
    if args.keep_quantized:
        raise UserError("--keep-quantized is for GGUF files; a quantized folder stays so anyway")
    if not (source / "config.json").is_file():
        refuse_folder(name, source)


def check_gguf_source(args: argparse.Namespace) -> None:
    if args.to == "gguf":
        raise UserError(
            f"{args.hf_path} is a GGUF file already; llama.cpp's llama-quantize changes its type"
        )
    if args.adapter_path:
        raise UserError(
            f"--adapter-path merges into a model folder: convert {args.hf_path} first, and merge "
            "into the result"
        )
    gguf_file.check_start(Path(args.hf_path).expanduser())
    gguf_file.check_installed()


def refuse_folder(name: str, source: Path) -> None:
    """Raises UserError for what is no model folder, unless it can be a name on the hub."""
    if (source / "adapter_config.json").is_file():
        raise UserError(
            f"--hf-path {name} holds adapters, not a model. To merge them into the model that "
            f"they were trained on: --hf-path MODEL --adapter-path {name}"
        )
    if source.exists():
        raise UserError(f"--hf-path {name} is no model folder: it has no config.json{hint(source)}")
    if name.startswith((".", "/", "~")) or name.count("/") > 1 or not name.strip():
        raise UserError(f"--hf-path {name}: no such folder, and no hub name (OWNER/NAME)")
    files.refuse_mistyped_path("--hf-path", name)


def hint(folder: Path) -> str:
    """What to name instead of a folder that holds no model itself."""
    if (folder / "final/config.json").is_file():
        return f", but {folder}/final has one"
    found = sorted(folder.glob("*.gguf")) if folder.is_dir() else []
    return f", but a GGUF file: give --hf-path {found[0]}" if found else ""


def check_output(args: argparse.Namespace) -> None:
    output: Path = args.output_dir
    refuse_source(args, output)
    places = [output, output.with_suffix(MODELFILE)] if args.to == "gguf" else [output]
    standing = [place for place in places if os.path.lexists(place)]
    if not standing:
        check_writable(output)
        return
    if not args.force:
        output = standing[0]
        again = shlex.join([*sys.argv[1:], "--force"])
        raise UserError(f"{output} exists already. Replace it with:\n  {COMMAND} {again}")
    for place in standing:
        (refuse_to_replace_file if args.to == "gguf" else refuse_to_replace)(place)
    check_writable(output)


def refuse_source(args: argparse.Namespace, output: Path) -> None:
    """Raises UserError where the result would take the place of what it is made of."""
    for given in filter(None, (args.hf_path, args.adapter_path)):
        source = Path(given).expanduser().resolve()
        if source.exists() and (source == output.resolve() or output.resolve() in source.parents):
            raise UserError(f"--output-dir {output} would replace the source {given}")


def refuse_to_replace_file(path: Path) -> None:
    """--force replaces GGUF files and their Modelfiles only. Raises UserError."""
    ours = path.is_file()
    if ours and path.suffix != MODELFILE:
        with path.open("rb") as file:
            ours = file.read(4) == gguf_file.MAGIC
    if path.is_symlink() or not ours:
        raise UserError(f"--force replaces GGUF files only, and {path} is none")


def refuse_to_replace(output: Path) -> None:
    """--force must not delete a home folder because of a slip in --output-dir, nor what somebody
    put beside a model. Raises UserError."""
    from utils.run.ours import strangers

    if output.is_symlink() or not output.is_dir() or not is_model_or_empty(output):
        raise UserError(f"--force replaces model folders only, and {output} is none")
    if added := strangers(output):
        raise UserError(
            f"--force would delete {output / added[0]}, which is no part of a model: move it away, "
            "or choose another --output-dir"
        )


def is_model_or_empty(folder: Path) -> bool:
    """By its config.json, which must be that of a model: others have files of that name."""
    if not any(folder.iterdir()):
        return True
    if (folder / peft_adapters.WEIGHTS).is_file():
        return True
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return any(folder.glob("model*.safetensors"))
    return isinstance(config, dict) and "model_type" in config


def check_writable(output: Path) -> None:
    """The nearest existing parent must be a folder where names can be made."""
    parent = nearest_existing(output.absolute().parent)
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise UserError(f"--output-dir {output} cannot be made: {parent} is no writable folder")


def check_upload(repo: str) -> None:
    """The name must be one, and somebody logged in, before hours of work."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HTTPError, LocalTokenNotFoundError
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    if repo.count("/") != 1:
        raise UserError(f"--upload-repo {repo} is no hub name; it has the form OWNER/NAME")
    try:
        validate_repo_id(repo)
        HfApi().whoami()
    except HFValidationError as error:
        raise UserError(f"--upload-repo {repo}: {one_line(error)}") from error
    except LocalTokenNotFoundError as error:
        raise UserError("--upload-repo needs a login: run `hf auth login` first") from error
    except (HTTPError, OSError) as error:
        raise RunError(f"--upload-repo: no answer from the hub: {one_line(error)}") from error


def one_line(error: BaseException) -> str:
    """An error's text for the terminal; mlx-lm lists hundreds of weights over many lines."""
    text = " ".join(str(error).split())
    if not text or isinstance(error, (LookupError, TypeError, AttributeError)):
        text = f"{type(error).__name__} {text}"  # a KeyError's text is just the key
    return text if len(text) <= 300 else f"{text[:297]}..."


@contextmanager
def partial_folder(output: Path) -> Iterator[Path]:
    """A name beside `output` to write to; moved there at the end, removed after an error."""
    from utils.run.folders import take_place  # late: not for --help

    with partial_folder_of(output) as partial:
        yield partial
        take_place(partial, output)


@contextmanager
def partial_folder_of(output: Path) -> Iterator[Path]:
    """A name beside `output`, whose folder is made; both are gone after an error."""
    partial = output.with_name(f".{output.name}.mlx-grpo-partial-{os.getpid()}")
    made = [parent for parent in output.absolute().parents if not parent.exists()]
    output.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield partial
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        with contextlib.suppress(OSError):  # not empty: the result is there
            for parent in made:
                parent.rmdir()


@contextmanager
def partial_files(output: Path) -> Iterator[Path]:
    """A file to write to in a folder beside `output`; all in there is moved at the end."""
    with partial_folder_of(output) as partial:
        partial.mkdir()
        yield partial / output.name
        for file in sorted(partial.iterdir(), key=lambda file: file.suffix == ".gguf"):
            os.replace(file, output.parent / file.name)


class Source(NamedTuple):
    """What is converted."""

    folder: Path
    """To compare with."""
    config: ModelConfig
    packed: Path
    """To convert: the same folder, or that with a GGUF file's packed weights."""
    card: str | None = None
    """The name on the hub whose model card the result gets."""


@contextmanager
def unpacked(args: argparse.Namespace) -> Iterator[Source]:
    """The source as a folder; of a GGUF file one beside the output, which is removed afterwards."""
    path = Path(args.hf_path).expanduser()
    if not gguf_file.is_gguf(path):
        folder, config = find_source(args)
        if args.adapter_path:
            with fused(args, folder) as source:
                yield source
        else:
            yield Source(folder, config, folder, None if folder == path else args.hf_path)
        return
    file = gguf_file.open_gguf(path)
    with beside(args.output_dir) as name:
        plain, packed = Path(name) / "plain", Path(name) / "packed"
        note(f"unpacking {args.hf_path}: {gguf_weights.kinds_of(file)}")
        write_gguf(file, plain)
        if args.keep_quantized:
            note(write_gguf(file, packed, keep_quantized=True))
            args.dtype = args.dtype or "float16"
        else:
            packed = plain
            args.dtype = args.dtype or gguf_weights.plain_dtype(file)
        try:
            yield Source(plain, read_config(packed, args), packed)
        except RunError as error:  # names the folder, which is gone when the user reads it
            raise RunError(str(error).replace(str(plain), args.hf_path)) from error


@contextmanager
def beside(output: Path) -> Iterator[str]:
    """A folder on the same disk as the result, which is removed afterwards."""
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.name}.source-") as name:
        yield name


@contextmanager
def fused(args: argparse.Namespace, folder: Path) -> Iterator[Source]:
    """The model of `folder` with the adapters merged into it; removed afterwards."""
    from utils.model.fusing import fuse

    said = args.hf_path, str(args.adapter_path)
    with beside(args.output_dir) as name:
        merged = Path(name) / "fused"
        note(f"merging {said[1]} into {said[0]}")
        try:
            with disk_errors_named(merged):
                adapters = args.adapter_path.expanduser()
                fuse(folder, adapters, merged, said, args.trust_remote_code)
        except READ_ERRORS as error:
            raise explain(error, args) from error
        args.dequantize = False  # the merged model is not quantized
        yield Source(merged, read_config(merged, args), merged)


def write_gguf(file: gguf_file.GGUF, folder: Path, keep_quantized: bool = False) -> str:
    """What stayed packed. Raises UserError for a file whose parts do not fit together."""
    try:
        with disk_errors_named(folder):
            return gguf_weights.write_model(file, folder, keep_quantized)
    except READ_ERRORS as error:
        raise UserError(f"{file.path} is damaged: {one_line(error)}") from error


def find_source(args: argparse.Namespace) -> tuple[Path, ModelConfig]:
    """The local folder of the source, downloaded if need be, and its configuration.

    config.json comes first: what it rules out is refused before gigabytes are downloaded.
    """
    from mlx_lm.utils import DEFAULT_ALLOW_PATTERNS

    local = Path(args.hf_path).expanduser()
    folder = local if local.is_dir() else download(args, ["config.json"])
    config = read_config(folder, args)
    check_config(config, args)
    if folder != local:
        folder = download(args, [*DEFAULT_ALLOW_PATTERNS, "*.model"])  # of vision models: spiece
    check_weights(folder)
    check_tokenizer(folder)
    return folder, config


def download(args: argparse.Namespace, patterns: list[str]) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        HFValidationError,
        HTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    name = args.hf_path
    try:
        return Path(snapshot_download(name, revision=args.revision, allow_patterns=patterns))
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise UserError(
            f"{name} is neither a folder nor a model on the hub "
            "(a private or gated one needs `hf auth login`)"
        ) from error
    except RevisionNotFoundError as error:
        raise UserError(f"{name} has no revision {args.revision} on the hub") from error
    except (HTTPError, LocalEntryNotFoundError, OSError) as error:
        raise RunError(f"no answer from the hub for {name}: {one_line(error)}") from error


def read_config(folder: Path, args: argparse.Namespace) -> ModelConfig:
    from mlx_lm.utils import load_config

    try:
        config = load_config(folder)
    except FileNotFoundError as error:
        raise UserError(f"{args.hf_path} is no model: it has no config.json") from error
    except (OSError, ValueError, TypeError) as error:  # TypeError: JSON, but no object
        raise UserError(f"{args.hf_path}/config.json cannot be read: {one_line(error)}") from error
    if not isinstance(config, dict) or not isinstance(config.get("model_type"), str):
        raise UserError(f"{args.hf_path}/config.json names no model_type")
    return config


def check_config(config: ModelConfig, args: argparse.Namespace) -> None:
    """Refuse what the configuration alone rules out."""
    if args.to == "gguf":
        from utils.model.gguf_out import check_family

        unpacks = args.dequantize or args.adapter_path is not None
        check_family(config, args.hf_path, dequantized=unpacks)
    if not args.adapter_path:
        check_how_quantized(config, args)
    elif vision.has_vision(config):
        raise UserError(f"--adapter-path is for language models; {args.hf_path} has a vision tower")
    if vision.has_vision(config):
        check_vision(args)
    elif "model_file" not in config:
        check_model_type(config, args.hf_path)


def check_how_quantized(config: ModelConfig, args: argparse.Namespace) -> None:
    name, by_mlx = args.hf_path, config.get("quantization")
    quantization = by_mlx or config.get("quantization_config")
    if args.dequantize and not quantization:
        raise UserError(f"{name} is not quantized: there is nothing to dequantize")
    if args.quantize and by_mlx:
        raise UserError(f"{name} is quantized already; convert its source, or --dequantize it")
    method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
    if quantization and not by_mlx and method not in QUANT_METHODS:
        raise UserError(
            f"{name} is quantized by {method}, which mlx-lm does not read; it reads "
            f"{', '.join(QUANT_METHODS)}, and models that are not quantized"
        )


def check_vision(args: argparse.Namespace) -> None:
    if args.dequantize or args.eos_token:
        flag = "--dequantize" if args.dequantize else "--eos-token"
        raise UserError(f"{flag} is for language models; {args.hf_path} has a vision tower")
    if importlib.util.find_spec("mlx_vlm") is None:
        raise UserError(
            f"{args.hf_path} has a vision tower, which mlx-vlm converts. Install the extra "
            "`vision`:\n  uv run --extra vision python utils/convert_model.py ...\n"
            "  pip install 'mlx-vlm>=0.7,<0.8'"
        )


def check_model_type(config: ModelConfig, name: str) -> None:
    from importlib.metadata import version

    from mlx_lm.utils import _get_classes

    try:
        _get_classes(config)
    except ValueError as error:
        raise UserError(
            f"{name}: mlx-lm {version('mlx-lm')} has no model_type {config['model_type']!r}. It "
            "converts language models that generate text; a newer mlx-lm may know this one"
        ) from error


def check_weights(folder: Path) -> None:
    """A missing or truncated shard is named here; MLX would fail in the middle of the work."""
    # A folder may have weights of PyTorch only.
    torch_files = [*folder.glob("*.bin"), *folder.glob("*.pt"), *folder.glob("*.pth")]
    if torch_files and not any(folder.glob("model*.safetensors")):
        raise UserError(
            f"{folder} has no model*.safetensors, only {torch_files[0].name}. Save it with "
            "transformers first: AutoModelForCausalLM.from_pretrained(...).save_pretrained(...)"
        )
    try:
        for shard in model_shape.shards(folder):
            model_shape.read_header(shard)
    except ValueError as error:
        raise UserError(one_line(error)) from error


def check_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer

    file = folder / "tokenizer.json"
    if not file.is_file():
        if not any(any(folder.glob(name)) for name in TOKENIZERS):
            raise UserError(f"{folder} has no tokenizer (tokenizer.json)")
        return  # one of another kind, which mlx-lm tries to load
    try:
        Tokenizer.from_file(str(file))
    except Exception as error:  # what `tokenizers` raises is no narrower
        raise UserError(f"{file} is damaged: {one_line(error)}") from error


def convert_text_model(
    args: argparse.Namespace, source: Path, config: ModelConfig, folder: Path
) -> None:
    """Write the converted model to `folder`, by mlx-lm's own steps."""
    from mlx_lm.utils import load, save

    from utils.model.copies import dequantize

    model, tokenizer, config = load(
        str(source),
        tokenizer_config={"trust_remote_code": args.trust_remote_code},
        model_config=translate_config(config),
        lazy=True,
        return_config=True,
        trust_remote_code=args.trust_remote_code,
    )
    if args.eos_token:
        tokenizer, config["eos_token_id"] = replace_eos(args, source, tokenizer)
    cast(model, config, args.dtype)
    if args.dequantize:
        model = dequantize(model)
        cast(model, config, args.dtype)  # mxfp4 and its like give bfloat16, whatever was asked
        config.pop("quantization", None)
        config.pop("quantization_config", None)
    if args.quantize:
        model, config = quantize(args, model, config)
    with disk_errors_named(folder):
        save(folder, source, model, tokenizer, config)
        if args.eos_token:
            update_json(folder / "generation_config.json", eos_token_id=config["eos_token_id"])


def cast(model: nn.Module, config: ModelConfig, dtype: str | None) -> None:
    """Change the type of the floating-point weights, as mlx_lm.convert does, and note it."""
    import mlx.core as mx
    from mlx.utils import tree_map_with_path

    if dtype is None:
        return
    wanted = getattr(mx, dtype)
    castable = getattr(model, "cast_predicate", lambda name: True)

    def convert_one(name: str, weight: mx.array) -> mx.array:
        floating = mx.issubdtype(weight.dtype, mx.floating)
        return weight.astype(wanted) if floating and castable(name) else weight

    model.update(tree_map_with_path(convert_one, model.parameters()))
    # Under the name of transformers 5, and that of 4, by which mlx_lm.convert would cast back.
    config.update({key: dtype for key in ("dtype", "torch_dtype") if key in config})


def quantize(
    args: argparse.Namespace, model: nn.Module, config: ModelConfig
) -> tuple[nn.Module, ModelConfig]:
    from mlx_lm.convert import mixed_quant_predicate_builder
    from mlx_lm.utils import quantize_model

    plain, packed = layers_by_kind(model)
    if len(packed) > len(plain):  # gpt-oss has packed experts, and the rest can still be packed
        raise UserError(f"{args.hf_path} is quantized already; --dequantize turns it back")
    predicate = None
    if args.quant_predicate:
        predicate = mixed_quant_predicate_builder(args.quant_predicate, model, args.group_size)
    model, config = quantize_model(
        model, config, args.group_size, args.bits, mode=args.q_mode, quant_predicate=predicate
    )
    left = [m for m in layers_by_kind(model)[0] if m.weight.shape[-1] % args.group_size]
    if left and len(left) == len(plain):
        widths = sorted({m.weight.shape[-1] for m in left})
        raise UserError(
            f"nothing to quantize: no layer's width ({', '.join(map(str, widths))}) is a "
            f"multiple of the group size {args.group_size}"
        )
    if left:
        note(f"{len(left)} layers stay as they are: width no multiple of {args.group_size}")
    return model, config


def layers_by_kind(model: nn.Module) -> tuple[list[nn.Module], list[nn.Module]]:
    """Layers that could be quantized, and those that are."""
    modules = [module for _, module in model.named_modules()]
    plain = [m for m in modules if hasattr(m, "to_quantized")]
    return plain, [m for m in modules if hasattr(m, "bits") and "scales" in m]


def replace_eos(
    args: argparse.Namespace, source: Path, tokenizer: TokenizerWrapper
) -> tuple[TokenizerWrapper, int]:
    """The tokenizer with the wanted token at the end of texts, and this token's id."""
    from mlx_lm.utils import load_tokenizer

    token = args.eos_token
    # Asked of the vocabulary, because transformers would add an unknown one to it.
    if (number := tokenizer.get_vocab().get(token)) is None:
        known = ", ".join(sorted(tokenizer.get_added_vocab())[:12]) or "none"
        raise UserError(f"--eos-token {token} is not in the vocabulary; special tokens: {known}")
    extra = {"trust_remote_code": args.trust_remote_code, "eos_token": token}
    return load_tokenizer(source, extra, eos_token_ids=[number]), number


def update_json(path: Path, **values: object) -> None:
    if path.is_file():
        content = json.loads(path.read_text(encoding="utf-8")) | values
        path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def convert_vision_model(args: argparse.Namespace, source: Path, folder: Path) -> None:
    from mlx_vlm import convert

    convert(
        str(source),
        str(folder),
        quantize=args.quantize,
        q_group_size=args.group_size,
        q_bits=args.bits,
        q_mode=args.q_mode,
        dtype=args.dtype,
        trust_remote_code=args.trust_remote_code,
        quant_predicate=args.quant_predicate,
    )


def run_conversion(args: argparse.Namespace, folder: Path) -> str:
    """Read the source, convert it into `folder`, read that; what came of it.

    Raises:
        UserError, RunError: mlx-lm's and MLX's own errors, in one line.
    """
    with unpacked(args) as source:
        sees = vision.has_vision(source.config)
        problem = "" if sees else model_shape.sizes_problem(source.config)
        if problem:
            note(f"it will answer, but can't be trained here: its {problem}")
        note(f"reading {args.hf_path}")
        try:
            added = {} if sees else translate_config(source.config)
            before = read_source(source.folder, args.trust_remote_code, sees, added)
            note("converting")
            if sees:
                convert_vision_model(args, source.folder, folder)
            else:
                convert_text_model(args, source.packed, source.config, folder)
        except READ_ERRORS as error:
            raise explain(error, args) from error
        with disk_errors_named(folder):
            served_prompt.carry_over(source.folder, folder)
            if source.card:
                write_model_card(source.card, folder)
            elif (folder / served_prompt.MARKER).is_file():
                carry_card(args, source.folder, folder)
    note("checking the result")
    try:
        after = read_fixed_text(folder, args.trust_remote_code, sees, {})
    except RunError as error:
        raise RunError(f"the converted model is broken ({error}); try --dtype bfloat16") from error
    except READ_ERRORS as error:
        raise RunError(f"the converted model does not work: {one_line(error)}") from error
    use = how_to_use(args, sees, problem)
    return f"{describe(folder, after)}\n{compare(before, after)}\n{use}"


def how_to_use(args: argparse.Namespace, sees: bool, problem: str) -> str:
    output = args.output_dir
    if args.lm_studio:
        return f"In LM Studio it is {args.lm_studio}, under My Models"
    if sees or problem:
        command = "mlx_vlm.generate" if sees else "mlx_lm.generate"
        return f"Ask it with: {shlex.join([command, '--model', str(output)])}"
    return f"Train it with: {shlex.join(['--set', f'model_name={output}'])}"


def run_to_gguf(args: argparse.Namespace, path: Path) -> str:
    """Read the source, write it to the file `path`, read that; what came of it.

    Raises:
        UserError, RunError: mlx-lm's, MLX's and gguf's own errors, in one line.
    """
    from mlx_lm.utils import load_tokenizer

    from utils.model import gguf_out, ollama

    kind = args.gguf_type or GGUF_TYPES[0]
    with unpacked(args) as source, beside(args.output_dir) as scratch:
        plain, back = source.packed, Path(scratch) / "back"
        stops = ollama.stops(source.folder)
        note(f"reading {args.hf_path}")
        try:
            added = translate_config(source.config)
            before = read_source(source.folder, args.trust_remote_code, False, added)
            if args.dequantize:
                plain = Path(scratch) / "plain"
                convert_text_model(args, source.folder, source.config, plain)
            note(f"writing {kind}")
            name = own_name(args.hf_path)
            notes = gguf_out.write_gguf(plain, path, kind, name, args.hf_path)
            note("checking the result")
            gguf_out.read_back(path, back, kind)
            notes += gguf_out.compare_tokenizers(plain, back)
            after = read_fixed_text(back, False, False, {})
            tokenizer = load_tokenizer(plain)
            text, left_out = ollama.modelfile(args.output_dir.name, tokenizer, source.folder)
        except READ_ERRORS as error:
            raise explain(error, args) from error
    with disk_errors_named(path):
        path.with_suffix(MODELFILE).write_text(text, encoding="utf-8")
    if stops:
        notes.append(
            f"the model stops at {', '.join(map(repr, stops))}, which a GGUF file cannot say: give "
            f"llama.cpp -r {shlex.quote(stops[0])}; the Modelfile says it"
        )
    lines = [f"{describe(path, after)}", compare(before, after)]
    return "\n".join([*lines, *(f"note: {text}" for text in [*notes, *left_out]), how_to_ask(args)])


def how_to_ask(args: argparse.Namespace) -> str:
    if args.lm_studio:
        return f"In LM Studio it is {args.lm_studio}, under My Models"
    place, name = str(args.output_dir), own_name(args.hf_path).lower()
    modelfile = str(args.output_dir.with_suffix(MODELFILE))
    return (
        f"Ask it with: {shlex.join(['llama-cli', '-m', place, '--jinja'])}\n"
        f"Ollama:      {shlex.join(['ollama', 'create', name, '-f', modelfile])}"
    )


def run_to_peft(args: argparse.Namespace, folder: Path) -> str:
    """Write the adapters of --hf-path for PEFT into `folder`; what came of it."""
    from utils.model import peft_adapters

    try:
        with disk_errors_named(folder):
            made = peft_adapters.write(Path(args.hf_path).expanduser(), folder, args.base or "")
    except (ValueError, RuntimeError) as error:
        raise RunError(f"{args.hf_path} cannot be converted: {one_line(error)}") from error
    return (
        f"{made}, as PEFT reads them; read back, they are the same\n"
        "Load them with: PeftModel.from_pretrained(base, FOLDER), where base is that model in "
        "Hugging Face's layout, not quantized by MLX (--base names another)"
    )


def explain(error: Exception, args: argparse.Namespace) -> UserError | RunError:
    if "trust_remote_code" in str(error):
        return UserError(
            f"{args.hf_path} needs Python code of its own. Read that code, and add "
            "--trust-remote-code if you trust it"
        )
    return RunError(f"{args.hf_path} cannot be converted: {one_line(error)}")


def write_model_card(name: str, folder: Path) -> None:
    """README.md with the licence and tags of the source, whose name it gives."""
    from huggingface_hub import ModelCard
    from huggingface_hub.errors import EntryNotFoundError
    from mlx_lm.utils import create_model_card

    try:
        create_model_card(folder, name)
    except (OSError, ValueError, EntryNotFoundError):  # no card, or the hub is out of reach now
        card = ModelCard.load(folder / "README.md")
        card.data.base_model = name
        card.save(folder / "README.md")


def carry_card(args: argparse.Namespace, source: Path, folder: Path) -> None:
    """What a run says of the model that it made holds for this one, but for the scores."""
    from utils.run.model_card import CARD, moved  # brings MLX: not for --help

    if not (source / CARD).is_file():
        return
    card = (source / CARD).read_text(encoding="utf-8", errors="replace")
    note = f"Converted since{how_converted(args)}, which may have changed the scores."
    (folder / CARD).write_text(moved(card, str(args.output_dir), note), encoding="utf-8")


def how_converted(args: argparse.Namespace) -> str:
    if args.quantize:
        return f" to {args.quant_predicate or f'{args.bits} bits'} ({args.q_mode})"
    return f" to {args.dtype}" if args.dtype else ""


def upload(folder: Path, repo: str) -> None:
    """Not by mlx_lm.utils.upload_to_hub: what it calls is gone from huggingface_hub 2."""
    from huggingface_hub import HfApi, ModelCard
    from huggingface_hub.errors import HTTPError

    from utils.run.model_card import moved

    card = ModelCard.load(folder / "README.md")
    generic = (
        f"# {repo}\n\nIn MLX format; converted from {card.data.base_model or 'a local model'}.\n\n"
        f'```python\nfrom mlx_lm import generate, load\n\nmodel, tokenizer = load("{repo}")\n```\n'
    )
    trained = (folder / served_prompt.MARKER).is_file() and card.text.strip()
    card.text = moved(card.text, repo, "") if trained else generic
    card.save(folder / "README.md")
    try:
        HfApi().create_repo(repo_id=repo, exist_ok=True)
        HfApi().upload_folder(folder_path=folder, repo_id=repo)
    except (HTTPError, OSError, ValueError) as error:
        raise RunError(
            f"{folder} is complete, but its upload failed: {one_line(error)}\n"
            f"Try again with: hf upload {repo} {folder}"
        ) from error


def note(text: str) -> None:
    complain(text)


def stop(number: int, frame: FrameType | None) -> None:
    """A kill takes the way of Ctrl-C, which removes the partial folder."""
    raise KeyboardInterrupt


def convert_and_report(args: argparse.Namespace) -> None:
    check_arguments(args)
    runtime.preload_blas()
    # mlx-lm's progress goes where ours does: a pipe that nobody reads any more would end it.
    try:
        with contextlib.redirect_stdout(sys.stderr):
            summary = convert_to(args)
    except DiskError as error:  # of a name for a while, which is gone when the user reads it
        raise RunError(str(error).replace(str(error.path), str(args.output_dir))) from error
    say(f"{args.output_dir}: {summary}")
    if args.upload_repo:
        upload(args.output_dir, args.upload_repo)
        say(f"Uploaded to https://huggingface.co/{args.upload_repo}")


def convert_to(args: argparse.Namespace) -> str:
    """What came of it, once the result has its name."""
    if args.to == "gguf":
        with partial_files(args.output_dir) as path:
            return run_to_gguf(args, path)
    run = run_to_peft if args.to == "peft" else run_conversion
    with partial_folder(args.output_dir) as folder:
        return run(args, folder)


def main() -> int:
    """Returns the exit code: 0, 2 for input to correct, 1 for a conversion that failed."""
    args = build_parser().parse_args()
    before = signal.signal(signal.SIGTERM, stop)
    tell_everything()
    try:
        convert_and_report(args)
    except (UserError, RunError) as error:
        complain(f"error: {error}")
        return error.exit_code
    except KeyboardInterrupt:
        complain("interrupted: nothing was written")
        return 130
    finally:
        signal.signal(signal.SIGTERM, before)
    return 0


if __name__ == "__main__":
    sys.exit(main())
