"""Open a GGUF file (llama.cpp's format); what is no complete language model is refused in a line.

The package `gguf` reads it. It is the optional extra of that name, imported only here and where a
tensor is unpacked.
"""

from __future__ import annotations

import importlib.util
import os
import re
import struct
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, TypeVar

from ..base.errors import UserError, reason

if TYPE_CHECKING:
    import numpy as np

MAGIC = b"GGUF"
READ_ERRORS = (ValueError, LookupError, OverflowError, TypeError, OSError)  # on damaged files
NO_MODEL = {  # general.type: what such a file holds
    "mmproj": "only the vision part of a model; give the file of the language model",
    "adapter": "adapters, not a model; give the file of the model",
    "vocab": "only a vocabulary, without weights",
    "imatrix": "the measurements for quantizing a model, not the model",
}

Value = str | int | float | bool | list[str] | list[int] | list[float]
V = TypeVar("V", str, int, float, bool)


class Tensor(NamedTuple):
    """A tensor as it lies in the file."""

    data: np.ndarray
    """A view of the file; the last axis counts bytes where the type is quantized."""
    kind: str
    """The type's name: F32, F16, BF16, Q4_0, Q6_K, ..."""
    shape: tuple[int, ...]
    """Of the numbers, outermost axis first as in NumPy."""


class GGUF(NamedTuple):
    """An open file: what it says, and its tensors by name."""

    path: Path
    metadata: dict[str, Value]
    tensors: dict[str, Tensor]

    def get(self, key: str, kind: type[V]) -> V | None:
        """A value of the metadata, None where it is absent. Raises UserError for another type."""
        value = self.metadata.get(key)
        if kind is float and isinstance(value, (int, float)) and not isinstance(value, bool):
            value = shortest(float(value))
        if value is not None and type(value) is not kind:
            raise UserError(f"{self.path}: {key} = {str(value)[:80]!r} should be {kind.__name__}")
        return value

    def need(self, key: str, kind: type[V]) -> V:
        value = self.get(key, kind)
        if value is None:
            raise UserError(f"{self.path} is no complete model: its metadata lacks {key}")
        return value

    def texts(self, key: str) -> list[str]:
        """A list of strings, empty where it is absent."""
        value = self.metadata.get(key, [])
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise UserError(f"{self.path}: {key} should be a list of strings")
        return [str(item) for item in value]

    def numbers(self, key: str) -> list[float]:
        """A list of numbers, empty where it is absent."""
        value = self.metadata.get(key, [])
        if not isinstance(value, list) or any(isinstance(item, str) for item in value):
            raise UserError(f"{self.path}: {key} should be a list of numbers")
        return [float(item) for item in value]


def shortest(value: float) -> float:
    """The shortest number that float32 rounds to `value`: 1e-05, not 9.999999747378752e-06."""
    for digits in range(6, 10):
        rounded = float(f"{value:.{digits}g}")
        if struct.unpack("f", struct.pack("f", rounded))[0] == value:
            return rounded
    return value


def is_gguf(path: Path) -> bool:
    """By its name or by its first bytes."""
    if path.suffix.lower() == ".gguf":
        return not path.is_dir()
    if not path.is_file() or not os.access(path, os.R_OK):
        return False
    with path.open("rb") as file:
        return file.read(4) == MAGIC


def check_installed() -> None:
    """Raises UserError where the package `gguf` is missing."""
    if importlib.util.find_spec("gguf") is None:
        raise UserError(
            "reading a GGUF file needs the package gguf. Install the extra `gguf`:\n"
            "  uv run --extra gguf python utils/convert_model.py ...\n"
            "  pip install 'gguf>=0.17,<1'"
        )


