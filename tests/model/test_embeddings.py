"""The gradient of an embedding, where a token is frequent."""

import mlx.core as mx
import mlx.nn as nn
import pytest
from helpers import make_trainer

from utils.model import embeddings


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16, mx.float32])
@pytest.mark.parametrize("compiled", [False, True])
def test_a_frequent_token_has_all_of_its_gradient(dtype, compiled):
    """MLX's own came to 256 of 4,000 in bfloat16, and to 2,048 in float16."""
    model = nn.Sequential(nn.Embedding(4, 8))
    model.set_dtype(dtype)
    embeddings.sum_in_float32(model)
    model.train()
    ids = mx.array([1] * 4000 + [2] * 3).reshape(1, -1)

    def loss(weights, ids):
        model.update(weights)
        return model(ids).astype(mx.float32).sum()

    gradient = mx.compile(mx.grad(loss)) if compiled else mx.grad(loss)
    weights = model.trainable_parameters()
    found = gradient(weights, ids)["layers"][0]["weight"]
    assert found.dtype == dtype
    assert found[:, 0].tolist() == [0, mx.array(4000.0).astype(dtype).item(), 3, 0]


def test_what_is_trained_in_full_has_it(model_dir, data_dir, tmp_path):
    for train_type, kind in (("full", embeddings.Embedding), ("lora", nn.Embedding)):
        how = {"train_type": train_type, "dtype": "bfloat16"}
        trainer = make_trainer(model_dir, data_dir, tmp_path / "o", **how)
        table = trainer.model.model.embed_tokens
        assert type(table) is kind
        ids = mx.array([[3, 4, 3]])
        trainer.model.train()
        assert mx.array_equal(table(ids), table.weight[ids]), "the values are the same"
