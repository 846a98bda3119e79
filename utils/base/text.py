"""Text from elsewhere, fit to be shown and stored: whole characters, a bounded length, no secrets.

Everything that a run prints or writes goes through `redact`: lines, errors, the log, trackers,
config.resolved.json, provenance.json and the states of checkpoints.
"""

import os
import re
from typing import Any

Json = Any
"""What a JSON text holds: None, a bool, a number, a text, or a list or dict of such."""

SHOWN = 200  # characters of a value in an error message
HIDDEN = "***"
NAME = r"token|secret|passw(?:or)?d|passphrase|credentials?|api_?key|access_?key|private_?key"
# A setting or parameter with such a name holds a secret; `max_new_tokens` and `..._env` do not.
SECRET_NAME = re.compile(rf"(?i)(?:.*[_.-])?(?:{NAME}|key|sig|signature|auth)")
# In the environment the word may stand anywhere (HF_TOKEN_READ), unless it names a place.
SECRET_VARIABLE = re.compile(rf"(?i)(?:^|_)(?:{NAME}|key|pat)(?:_|$)(?!.*(?:path|file|dir|sock)$)")
SHORTEST = 8  # characters of a variable's value: a shorter one would blot out ordinary words
# Linear in the text: what may repeat excludes what ends it, and can start at few places only.
USER_INFO = re.compile(r"(?<=://)[^\s/?#'\"]*(?=@)")  # https://user:password@host
PARAMETER = re.compile(r"([?&;]([\w.-]+)=)[^\s&;#'\"]+")  # ...?api_key=...
BEARER = re.compile(r"(?i)\b(bearer) +[\w.~+/=-]{16,}")
ISSUED = re.compile(r"\b(?:hf_|sk-|ghp_|github_pat_|xox[bp]-)[\w-]{20,}")  # by known services


URL = re.compile(r"(?<=://)([^/?#\s]*@)?([^?#\s]*)(\?[^#\s]*)?")  # up to the last @ of a host


def is_unicode(text: str) -> bool:
    """False for text with halves of surrogate pairs, which no tokenizer and no file takes."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def shown(value: object) -> str:
    """`value` in an error message: as Python writes it, cut at 200 characters."""
    try:
        text = repr(value)
    except ValueError:  # an integer of more digits than Python writes
        return "a number of thousands of digits"
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."


def counted(number: int, noun: str) -> str:
    """`1 prompt`, `1,200 prompts`."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def in_one_line(text: str) -> str:
    """The lines of someone else's message, without the empty ones."""
    return "; ".join(filter(None, text.splitlines()))


def redact(text: str) -> str:
    """`text` without passwords and tokens in addresses, API keys, and secrets of the environment.

    Hidden are the user part of an address, parameters with a telling name, bearer tokens, keys
    that begin as those of known services, and the values of variables such as HF_TOKEN.
    """
    for name, value in os.environ.items():
        if len(value) >= SHORTEST and value in text and SECRET_VARIABLE.search(name):
            text = text.replace(value, HIDDEN)
    text = USER_INFO.sub(HIDDEN, text)
    text = PARAMETER.sub(_parameter, text)
    return ISSUED.sub(HIDDEN, BEARER.sub(rf"\1 {HIDDEN}", text))


def _parameter(match: re.Match[str]) -> str:
    return match[1] + HIDDEN if SECRET_NAME.fullmatch(match[2]) else match[0]


def redacted(value: Json) -> Json:
    """A copy of a JSON value with every text redacted, and hidden where its key says it is secret.

    A name of a variable (a key that ends in _env) is no secret; its value is.
    """
    if isinstance(value, str):
        return redact(value)
    if isinstance(value, dict):
        return {
            key: HIDDEN
            if part and isinstance(part, str) and SECRET_NAME.fullmatch(key)
            else redacted(part)
            for key, part in value.items()
        }
    return [redacted(part) for part in value] if isinstance(value, list | tuple) else value


def filled(template: str, fields: dict[str, str]) -> str:
    """`template` with each {name} of `fields` replaced, all at once: what a field's text says is
    never taken for another one, and other braces stay."""
    return re.sub(rf"\{{({'|'.join(fields)})\}}", lambda match: fields[match[1]], template)


def without_secrets(value: Json) -> Json:
    """A copy of a value whose addresses lose password and query: for settings that hold some."""
    if isinstance(value, str):
        return URL.sub(lambda m: f"{'***@' if m[1] else ''}{m[2]}{'?***' if m[3] else ''}", value)
    if isinstance(value, list):
        return [without_secrets(part) for part in value]
    if isinstance(value, dict):
        return {key: without_secrets(part) for key, part in value.items()}
    return value
