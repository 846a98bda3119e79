"""Micro-batches on several cores at once: the same update."""

import mlx.core as mx
import pytest
from helpers import as_batch, flat, make_trainer

from utils.device import cores as streams
from utils.gradient import on_cores

SETTINGS = {"micro_batch_tokens": 70, "train_type": "lora", "lora_dropout": 0.3}


def updated(model_dir, data_dir, folder, monkeypatch, cores, **settings):
    """Weights, log-records and devices' streams after three rollouts of two updates each."""
    monkeypatch.setattr(streams, "cores", lambda: cores)
    used, stream = [], mx.stream
    monkeypatch.setattr(mx, "stream", lambda s: (used.append(str(s)), stream(s))[1])
    settings = {**SETTINGS, "num_iterations": 2, "max_updates": 6, **settings}
    trainer = make_trainer(model_dir, data_dir, folder, **settings)
    records = [r for batch in ([0, 1], [2, 3], [4, 5]) for r in trainer.train_step(batch)]
    monkeypatch.setattr(mx, "stream", stream)
    return flat(trainer.model.trainable_parameters()), records, used


@pytest.mark.parametrize("kl_coeff", [0.0, 0.1])
def test_cores_change_no_weight(model_dir, data_dir, tmp_path, monkeypatch, kl_coeff):
    """With dropout, anchors and a reference."""
    arguments = (model_dir, data_dir, tmp_path / "o", monkeypatch)
    alone, records, unused = updated(*arguments, 1, kl_coeff=kl_coeff)
    several, again, used = updated(*arguments, 3, kl_coeff=kl_coeff)
    assert not unused
    assert len(set(used)) == 3
    for name, weight in alone.items():
        assert mx.array_equal(weight, several[name]), name
    for one, other in zip(records, again, strict=True):
        assert one["loss"] == other["loss"]
        assert one["grad_norm"] == other["grad_norm"]


def test_a_long_micro_batch_has_a_core_of_its_own(monkeypatch):
    monkeypatch.setattr(streams, "cores", lambda: 2)
    batches = [as_batch(tokens=mx.zeros((1, n)), mask=mx.ones((1, 1))) for n in (40, 9, 9, 9)]
    used = [work for _, work in on_cores.spread(lambda _: mx.default_stream(mx.cpu), batches, 4)]
    assert used[1] == used[2] == used[3] != used[0]
