"""Folders of a run: one takes another's place, and a kill in between loses nothing."""

from pathlib import Path

import pytest

from utils.run import folders


@pytest.mark.parametrize("name", ["best", "final"])
def test_what_a_kill_between_two_renames_left_without_its_name_has_it_again(
    tmp_path, monkeypatch, capsys, name
):
    for folder in (name, "new"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "weights").write_text(folder)
    rename, renamed = Path.rename, []

    def rename_and_die(path, target):
        renamed.append(rename(path, target))
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", rename_and_die)
        with pytest.raises(KeyboardInterrupt):
            folders.take_place(tmp_path / "new", tmp_path / name)
    assert not (tmp_path / name).exists()
    folders.claim(tmp_path, overwrite=False)
    assert (tmp_path / name / "weights").read_text() == name
    assert f"restored  {tmp_path / name}, which a killed run" in capsys.readouterr().out
    folders.take_place(tmp_path / "new", tmp_path / name)
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert (tmp_path / name / "weights").read_text() == "new"


def test_a_finished_run_that_is_to_go_on_is_told_how(typed, refused):
    assert typed(max_updates=1)[0] == 0
    said = refused("--resume", max_updates=2)
    assert "the run in out has finished, and max_updates (was 1, is 2) would change" in said
    assert "--set model_name=out/final --set output_dir=FOLDER" in said
    more = ("--set", "model_name=out/final", "--set", "output_dir=longer")
    assert typed(*more, max_updates=1)[0] == 0
