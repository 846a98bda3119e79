"""Pieces of the way out to GGUF; tests/commands/test_convert_to_gguf.py goes the whole way."""

import gguf_layout
import mlx.core as mx
import numpy as np
import pytest

from utils.base.errors import RunError
from utils.model import gguf_out, gguf_weights


def test_the_writer_and_the_reader_order_rows_alike():
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(12, 3)).astype(np.float32)
    for heads in (1, 2, 3):
        there = gguf_out.side_by_side(rows, heads)
        config = {"num_attention_heads": heads, "num_key_value_heads": heads}
        back = gguf_weights.halves_again("blk.0.attn_q.weight", mx.array(there), config)
        np.testing.assert_array_equal(np.array(back), rows)
        np.testing.assert_array_equal(there, gguf_layout.interleaved(rows, heads))


def test_the_families_are_those_that_come_in():
    read = {architecture.model_type for architecture in gguf_weights.ARCHITECTURES.values()}
    assert set(gguf_out.FAMILIES) == read | {"mistral"}
    assert set(gguf_out.FAMILIES.values()) <= set(gguf_weights.ARCHITECTURES)


def test_another_tokenizer_is_found_by_reading_back(tmp_path):
    """A guard: what the file says of the tokenizer is tried on texts before the file appears."""
    import json

    from conftest import make_model

    for name in ("a", "b"):
        make_model(tmp_path / name)
    assert gguf_out.compare_tokenizers(tmp_path / "a", tmp_path / "b") == []
    path = tmp_path / "b/tokenizer_config.json"
    template = "x{{ messages[0].content }}"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": template}))
    notes = gguf_out.compare_tokenizers(tmp_path / "a", tmp_path / "b")
    assert notes == [
        "a question in the chat template gets other tokens from the file than in training"
    ]
    path = tmp_path / "b/tokenizer.json"
    content = json.loads(path.read_text())
    content["model"]["merges"] = []
    path.write_text(json.dumps(content))
    with pytest.raises(RunError, match=r"would read .* otherwise than the source"):
        gguf_out.compare_tokenizers(tmp_path / "a", tmp_path / "b")
