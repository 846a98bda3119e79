"""A tokenizer said in GGUF's words reads, built again from them, as it did."""

import io
import json

import pytest
import sentencepiece
from conftest import make_tokenizer
from mlx_lm.tokenizer_utils import load as load_tokenizer
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import AutoTokenizer

from utils.base.errors import UserError
from utils.model import gguf_tokenizer, gguf_vocabulary, ollama
from utils.model.gguf_file import GGUF

ROWS = 1000


def described(folder, change=None, **settings):
    """The metadata of a folder's tokenizer, whose tokenizer.json `change` has edited."""
    folder.mkdir(exist_ok=True)
    if not (folder / "tokenizer.json").exists():
        make_tokenizer(folder)
    path = folder / "tokenizer.json"
    if change:
        tokenizer = Tokenizer.from_file(str(path))
        change(tokenizer)
        tokenizer.save(str(path))
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))
    return gguf_vocabulary.describe(load_tokenizer(folder), ROWS, "SOURCE")


def built_again(folder, metadata, architecture="llama"):
    values = {"general.architecture": architecture, f"{architecture}.context_length": 512}
    folder.mkdir()
    gguf_tokenizer.write_tokenizer(GGUF(folder / "m.gguf", values | metadata, {}), folder)
    return AutoTokenizer.from_pretrained(folder)


def reads_alike(folder, other, texts=gguf_vocabulary.PROBES):
    original = AutoTokenizer.from_pretrained(folder)
    for text in (*texts, "<|im_start|>user\nHi  there<|im_end|>\n<answer>"):
        assert other.encode(text) == original.encode(text), text
        ids = original.encode(text)
        assert other.decode(ids) == original.decode(ids)
    return True


@pytest.mark.parametrize("name", gguf_vocabulary.NAMES)
def test_every_way_to_split_is_found_by_its_name(tmp_path, name):
    how = gguf_tokenizer.SPLITTINGS[name]

    def change(tokenizer):
        tokenizer.pre_tokenizer = gguf_tokenizer.pre_tokenizer(how)
        tokenizer.normalizer = normalizers.NFC() if how.nfc else None

    make_tokenizer(tmp_path)
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    change(tokenizer)
    content = json.loads(tokenizer.to_str())
    content["model"]["ignore_merges"] = how.whole_words
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    metadata = described(tmp_path).metadata
    assert metadata["tokenizer.ggml.pre"] == name
    assert reads_alike(tmp_path, built_again(tmp_path / "b", metadata))


def test_the_names_are_those_that_are_read_and_each_splits_in_its_own_way():
    assert set(gguf_vocabulary.NAMES) <= set(gguf_tokenizer.SPLITTINGS)
    ways = [gguf_tokenizer.SPLITTINGS[name][:2] for name in gguf_vocabulary.NAMES]
    pieces = [
        (
            [gguf_tokenizer.pre_tokenizer(how).pre_tokenize_str(t) for t in gguf_vocabulary.PROBES],
            how.whole_words,
        )
        for how in map(gguf_tokenizer.SPLITTINGS.get, gguf_vocabulary.NAMES)
    ]
    same = [
        (gguf_vocabulary.NAMES[i], gguf_vocabulary.NAMES[j])
        for i in range(len(pieces))
        for j in range(i)
        if pieces[i] == pieces[j] and ways[i] != ways[j]
    ]
    assert same == [], "the probes do not tell these apart"


