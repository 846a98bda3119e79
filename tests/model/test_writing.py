"""Files of models: written in one piece, in shards, and never of another shape."""

import json

import mlx.core as mx
import mlx_lm
import mlx_lm.utils
import pytest
from helpers import TINY, flat, tiny_model

from utils.model import writing


def test_weights_in_several_files_are_the_model(tmp_path, monkeypatch):
    """And the model is empty then, so that they exist once."""
    monkeypatch.setattr(
        mlx_lm.utils, "make_shards", lambda weights, **_: [{n: w} for n, w in weights.items()]
    )
    model = tiny_model()
    expected = flat(model.parameters())
    writing.write_lazy_weights(tmp_path, model)
    assert all(value.size == 0 for value in flat(model.parameters()).values())
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == expected.keys()
    assert index["metadata"]["total_size"] == sum(value.nbytes for value in expected.values())
    assert len({*index["weight_map"].values()}) == len(expected)
    (tmp_path / "config.json").write_text(json.dumps(TINY))
    loaded = flat(mlx_lm.utils.load_model(tmp_path)[0].parameters())
    assert all(mx.array_equal(loaded[name], value) for name, value in expected.items())


def test_weights_of_another_shape_or_name_are_refused():
    model, weights = tiny_model(), flat(tiny_model().parameters())
    writing.load_weights(model, {"model.norm.weight": mx.zeros((64,))})
    assert model.model.norm.weight.sum() == 0
    for name, value in (
        ("model.norm.weight", mx.zeros((65,))),
        ("model.embed_tokens.weight", weights["model.embed_tokens.weight"][:9]),
        ("model.layers.7.weight", mx.zeros((64,))),
    ):
        with pytest.raises(ValueError, match=f"{name}.* is no part of the model"):
            writing.load_weights(model, {name: value})


@pytest.mark.parametrize("text", [b"", b"{", b"[1]", b"\xff\x00", b"[" * 100_000])
def test_a_damaged_generation_config_of_the_source_ends_no_run_at_its_end(tmp_path, text):
    """mlx-lm reads a model without it, and what was learnt must not be lost for it."""
    path = tmp_path / "generation_config.json"
    path.write_bytes(text)
    writing.write_stop_strings(tmp_path, ["</answer>"], {2})
    expected = {"eos_token_id": [2], "stop_strings": ["</answer>"]}
    assert json.loads(path.read_text()) == expected
