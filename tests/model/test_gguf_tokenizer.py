"""The rebuilt tokenizer reads as the original does: transformers' own, or SentencePiece."""

import io
import json
import unicodedata

import pytest
import sentencepiece
from conftest import ROOT, make_tokenizer
from gguf_layout import NORMAL, USER_DEFINED
from mlx_lm.tokenizer_utils import load as load_tokenizer
from transformers import AutoTokenizer

from utils.base.errors import UserError
from utils.model import gguf_tokenizer
from utils.model.gguf_file import GGUF

TEXTS = [
    "Hello  world 12345, it's  é ü 日本\n\n\ttabs <|im_end|> don't",
    "  leading", "trailing  ", "a\r\n b\n\n\nc   d", "1,234.56 + 7 = 8^2 (x_1)",
    "I'LL DON'T We'Re", "<|im_start|>user\nHi<|im_end|>\n", "ÀÉîõü ß Straße ñ e\u0301", "😀👍🏽 🇩🇪",
    "Ωμέγα Привет мир עברית العربية हिन्दी ไทย 한국어",
    "def f(x):\n    return x**2 # comment\n\tif not x:",
    "½ ² ٣ Ⅷ ①②", "\u00a0no\u3000break\u200bspace", "camelCaseHTTPServer snake_case", " ", "\n", "",
    "..!?--“quoted”", "0x1F600 3e-5 1/2 50% $20",
]  # fmt: skip


def rebuild(folder, **metadata):
    """The tokenizer that `metadata` describe, as transformers loads it."""
    values = {key.replace("__", "."): value for key, value in metadata.items()}
    kept = {key: value for key, value in values.items() if value is not None}
    folder.mkdir(parents=True, exist_ok=True)
    file = GGUF(folder / "m.gguf", kept, {})
    gguf_tokenizer.write_tokenizer(file, folder)
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def bytes_bpe(tmp_path_factory):
    """Metadata of a small byte-level BPE, and the original."""
    folder = tmp_path_factory.mktemp("tokenizer")
    make_tokenizer(folder)
    content = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = content["model"]["vocab"]
    tokens = sorted(vocabulary, key=vocabulary.get)
    kinds = [3 if token.startswith("<|") else NORMAL for token in tokens]
    metadata = {
        "general__architecture": "llama",
        "llama__context_length": 512,
        "tokenizer__ggml__model": "gpt2",
        "tokenizer__ggml__pre": "smollm",
        "tokenizer__ggml__tokens": tokens,
        "tokenizer__ggml__token_type": kinds,
        "tokenizer__ggml__merges": [" ".join(merge) for merge in content["model"]["merges"]],
        "tokenizer__ggml__eos_token_id": 2,
        "tokenizer__ggml__bos_token_id": 1,
    }
    return metadata, AutoTokenizer.from_pretrained(folder)


def test_byte_level_bpe_reads_as_the_original(bytes_bpe, tmp_path):
    metadata, original = bytes_bpe
    found = rebuild(tmp_path, **metadata, tokenizer__chat_template="{{ messages }}")
    for text in TEXTS:
        ids = original.encode(text)
        assert found.encode(text) == ids, text
        assert found.decode(ids) == text == original.decode(ids)
    assert (found.eos_token, found.bos_token) == ("<|im_end|>", "<|im_start|>")
    assert found.model_max_length == 512
    assert found.chat_template == "{{ messages }}"
    assert found.decode(found.encode("a<|im_end|>"), skip_special_tokens=True) == "a"
    # mlx-lm shows text while it comes only if it knows the decoder.
    assert type(load_tokenizer(tmp_path).detokenizer).__name__ == "BPEStreamingDetokenizer"


