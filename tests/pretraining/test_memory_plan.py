"""The plan of utils/pretrain.py against what updates took, and the rows that it chooses."""

import dataclasses
import gc

import pytest
from conftest import ROOT, make_model
from helpers import QWEN_1_5B, one_operation_at_a_time

from utils import pretrain
from utils.model.shape import read_shape, shape_from_config
from utils.pretraining import memory_plan

# isort: split
import mlx.core as mx
import numpy as np


def update_of(**changes):
    shape = shape_from_config(QWEN_1_5B, changes.pop("width", 2))
    values = {"train_type": "full", "storage": 4, "compute": 2, "batch_rows": 32}
    values |= {"row_tokens": 512, "checkpointing": False, "platform": "metal"}
    return memory_plan.Update(shape, **(values | {"budget": 64 * 10**9} | changes))


@pytest.mark.parametrize("kind", ["full", "lora"])
@pytest.mark.parametrize(("vocab", "rows", "tokens"), [(384, 4, 128), (8192, 2, 64)])
def test_the_plan_is_near_the_measured_peak(tmp_path, kind, vocab, rows, tokens):
    folder = make_model(tmp_path / "model", vocab=vocab, hidden=128, layers=4)
    text = "".join(f"How many apples are {n}? <answer> {n + 1} </answer>\n" for n in range(900))
    (tmp_path / "text").mkdir()
    (tmp_path / "text/0.txt").write_text(text)
    given = ["--initial-checkpoint-dir", str(folder), "--tokenizer-dir", "", "--compile", "false"]
    given += ["--train-data-path", str(tmp_path / "text"), "--precision", "32-true"]
    given += ["--max-seq-length", str(tokens), "--global-batch-size", str(2 * rows)]
    given += ["--micro-batch-size", str(rows), "--max-updates", "9", "--train-type", kind]
    _, overrides = pretrain.parse(given, pretrain.PretrainConfig)
    config = pretrain.filled(pretrain.resolve(ROOT / "configs/pretrain/moe_200m.toml", overrides))
    gc.collect()
    others = mx.get_active_memory()
    trainer = pretrain.Trainer(config, pretrain.prepare(config, smoke_test=False))
    trainer.train_step()
    mx.clear_cache()
    mx.reset_peak_memory()
    with one_operation_at_a_time():
        trainer.train_step()
    update = pretrain.update_of(config, read_shape(folder), kind, tokens)
    plan = memory_plan.planned(update, rows)
    measured = mx.get_peak_memory() - others
    assert 0.8 < plan.needed / measured < 1.5


def test_as_many_rows_as_fit_in_equal_parts():
    sizes = [memory_plan.planned(update_of(budget=n * 10**9)) for n in (1, 30, 40, 64)]
    assert [plan.fits for plan in sizes] == [False, False, True, True]
    rows = [plan.micro_batch_size for plan in sizes]
    assert rows == sorted(rows)
    assert rows[0] == 1
    assert all(32 % n == 0 for n in rows)
    assert memory_plan.planned(update_of(), 5).micro_batch_size == 5


def test_adapters_on_a_4_bit_base_fit_where_full_training_does_not():
    budget = {"budget": int(10.7e9), "batch_rows": 8}
    full = memory_plan.planned(update_of(**budget))
    lora = memory_plan.planned(update_of(**budget, train_type="lora", width=0.5625))
    assert not full.fits
    assert lora.fits
    assert lora.weights < 1.2e9
    assert lora.moments == 8 * lora.update.trained


def test_what_would_fit_is_named():
    table = memory_plan.planned(update_of(budget=int(20e9))).table()
    assert "DOES NOT FIT" in table
    assert 'train_type = "lora"' in table
    table = memory_plan.planned(update_of(budget=int(40e9)), 32).table()
    assert "it would fit with:\n  micro_batch_size = 0" in table
    assert "a smaller model" in memory_plan.planned(update_of(budget=10**8)).table()


def test_checkpointing_keeps_less():
    plain, saving = (memory_plan.plan_for(update_of(checkpointing=x), 8) for x in (False, True))
    assert saving.activations < plain.activations / 5
    more = dataclasses.replace(plain, logits=0)
    assert more.needed < plain.needed
    assert np.isclose(plain.disk, 12 * plain.update.trained)
