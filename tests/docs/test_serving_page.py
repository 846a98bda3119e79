"""docs/serving.md: its commands and its client, typed as they stand there, in their order."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import formats_out
import pytest
from conftest import ROOT
from servers import free_port, up

PAGE = (ROOT / "docs/serving.md").read_text(encoding="utf-8")
PORT = "8080"
BIN = Path(sys.executable).parent
LINKED = ("configs", "utils", "models", "mlx-grpo.py")


def blocks(language, text=PAGE):
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def commands():
    """Lines of the bash blocks, with their continuations joined."""
    return [
        line for block in blocks("bash") for line in block.replace("\\\n", " ").strip().splitlines()
    ]


def as_typed(line):
    """What uv would run: a program of the environment, or Python with a script."""
    line = re.sub(r"^uv run (--extra \w+ )?", "", line.strip())
    words = line.partition(" ")
    if words[0] == "python":
        return f"{shlex.quote(sys.executable)} {words[2]}"
    if words[0].startswith("mlx_lm."):
        return f"{shlex.quote(str(BIN / words[0]))} {words[2]}"
    return f"{shlex.quote(sys.executable)} {line}" if words[0] == "mlx-grpo.py" else line


def reply_of(client, server, place, env):
    """What the page's client prints when the server of the page's command runs."""
    port = free_port()
    command = "exec " + as_typed(server).replace(f"--port {PORT}", f"--port {port}")
    with up(command, port, shell=True, cwd=place, env=env):
        words = [sys.executable, "-c", client.replace(f":{PORT}/", f":{port}/")]
        return subprocess.check_output(words, text=True, cwd=place).strip()


def test_the_page_has_the_commands_that_it_speaks_of():
    said = "\n".join(commands())
    for part in ("mlx_lm.server", "mlx_lm.fuse", "mlx_lm.convert", "--adapter-path", "--lm-studio"):
        assert part in said
    for part in ("--to gguf", "--to peft", "-q ", "evaluate_model.py", "mlx-grpo.py"):
        assert part in said
    (client,) = blocks("python")
    compile(client, "docs/serving.md", "exec")
    assert f":{PORT}/v1" in client


def test_options_of_mlx_lm_are_those_that_it_has():
    """--help of each program: what the page and the cards of models name."""
    import mlx_lm

    folder = Path(mlx_lm.__file__).parent
    for line in commands():
        if found := re.match(r"uv run mlx_lm\.(\w+) ", line):
            source = (folder / f"{found[1]}.py").read_text(encoding="utf-8")
            for option in re.findall(r" (--?[a-z][\w-]*)", line.partition('"')[0]):
                assert f'"{option}"' in source, line


@pytest.mark.long
def test_the_page_can_be_typed_from_top_to_bottom(tmp_path):
    """And gives what it shows: the client's reply, the figures of the evaluation."""
    for name in LINKED:
        (tmp_path / name).symlink_to(ROOT / name)
    env = os.environ | {"HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}
    (client,), replies, said = blocks("python"), [], {}
    for line in commands():
        if "mlx_lm.server" in line:
            replies.append(reply_of(client, line, tmp_path, env))
            continue
        done = subprocess.run(
            as_typed(line), shell=True, cwd=tmp_path, env=env, capture_output=True, text=True
        )
        assert done.returncode == 0, f"{line}\n{done.stdout}\n{done.stderr}"
        said[line] = done.stdout
    shown = next(text for text in blocks("text") if "</reasoning>" in text)
    assert replies == [shown.strip()] * 2
    check_evaluation(next(out for line, out in said.items() if "evaluate_model" in line))
    check_results(tmp_path)


@pytest.mark.long
def test_the_table_of_formats_is_what_they_give():
    table = PAGE[PAGE.index("| format | bits per weight |") :].partition("\n\n")[0]
    written, made = (cells_of(text) for text in (table, formats_out.table()))
    assert len(made) == len(formats_out.FORMATS)
    for (label, *values), (name, *wanted) in zip(written, made, strict=True):
        assert label == name
        # Another BLAS or version of MLX rounds otherwise.
        found = [float(value) for value in values[:3]]
        assert found == pytest.approx([float(x) for x in wanted], rel=0.3, abs=1e-4)


def cells_of(table):
    rows = table.splitlines()[2:]
    return [[cell.strip() for cell in row.split("|")[1:-1]] for row in rows]


def test_messages_of_the_page_are_those_of_the_code():
    """The parts that do not depend on the case."""
    source = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "utils").rglob("*.py"))
    source = re.sub(r'"\s*\n\s*f?"', "", source)
    for part in (
        "bytes of weights are missing",
        " has no tokenizer (tokenizer.json)",
        "those that can become a GGUF file are ",
        " is quantized, and a GGUF file would hold rounded numbers rounded again: add --dequantize",
        " is a GGUF file already; llama.cpp's llama-quantize changes its type",
        " holds adapters, not a model. To merge them into the model that they were trained on: ",
        "--adapter-path takes adapters, and ",
        " was trained on another base: on ",
        " has no counterpart here: ",
        " holds adapters of PEFT already",
        " should be PUBLISHER/NAME, such as my-models/tiny-math: ",
        " cannot be written: ",
    ):
        assert part in source, part
        assert part in PAGE, part


def check_evaluation(out):
    found = [float(x) for x in re.findall(r"([\d.]+)% \[", out)]
    shown = [float(x) for x in re.findall(r"\| ([\d.]+) % \[", PAGE)]
    assert len(found) == 3
    assert found == pytest.approx(shown, abs=3), "other machines round otherwise"


def check_results(place):
    """What the page says of the folders and files that its commands have made."""
    outputs = place / "outputs"
    template = (outputs / "served/final/chat_template.jinja").read_text(encoding="utf-8")
    assert "Think, then answer." in template
    for name in ("merged", "fused", "8bit", "4bit", "4bit-too", "peft"):
        found = outputs / f"served-{name}/chat_template.jinja"
        assert found.read_text(encoding="utf-8") == template, name
    stops = json.loads((outputs / "served/final/generation_config.json").read_text())
    assert stops["stop_strings"] == ["</answer>"]
    modelfile = (outputs / "served-gguf/served-final-f16.Modelfile").read_text(encoding="utf-8")
    assert 'PARAMETER stop "</answer>"' in modelfile
    assert "Think, then answer." in modelfile
    studio = place / "home/.lmstudio/models/my-models"
    assert (studio / "tiny-math/chat_template.jinja").read_text(encoding="utf-8") == template
    assert (studio / "tiny-math-gguf/served-final-q8_0.gguf").is_file()
    check_same_weights(outputs)


def check_same_weights(outputs):
    """Both ways to merge, and both ways to 4 bits, give the same numbers."""
    import mlx.core as mx

    for one, other in (("merged", "fused"), ("4bit", "4bit-too")):
        first, second = (
            mx.load(str(outputs / f"served-{name}/model.safetensors")) for name in (one, other)
        )
        assert first.keys() == second.keys()
        for name in first:
            assert mx.allclose(first[name], second[name], atol=1e-5).item(), (one, name)
