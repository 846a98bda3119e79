"""Checkpoint folders on disk: written aside and renamed, so that a kill never leaves half a one."""

import copy
import json
import math
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from . import settings
from .console import say
from .errors import RunError, UserError

RUN_FILES = (
    *("config.resolved.json", "provenance.json", "training_log.jsonl"),
    *("metrics.csv", "metrics_eval.csv", "tensorboard"),  # what trackers write
)
STATE, ARRAYS = "trainer_state.json", "trainer_state.safetensors"


@contextmanager
def written_aside(path: Path) -> Iterator[Path]:
    """A temporary folder beside `path` that takes its place when the block ends well."""
    temporary = path.with_name(f".{path.name}.incomplete")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        for file in temporary.rglob("*"):
            _flush(file)
        take_place(temporary, path)
        _flush(path.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def take_place(new: Path, path: Path) -> None:
    """Rename the folder `new` to `path`; what stood there is deleted only after that."""
    if not path.exists():
        new.rename(path)
        return
    retired = path.with_name(f".{path.name}.old-{os.getpid()}")
    path.rename(retired)
    new.rename(path)
    shutil.rmtree(retired)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def found(output_dir: Path) -> list[Path]:
    """The checkpoints of a run, oldest first."""
    folders = [p for p in output_dir.glob("checkpoint-*") if p.name[11:].isdigit()]
    return sorted((p for p in folders if (p / STATE).is_file()), key=lambda p: int(p.name[11:]))


def prune(output_dir: Path, limit: int) -> None:
    """Delete the oldest checkpoints beyond `limit` (0 keeps all)."""
    for folder in found(output_dir)[:-limit] if limit else []:
        shutil.rmtree(folder)


def to_resume(output_dir: Path, resume: str) -> Path | None:
    """The checkpoint that `resume` names: "auto" is the newest (None if there is none yet).

    Raises:
        UserError: a named folder is not a checkpoint.
    """
    if resume == "auto":
        newest = next(iter(reversed(found(output_dir))), None)
        if newest is None and (output_dir / "final").exists():
            raise UserError(
                f"resume: the run in {output_dir} is finished (see {output_dir / 'final'}) and has "
                "no checkpoint to go on from; overwrite=true without resume starts it over"
            )
        return newest
    if not (Path(resume) / STATE).is_file():
        raise UserError(f"resume = {resume!r} is not a checkpoint folder (no {STATE} in it)")
    return Path(resume)


def remains_of_run(output_dir: Path) -> list[Path]:
    """What an earlier run left in the folder."""
    names = [output_dir / name for name in (*RUN_FILES, "final")]
    return [path for path in [*names, *output_dir.glob("checkpoint-[0-9]*")] if path.exists()]


def check_output(output_dir: Path, command: str, config: Any) -> None:
    """Refuse an output folder that can't be written or holds another run. Writes nothing.

    Raises:
        UserError: with the commands that continue or replace the other run.
    """
    old = remains_of_run(output_dir)
    for name in ("model_name", "adapter_path", "dataset") if config.overwrite else ():
        source = Path(getattr(config, name) or "/").resolve()
        if any(source.is_relative_to(path.resolve()) for path in old):
            raise UserError(f"overwrite would delete {name} = {source}: choose another output_dir")
    if old and not (config.overwrite or config.resume):
        ways = f"Replace it:\n  {command} --set overwrite=true"
        if found(output_dir):
            ways = f"Continue it:\n  {command} --set resume=auto\nor r{ways[1:]}"
        raise UserError(f"output_dir {output_dir} already holds a run ({old[0].name}). {ways}")
    existing = next(path for path in (output_dir, *output_dir.parents) if path.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        raise UserError(f"output_dir {output_dir} is not writable ({existing})")


def claim(output_dir: Path, *, overwrite: bool) -> None:
    """Make the folder, and with `overwrite` delete what an earlier run left in it.

    Raises:
        UserError: the file system refuses.
    """
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        old = remains_of_run(output_dir) if overwrite else []
        for path in old:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        if old:
            say(f"replaced  the earlier run in {output_dir} (overwrite = true)")
    except OSError as error:
        reason = error.strerror or str(error)
        raise UserError(f"output_dir {output_dir} is not writable: {reason}") from None


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def write_state(folder: Path, counters: dict[str, Any], arrays: dict[str, Any]) -> None:
    """Counters (JSON) and arrays (flat name -> mx.array) of the trainer."""
    import mlx.core as mx

    mx.save_safetensors(str(folder / ARRAYS), arrays)
    write_json(folder / STATE, counters)


def read_state(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    import mlx.core as mx

    counters = json.loads((folder / STATE).read_text(encoding="utf-8"))
    return counters, dict(mx.load(str(folder / ARRAYS)))  # type: ignore[arg-type]


def truncate_log(path: Path, update: int) -> None:
    """Drop the records after `update`: the resumed run writes them again."""
    if not path.exists():
        return
    lines = path.read_text(encoding="utf-8").splitlines()
    kept = [line for line in lines if _update_of(line) <= update]
    temporary = path.with_suffix(".incomplete")
    temporary.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
    os.replace(temporary, path)


def _update_of(line: str) -> float:
    try:
        return json.loads(line)["update"]
    except json.JSONDecodeError:  # a kill cut the last line short
        return math.inf


def write_model(folder: Path, model: Any, tokenizer: Any, config: dict, source: Path) -> None:
    """A complete model folder that `mlx_lm.load` reads: weights, config, tokenizer, custom code."""
    from mlx_lm.utils import save_config, save_model

    save_model(folder, model, donate_model=False)
    save_config(dict(config), config_path=folder / "config.json")
    tokenizer.save_pretrained(str(folder))
    for file in [*source.glob("*.py"), *source.glob("generation_config.json")]:
        shutil.copy(file, folder)


def write_adapters(folder: Path, model: Any, adapter_config: dict[str, Any]) -> None:
    """Adapters in mlx-lm's format: `mlx_lm.load(base, adapter_path=folder)`, `mlx_lm.fuse`."""
    import mlx.core as mx

    folder.mkdir(exist_ok=True)
    weights = flat(model.trainable_parameters())
    mx.save_safetensors(str(folder / "adapters.safetensors"), weights)
    write_json(folder / "adapter_config.json", adapter_config)


def write_stop_strings(folder: Path, stop_strings: list[str], eos_ids: Iterable[int]) -> None:
    """Stop strings into generation_config.json: EOS after the answer was not trained with them."""
    path = folder / "generation_config.json"
    settings = {"eos_token_id": sorted(eos_ids)}  # in a file without it, transformers has none
    if path.exists():
        settings = json.loads(path.read_text(encoding="utf-8"))
    settings.pop("stop_strings", None)  # transformers minds an empty list
    write_json(path, settings | ({"stop_strings": stop_strings} if stop_strings else {}))


# What a resumed run needs of the trainer beside weights and optimizer, and the settings that may
# change in between because no later update depends on them.
COUNTERS = (
    *("step", "update_step", "rollout", "last_sync", "bad_updates", "elapsed"),
    *("drawn", "reward_moments", "kl_coeff"),
)
MAY_CHANGE = {
    *("resume", "overwrite", "max_hours", "logging_steps", "log_jsonl", "log_completions"),
    *("report_to", "save_steps", "save_total_limit", "eval_steps", "eval_samples", "run_name"),
    *("eval_every_updates", "eval_subset_size", "eval_max_new_tokens", "output_dir"),
    *("closing_note", "rollout_batch_size", "micro_batch_tokens", "gradient_checkpointing"),
    *("wired_limit_gb", "cache_limit_gb", "use_compile"),
    *("remote_rm_url", "reward_timeout"),
}


def save(path: Path, trainer: Any) -> None:
    """Write the trainer as a checkpoint folder: model or adapters, and its state."""
    with written_aside(path) as folder:
        if trainer.loaded.train_type == "full":
            write_trained_model(folder, trainer, trainer.model, trainer.loaded.config)
        else:
            write_adapters(folder, trainer.model, trainer.loaded.adapter_config)
        counters = {name: getattr(trainer, name) for name in COUNTERS}
        counters |= {"history": trainer.log.history, "pending": trainer.log.pending}
        counters["config"] = settings.recorded(trainer.args)
        write_state(folder, counters, state_arrays(trainer))


def flat(tree: Any) -> dict[str, Any]:
    """Dotted name -> array."""
    from mlx.utils import tree_flatten

    return dict(tree_flatten(tree))


def state_arrays(trainer: Any) -> dict[str, Any]:
    """The optimizer's state, and a sampling policy that is stale."""
    arrays = {f"optimizer.{name}": x for name, x in trainer.optimizer.arrays().items()}
    weights = flat(trainer.model.trainable_parameters())
    if trainer.model_old is not None and trainer.args.sync_every_updates > 1:
        for name, value in flat(trainer.model_old.parameters()).items():
            if trainer.loaded.train_type == "full" or name in weights:
                arrays[f"old.{name}"] = value
    if trainer.args.ref_sync_updates:  # a reference that moves
        for name, value in flat(trainer.ref_model.parameters()).items():
            if name in weights:
                arrays[f"reference.{name}"] = value
    return arrays


def load(folder: Path, trainer: Any) -> None:
    """Bring a fresh trainer to where the checkpoint was written.

    Raises:
        UserError: a setting that would change the rest of the run differs.
    """
    try:
        counters, arrays = read_state(folder)
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(f"resume: checkpoint {folder} cannot be read: {error}") from None
    refuse_changes(counters.pop("config"), settings.recorded(trainer.args))
    trainer.log.history, trainer.log.pending = counters.pop("history"), counters.pop("pending")
    kind = "model" if trainer.loaded.train_type == "full" else "adapters"
    for file in sorted(folder.glob(f"{kind}*.safetensors")):
        trainer.model.load_weights(str(file), strict=False)
    for name, value in counters.items():
        setattr(trainer, name, value)
    trainer.saved_at = trainer.update_step
    parts: dict[str, dict] = {"optimizer": {}, "old": {}, "reference": {}}
    for name, value in arrays.items():
        part, _, rest = name.partition(".")
        parts[part][rest] = value
    trainer.optimizer.load(parts["optimizer"])
    if parts["reference"]:
        trainer.ref_model.load_weights(list(parts["reference"].items()), strict=False)
    if parts["old"]:
        trainer.model_old = trainer.copy_policy()
        trainer.model_old.load_weights(list(parts["old"].items()), strict=False)


def refuse_changes(before: dict[str, Any], now: dict[str, Any]) -> None:
    changed = [
        f"{name} (was {before.get(name)!r}, is {value!r})"
        for name, value in now.items()
        if before.get(name) != value and name not in MAY_CHANGE
    ]
    if changed:
        raise UserError(
            f"resume: these settings differ from the run's: {', '.join(changed)}; set them back, "
            "or start anew in another output_dir"
        )


def write_trained_model(folder: Path, trainer: Any, model: Any, config: dict[str, Any]) -> None:
    write_model(folder, model, trainer.tokenizer, config, trainer.loaded.folder)
    write_stop_strings(folder, trainer.args.stop_strings, trainer.tokenizer.eos_token_ids)


def write_fused(folder: Path, trainer: Any) -> Any:
    """Write and return the model with its adapters merged, at full precision.

    Merged into 4-bit weights again, most of what was learnt would be rounded away.
    """
    from mlx.utils import tree_unflatten
    from mlx_lm.utils import dequantize_model

    fused = copy.deepcopy(trainer.model)
    merged = [(n, m.fuse(dequantize=True)) for n, m in fused.named_modules() if "lora_a" in m]
    fused.update_modules(tree_unflatten(merged))
    fused = dequantize_model(fused)
    config = dict(trainer.loaded.config)
    config.pop("quantization", None)
    config.pop("quantization_config", None)
    write_trained_model(folder, trainer, fused, config)
    write_adapters(folder / "adapters", trainer.model, trainer.loaded.adapter_config)
    return fused


def finish(trainer: Any) -> None:
    """Evaluate once more and write `final/`, a model folder that mlx_lm loads by itself."""
    if trainer.log.pending:
        trainer.log.training(trainer.step, trainer.elapsed)
    if trainer.step and trainer.update_step < trainer.total_updates:  # out of time
        keep(trainer)
    elif trainer.loaded.train_type != "full" and trainer.saved_at != trainer.update_step:
        # Fusing takes memory that training did not: the adapters first.
        trainer.save_checkpoint(trainer.output_dir / f"checkpoint-{trainer.step}")
    trainer.evaluate("test")
    final = trainer.output_dir / "final"
    with written_aside(final) as folder:
        if trainer.loaded.train_type == "full":
            write_trained_model(folder, trainer, trainer.model, trainer.loaded.config)
        else:
            compare_fused(trainer, write_fused(folder, trainer))
    trainer.log.summary(trainer.update_step)
    say(f"saved     {final}")
    if trainer.args.closing_note:
        say(f"note      {trainer.args.closing_note}")


def compare_fused(trainer: Any, fused: Any) -> None:
    if trainer.eval_dataset:
        samples = trainer.args.eval_samples
        score = trainer.evaluate_em(trainer.eval_dataset, samples, model=fused)
        unfused = trainer.log.history[-1]["em"]
        say(f"fused     scores {score:.3f}, base with adapters {unfused:.3f}")


def keep(trainer: Any) -> None:
    """Save the last finished update, unless that was done, and say how to go on from it."""
    path = trainer.output_dir / f"checkpoint-{trainer.step}"
    if trainer.saved_at != trainer.update_step:
        trainer.save_checkpoint(path)
    say(f"stopped   after update {trainer.update_step}, saved in {path}. To continue:")
    say(f"          {trainer.command} --set resume=auto")


def stopped(trainer: Any, stop: Exception) -> int:
    """Keep the last finished update if there is one; 130 for Ctrl-C, errors go on up.

    Whatever stops a run does so before the weights of an unfinished update move.
    """
    if trainer.step:
        keep(trainer)
    else:
        say("stopped   before the first update was finished: nothing to save")
    if isinstance(stop, RunError):
        raise stop
    return 130
