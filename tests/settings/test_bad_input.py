"""Bad input: one readable message, the right exit code, no traceback, and nothing written."""

import json
import logging
import os
import shlex
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT
from helpers import (
    assert_names,
    lose_the_right_to_write_everywhere,
    read_log,
    the_message,
    tree,
    typed_in_a_shell,
    write_toml,
)

SCRIPT = ROOT / "mlx-grpo.py"


DATA = {
    "empty.jsonl": (b"\n", "empty.jsonl holds no rows"),
    "a.jsonl": (
        b'{"question": "a", "answer": 1}\n{"question": "a" "answer": 1}\n',
        "a.jsonl, line 2, column 18: not JSON: Expecting ',' delimiter",
    ),
    "list.jsonl": (b"[1]\n", "list.jsonl, line 1: expected an object, found list"),
    "deep.jsonl": (b"[" * 100_000, "deep.jsonl, line 1, column 1: not JSON: nested too deeply"),
    "latin.jsonl": (b'{}\n{"question": "\xff"}', "latin.jsonl, line 2, column 15: not UTF-8 text"),
    "empty.json": (b"", "empty.json, line 1, column 1: not JSON"),
    "a.json": (b'[{"question": "a"},\n {"question" 2}]', "a.json, line 2, column 14: not JSON"),
    "object.json": (b'{"question": "a"}', "object.json: expected a list of objects"),
    "deep.json": (b"[" * 100_000, "deep.json: not JSON: nested too deeply"),
    "head.csv": (b"question,answer\n", "head.csv holds no rows"),
    "more.csv": (
        b"question,answer\nwhat,1\nwhy,2,3\n",
        "more.csv, line 3: expected 2 columns (question, answer), found 3",
    ),
    "less.csv": (b"question,answer\nwhat\n", "less.csv, line 2: expected 2 columns"),
    "open.csv": (b'question,answer\n"what,1\n', "open.csv, line 2: unexpected end of data"),
    "twice.csv": (b"question,answer,answer\na,1,2\n", "line 1: two columns have the same name"),
    "latin.csv": (b"question,answer\na,\xff\n", "latin.csv, line 2, column 3: not UTF-8 text"),
    "semicolon.csv": (
        b"question;answer\na;1\n",
        "has no column 'question'; it has question;answer",
    ),
    "empty.parquet": (b"", "empty.parquet is not a parquet file"),
    "cut.parquet": (b"PAR1 cut", "cut.parquet is not a parquet file"),
    "notes.txt": (b"hello", "notes.txt: expected one of .jsonl, .json, .csv, .parquet"),
    "digits.jsonl": (
        b'{"question": "a", "answer": ' + b"1" * 5000 + b"}\n",
        "digits.jsonl, line 1, column 1: not JSON: a number of thousands of digits",
    ),
    "digits.json": (b"[" + b"1" * 5000 + b"]", "digits.json: not JSON: a number of thousands"),
    "half.jsonl": (
        b'{"question": "a\\ud800", "answer": "1"}\n',
        "row 1: half a surrogate pair in column 'question'",
    ),
    "list.json": (
        b'[{"question": ["a", "b"], "answer": "1"}]',
        "row 1: list instead of a text in column 'question'",
    ),
    "nan.jsonl": (b'{"question": "why", "answer": NaN}\n', "row 1: nothing in column 'answer'"),
    "blank.jsonl": (
        b'{"question": "a", "answer": "1"}\n{"question": "why", "answer": " "}\n',
        "row 2: nothing in column 'answer': {'question': 'why'",
    ),
    "none.jsonl": (b'{"question": "why", "answer": null}\n', "row 1: nothing in column 'answer'"),
    "hash.jsonl": (b'{"question": "why", "answer": "so ####"}\n', "nothing in column 'answer'"),
    "lacks.jsonl": (
        b'{"question": "a", "answer": "1"}\n{"answer": "2"}\n',
        "row 2: nothing in column 'question': {'answer': '2'}",
    ),
}


