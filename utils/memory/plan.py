"""The memory plan of a run, from config.json and safetensors headers alone.

The plan serves `--dry-run`, and chooses the rollout batch and the micro-batch when they are 0.

What is counted, in bytes (P parameters, b bytes per weight, GB are 10^9 bytes):

* Full fine-tuning: weights b*P, what they lack of float32 masters 2*P when b < 4 (float16: 4*P;
  with master_weights = false none), two float32 moments 8*P (8-bit: 2.03*P), gradients b*P
  (float16: 4*P), and their float32 sum 4*P when an update has several micro-batches. LoRA and DoRA:
  the same for the float32 adapters only, which are counted when they are loaded.
* Rollout phase: rollout copy, reference, views of joined or merged weights (rollouts/
  merged_layers.py) where there is room, KV cache with its copy while it grows, logits of one step.
* Gradient phase, for a block like llama's (H hidden size, Q = heads*head_dim, K =
  kv_heads*head_dim, I intermediate size): kept for the backward pass 4H + 3Q + 2K + 5I values per
  token and layer, each prompt counted once for its group, and for each row the keys and values of
  its prompt; temporaries 3H + 4I of one layer. On a GPU 3I instead of 5I (device/swiglu.py),
  but not in experts, which get their tokens one a row, as in a rollout.
  Attention probabilities are kept, but not by CUDA's fused kernels, which take something with the
  masks of shared prompts. With gradient checkpointing H per layer, plus one whole layer.
  Logits of one piece of the completion positions (gradient/scorer.py), and, without checkpointing
  and where there is room, of all in the weights' type. The backward pass begins with all
  activations, and ends with all gradients.
  Blocks without attention (mamba, mamba2, rwkv7) keep a state of fixed size for each row, and for
  the backward pass what model/shape.py calls `scanned`, for each token.
* Work in flight: CUDA's queue holds what operations that are not done yet still use, but MLX waits
  where memory is short, so that it decides about the peak and not about what fits.
* Writing `final/`: merged adapters, 1 GB at a time.

Checked against mx.get_peak_memory of whole updates by benchmarks/plan_accuracy.py (RESULTS.md) and
tests/memory/test_plan.py. Mixtures of experts and blocks unlike llama's are rough estimates;
`HEADROOM` is for the rest. The first update corrects the plan (utils/memory/this_machine.py)."""

import bisect
import math
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from ..base.errors import readable
from ..model.shape import ModelShape, projections

GB = 10**9
HEADROOM = 0.9  # of the budget: the rest is the allocator's cache, the process and the estimate
QUANTIZED_BITS = 4.5  # 4 bits and, per group of 64, a scale and a bias of 16 bits
MAX_MICRO_BATCH_TOKENS = 20_480  # beyond it a GPU gains nothing, and Metal's watchdog bites
# Measured on 2 cores, models/tiny-math, gradient of 64 sequences: 0.48 s in parts of 600 tokens,
# 0.54 s in parts of 1,200, 0.98 s in parts of 4,800, which no cache holds.
CPU_MICRO_BATCH_TOKENS = 1_024
# Logits of one piece: a 32nd of the budget, and no more than keeps a GPU busy.
PIECE_PART = 32
MAX_PIECE_LOGITS = 2**29
# GPU kernels index with 32 bits: logits made at once, tokens x vocabulary, must stay below.
# Measured on one H200: 64 x 236 x 151,936 logits of a 4-bit model came back wrong, without error.
MAX_LOGITS = 2**31 - 1
KV_CACHE_STEP = 256  # mlx_lm.models.cache.KVCache.step
ROLLOUT_LOGIT_COPIES = 4  # raw, tempered, Gumbel noise, log-probs; float32
LARGEST_FILE = 2**30  # utils/run/checkpoints.py: merged weights that exist at once
# MLX on CUDA waits when ten graphs of 1 GB are in its queue, which then holds one more.
QUEUE_BYTES = 11 * GB  # see in_flight_bytes


