"""The prompt that a model folder carries: written, found again, and never added twice."""

import json
import shutil

import pytest
from conftest import ROOT
from helpers import change_json, run_training

from utils import inference
from utils.base.errors import UserError
from utils.data import questions, served_template
from utils.model import served_prompt
from utils.pretraining import data as pretrain_data

TINY = ROOT / "models/tiny-math"
ORIGINAL = (TINY / served_prompt.TEMPLATE).read_text()
SETTINGS = {"system_prompt": "Think.", "reasoning_prefix": "<reasoning>\n"}


@pytest.fixture(scope="module")
def run(tmp_path_factory, data_dir):
    """A run of two updates: the base, then everything that it wrote."""
    folder = tmp_path_factory.mktemp("runs") / "full"
    settings = {"max_updates": 2, "save_steps": 2, "eval_samples": 4, "batch_size": 2}
    code, trainer = run_training(TINY, data_dir, folder, **settings | SETTINGS)
    assert code == 0
    return folder, trainer


@pytest.fixture(scope="module")
def lora(tmp_path_factory, data_dir):
    folder = tmp_path_factory.mktemp("runs") / "lora"
    settings = {"max_updates": 2, "save_steps": 2, "train_type": "lora", "batch_size": 2}
    code, trainer = run_training(TINY, data_dir, folder, **settings | SETTINGS)
    assert code == 0
    return folder, trainer


def served_ids(folder, question, system=None):
    """As mlx_lm asks, which reads nothing but the folder."""
    from mlx_lm.utils import load_tokenizer

    messages = [{"role": "user", "content": question}]
    if system is not None:
        messages.insert(0, {"role": "system", "content": system})
    tokenizer = load_tokenizer(folder)
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True)


@pytest.mark.parametrize("made", ["run", "lora"])
def test_every_folder_of_a_run_asks_as_it_was_trained(request, made):
    folder, trainer = request.getfixturevalue(made)
    rows = trainer.train_dataset
    whole = [folder / "final", *([folder / "checkpoint-2"] if made == "run" else [])]
    for place in whole:
        for row in rows[:5]:
            assert served_ids(place, row["question"]) == row["prompt_ids"]
        own = served_ids(place, "1?", system="Mine.")
        assert "Mine." in trainer.tokenizer.decode(own)
        assert "Think." not in trainer.tokenizer.decode(own)
    places = [
        *whole,
        *([] if made == "run" else [folder / "checkpoint-2", folder / "final/adapters"]),
    ]
    for place in places:
        assert (place / served_prompt.TEMPLATE).read_text() == trainer.run.prompt.template
        assert (place / served_prompt.ORIGINAL).read_text() == ORIGINAL
        found = served_prompt.settings_in(place)
        assert found.items() >= SETTINGS.items()
        assert inference.settings_of_run(str(place))[0] == {
            name: found[name] for name in served_prompt.OF_A_RUN
        } | {"reward_funcs": ["correctness"], "reward_weights": [1.0]}


def test_nothing_is_added_twice(grpo, run, data_dir):
    """Training, evaluating and warming up again from final/ get the ids of the base."""
    folder, trainer = run
    config = grpo.MLXGRPOConfig(model_name=str(folder / "final"), dataset=str(data_dir), **SETTINGS)
    loaded = grpo.load_model(config)
    rows = questions.load_questions(config, "train")
    encode = questions.encode_questions
    again = encode(loaded.tokenizer, loaded.vocabulary, config, rows, "training")
    assert [r["prompt_ids"] for r in again] == [r["prompt_ids"] for r in trainer.train_dataset]
    assert served_template.template_of(loaded.tokenizer) == served_template.template_of(
        trainer.tokenizer
    )
    chats = [
        pretrain_data.chat_prompt(pretrain_data.load_tokenizer(str(place)), "How many?")
        for place in (TINY, folder / "final")
    ]
    assert chats[0] == chats[1]


def test_training_again_from_final_writes_it_once(run, data_dir, tmp_path):
    """With another prompt, which takes the place of the first."""
    folder, _ = run
    settings = {"max_updates": 1, "system_prompt": "Other.", "reasoning_prefix": "<r>"}
    code, trainer = run_training(folder / "final", data_dir, tmp_path / "second", **settings)
    assert code == 0
    place = tmp_path / "second/final"
    row = trainer.train_dataset[0]
    assert served_ids(place, row["question"]) == row["prompt_ids"]
    text = trainer.tokenizer.decode(row["prompt_ids"])
    assert "Other." in text
    assert text.endswith("<r>")
    assert "Think." not in text
    assert "<reasoning>" not in text
    assert (place / served_prompt.ORIGINAL).read_text() == ORIGINAL


