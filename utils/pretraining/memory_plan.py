"""What an update of `utils/pretrain.py` takes of memory, and how many rows at once fit.

From the shape of the model alone. What blocks keep for the backward pass is what memory/plan.py
counts for GRPO's; unlike there, rows share no prompt and the logits of a micro-batch exist at once:
in the type that is computed in, in float32 with their gradient, and what the softmax makes between.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from ..base.errors import readable
from ..memory.plan import (
    CPU_MICRO_BATCH_TOKENS,
    HEADROOM,
    MAX_LOGITS,
    MAX_MICRO_BATCH_TOKENS,
    Demand,
    MicroBatch,
    adapter_parameters,
    block_bytes,
)
from ..model.shape import ModelShape

MOMENTS = 8  # bytes of both moments of a weight, in float32
LOGIT_COPIES = 3  # float32: the logits, their gradient, the softmax between


@dataclass(frozen=True)
class Update:
    """What is trained, and how."""

    shape: ModelShape
    train_type: str
    storage: int
    """Bytes of a weight that learns."""
    compute: int
    """Bytes of a weight and an activation in the forward and backward pass."""
    batch_rows: int
    """global_batch_size."""
    row_tokens: int
    checkpointing: bool
    platform: str
    budget: int
    lora_rank: int = 16
    lora_layers: int = -1
    trainable: int | None = None
    """None: all weights, or adapters on every matrix."""

    @property
    def demand(self) -> Demand:
        """The same, as the trainer's plan has it: a row is a completion without a prompt."""
        return Demand(
            train_type=self.train_type,
            prompts_per_update=self.batch_rows,
            num_generations=1,
            prompt_tokens=0,
            completion_tokens=self.row_tokens,
            quantize_for_rollouts=False,
            has_reference=False,
            sync_every_updates=1,
            gradient_checkpointing=self.checkpointing,
            train_dtype_bytes=self.compute,
            budget_bytes=self.budget,
            shares_prompts=False,
            platform=self.platform,
            lora_rank=self.lora_rank,
            lora_layers=self.lora_layers,
        )

    @property
    def trained(self) -> int:
        if self.trainable is not None:
            return self.trainable
        if self.train_type == "full":
            return self.shape.parameters
        return adapter_parameters(self.shape, self.demand)


@dataclass(frozen=True)
class Plan:
    """Bytes by part, and how many rows go through a forward and backward pass at once."""

    update: Update
    micro_batch_size: int
    weights: int
    moments: int
    gradients: int
    activations: int
    temporaries: int
    logits: int

    @property
    def needed(self) -> int:
        """The backward pass begins with all activations and ends with all gradients; then the
        optimizer's new state stands beside the old one."""
        begins = self.activations + max(self.logits, self.temporaries)
        ends = self.gradients + self.temporaries
        return self.weights + self.moments + max(begins + self.gradients // 2, ends)

    @property
    def fits(self) -> bool:
        return self.needed <= HEADROOM * self.update.budget

    @property
    def disk(self) -> int:
        """Of a checkpoint: what learns, and its moments."""
        return self.update.trained * (self.update.storage + MOMENTS)

    def table(self) -> str:
        """As plain text, a part a line."""
        parts = {
            "weights": self.weights,
            "optimizer moments": self.moments,
            "gradients and their sum": self.gradients,
            "activations of one micro-batch": self.activations,
            "temporaries of one block": self.temporaries,
            "or logits, with gradients": self.logits,
            "disk: one checkpoint": self.disk,
        }
        lines = [f"{label:<42}{readable(value):>12}" for label, value in parts.items()]
        tokens = self.micro_batch_size * self.update.row_tokens
        lines.append(f"micro_batch_size = {self.micro_batch_size}: {tokens:,} tokens")
        lines.append(
            f"{'fits' if self.fits else 'DOES NOT FIT'}: {readable(self.needed)} of "
            f"{readable(self.update.budget)}, of which {1 - HEADROOM:.0%} stay in reserve"
        )
        if not self.fits:
            found = list(suggestions(self)) or ["a smaller model"]
            lines += ["it would fit with:", *(f"  {text}" for text in found)]
        return "\n".join(lines)


def plan_for(update: Update, rows: int) -> Plan:
    """The plan of micro-batches of so many rows."""
    shape, trained, width = update.shape, update.trained, update.compute
    batch = MicroBatch(rows, rows, update.demand)
    activations, temporaries = block_bytes(shape, batch)
    weights = trained * update.storage
    if update.train_type == "full":
        weights += shape.parameters * width if width != update.storage else 0
    else:
        whole = shape.parameters * width
        weights += shape.bytes_on_disk if shape.quantized_bits is not None else whole
    logits = rows * update.row_tokens * shape.vocab_size
    return Plan(
        update,
        rows,
        weights=weights,
        moments=MOMENTS * trained,
        gradients=trained * (update.storage + 4),
        activations=activations,
        temporaries=temporaries,
        logits=logits * (4 * LOGIT_COPIES + (width if width < 4 else 0)),
    )


def planned(update: Update, rows: int = 0) -> Plan:
    """With so many rows at once; 0: as many as fit, in equal parts of the batch, at least one."""
    if rows:
        return plan_for(update, rows)
    plans = [plan_for(update, n) for n in parts_of(update)]
    return next((plan for plan in reversed(plans) if plan.fits), plans[0])


def parts_of(update: Update) -> list[int]:
    """Rows of equal parts of a batch that a device computes well at once; at least one row."""
    most = CPU_MICRO_BATCH_TOKENS if update.platform == "cpu" else MAX_MICRO_BATCH_TOKENS
    most = min(most, MAX_LOGITS // update.shape.vocab_size) // update.row_tokens
    return [1, *(n for n in range(2, most + 1) if update.batch_rows % n == 0)]


def suggestions(plan: Plan) -> Iterator[str]:
    """Settings that make it fit, each alone."""
    update = plan.update
    changes: list[tuple[str, Update]] = [
        ("gradient_checkpointing = true", replace(update, checkpointing=True)),
        ('train_type = "lora"', replace(update, train_type="lora", storage=4, trainable=None)),
        (f"max_seq_length = {update.row_tokens // 2}", halved(update)),
    ]
    if plan.micro_batch_size > 1:
        yield from (["micro_batch_size = 0"] if planned(update).fits else [])
    yield from (text for text, changed in changes if changed != update and planned(changed).fits)


def halved(update: Update) -> Update:
    return replace(update, row_tokens=max(1, update.row_tokens // 2))
