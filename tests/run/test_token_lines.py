"""What was sampled, token by token: as it was, to three decimals."""

import json
import math

import mlx.core as mx
import numpy as np
import pytest
from helpers import as_batch, completion

from utils.run import token_lines

TEXTS = {1: b"Hi", 2: b" there", 3: "\u20ac".encode()[:1], 4: "\u20ac".encode()[1:], 5: b"!"}


class ByBytes:
    """A tokenizer of bytes, which drops the space before a text as SentencePiece does."""

    asked = 0

    def decode(self, ids):
        self.asked += 1
        return b"".join(TEXTS[i] for i in ids).decode(errors="replace").removeprefix(" ")


def line_of(completions, trained=None, pieces=None):
    trained = trained or [None] * len(completions)
    text = token_lines.token_line(7, completions, trained, pieces or token_lines.Pieces(ByBytes()))
    return json.loads(text)


def read_back(line, i=0):
    return token_lines.tokens_of(line, i, line["pieces"])


def test_a_completion_comes_back():
    given = completion([1, 2, 5], [-0.25, -3.4567, 0.0], mask=[1, 1, 0])
    found = read_back(line_of([given], [np.array([-0.5, -2.0])]))
    assert found == {
        "ids": [1, 2, 5],
        "pieces": ["Hi", " there", "!"],
        "sampled_logprobs": [-0.25, -3.457, 0.0],
        "trained_logprobs": [-0.5, -2.0, 0.0],
        "mask": [1, 1, 0],
    }
    assert read_back(line_of([completion([1])]))["mask"] == [1]


def test_a_completion_whose_text_is_hidden_has_no_tokens():
    line = line_of([None, completion([5])])
    assert read_back(line)["ids"] == read_back(line)["mask"] == []
    assert read_back(line, 1)["pieces"] == ["!"]
    assert token_lines.tokens_of(None, 0, {})["ids"] == [], "dropped, or not asked for"


def test_the_parts_of_a_character_are_shown_together():
    line = line_of([completion([3, 4, 5]), completion([1, 3]), completion([3, 3, 4, 5])])
    assert read_back(line)["pieces"] == ["", "\u20ac", "!"]
    assert read_back(line, 1)["pieces"] == ["Hi", "\ufffd"]
    assert "".join(read_back(line, 2)["pieces"]) == "\ufffd\u20ac!"


def test_each_token_is_asked_for_once_and_written_once_a_file():
    tokenizer = ByBytes()
    pieces = token_lines.Pieces(tokenizer)
    assert [*line_of([completion([1, 2])], pieces=pieces)["pieces"]] == ["1", "2"]
    asked = tokenizer.asked
    assert [*line_of([completion([2, 5])], pieces=pieces)["pieces"]] == ["5"]
    pieces.begin_file()
    assert [*line_of([completion([1, 2])], pieces=pieces)["pieces"]] == ["1", "2"]
    assert tokenizer.asked == asked + 2


def test_the_same_log_probs_are_not_stored_twice():
    given = completion([1, 2], [-0.25, -1.0])
    assert read_back(line_of([given], [np.array([-0.2505, -0.9995])]))["trained_logprobs"] is None
    assert read_back(line_of([given], [np.array([-0.26, -1.0])]))["trained_logprobs"] is not None


@pytest.mark.parametrize(
    "value", [0.0, 1e-7, -1e-7, -0.0004, -0.0006, -29.9996, -30.0, -30.1, -1e4]
)
def test_any_log_prob_is_json_to_three_decimals(value):
    (found,) = json.loads(token_lines.decimals(np.array([value])))
    assert found == pytest.approx(value, abs=0.000501)


def test_what_is_no_number_stays_none():
    values = token_lines.decimals(np.array([-math.inf, math.nan, -0.5]))
    assert json.loads(values) == [None, None, -0.5]
    assert math.isnan(token_lines.numbers(json.loads(values))[0])


def test_trained_log_probs_are_those_of_the_window_by_completion():
    batch = as_batch(mask=mx.array([[0, 1, 1], [1, 0, 1], [0, 0, 0]], mx.float32))
    assert token_lines.trained_logprobs([batch]) == {}, "nothing was learnt from it"
    batch.completion = mx.array([4, 2, 0])
    batch.old_logprobs = -mx.array([[1, 2, 3], [4, 5, 6], [7, 8, 9]], mx.float32)
    found = token_lines.trained_logprobs([batch])
    assert {n: x.tolist() for n, x in found.items()} == {4: [-2, -3], 2: [-4, -6]}
