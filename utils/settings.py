"""Read a settings dataclass from TOML and `--set key=value`, strictly.

A key nobody knows, a value of the wrong type or a file that does not parse is an error that names
the key, the value, what is allowed and the nearest valid key: a typo must never train.
"""

import ast
import dataclasses
import difflib
import inspect
import re
import tomllib
import typing
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypeVar

from .errors import UserError

T = TypeVar("T")
TABLE = "mlx_grpo"
KINDS: dict[type, str] = {
    str: "text in quotes",
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    list: "a list such as [1, 2]",
    dict: "a table such as {key = value}",
}


def read_toml(path: Path) -> dict[str, Any]:
    """The settings in `path`: flat keys, or the table [mlx_grpo].

    Raises:
        UserError: the file is missing, not TOML, or holds other top-level keys beside the table.
    """
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        presets = ", ".join(str(p) for p in sorted(path.parent.glob("*.toml"))) or "none"
        raise UserError(f"config file {path} does not exist (beside it: {presets})") from None
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise UserError(f"config file {path} cannot be read as TOML: {error}") from None
    table = data.pop(TABLE, None)
    if table is None:
        return data
    if not isinstance(table, dict):
        raise UserError(f"config file {path}: {TABLE} = {table!r} must be a table, [{TABLE}]")
    if data:
        raise UserError(
            f"config file {path} mixes [{TABLE}] with other top-level keys: {', '.join(data)}"
        )
    return table


def resolve(cls: type[T], path: Path | None, overrides: Iterable[str] = ()) -> T:
    """`cls` (a dataclass) from its defaults, then the file, then `key=value` overrides.

    The result's attribute `explicit` is the set of keys that file or overrides named.

    Raises:
        UserError: unknown key, wrong type, unreadable file; whatever `cls` itself refuses.
    """
    types = typing.get_type_hints(cls)
    types = {f.name: types[f.name] for f in dataclasses.fields(cls) if f.init}  # type: ignore[arg-type]
    values: dict[str, Any] = {}
    if path is not None:
        for key, value in read_toml(path).items():
            kind = types[_known(key, types, str(path))]
            values[key] = check_type(key, value, kind)
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals:
            raise UserError(f"--set {override!r}: write --set key=value")
        key = _known(key.strip(), types, "--set")
        values[key] = parse_text(key, text.strip(), types[key])
    result = cls(**values)
    result.explicit = frozenset(values)  # type: ignore[attr-defined]
    return result


def _known(key: str, types: dict[str, Any], where: str) -> str:
    if key in types:
        return key
    near = difflib.get_close_matches(key, types, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else "; `--help` lists the keys"
    raise UserError(f"unknown key {key!r} in {where}{hint}")


def parse_text(key: str, text: str, kind: Any) -> Any:
    """The value of one `--set`: a TOML literal, or bare text where a string or list is wanted."""
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text
    if kind is str:
        return value if isinstance(value, str) else text
    if isinstance(value, str) and kind in (int, float, bool):
        # The value carried its own quotes: num_generations="32".
        try:
            value = tomllib.loads(f"value = {value}")["value"]
        except tomllib.TOMLDecodeError:
            raise _wrong_type(key, value, kind) from None
    if typing.get_origin(kind) is list and not isinstance(value, list):
        parts = text.strip("[]").split(",") if value == text else [str(value)]
        item = typing.get_args(kind)[0]
        return [parse_text(key, part.strip(), item) for part in parts if part.strip()]
    return check_type(key, value, kind)


def check_type(key: str, value: Any, kind: Any) -> Any:
    """`value` as `kind` (an int is a float too, nothing else is converted).

    Raises:
        UserError: the value is of another type.
    """
    item = typing.get_args(kind)[0] if typing.get_origin(kind) is list else None
    if item is not None:
        if not isinstance(value, list):
            raise _wrong_type(key, value, kind)
        return [check_type(key, part, item) for part in value]
    if typing.get_origin(kind) is dict:
        kind = dict
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, kind) or (kind is not bool and isinstance(value, bool)):
        raise _wrong_type(key, value, kind)
    return value


def _wrong_type(key: str, value: Any, kind: Any) -> UserError:
    return UserError(f"{key} = {value!r} must be {KINDS[typing.get_origin(kind) or kind]}")


# A URL with what may be secret in it: user and password, the query.
URL = re.compile(r"(\w+://)([^/?#\s@\"']*@)?([^?#\s\"']*)(\?[^#\s\"']*)?")
WITH_URLS = ("remote_rm_url", "reward_kwargs")


def without_secrets(value: Any) -> Any:
    """A value as it may be shown and written: URLs lose password and query."""
    if isinstance(value, str):
        return URL.sub(
            lambda m: f"{m[1]}{'***@' if m[2] else ''}{m[3]}{'?***' if m[4] else ''}", value
        )
    if isinstance(value, list):
        return [without_secrets(part) for part in value]
    if isinstance(value, dict):
        return {key: without_secrets(part) for key, part in value.items()}
    return value


def recorded(config: Any) -> dict[str, Any]:
    """The settings as they are shown and written."""
    values = dataclasses.asdict(config)
    return values | {name: without_secrets(values[name]) for name in WITH_URLS if name in values}


def shown_override(text: str) -> str:
    """A `--set key=value` as it may be shown."""
    return without_secrets(text) if text.partition("=")[0].strip() in WITH_URLS else text


def field_docs(cls: type) -> dict[str, str]:
    """Field name -> the string literal under it in the class body (one line of text each)."""
    body = ast.parse(inspect.cleandoc(inspect.getsource(cls))).body[0]
    assert isinstance(body, ast.ClassDef)
    docs = {}
    for field, doc in zip(body.body, body.body[1:], strict=False):
        if isinstance(field, ast.AnnAssign) and isinstance(doc, ast.Expr):
            assert isinstance(field.target, ast.Name)
            assert isinstance(doc.value, ast.Constant)
            docs[field.target.id] = " ".join(str(doc.value.value).split())
    return docs


def help_text(cls: type) -> str:
    """The settings, one a line with default and meaning, for `--help`."""
    docs = field_docs(cls)
    lines = []
    for field in dataclasses.fields(cls):
        if field.init:
            default = field.default
            if field.default_factory is not dataclasses.MISSING:
                default = field.default_factory()
            lines.append(f"  {field.name} = {default!r}\n      {docs.get(field.name, '')}")
    return "\n".join(lines)
