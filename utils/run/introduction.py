"""What a person sees while it runs: lines, the progress bar, Ctrl-C."""

from typing import Any

from ..base.errors import readable
from ..base.say import say
from ..base.text import counted
from ..device import runtime


def longest_sequence(trainer: Any) -> tuple[int, int]:
    """Tokens of the longest prompt and completion, and the positions that reading them may take:
    none for the last token, but some for padding."""
    a, new, length = trainer.args, trainer.sampling.max_tokens, trainer.scorer.shapes.length
    evaluated = trainer.sampling_with(0.0, a.eval_max_new_tokens).max_tokens
    taken = [(trainer.train_dataset, new), (trainer.eval_dataset, evaluated)]
    if a.eval_every_updates and a.eval_subset_size:
        taken.append((trainer.train_dataset, evaluated))
    tokens = max(len(row["prompt_ids"]) + count for rows, count in taken for row in rows)
    before = max(len(row["prompt_ids"]) for row in trainer.train_dataset) - 1
    return tokens, max(tokens - 1, before + length(new), length(before + new))


def introduce(trainer: Any, blas: str | None) -> None:
    """Say what is about to happen, and every choice that was not the user's own."""
    import mlx.core as mx
    from mlx.utils import tree_flatten

    from ..model import loading  # imports more than a command that only prints needs

    a, kind = trainer.args, trainer.loaded.train_type
    weights: Any = tree_flatten(trainer.model.trainable_parameters())
    count = sum(value.size for _, value in weights)
    device = "CPU" if mx.default_device() == mx.cpu else mx.device_info()["device_name"]
    say(f"model     {a.model_name}: {kind}, {count:,} parameters train, on {device}")
    if kind != "full":
        note = "; learning_rate is for full fine-tuning" if "learning_rate" in a.explicit else ""
        say(f"          learning rate {a.lora_learning_rate:g} (lora_learning_rate{note})")
    if kind != "full" and a.train_type == "auto" and not a.adapter_path:
        say("          the model is quantized, so adapters are trained on it (train_type = lora)")
    advice = runtime.blas_advice(blas) if device == "CPU" else None
    if advice:
        say(f"speed     {advice}")
    if note := loading.beyond_context(trainer.loaded, a.model_name, *longest_sequence(trainer)):
        say(f"context   {note}: the longest prompt and completion")
    asked = min(a.eval_samples, len(trainer.eval_dataset))
    names = ", ".join(part["dataset"] for part in a.dataset_mix) or a.dataset
    questions = counted(len(trainer.train_dataset), "question")
    say(f"data      {names}: {questions}, {asked:,} for evaluation")
    if a.top_k or a.top_p < 1 or a.min_p:
        say("sampling  top_k, top_p and min_p bias the gradient: what they cut off is never learnt")
    from ..rollouts import merged_layers  # imports MLX, before which a BLAS may have to be loaded

    if trainer.quantizes and (cost := merged_layers.cost_of_quantizing(trainer)):
        say(f"speed     {cost}")
    updates = counted(trainer.total_updates, "update")
    most = min(a.batch_size * a.gradient_accumulation_steps, len(trainer.train_dataset))
    prompts = counted(most, "prompt")
    say(
        f"plan      {updates} of {prompts} x {a.num_generations} completions, "
        f"about {readable(trainer.plan.needed)}"
    )
    if not trainer.plan.fits:
        say("          that may not fit this machine; what would:")
        for suggestion in trainer.plan.suggestions:
            say(f"            {suggestion}")
