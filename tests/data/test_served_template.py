"""The template that a trained model is served with gives the ids that it was trained on."""

import importlib.util
from pathlib import Path

import pytest
from helpers import change_json

from utils.base.errors import UserError
from utils.data import questions
from utils.data import served_template as served

THINK = "{{ '<think>\\n\\n</think>\\n\\n' if enable_thinking is defined and not enable_thinking }}"
# One of each kind of what public templates do.
TEMPLATES = {
    "chatml": "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + "
    "message['content'] + '<|im_end|>\\n' }}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|im_start|>assistant\\n' }}{% endif %}",
    "a system prompt of its own": "{%- if messages[0].role != 'system' %}\n    {{- 'I am.' }}\n"
    "{%- endif %}\n{%- for m in messages %}\n    {{- m.role + ': ' + m.content + '\\n' }}\n"
    "{%- endfor %}\n{%- if add_generation_prompt %}\n    {{- 'assistant: ' }}\n{%- endif %}\n",
    "cuts messages": "{% if messages[0].role == 'system' %}{% set system = messages[0].content %}"
    "{% set messages = messages[1:] %}{% else %}{% set system = 'none' %}{% endif %}"
    "[{{ system }}]{% for m in messages %}{{ m.content|trim }}{% endfor %} /INST]",
    "a namespace": "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}"
    "{{ ns.n }}. {{ m.content }}{% endfor %}\n",
    "macros": "{% macro said(m) %}{{ messages|length }} {{ m.content }}{% endmacro %}"
    "{% for m in messages %}{{ said(m) }}{% endfor %}\nAnswer:\n",
    "thinking": "{% for m in messages %}{{ m.content }}\n{% endfor %}" + THINK,
    "text around it": "\n  Start\n{% for m in messages %}\n {{ m.content }}\n{% endfor %}\nEnd\n\n",
    "windows": "Start\r\n{% for m in messages %}{{ m.content }}{% endfor %}\r\n",
    "an indented block": "   {% for m in messages %}{{ m.content }}{% endfor %}   ",
}
SYSTEM = 'Think "well", don\'t {% raw %} #} {{ guess }}: 日本\n  in two lines 😀\\n\n'
PREFIXES = ("<reasoning>\n", "", "{{ 'x' }} #} \\ 'Ω'")


@pytest.fixture(scope="module")
def folder(model_dir):
    return Path(model_dir)


@pytest.fixture
def tokenizer(folder):
    from mlx_lm.utils import load_tokenizer

    return load_tokenizer(folder)


@pytest.fixture
def rows_of(grpo, data_dir, tokenizer):
    """Settings of a run, and its questions with the ids that the trainer asks by."""

    def made(**settings):
        config = grpo.MLXGRPOConfig(dataset=str(data_dir), **settings)
        rows = questions.load_questions(config, "train")
        return config, questions.encode_questions(tokenizer, 384, config, rows, "training")

    return made


def as_a_server_asks(tokenizer, template, messages, **options):
    served.put_template(tokenizer, template)
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, **options)


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("system", ["", SYSTEM])
@pytest.mark.parametrize("name", TEMPLATES)
def test_every_kind_of_template_gives_the_ids_of_training(tokenizer, rows_of, name, system, prefix):
    original = TEMPLATES[name]
    served.put_template(tokenizer, original)
    config, rows = rows_of(system_prompt=system, reasoning_prefix=prefix)
    template, trouble = served.fitting(tokenizer, config, original, rows)
    assert trouble == ""
    assert served.template_of(tokenizer) == original, "it is put back"
    for row in rows:
        user = {"role": "user", "content": row["question"]}
        assert as_a_server_asks(tokenizer, template, [user]) == row["prompt_ids"]
        own = [{"role": "system", "content": "Mine."}, user]
        expected = as_a_server_asks(tokenizer, original, own)
        prefix_ids = tokenizer.encode(prefix, add_special_tokens=False)
        assert as_a_server_asks(tokenizer, template, own) == expected + prefix_ids
    apart = served.taken_apart(template)
    assert apart == (original, served.prompt_settings(config))


