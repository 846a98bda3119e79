"""How a run ends: what is kept of an error that nobody foresaw."""

from utils.run import ending


def test_a_traceback_that_is_kept_holds_no_secrets(tmp_path):
    error = ending.unexpected(ValueError("no answer from https://ann:hunter2@host/"), tmp_path)
    kept = (tmp_path / "traceback.txt").read_text()
    assert "ValueError: no answer from https://***@host/" in kept
    assert "hunter2" not in kept + str(error), "nor does the message, which a notebook shows"
    assert "traceback in" in str(error)


def test_a_traceback_that_cannot_be_kept_is_in_the_message(tmp_path):
    try:
        raise ValueError("no such thing")
    except ValueError as error:
        told = str(ending.unexpected(error, tmp_path / "none"))
    assert told.startswith("Traceback (most recent call last)")
    assert told.endswith("unexpected ValueError: no such thing")
