"""Read a settings dataclass from TOML and `--set key=value`, strictly.

A key nobody knows, a value of the wrong type or a file that does not parse is an error that names
the key, the value, what is allowed and the nearest valid key: a typo must never train.
"""

import ast
import copy
import dataclasses
import difflib
import inspect
import math
import os
import textwrap
import tomllib
import typing
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, TypeAlias, TypeGuard, TypeVar

from ..base.errors import UserError
from ..base.script import ROOT
from ..base.text import is_unicode, redact, redacted, shown, without_secrets
from . import other_names
from .run_settings import Settings

T = TypeVar("T")
S = TypeVar("S", bound=Settings)
Value: TypeAlias = "str | int | float | bool | list[Value] | dict[str, Value]"  # of a setting
TABLE = "mlx_grpo"
PRESETS = ROOT / "configs"
KINDS: dict[type, str] = {
    str: "text in quotes",
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    list: "a list such as [1, 2]",
    dict: "a table such as {key = value}",
}


def read_toml(path: Path, presets: Path = PRESETS) -> dict[str, object]:
    """The settings in `path`: flat keys, or the table [mlx_grpo]. The nearest of `presets` is named
    where it is missing.

    Raises:
        UserError: the file is missing, not TOML, or holds other top-level keys beside the table.
    """
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise UserError(f"config file {path} does not exist ({_nearest(path, presets)})") from None
    except IsADirectoryError:
        raise UserError(
            f"config file {path} is a folder ({_nearest(path / 'x', presets)})"
        ) from None
    except UnicodeDecodeError as error:
        byte = f"byte {error.start + 1} is not UTF-8"
        raise UserError(f"config file {path} cannot be read as TOML: {byte}") from None
    except RecursionError:
        raise UserError(f"config file {path} cannot be read as TOML: nested too deeply") from None
    except (OSError, ValueError) as error:  # a number of over 4,300 digits is a bare ValueError
        hint = "; text stands in quotes" if str(error).startswith("Invalid value") else ""
        raise UserError(f"config file {path} cannot be read as TOML: {error}{hint}") from None
    table = data.pop(TABLE, None)
    if table is None:
        return data
    if not isinstance(table, dict):
        raise UserError(f"config file {path}: {TABLE} = {shown(table)} must be a table, [{TABLE}]")
    if data:
        others = shown(", ".join(data))[1:-1]
        raise UserError(f"config file {path} mixes [{TABLE}] with other top-level keys: {others}")
    return table


def _nearest(path: Path, presets: Path) -> str:
    """What to name instead of a file that is not there: the nearest preset, or those beside it."""
    beside = sorted(path.parent.glob("*.toml"))
    known = [*beside, *sorted(presets.glob("*.toml"))]
    near = difflib.get_close_matches(path.stem, [file.stem for file in known], n=1)
    if near:
        return f"did you mean {next(os.path.relpath(f) for f in known if f.stem == near[0])}?"
    return f"beside it: {', '.join(map(str, beside)) or 'none'}"


def resolve(cls: type[T], path: Path | None, overrides: Iterable[str] = ()) -> T:
    """`cls` (a dataclass) from its defaults, then the file, then `key=value` overrides.

    The result's attribute `explicit` is the set of keys that file or overrides named, `inherited`
    those of them that no override did, `from_preset` whether the file is one of this project's.

    Raises:
        UserError: unknown key, wrong type, unreadable file; whatever `cls` itself refuses.
    """
    types = types_of(cls)
    values: dict[str, Value] = {}
    if path is not None:
        for key, value in read_toml(path).items():
            kind = types[_known(key, types, str(path))]
            values[key] = check_type(key, value, kind)
    typed = set()
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals:
            raise UserError(f"--set {shown(override)}: write --set key=value")
        key = _known(key.strip(), types, "--set")
        typed.add(key)
        values[key] = parse_text(key, text.strip(), types[key])
    result = cls(**values)
    result.explicit = frozenset(values)  # type: ignore[attr-defined]
    vars(result)["inherited"] = frozenset(values) - typed
    vars(result)["from_preset"] = path is not None and PRESETS in path.resolve().parents
    return result


def types_of(cls: type) -> dict[str, type]:
    """The type of each setting of a dataclass."""
    hints = typing.get_type_hints(cls)
    return {f.name: hints[f.name] for f in dataclasses.fields(cls) if f.init}


def replaced(config: S, **changes: Any) -> S:
    """`dataclasses.replace`, after which only what was set on purpose counts as that."""
    result = dataclasses.replace(config, **changes)
    result.explicit = config.explicit
    kept = ("inherited", "from_preset", "started_in", "started_on", "tool_schemas")
    vars(result).update({name: getattr(config, name) for name in kept})
    return result


def _known(key: str, types: dict[str, type], where: str) -> str:
    if key in types:
        return key
    near = difflib.get_close_matches(key, [*types, TABLE], n=1)
    hint = f"; did you mean {near[0]!r}?" if near else "; `--help` lists the keys"
    if "num_generations" in types and (advice := other_names.advice(key)):
        hint = f": {advice}"
    raise UserError(f"unknown key {shown(key)} in {where}{hint}")


def parse_text(key: str, text: str, kind: type) -> Value:
    """The value of one `--set`: a TOML literal, or bare text where a string or list is wanted."""
    value = _literal(text)
    if kind is str:
        return check_type(key, value if isinstance(value, str) else text, kind)
    if isinstance(value, str) and kind in (int, float, bool):
        value = _literal(value)  # the value carried its own quotes: num_generations="32"
    if typing.get_origin(kind) is list and not isinstance(value, list):
        parts = text.strip("[]").split(",") if value == text else [str(value)]
        item = typing.get_args(kind)[0]
        return [parse_text(key, part.strip(), item) for part in parts if part.strip()]
    return check_type(key, value, kind)


