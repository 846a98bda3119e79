"""Files of compressed pieces: whole after a kill, readable after damage."""

import gzip
import os
import resource

import pytest

from utils.run import spans

LINES = [
    [f'{{"n":{n},"text":"{os.urandom(40).hex()}"}}' for n in (2 * p, 2 * p + 1)] for p in (0, 1, 2)
]


@pytest.fixture
def path(tmp_path):
    """A file of three pieces of two lines."""
    for lines in LINES:
        spans.append(tmp_path / "a.jsonl.gz", lines)
    return tmp_path / "a.jsonl.gz"


@pytest.fixture
def hurt():
    """Collects what is said of damage."""
    return []


def read(path, hurt):
    return [p.lines for p in spans.pieces(path, lambda path, how: hurt.append((path, how)))]


def ends(path):
    return [piece.end for piece in spans.pieces(path, lambda *_: None)]


def test_it_is_an_ordinary_gzip_file_of_lines(path, hurt):
    assert gzip.decompress(path.read_bytes()).decode().splitlines() == [
        *LINES[0],
        *LINES[1],
        *LINES[2],
    ]
    assert read(path, hurt) == LINES
    assert not hurt
    assert ends(path)[-1] == path.stat().st_size


def test_a_file_that_is_gone_has_no_pieces(tmp_path, hurt):
    assert read(tmp_path / "none.gz", hurt) == []
    assert not hurt


def test_however_much_of_the_last_piece_was_written_the_others_are_read(path, hurt):
    data, (_, second, end) = path.read_bytes(), ends(path)
    for size in range(second, end):
        path.write_bytes(data[:size])
        assert read(path, hurt) == LINES[:2], size
    assert not hurt, "a writer may be at work"


@pytest.mark.parametrize("broken", [0, 1, 2])
def test_a_damaged_piece_costs_itself_and_is_said(path, hurt, broken):
    data, places = bytearray(path.read_bytes()), [0, *ends(path)]
    middle = (places[broken] + places[broken + 1]) // 2
    data[middle : middle + 8] = b"\xff" * 8
    path.write_bytes(data)
    assert read(path, hurt) == LINES[:broken] + LINES[broken + 1 :]
    ((where, how),) = hurt
    assert where == path
    assert f"{places[broken + 1] - places[broken]:,} bytes" in how


@pytest.mark.parametrize("data", [b"", b"\0" * 5000, b"text\n", bytes(range(256)) * 20])
def test_what_is_no_such_file_is_said(path, hurt, data):
    path.write_bytes(data)
    assert read(path, hurt) == []
    assert bool(hurt) == bool(data)


def test_zeros_at_the_end_as_a_power_cut_leaves_them(path, hurt):
    with path.open("ab") as file:
        file.write(bytes(4096))
    assert read(path, hurt) == LINES
    assert "the last 4,096 bytes" in hurt[0][1]


def test_a_disk_that_fills_up_leaves_the_file_as_it_was(path, hurt):
    size, limits = path.stat().st_size, resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size + 20, limits[1]))
        with pytest.raises(OSError, match="File too large"):
            spans.append(path, LINES[0])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.stat().st_size == size
    assert read(path, hurt) == LINES
    assert not hurt


@pytest.mark.parametrize(("first", "left"), [(0, 0), (2, 1), (4, 2), (6, 3)])
def test_a_cut_drops_a_piece_and_all_after_it(path, hurt, first, left):
    with path.open("ab") as file:
        file.write(path.read_bytes()[:30])  # torn
    begins = f'{{"n":{first},'
    spans.cut(path, lambda line: line.startswith(begins), lambda *_: None)
    assert read(path, hurt) == LINES[:left]
    assert not hurt
    assert path.stat().st_size == sum(ends(path)[-1:])
