"""Tokenizers: mlx-lm's and nanochat's have all that is asked of them."""

import inspect

import pytest
from mlx_lm.utils import load_tokenizer

from utils.data.tokenizer import Tokenizer
from utils.model.tiktoken_wrapper import TiktokenTokenizerWrapper

METHODS = [name for name, part in vars(Tokenizer).items() if inspect.isfunction(part)]
METHODS = [name for name in METHODS if not name.startswith("_")]


def test_nanochats_tokenizer_has_what_is_asked_of_one():
    assert {*METHODS} == {"encode", "decode", "apply_chat_template", "save_pretrained"}
    assert all(hasattr(TiktokenTokenizerWrapper, name) for name in METHODS)
    signature = inspect.signature(TiktokenTokenizerWrapper.encode)
    assert "add_special_tokens" in signature.parameters


@pytest.mark.parametrize("text", ["How many apples?", "<answer>\n3\n</answer>"])
def test_mlx_lms_tokenizer_does_what_is_asked_of_one(model_dir, tmp_path, text):
    tokenizer = load_tokenizer(model_dir)
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert tokenizer.decode(ids) == text
    assert [*tokenizer.eos_token_ids] == [2]
    messages = [{"role": "user", "content": text}]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True)
    assert tokenizer.decode(prompt).endswith(f"{text}<|im_end|>\n<|im_start|>assistant\n")
    tokenizer.save_pretrained(str(tmp_path))
    assert load_tokenizer(tmp_path).encode(text) == ids