def test_another_programs_copy_keeps_the_template_alone(grpo, run, tmp_path):
    """As mlx_lm.convert and mlx_lm.fuse do: the original and the settings are within."""
    folder, _ = run
    shutil.copytree(folder / "final", tmp_path / "copy")
    for name in (served_prompt.MARKER, served_prompt.ORIGINAL):
        (tmp_path / "copy" / name).unlink()
    (tmp_path / "copy/README.md").unlink()
    found = served_prompt.settings_in(tmp_path / "copy")
    assert found.items() >= SETTINGS.items()
    loaded = grpo.load_model(grpo.MLXGRPOConfig(model_name=str(tmp_path / "copy")))
    assert served_template.template_of(loaded.tokenizer) == ORIGINAL


def test_a_template_that_a_person_wrote_stays(grpo, run, tmp_path):
    folder, _ = run
    shutil.copytree(folder / "final", tmp_path / "copy")
    (tmp_path / "copy" / served_prompt.TEMPLATE).write_text("{{ messages[0].content }}")
    loaded = grpo.load_model(grpo.MLXGRPOConfig(model_name=str(tmp_path / "copy")))
    assert served_template.template_of(loaded.tokenizer) == "{{ messages[0].content }}"


def test_prompts_without_a_template_leave_the_model_without_one(
    data_dir, tmp_path, own_model, grpo
):
    """chat_template = "plain": what is served has a template, and training again needs "plain"."""
    change_json(own_model, name="tokenizer_config.json", chat_template=None)
    settings = {"max_updates": 1, "chat_template": "plain", "reasoning_prefix": "A: "}
    code, trainer = run_training(own_model, data_dir, tmp_path / "out", **settings)
    assert code == 0
    final = tmp_path / "out/final"
    row = trainer.train_dataset[0]
    assert served_ids(final, row["question"]) == row["prompt_ids"]
    assert not (final / served_prompt.ORIGINAL).exists()
    loaded = grpo.load_model(grpo.MLXGRPOConfig(model_name=str(final)))
    assert loaded.tokenizer.has_chat_template is False


@pytest.mark.parametrize("marker", ["{", "[]", '{"format": 2}', '{"format": 1, "settings": 3}'])
def test_a_damaged_marker_is_named(tmp_path, marker):
    (tmp_path / served_prompt.MARKER).write_text(marker)
    with pytest.raises(UserError, match=served_prompt.MARKER):
        served_prompt.settings_in(tmp_path)


def test_a_run_says_that_its_prompt_cannot_be_served(data_dir, tmp_path, capsys):
    """Here a merge crosses the border to the prefix, which is tokenized apart in training."""
    (tmp_path / "own.jinja").write_text("{{ messages[-1].content }} <reas")
    settings = {"max_updates": 1, "reasoning_prefix": "oning>", "system_prompt": ""}
    code, _ = run_training(
        TINY, data_dir, tmp_path / "out", chat_template=str(tmp_path / "own.jinja"), **settings
    )
    assert code == 0
    said = "warning   mlx_lm does not ask final/ as in training: 24 of 24 prompts get other tokens"
    assert said in capsys.readouterr().out
    card = (tmp_path / "out/final/README.md").read_text()
    assert "24 of 24 prompts get other tokens than in training" in card


def test_a_conversion_carries_it(run, tmp_path, monkeypatch, data_dir):
    import sys

    from utils import convert_model

    folder, _ = run
    words = ["--hf-path", str(folder / "final"), "-q", "--output-dir", str(tmp_path / "4bit")]
    monkeypatch.setattr(sys, "argv", ["convert_model.py", *words])
    assert convert_model.main() == 0
    for name in (served_prompt.MARKER, served_prompt.ORIGINAL, served_prompt.TEMPLATE):
        assert (tmp_path / "4bit" / name).read_text() == (folder / "final" / name).read_text()
    found, source = inference.settings_of_run(str(tmp_path / "4bit"))
    assert found["dataset"] == str(data_dir)
    assert source.name == served_prompt.MARKER
    card = (tmp_path / "4bit/README.md").read_text()
    assert "Converted since to 4 bits (affine), which may have changed the scores." in card
    assert f"MODEL={tmp_path / '4bit'}\n" in card
    assert str(folder) not in card
    again = json.loads((tmp_path / "4bit/tokenizer_config.json").read_text())
    assert "chat_template" not in again