@pytest.mark.parametrize("name", DATA)
def test_a_bad_data_file(refused, tmp_path, name):
    content, complaint = DATA[name]
    (tmp_path / name).write_bytes(content)
    assert_names(refused(dataset=name), name, complaint)


def test_data_that_is_not_there(refused, tmp_path):
    assert_names(refused(dataset="none.jsonl"), "dataset none.jsonl does not exist")
    (tmp_path / "questions.jsonl").touch()
    message = refused(dataset=str(tmp_path / "question.jsonl"))
    assert_names(message, f"does not exist; did you mean {tmp_path / 'questions.jsonl'}?")
    assert_names(refused("--dry-run", dataset="~/none"), "/none does not exist")
    (tmp_path / "folder").mkdir()
    message = refused(dataset="folder")
    assert_names(message, "dataset folder has no file train.jsonl (or .json, .csv, .parquet)")
    message = refused(question_column="prompt_text")
    assert_names(message, "no column 'prompt_text'; it has question, answer", "set question_column")


def test_links_that_lead_nowhere(refused, tmp_path):
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "gone").symlink_to("nowhere")
    for name in ("loop", "gone"):
        assert_names(refused(dataset=name), f"dataset {name} is a link that leads nowhere")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "train.jsonl").symlink_to("train.jsonl")
    assert_names(refused(dataset="folder"), "dataset folder has no file train.jsonl")
    (tmp_path / "around").mkdir()
    (tmp_path / "around" / "again").symlink_to("..")
    assert_names(refused(dataset="around/again/around"), "has no file train.jsonl")


def test_names_that_no_file_system_takes(refused):
    for key in ("model_name", "dataset", "output_dir", "chat_template", "resume"):
        for path in ("x" * 300, "x/" * 2000):
            assert_names(refused(**{key: path}), f"{key} = 'x", "is too long for a file name")


def test_a_run_name_is_no_path_and_a_null_in_a_question_is_a_character(typed, tmp_path):
    row = json.dumps({"question": "How many is 3\0 and 4?", "answer": "7"})
    (tmp_path / "null.jsonl").write_text(f"{row}\n" * 4)
    code, _, err, changed = typed(
        dataset="null.jsonl", run_name="../../a/b", max_updates=1, report_to=["csv"]
    )
    assert code == 0, err
    assert all(name == "out" or name.startswith("out/") for name in changed - {"settings.toml"})


def test_one_row_is_too_few_to_hold_some_out(refused, tmp_path):
    (tmp_path / "one.jsonl").write_text('{"question": "a", "answer": "1"}\n')
    message = refused(dataset="one.jsonl", eval_samples=1)
    assert_names(message, "one.jsonl has one row, but evaluation needs another", "eval_samples = 0")