def test_roles_kinds_and_fillers(tmp_path):
    def change(tokenizer):
        tokenizer.add_tokens(["<answer>"])
        tokenizer.add_special_tokens(["<|eot_id|>", "<end>"])
        tokenizer.post_processor = processors.TemplateProcessing(
            single=["<|im_start|>", "$A"], special_tokens=[("<|im_start|>", 1)]
        )

    described(tmp_path / "a", change, bos_token="<|im_start|>", unk_token="<|endoftext|>")
    ids = Tokenizer.from_file(str(tmp_path / "a/tokenizer.json")).get_vocab()
    (tmp_path / "a/generation_config.json").write_text("{}")
    tokenizer = load_tokenizer(
        tmp_path / "a", eos_token_ids=[ids["<end>"], 2, ids["<|eot_id|>"], ids["a"], ids["b"]]
    )
    made = gguf_vocabulary.describe(tokenizer, ROWS, "SOURCE")
    said = {key.removeprefix("tokenizer.ggml."): v for key, v in made.metadata.items()}
    assert (said["bos_token_id"], said["add_bos_token"], said["add_eos_token"]) == (1, True, False)
    # <|eot_id|> ends a text by its name in any case; the roles are for others.
    assert said["eos_token_id"] == 2
    assert {said["eot_token_id"], said["eom_token_id"]} == {ids["a"], ids["b"]}
    assert made.notes == ["llama.cpp will not stop at <end>: a GGUF file names three such tokens"]
    assert (said["unknown_token_id"], said["padding_token_id"]) == (0, 0)
    kinds = said["token_type"]
    assert [kinds[ids[t]] for t in ("<answer>", "<end>", "a")] == [4, 3, 1]
    assert (said["tokens"][ROWS - 1], kinds[ROWS - 1]) == (f"[PAD{ROWS - 1}]", 5)
    assert reads_alike(tmp_path / "a", built_again(tmp_path / "b", made.metadata))


@pytest.fixture(scope="module")
def sentences(tmp_path_factory):
    """A SentencePiece model of the kind of Llama 2, as transformers converts it."""
    folder = tmp_path_factory.mktemp("spm")
    text = ["a farmer has 12 apples and 3 pears, don't you know", "ünïcode 日本 text  x\n"] * 30
    stream = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text), model_writer=stream, vocab_size=340, model_type="bpe",
        byte_fallback=True, character_coverage=0.99, split_digits=True, hard_vocab_limit=False,
        normalization_rule_name="identity", remove_extra_whitespaces=False, minloglevel=2,
    )  # fmt: skip
    (folder / "tokenizer.model").write_bytes(stream.getvalue())
    spm = sentencepiece.SentencePieceProcessor(model_proto=stream.getvalue())
    return folder, spm


@pytest.mark.parametrize("space", [True, False])
def test_sentence_piece(sentences, tmp_path, space):
    """Through the metadata that llama.cpp's converter would take from the SentencePiece model."""
    _, spm = sentences
    size = spm.get_piece_size()
    kinds = [2 if spm.is_unknown(n) else 3 if spm.is_control(n) else 1 for n in range(size)]
    kinds = [6 if spm.is_byte(n) else kinds[n] for n in range(size)]
    metadata = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": [spm.id_to_piece(n) for n in range(size)],
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.scores": [spm.get_score(n) for n in range(size)],
        "tokenizer.ggml.bos_token_id": spm.bos_id(),
        "tokenizer.ggml.eos_token_id": spm.eos_id(),
        "tokenizer.ggml.unknown_token_id": spm.unk_id(),
        "tokenizer.ggml.add_space_prefix": space,
    }
    built_again(tmp_path / "a", metadata)
    made = gguf_vocabulary.describe(load_tokenizer(tmp_path / "a"), ROWS, "SOURCE").metadata
    assert made["tokenizer.ggml.add_space_prefix"] is space
    assert made["tokenizer.ggml.add_bos_token"] is True
    assert made["tokenizer.ggml.token_type"][:size] == kinds
    again = built_again(tmp_path / "b", made)
    assert reads_alike(tmp_path / "a", again, (*gguf_vocabulary.PROBES, "a farmer has 12 pears"))
    # Higher scores for what SentencePiece scores higher, wherever something is merged.
    scores = made["tokenizer.ggml.scores"]
    merged = [n for n in range(size) if 0 >= scores[n] > gguf_vocabulary.NEVER]
    merged = [n for n in merged if len(spm.id_to_piece(n)) > 1 and kinds[n] == 1]
    assert len(merged) > 30
    order = sorted(merged, key=lambda n: -scores[n])
    assert order == sorted(merged, key=lambda n: -spm.get_score(n))


