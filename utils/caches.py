"""Batch caches of prompts, from mlx-lm's caches of any kind that it can batch."""

from typing import Any

from .errors import RunError


def prefill(model: Any, prompts: list[list[int]]) -> list[Any]:
    """The batch cache of all prompts but their last tokens, in one right-padded forward."""
    import mlx.core as mx
    from mlx_lm.models.cache import make_prompt_cache

    caches = [make_prompt_cache(model) for _ in prompts]
    for layer in caches[0]:
        if not hasattr(layer, "merge"):
            raise RunError(
                f"{type(layer).__name__}, this model's cache, can't be batched by mlx-lm"
            )
    lengths = [len(prompt) - 1 for prompt in prompts]
    longest = max(lengths)
    padding = [longest - length for length in lengths]
    # Not every recurrent model keeps padding out of its state: those read one prompt at a time.
    alone = any(padding) and not all(hasattr(layer, "offset") for layer in caches[0])
    for prompt, cache in zip(prompts, caches, strict=True) if alone else ():
        if len(prompt) > 1:
            model(mx.array([prompt[:-1]]), cache=cache)
    merged = [layers[0].merge(list(layers)) for layers in zip(*caches, strict=True)]
    if alone or not longest:
        return merged
    for layer in merged if any(padding) else ():
        layer.prepare(lengths=lengths, right_padding=padding)
    tokens = [prompt[:-1] + [0] * pad for prompt, pad in zip(prompts, padding, strict=True)]
    model(mx.array(tokens), cache=merged)  # its logits are never evaluated
    for layer in merged if any(padding) else ():
        layer.finalize()
    return merged
