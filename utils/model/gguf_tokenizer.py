"""Rebuild the tokenizer of a GGUF file as tokenizer.json and tokenizer_config.json.

Two kinds are common: byte-level BPE ("gpt2"), which first splits text by regular expressions that
the file only names, and SentencePiece BPE ("llama"), whose merges follow from the tokens' scores.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from ..base.errors import UserError, reason
from .gguf_file import GGUF
from .shape import JsonObject

if TYPE_CHECKING:
    from tokenizers import AddedToken, Tokenizer
    from tokenizers.pre_tokenizers import PreTokenizer

UNKNOWN, CONTROL, USER_DEFINED = 2, 3, 4  # of tokenizer.ggml.token_type
ENDS_OF_TURNS = (  # llama.cpp stops at these too, whatever the metadata say
    "<|eot_id|>", "<|eom_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>", "<|endoftext|>",
)  # fmt: skip

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
DIGIT = r"\p{N}"
TAIL = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
SHORT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
LLAMA3 = rf"{SHORT}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}|{TAIL}"
QWEN2 = rf"{SHORT}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}|{TAIL}"
UPPER, LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
CASED_TAIL = TAIL.replace(r"[\r\n]*", r"[\r\n/]*")
TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{UPPER}*{LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{UPPER}+{LOWER}*"
    rf"|\p{{N}}|{CASED_TAIL}"
)
GPT4O = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{UPPER}*{LOWER}+{SHORT}?|[^\r\n\p{{L}}\p{{N}}]?{UPPER}+{LOWER}*{SHORT}?"
    rf"|\p{{N}}{{1,3}}|{CASED_TAIL}"
)
DEEPSEEK3 = (
    r"\p{N}{1,3}",
    "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+",
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
)
DEEPSEEK_CODER = (
    r"[\r\n]",
    r"\s?\p{L}+",
    r"\s?\p{P}+",
    "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+",
    r"\p{N}",
)
DEFAULT = (
    r"[\p{P}\$\+<=>\^~\|]+",
    GPT2.removesuffix(r"|\s+"),
    r"\p{N}+",
    r"[0-9][0-9][0-9]",
)


class Splitting(NamedTuple):
    """How a named pre-tokenizer cuts text before merging."""

    patterns: tuple[str, ...]
    """Regular expressions, each applied to the pieces that the one before left."""
    whole_words: bool = False
    """A piece that is a token is that token, whatever the merges would make of it."""
    add_bos: bool = False
    """Where the metadata do not say."""
    nfc: bool = False
    """The model's own tokenizer composes characters (e and an accent) first."""


LLAMA3_LIKE = Splitting((LLAMA3,), whole_words=True, add_bos=True)
QWEN2_LIKE = Splitting((QWEN2,), nfc=True)
SPLITTINGS = {
    "default": Splitting(DEFAULT),
    **dict.fromkeys(("llama3", "llama-v3", "llama-bpe", "falcon3", "midm-2.0"), LLAMA3_LIKE),
    **dict.fromkeys(("smaug-bpe", "dbrx"), Splitting((LLAMA3,))),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen", "megrez", "kormo", "a.x-4.0"), QWEN2_LIKE),
    "stablelm2": Splitting((QWEN2,)),
    "tekken": Splitting((TEKKEN,), whole_words=True, add_bos=True),
    "gpt-4o": Splitting((GPT4O,)),
    **dict.fromkeys(("gpt-2", "phi-2", "mpt", "olmo", "jais", "trillion"), Splitting((GPT2,))),
    **dict.fromkeys(
        ("smollm", "starcoder", "codeshell", "refact", "command-r", "exaone", "minerva-7b"),
        Splitting((DIGIT, GPT2)),
    ),
    "deepseek-coder": Splitting(DEEPSEEK_CODER),
    "deepseek-v3": Splitting(DEEPSEEK3),
}


