"""Text from elsewhere, fit to be shown and stored: whole characters, a bounded length, no secrets.

Everything that a run prints or writes goes through `redact`: lines, errors, the log, trackers,
config.resolved.json, provenance.json and the states of checkpoints. What a terminal is shown goes
through `visible` as well, which is done in one place: say.py.
"""

import base64
import functools
import html
import json
import os
import re
from collections.abc import Callable, Iterable
from typing import Any

Json = Any
"""What a JSON text holds: None, a bool, a number, a text, or a list or dict of such."""

SHOWN = 200  # characters of a value in an error message
HIDDEN = "***"
STRONG = r"passw(?:or)?d|passphrase|api[_-]?key|access[_-]?key|private[_-]?key|client[_-]?secret"
STRONG_WORDS = ("passw", "passphrase", "api", "access", "private", "client")  # in all of these
NAME = rf"{STRONG}|token|secret|credentials?"
# A setting or parameter with such a name holds a secret; `max_new_tokens` and `..._env` do not.
SECRET_NAME = re.compile(
    rf"(?i)(?:.*[_.-])?(?:{NAME}|key|sig|signature|auth|authorization|(?:set-)?cookie)"
)
# In the environment the word may stand anywhere (HF_TOKEN_READ), unless it names a place.
SECRET_VARIABLE = re.compile(rf"(?i)(?:^|_)(?:{NAME}|key|pat)(?:_|$)(?!.*(?:path|file|dir|sock)$)")
SHORTEST = 8  # characters of a variable's value: a shorter one would blot out ordinary words
# Linear in the text: what may repeat excludes what ends it, and can start at few places only.
USER_INFO = re.compile(r"(?<=://)[^\s/?#'\"]*(?=@)")  # https://user:password@host
PARAMETER = re.compile(r"([?&;]([\w.-]+)=)[^\s&;#'\"]+")  # ...?api_key=...
BEARER = re.compile(r"(?i)\b(bearer) +[\w.~+/=-]{16,}")
BASIC = re.compile(r"(?i)\b(authorization['\"]?[:=]\s*[bB]?['\"]?basic) +[\w+/=-]+")
# {'x-api-key': 'abc'}, api_key='abc': what is in quotes behind such a name
QUOTED = re.compile(rf"(?i)\b({STRONG})(['\"]?\s*[:=]\s*b?)(['\"])[^'\"\s]+(?=\3)")
ISSUED_KEYS = (  # by known services
    *("hf_", "sk-", "sk_live_", "ghp_", "gho_", "github_pat_", "glpat-", "gsk_", "xai-"),
    *("xoxb-", "xoxp-", "AIza"),
)
ISSUED = re.compile(rf"\b(?:{'|'.join(ISSUED_KEYS)})[\w-]{{20,}}")
# What a terminal obeys, or what turns the order of its text round; a line's end and a tab stay.
OBEYED = re.compile("[\0-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


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


def visible(text: str) -> str:
    """`text` for a terminal: characters that would command it are shown as Python writes them.

    So no question, completion or server can clear the screen, set its title, write to the
    clipboard, go back over a line, or show text in another order than it stands in.
    """
    return OBEYED.sub(lambda m: repr(m[0])[1:-1], text.replace("\r\n", "\n"))


def json_line(value: Json, default: Callable[[Any], Json] | None = None) -> str:
    """JSON in one line, with every character that a terminal obeys as an escape: the same data."""
    text = json.dumps(value, ensure_ascii=False, default=default)
    return OBEYED.sub(lambda m: f"\\u{ord(m[0]):04x}", text)


_secrets: set[str] = set()  # all that were seen, since a variable may go and its value be quoted


def keep_secrets(values: Iterable[str]) -> None:
    """Hide these texts wherever they stand from now on; a short one where it is a whole word."""
    _secrets.update(filter(None, values))


def redact(text: str, secrets: Iterable[str] = ()) -> str:
    """`text` without passwords and tokens in addresses, API keys, and secrets of the environment.

    Hidden are the user part of an address, parameters with a telling name, bearer tokens, keys
    that begin as those of known services, the values of variables such as HF_TOKEN, what
    `keep_secrets` was told, and `secrets`. Of the last three also what URLs, JSON, Python's repr,
    HTML, base64 and hexadecimal make of them.
    """
    _look_for_secrets()
    return _redact(text, secrets)


def _look_for_secrets() -> None:
    """In the environment as it is now."""
    for name, value in os.environ.items():
        if len(value) >= SHORTEST and SECRET_VARIABLE.search(name):
            _secrets.add(value)


def _redact(text: str, secrets: Iterable[str] = ()) -> str:
    # `secrets` are of a text in which they are to be expected: there they count inside words too.
    every = {(secret, len(secret) < SHORTEST) for secret in _secrets}
    every |= {(secret, len(secret) < 4) for secret in secrets if secret}
    if every:
        text = _any_of(frozenset(every)).sub(HIDDEN, text)
    return _without_telling_forms(text)


def _without_telling_forms(text: str) -> str:
    """Without what is a secret by its place or its shape."""
    # Most texts have nothing of the kind, which is found out in a seventh of the time.
    folded = text.casefold().replace("\u0131", "i").replace("\u0307", "")  # as (?i) reads it
    if "://" in text:
        text = USER_INFO.sub(HIDDEN, text)
    text = PARAMETER.sub(_parameter, text)
    if any(word in folded for word in STRONG_WORDS):
        text = QUOTED.sub(rf"\1\2\3{HIDDEN}", text)
    if "authorization" in folded:
        text = BASIC.sub(rf"\1 {HIDDEN}", text)
    if "bearer" in folded:
        text = BEARER.sub(rf"\1 {HIDDEN}", text)
    if any(key in text for key in ISSUED_KEYS):
        text = ISSUED.sub(HIDDEN, text)
    return text


@functools.lru_cache(maxsize=64)
def _any_of(secrets: frozenset[tuple[str, bool]]) -> re.Pattern[str]:
    """Finds each (secret, only as a whole word) in any form; a longer one before its beginning."""
    longest_first = sorted(secrets, key=lambda pair: (-len(pair[0]), *pair))
    return re.compile("|".join(form for pair in longest_first for form in _forms(*pair)))


def _forms(secret: str, whole_word: bool) -> list[str]:
    """Patterns of a secret as it is, with any of its characters escaped, and in base64 and hex."""
    plain = "".join(map(_character, secret))
    if whole_word:
        plain = rf"(?:(?<!\w)|(?<=%[\da-fA-F]{{2}})){plain}(?!\w)"
    data = secret.encode(errors="surrogateescape")
    encoded = [_base64(text) for text in _alignments(data) if len(text) >= 6]
    return [plain, *sorted(encoded), f"(?i:{data.hex()})"] if len(data) >= 4 else [plain]


SHORT = {"\n": "n", "\t": "t", "\r": "r"}


def _character(character: str) -> str:
    """A pattern of one character: itself, or as URLs, JSON, repr and HTML write it."""
    data, code = character.encode(errors="surrogateescape"), ord(character)
    ways = [re.escape(character), "(?i:" + "".join(f"%(?:25)*{byte:02x}" for byte in data) + ")"]
    if character.isalnum() and code < 128:
        return f"(?:{'|'.join(ways)})"
    ways += [rf"\\+{re.escape(character)}", re.escape(html.escape(character)), f"&#{code};"]
    ways += ["(?i:" + "".join(rf"\\+x{byte:02x}" for byte in data) + ")"]
    ways += [rf"(?i:\\+x{code:02x})", rf"(?i:\\+u{code:04x})", rf"(?i:&#x0*{code:x};)"]
    ways += [rf"\\+{SHORT[character]}"] if character in SHORT else []
    ways += [r"\+"] if character == " " else []
    return f"(?:{'|'.join(ways)})"


def _alignments(data: bytes) -> set[str]:
    """What of base64 does not depend on the bytes around: there are three ways to begin."""
    found = set()
    for before in range(3):
        text = base64.b64encode(bytes(before) + data).decode().rstrip("=")
        found.add(text[(0, 2, 3)[before] : len(text) - bool((before + len(data)) % 3)])
    return found


def _base64(text: str) -> str:
    """Also in the alphabet for URLs, with padding."""
    return re.escape(text).replace(r"\+", "[+-]").replace("/", "[/_]") + "={0,2}"


def _parameter(match: re.Match[str]) -> str:
    return match[1] + HIDDEN if SECRET_NAME.fullmatch(match[2]) else match[0]


def redacted(value: Json) -> Json:
    """A copy of a JSON value with every text redacted, and hidden where its key says it is secret.

    A name of a variable (a key that ends in _env) is no secret; its value is.
    """
    _look_for_secrets()  # once: for each of its texts it would take most of the time
    return _redacted(value)


def _redacted(value: Json) -> Json:
    if isinstance(value, str):
        return _redact(value)
    if isinstance(value, dict):
        return {
            _redact(key) if isinstance(key, str) else key: _hidden(part)
            if isinstance(key, str) and SECRET_NAME.fullmatch(key)
            else _redacted(part)
            for key, part in value.items()
        }
    return [_redacted(part) for part in value] if isinstance(value, list | tuple) else value


def _hidden(value: Json) -> Json:
    """The value of a key that says it is secret; what is empty, true or false tells nothing."""
    if isinstance(value, list | tuple):
        return [_hidden(part) for part in value]
    if isinstance(value, dict):
        return {key: _hidden(part) for key, part in value.items()}
    return value if value is None or value == "" or isinstance(value, bool) else HIDDEN


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
