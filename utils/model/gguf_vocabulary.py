"""Say in GGUF's metadata what a model folder's tokenizer does: the way back of gguf_tokenizer.

llama.cpp has the regular expressions that split a text by the names of models. The name that fits
is found by trying: it splits a text with everything in it as the tokenizer does.
"""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, NamedTuple

from ..base.errors import UserError
from .gguf_tokenizer import CONTROL, ENDS_OF_TURNS, SPLITTINGS, USER_DEFINED, pre_tokenizer
from .shape import JsonObject

if TYPE_CHECKING:
    from mlx_lm.tokenizer_utils import TokenizerWrapper
    from tokenizers import Tokenizer

NORMAL, UNKNOWN, UNUSED, BYTE = 1, 2, 5, 6
BYTES = {f"<0x{number:02X}>" for number in range(256)}
NEVER = -1e6  # the score of a token that nothing is merged into
# One name for each way to split, the usual ones first: other names may mean it, too.
NAMES = (
    "smollm", "llama-bpe", "qwen2", "gpt-2", "tekken", "gpt-4o", "deepseek-v3", "deepseek-coder",
    "smaug-bpe", "stablelm2", "default",
)  # fmt: skip
PROBES = (
    "It's 12345 apples, they'LL cost $1,234.50!  (Don't ask.)\n\n\n\tx2 = y_1**2 / 0x1F # really?",
    "  two spaces before, two after  ", " \n \n\n \t \t\t\n  \n   \n", "a\r\nb\r\n\r\nc  d   e",
    "3 33 333 3333 33333 3.3 3..3 3...3 \u0663 \u2167 \u00bd",
    "camelCaseHTTPServer snake_case f(x[0]){};",
    "Straße über naïve façade Ωμέγα Привет мир",
    "עברית العربية हिन्दी ไทย 한국어 日本語テキスト 中文字",
    "''''''```````\"\"\"\"......!!!!!!?????? ------====== I've we'D you'Re 'tis 'M",
    "😀👍🏽 🇩🇪 🚀\u200d🌫️ no\u00a0break\u3000wide\u200bzero", "/path/to/file.py:12: a//b <tag/> a-b",
)  # fmt: skip


class Vocabulary(NamedTuple):
    """The metadata of a tokenizer, and what a person should know of them."""

    metadata: JsonObject
    notes: list[str]


def describe(tokenizer: TokenizerWrapper, rows: int, source: str) -> Vocabulary:
    """What a GGUF file says of the tokenizer of a model with `rows` embeddings.

    Raises:
        UserError: a tokenizer that llama.cpp does not have, or one that does not fit the model.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise UserError(
            f"{source}: the tokenizer {type(tokenizer).__name__} has no tokenizer.json, which a "
            "GGUF file is made from"
        )
    content = json.loads(backend.to_str())
    tokens, kinds = tokens_of(content, rows, source)
    if content["model"].get("type") != "BPE":
        raise UserError(
            f"{source} has a tokenizer of the kind {content['model'].get('type')}; those that a "
            "GGUF file can hold here are byte-level BPE and SentencePiece's BPE"
        )
    builder = sentence_piece if content["model"].get("byte_fallback") else byte_level
    metadata = builder(backend, content, tokens, kinds, source)
    added = around(backend)
    ends, notes = end_tokens(tokenizer, tokens, kinds)
    roles = {
        "bos": first_number(tokenizer.bos_token_id, added[0]),
        "unknown": tokenizer.unk_token_id,
        "padding": tokenizer.pad_token_id,
        **ends,
    }
    for role, number in roles.items():
        if number is not None:
            metadata[f"tokenizer.ggml.{role}_token_id"] = int(number)
    metadata |= added_ends(added, roles, source)
    template, about = chat_template(tokenizer)
    return Vocabulary(metadata | template, [*notes, *about])


def tokens_of(content: JsonObject, rows: int, source: str) -> tuple[list[str], list[int]]:
    """Every token in the order of its id, with its kind; ids without one are filled."""
    vocabulary: dict[str, int] = dict(content["model"]["vocab"])
    kinds = dict.fromkeys(vocabulary.values(), NORMAL)
    for entry in content["added_tokens"]:
        vocabulary[entry["content"]] = entry["id"]
        kinds[entry["id"]] = CONTROL if entry["special"] else USER_DEFINED
    beyond = [token for token, number in vocabulary.items() if number >= rows]
    if beyond:
        raise UserError(
            f"{source}: the tokenizer has the token {beyond[0]!r} with the id "
            f"{vocabulary[beyond[0]]}, but the model has embeddings for {rows} tokens only"
        )
    tokens = [f"[PAD{number}]" for number in range(rows)]
    for token, number in vocabulary.items():
        tokens[number] = token
    return tokens, [kinds.get(number, UNUSED) for number in range(rows)]


def byte_level(
    backend: Tokenizer, content: JsonObject, tokens: list[str], kinds: list[int], source: str
) -> JsonObject:
    model = content["model"]
    steps = (content.get("pre_tokenizer"), content.get("decoder"))
    other = model.get("continuing_subword_prefix") or model.get("end_of_word_suffix")
    if other or any("ByteLevel" not in json.dumps(step) for step in steps):
        raise UserError(
            f"{source} has a BPE tokenizer that is neither byte-level nor SentencePiece's"
        )
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": name_of_splitting(backend, content, source),
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.merges": merges,
    }


def name_of_splitting(backend: Tokenizer, content: JsonObject, source: str) -> str:
    """The name under which llama.cpp splits texts as this tokenizer does."""
    normalizer = content.get("normalizer")
    composes = normalizer == {"type": "NFC"}
    if normalizer and not composes:
        raise UserError(
            f"{source} has a tokenizer that changes texts by {normalizer.get('type')} first, which "
            "llama.cpp does not"
        )
    whole_words = bool(content["model"].get("ignore_merges"))
    found = names_that_split_so(backend, whole_words)
    if not found:
        words = " (and takes whole words first)" if whole_words else ""
        raise UserError(
            f"{source} has a tokenizer that splits texts{words} in a way that has no name here; "
            f"known are {', '.join(NAMES)}. llama.cpp's convert_hf_to_gguf.py knows more"
        )
    return next((name for name in found if SPLITTINGS[name].nfc == composes), found[0])


def names_that_split_so(backend: Tokenizer, whole_words: bool) -> list[str]:
    wanted = [backend.pre_tokenizer.pre_tokenize_str(text) for text in PROBES]
    return [
        name
        for name in NAMES
        if SPLITTINGS[name].whole_words == whole_words
        and [pre_tokenizer(SPLITTINGS[name]).pre_tokenize_str(text) for text in PROBES] == wanted
    ]


def sentence_piece(
    backend: Tokenizer, content: JsonObject, tokens: list[str], kinds: list[int], source: str
) -> JsonObject:
    """Scores take the place of merges: what merges first has the higher one."""
    if missing := BYTES - set(tokens):
        raise UserError(
            f"{source} has a tokenizer with byte_fallback, but no token {min(missing)} for it"
        )
    score: dict[str, float] = {}
    for merge in content["model"]["merges"]:
        left, right = merge.split(" ", 1) if isinstance(merge, str) else merge
        score.setdefault(left + right, -float(len(score)))
    scores = [score.get(token, NEVER if len(token) > 1 else 0.0) for token in tokens]
    mark_pieces(tokens, kinds, content["model"].get("unk_token"))
    first = backend.encode("a", add_special_tokens=False).tokens[:1]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.add_space_prefix": bool(first) and first[0].startswith("▁"),
    }


def mark_pieces(tokens: list[str], kinds: list[int], unknown: str | None) -> None:
    """Give SentencePiece's own kinds of tokens theirs."""
    for number, token in enumerate(tokens):
        if token == unknown:
            kinds[number] = UNKNOWN
        elif token in BYTES:
            kinds[number] = BYTE
        elif kinds[number] == USER_DEFINED:  # llama.cpp looks for these before it marks spaces
            tokens[number] = token.replace("▁", " ")