@pytest.mark.parametrize(
    ("pre", "text", "pieces"),
    [
        ("smollm", "it's 123 x2", ["it", "'s", "Ġ", "1", "2", "3", "Ġx", "2"]),
        ("gpt-2", "it's 123 x2", ["it", "'s", "Ġ123", "Ġx", "2"]),
        ("llama-bpe", "IT'S 12345 (x)", ["IT", "'S", "Ġ", "123", "45", "Ġ(", "x", ")"]),
        ("qwen2", "IT'S 123\n\n x", ["IT", "'S", "Ġ", "1", "2", "3", "ĊĊ", "Ġx"]),
        ("tekken", "camelCase 12", ["camel", "Case", "Ġ", "1", "2"]),
        ("gpt-4o", "camelCase's 1234", ["camel", "Case's", "Ġ", "123", "4"]),
        ("deepseek-v3", "a 1234,b", ["a", "Ġ", "123", "4", ",b"]),
        ("deepseek-coder", "a (12)\nb", ["a", "Ġ(", "1", "2", ")", "Ċ", "b"]),
        ("default", "it's 1234 =x", ["it", "'", "s", "Ġ", "123", "4", "Ġ", "=", "x"]),
    ],
)
def test_named_pre_tokenizers_split_text(bytes_bpe, tmp_path, pre, text, pieces):
    metadata = bytes_bpe[0] | {"tokenizer__ggml__pre": pre}
    backend = rebuild(tmp_path, **metadata).backend_tokenizer
    assert [piece for piece, _ in backend.pre_tokenizer.pre_tokenize_str(text)] == pieces


@pytest.mark.parametrize("pre", gguf_tokenizer.SPLITTINGS)
def test_every_pre_tokenizer_gives_a_text_back(bytes_bpe, tmp_path, pre):
    found = rebuild(tmp_path, **(bytes_bpe[0] | {"tokenizer__ggml__pre": pre}))
    for text in TEXTS:
        ids = found.encode(text, add_special_tokens=False)
        assert unicodedata.normalize("NFC", found.decode(ids)) == unicodedata.normalize("NFC", text)


def test_whole_words_come_before_merges(bytes_bpe, tmp_path):
    """Llama 3 has tokens that its merges do not make."""
    metadata = dict(bytes_bpe[0], tokenizer__ggml__add_bos_token=False)
    tokens = [*metadata["tokenizer__ggml__tokens"], "zyzzyva"]
    metadata |= {"tokenizer__ggml__tokens": tokens}
    metadata |= {"tokenizer__ggml__token_type": [*metadata["tokenizer__ggml__token_type"], 1]}
    for pre, count in (("llama-bpe", 1), ("smaug-bpe", 7)):
        found = rebuild(tmp_path / pre, **(metadata | {"tokenizer__ggml__pre": pre}))
        assert len(found.encode("zyzzyva")) == count


@pytest.mark.parametrize(
    ("pre", "said", "first", "last"),
    [
        ("smollm", {}, [], []),
        ("llama-bpe", {}, [1], []),
        ("llama-bpe", {"tokenizer__ggml__add_bos_token": False}, [], []),
        ("smollm", {"tokenizer__ggml__add_bos_token": True}, [1], []),
        (
            "smollm",
            {"tokenizer__ggml__add_bos_token": True, "tokenizer__ggml__add_eos_token": True},
            [1],
            [2],
        ),
    ],
)
def test_bos_and_eos_are_added_as_said(bytes_bpe, tmp_path, pre, said, first, last):
    metadata = bytes_bpe[0] | {"tokenizer__ggml__pre": pre} | said
    found = rebuild(tmp_path, **metadata)
    inner = found.encode("apples", add_special_tokens=False)
    assert found.encode("apples") == [*first, *inner, *last]


def test_defined_tokens_stay_whole(bytes_bpe, tmp_path):
    metadata = dict(bytes_bpe[0])
    number = len(metadata["tokenizer__ggml__tokens"])
    metadata["tokenizer__ggml__tokens"] = [*metadata["tokenizer__ggml__tokens"], "<think>"]
    kinds = [*metadata["tokenizer__ggml__token_type"], USER_DEFINED]
    found = rebuild(tmp_path, **(metadata | {"tokenizer__ggml__token_type": kinds}))
    assert found.encode("a<think>b")[1] == number
    assert "<think>" not in found.all_special_tokens
    assert found.decode(found.encode("<think>1"), skip_special_tokens=True) == "<think>1"