def write_tokenizer(file: GGUF, folder: Path) -> None:
    """Raises UserError where the file has no tokenizer, or one of another kind."""
    tokens = tokens_of(file)
    kind = file.get("tokenizer.ggml.model", str)
    builders = {"gpt2": byte_level, "llama": sentence_piece}
    if kind not in builders:
        raise UserError(
            f"{file.path} has a tokenizer of the kind {kind!r}; the kinds that can be rebuilt are "
            "'gpt2' (byte-level BPE) and 'llama' (SentencePiece)"
        )
    try:
        tokenizer = builders[kind](file, tokens)
        tokenizer.add_tokens(added_tokens(file, tokens))
        add_ends(file, tokens, tokenizer)
        tokenizer.save(str(folder / "tokenizer.json"))
    except UserError:
        raise
    except Exception as error:  # what `tokenizers` raises is no narrower
        raise UserError(f"{file.path} has a damaged tokenizer: {reason(error)}") from error
    settings = tokenizer_config(file, tokens)
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2), encoding="utf-8")


def tokens_of(file: GGUF) -> list[str]:
    tokens = file.texts("tokenizer.ggml.tokens")
    if not tokens:
        raise UserError(
            f"{file.path} has no tokenizer (tokenizer.ggml.tokens); get a complete file"
        )
    return tokens


def byte_level(file: GGUF, tokens: list[str]) -> Tokenizer:
    from tokenizers import Tokenizer, decoders, models, normalizers

    how = splitting(file)
    pairs = [merge.split(" ", 1) for merge in file.texts("tokenizer.ggml.merges")]
    merges = [(left, right) for left, right in pairs]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, ignore_merges=how.whole_words))
    if how.nfc:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizer(how)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def pre_tokenizer(how: Splitting) -> PreTokenizer:
    from tokenizers import Regex, pre_tokenizers

    steps = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in how.patterns]
    bytes_only = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([*steps, bytes_only])


def splitting(file: GGUF) -> Splitting:
    """Raises UserError where the metadata name none that is known here."""
    name = file.get("tokenizer.ggml.pre", str)
    if name is None:
        raise UserError(
            f"{file.path} does not name its pre-tokenizer (tokenizer.ggml.pre), as files from "
            "before May 2024: numbers and words would be cut wrongly. Get a newer file"
        )
    if name not in SPLITTINGS:
        raise UserError(
            f"{file.path} has the pre-tokenizer {name!r}, which is not known here; known are "
            f"{', '.join(SPLITTINGS)}"
        )
    return SPLITTINGS[name]


def sentence_piece(file: GGUF, tokens: list[str]) -> Tokenizer:
    from tokenizers import Tokenizer, decoders, models, normalizers

    vocabulary = {token: number for number, token in enumerate(tokens)}
    tokenizer = Tokenizer(
        models.BPE(
            vocabulary,
            merges_by_rank(vocabulary, ranks(file, tokens)),
            unk_token=token_named(file, tokens, "unknown"),
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    spaces = normalizers.Replace(" ", "▁")
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if space_first(file):
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), spaces])
        tokenizer.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)])
    else:
        tokenizer.normalizer = spaces
        tokenizer.decoder = decoders.Sequence(steps)
    return tokenizer


def is_gemma(file: GGUF) -> bool:
    return file.need("general.architecture", str).startswith("gemma")


def space_first(file: GGUF) -> bool:
    """Does a text count as beginning with a space?"""
    said = file.get("tokenizer.ggml.add_space_prefix", bool)
    return not is_gemma(file) if said is None else said


def ranks(file: GGUF, tokens: list[str]) -> list[float]:
    """Which tokens merge first: by score; Gemma's follow their order, which the scores do not."""
    scores = file.numbers("tokenizer.ggml.scores")
    if is_gemma(file):
        return [float(number) for number in range(len(tokens))]
    if len(scores) != len(tokens):
        raise UserError(f"{file.path} has {len(scores)} scores for {len(tokens)} tokens")
    return [-score for score in scores]