@dataclass(frozen=True)
class Demand:
    """What a run asks of memory: what `make_plan` takes beside the shape."""

    train_type: str
    """"full", "lora" or "dora"."""
    prompts_per_update: int
    num_generations: int
    prompt_tokens: int
    """Longest prompt, in tokens."""
    completion_tokens: int
    """Longest completion, in tokens: max_new_tokens."""
    quantize_for_rollouts: bool
    has_reference: bool
    """kl_coeff > 0."""
    sync_every_updates: int
    gradient_checkpointing: bool
    train_dtype_bytes: int
    """Bytes of a weight and an activation in training: 2, or 4 for float32."""
    budget_bytes: int
    """What the run may use: `runtime.device_memory_bytes()`."""
    master_bytes: int = 2
    """Beside each half-precision weight in full fine-tuning (gradient/adamw.py): 2, 4 or 0."""
    moment_bytes: float = 8.0
    """Of both moments of a trained weight: 8, or about 2 when they are 8-bit."""
    measured_factor: float = 1.0
    """Measured over planned bytes of a micro-batch, from the first update of the run."""
    compiled: bool = False
    """use_compile."""
    entropy_bonus: bool = False
    """entropy_coeff > 0. (Entropies without a gradient, of top_entropy_quantile, take less than the
    gradient after them.)"""
    shares_prompts: bool = True
    """Whether a prompt is read once for its group in the gradient phase (gradient/scorer.py)."""
    platform: str = "metal"
    """"cpu", "metal" or "cuda": what MLX keeps for the backward pass differs."""
    lora_rank: int = 8
    lora_layers: int = -1
    """Blocks with adapters, counted from the last; -1 or 0 = all."""
    trainable_parameters: int | None = None
    """None: all of them, or adapters on every matrix of the adapted blocks."""
    rollout_batch_size: int = 0
    """Rows that are sampled together; 0 = as many as fit."""
    micro_batch_tokens: int = 0
    """Tokens in one forward and backward pass; 0 = as many as fit."""

    @property
    def sequence(self) -> int:
        return self.prompt_tokens + self.completion_tokens

    @property
    def gradient_bytes(self) -> int:
        """Of a weight's gradient: its type, but float32 for float16 (gradient/loss_scale.py)."""
        wide = self.train_type != "full" or self.master_bytes == 4
        return 4 if wide else self.train_dtype_bytes

    @property
    def lengths(self) -> tuple[int, int]:
        """Tokens of a prompt and of a completion, padded as for a compiled step."""
        step = 32 if self.compiled or self.platform == "cuda" else 1
        prompt, completion = -(-self.prompt_tokens // step), -(-self.completion_tokens // step)
        return prompt * step, completion * step

    @property
    def completions(self) -> int:
        return self.prompts_per_update * self.num_generations

    def trained_layers(self, layers: int) -> int:
        """Blocks whose activations the backward pass needs: none below the first adapter."""
        if self.train_type == "full" or self.lora_layers <= 0:
            return layers
        return min(self.lora_layers, layers)


@dataclass(frozen=True)
class Plan:
    """Bytes by part, the batch sizes they were computed for, and the verdict."""

    shape: ModelShape
    demand: Demand
    weights: int
    master_weights: int
    moments: int
    rollout_copy: int
    reference_copy: int
    trainable_parameters: int
    checkpoint_bytes: int
    """One checkpoint-N on disk: what is trained, its float32 master and moments."""
    final_bytes: int
    """`final/` on disk: the weights."""
    budget_bytes: int
    gradients: int = 0
    """Of one micro-batch."""
    summed_gradients: int = 0
    """The sum over several micro-batches, in float32."""
    kv_cache: int = 0
    """Of one rollout batch, at full length."""
    rollout_logits: int = 0
    views: int = 0
    """Joined and merged weights for sampling, where there is room for them."""
    activations: int = 0
    """Of one micro-batch: what is kept for its backward pass."""
    temporaries: int = 0
    """Of the backward pass of one block."""
    logits: int = 0
    """Of the largest piece of a micro-batch's logits, with their gradients."""
    piece_logits: int = 0
    keep_logits: bool = False
    """Whether the logits of all pieces are kept: made once instead of twice."""
    in_flight: int = 0
    """What operations that are not yet done still hold, beyond what the computation needs."""
    rollout_batch_size: int = 0
    micro_batch_tokens: int = 0
    halved: tuple[str, ...] = ()
    """Which of the two memory ran out with, so that they are smaller now than planned."""
    suggestions: tuple[str, ...] = ()
    """Settings that would make it fit, each alone if one is enough. Empty when it fits."""

    @property
    def resident(self) -> int:
        """What is there in both phases."""
        parts = (self.weights, self.master_weights, self.moments)
        return sum(parts) + self.rollout_copy + self.reference_copy

    def rows_at_once(self, longest: int) -> int:
        """How many sequences of up to `longest` tokens to sample together.

        Those of a rollout, and more of an evaluation if they fit into what the run needs anyway.
        """
        if self.demand.rollout_batch_size or "rollout_batch_size" in self.halved:
            return self.rollout_batch_size
        row = (self.kv_cache + self.rollout_logits) / self.rollout_batch_size
        row *= max(1, longest / self.demand.sequence)
        fitting = int((self.needed - self.resident - self.views) // row)
        return max(self.rollout_batch_size, min(fitting, MAX_LOGITS // self.shape.vocab_size))

    @property
    def rollout_peak(self) -> int:
        return self.resident + self.kv_cache + self.rollout_logits + self.views

    @property
    def spare_for_rollouts(self) -> float:
        """What a view of the policy that samples faster may take (rollouts/merged_layers.py)."""
        without = self.resident + self.kv_cache + self.rollout_logits
        return HEADROOM * self.budget_bytes - without

    @property
    def gradient_needed(self) -> int:
        """The backward pass begins with all activations, and ends with all gradients."""
        begins = self.activations + max(self.logits, self.temporaries)
        ends = self.gradients + self.temporaries
        if self.demand.gradient_checkpointing:
            ends += self.activations
        return self.resident + self.summed_gradients + max(begins, ends)

    @property
    def gradient_peak(self) -> int:
        """MLX lets work in flight take more, as far as there is memory."""
        more = min(self.gradient_needed + self.in_flight, self.budget_bytes)
        return max(self.gradient_needed, more)

    @property
    def writing_peak(self) -> int:
        """Adapters are merged for `final/` one file after the other."""
        merged = 0 if self.demand.train_type == "full" else min(self.final_bytes, LARGEST_FILE)
        return self.resident + merged

    @property
    def fits_with_final(self) -> bool:
        """Whether the merged model can be evaluated beside the run."""
        return self.rollout_peak + self.final_bytes <= HEADROOM * self.budget_bytes

    @property
    def peak(self) -> int:
        return max(self.rollout_peak, self.gradient_peak, self.writing_peak)

    @property
    def needed(self) -> int:
        """The peak when MLX waits for work in flight, as it does where memory is short."""
        return max(self.rollout_peak, self.gradient_needed, self.writing_peak)

    @property
    def by_phase(self) -> dict[str, int]:
        return {"rollout": self.rollout_peak, "gradient": self.gradient_peak}

    @property
    def fits(self) -> bool:
        return self.needed <= HEADROOM * self.budget_bytes

    def table(self) -> str:
        """The plan as aligned plain text, several lines, in GB (10^9 bytes) or MB."""
        rows = [(label, getattr(self, name)) for name, label in _TABLE.items()]
        lines = [f"{label:<42}{readable(value):>12}" for label, value in rows if value]
        lines += [
            f"rollout batch {self.rollout_batch_size:,} completions, "
            f"micro-batch {self.micro_batch_tokens:,} tokens",
            f"{'fits' if self.fits else 'DOES NOT FIT'}: {readable(self.needed)} of "
            f"{readable(self.budget_bytes)}, of which {1 - HEADROOM:.0%} stay in reserve",
        ]
        if self.suggestions:
            lines += ["it would fit with:", *(f"  {text}" for text in self.suggestions)]
        return "\n".join(lines)


_TABLE = {
    "weights": "weights",
    "master_weights": "what weights lack of float32",
    "moments": "optimizer moments",
    "rollout_copy": "rollout copy",
    "reference_copy": "reference copy",
    "kv_cache": "KV cache of one rollout batch",
    "rollout_logits": "logits of one rollout step",
    "views": "weights merged or joined for sampling",
    "gradients": "gradients",
    "summed_gradients": "their sum over micro-batches",
    "activations": "activations of one micro-batch",
    "temporaries": "temporaries of one block",
    "logits": "or logits of one piece, with gradients",
    "in_flight": "held by work in flight",
    "rollout_peak": "peak of the rollout phase",
    "gradient_peak": "peak of the gradient phase",
    "writing_peak": "peak while final/ is written",
    "checkpoint_bytes": "disk: one checkpoint",
    "final_bytes": "disk: final model",
}


def adapter_parameters(shape: ModelShape, demand: Demand) -> int:
    matrices = projections(vars(shape))
    block = demand.lora_rank * sum(inputs + outputs for inputs, outputs in matrices)
    if demand.train_type == "dora":
        block += sum(outputs for _, outputs in matrices)  # the magnitudes
    return block * demand.trained_layers(shape.layers)


def _copies(shape: ModelShape, demand: Demand, weights: int, adapters: int) -> tuple[int, int]:
    """Bytes of the rollout copy and of the reference (design: the three policies)."""
    four_bit = int(shape.parameters * QUANTIZED_BITS / 8)
    stale = demand.sync_every_updates > 1
    if demand.train_type == "full":
        whole = four_bit if demand.quantize_for_rollouts else weights
        rollout = whole if demand.quantize_for_rollouts or stale else 0
        return rollout, whole if demand.has_reference else 0
    base = four_bit if demand.quantize_for_rollouts and shape.quantized_bits is None else 0
    return base + (adapters if base or stale else 0), 0


def _constant_parts(shape: ModelShape, demand: Demand) -> Plan:
    """The plan with every part that does not depend on the batch sizes."""
    width = demand.train_dtype_bytes
    quantized = shape.quantized_bits is not None
    weights = shape.bytes_on_disk if quantized else shape.parameters * width
    full = demand.train_type == "full"
    trainable = demand.trainable_parameters
    if trainable is None:
        trainable = shape.parameters if full else adapter_parameters(shape, demand)
    adapters = 0 if full else 4 * trainable
    master = demand.master_bytes * trainable if full and width < 4 else 0
    moments = round(demand.moment_bytes * trainable)
    rollout, reference = _copies(shape, demand, weights, adapters)
    return Plan(
        shape,
        demand,
        weights=weights + adapters,
        master_weights=master,
        moments=moments,
        rollout_copy=rollout,
        reference_copy=reference,
        trainable_parameters=trainable,
        checkpoint_bytes=(weights if full else adapters) + master + moments,
        final_bytes=weights if full else round(shape.parameters * width),  # fused, unpacked
        budget_bytes=demand.budget_bytes,
    )


def _row_bytes(shape: ModelShape, demand: Demand) -> tuple[int, int]:
    """KV cache and logits of one row of a rollout batch."""
    before = max(demand.prompt_tokens, demand.sequence - KV_CACHE_STEP)
    length = demand.sequence + before  # a cache that grows is copied
    values = 2 * shape.kv_heads * shape.head_dim * length
    if shape.state is not None:  # of fixed size: the old one, and the new one in its place
        values = 2 * shape.state
    cache = values * shape.layers * demand.train_dtype_bytes
    return cache, ROLLOUT_LOGIT_COPIES * 4 * shape.vocab_size


class MicroBatch(NamedTuple):
    """Rows that are read in one forward and backward pass, each prompt once for its group."""

    rows: int
    prompts: int
    demand: Demand

    @property
    def tokens(self) -> int:
        """Tokens that the blocks compute."""
        prompt, completion = self.demand.lengths
        return self.prompts * prompt + self.rows * completion


def _micro_batch(demand: Demand, rows: int) -> MicroBatch:
    groups = -(-rows // demand.num_generations)
    return MicroBatch(rows, groups if demand.shares_prompts else rows, demand)


def block_bytes(shape: ModelShape, batch: MicroBatch) -> tuple[int, int]:
    """What the blocks keep for the backward pass, and the temporaries of one (module docstring)."""
    demand = batch.demand
    width, hidden = demand.train_dtype_bytes, shape.hidden_size
    query, kv = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    inner = shape.intermediate_size * shape.experts_per_token
    prompt, completion = demand.lengths
    lean = demand.platform != "cpu" and shape.experts == 1 and shape.activation == "silu"
    kept = 3 if lean else 5  # device/swiglu.py
    token = width * (4 * hidden + 3 * query + 2 * kv + kept * inner + shape.scanned)
    temporary = width * (3 * hidden + 4 * inner)
    # Attention: what a completion sees of its prompt is copied for each row.
    joined = batch.rows * prompt * 2 * kv if demand.shares_prompts else 0
    before = batch.prompts * prompt * (prompt if demand.shares_prompts else prompt + completion)
    scores = shape.heads * (before + batch.rows * completion * (prompt + completion))
    if shape.state is not None:
        scores = 0
    passing = 2 * scores
    if demand.platform == "cuda":  # fused; with masks of shared prompts, fitted to one H200
        scores, passing = (6 * scores // 5 if demand.shares_prompts else 0), 0
    layer = token * batch.tokens + width * (joined + scores)
    once = temporary * batch.tokens + width * passing
    layers = demand.trained_layers(shape.layers)
    if demand.gradient_checkpointing:
        return width * hidden * batch.tokens * layers, layer + once
    return layer * layers, once


def piece_of_logits(demand: Demand) -> int:
    """Logits of a piece of the scored positions (gradient/scorer.py)."""
    return min(demand.budget_bytes // PIECE_PART // _logit_bytes(demand), MAX_PIECE_LOGITS)


def _logit_bytes(demand: Demand) -> int:
    """Of a logit whose gradient is computed: float32, in place of which comes the gradient."""
    width = demand.train_dtype_bytes
    return 4 + (width if width < 4 else 0)


def head_bytes(shape: ModelShape, batch: MicroBatch, keep: bool) -> int:
    """Logits of a piece with their gradient, and those of all pieces if they are kept.

    An entropy with a gradient makes p log p beside them in float32, 2 more on the way back where
    that is not one kernel (measured on a CPU: 3.0; what its queue holds, included).

    More than one piece of a head that is trained: also the gradient of a piece, and the old sum.
    """
    demand = batch.demand
    width = demand.train_dtype_bytes
    scored = batch.rows * demand.lengths[1]
    every = scored * shape.vocab_size
    made = min(every, piece_of_logits(demand))
    matrix = shape.vocab_size * shape.hidden_size * width
    sums = 2 * matrix if demand.train_type == "full" and made < every else 0
    queue = 2 if demand.platform == "cpu" else 1
    logits = queue * made * _logit_bytes(demand) + (every if keep else queue * made) * width
    if demand.entropy_bonus:
        logits += 4 * made * (3 if demand.platform == "cpu" else 1)
    return logits + 2 * scored * shape.hidden_size * width + sums


def _rollout_rows(shape: ModelShape, demand: Demand, left: float, row: int) -> int:
    """All completions of the update if they fit, else whole groups, else single rows."""
    most = max(1, min(demand.completions, MAX_LOGITS // shape.vocab_size))
    if demand.rollout_batch_size:
        return min(demand.rollout_batch_size, most)
    rows = max(1, min(most, int(left // row)))
    return rows - rows % demand.num_generations if rows > demand.num_generations else rows


def in_flight_bytes(shape: ModelShape, batch: MicroBatch, parts: tuple[int, int, int]) -> int:
    """What MLX's CUDA queue holds at the peak beyond what the computation needs.

    Fitted to the peaks of one H200 (benchmarks/plan_accuracy.py). The CPU's queue is part of the
    other estimates.
    """
    kept, temporary, logits = parts
    if batch.demand.platform != "cuda":
        return 0
    recomputed = batch.demand.gradient_checkpointing
    layers = batch.demand.trained_layers(shape.layers)
    everything = temporary * layers if recomputed else kept
    most = QUEUE_BYTES if recomputed else 5 * GB + 2 * temporary
    return int(min(most, everything // 10 + logits))


def _plan_of(plan: Plan, batch: MicroBatch, keep: bool = False) -> Plan:
    """The plan of the gradient phase with such micro-batches."""
    shape, demand, trainable = plan.shape, plan.demand, plan.trainable_parameters
    factor = demand.measured_factor
    parts = (*block_bytes(shape, batch), head_bytes(shape, batch, keep))
    kept, temporary, logits = (round(part * factor) for part in parts)
    plan = replace(
        plan,
        gradients=demand.gradient_bytes * trainable,
        summed_gradients=4 * trainable if batch.rows < demand.completions else 0,
        activations=kept,
        temporaries=temporary,
        logits=logits,
        piece_logits=piece_of_logits(demand),
        keep_logits=keep,
        in_flight=in_flight_bytes(shape, batch, (kept, temporary, logits)),
        micro_batch_tokens=demand.micro_batch_tokens or batch.tokens,
    )
    if keep or demand.platform != "cuda":
        return plan
    # Where there is room, the queue also holds the logits of the pieces that follow.
    scored = batch.rows * demand.lengths[1] * shape.vocab_size
    others = round(max(0, scored - plan.piece_logits) * _logit_bytes(demand) * factor)
    room = int(HEADROOM * plan.budget_bytes) - plan.by_phase["gradient"]
    return replace(plan, in_flight=plan.in_flight + max(0, min(others, room)))


def _with_largest_micro_batch(plan: Plan) -> Plan:
    """The most rows whose bytes and tokens fit: at least one, at most the whole update."""
    demand = plan.demand
    wanted, completions = demand.micro_batch_tokens, demand.completions
    cap = CPU_MICRO_BATCH_TOKENS if demand.platform == "cpu" else MAX_MICRO_BATCH_TOKENS
    limit = wanted or cap

    def of(rows: int) -> Plan:
        batch = _micro_batch(demand, rows)
        kept = _plan_of(plan, batch, keep=True)
        spare = kept.fits and not demand.gradient_checkpointing
        return kept if spare else _plan_of(plan, batch)

    def fits(rows: int) -> bool:
        tokens = _micro_batch(demand, rows).tokens
        return tokens <= limit and (bool(wanted) or of(rows).fits)

    # Monotone but for the last step: a whole update needs no sum.
    if fits(completions):
        return of(completions)
    most = 1 + bisect.bisect_left(range(2, completions), True, key=lambda r: not fits(r))
    group = demand.num_generations  # which is cut evenly where it has to be
    even = of(most // group * group or math.ceil(group / math.ceil(group / most)))
    largest = of(most)
    return replace(
        even, micro_batch_tokens=largest.micro_batch_tokens, keep_logits=largest.keep_logits
    )


def build(shape: ModelShape, demand: Demand) -> Plan:
    """The plan without suggestions."""
    plan = _constant_parts(shape, demand)
    cache, logits = _row_bytes(shape, demand)
    left = HEADROOM * demand.budget_bytes - plan.resident
    rows = _rollout_rows(shape, demand, left, cache + logits)
    plan = _with_largest_micro_batch(plan)
    plan = replace(
        plan, kv_cache=rows * cache, rollout_logits=rows * logits, rollout_batch_size=rows
    )
    return replace(plan, views=_views(plan))


def _views(plan: Plan) -> int:
    """Bytes of the views that rollouts/merged_layers.py makes of the policy that samples: half of
    the room is for merged weights, half for joined ones."""
    shape, demand, half = plan.shape, plan.demand, plan.spare_for_rollouts / 2
    whole = shape.parameters * demand.train_dtype_bytes
    quantized = shape.quantized_bits is not None
    unpacked = quantized and demand.platform != "metal" and whole <= half
    packed = not unpacked and (quantized or demand.quantize_for_rollouts)
    merged = whole if unpacked else _merged_bytes(shape, demand)
    merges = demand.train_type != "full" and not packed and merged <= half
    joined = _joined_bytes(shape, QUANTIZED_BITS / 8 if packed else demand.train_dtype_bytes)
    joins = _joins(demand, merges, packed) and joined <= half
    return int(merged * merges + joined * joins)


def _merged_bytes(shape: ModelShape, demand: Demand) -> int:
    """Of all matrices with adapters."""
    matrices = sum(inputs * outputs for inputs, outputs in projections(vars(shape)))
    return matrices * demand.trained_layers(shape.layers) * demand.train_dtype_bytes


def _joined_bytes(shape: ModelShape, width: float) -> float:
    """Of the matrices that have an input in common, of so many bytes a weight."""
    together = shape.heads * shape.head_dim + 2 * shape.kv_heads * shape.head_dim
    if shape.experts == 1:
        together += 2 * shape.intermediate_size
    return together * shape.hidden_size * shape.layers * width


def _joins(demand: Demand, merges: bool, packed: bool) -> bool:
    """Whether such matrices are alike, also where they have adapters beside them."""
    low_rank = demand.train_type == "lora" and packed  # other adapted layers are not alike
    alike = demand.train_type == "full" or merges or low_rank
    return demand.platform != "metal" and alike


def make_plan(shape: ModelShape, **demand: Any) -> Plan:
    """Plan the memory of a run; the keywords are the fields of `Demand`.

    Batch sizes left at 0 are chosen: as many rows as fit the budget, in whole groups where one
    fits, and a micro-batch of as many sequences as fit, up to MAX_MICRO_BATCH_TOKENS (on
    a CPU CPU_MICRO_BATCH_TOKENS). Without suggestions: memory/suggestions.py adds those.

    Raises:
        TypeError: unknown or missing keyword.
        ValueError: an unknown train_type, full fine-tuning of a quantized model, a size below 1.
    """
    wanted = Demand(**demand)
    if wanted.train_type not in ("full", "lora", "dora"):
        raise ValueError(f"train_type must be full, lora or dora, not {wanted.train_type!r}")
    if wanted.train_type == "full" and shape.quantized_bits is not None:
        raise ValueError("a quantized model cannot be trained in full, only by lora or dora")
    positive = ("prompts_per_update", "num_generations", "prompt_tokens", "completion_tokens")
    for name in positive:
        if getattr(wanted, name) < 1:
            raise ValueError(f"{name} must be at least 1, not {getattr(wanted, name)}")
    return build(shape, wanted)
