"""What is no complete GGUF file of a language model is refused in one line."""

import importlib.util

import gguf
import gguf_layout
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind

from utils.base.errors import UserError
from utils.model import gguf_file


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return gguf_layout.random_model(tmp_path_factory.mktemp("gguf") / "hf", "llama")


@pytest.fixture(scope="module")
def whole(folder):
    return gguf_layout.write_gguf(folder.parent / "whole.gguf", folder, "llama").read_bytes()


def refusal(path):
    with pytest.raises(UserError) as refused:
        gguf_file.open_gguf(path)
    text = str(refused.value)
    assert str(path) in text
    return text


def written(path, content):
    path.write_bytes(content)
    return path


def test_an_open_file_says_what_was_written(folder, whole, tmp_path):
    opened = gguf_file.open_gguf(written(tmp_path / "m.gguf", whole))
    assert opened.need("llama.block_count", int) == 2
    assert opened.get("llama.attention.layer_norm_rms_epsilon", float) == 1e-6
    assert opened.get("llama.rope.scaling.type", str) is None
    assert opened.texts("tokenizer.ggml.tokens")[:2] == ["<|endoftext|>", "<|im_start|>"]
    assert set(opened.numbers("tokenizer.ggml.token_type")) == {1, 3}
    tensor = opened.tensors["blk.0.ffn_down.weight"]
    assert (tensor.kind, tensor.shape) == ("F32", (64, 128))
    assert gguf_file.unpack(tensor).shape == (64, 128)


@pytest.mark.parametrize("value", [1e-05, 1e-6, 500000.0, 1e6, 0.1234567, 8.0, 16777217.0, 0.0])
def test_numbers_of_float32_are_read_as_they_were_written(value):
    stored = float(np.float32(value))
    assert gguf_file.shortest(stored) in (value, stored)
    assert np.float32(gguf_file.shortest(stored)) == np.float32(value)


@pytest.mark.parametrize(
    ("key", "kind", "message"),
    [
        ("llama.block_count", str, "llama.block_count = '2' should be str"),
        ("tokenizer.ggml.model", int, "tokenizer.ggml.model = 'gpt2' should be int"),
        ("llama.expert_count", int, "its metadata lacks llama.expert_count"),
    ],
)
def test_metadata_of_another_type_are_named(whole, tmp_path, key, kind, message):
    opened = gguf_file.open_gguf(written(tmp_path / "m.gguf", whole))
    with pytest.raises(UserError) as refused:
        opened.need(key, kind)
    assert message in str(refused.value)


def test_lists_of_another_type_are_named(whole, tmp_path):
    opened = gguf_file.open_gguf(written(tmp_path / "m.gguf", whole))
    with pytest.raises(UserError, match=r"tokenizer\.ggml\.token_type should be a list of strings"):
        opened.texts("tokenizer.ggml.token_type")
    with pytest.raises(UserError, match=r"tokenizer\.ggml\.tokens should be a list of numbers"):
        opened.numbers("tokenizer.ggml.tokens")
    assert opened.texts("absent") == opened.numbers("absent") == []


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is no GGUF file: it is empty"),
        (b"PK\x03\x04 a zip", "it starts with b'PK\\x03\\x04' instead of b'GGUF'"),
        (b"ggjt" + bytes(60), "is no GGUF file"),
        (b"GGUF", "ends after 4 bytes"),
        (b"GGUF" + (1).to_bytes(4, "little") + bytes(60), "is GGUF of version 1"),
        (b"GGUF" + (9).to_bytes(4, "little") + bytes(60), "is GGUF of version 9"),
        (b"GGUF" + (3).to_bytes(4, "big") + bytes(60), "is big-endian"),
        (b"GGUF" + (3).to_bytes(4, "little"), "was not downloaded to its end"),
    ],
)
def test_other_files_are_refused(tmp_path, content, message):
    assert message in refusal(written(tmp_path / "m.gguf", content))


def test_a_big_endian_file_of_the_package_is_refused(folder, tmp_path):
    path = tmp_path / "big.gguf"
    gguf_layout.write_gguf(path, folder, "llama", endian=gguf.GGUFEndian.BIG)
    assert "get the little-endian file" in refusal(path)


def test_a_file_cut_anywhere_is_refused(whole, tmp_path):
    """In the header, the metadata, the list of tensors, their numbers."""
    for part in np.linspace(8, len(whole) - 4, 15).astype(int):
        text = refusal(written(tmp_path / "cut.gguf", whole[:part]))
        assert "was not downloaded to its end" in text


def test_a_missing_file_names_its_neighbours(whole, tmp_path):
    written(tmp_path / "there.gguf", whole)
    assert f"no such file; {tmp_path} has there.gguf" in refusal(tmp_path / "here.gguf")


def test_an_unknown_type_is_named(folder, tmp_path):
    path = tmp_path / "m.gguf"
    gguf_layout.write_gguf(path, folder, "llama", kinds=lambda name: Kind.Q8_0)
    content = path.read_bytes()
    place = content.index(b"token_embd.weight") + len(b"token_embd.weight") + 4 + 2 * 8
    assert content[place : place + 4] == int(Kind.Q8_0).to_bytes(4, "little")
    path.write_bytes(content[:place] + (99).to_bytes(4, "little") + content[place + 4 :])
    assert "has a tensor of the unknown type 99" in refusal(path)


def test_a_type_that_cannot_be_unpacked_is_named(folder, tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.add_tensor("token_embd.weight", np.zeros((4, 64), np.int8))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    text = refusal(tmp_path / "m.gguf")
    assert "tensor token_embd.weight has the type I8, which cannot be unpacked" in text


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"general__type": "mmproj"}, "only the vision part of a model"),
        ({"general__architecture": "clip"}, "only the vision part of a model"),
        ({"general__type": "adapter"}, "adapters, not a model"),
        ({"general__type": "vocab"}, "only a vocabulary"),
        ({"general__type": "poem"}, "a poem, not a model"),
        ({"split__count": 3, "split__no": 1}, "is part 2 of 3. Join them with llama.cpp first"),
    ],
)
def test_parts_of_a_model_are_refused(folder, tmp_path, metadata, message):
    path = gguf_layout.write_gguf(tmp_path / "m.gguf", folder, "llama", **metadata)
    assert message in refusal(path)


def test_a_file_without_weights_is_refused(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert "holds no weights" in refusal(tmp_path / "m.gguf")


def test_a_missing_package_says_what_to_install(whole, tmp_path, monkeypatch):
    path = written(tmp_path / "m.gguf", whole)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError) as refused:
        gguf_file.open_gguf(path)
    assert "uv run --extra gguf" in str(refused.value)
    assert "pip install 'gguf" in str(refused.value)


def test_a_gguf_file_is_known_by_name_or_content(whole, tmp_path):
    assert gguf_file.is_gguf(tmp_path / "absent.gguf")
    assert gguf_file.is_gguf(written(tmp_path / "blob", whole))
    assert not gguf_file.is_gguf(written(tmp_path / "other", b"text"))
    (tmp_path / "folder.gguf").mkdir()
    assert not gguf_file.is_gguf(tmp_path / "folder.gguf")
    assert not gguf_file.is_gguf(tmp_path / "absent")
