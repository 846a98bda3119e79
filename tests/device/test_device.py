"""The GPU, Metal or CUDA, computes what the CPU does. Everything else is tested on the CPU."""

import mlx.core as mx
import numpy as np
import pytest
from helpers import make_trainer
from mlx.utils import tree_flatten

from utils.device import patch
from utils.device.cuda import quantized_rows
from utils.rollouts import compiled_step

pytestmark = pytest.mark.skipif(
    not mx.is_available(mx.gpu), reason="needs a GPU: this MLX runs on the CPU alone"
)


@pytest.fixture
def on_gpu(monkeypatch):
    """What a run replaces in MLX and mlx-lm on CUDA is put back: later tests are on the CPU."""
    monkeypatch.setattr(patch, "setattr", monkeypatch.setattr, raising=False)
    monkeypatch.setattr(quantized_rows, "setattr", monkeypatch.setattr, raising=False)
    monkeypatch.setattr(compiled_step, "_usable", {})
    mx.set_default_device(mx.gpu)
    yield
    mx.set_default_device(mx.cpu)


def gradient(trainer, responses, advantages):
    rows = [trainer.train_dataset[0]] * len(responses)
    batch = trainer.micro_batches(rows, responses, advantages)[0]
    (loss, sums, _), grads = trainer.loss_and_grad(batch)
    return loss.item(), sums["sampler_mismatch"].item(), dict(tree_flatten(grads))


def test_gradient_and_logprobs_agree_with_the_cpu(model_dir, data_dir, tmp_path, on_gpu):
    trainer = make_trainer(model_dir, data_dir, tmp_path / "gpu", dtype="float32")
    trainer.refresh_old_policy()
    responses = trainer.generate_responses([0])
    advantages = np.linspace(-1, 1, len(responses))
    loss, mismatch, fast = gradient(trainer, responses, advantages)
    mx.eval(fast)
    mx.set_default_device(mx.cpu)
    reference = make_trainer(model_dir, data_dir, tmp_path / "cpu", dtype="float32")
    expected, _, slow = gradient(reference, responses, advantages)
    assert loss == pytest.approx(expected, abs=1e-3)
    assert mismatch / sum(len(r.ids) for r in responses) < 1e-3
    largest = max(mx.abs(g).max().item() for g in slow.values())
    assert largest > 1e-4
    assert max(mx.abs(fast[k] - slow[k]).max().item() for k in slow) <= 1e-3 * largest


def test_an_update_on_the_gpu_moves_the_weights(model_dir, data_dir, tmp_path, on_gpu):
    trainer = make_trainer(model_dir, data_dir, tmp_path / "o", use_compile=True)
    before = {
        name: mx.array(x) for name, x in tree_flatten(trainer.optimizer.masters(trainer.model))
    }
    record = trainer.train_step([0, 1])[-1]
    assert record["grad_norm"] > 0
    after = dict(tree_flatten(trainer.optimizer.masters(trainer.model)))
    assert max(mx.abs(after[k] - before[k]).max().item() for k in before) > 0
