"""Rows to pretrain on: packed, masked, left out where too long, in an order for each epoch."""

import numpy as np
import pytest
from conftest import make_tokenizer

from utils.pretraining import data


@pytest.fixture
def tokenizer(tmp_path):
    make_tokenizer(tmp_path)
    return data.load_tokenizer(str(tmp_path))


def test_packing_fills_every_row_and_makes_every_token_a_target_once():
    rows = data.pack([[1, 2, 3], [4], [5, 6, 7, 8]], 4, end=0)
    assert rows.tokens.tolist() == [[0, 1, 2, 3, 0], [0, 4, 0, 5, 6]]
    assert rows.mask.all()
    longer = data.pack([[1, 2, 3], [4], [5, 6, 7, 8]], 11, end=0)
    assert longer.tokens[:, 1:].tolist() == [[1, 2, 3, 0, 4, 0, 5, 6, 7, 8, 0]]


def test_prompts_are_masked_and_the_end_is_trained(tokenizer):
    rows = data.pair_rows(tokenizer, [("How", "many"), ("", "a")], 64, False, "x")
    assert rows.length == 32
    for row, completion in enumerate(("many", "a")):
        targets = rows.tokens[row, 1:][rows.mask[row]]
        assert tokenizer.decode(targets) == completion + tokenizer.eos_token


def test_chat_template_wraps_the_prompt(tokenizer):
    rows = data.pair_rows(tokenizer, [("How", "many")], 64, True, "x")
    text = tokenizer.decode(rows.tokens[0])
    assert text.startswith("<|im_start|>user\nHow<|im_end|>\n<|im_start|>assistant\nmany<|im_end|>")


def test_long_rows_are_left_out_and_counted(tokenizer, capsys):
    pairs = [("How", "many"), ("How", "many " * 90)]
    assert len(data.pair_rows(tokenizer, pairs, 32, False, "train")) == 1
    assert "train: 1 of 2 rows are longer" in capsys.readouterr().out


def test_an_epoch_visits_every_row_once_and_the_next_in_another_order():
    order = np.concatenate([data.batch_rows(10, 4, step, seed=1) for step in range(5)])
    assert sorted(order[:10]) == sorted(order[10:]) == list(range(10))
    assert list(order[:10]) != list(order[10:])
    other = data.batch_rows(10, 4, 0, seed=2)
    assert list(order[:4]) != list(other)


def test_unigram_entropy_by_hand():
    rows = data.pack([[1, 1, 2]], 4, end=0)  # targets 1 1 2 0
    assert rows.unigram_entropy() == pytest.approx(1.5 * np.log(2))
