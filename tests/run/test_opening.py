"""The folder of a run is held by one, found as it was left, and nothing is written too early."""

import pytest
from helpers import make_config, run_training, stop_after

from utils.base.errors import UserError
from utils.run import opening


def test_a_new_folder_is_not_written_to_yet(model_dir, data_dir, tmp_path):
    config = make_config(model_dir, data_dir, tmp_path / "o")
    with opening.locked(config, "python mlx-grpo.py") as place:
        assert (place.resume_from, place.finished) == (None, False)
        assert not (tmp_path / "o").exists()


def test_a_run_is_found_as_it_was_left(model_dir, data_dir, tmp_path):
    settings = {"max_updates": 2, "max_new_tokens": 2, "reward_funcs": ["helpers:digest"]}
    run_training(model_dir, data_dir, tmp_path / "o", stop_after(1), **settings)
    config = make_config(model_dir, data_dir, tmp_path / "o", resume="auto", **settings)
    with opening.locked(config, "python mlx-grpo.py") as place:
        assert (place.resume_from, place.finished) == (tmp_path / "o" / "checkpoint-2", False)
        place.lock.claim()
        with pytest.raises(UserError, match="already training there"), opening.locked(config, ""):
            pass
    run_training(model_dir, data_dir, tmp_path / "o", resume="auto", **settings)
    with opening.locked(config, "python mlx-grpo.py") as place:
        assert place.finished
