"""rwkv7 of mlx-lm, so that it can be trained.

It divides keys by their norm, whose derivative at 0 is 0 / 0: one key of zeros made every gradient
before it NaN. A model that has been trained has none (its gradients agree with finite differences);
one with fresh weights has nothing else, since `k_k` begins at 0. And its Metal kernel has no
gradient, so that training takes the loop over tokens that other devices take.
"""

import mlx.core as mx
import mlx.nn as nn


def l2_norm(x: mx.array) -> mx.array:
    """x over its norm. At 0, where there is no derivative, it has the gradient 0."""
    squares = mx.square(x).sum(axis=-1, keepdims=True)
    some = squares > 0
    norm = mx.sqrt(mx.where(some, squares, 1))  # no root of 0, not even where it is left out
    return mx.where(some, x / mx.maximum(norm, 1e-7), 0)


def make_trainable(model: nn.Module) -> None:
    """Mend a model of this kind; others stay as they are."""
    if type(model).__module__ != "mlx_lm.models.rwkv7":
        return
    from mlx_lm.models import rwkv7

    class TimeMixing(rwkv7.Rwkv7TimeMixing):
        def _wkv7(self, *inputs: mx.array) -> tuple[mx.array, mx.array]:
            if not self.training:
                return super()._wkv7(*inputs)
            *sequences, state = inputs  # each (B, T, heads, D)
            if state is None:
                batch, _, heads, size = sequences[0].shape
                state = mx.zeros((batch, heads, size, size), sequences[0].dtype)
            outputs = []
            for t in range(sequences[0].shape[1]):
                output, state = rwkv7._wkv7_step_ops(*(x[:, t] for x in sequences), state)
                outputs.append(output)
            return mx.stack(outputs, axis=1).astype(sequences[0].dtype), state

    rwkv7.l2_norm = l2_norm
    for layer in model.layers:
        object.__setattr__(layer.attn, "__class__", TimeMixing)
