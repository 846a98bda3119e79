"""What each stage of an update costs alone, so that a regression shows where it is.

    uv run python benchmarks/micro.py --shape 1.5b --rows 16 64 256

Random weights in a named shape cost what trained ones do; stop tokens are off. Stages: prefill,
decode (the whole sampler, at several numbers of rows, beside mlx_lm.batch_generate and with 4-bit
weights), sampler, log-probs, gradient, optimizer, re-quantization. `--long 2048 8192` instead
samples completions of such lengths. Each stage appends one JSON record to
benchmarks/records/micro.jsonl; the tables in benchmarks/RESULTS.md are made from them.
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks import results  # noqa: E402
from benchmarks.update_cost import SHAPES, WithoutStop, write_model, write_questions  # noqa: E402
from utils.base.script import load_script  # noqa: E402
from utils.data.completion import Completion  # noqa: E402
from utils.device import cores, runtime  # noqa: E402
from utils.device.cuda import attention  # noqa: E402
from utils.gradient.micro_batch import MicroBatch  # noqa: E402
from utils.rollouts import caches, compiled_step, merged_layers  # noqa: E402

RECORDS = ROOT / "benchmarks/records/micro.jsonl"
STAGES = ("prefill", "decode", "peer", "4-bit", "sampler", "log-probs", "gradient", "optimizer")
STAGES += ("attention", "re-quantization")
Stage = tuple[str, int, int, Callable[[], Any]]  # name, rows, tokens a call, and the call


class Bench:
    """A trainer on random weights, and what the stages of one update take from it."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        import mlx.core as mx
        import numpy as np

        self.arguments, self.grpo = arguments, load_script()
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            write_model(folder, arguments.shape, arguments.dtype, 0)
            write_questions(folder, 64)
            overrides = [f"model_name={folder}", f"dataset={folder}", f"output_dir={folder}/out"]
            overrides += [f"train_type={arguments.train_type}", "stop_strings=[]", "eval_samples=0"]
            overrides += ['system_prompt=""', "quantize_for_rollouts=false", *arguments.set]
            preset = str(ROOT / "configs/default.toml")
            self.trainer = self.grpo.build_trainer(self.grpo.read_config(preset, overrides), "")
        self.model = self.trainer.model
        self.vocabulary = SHAPES[arguments.shape]["vocab_size"]
        self.random = np.random.default_rng(0)
        self.policy = merged_layers.joined(merged_layers.merged(self.model, np.inf), np.inf)
        self.mx = mx

    def prompts(self, count: int, ragged: bool = False) -> list[list[int]]:
        lengths = [self.arguments.prompt - (7 * n % 40 if ragged else 0) for n in range(count)]
        return [self.random.integers(3, self.vocabulary, n).tolist() for n in lengths]

    def prefill(self, rows: int) -> None:
        prompts = self.prompts(max(1, rows // 16))
        cache = caches.prefill(self.policy, prompts, [n % len(prompts) for n in range(rows)], 64)
        self.mx.eval([(layer.keys, layer.values) for layer in cache])

    def sample(self, model: Any, rows: int, tokens: int, ragged: bool = False) -> None:
        import numpy as np

        prompts = self.prompts(max(1, rows // 16), ragged)
        sampler = self.grpo.sample_batch(
            model,
            prompts,
            sorted(n % len(prompts) for n in range(rows)),
            np.stack([self.grpo.random_key(0, n, ()) for n in range(rows)]),
            self.grpo.Sampling(temperature=1.0, max_tokens=tokens),
            self.grpo.Reader(
                self.grpo.StopRule(WithoutStop(self.trainer.tokenizer), ()), rows, rows, tokens
            ),
        )
        (done,) = cores.in_turns([sampler])
        assert {len(completion.ids) for completion in done} == {tokens}

    def plain_steps(self, rows: int, tokens: int) -> None:
        """The same, with steps that are not compiled on CUDA either."""
        usual = compiled_step.forward
        compiled_step.forward = lambda model, cache: partial(model, cache=cache)
        try:
            self.sample(self.policy, rows, tokens)
        finally:
            compiled_step.forward = usual

    def mlx_rotations(self, rows: int, tokens: int) -> None:
        """The same, with MLX's kernel for the rotary embedding."""
        usual = attention.noting_rotations
        attention.noting_rotations = lambda _: nullcontext()
        try:
            self.sample(self.policy, rows, tokens)
        finally:
            attention.noting_rotations = usual

    def attention(self, rows: int, tokens: int, ours: bool) -> Callable[[], None]:
        """One query to the middle of completions of so many tokens, in each layer, in turn."""
        mx, a, prompt = self.mx, self.model.args, self.arguments.prompt
        groups, size = a.num_key_value_heads, a.hidden_size // a.num_attention_heads
        shape, end = (rows, groups, prompt + tokens, size), prompt + tokens // 2

        def random(*shape: int) -> Any:
            return mx.random.normal(shape).astype(mx.bfloat16)

        queries, new = random(rows, a.num_attention_heads, 1, size), random(rows, groups, 1, size)
        layers = [[random(*shape) for _ in "kv"] for _ in range(a.num_hidden_layers)]
        cache = caches.RolloutCache(caches.Rows([prompt] * rows, tokens))
        cache.rows.be_at(mx.zeros((rows,), mx.int32) + end)
        mx.eval(queries, new, layers, cache.rows.position)

        def in_rows(queries: Any, keys: Any, values: Any) -> Any:
            cache.keys, cache.values = keys, values
            return attention.to_rows(queries, new, new, cache, size**-0.5)

        def fused(queries: Any, keys: Any, values: Any) -> Any:
            seen = keys[:, :, : end + 1], values[:, :, : end + 1]
            return mx.fast.scaled_dot_product_attention(queries, *seen, scale=size**-0.5)

        def every_layer() -> None:
            result = queries
            for layer in layers:  # as in a model, each waits for the one before
                result = (in_rows if ours else fused)(result, *layer)
            mx.eval(result)

        return every_layer

    def peer(self, rows: int, tokens: int) -> None:
        """The same with mlx-lm's own batch generator."""
        from mlx_lm.generate import BatchGenerator

        generator = BatchGenerator(
            self.model, max_tokens=tokens, completion_batch_size=rows, prefill_batch_size=rows
        )
        generator.insert(
            [p for p in self.prompts(max(1, rows // 16)) for _ in range(min(rows, 16))]
        )
        count = 0
        while responses := generator.next_generated():
            count += len(responses)
        generator.close()
        assert count == rows * tokens, count

    def sampler(self, rows: int) -> Callable[[], None]:
        mx, how = self.mx, self.grpo.Sampling(temperature=1.0, max_tokens=1)
        step = caches.compiled(partial(self.grpo.sample_tokens, how=how))
        logits = mx.random.normal((rows, self.vocabulary)).astype(mx.bfloat16)
        keys = mx.array(self.random.integers(0, 2**32, (rows, 2), dtype="uint32"))
        mx.eval(logits, keys)

        def twenty_steps() -> None:
            mx.eval([step(logits, keys + n) for n in range(20)])

        return twenty_steps

    def micro_batch(self) -> MicroBatch:
        """The first micro-batch of an update with completions of full length."""
        import numpy as np

        trainer, count = self.trainer, self.trainer.args.num_generations
        length = trainer.sampling.max_tokens
        cells = np.empty((1, count), object)
        for n in range(count):
            ids = self.random.integers(3, self.vocabulary, length).tolist()
            cells[0, n] = Completion(ids, [-11.0] * length, [1] * length, "length", "")
        rewards = np.zeros((1, count))
        rollout = self.grpo.Rollout(np.zeros(1, int), cells, rewards[..., None], rewards)
        return trainer.micro_batches(rollout, np.linspace(-1, 1, count)[None])[0]

    def training_stages(self) -> Iterator[Stage]:
        trainer, mx = self.trainer, self.mx
        batch = self.micro_batch()
        rows, tokens = len(batch.mask), int(batch.mask.sum().item())
        yield "log-probs", rows, tokens, lambda: mx.eval(trainer.rescored(self.model, batch)[0])
        result: list[Any] = []

        def gradient() -> None:
            result[:] = trainer.loss_and_grad(batch)
            mx.eval(result)

        self.model.train()
        yield "gradient", rows, tokens, gradient
        self.model.eval()
        if not result:
            gradient()
        yield "optimizer", rows, 0, lambda: trainer.apply_gradients(0.0, result[1], 1)

    def stages(self) -> Iterator[Stage]:
        a, tokens = self.arguments, self.arguments.tokens
        for rows in a.rows:
            groups = max(1, rows // 16)
            yield "prefill", rows, groups * a.prompt, partial(self.prefill, rows)
            decode = partial(self.sample, self.policy, rows, tokens)
            yield "decode", rows, rows * tokens, decode
            yield "decode, ragged prompts", rows, rows * tokens, partial(decode, ragged=True)
            if self.mx.cuda.is_available():
                plain = partial(self.plain_steps, rows, tokens)
                yield "decode, steps not compiled", rows, rows * tokens, plain
                apart = partial(self.mlx_rotations, rows, tokens)
                yield "decode, rotated by MLX", rows, rows * tokens, apart
                yield "attention of a token", rows, rows, self.attention(rows, tokens, True)
                yield "attention of a token, MLX's", rows, rows, self.attention(rows, tokens, False)
            yield (
                "peer: mlx_lm.batch_generate",
                rows,
                rows * tokens,
                partial(self.peer, rows, tokens),
            )
            yield "sampler, 20 steps", rows, 20 * rows, self.sampler(rows)
        packed = self.grpo.quantize_copy(self.model)
        for rows in a.rows:
            few = partial(self.sample, packed, rows, min(tokens, 16))
            yield "4-bit decode", rows, rows * min(tokens, 16), few
        yield from self.training_stages()

        def requantize() -> None:
            self.mx.eval(self.grpo.quantize_copy(self.model).parameters())

        yield "re-quantization", 0, 0, requantize

    def long(self) -> Iterator[Stage]:
        for tokens in self.arguments.long:
            for rows in self.arguments.rows:
                how = partial(self.sample, self.policy, rows, tokens)
                yield "long completions", rows, rows * tokens, how


def measured(stage: Stage, repeat: int, warm: bool) -> dict[str, Any]:
    import mlx.core as mx

    name, rows, tokens, call = stage
    mx.clear_cache()
    if warm:  # the first call compiles
        call()
    mx.reset_peak_memory()
    seconds = []
    for _ in range(repeat):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    middle = statistics.median(seconds)
    return {
        "stage": name,
        "rows": rows,
        "tokens": tokens,
        "ms": round(middle * 1e3, 2),
        "tokens_per_second": round(tokens / middle) if tokens else None,
        "peak_gb": round(mx.get_peak_memory() / 1e9, 2),
    }


def measure(arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    bench = Bench(arguments)
    versions = runtime.provenance(ROOT)
    about = {"date": time.strftime("%Y-%m-%d")}
    about |= {name: versions[name] for name in ("mlx", "mlx-lm", "device", "git_revision")}
    about |= {name: getattr(arguments, name) for name in ("shape", "dtype", "train_type", "prompt")}
    about["settings"] = arguments.set
    stages = bench.long() if arguments.long else bench.stages()
    for stage in stages:
        if arguments.stage and not any(stage[0].startswith(name) for name in arguments.stage):
            continue
        record = measured(stage, 1 if arguments.long else arguments.repeat, not arguments.long)
        print(record, flush=True)
        yield about | record


def table(records: list[dict[str, Any]]) -> list[str]:
    """The newest record of each stage on each machine."""
    key = ("device", "shape", "dtype", "train_type", "stage", "rows", "tokens")
    newest = {tuple(r[name] for name in key): r for r in records}
    rows = [
        "| machine | shape | training | stage | rows x tokens | ms | tokens/s | peak GB | date |",
        "|---" * 9 + "|",
    ]
    for r in newest.values():
        speed = f"{r['tokens_per_second']:,}" if r["tokens_per_second"] else ""
        work = f"{r['rows']} x {r['tokens'] // r['rows']}" if r["tokens"] else r["rows"] or ""
        if r["stage"] == "prefill":  # each prompt once
            work = f"{r['tokens'] // r['prompt']} x {r['prompt']}, for {r['rows']} rows"
        rows.append(
            f"| {r['device']} | {r['shape']} {r['dtype']} | {r['train_type']} | {r['stage']} "
            f"| {work} | {r['ms']:,} | {speed} | {r['peak_gb']} "
            f"| {r['date']} |"
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--shape", choices=SHAPES, default="tiny")
    add("--train-type", choices=("full", "lora", "dora"), default="full")
    add("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    add("--rows", type=int, nargs="+", default=[1, 16, 64], help="of the rollout stages")
    add("--prompt", type=int, default=150, help="tokens of a prompt, shared by 16 rows")
    add("--tokens", type=int, default=64, help="of a completion in the rollout stages")
    add("--long", type=int, nargs="+", default=[], help="only: sample completions of such lengths")
    add("--stage", nargs="+", default=[], help=f"only stages that start so: {', '.join(STAGES)}")
    add("--repeat", type=int, default=3, help="calls of a stage after one that warms up")
    add("--set", action="append", default=[], metavar="KEY=VALUE", help="a setting of the trainer")
    add("--table-only", action="store_true", help="rewrite RESULTS.md from the records")
    arguments = parser.parse_args()
    for record in () if arguments.table_only else measure(arguments):
        results.append(RECORDS, record)
    records = results.read(RECORDS)
    short = [r for r in records if r["stage"] != "long completions"]
    long = [r for r in records if r["stage"] == "long completions"]
    results.write_section("micro", table(short))
    results.write_section("long-completions", table(long))


if __name__ == "__main__":
    main()