def test_a_row_that_is_held_out_is_named_by_its_place_in_the_file(refused, tmp_path):
    rows = [{"question": "a", "answer": str(n)} for n in range(20)]
    rows[18]["answer"] = ""  # the last two are for evaluation
    (tmp_path / "mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    message = refused(dataset="mine.jsonl", eval_samples=1)
    assert_names(message, "mine.jsonl (test), row 19: nothing in column 'answer'")


def test_prompts_that_are_all_too_long(refused):
    message = refused(max_prompt_length=3)
    assert_names(message, "all 24 training prompts", "max_prompt_length = 3 tokens", "they have 29")
    message = refused(max_completion_length=2)
    assert_names(message, "max_completion_length = 2 leaves no room after reasoning_prefix")


def offline(tmp_path, **settings):
    """The command in a process that has no hub, with nothing cached."""
    config = write_toml(tmp_path, {"output_dir": "out", **settings})
    before = tree(tmp_path)
    home = tmp_path.with_name(f"{tmp_path.name}-home")
    line = f"python {SCRIPT} --config {config}"
    done = typed_in_a_shell(line, tmp_path, HF_HUB_OFFLINE="1", HF_HOME=str(home))
    assert tree(tmp_path) == before
    return done.returncode, done.stdout, done.stderr


def test_a_model_from_a_hub_out_of_reach(tmp_path, data_dir):
    code, out, err = offline(tmp_path, model_name="owner/model", dataset=str(data_dir))
    message = the_message(code, out, err, expected_code=1)
    assert_names(message, "model owner/model cannot be loaded from the hub", "HF_HUB_OFFLINE=0")
    assert err.endswith("\nA folder works too: --set model_name=FOLDER\n")


@pytest.mark.long
def test_a_data_set_from_a_hub_out_of_reach(tmp_path, model_dir):
    code, out, err = offline(tmp_path, model_name=str(model_dir), dataset="owner/questions")
    message = the_message(code, out, err, expected_code=1)
    assert_names(
        message,
        "data set owner/questions (main, train) cannot be loaded from the hub: Couldn't reach",
        "A local file works too: --set dataset=FILE",
    )


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ConnectionError("Couldn't reach the hub"), 1),
        (ValueError("Unknown split 'train'. Should be one of ['validation']."), 2),
        (FileNotFoundError("Dataset 'owner/questions' doesn't exist on the Hub"), 2),
    ],
    ids=["out of reach", "unknown split", "unknown name"],
)
def test_what_the_hub_answers_decides_the_exit_code(typed, monkeypatch, error, code):
    def load_dataset(*_, **__):
        raise error

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    got, out, err, changed = typed(dataset="owner/questions")
    assert_names(the_message(got, out, err, code), str(error))
    assert not changed


def test_retries_of_the_hub_are_said_once(typed, monkeypatch):
    def load_dataset(*_, **__):
        for retry in range(5):
            logger.warning("'[Errno -2]' thrown while requesting HEAD; retry %d", retry)
        raise ConnectionError("Couldn't reach the hub")

    logger = logging.getLogger("huggingface_hub.utils._http")
    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    code, out, err, _ = typed(dataset="owner/questions")
    assert (code, out.count("no answer from the hub yet")) == (1, 1)
    assert "requesting" not in out + err
    assert not logger.filters


def test_an_output_folder_that_cannot_be(refused, tmp_path):
    (tmp_path / "file").touch()
    for place in ("file", "file/deeper/out"):
        assert_names(refused(output_dir=place), f"output_dir {place} is not writable", "(file)")


def test_the_root_is_no_output_folder(refused):
    for place in ("/", "/usr/.."):
        assert_names(refused(output_dir=place), "is the root of the file system: name a folder")


@pytest.mark.skipif(sys.platform != "linux" and os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_output_folder(tmp_path, model_dir, data_dir):
    (tmp_path / "locked").mkdir()
    values = {"model_name": str(model_dir), "dataset": str(data_dir), "output_dir": "locked/out"}
    config = write_toml(tmp_path, values)
    (tmp_path / "locked").chmod(0o555)
    drop = lose_the_right_to_write_everywhere if os.geteuid() == 0 else None
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--config", config],
        cwd=tmp_path,
        preexec_fn=drop,
        capture_output=True,
        text=True,
    )
    message = the_message(done.returncode, done.stdout, done.stderr)
    assert_names(message, "output_dir locked/out is not writable (locked)")
    assert tree(tmp_path).keys() == {"settings.toml", "locked"}


def ready_commands(text):
    return [line.strip() for line in text.splitlines() if " --set " in line]


