"""What calls of tools look like in what a model says: mlx-lm's parsers, by the model's template.

They are read here without mlx-lm itself, since the processes that run tools have no MLX.
"""

import importlib
import importlib.util
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace

from ..base.errors import UserError
from ..data.tokenizer import Tokenizer

LLAMA = "llama3_json"
"""Llama 3.1's and later ones' calls, which mlx-lm has no parser for: JSON, and nothing else."""
LLAMA_STARTS = "<|python_tag|>", "ipython"
PACKAGE = "mlx_lm_tool_parsers"  # they import each other: a name for their folder


class NoCall(ValueError):
    """Something begins as a call, and is none."""


@dataclass(frozen=True)
class Call:
    """Of a tool, by the model."""

    name: str
    arguments: dict[str, object]


@dataclass(frozen=True)
class Parser:
    """Finds calls in the text of a turn: between `start` and `end`, or all of it without a start.

    Args:
        parse: What is between, and the tools' schemas.
    """

    start: str
    end: str
    parse: Callable[[str, Sequence[dict]], object]

    def calls(self, text: str, schemas: Sequence[dict]) -> list[Call]:
        """In order.

        Raises:
            NoCall: one that is not as it must be. TRL takes the whole turn for a text then.
        """
        found: list[Call] = []
        for part in self.parts(text):
            try:
                parsed = self.parse(part, schemas)
            except Exception as error:  # of any kind: they are written for what models should say
                raise NoCall(str(error)) from error
            found += map(as_call, parsed if isinstance(parsed, list) else [parsed])
        return found

    def parts(self, text: str) -> list[str]:
        """What is between start and end; a call that does not end is none."""
        if not self.start:
            return [text]
        _, *parts = text.split(self.start)
        if not self.end:
            return [self.start.join(parts)] if parts else []
        return [part.partition(self.end)[0] for part in parts if self.end in part]


def as_call(parsed: object) -> Call:
    """What a parser made of a call, checked. Raises NoCall."""
    name = parsed.get("name") if isinstance(parsed, Mapping) else None
    if not isinstance(parsed, Mapping) or not isinstance(name, str):
        raise NoCall("a call names no tool")
    arguments = parsed.get("arguments")
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except (ValueError, RecursionError):
            raise NoCall("its arguments are no JSON") from None
    if arguments is None:
        arguments = {}
    if not isinstance(arguments, dict) or not all(isinstance(key, str) for key in arguments):
        raise NoCall("its arguments have no names")
    return Call(name, arguments)


def named(tokenizer: Tokenizer, options: Mapping[str, object]) -> str:
    """The name of the parser for a model's chat template (`options` may have another one).

    Raises:
        UserError: none is known.
    """
    from mlx_lm import tokenizer_utils  # not in the processes of tools

    template = options.get("chat_template") or getattr(tokenizer, "chat_template", "")
    own = getattr(tokenizer, "tool_parser", None)
    if own is not None and not options.get("chat_template"):
        return str(own.__module__).rpartition(".")[2]
    words = getattr(tokenizer, "get_vocab", dict)
    given = SimpleNamespace(chat_template=template, get_vocab=words)
    found: str | None = tokenizer_utils._infer_tool_parser(given)
    if found is None and any(start in str(template) for start in LLAMA_STARTS):
        found = LLAMA
    if found is None:
        raise UserError(
            "the chat template shows no way to call tools that is known here (mlx-lm's "
            f"{', '.join(known())}; {LLAMA}): set chat_template to a Jinja file of a model that "
            "has one"
        )
    return found


def folder() -> Path:
    found = importlib.util.find_spec("mlx_lm")
    assert found is not None
    assert found.origin is not None
    return Path(found.origin).parent / "tool_parsers"


def known() -> list[str]:
    """Those of mlx-lm."""
    return sorted(file.stem for file in folder().glob("[!_]*.py"))


def load(name: str) -> Parser:
    """The parser of this name."""
    if name == LLAMA:
        return Parser("", "", json_calls)
    if PACKAGE not in sys.modules:
        sys.modules[PACKAGE] = ModuleType(PACKAGE)
        sys.modules[PACKAGE].__path__ = [str(folder())]
    module = importlib.import_module(f"{PACKAGE}.{name}")
    return Parser(module.tool_call_start, module.tool_call_end, module.parse_tool_call)


def json_calls(text: str, _: Sequence[dict]) -> list[dict]:
    """Objects with name and parameters, one after the other; none in any other text.

    Raises:
        ValueError: an object that ends too early, or something behind it.
    """
    text = text.strip().removeprefix("<|python_tag|>").strip()
    found: list[dict] = []
    while text.startswith("{"):
        call, end = json.JSONDecoder().raw_decode(text)
        if "name" not in call:
            return []
        found.append({"name": call["name"], "arguments": call.get("parameters", {})})
        text = text[end:].lstrip(" \n;")
    if found and text:
        raise ValueError("there is a text behind a call")
    return found