def merges_by_rank(vocabulary: dict[str, int], rank: list[float]) -> list[tuple[str, str]]:
    """Every way to put a token together from two others, the token of the lowest rank first."""
    found = [
        (rank[number], number, vocabulary[token[:cut]], token[:cut], token[cut:])
        for token, number in vocabulary.items()
        for cut in range(1, len(token))
        if token[:cut] in vocabulary and token[cut:] in vocabulary
    ]
    return [(left, right) for *_, left, right in sorted(found)]


def added_tokens(file: GGUF, tokens: list[str]) -> list[AddedToken]:
    """Tokens that are found in a text whole: special ones, and those the maker defined."""
    from tokenizers import AddedToken

    kinds = file.numbers("tokenizer.ggml.token_type")
    return [
        AddedToken(token, normalized=False, special=kind != USER_DEFINED)
        for token, kind in zip(tokens, kinds, strict=False)
        if kind in (UNKNOWN, CONTROL, USER_DEFINED) and token
    ]


def token_number(file: GGUF, tokens: list[str], role: str) -> int | None:
    key = f"tokenizer.ggml.{role}_token_id"
    number = file.get(key, int)
    if number is not None and not 0 <= number < len(tokens):
        raise UserError(f"{file.path}: {key} = {number} is outside the {len(tokens)} tokens")
    return number


def token_named(file: GGUF, tokens: list[str], role: str) -> str | None:
    """The token of a role (bos, eos, unknown, padding); None where the metadata name none."""
    number = token_number(file, tokens, role)
    return None if number is None else tokens[number]


def adds(file: GGUF, role: str) -> bool:
    """Does every text get this token at its begin (bos) or end (eos)?"""
    said = file.get(f"tokenizer.ggml.add_{role}_token", bool)
    if said is not None or role == "eos":
        return bool(said)
    if file.get("tokenizer.ggml.model", str) == "llama":
        return True
    return splitting(file).add_bos


def add_ends(file: GGUF, tokens: list[str], tokenizer: Tokenizer) -> None:
    """Let the tokenizer put a token before or after every text."""
    from tokenizers import processors

    before, after = (end_of_text(file, tokens, role) for role in ("bos", "eos"))
    if before or after:
        text = [*before.values(), "$A", *after.values()]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=text,
            pair=[*text, "$B:1"],
            special_tokens=[(token, number) for number, token in (before | after).items()],
        )


def end_of_text(file: GGUF, tokens: list[str], role: str) -> dict[int, str]:
    number = token_number(file, tokens, role)
    return {number: tokens[number]} if number is not None and adds(file, role) else {}


def tokenizer_config(file: GGUF, tokens: list[str]) -> JsonObject:
    roles = {"bos": "bos", "eos": "eos", "unknown": "unk", "padding": "pad"}
    named = {f"{short}_token": token_named(file, tokens, role) for role, short in roles.items()}
    config: JsonObject = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_max_length": context_length(file),
        **{key: token for key, token in named.items() if token is not None},
    }
    if template := chat_template(file):
        config["chat_template"] = template
    return config


def context_length(file: GGUF) -> int:
    return file.need(f"{file.need('general.architecture', str)}.context_length", int)


def chat_template(file: GGUF) -> str | list[dict[str, str]] | None:
    """The one template, or all of them by name where the file has several."""
    template = file.get("tokenizer.chat_template", str)
    names = file.texts("tokenizer.chat_templates")
    others = {name: file.get(f"tokenizer.chat_template.{name}", str) for name in names}
    if template is None or not others:
        return template
    every = {"default": template, **others}
    return [{"name": name, "template": text} for name, text in every.items() if text is not None]


def end_tokens(file: GGUF) -> list[int]:
    """The tokens that end an answer, the file's own first."""
    tokens = tokens_of(file)
    named = [token_number(file, tokens, role) for role in ("eos", "eot", "eom")]
    kinds = file.numbers("tokenizer.ggml.token_type")
    usual = [
        number
        for number, (token, kind) in enumerate(zip(tokens, kinds, strict=False))
        if kind in (CONTROL, USER_DEFINED) and token in ENDS_OF_TURNS
    ]
    return list(dict.fromkeys(number for number in (*named, *usual) if number is not None))
