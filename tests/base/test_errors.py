"""Errors of others as ours: named, in one message, of a bounded length."""

import errno

import pytest

from utils.base import errors


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (ValueError(" what it says "), "what it says"),
        (ValueError(""), "no reason given"),
        (KeyError("name"), "KeyError: 'name'"),
        (RecursionError("too deep"), "RecursionError: too deep"),
        (ValueError("x" * 2000), "x" * 1000 + "..."),
    ],
)
def test_the_reason_of_someone_elses_error(error, text):
    assert errors.reason(error) == text


def test_a_file_system_that_refuses_is_one_error_with_the_path(tmp_path):
    path = tmp_path / "none" / "file"
    refused = OSError(errno.EROFS, "Read-only file system")
    for error, said in (
        (refused, "Read-only file system"),
        (RuntimeError("[write] Unable to write 4096 bytes to file."), r"\[write\] .* GB free"),
    ):
        with (
            pytest.raises(errors.DiskError, match=f"{path} cannot be written: {said}") as caught,
            errors.disk_errors_named(path),
        ):
            raise error
        assert (caught.value.path, caught.value.exit_code) == (path, 1)
    with pytest.raises(RuntimeError, match="a bug"), errors.disk_errors_named(path):
        raise RuntimeError("a bug")


def test_only_a_panic_becomes_an_error():
    panic = type("PanicException", (BaseException,), {})
    with pytest.raises(ValueError, match="its tokenizer panics: index out"):  # noqa: SIM117
        with errors.panics_as_errors():
            raise panic("index out of bounds")
    with pytest.raises(KeyboardInterrupt), errors.panics_as_errors():
        raise KeyboardInterrupt


def test_bytes_for_a_person_and_the_nearest_folder(tmp_path):
    assert errors.readable(1_234_567_890) == "1.23 GB"
    assert errors.readable(99_000_000) == "99.0 MB"
    assert errors.readable(9_996_000) == "10.0 MB"
    assert errors.readable(25_284_000_000) == "25.3 GB"
    assert errors.readable(1_234_567_890_000) == "1,235 GB"
    assert errors.nearest_existing(tmp_path / "a" / "b") == tmp_path
    assert errors.nearest_existing(tmp_path) == tmp_path


@pytest.mark.parametrize(
    ("count", "text"),
    [
        *[(66.94e6, "67 MB"), (6.694e6, "6.7 MB"), (123e6, "120 MB"), (4.70e9, "4.7 GB")],
        *[(25.28e9, "25 GB"), (999.9e6, "1.0 GB"), (9.99e9, "10 GB")],
    ],
)
def test_an_estimate_has_two_digits(count, text):
    assert errors.roughly(count) == text