def around(backend: Tokenizer) -> tuple[list[int], list[int]]:
    """The ids that the tokenizer puts before and after every text."""
    bare = backend.encode("a", add_special_tokens=False).ids
    whole = backend.encode("a").ids
    start = next(
        (n for n in range(len(whole) - len(bare) + 1) if whole[n : n + len(bare)] == bare), 0
    )
    return whole[:start], whole[start + len(bare) :]


def first_number(number: int | None, otherwise: list[int]) -> int | None:
    return otherwise[0] if number is None and otherwise else number


def added_ends(
    added: tuple[list[int], list[int]], roles: dict[str, int | None], source: str
) -> JsonObject:
    """Whether llama.cpp is to put a token before and after every text."""
    before, after = added
    if before not in ([], [roles["bos"]]) or after not in ([], [roles["eos"]]):
        raise UserError(
            f"{source} has a tokenizer that puts the ids {before} before and {after} after every "
            f"text; llama.cpp can put {roles['bos']} (bos) before and {roles['eos']} (eos) after"
        )
    return {
        "tokenizer.ggml.add_bos_token": bool(before),
        "tokenizer.ggml.add_eos_token": bool(after),
    }


def end_tokens(
    tokenizer: TokenizerWrapper, tokens: list[str], kinds: list[int]
) -> tuple[dict[str, int], list[str]]:
    """The tokens that end an answer by their roles; and those that llama.cpp has no role for."""
    ends = sorted(number for number in tokenizer.eos_token_ids if 0 <= number < len(tokens))
    ends.sort(key=lambda number: number != tokenizer.eos_token_id)
    known = [n for n in ends[1:] if tokens[n] in ENDS_OF_TURNS and kinds[n] in (3, 4)]
    others = [n for n in ends[1:] if n not in known]
    roles = dict(zip(("eos", "eot", "eom"), [*ends[:1], *others], strict=False))
    lost = [tokens[n] for n in others[2:]]
    note = f"llama.cpp will not stop at {', '.join(lost)}: a GGUF file names three such tokens"
    return roles, [note] if lost else []


def chat_template(tokenizer: TokenizerWrapper) -> tuple[JsonObject, list[str]]:
    """The template or, where there are several, all of them by name."""
    template = getattr(tokenizer, "chat_template", None)
    if isinstance(template, dict):
        others = {name: text for name, text in template.items() if name != "default"}
        found: JsonObject = {f"tokenizer.chat_template.{n}": text for n, text in others.items()}
        if others:
            found["tokenizer.chat_templates"] = list(others)
        if "default" in template:
            found["tokenizer.chat_template"] = template["default"]
        return {k: v for k, v in found.items() if usable(k)}, []
    if isinstance(template, str):
        return {"tokenizer.chat_template": template}, []
    return {}, ["the tokenizer has no chat template in Jinja, and so has the file"]


def usable(key: str) -> bool:
    """A name that can stand in a key."""
    return re.fullmatch(r"[\w.]+", key) is not None
