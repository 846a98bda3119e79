"""When 4-bit rollouts are worth a line."""

import pytest
from helpers import make_trainer

from utils.rollouts import merged_layers


@pytest.mark.parametrize(
    ("own", "packed", "said"),
    [
        (0.1, 0.05, None),
        (0.1, 0.109, None),
        (0.1, 0.111, "111 ms a step of 8 rows against 100;"),
        (0.02, 0.0219, None),
        (0.02, 0.0221, "22.1 ms a step of 8 rows against 20;"),
        (None, 9.0, None),
    ],
)
def test_a_tenth_is_what_a_4_bit_step_may_cost(
    model_dir, data_dir, tmp_path, monkeypatch, own, packed, said
):
    model = make_trainer(model_dir, data_dir, tmp_path / "o").model
    times = iter([own, packed])
    monkeypatch.setattr(merged_layers, "_step_seconds", lambda *_, **__: next(times))
    note = merged_layers.cost_of_quantizing(model, lambda: model, 8, 0.0)
    assert (note is None) == (said is None)
    assert note is None or said in note