def _literal(text: str) -> object:
    """The value that `text` writes in TOML; `text` itself when that is not one TOML value."""
    try:
        values = tomllib.loads(f"value = {text}")
    except (ValueError, RecursionError):  # not TOML, digits beyond Python's limit, too deep
        return text
    return values["value"] if len(values) == 1 else text  # a line break can smuggle in keys


def check_type(key: str, value: object, kind: type) -> Value:
    """`value` as `kind` (an int is a float too, nothing else is converted).

    Raises:
        UserError: the value is of another type.
    """
    if typing.get_origin(kind) is list:
        if not isinstance(value, list):
            raise _wrong_type(key, value, kind)
        refuse_infinite(key, value)
        return [check_type(key, part, typing.get_args(kind)[0]) for part in value]
    if not is_plain(value):
        raise UserError(f"{key} = {shown(value)} holds something else than {PLAIN}")
    if not _is_of(value, typing.get_origin(kind) or kind):
        raise _wrong_type(key, value, kind)
    if isinstance(value, dict):
        refuse_infinite(key, value)
    return float(value) if kind is float and isinstance(value, int) else value


def _is_of(value: Value, kind: type) -> bool:
    """Whether a value may stand where `kind` is wanted: true and false are no numbers."""
    if isinstance(value, bool):
        return kind is bool
    return isinstance(value, (int | float) if kind is float else kind)


WITH_URLS = ("remote_rm_url", "reward_kwargs")
PLAIN = "text without NUL, numbers of up to 20 digits, true, false, lists and tables of these"


def refuse_infinite(key: str, value: object) -> None:
    """A list or table with a number that is none would drop a reward, or end in JSON that is none.

    Raises:
        UserError: it holds nan or inf, however deep.
    """
    if not is_finite(value):
        raise UserError(f"{key} = {shown(value)} must hold finite numbers: neither nan nor inf")


def is_finite(value: object) -> bool:
    """Whether no number in a setting is nan or infinite."""
    if isinstance(value, dict):
        return all(map(is_finite, value.values()))
    if isinstance(value, list | tuple):
        return all(map(is_finite, value))
    return not isinstance(value, float) or math.isfinite(value)


def is_plain(value: object) -> TypeGuard[Value]:
    """Whether JSON, file names and MLX can all take it (TOML also has dates, 0xfff... and NUL)."""
    if isinstance(value, dict):
        return all(is_plain(part) for pair in value.items() for part in pair)
    if isinstance(value, list):
        return all(is_plain(part) for part in value)
    if isinstance(value, str):
        return "\0" not in value and is_unicode(value)
    if isinstance(value, int):
        return value.bit_length() <= 65
    return isinstance(value, float)


def _wrong_type(key: str, value: object, kind: type) -> UserError:
    return UserError(f"{key} = {shown(value)} must be {KINDS[typing.get_origin(kind) or kind]}")


def recorded(config: Settings) -> dict[str, Value]:
    """The settings as they are shown and written: without secrets."""
    values = {f.name: copy.deepcopy(getattr(config, f.name)) for f in fields(type(config))}
    urls = {name: without_secrets(values[name]) for name in WITH_URLS if name in values}
    return redacted(values | urls)


def shown_override(text: str) -> str:
    """A `--set key=value` as it may be shown."""
    key = text.partition("=")[0].strip()
    if key in WITH_URLS and without_secrets(text) != text:
        return f"{key}=***"  # where a list of addresses is cut is not to be guessed at
    return redact(text)


def fields(cls: type) -> list[dataclasses.Field]:
    """The fields of a dataclass: its own, then those that it inherits."""
    own = inspect.get_annotations(cls)
    return sorted(dataclasses.fields(cls), key=lambda field: field.name not in own)


def parts(cls: type) -> Iterator[tuple[str, list[dataclasses.Field]]]:
    """What a class says of its settings, and these; then the same of those that it inherits."""
    for part in cls.__mro__[:-1]:
        own = inspect.get_annotations(part)
        if not own:  # a name for what another class defines
            continue
        yield (part.__doc__ or "").splitlines()[0], [f for f in fields(cls) if f.name in own]


def field_docs(cls: type) -> dict[str, str]:
    """Field name -> the string literal under it in the class body (one line of text each)."""
    docs = {}
    for part in reversed(cls.__mro__[:-1]):
        body = ast.parse(textwrap.dedent(inspect.getsource(part))).body[0]
        assert isinstance(body, ast.ClassDef)
        for field, doc in zip(body.body, body.body[1:], strict=False):
            if isinstance(field, ast.AnnAssign) and isinstance(doc, ast.Expr):
                assert isinstance(field.target, ast.Name)
                assert isinstance(doc.value, ast.Constant)
                docs[field.target.id] = " ".join(str(doc.value.value).split())
    return docs


def help_text(cls: type) -> str:
    """The settings, one a line with default and meaning, for `--help`."""
    docs, lines = field_docs(cls), []
    for title, own in parts(cls):
        lines.append(f"\n{title}")
        for field in own:
            default = field.default
            if field.default_factory is not dataclasses.MISSING:
                default = field.default_factory()
            lines.append(f"  {field.name} = {default!r}\n      {docs.get(field.name, '')}")
    return "\n".join(lines)