def test_a_conversation_gets_system_prompt_and_prefix_once(tokenizer, rows_of):
    config, _ = rows_of(system_prompt="Think.")
    template = served.served(TEMPLATES["chatml"], served.prompt_settings(config))
    said = [
        {"role": "user", "content": "1?"},
        {"role": "assistant", "content": "1"},
        {"role": "user", "content": "2?"},
    ]
    text = tokenizer.decode(as_a_server_asks(tokenizer, template, said))
    assert text.count("Think.") == 1
    assert text.count("<reasoning>") == 1
    assert text.endswith("<|im_start|>assistant\n<reasoning>\n")
    served.put_template(tokenizer, template)
    without = tokenizer.decode(tokenizer.apply_chat_template(said, add_generation_prompt=False))
    assert "<reasoning>" not in without


def test_arguments_of_the_template_are_those_of_training(tokenizer, rows_of):
    """Whether to think is always as trained, because mlx-lm passes it on whatever a caller says."""
    original = TEMPLATES["thinking"] + "{{ style if style is defined }}{{ tables.a[0] }}"
    served.put_template(tokenizer, original)
    given = {"enable_thinking": False, "style": "brief", "tables": {"a": [None, True, 0.5]}}
    config, rows = rows_of(chat_template_kwargs=given)
    template, trouble = served.fitting(tokenizer, config, original, rows)
    assert trouble == ""
    user = rows[0]["prompt"][-1:]
    assert as_a_server_asks(tokenizer, template, user) == rows[0]["prompt_ids"]
    thinking = as_a_server_asks(tokenizer, template, user, enable_thinking=True)
    assert thinking == rows[0]["prompt_ids"]
    own = tokenizer.decode(as_a_server_asks(tokenizer, template, user, style="long"))
    assert "long" in own
    assert "brief" not in own


@pytest.mark.parametrize("first", [[], [0]])
def test_plain_prompts_have_a_template_too(grpo, tokenizer, rows_of, first, tmp_path, folder):
    """With the token that some tokenizers put before any text."""
    import shutil

    from mlx_lm.utils import load_tokenizer
    from tokenizers import Tokenizer, processors

    if first:
        shutil.copytree(folder, tmp_path / "model")
        inner = Tokenizer.from_file(str(folder / "tokenizer.json"))
        inner.post_processor = processors.TemplateProcessing(
            single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
        )
        inner.save(str(tmp_path / "model/tokenizer.json"))
        change_json(tmp_path / "model", name="tokenizer_config.json", bos_token="<|endoftext|>")
        tokenizer = load_tokenizer(tmp_path / "model")
    config, rows = rows_of(chat_template="plain", system_prompt=" Think. ")
    rows = questions.encode_questions(tokenizer, 384, config, rows, "training")
    assert rows[0]["prompt_ids"][: len(first)] == first
    original = served.of_training(tokenizer, config)
    assert original is not None
    _, trouble = served.fitting(tokenizer, config, original, rows)
    assert trouble == ""


def test_a_template_in_a_file_is_contained(tokenizer, rows_of, tmp_path):
    (tmp_path / "own.jinja").write_text(TEMPLATES["macros"])
    config, rows = rows_of(chat_template=str(tmp_path / "own.jinja"))
    original = served.of_training(tokenizer, config)
    assert original == TEMPLATES["macros"]
    template, trouble = served.fitting(tokenizer, config, original, rows)
    assert trouble == ""
    assert served.prompt_settings(config)["chat_template"] == ""
    assert str(tmp_path) not in template


def test_sentencepiece_puts_a_space_before_what_stands_alone(tokenizer, rows_of, tmp_path, folder):
    import shutil

    from mlx_lm.utils import load_tokenizer
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    shutil.copytree(folder, tmp_path / "model")
    inner = Tokenizer(models.BPE(unk_token="<|endoftext|>"))
    inner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    inner.decoder = decoders.Metaspace(prepend_scheme="first")
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=special, show_progress=False)
    texts = ["How many is 1 + 2 + 3?\n4567890 user assistant system <reasoning>"] * 9
    inner.train_from_iterator(texts, trainer)
    inner.save(str(tmp_path / "model/tokenizer.json"))
    tokenizer = load_tokenizer(tmp_path / "model")
    original = "<|im_start|>[INST] {{ messages[-1].content }} [/INST]"
    served.put_template(tokenizer, original)
    config, rows = rows_of(system_prompt="")
    rows = questions.encode_questions(tokenizer, 384, config, rows, "training")
    template, trouble = served.fitting(tokenizer, config, original, rows)
    assert trouble == ""
    assert '" <reasoning>\\n"' in template
    assert served.taken_apart(template)[0] == original