def sentence_piece(prefix, defined=()):
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(line for line in lines if line.strip()),
        model_writer=model,
        vocab_size=500,
        model_type="bpe",
        byte_fallback=True,
        add_dummy_prefix=prefix,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        user_defined_symbols=list(defined),
        num_threads=1,
        minloglevel=2,
    )
    return sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())


@pytest.mark.parametrize(
    ("architecture", "prefix", "defined"),
    [("llama", True, ()), ("gemma", False, ("<think>", "▁▁", "▁▁▁▁")), ("llama", False, ())],
)
def test_sentence_piece_reads_as_the_original(tmp_path, architecture, prefix, defined):
    original = sentence_piece(prefix, defined)
    numbers = range(original.get_piece_size())
    spelled = [original.id_to_piece(n) for n in numbers]
    kinds = [
        6 if original.is_byte(n)
        else 2 if original.is_unknown(n)
        else 3 if original.is_control(n)
        else 4 if original.id_to_piece(n) in defined
        else 1
        for n in numbers
    ]  # fmt: skip
    found = rebuild(
        tmp_path,
        general__architecture=architecture,
        **{f"{architecture}__context_length": 512},
        tokenizer__ggml__model="llama",
        # llama.cpp writes Gemma's runs of spaces as spaces.
        tokenizer__ggml__tokens=[t.replace("▁", " ") if t in defined else t for t in spelled],
        tokenizer__ggml__scores=[original.get_score(n) for n in numbers],
        tokenizer__ggml__token_type=kinds,
        tokenizer__ggml__bos_token_id=1,
        tokenizer__ggml__eos_token_id=2,
        tokenizer__ggml__unknown_token_id=0,
        tokenizer__ggml__add_space_prefix=None if prefix else False,
    )
    for text in [*TEXTS, (ROOT / "QUICK_START.md").read_text(encoding="utf-8")[:2000]]:
        assert found.encode(text) == original.encode(text, add_bos=True), text
        assert found.decode(found.encode(text), skip_special_tokens=True) == text
    assert found.unk_token == "<unk>"
    assert type(load_tokenizer(tmp_path).detokenizer).__name__ == "SPMStreamingDetokenizer"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokenizer__ggml__tokens": None}, "has no tokenizer"),
        ({"tokenizer__ggml__tokens": []}, "has no tokenizer"),
        ({"tokenizer__ggml__model": None}, "a tokenizer of the kind None"),
        ({"tokenizer__ggml__model": "bert"}, "a tokenizer of the kind 'bert'"),
        ({"tokenizer__ggml__pre": None}, "does not name its pre-tokenizer"),
        ({"tokenizer__ggml__pre": "kimi-k2"}, "'kimi-k2', which is not known here; known are def"),
        ({"tokenizer__ggml__merges": ["a zz"]}, "has a damaged tokenizer"),
        ({"tokenizer__ggml__merges": ["ab"]}, "has a damaged tokenizer"),
        ({"tokenizer__ggml__eos_token_id": 10**6}, "eos_token_id = 1000000 is outside the"),
        ({"tokenizer__ggml__model": "llama"}, "has 0 scores for"),
        ({"llama__context_length": None}, "lacks llama.context_length"),
    ],
)
def test_bad_metadata_are_refused(bytes_bpe, tmp_path, change, message):
    with pytest.raises(UserError) as refused:
        rebuild(tmp_path, **(bytes_bpe[0] | change))
    assert message in str(refused.value)


def test_several_chat_templates_are_kept_by_name(bytes_bpe, tmp_path):
    found = rebuild(
        tmp_path,
        **bytes_bpe[0],
        tokenizer__chat_template="plain",
        tokenizer__chat_templates=["tool_use"],
        tokenizer__chat_template__tool_use="with tools",
    )
    assert found.chat_template == {"default": "plain", "tool_use": "with tools"}


def test_all_ends_of_an_answer_are_found(bytes_bpe):
    values = {key.replace("__", "."): value for key, value in bytes_bpe[0].items()}
    file = GGUF(ROOT, values, {})
    assert gguf_tokenizer.end_tokens(file) == [2, 0]  # <|im_end|>, then <|endoftext|>
    values["tokenizer.ggml.eot_token_id"] = 1
    assert gguf_tokenizer.end_tokens(file) == [2, 1, 0]