def lower(tokenizer):
    tokenizer.normalizer = normalizers.Lowercase()


def by_two(tokenizer):
    split = pre_tokenizers.Split(Regex("..|."), "isolated")
    bytes_only = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, bytes_only])


def two_first(tokenizer):
    tokenizer.post_processor = processors.TemplateProcessing(
        single=["<|im_start|>", "<|im_start|>", "$A"], special_tokens=[("<|im_start|>", 1)]
    )


def words(tokenizer):
    tokenizer.model = models.WordLevel({"a": 0, "b": 1, "<|im_end|>": 2}, unk_token="a")


def no_bytes(tokenizer):
    vocabulary = {chr(number): number for number in range(97, 123)}
    tokenizer.model = models.BPE(vocabulary, [], byte_fallback=True)


def neither(tokenizer):
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()


def too_many(tokenizer):
    tokenizer.add_tokens([f"<{n}>" for n in range(ROWS)])


REFUSED = {
    lower: "changes texts by Lowercase first",
    by_two: "splits texts in a way that has no name here; known are smollm",
    two_first: "puts the ids [1, 1] before",
    words: "a tokenizer of the kind WordLevel",
    no_bytes: "but no token <0x00> for it",
    neither: "neither byte-level nor SentencePiece's",
    too_many: "but the model has embeddings for 1000 tokens only",
}


@pytest.mark.parametrize("change", REFUSED, ids=lambda change: change.__name__)
def test_what_llama_cpp_would_read_otherwise_is_refused(tmp_path, change):
    with pytest.raises(UserError) as caught:
        described(tmp_path / "a", change)
    assert str(caught.value).startswith("SOURCE")
    assert REFUSED[change] in str(caught.value)


def test_a_tokenizer_without_a_file_is_refused():
    class Own:
        pass

    with pytest.raises(UserError, match="the tokenizer Own has no"):
        gguf_vocabulary.describe(Own(), ROWS, "SOURCE")


def test_several_templates_and_none(tmp_path):
    both = [{"name": "default", "template": "D"}, {"name": "tool_use", "template": "T"}]
    made = described(tmp_path / "a", chat_template=both).metadata
    assert made["tokenizer.chat_template"] == "D"
    assert made["tokenizer.chat_template.tool_use"] == "T"
    assert made["tokenizer.chat_templates"] == ["tool_use"]
    make_tokenizer(tmp_path / "a")
    made = described(tmp_path / "a", chat_template=None)
    assert not [key for key in made.metadata if "chat_template" in key]
    assert made.notes == ["the tokenizer has no chat template in Jinja, and so has the file"]


QUIRKS = {
    "plain": ("Q: {{ messages[0].content }}", "Q: {{ .Prompt }}"),
    "braces": ("{{ '{{x}}' }}{{ messages[0].content }}", '{{ "{{" }}x}}{{ .Prompt }}'),
    "twice": ("{{ messages[0].content * 2 }}", None),
    "quotes": ("'''{{ '\"\"\"' + messages[0].content }}", None),
    "fails": ("{{ raise_exception('no') }}", None),
}


@pytest.mark.parametrize("what", QUIRKS)
def test_a_modelfile_says_the_template_or_that_it_cannot(tmp_path, what):
    template, expected = QUIRKS[what]
    make_tokenizer(tmp_path)
    file = tmp_path / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"chat_template": template}))
    settings = {"stop_strings": ["</answer>", 'a "b"\n']}
    (tmp_path / "generation_config.json").write_text(json.dumps(settings))
    text, notes = ollama.modelfile("m.gguf", load_tokenizer(tmp_path), tmp_path)
    assert text.startswith("FROM ./m.gguf\n")
    assert (f'TEMPLATE """{expected}"""\n' in text) == (expected is not None)
    assert bool(notes) == (expected is None)
    assert text.endswith('PARAMETER stop "</answer>"\nPARAMETER stop "a \\"b\\"\\n"\n')