def test_a_folder_with_another_run_and_both_ways_out(typed, grpo, tmp_path):
    run = {"max_updates": 4, "save_steps": 6}
    words = ["--set", "run_name=two words, $HOME and 'quotes'"]
    assert typed(*words, **run)[0] == 0
    (tmp_path / "out" / "notes.txt").write_text("mine")
    shutil.rmtree(tmp_path / "out" / "final")  # as if it had been killed just before its end

    code, out, err, changed = typed(*words, **run)
    message = the_message(code, out, err)
    assert not changed
    assert_names(message, "output_dir out already holds a run (config.resolved.json)")
    go_on, replace = ready_commands(message)

    done = typed_in_a_shell(go_on, tmp_path)
    assert done.returncode == 0, done.stderr
    assert "out/checkpoint-6 at update 3" in done.stdout
    assert [record["update"] for record in read_log(tmp_path / "out")] == [1, 2, 3, 4]
    assert shlex.split(replace)[:2] == shlex.split(go_on)[:2]
    assert grpo.main(shlex.split(replace)[2:]) == 0
    assert [record["update"] for record in read_log(tmp_path / "out")] == [1, 2, 3, 4]
    resolved = json.loads((tmp_path / "out" / "config.resolved.json").read_text())
    assert resolved["run_name"] == "two words, $HOME and 'quotes'"
    assert (tmp_path / "out" / "notes.txt").read_text() == "mine", "only the run is replaced"


@pytest.mark.parametrize("save_steps", [0, 2])
def test_a_finished_run_can_only_be_replaced(typed, refused, save_steps):
    """To continue it is no error, so that a loop of restarts comes to an end, and does nothing."""
    run = {"max_updates": 1, "save_steps": save_steps}
    assert typed(**run)[0] == 0
    assert [command.split()[-1] for command in ready_commands(refused(**run))] == ["overwrite=true"]
    code, out, err, changed = typed("--resume", **run)
    assert (code, err, changed) == (0, "", set())
    assert out == "finished  the run in out was complete: see out/final\n"
    message = refused("--resume", **run | {"max_updates": 2})
    assert_names(message, "max_updates (was 1, is 2)", "another output_dir")


def test_a_model_that_overwriting_would_delete(typed, refused, tmp_path):
    assert typed(max_updates=1)[0] == 0
    message = refused(model_name="out/final", overwrite=True)
    assert_names(message, "overwrite would delete model_name = ", "choose another output_dir")
    data = tmp_path / "out" / "final" / "train.jsonl"
    data.write_text('{"question": "1 + 1?", "answer": "2"}\n')
    message = refused(dataset=str(data), overwrite=True)
    assert_names(message, "overwrite would delete dataset = ", "choose another output_dir")
    data.unlink()
    settings = {"model_name": "out/final", "output_dir": "second", "max_updates": 1}
    assert typed(**settings, overwrite=True)[0] == 0, "as advised"


def test_a_wired_limit_that_metal_refuses(refused, monkeypatch):
    def refuse(_):
        raise ValueError("[metal] above the recommended size")

    monkeypatch.setattr("mlx.core.set_wired_limit", refuse)
    assert_names(refused(wired_limit_gb=9.5), "wired_limit_gb = 9.5: [metal] above the recommended")


def test_resuming_with_another_setting_or_a_damaged_checkpoint(typed, refused, tmp_path):
    run = {"max_updates": 2, "save_steps": 2, "learning_rate": 1e-3}
    assert typed(**run)[0] == 0
    shutil.rmtree(tmp_path / "out" / "final")
    message = refused(**run | {"learning_rate": 2e-3}, resume="auto")
    assert_names(message, "learning_rate (was 0.001, is 0.002)", "set them back", "output_dir")
    assert "seed" not in message, "only what differs is named"
    (tmp_path / "out" / "checkpoint-4" / "trainer_state.safetensors").write_bytes(b"cut")
    message = refused(**run, resume="out/checkpoint-4")
    assert_names(message, "out/checkpoint-4 is damaged: trainer_state.safetensors has 3 bytes")
    assert refused(**run, resume="checkpoint-4") == message, "its name in output_dir will do"


