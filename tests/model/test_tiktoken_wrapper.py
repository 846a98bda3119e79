"""The nanochat tokenizer on a toy encoding: bytes, three merges and nanochat's special tokens."""

import sys

import pytest
from helpers import PATTERN, RANKS, SPECIAL

from utils.model.tiktoken_wrapper import TiktokenTokenizerWrapper

BOS, USER, USER_END, ASSISTANT, ASSISTANT_END = SPECIAL.values()
SYSTEM = {"role": "system", "content": "be"}
HELLO = {"role": "user", "content": "hello"}
REPLY = {"role": "assistant", "content": "hi"}


@pytest.fixture
def tokenizer():
    pytest.importorskip("tiktoken")
    return TiktokenTokenizerWrapper(RANKS, PATTERN, SPECIAL)


def test_encode_merges_and_round_trips(tokenizer):
    assert tokenizer.encode("hello") == [258, ord("o")]
    assert tokenizer.encode("hello", add_special_tokens=True) == [BOS, 258, ord("o")]
    text = "hello 123 <tag> \u00e9\u4e2d"
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_special_tokens_in_text_are_ordinary_text(tokenizer):
    text = "say <|assistant_end|>"
    ids = tokenizer.encode(text)
    assert not set(ids) & set(SPECIAL.values())
    assert tokenizer.decode(ids) == text
    rendered = tokenizer.apply_chat_template([{"role": "user", "content": text}])
    assert rendered.count(ASSISTANT_END) == 0


def test_decode_can_skip_special_tokens(tokenizer):
    ids = [BOS, *tokenizer.encode("hello"), ASSISTANT_END]
    assert tokenizer.decode(ids) == "<|bos|>hello<|assistant_end|>"
    assert tokenizer.decode(ids, skip_special_tokens=True) == "hello"


def test_chat_template_is_nanochats(tokenizer):
    ids = tokenizer.apply_chat_template([SYSTEM, HELLO, REPLY, HELLO])
    hello = tokenizer.encode("hello")
    first = [USER, *tokenizer.encode("be\n\nhello"), USER_END]
    reply = [ASSISTANT, *tokenizer.encode("hi"), ASSISTANT_END]
    assert ids == [BOS, *first, *reply, USER, *hello, USER_END, ASSISTANT]


def test_chat_template_without_generation_prompt_and_as_text(tokenizer):
    ids = tokenizer.apply_chat_template([HELLO], add_generation_prompt=False)
    assert ids[-1] == USER_END
    text = tokenizer.apply_chat_template([HELLO], tokenize=False)
    assert text == "<|bos|><|user_start|>hello<|user_end|><|assistant_start|>"


@pytest.mark.parametrize("messages", [[], [SYSTEM], [REPLY], [HELLO, HELLO], [SYSTEM, REPLY]])
def test_chat_template_refuses_other_turns(tokenizer, messages):
    with pytest.raises(ValueError, match="in turns"):
        tokenizer.apply_chat_template(messages)


def test_stop_ids_and_size(tokenizer):
    assert tokenizer.eos_token_id == ASSISTANT_END
    assert tokenizer.eos_token_ids == {ASSISTANT_END, BOS}
    assert tokenizer.vocab_size == 264
    assert tokenizer.chat_template is not None


def test_saved_folder_gives_the_same_tokenizer(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path / "model")
    again = TiktokenTokenizerWrapper.from_pretrained(tmp_path / "model")
    assert (again.ranks, again.pattern, again.special_tokens) == (RANKS, PATTERN, SPECIAL)
    assert (tmp_path / "model" / "tokenizer.tiktoken").read_text().splitlines()[104] == "aA== 104"


def test_damaged_files_are_named(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    ranks, config = tmp_path / "tokenizer.tiktoken", tmp_path / "tokenizer_config.json"
    whole = ranks.read_text()
    ranks.write_text("aA== 104\n%% 5\n")
    with pytest.raises(ValueError, match=r"tokenizer\.tiktoken, line 2"):
        TiktokenTokenizerWrapper.from_pretrained(tmp_path)
    ranks.write_text(whole)
    config.write_text('{"pattern": "x"}')
    with pytest.raises(ValueError, match=r"tokenizer_config\.json.*special_tokens"):
        TiktokenTokenizerWrapper.from_pretrained(tmp_path)


def test_missing_chat_token_is_named(tokenizer):
    with pytest.raises(ValueError, match=r"lacks <\|bos\|>"):
        TiktokenTokenizerWrapper(RANKS, PATTERN, {k: v for k, v in SPECIAL.items() if v != BOS})


TABLES = {
    "a byte missing": ({k: v for k, v in RANKS.items() if k != b"z"}, SPECIAL, "lack 1 of the 256"),
    "an empty token": (RANKS | {b"": 264}, SPECIAL, "empty token"),
    "an id twice": (RANKS | {b"hell": 257}, SPECIAL, "the ids 0 to 263, each once"),
    "a gap": (RANKS, SPECIAL | {"<|bos|>": 500}, "each once"),
    "no number": (RANKS, SPECIAL | {"<|bos|>": "259"}, "each once"),
}


@pytest.mark.parametrize("case", TABLES)
def test_tables_that_make_no_tokenizer_are_refused(tokenizer, case):
    ranks, special, message = TABLES[case]
    with pytest.raises(ValueError, match=message):
        TiktokenTokenizerWrapper(ranks, PATTERN, special)


def test_missing_package_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "tiktoken", None)
    with pytest.raises(ImportError, match="uv sync --extra nanochat"):
        TiktokenTokenizerWrapper(RANKS, PATTERN, SPECIAL)