def open_gguf(path: Path) -> GGUF:
    """Everything a file says, its tensors not read yet.

    Raises:
        UserError: no GGUF file, a damaged one, or one that is no language model of one file.
    """
    check_start(path)
    check_installed()
    import numpy as np
    from gguf import GGUFReader

    try:
        with np.errstate(all="ignore"):  # sizes of a damaged file overflow
            reader = GGUFReader(path)
            metadata = {key: field.contents() for key, field in reader.fields.items()}
    except READ_ERRORS as error:
        raise UserError(explain(path, error)) from error
    tensors = {
        t.name: Tensor(t.data, t.tensor_type.name, tuple(int(n) for n in reversed(t.shape)))
        for t in reader.tensors
    }
    opened = GGUF(path, metadata, tensors)
    check_whole(opened)
    check_types(opened)
    return opened


def check_start(path: Path) -> None:
    """The first eight bytes: the magic word and the version, whose order of bytes shows."""
    try:
        with path.open("rb") as file:
            start = file.read(8)
    except FileNotFoundError as error:
        raise UserError(f"--hf-path {path}: no such file{others_in(path.parent)}") from error
    except OSError as error:
        raise UserError(f"--hf-path {path} cannot be read: {error.strerror or error}") from error
    if start[:4] != MAGIC:
        found = f"starts with {start[:4]!r}" if start else "is empty"
        raise UserError(f"{path} is no GGUF file: it {found} instead of {MAGIC!r}")
    if len(start) < 8:
        raise UserError(f"{path} ends after {len(start)} bytes; it was not downloaded to its end")
    check_version(path, int.from_bytes(start[4:], "little"))


def others_in(folder: Path) -> str:
    found = sorted(file.name for file in folder.glob("*.gguf"))
    return f"; {folder} has {', '.join(found[:5])}" if found else ""


def check_version(path: Path, version: int) -> None:
    if version and not version % 65536:  # 3 with its bytes the other way round
        raise UserError(f"{path} is big-endian, for other machines; get the little-endian file")
    if version not in (2, 3):
        raise UserError(f"{path} is GGUF of version {version}; versions 2 and 3 can be read")


def explain(path: Path, error: Exception) -> str:
    text = reason(error)
    if unknown := re.search(r"(\d+)\D* is not a valid GGMLQuantizationType", text):
        return f"{path} has a tensor of the unknown type {unknown[1]}; a newer `gguf` may know it"
    return f"{path} is damaged, or was not downloaded to its end ({text.splitlines()[0][:200]})"


def check_whole(file: GGUF) -> None:
    """Raises UserError for parts of a model and for files that are none."""
    kind = file.get("general.type", str) or "model"
    architecture = file.need("general.architecture", str)
    if architecture == "clip":
        kind = "mmproj"
    if kind != "model":
        raise UserError(f"{file.path} holds {NO_MODEL.get(kind, f'a {kind}, not a model')}")
    parts = file.get("split.count", int) or 0
    if parts > 1:
        number = (file.get("split.no", int) or 0) + 1
        raise UserError(
            f"{file.path} is part {number} of {parts}. Join them with llama.cpp first:\n"
            f"  llama-gguf-split --merge {file.path} WHOLE.gguf   (given the first part)"
        )
    if not file.tensors:
        raise UserError(f"{file.path} holds no weights")


def check_types(file: GGUF) -> None:
    """Raises UserError for a type that the package knows but cannot turn into numbers."""
    import numpy as np
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, dequantize

    for kind in sorted({tensor.kind for tensor in file.tensors.values()}):
        number = GGMLQuantizationType[kind]
        block = np.zeros((1, GGML_QUANT_SIZES[number][1]), dtype=np.uint8)
        try:
            dequantize(block, number)
        except NotImplementedError as error:
            name = next(name for name, tensor in file.tensors.items() if tensor.kind == kind)
            raise UserError(
                f"{file.path}: tensor {name} has the type {kind}, which cannot be unpacked"
            ) from error


def unpack(tensor: Tensor) -> np.ndarray:
    """The numbers of a tensor in float32, as llama.cpp reads them."""
    import numpy as np
    from gguf import GGMLQuantizationType, dequantize

    numbers = dequantize(np.ascontiguousarray(tensor.data), GGMLQuantizationType[tensor.kind])
    return np.asarray(numbers, dtype=np.float32).reshape(tensor.shape)
