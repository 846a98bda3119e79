"""What some of mlx-lm's models lack, so that they can be trained.

* recurrent_gemma: its class leaves out `nn.Module.__init__`, which makes what freezing takes. And
  its recurrence writes one position after the other into an array, which the gradient would copy
  whole for each.
* gemma3n: without a cache, layers that share keys and values compute their own, so that training
  would see another model than sampling. And it uses the weights of two layers itself, which must
  stay layers with weights.
* deepseek_v41: it looks values up at places that it finds by their size, and does not say that the
  places have no gradient.
* rwkv7: see rwkv7.py.
"""

import mlx.core as mx
import mlx.nn as nn

from . import rwkv7


def make_trainable(model: nn.Module) -> None:
    """Mend a model of one of these kinds; others stay as they are."""
    rwkv7.make_trainable(model)
    kind = kind_of(model)
    if kind == "recurrent_gemma":
        mend_recurrent_gemma(model)
    elif kind == "gemma3n":
        share_keys_and_values(model.model.language_model)
    elif kind == "deepseek_v41":
        stop_gradients_of_places()


def kind_of(model: nn.Module) -> str:
    """The name of mlx-lm's module."""
    return type(model).__module__.rpartition(".")[2]


def mend_recurrent_gemma(model: nn.Module) -> None:
    from mlx_lm.models import recurrent_gemma

    recurrent_gemma.rnn_scan = scan
    if not hasattr(model, "_no_grad"):
        made = nn.Module()
        model._no_grad, model._training = made._no_grad, made._training


def scan(x: mx.array, a: mx.array, h0: mx.array | None) -> tuple[mx.array, mx.array]:
    """(B, T, D) inputs and decays, (B, D) state before them -> all states, and the last."""
    state = mx.zeros_like(x[:, 0]) if h0 is None else h0
    states = []
    for t in range(x.shape[1]):
        state = a[:, t] * state + x[:, t]
        states.append(state)
    return mx.stack(states, axis=1), state


def share_keys_and_values(model: nn.Module) -> None:
    """Let gemma3n's layers do so also where nothing is to be kept."""
    from mlx_lm.models.cache import ConcatenateKVCache
    from mlx_lm.models.gemma3n import LanguageModel

    class Sharing(LanguageModel):
        def __call__(
            self,
            inputs: mx.array | None = None,
            cache: list | None = None,
            input_embeddings: mx.array | None = None,
        ) -> mx.array:
            if cache is None:
                cache = [ConcatenateKVCache() for _ in range(self.first_kv_shared_layer_idx)]
            return super().__call__(inputs, cache, input_embeddings)

    object.__setattr__(model, "__class__", Sharing)


class WithoutPlaces:
    """`mlx.core` for one module, whose places of the largest values have no gradient."""

    def __getattr__(self, name: str) -> object:
        return getattr(mx, name)

    @staticmethod
    def argpartition(values: mx.array, kth: int, axis: int = -1) -> mx.array:
        return mx.stop_gradient(mx.argpartition(values, kth, axis))


def stop_gradients_of_places() -> None:
    from mlx_lm.models import deepseek_v41

    deepseek_v41.mx = WithoutPlaces()


def adaptable(model: nn.Module) -> list[str] | None:
    """The layers of a block that can have adapters, where mlx-lm's own choice would not do."""
    if kind_of(model) != "gemma3n":
        return None
    linear = nn.Linear | nn.QuantizedLinear
    names = {n for block in model.layers for n, m in block.named_modules() if isinstance(m, linear)}
    return sorted(name for name in names if not name.endswith("_coefs"))
