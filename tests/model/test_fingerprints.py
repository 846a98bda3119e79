"""Fingerprints of model folders and files."""

import hashlib
import itertools
import json

import mlx.core as mx
import pytest

from utils.model import fingerprints


@pytest.fixture
def folder(tmp_path):
    """2 MB of weights: more than is read of them."""
    (tmp_path / "config.json").write_text('{"a": 1, "b": 2}')
    mx.save_safetensors(str(tmp_path / "model.safetensors"), {"w": mx.zeros((2**19,))})
    return tmp_path


def test_what_changes_the_model_changes_its_fingerprint(folder):
    before, weights = fingerprints.of_model(folder), folder / "model.safetensors"
    (folder / "config.json").write_text(json.dumps({"b": 2, "a": 1}, indent=4))
    (folder / "README.md").write_text("not of the model")
    assert fingerprints.of_model(folder) == before, "the same settings"

    def changed(weight):
        mx.save_safetensors(str(weights), {"w": weight})
        return fingerprints.of_model(folder) != before

    assert not changed(mx.zeros((2**19,)))
    assert changed(mx.zeros((2**19 + 1,)))
    assert changed(mx.zeros((2**19,), mx.int32)), "the same bytes under another header"
    assert changed(mx.zeros((2**19,)) + 1e-9), "as training changes them"
    for place in (0, 2**19 - 1):
        assert changed(mx.zeros((2**19,)).at[place].add(1.0)), "both ends are read"
    assert not changed(mx.zeros((2**19,)))
    weights.rename(folder / "model-00001-of-00001.safetensors")
    assert fingerprints.of_model(folder) != before
    (folder / "config.json").write_text('{"a": 1, "b": 3}')
    weights.write_bytes((folder / "model-00001-of-00001.safetensors").read_bytes())
    (folder / "model-00001-of-00001.safetensors").unlink()
    assert fingerprints.of_model(folder) != before


@pytest.mark.parametrize("room", [0, 1, 2**20, 2**20 + 1, 10**9])
def test_pieces_reach_from_the_start_to_the_end(room):
    pieces = fingerprints.pieces(100, 100 + room)
    assert pieces[0][0] == 100
    assert pieces[-1][0] + pieces[-1][1] == 100 + room
    assert sum(count for _, count in pieces) == min(room, 2**20)
    assert all(a + n <= b for (a, n), (b, _) in itertools.pairwise(pieces))


def test_of_a_file_all_counts(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"abc" * 10**5)
    assert fingerprints.of_file(path) == hashlib.sha256(b"abc" * 10**5).hexdigest()
