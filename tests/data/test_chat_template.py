"""Prompts by the model's template, by one's own, or plain; templates that fail or never end."""

import pytest
from conftest import make_model
from helpers import assert_names, change_json, make_config

from utils.data import questions


@pytest.fixture(scope="module")
def tokenizer(model_dir):
    from mlx_lm.utils import load_tokenizer

    return load_tokenizer(model_dir)


ROW = {
    "prompt": [{"role": "system", "content": " Think. "}, {"role": "user", "content": "How many?"}]
}


def test_a_prompt_is_template_then_prefix_tokenized_apart(grpo, tokenizer):
    config = grpo.MLXGRPOConfig()
    ids = questions.encode_prompt(tokenizer, config, ROW)
    template = tokenizer.apply_chat_template(ROW["prompt"], add_generation_prompt=True)
    assert ids == [*template, *tokenizer.encode("<reasoning>\n", add_special_tokens=False)]
    assert tokenizer.decode(ids) == (
        "<|im_start|>system\n Think. <|im_end|>\n<|im_start|>user\nHow many?<|im_end|>\n"
        "<|im_start|>assistant\n<reasoning>\n"
    )


def test_no_text_begins_anew_at_the_prefix(grpo, tokenizer, tmp_path):
    """Many tokenizers put a token before whatever they encode."""
    from mlx_lm.utils import load_tokenizer
    from tokenizers import Tokenizer, processors

    folder = make_model(tmp_path / "model")
    with_bos = Tokenizer.from_file(str(folder / "tokenizer.json"))
    with_bos.post_processor = processors.TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
    )
    with_bos.save(str(folder / "tokenizer.json"))
    other = load_tokenizer(folder)
    assert other.encode("so") == [0, *tokenizer.encode("so")]
    config = grpo.MLXGRPOConfig()
    assert questions.encode_prompt(other, config, ROW) == questions.encode_prompt(
        tokenizer, config, ROW
    )


def test_no_merge_crosses_the_border_to_the_prefix(grpo, tokenizer, tmp_path):
    (tmp_path / "own.jinja").write_text("{{ messages[-1].content }}<reas")
    config = grpo.MLXGRPOConfig(
        chat_template=str(tmp_path / "own.jinja"), reasoning_prefix="oning>"
    )
    ids = questions.encode_prompt(tokenizer, config, ROW)
    apart = [
        tokenizer.encode(text, add_special_tokens=False) for text in ("How many?<reas", "oning>")
    ]
    assert ids == apart[0] + apart[1]
    together = tokenizer.encode("How many?<reasoning>", add_special_tokens=False)
    assert tokenizer.decode(ids) == tokenizer.decode(together)
    assert ids != together, "the same text in other tokens, or the test shows nothing"


def test_plain_needs_no_template(grpo, tokenizer):
    config = grpo.MLXGRPOConfig(chat_template="plain", reasoning_prefix="Answer: ")
    ids = questions.encode_prompt(tokenizer, config, ROW)
    assert tokenizer.decode(ids) == "Think.\n\nHow many?\n\nAnswer: "


def test_chat_template_kwargs_reach_the_template(grpo, tokenizer, tmp_path):
    template = tmp_path / "own.jinja"
    template.write_text("{{ messages[-1].content }}{% if not enable_thinking %} Quick!{% endif %}")
    texts = [
        tokenizer.decode(
            questions.encode_prompt(
                tokenizer,
                grpo.MLXGRPOConfig(
                    chat_template=str(template),
                    chat_template_kwargs={"enable_thinking": thinking},
                    reasoning_prefix="",
                ),
                ROW,
            )
        )
        for thinking in (True, False)
    ]
    assert texts == ["How many?", "How many? Quick!"]


def test_the_settings_arrive_in_the_prompts_of_training_and_evaluation(
    grpo, model_dir, data_dir, tmp_path
):
    (tmp_path / "own.jinja").write_text(
        "{% for m in messages %}{{ m.role }}: {{ m.content }}{{ end }}{% endfor %}"
    )
    config = make_config(
        model_dir,
        data_dir,
        tmp_path / "out",
        system_prompt="Think.",
        chat_template=str(tmp_path / "own.jinja"),
        chat_template_kwargs={"end": "!"},
        reasoning_prefix="Well, ",
        eval_samples=3,
        max_train_samples=4,
    )
    trainer = grpo.build_trainer(config, "test")
    assert len(trainer.train_dataset) == 4
    for row in (*trainer.train_dataset, *trainer.eval_dataset):
        text = trainer.tokenizer.decode(row["prompt_ids"])
        assert text == f"system: Think.!user: {row['question']}!Well, "


def test_a_template_that_refuses_the_system_message(refused, typed, own_model):
    refuses = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    template = refuses + "{{ messages[-1].content }}"
    change_json(own_model, "tokenizer_config.json", chat_template=template)
    message = refused(model_name="model", system_prompt="Think.")
    assert_names(message, "chat template (model) refuses", "no system", 'system_prompt = ""')
    assert typed(model_name="model", system_prompt="", max_updates=1)[0] == 0, "as advised"


@pytest.mark.parametrize("template", ["{% if %}", "{{ messages[0].content + 1 }}"])
def test_an_own_template_that_fails_is_named(refused, tmp_path, template):
    (tmp_path / "own.jinja").write_text(template)
    assert_names(refused(chat_template="own.jinja"), "chat template (own.jinja) refuses the prompt")
