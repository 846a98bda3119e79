"""JSON files: written in one piece, and read with care."""

import json
import os

import pytest

from utils.base import json_files
from utils.base.errors import UserError


def test_a_json_file_is_the_old_one_or_the_new_one(tmp_path, monkeypatch):
    path = tmp_path / "state.json"
    json_files.write_json(path, {"é": 1})
    assert path.read_text() == '{\n  "é": 1\n}\n'

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            json_files.write_json(path, {"é": 2})
    assert json.loads(path.read_text()) == {"é": 1}
    json_files.write_json(path, {"é": 3})
    assert [p.name for p in tmp_path.iterdir()] == ["state.json"]


@pytest.mark.parametrize(
    ("text", "complaint"),
    [(b"{", "cannot be read"), (b"[1]", "holds no JSON object"), (b"\xff", "cannot be read")],
)
def test_what_is_no_json_object_is_named(tmp_path, text, complaint):
    path = tmp_path / "a.json"
    assert json_files.read_object(path) == {}
    path.write_bytes(text)
    with pytest.raises(UserError, match=f"a.json {complaint}"):
        json_files.read_object(path)