def test_prompts_that_no_template_makes_are_counted(tokenizer, rows_of, tmp_path):
    """A merge across the border to the prefix, which is tokenized apart in training."""
    original = "{{ messages[-1].content }}<reas"
    served.put_template(tokenizer, original)
    config, rows = rows_of(system_prompt="", reasoning_prefix="oning>")
    _, trouble = served.fitting(tokenizer, config, original, rows)
    assert trouble == f"{len(rows)} of {len(rows)} prompts get other tokens"


def test_a_template_that_fails_without_the_arguments_of_training(tokenizer, rows_of):
    original = "{{ messages[0].content if style is defined else raise_exception('style!') }}"
    served.put_template(tokenizer, original)
    config, rows = rows_of(chat_template_kwargs={"style": "brief"})
    assert served.fitting(tokenizer, config, original, rows)[1] == ""
    config.chat_template_kwargs = {}
    with pytest.raises(UserError, match="style!"):
        served.fitting(tokenizer, config, original, rows)


def test_templates_by_other_hands_are_left_alone(rows_of):
    config, _ = rows_of(system_prompt="Think.")
    template = served.served(TEMPLATES["chatml"], served.prompt_settings(config))
    assert served.taken_apart(template)[0] == TEMPLATES["chatml"]
    for other in (
        *(None, "", TEMPLATES["chatml"], {"default": template}),
        template.replace("Think.", "Speak.", 1),  # the comment and what it does differ
        template[:-1],
        template[: len(template) // 4],
        template.replace('"system_prompt"', '"system"', 1),
    ):
        assert served.taken_apart(other) is None


def test_of_several_templates_the_default_is_served(tokenizer, rows_of):
    several = {"default": TEMPLATES["chatml"], "rag": "x"}
    tokenizer.chat_template = dict(several)
    config, rows = rows_of(system_prompt="Think.")
    original = served.of_training(tokenizer, config)
    template, trouble = served.fitting(tokenizer, config, original, rows)
    assert trouble == ""
    assert tokenizer.chat_template == several
    served.put_template(tokenizer, template)
    assert tokenizer.chat_template == {"default": template, "rag": "x"}


def test_what_is_rendered_in_python_has_no_template(rows_of, nanochat_tokenizer):
    config, _ = rows_of()
    assert served.of_training(nanochat_tokenizer, config) is None
    plain, _ = rows_of(chat_template="plain")
    assert served.of_training(nanochat_tokenizer, plain) is None


@pytest.fixture
def nanochat_tokenizer():
    from helpers import CHAT_TOKENS

    from utils.model.tiktoken_wrapper import TiktokenTokenizerWrapper

    ranks = {bytes([i]): i for i in range(256)}
    special = {name: 256 + n for n, name in enumerate(CHAT_TOKENS)}
    return TiktokenTokenizerWrapper(ranks, ".", special)


@pytest.mark.long
def test_the_templates_that_trl_trains_with(grpo, tokenizer):
    """Those that need no special tokens of their own to end in the same pieces."""
    found = importlib.util.find_spec("trl")
    if found is None:
        pytest.skip("TRL's wheel is not installed (no dependency: it needs PyTorch)")
    templates = sorted((Path(found.origin).parent / "chat_templates").glob("*.jinja"))
    assert len(templates) > 30
    for path in templates:
        original = path.read_text(encoding="utf-8")
        served.put_template(tokenizer, original)
        config = grpo.MLXGRPOConfig(system_prompt="", reasoning_prefix="<reasoning>\n")
        row = {"prompt": [{"role": "user", "content": "How many?"}]}
        row["prompt_ids"] = questions.encode_prompt(tokenizer, config, row)
        template, _ = served.fitting(tokenizer, config, original, [row])
        ids = as_a_server_asks(tokenizer, template, row["prompt"])
        assert tokenizer.decode(ids) == tokenizer.decode(row["prompt_ids"]), path.name
