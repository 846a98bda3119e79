"""--lm-studio PUBLISHER/NAME puts a model where LM Studio looks for models."""

import json
from pathlib import Path

import mlx_lm
import pytest
from conftest import ROOT
from hf_layout import convert

from utils.base.errors import UserError
from utils.model import lm_studio

TINY = ROOT / "models/tiny-math"


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    return tmp_path


def test_a_folder_for_mlx_and_a_file_beside_it(home):
    words = ("--hf-path", TINY, "--lm-studio", "me/tiny-math")
    code, out, err = convert(*words)
    assert (code, "In LM Studio it is me/tiny-math" in out) == (0, True), err
    place = home / ".lmstudio/models/me/tiny-math"
    assert mlx_lm.load(str(place))
    code, _, err = convert(*words)
    assert (code, f"{place} exists already" in err) == (2, True), err
    words = ("--hf-path", TINY, "--to", "gguf", "--lm-studio", "me/tiny-math-gguf")
    code, out, err = convert(*words)
    assert (code, "In LM Studio it is me/tiny-math" in out) == (0, True), err
    assert (home / ".lmstudio/models/me/tiny-math-gguf/tiny-math-f16.gguf").is_file()


def test_the_folder_that_a_person_chose(home):
    (home / "disk/chosen").mkdir(parents=True)
    (home / ".lmstudio-home-pointer").write_text(f"{home / 'disk'}\n")
    assert lm_studio.models() == home / "disk/models"
    settings = home / "disk/settings.json"
    settings.write_text(json.dumps({"downloadsFolder": str(home / "disk/chosen")}))
    assert lm_studio.place("a/b.c") == home / "disk/chosen/a/b.c"
    for broken in ("{", "[]", '{"downloadsFolder": 3}', '{"downloadsFolder": "/nowhere/at/all"}'):
        settings.write_text(broken)
        assert lm_studio.models() == home / "disk/models"


@pytest.mark.parametrize("name", ["tiny", "a/b/c", "/b", "a/", "../x", "a/..", "a b/c", ""])
def test_other_names_are_refused(name):
    with pytest.raises(UserError, match="should be PUBLISHER/NAME"):
        lm_studio.place(name)


def test_adapters_are_not_for_it():
    words = ("--hf-path", "x", "--to", "peft", "--lm-studio", "me/x")
    code, _, err = convert(*words)
    assert (code, "LM Studio does not read adapters" in err) == (2, True), err
