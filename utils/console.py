"""What a person sees while it runs: lines, the progress bar, Ctrl-C."""

import os
import shlex
import sys
from collections.abc import Sequence
from typing import Any

from tqdm import tqdm

from . import runtime, settings
from .errors import readable
from .text import counted, redact

# What matters most stands first, the reward in the postfix within 40 columns: a terminal cuts the
# end off. Without tqdm's rate and percentage, which the time left and the count say as well.
BAR = "{n_fmt}/{total_fmt}|{bar}| {remaining} left{postfix}, {desc}, {elapsed}"


def say(text: str) -> None:
    """A line on standard output that does not tear the progress bar, and never ends a run.

    What the terminal can't show is replaced; when the output has nowhere to go (`| head`, a closed
    terminal, a full disk), it is dropped.
    """
    encoding = sys.stdout.encoding or "utf-8"
    try:
        tqdm.write(redact(text).encode(encoding, "replace").decode(encoding))
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def command_line(script: str, config: str | None, overrides: Sequence[str]) -> str:
    """What to type for the same run again; runs are continued and replaced by adding to it."""
    words = ["uv", "run"] if "UV" in os.environ else ["python"]  # `uv run` sets it
    words += [os.path.relpath(script), *(["--config", config] if config else [])]
    shown = map(settings.shown_override, overrides)
    return shlex.join([*words, *(word for text in shown for word in ("--set", text))])


def progress_bar(trainer: Any) -> tqdm:
    return tqdm(
        desc="starting",
        total=trainer.total_updates,
        initial=trainer.update_step,
        bar_format=BAR,
        disable=None,  # silent when the output is not a terminal
        leave=False,  # the lines that were printed stay
        dynamic_ncols=True,
        smoothing=0.1,
    )


def no_bar() -> tqdm:
    """A bar that shows nothing, for a trainer that is used as a library."""
    return tqdm(disable=True)


def progress_text(record: dict[str, Any], log: Any) -> str:
    """The figures that a person watches, the most important first."""
    parts = [f"reward {record['reward_mean']:.2f}"]
    parts += [log.score_text(log.history[-1]["em"])] if log.history else []
    parts += [f"length {record['completion_length']:.0f}"]
    parts += [] if record["kl"] is None else [f"kl {record['kl']:.3f}"]
    return ", ".join(parts)


def warn_of_kl(kl: float | None) -> None:
    """KL of the first update: the policy has not moved, so this is how far off a 4-bit copy is."""
    if kl is not None and kl > 0.01:
        say(
            f"kl        {kl:.3f} before anything was learnt: the error of the 4-bit reference, to "
            "which kl_coeff pulls the policy; quantize_for_rollouts = false avoids it"
        )


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

    from . import loading  # imports more than a command that only prints needs

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
    from . import views  # imports MLX, before which a BLAS may have to be loaded

    if trainer.quantizes and (cost := views.cost_of_quantizing(trainer)):
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
