"""The two ways a command ends badly on purpose; anything else is a bug and keeps its traceback."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class UserError(Exception):
    """Bad input: settings, files, data. Nothing was started. Exit code 2."""

    exit_code = 2


class RunError(Exception):
    """A run that could not go on (a reward that failed, a hub out of reach). Exit code 1."""

    exit_code = 1


class Signalled(KeyboardInterrupt):
    """A signal (its number) ends the process: Ctrl-C, and not code that raises what it raises."""


class DiskError(RunError):
    """The file system refused to write `path` (full, gone); what stood there still does."""

    def __init__(self, path: Path, text: str) -> None:
        super().__init__(f"{path} cannot be written: {text}")
        self.path = path


def reason(error: Exception) -> str:
    """The message of someone else's error; its kind where that alone says what happened."""
    kinds = LookupError | AssertionError | RecursionError | ArithmeticError | MemoryError
    text = str(error).strip() or "no reason given"
    text = text if len(text) <= 1000 else f"{text[:1000]}..."
    return f"{type(error).__name__}: {text}" if isinstance(error, kinds) else text


def readable(count: float) -> str:
    """A number of bytes for a person, in three digits."""
    amount, name = (count / 1e9, "GB") if count >= 1e8 else (count / 1e6, "MB")
    decimals = 2 if amount < 9.995 else 1 if amount < 99.95 else 0
    return f"{amount:,.{decimals}f} {name}"


def roughly(count: float) -> str:
    """An estimated number of bytes: two digits, since no more of it is known."""
    digits = float(f"{count:.2g}")
    unit, name = (1e9, "GB") if digits >= 1e9 else (1e6, "MB")
    return f"{digits / unit:,.{1 if digits < 10 * unit else 0}f} {name}"


def nearest_existing(path: Path) -> Path:
    """The path, or the first folder above it that is there."""
    return next(p for p in (path, *path.parents) if p.exists())


@contextmanager
def disk_errors_named(path: Path) -> Iterator[None]:
    """Turn a file system that refuses into one clear error.

    Raises:
        DiskError: no space, no right, no such device; MLX's writer tells only that it failed.
    """
    try:
        yield
    except OSError as error:  # NumPy's has no number, and says only how much was written
        raise DiskError(path, error.strerror or unnamed(error, path)) from error
    except RuntimeError as error:
        if not str(error).startswith(("[write]", "[save_safetensors] Failed to open")):
            raise
        raise DiskError(path, unnamed(error, path)) from error


def unnamed(error: Exception, path: Path) -> str:
    """Why `path` was refused, where the error does not tell."""
    free = shutil.disk_usage(nearest_existing(path.parent)).free
    return f"{'the disk is full' if free < 2**20 else error} ({readable(free)} free)"


@contextmanager
def panics_as_errors() -> Iterator[None]:
    """Turn a panic of a Rust library (tokenizers, tiktoken), which is no Exception, into one.

    Raises:
        ValueError: with the panic's message.
    """
    try:
        yield
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        raise ValueError(f"its tokenizer panics: {error}") from error
