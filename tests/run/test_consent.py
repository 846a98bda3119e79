"""`overwrite = true` in a settings file replaces a run of the same data and model, and no other."""

import json
import shutil

import pytest
from conftest import make_model
from helpers import assert_names, read_log, tree

RUN = {"max_updates": 1, "max_new_tokens": 2, "overwrite": True}
TYPED = ("--set", "overwrite=true")


@pytest.fixture
def own(data_dir, tmp_path):
    """A copy of the questions to train on, which may change."""
    return shutil.copytree(data_dir, tmp_path / "own")


def replaced_without_asking(typed, *words, **settings):
    code, out, err, _ = typed(*words, **RUN, **settings)
    assert (code, err) == (0, "")
    return "replaced  the earlier run in out" in out


def other_data(own, model):
    return {"dataset": str(own)}


def other_model(own, model):
    return {"model_name": str(model)}


def a_mix(own, model):
    return {"dataset_mix": [{"dataset": str(own)}], "dataset": str(own)}


def another_column(own, model):
    return {"question_column": "answer"}


@pytest.mark.parametrize("change", [other_data, other_model, a_mix, another_column])
def test_a_preset_typed_again_does_not_delete_a_run_of_ones_own(
    typed, refused, own, tmp_path, change
):
    """The way it happens: the preset with one's own data, and later the preset alone."""
    model = make_model(tmp_path / "another", seed=5)
    settings = change(own, model)
    assert typed(**RUN, **settings)[0] == 0
    message = refused(**RUN)
    name = next(iter(settings))
    assert_names(message, "made of something else", f"{name} was ", "settings file only")
    assert_names(message, "--config settings.toml --set overwrite=true")
    assert replaced_without_asking(typed, *TYPED), "typed on this command, it is consent"
    assert replaced_without_asking(typed), "and then it is the preset's own run"


def test_the_same_run_may_be_typed_twice_also_with_other_settings(typed, own, tmp_path):
    assert typed(**RUN, dataset="own")[0] == 0
    assert replaced_without_asking(typed, dataset="own")
    assert replaced_without_asking(typed, dataset=str(own)), "another way to write the path"
    assert replaced_without_asking(typed, dataset="own", learning_rate=0.5)
    assert replaced_without_asking(typed, dataset="own", max_train_samples=3)
    assert replaced_without_asking(typed, dataset="own", system_prompt="Be brief.")


def test_data_and_model_that_changed_where_they_are(typed, refused, own, tmp_path):
    model = make_model(tmp_path / "mine")
    settings = RUN | {"dataset": "own", "model_name": "mine"}
    assert typed(**settings)[0] == 0
    rows = (own / "train.jsonl").read_text()
    (own / "train.jsonl").write_text(rows.replace("How many", "Which"))
    assert_names(refused(**settings), "the training data have changed since")
    (own / "train.jsonl").write_text(rows)
    make_model(model, seed=9)
    assert_names(refused(**settings), "the files of the model have changed since")
    assert typed(*TYPED, **settings)[0] == 0


@pytest.mark.parametrize("record", [None, '{"model_na', "[]"])
def test_a_run_that_does_not_say_what_it_was_made_of(typed, refused, tmp_path, record):
    assert typed(**RUN)[0] == 0
    path = tmp_path / "out" / "config.resolved.json"
    path.write_text(record) if record else path.unlink()
    assert_names(refused(**RUN), "config.resolved.json does not say of what")
    assert replaced_without_asking(typed, *TYPED)


def test_a_resumed_run_without_a_checkpoint_is_asked_for_as_well(typed, refused, own, tmp_path):
    """A loop around --resume with a preset that overwrites."""
    assert typed(**RUN, dataset="own")[0] == 0
    (tmp_path / "out" / "final" / "run.json").unlink()
    assert_names(refused("--resume", **RUN), "dataset was ")
    assert typed("--resume", *TYPED, **RUN)[0] == 0


FAILS = """
def reward(completions, **_):
    raise ValueError("no")
"""


def test_what_is_replaced_is_there_until_the_new_run_has_saved(typed, tmp_path):
    (tmp_path / "fails.py").write_text(FAILS)
    out, aside = tmp_path / "out", tmp_path / "out" / ".mlx-grpo-replaced"
    first = {**RUN, "max_updates": 4, "save_steps": 2}
    assert typed(**first)[0] == 0
    (out / "notes.txt").write_text("mine")
    before = tree(out)
    for _ in range(2):  # the second run finds what the first left, which had saved nothing
        code, printed, *_ = typed(*TYPED, **RUN, reward_funcs=["fails.py:reward"])
        assert code == 1
        assert "replaced  " in printed
        kept = tree(aside)
        assert {**before, "notes.txt": 0} == {**kept, "notes.txt": 0}, "all that the run was"
    assert (out / "notes.txt").read_text() == "mine"
    code, printed, *_ = typed("--resume", **first | {"output_dir": str(aside)})
    assert "the run in" in printed, "it can be gone back to"
    assert replaced_without_asking(typed) is False
    assert not aside.exists()
    assert [r["update"] for r in read_log(out)] == [1]


def test_a_kill_while_a_run_is_set_aside_loses_nothing(typed, tmp_path):
    assert typed(**RUN)[0] == 0
    out = tmp_path / "out"
    before = json.loads((out / "config.resolved.json").read_text())
    (out / ".mlx-grpo-replacing").mkdir()
    (out / "final").rename(out / ".mlx-grpo-replacing" / "final")
    code, _, err, _ = typed(**RUN | {"overwrite": False})
    assert (code, "already holds a run" in err) == (2, True)
    assert replaced_without_asking(typed)
    assert json.loads((out / "config.resolved.json").read_text()) == before
    assert sorted(p.name for p in out.iterdir() if p.name.startswith(".")) == []