REWARDS = """
import math

def scores(completions, **_):
    return [1.0] * len(completions)

def raises(completions, **_):
    raise KeyError("points")

def short(completions, **_):
    return [1.0]

def nan(completions, **_):
    return [math.nan] * len(completions)

def inf(completions, **_):
    return [0.0, -math.inf] * (len(completions) // 2)

def text(completions, **_):
    return "1" * len(completions)

def texts(completions, **_):
    return ["1.0"] * len(completions)

def nothing(completions, **_):
    pass
"""
FAILING = {
    "raises": ("raised KeyError: 'points' (", "mine.py, line 8)"),
    "short": ("returned 1 values for 8 completions",),
    "nan": ("returned nan, not a finite number or None, for the completion:\n<reasoning>",),
    "inf": ("returned -inf, not a finite number or None",),
    "text": ("returned '11111111', not a list of one number a completion",),
    "texts": ("returned '1.0', not a finite number or None",),
    "nothing": ("returned None, not a list of one number a completion",),
}


@pytest.mark.parametrize("name", FAILING)
def test_a_reward_that_fails_ends_the_run(typed, tmp_path, name):
    (tmp_path / "mine.py").write_text(REWARDS)
    code, out, err, _ = typed(reward_funcs=[f"mine.py:{name}"], max_updates=1)
    assert code == 1
    assert err.startswith(f"error: reward mine.py:{name} ")
    assert "Traceback" not in err
    assert_names(err, *FAILING[name])
    assert "stopped   " in out
    assert not (tmp_path / "out" / "final").exists()


REWARD_NAMES = [
    ("corectness", "not built in (correctness, int, ", "did you mean 'correctness'?"),
    ("mine.py", "own functions are written module:function or file.py:function"),
    (":scores", "own functions are written module:function"),
    ("mine.py:score", "mine.py has no function 'score'; did you mean 'scores'?"),
    ("mine.py:REWARD", "mine.py has no function 'REWARD'"),
    ("none.py:scores", "file none.py does not exist"),
    ("no_such_module:scores", "cannot be imported: ModuleNotFoundError: No module named"),
    ("os.path:scores", "os.path has no function 'scores'"),
    ("broken.py:scores", "cannot be imported: SyntaxError: ", "(broken.py, line 2)"),
    ("needs.py:scores", "No module named 'no_such_module'", "needs.py, line 1)"),
]


@pytest.mark.parametrize("case", REWARD_NAMES, ids=[case[0] for case in REWARD_NAMES])
def test_a_reward_that_is_not_there(refused, tmp_path, case):
    (tmp_path / "mine.py").write_text(REWARDS + "REWARD = 3\n")
    (tmp_path / "broken.py").write_text("\ndef scores(:\n")
    (tmp_path / "needs.py").write_text("import no_such_module\n")
    spec, *parts = case
    assert_names(refused(reward_funcs=[spec]), f"reward {spec!r}", *parts)


def test_debug_adds_the_traceback_and_keeps_message_and_code(typed):
    code, _, err, changed = typed("--debug", dataset="none.jsonl")
    assert code == 2
    assert "Traceback (most recent call last)" in err
    assert err.endswith("error: dataset none.jsonl does not exist\n")
    assert not changed


def test_an_unknown_option_is_a_usage_error(grpo, capsys):
    with pytest.raises(SystemExit) as stop:
        grpo.main(["--confg", "x.toml"])
    assert stop.value.code == 2
    err = capsys.readouterr().err
    assert err.endswith("error: unrecognized arguments: --confg x.toml\n")


def test_a_settings_file_without_its_option_is_told_where_it_goes(grpo, capsys):
    with pytest.raises(SystemExit) as stop:
        grpo.main(["configs/tiny_math.toml"])
    assert stop.value.code == 2
    assert "a settings file goes behind --config: --config configs/tiny_" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words",
    [["--learning_rate", "1e-5"], ["--learning-rate=1e-5", "--seed"], ["learning_rate=1e-5"]],
)
def test_a_setting_without_its_option_is_told_where_it_goes(grpo, capsys, words):
    """As other trainers have it, and as it stands in a TOML file."""
    with pytest.raises(SystemExit):
        grpo.main(words)
    assert capsys.readouterr().err.endswith("go behind --set: --set learning_rate=1e-5\n")
