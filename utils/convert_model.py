"""Convert a Hugging Face model to an MLX folder, quantized if wished, and check that it works.

    uv run python utils/convert_model.py --hf-path Qwen/Qwen2.5-1.5B-Instruct --quantize

The folder appears only when the converted model has been loaded again and has generated text.
"""

import argparse
import importlib
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

DEFAULT_OUTPUT = "utils/mlx_model"
COMMAND = "uv run python utils/convert_model.py"
EXAMPLES = f"""examples:
  {COMMAND} --hf-path Qwen/Qwen2.5-1.5B-Instruct --quantize
      4 bits: a quarter of the memory, trained by LoRA. About 0.9 GB on disk, 3 GB downloaded.
  {COMMAND} --hf-path Qwen/Qwen2.5-1.5B-Instruct --dtype bfloat16
      half precision, which full fine-tuning needs
  {COMMAND} --hf-path ./my-model -q --bits 8 --output-dir models/my-model-8bit

train the result with --set model_name={DEFAULT_OUTPUT}, or a preset that names it"""


class ConversionError(Exception):
    """What went wrong, for the user; exit_code 2 for input to correct, 1 for everything else."""

    def __init__(self, message: str, exit_code: int = 2) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="convert_model.py",
        description="Convert a Hugging Face model to an MLX folder and check that it works.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--hf-path", required=True, metavar="MODEL", help="name on the hub, or a local folder")
    add("-q", "--quantize", action="store_true", help="quantize the weights (to 4 bits)")
    add("--bits", type=int, choices=(2, 3, 4, 5, 6, 8), help="with --quantize; default 4")
    add(
        "--group-size",
        type=int,
        choices=(32, 64, 128),
        help="weights that share a scale, with --quantize; default 64",
    )
    add(
        "--dtype",
        choices=("float16", "bfloat16", "float32"),
        help="of what is not quantized; default: as in the checkpoint",
    )
    add(
        "--output-dir",
        type=Path,
        default=Path(DEFAULT_OUTPUT),
        metavar="FOLDER",
        help=f"default {DEFAULT_OUTPUT}",
    )
    add("--force", action="store_true", help="replace an existing model folder")
    return parser


def check_arguments(args: argparse.Namespace) -> None:
    """Refuse what cannot work before anything is downloaded. Raises ConversionError."""
    if not args.quantize and (args.bits or args.group_size):
        raise ConversionError("--bits and --group-size need --quantize")
    check_source(args.hf_path)
    check_output(args)


def check_source(hf_path: str) -> None:
    source = Path(hf_path)
    if (source / "config.json").is_file():
        return
    if source.exists():
        raise ConversionError(f"--hf-path {hf_path} is no model folder: it has no config.json")
    if hf_path.startswith((".", "/", "~")) or hf_path.count("/") > 1:
        raise ConversionError(f"--hf-path {hf_path}: no such folder, and no hub name (OWNER/NAME)")


def check_output(args: argparse.Namespace) -> None:
    output: Path = args.output_dir
    if not output.exists() and not output.is_symlink():
        return
    if not args.force:
        raise ConversionError(
            f"{output} exists already. Replace it with:\n"
            f"  {COMMAND} {' '.join(sys.argv[1:])} --force"
        )
    # --force must not delete a home folder because of a slip in --output-dir.
    model_folder = (output / "config.json").is_file() or not any(output.iterdir())
    if output.is_symlink() or not output.is_dir() or not model_folder:
        raise ConversionError(f"--force replaces model folders only, and {output} is none")


@contextmanager
def partial_folder(output: Path) -> Iterator[Path]:
    """A name beside `output` to write to; moved there at the end, removed after an error."""
    partial = output.with_name(f".{output.name}.partial-{os.getpid()}")
    output.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield partial
        if output.exists():
            retired = output.with_name(f".{output.name}.old-{os.getpid()}")
            output.rename(retired)
            partial.rename(output)
            shutil.rmtree(retired)
        else:
            partial.rename(output)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def run_conversion(args: argparse.Namespace, folder: Path) -> None:
    """Convert into `folder` with mlx_lm; its errors become one line. Raises ConversionError."""
    from huggingface_hub.errors import (
        HTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )
    from mlx_lm import convert

    try:
        convert(
            args.hf_path,
            str(folder),
            quantize=args.quantize,
            q_bits=args.bits,
            q_group_size=args.group_size,
            dtype=args.dtype,
        )
    except RepositoryNotFoundError as error:
        raise ConversionError(
            f"{args.hf_path} is neither a folder nor a model on the hub "
            "(a private or gated one needs `hf auth login`)"
        ) from error
    except (HTTPError, LocalEntryNotFoundError) as error:
        raise ConversionError(f"no answer from the hub for {args.hf_path}: {error}", 1) from error
    except (OSError, ValueError) as error:
        raise ConversionError(f"{args.hf_path} cannot be converted: {error}", 1) from error


def check_model(folder: Path) -> str:
    """Load the converted model, generate a few tokens, describe it. Raises ConversionError."""
    import mlx.core as mx
    from mlx_lm import generate, load
    from mlx_lm.utils import compute_bits_per_weight, get_total_parameters

    loaded: Any = load(str(folder))
    model, tokenizer = loaded[:2]
    prompt = tokenizer.encode("Two and two make") or [0]
    if not mx.isfinite(model(mx.array([prompt]))).all().item():
        raise ConversionError("the converted model computes NaN or inf; try --dtype bfloat16", 1)
    text = generate(model, tokenizer, prompt=prompt, max_tokens=8)
    size = sum(file.stat().st_size for file in folder.iterdir()) / 1e9
    return (
        f"{get_total_parameters(model) / 1e6:,.1f} M parameters, {size:,.3f} GB on disk, "
        f"{compute_bits_per_weight(model):.2f} bits per weight; it continues "
        f"'Two and two make' with {text!r}"
    )


def main() -> int:
    """Returns the exit code: 0, 2 for input to correct, 1 for a conversion that failed."""
    args = build_parser().parse_args()
    try:
        check_arguments(args)
        # As a script, sys.path[0] is utils/ itself.
        name = f"{__package__}.runtime" if __package__ else "runtime"
        importlib.import_module(name).preload_blas()
        with partial_folder(args.output_dir) as folder:
            run_conversion(args, folder)
            summary = check_model(folder)
    except ConversionError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    print(f"{args.output_dir}: {summary}")
    print(f"Train it with: --set model_name={args.output_dir}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
