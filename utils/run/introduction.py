"""What a person is told before a run begins: every choice that was not their own."""

from collections.abc import Iterator

import mlx.core as mx

from ..base.errors import roughly
from ..base.say import say
from ..base.text import counted
from ..device import runtime
from ..memory.this_machine import trainable_parameters
from ..model import vision
from ..model.loading import beyond_context
from ..rewards import answer_forms
from ..rollouts.merged_layers import cost_of_quantizing
from ..settings import idle
from .run import Trainer


def introduce(trainer: Trainer, blas: str | None) -> None:
    """Say what is about to happen; `blas` is what `runtime.preload_blas` returned."""
    if trainer.args.quiet:
        return
    for topic in (model, idle_settings, speed, context, data, answers, sampling, quantizing, plan):
        for line in topic(trainer, blas):
            say(line)


def model(trainer: Trainer, _: str | None) -> Iterator[str]:
    a, kind = trainer.args, trainer.loaded.train_type
    count = trainable_parameters(trainer.model)
    device = "CPU" if mx.default_device() == mx.cpu else mx.device_info()["device_name"]
    yield f"model     {a.model_name}: {kind}, {count:,} parameters train, on {device}"
    if vision.has_vision(trainer.loaded.config):
        yield f"          {vision.WHAT_TRAINS}"
    if kind != "full" and not idle.learning_rate(a, kind):
        yield f"          learning rate {a.lora_learning_rate:g} (lora_learning_rate)"
    if kind != "full" and a.train_type == "auto" and not a.adapter_path:
        yield "          the model is quantized, so adapters are trained on it (train_type = lora)"


def idle_settings(trainer: Trainer, _: str | None) -> Iterator[str]:
    for line in idle.lines(trainer.args, trainer.loaded.train_type, runtime.platform_name()):
        yield f"settings  {line}"


def speed(_: Trainer, blas: str | None) -> Iterator[str]:
    if mx.default_device() == mx.cpu and (advice := runtime.blas_advice(blas)):
        yield f"speed     {advice}"


def context(trainer: Trainer, _: str | None) -> Iterator[str]:
    tokens, read = longest_sequence(trainer)
    if note := beyond_context(trainer.loaded, trainer.args.model_name, tokens, read):
        yield f"context   {note}: the longest prompt and completion"


def longest_sequence(trainer: Trainer) -> tuple[int, int]:
    """Tokens of the longest prompt and completion, and the positions that reading them may take:
    none for the last token, but some for padding."""
    a, length = trainer.args, trainer.scorer.shapes.length
    new = trainer.sampling.longest
    evaluated = trainer.how(0.0, trainer.args.eval_max_new_tokens).longest
    taken = [(trainer.train_dataset, new), (trainer.eval_dataset, evaluated)]
    if a.eval_every_updates and a.eval_subset_size:
        taken.append((trainer.train_dataset, evaluated))
    tokens = max(len(q["prompt_ids"]) + count for questions, count in taken for q in questions)
    before = max(len(question["prompt_ids"]) for question in trainer.train_dataset) - 1
    return tokens, max(tokens - 1, before + length(new), length(before + new))


def data(trainer: Trainer, _: str | None) -> Iterator[str]:
    a = trainer.args
    asked = min(a.eval_samples, len(trainer.eval_dataset))
    names = ", ".join(part["dataset"] for part in a.dataset_mix) or a.dataset
    questions = counted(len(trainer.train_dataset), "question")
    yield f"data      {names}: {questions}, {asked:,} for evaluation"


def answers(trainer: Trainer, _: str | None) -> Iterator[str]:
    """Their forms, and which of them the rewards of the run can't read."""
    datasets = trainer.train_dataset, trainer.eval_dataset
    train, test = ([str(question.get("answer", "")) for question in part] for part in datasets)
    yield f"          answers: {answer_forms.forms(train)}"
    for line in answer_forms.advice(trainer.args, train, test):
        yield f"          {line}"


def sampling(trainer: Trainer, _: str | None) -> Iterator[str]:
    a = trainer.args
    if a.top_k or a.top_p < 1 or a.min_p:
        bias = "top_k, top_p and min_p bias the gradient: what they cut off is never learnt"
        yield f"sampling  {bias}"


def quantizing(trainer: Trainer, _: str | None) -> Iterator[str]:
    a, memory = trainer.args, trainer.memory
    chosen = a.from_preset and "quantize_for_rollouts" in a.inherited
    if not trainer.quantizes or chosen:  # a preset of ours says so itself
        return
    rows = a.batch_size * a.gradient_accumulation_steps * a.num_generations
    rows = min(rows, memory.plan.rollout_batch_size)
    cost = cost_of_quantizing(trainer.model, trainer.copy_policy, rows, memory.spare_for_rollouts)
    if cost:
        yield f"speed     {cost}"


def plan(trainer: Trainer, _: str | None) -> Iterator[str]:
    a, planned = trainer.args, trainer.memory.plan
    most = min(a.batch_size * a.gradient_accumulation_steps, len(trainer.train_dataset))
    yield (
        f"plan      {counted(trainer.total_updates, 'update')} of {counted(most, 'prompt')} x "
        f"{a.num_generations} completions, about {roughly(planned.needed)}"
    )
    if not planned.fits:
        yield "          that may not fit this machine; what would:"
        yield from (f"            {suggestion}" for suggestion in planned.suggestions)
