"""utils/inference.py: what it says is what the model says, whatever the way of asking."""

import io
import json
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import pytest
from conftest import ROOT, make_model
from helpers import SLOW, imports_of, mostly_long, run_training

from utils import inference
from utils.base.errors import UserError
from utils.base.say import say
from utils.data.questions import as_question, encode_prompt
from utils.device import cores
from utils.rollouts import caches

TINY = ROOT / "models/tiny-math"
QUESTION = "Ann buys 7 packs of 6 cups. Then Ann sells 8. How many cups has Ann got?"


@pytest.fixture(scope="session")
def lora_run(tmp_path_factory, data_dir):
    """A short run on tiny-math by LoRA: final/, final/adapters/ and checkpoint-2/ of adapters."""
    folder = tmp_path_factory.mktemp("runs") / "lora"
    run_training(
        TINY,
        data_dir,
        folder,
        train_type="lora",
        lora_learning_rate=1e-2,
        max_updates=1,
        save_steps=2,
        stop_strings=["cups"],
    )
    return folder


@pytest.fixture
def ask(capsys, monkeypatch):
    """Type the command: (exit code, stdout, stderr)."""

    def typed(*words, stdin=""):
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        code = inference.main([str(word) for word in words])
        return (code, *capsys.readouterr())

    return typed


def with_stop_strings(folder, stops):
    shutil.copytree(TINY, folder)
    (folder / "generation_config.json").write_text(json.dumps({"stop_strings": stops}))
    return folder


def generator_of(*words):
    return inference.Generator(inference.build_parser().parse_args([str(word) for word in words]))


def test_single_prompt_is_what_mlx_lm_generates(ask):
    import mlx_lm

    model, tokenizer = mlx_lm.load(str(TINY))[:2]
    messages = [{"role": "user", "content": QUESTION}]
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True)
    expected = mlx_lm.generate(model, tokenizer, prompt=ids, max_tokens=60)
    assert ask("--model", TINY, QUESTION, "--max-tokens", 60) == (0, f"{expected}\n", "")
    assert ask("--model", TINY, "--max-tokens", 60, stdin=f"{QUESTION}\n")[1] == f"{expected}\n"


@pytest.mark.parametrize("limit", [1, 2, 9, 40])
def test_stream_shows_the_same_text(ask, model_dir, limit):
    """The random model writes broken UTF-8: no piece may show half a character."""
    words = ("--model", model_dir, "Hello", "--max-tokens", limit, "--temperature", 1)
    assert ask(*words)[1] == ask(*words, "--stream")[1]


def test_system_prompt_and_template(ask):
    generator = generator_of("--model", TINY, "--system", "Be brief.", "x")
    text = generator.tokenizer.decode(generator.encode(generator.conversation("Hi")))
    assert "system\nBe brief." in text
    assert text.index("Be brief.") < text.index("Hi")
    plain = generator_of("--model", TINY, "--chat-template", "plain", "x")
    assert plain.tokenizer.decode(plain.encode(plain.conversation("Hi"))) == "Hi\n\n"


def test_sampling_options_act(ask):
    words = ("--model", TINY, QUESTION, "--max-tokens", 30)
    greedy = ask(*words)[1]
    assert ask(*words, "--temperature", 2, "--top-p", 1e-6)[1] == greedy
    assert ask(*words, "--repetition-penalty", 1.5)[1] != greedy
    seeds = {ask(*words, "--temperature", 1.5, "--seed", seed)[1] for seed in (1, 1, 2, 3)}
    assert 1 < len(seeds) <= 3


def test_batch_equals_single_prompts_in_input_order(ask, tmp_path):
    questions = [f"{QUESTION} {'So? ' * n}" for n in (9, 0, 4, 1, 0, 2, 7)]
    rows = [{"question": text, "id": n} for n, text in enumerate(questions)]
    file, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ("--model", TINY, "--max-tokens", 40)
    code, out, err = ask(*words, "--batch", file, "--batch-size", 3, "--output", output)
    assert (code, out) == (0, "")
    assert f"7 results in {output}" in err
    results = [json.loads(line) for line in output.read_text().splitlines()]
    assert [{k: r[k] for k in ("question", "id")} for r in results] == rows
    for result in results:
        assert result["completion"] + "\n" == ask(*words, result["question"])[1]
    assert {r["finish_reason"] for r in results} <= {"stop", "length"}


def test_batch_of_lines_leaves_empty_ones_out(ask, tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("1 + 1\n\n   \n2 + 2\n")
    code, out, err = ask("--model", TINY, "--batch", file, "--max-tokens", 3)
    assert code == 0
    assert [json.loads(line)["prompt"] for line in out.splitlines()] == ["1 + 1", "2 + 2"]
    assert "2 empty lines" in err
    assert all(json.loads(line)["tokens"] <= 3 for line in out.splitlines())


def test_batch_of_conversations(ask, tmp_path):
    file = tmp_path / "chats.json"
    messages = [{"role": "system", "content": "x"}, {"role": "user", "content": QUESTION}]
    file.write_text(json.dumps([{"messages": messages}]))
    out = ask("--model", TINY, "--batch", file, "--max-tokens", 20)[1]
    single = ask("--model", TINY, "--system", "x", QUESTION, "--max-tokens", 20)[1]
    assert json.loads(out)["completion"] + "\n" == single


@pytest.fixture
def many(tmp_path):
    """A file of ten questions of different lengths."""
    file = tmp_path / "many.jsonl"
    rows = ({"question": f"{QUESTION}{' So?' * (n % 4)}", "id": n} for n in range(10))
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def test_a_sample_does_not_depend_on_the_batch_size(many):
    words = ("--model", TINY, "--batch", many, "--max-tokens", 40, "--temperature", 1)
    ids = {}
    for size in (1, 8):
        generator = generator_of(*words, "--batch-size", size)
        rows = inference.read_prompts(many, grpo_prompt=False)
        prompts = [generator.encode(generator.conversation(row["question"])) for row in rows]
        asked = [{"prompt_ids": ids} for ids in prompts]
        ids[size] = [completion.ids for completion in generator.batch(asked)]
    assert ids[1] == ids[8]
    assert len({*map(tuple, ids[1])}) > 4, "a key for each prompt"


def test_a_batch_in_which_memory_runs_out_is_written_once(ask, many, monkeypatch):
    words = ("--model", TINY, "--batch", many, "--max-tokens", 20, "--temperature", 1)
    whole = ask(*words)[1]
    script, places = inference.load_script(), []
    sample_batch = script.sample_batch
    monkeypatch.setattr(cores, "EVERY", 0)

    def limited(*given):
        reader = given[-1]
        places.append(reader.places)
        steps = sample_batch(*given)
        while True:
            try:
                yield next(steps)
            except StopIteration as end:
                return end.value
            if reader.places == 4 and len(reader.done) > 3:  # the first of them are written
                raise MemoryError("out of memory")

    monkeypatch.setattr(script, "sample_batch", limited)
    code, out, err = ask(*words, "--batch-size", 4)
    assert (code, out) == (0, whole)
    assert places == [4, 2]
    assert "memory    ran out" in err


def test_with_a_repetition_penalty_prompts_are_sampled_one_at_a_time(ask, many):
    words = ("--model", TINY, "--max-tokens", 20, "--repetition-penalty", 1.5)
    code, out, err = ask(*words, "--batch", many)
    assert code == 0
    assert err == (
        "--repetition-penalty: one prompt at a time, as batches keep no history of tokens\n"
    )
    for row in map(json.loads, out.splitlines()):
        assert row["completion"] + "\n" == ask(*words, row["question"])[1]


def test_a_cache_that_cannot_be_batched_is_answered_one_by_one(ask, tmp_path, monkeypatch):
    from mlx_lm.models import cache

    file = tmp_path / "prompts.txt"
    file.write_text(f"{QUESTION}\n1 + 1\n")
    words = ("--model", TINY, "--batch", file, "--max-tokens", 30)
    batched = ask(*words)[1]
    monkeypatch.delattr(cache.KVCache, "merge")
    monkeypatch.setattr(caches, "_say_once", say)  # it may have been said in another test
    code, out, err = ask(*words)
    assert (code, out) == (0, batched)
    assert "one prompt at a time" in err


def test_stop_strings_of_generation_config_end_every_kind_of_reply(ask, tmp_path):
    model = with_stop_strings(tmp_path / "model", ["=", "never"])
    file = tmp_path / "prompts.txt"
    file.write_text(f"{QUESTION}\n")
    free = ask("--model", TINY, QUESTION)[1]
    expected = free[: free.index("=") + 1]
    assert ask("--model", model, QUESTION)[1] == expected + "\n"
    assert ask("--model", model, QUESTION, "--stream")[1] == expected + "\n"
    result = json.loads(ask("--model", model, "--batch", file)[1])
    assert (result["completion"], result["finish_reason"]) == (expected, "stop")
    assert ask("--model", model, QUESTION, "--stop", "zzz")[1] == free
    chat = ask("--model", model, "--chat", stdin=f"{QUESTION}\n")[1]
    assert chat == f"{expected}\n"


@pytest.mark.parametrize("stops", [[""], [1], {"a": 1}])
def test_unusable_stop_strings_are_refused(ask, tmp_path, stops):
    model = with_stop_strings(tmp_path / "model", stops)
    code, _, err = ask("--model", model, "hi")
    assert code == 2
    assert "stop_strings" in err


def test_grpo_prompt_is_the_trainers(grpo, ask, tmp_path):
    settings = ("--set", "system_prompt=", "--set", "stop_strings=</answer>")
    words = ("--model", TINY, "--grpo-prompt", *settings)
    generator = generator_of(*words, "x")
    config = grpo.read_config(str(ROOT / "configs/tiny_math.toml"), [])
    row = as_question(config, {"question": QUESTION, "answer": "34"})
    expected = encode_prompt(generator.tokenizer, config, row)
    assert generator.encode(generator.conversation(QUESTION)) == expected
    code, out, err = ask(*words, QUESTION)
    assert code == 0
    assert err.endswith("prompt settings from the trainer's defaults\n")
    assert out.startswith("<reasoning>\n")
    text, _, last = out[:-1].rpartition("\n")
    answer = grpo.extract_xml_answer(text)
    assert last == (f"answer: {answer}" if answer else generator.extracted(""))
    assert ask(*words, "--stream", QUESTION)[1] == out
    file = tmp_path / "q.jsonl"
    file.write_text(json.dumps({"question": QUESTION}) + "\n")
    result = json.loads(ask(*words, "--batch", file)[1])
    assert (result["completion"], result["extracted_answer"]) == (text, answer)


def test_extracted_answer_is_shown():
    generator = generator_of("--model", TINY, "--grpo-prompt", "x")
    assert generator.extracted("<answer>\n34\n</answer>") == "answer: 34"
    assert "none" in generator.extracted("34")


def same_logits(loaded, expected_model):
    tokens = mx.array([[5, 6, 7, 8]])
    return mx.allclose(loaded.model(tokens), expected_model(tokens), atol=1e-5).item()


@pytest.mark.parametrize("name", ["checkpoint-2", "final/adapters"])
def test_adapters_load_on_the_base_that_they_name(lora_run, name):
    import mlx_lm

    folder = lora_run / name
    assert not (folder / "config.json").exists()
    expected = mlx_lm.load(str(TINY), adapter_path=str(folder))[0]
    assert same_logits(inference.open_model(str(folder)), expected)
    assert same_logits(inference.open_model(str(TINY), str(folder)), expected)
    assert not same_logits(inference.open_model(str(TINY)), expected)


def test_final_and_full_checkpoint_load(lora_run, data_dir, model_dir, tmp_path):
    import mlx_lm

    run_training(model_dir, data_dir, tmp_path / "full", max_updates=1, save_steps=2)
    for folder in (lora_run / "final", tmp_path / "full/final", tmp_path / "full/checkpoint-2"):
        assert same_logits(inference.open_model(str(folder)), mlx_lm.load(str(folder))[0])


def test_quantized_model_loads_without_new_adapters(quantized_dir):
    import mlx_lm

    loaded = inference.open_model(str(quantized_dir))
    assert not any("lora_a" in module for _, module in loaded.model.named_modules())
    assert same_logits(loaded, mlx_lm.load(str(quantized_dir))[0])


def test_nanochat_folder_answers_alike_in_every_way(ask, tmp_path):
    pytest.importorskip("tiktoken")
    from helpers import PATTERN, RANKS, SPECIAL

    from utils.model.tiktoken_wrapper import TiktokenTokenizerWrapper

    model = make_model(tmp_path / "nanochat", vocab=max(SPECIAL.values()) + 1)
    for file in model.glob("tokenizer*"):
        file.unlink()
    TiktokenTokenizerWrapper(RANKS, PATTERN, SPECIAL).save_pretrained(model)
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("Hello\n")
    words = ("--model", model, "--max-tokens", 12)
    code, text, _ = ask(*words, "Hello")
    assert code == 0
    assert ask(*words, "--stream", "Hello")[1] == text
    assert json.loads(ask(*words, "--batch", prompts)[1])["completion"] + "\n" == text


class Minimal:
    """What nanochat's tokenizer has, and nothing of what transformers' have besides."""

    has_chat_template = True

    def __init__(self, tokenizer):
        self.encode, self.decode = tokenizer.encode, tokenizer.decode
        self.apply_chat_template = tokenizer.apply_chat_template
        self.eos_token_ids = tokenizer.eos_token_ids


def test_a_tokenizer_that_is_not_from_transformers_is_enough(ask):
    expected = ask("--model", TINY, QUESTION)[1]
    generator = generator_of("--model", TINY, "x")
    generator.tokenizer = generator.stop.tokenizer = Minimal(generator.tokenizer)
    ids = generator.encode(generator.conversation(QUESTION))
    assert "".join(generator.stream(ids, [])) + "\n" == expected
    (reply,) = generator.batch([{"prompt_ids": ids}])
    assert (reply.text + "\n", reply.finish_reason) == (expected, "stop")


def test_without_a_prompt_in_a_terminal_it_says_what_to_give(capsys, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setattr(sys, "stdin", Terminal())
    assert inference.main(["--model", str(TINY)]) == 2
    assert "give a prompt, --chat or --batch FILE" in capsys.readouterr().err


def test_run_settings_reach_the_prompt(grpo, lora_run):
    for name in ("final", "final/adapters", "checkpoint-2"):
        config, source = inference.trainer_settings(None, [], [str(TINY), str(lora_run / name)])
        assert config.stop_strings == ["cups"]
        assert config.system_prompt == ""
        assert lora_run.resolve() in Path(source).resolve().parents
    config, _ = inference.trainer_settings(None, ["stop_strings=[]"], [str(lora_run / "final")])
    assert config.stop_strings == []


def test_adapters_stop_where_their_run_did(ask, lora_run):
    generator = generator_of("--model", lora_run / "checkpoint-2", "x")
    assert generator.config.stop_strings == ["cups"]


def test_reward_files_of_a_run_are_not_taken_over(grpo, lora_run, capsys):
    config, _ = inference.trainer_settings(None, [], [str(lora_run / "final")])
    assert config.reward_funcs == ["correctness"]
    assert "helpers:digest is code" in capsys.readouterr().err
    kept = {"reward_funcs": ["a.py:f", "int", "correctness", "judge", "remote_rm"]}
    kept["reward_weights"] = [1.0, 2.0, 3.0, 4.0, 5.0]
    kept["reward_kwargs"] = {"a.py:f": {"x": 1}, "int": {}}
    expected = {"reward_funcs": ["int", "correctness"], "reward_weights": [2.0, 3.0]}
    expected["reward_kwargs"] = {"int": {}}
    assert inference.without_code(kept) == expected


def test_differing_runs_are_pointed_out(lora_run, tmp_path, capsys):
    other = tmp_path / "other/final"
    other.mkdir(parents=True)
    (other.parent / "config.resolved.json").write_text('{"system_prompt": "Other."}')
    config, _ = inference.trainer_settings(None, [], [str(lora_run / "final"), str(other)])
    assert config.system_prompt == ""
    assert "differ in system_prompt" in capsys.readouterr().err


def replies(err):
    return [part.rstrip("\n") for part in err.split("> ")[1:]]


def test_chat_remembers_and_the_cache_changes_nothing(ask):
    questions = [QUESTION, "And with 3 more?", "Why?"]
    words = ("--model", TINY, "--chat", "--max-tokens", 25, "--system", "Count.")
    code, out, _ = ask(*words, stdin="\n".join([questions[0], "", *questions[1:]]) + "\n")
    assert code == 0
    fresh = generator_of(*words)
    messages = fresh.conversation(questions[0])
    for number in range(3):
        text = "".join(fresh.stream(fresh.encode(messages), []))
        assert out.startswith(f"{text}\n")
        out = out.removeprefix(f"{text}\n")
        following = {"role": "user", "content": questions[(number + 1) % 3]}
        messages = [*messages, {"role": "assistant", "content": text}, following]
    assert not out, "replies alone; prompts and notes go to standard error"


COUNTER = """
class Counter:
    def reset(self, question, **row):
        self.count = 0
        return " Quickly!"

    def step(self, text):
        self.count += 1
        if "Break" in text:
            raise LookupError("broken")
        return f"That was {self.count}.", self.count == 2

    def get_reward(self):
        return self.count / 4
"""


@pytest.fixture
def with_counter(tmp_path):
    """Words that ask with an environment of two turns."""
    (tmp_path / "counter.py").write_text(COUNTER)
    environment = f"environment={tmp_path / 'counter.py'}:Counter"
    words = ("--model", TINY, "--grpo-prompt", "--set", environment, "--set", "system_prompt=")
    return *words, "--set", "reasoning_prefix=", "--max-tokens", 40


def test_chat_goes_on_with_an_environment(ask, with_counter):
    code, out, err = ask(*with_counter, "--chat", stdin=f"{QUESTION}\n/history\n")
    assert code == 0
    assert out.count("[user] That was 1.") == 1
    assert out.count("answer: ") == 2
    assert "[user] That was 2.\n(over, its reward is 0.5)" in err
    assert f"[user] {QUESTION} Quickly!" in err, "of the history"


def test_a_batch_is_of_conversations_with_an_environment(ask, with_counter, many):
    code, out, _ = ask(*with_counter, "--batch", many)
    lines = [json.loads(line) for line in out.splitlines()]
    assert (code, len(lines)) == (0, 10)
    ended = [line for line in lines if line["finish_reason"] == "stop"]
    assert len(ended) > 2
    for line in ended:
        roles = [message["role"] for message in line["messages"]]
        assert roles == ["assistant", "user"] * 2
        assert line["completion"] == line["messages"][2]["content"]


def test_one_prompt_has_one_turn_and_that_is_said(ask, with_counter):
    assert "one turn: --chat and --batch go on" in ask(*with_counter, QUESTION)[2]


def test_chat_reads_only_what_is_new(monkeypatch):
    generator = generator_of("--model", TINY, "--chat", "--max-tokens", 10)
    chat, read = inference.Chat(generator), []
    stream = generator.stream
    monkeypatch.setattr(
        generator, "stream", lambda ids, *rest: read.append(ids) or stream(ids, *rest)
    )
    chat.reply(QUESTION)
    before = len(chat.cached)
    chat.reply("Go on.")
    whole = len(generator.encode(chat.messages[:-1]))
    assert len(read[1]) < whole - before // 2


def fresh_reply(generator, messages):
    return "".join(generator.stream(generator.encode(messages), []))


def test_chat_cuts_the_cache_where_the_conversation_differs():
    generator = generator_of("--model", TINY, "--chat", "--max-tokens", 20)
    chat = inference.Chat(generator)
    chat.reply(QUESTION)
    chat.messages[-1]["content"] = "Of course."
    chat.reply("And with 3 more?")
    assert chat.messages[-1]["content"] == fresh_reply(generator, chat.messages[:-1])


def test_an_interrupted_reply_leaves_no_half_cache(monkeypatch, capsys):
    generator = generator_of("--model", TINY, "--chat", "--max-tokens", 20)
    chat, stream = inference.Chat(generator), generator.stream

    def interrupted(*args):
        pieces = stream(*args)
        yield next(pieces) + next(pieces)
        raise KeyboardInterrupt

    chat.reply(QUESTION)
    monkeypatch.setattr(generator, "stream", interrupted)
    chat.reply("And with 3 more?")
    assert capsys.readouterr().err.endswith(" (stopped)\n")
    monkeypatch.setattr(generator, "stream", stream)
    chat.reply("Why?")
    assert len(chat.messages) == 6
    assert chat.messages[-1]["content"] == fresh_reply(generator, chat.messages[:-1])


def test_no_piece_of_a_stream_is_half_a_character(monkeypatch, model_dir):
    generator = generator_of("--model", model_dir, "--max-tokens", 100, "x")
    ids = generator.tokenizer.encode("caf\u00e9 \u4f60\u597d, fine", add_special_tokens=False)
    steps = [(token, None) for token in ids]
    module = sys.modules["mlx_lm.generate"]
    monkeypatch.setattr(module, "generate_step", lambda *_, **__: iter(steps))
    monkeypatch.setattr(generator.stop, "eos_ids", {ids[-1]})
    pieces = list(generator.stream([1], []))
    assert "".join(pieces) == generator.tokenizer.decode(ids[:-1])
    assert "\u597d" in "".join(pieces)
    assert len([piece for piece in pieces if piece]) > 5


def test_chat_commands(ask):
    lines = [QUESTION, "/history", "clear", "/history", "/system Be brief.", "/system", "/what"]
    code, _, err = ask("--model", TINY, "--chat", stdin="\n".join([*lines, "/quit", QUESTION]))
    answers = replies(err)
    assert code == 0
    assert answers[1].startswith(f"[user] {QUESTION}\n[assistant] ")
    assert answers[2:6] == [
        "(forgotten)",
        "(empty)",
        "(new system prompt, conversation forgotten)",
        "Be brief.",
    ]
    assert "unknown command /what" in answers[6]
    assert len(answers) == 8  # /quit ended it before the last question


BAD = [
    ([], "the prompt is empty"),
    ([""], "the prompt is empty"),
    (["  \n"], "the prompt is empty"),
    (["\udcff"], "not UTF-8"),
    (["hi", "--chat"], "exclude each other"),
    (["--batch", "nope.txt"], "nope.txt cannot be read: No such file"),
    (["--batch", "empty.txt"], "holds no prompts"),
    (["--batch", "latin.txt"], "not UTF-8 text"),
    (["--batch", "bad.jsonl"], "bad.jsonl, line 2, column 2: not JSON"),
    (["--batch", "keys.jsonl"], "row 1: needs prompt, question or messages; it has text"),
    (["--batch", "blank.jsonl"], "prompt = ' ' is not a text"),
    (["--batch", "turns.jsonl"], "messages must be a list"),
    (["--batch", "turns.jsonl", "--grpo-prompt"], "can't be asked with --grpo-prompt"),
    (["--batch", "f", "--stream"], "leave it out with --batch"),
    (["hi", "--output", "f"], "need --batch"),
    (["--batch", "f", "--output", "empty.txt"], "exists already"),
    (["--batch", "f", "--output", "no/f"], "no folder that can be written to"),
    (["hi", "--set", "seed=1"], "need --grpo-prompt"),
    (["hi", "--grpo-prompt", "--set", "question_column=q"], "question_column has no effect"),
    (["hi", "--grpo-prompt", "--system", "x"], "--grpo-prompt has its own"),
    (["hi", "--grpo-prompt", "--set", "sytem_prompt=1"], "did you mean 'system_prompt'"),
    (["hi", "--grpo-prompt", "--config", "no.toml"], "config file no.toml does not exist"),
    (["hi", "--grpo-prompt", "--set", "chat_template=no"], "neither a file nor plain"),
    (["hi", "--chat-template", "no"], "neither a file nor plain"),
    (["hi", "--stop", ""], "--stop '' is empty"),
    (["hi", "--adapter", "."], "adapter_config.json cannot be read"),
]


@pytest.mark.parametrize(("words", "message"), BAD, ids=lambda x: str(x))
def test_bad_input_is_one_line_and_exit_2(ask, words, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.txt").write_text("\n\n")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9\n")
    (tmp_path / "bad.jsonl").write_text('{"prompt": "x"}\n{no\n')
    (tmp_path / "keys.jsonl").write_text('{"text": "x"}\n')
    (tmp_path / "blank.jsonl").write_text('{"prompt": " "}\n')
    (tmp_path / "turns.jsonl").write_text('{"messages": [{"role": "user"}]}\n')
    before = sorted(tmp_path.iterdir())
    code, out, err = ask("--model", TINY, *words)
    assert (code, out) == (2, "")
    assert err.splitlines()[-1].startswith("error: ")
    assert message in err
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    ("option", "value"),
    [("--top-p", "0"), ("--temperature", "-1"), ("--temperature", "nan"), ("--max-tokens", "0"),
     ("--repetition-penalty", "x"), ("--seed", "-1"), ("--batch-size", "1.5")],
)  # fmt: skip
def test_numbers_out_of_range_name_what_is_allowed(capsys, option, value):
    with pytest.raises(SystemExit) as ended:
        inference.main(["--model", "m", "hi", f"{option}={value}"])
    assert ended.value.code == 2
    assert f"argument {option}: '{value}' must be" in capsys.readouterr().err


def test_folders_that_are_no_model(lora_run, tmp_path):
    with pytest.raises(UserError, match=r"did you mean .*checkpoint-2 or .*final\?"):
        inference.locate(str(lora_run))
    with pytest.raises(UserError, match="neither a folder nor a hub name"):
        inference.check_model("./nope")
    with pytest.raises(UserError, match=r"convert_model\.py"):
        inference.check_model("utils/mlx_model_that_is_not_there")
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match="names no base: --model BASE --adapter"):
        inference.locate(str(tmp_path))
    (tmp_path / "adapter_config.json").write_text('{"model": "/gone/base/model"}')
    with pytest.raises(UserError, match=r"names the base /gone/base/model, which is not there"):
        inference.locate(str(tmp_path))
    (tmp_path / "adapter_config.json").write_text("{")
    with pytest.raises(UserError, match="cannot be read"):
        inference.locate(str(tmp_path))
    with pytest.raises(UserError, match="holds adapters itself"):
        inference.locate(str(lora_run / "checkpoint-2"), "other")


def test_a_prompt_beyond_what_the_model_was_made_for_is_noted(ask, tmp_path):
    """By us alone: transformers would warn of errors that do not come."""
    model = make_model(tmp_path / "short", max_position_embeddings=20)
    settings = json.loads((model / "tokenizer_config.json").read_text())
    (model / "tokenizer_config.json").write_text(json.dumps(settings | {"model_max_length": 20}))
    code, _, err = ask("--model", model, "hi", "--max-tokens", 30)
    assert (code, err) == (0, "")
    code, _, err = ask("--model", model, "hi " * 20, "--max-tokens", 2)
    assert code == 0
    assert re.fullmatch(rf"note: \d+ tokens are more than the 20 that {model} was .*\n", err)


def test_adapters_of_another_model_are_refused(ask, lora_run, model_dir):
    code, _, err = ask("--model", model_dir, "--adapter", lora_run / "checkpoint-2", "hi")
    assert code == 2
    assert "--adapter" in err


def start(*words, **how):
    command = [sys.executable, str(ROOT / "utils/inference.py"), *map(str, words)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "stdin": subprocess.PIPE}
    return subprocess.Popen(command, **pipes, **how)


@pytest.fixture(scope="module")
def endless(tmp_path_factory):
    """The random model without an end-of-sequence token: only a limit or Ctrl-C ends it."""
    folder = make_model(tmp_path_factory.mktemp("endless") / "model", eos_token_id=383)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"eos_token": None}))
    return folder


@pytest.fixture(scope="module")
def trained(tmp_path_factory, data_dir):
    """What a run wrote that asks with a system prompt and begins the answers."""
    folder = tmp_path_factory.mktemp("runs") / "trained"
    settings = {"system_prompt": "Be brief.", "reasoning_prefix": "<reasoning>\n"}
    run_training(TINY, data_dir, folder, max_updates=1, save_steps=2, **settings)
    return folder / "final"


def test_a_trained_model_is_asked_as_in_training(ask, trained, tmp_path):
    """Without --grpo-prompt, too; one's own system prompt and template take its place."""
    whole = ask("--model", trained, "--grpo-prompt", QUESTION, "--max-tokens", 9)
    code, out, err = ask("--model", trained, QUESTION, "--max-tokens", 9)
    assert code == 0
    assert "asked as in training" in err
    assert out.startswith("<reasoning>\n")
    assert whole[1].startswith(out)
    plain = generator_of("--model", trained, "x")
    ids = plain.encode(plain.conversation(QUESTION))
    text = plain.tokenizer.decode(ids)
    assert text.count("Be brief.") == text.count("<reasoning>") == 1
    assert plain.encode(plain.with_system([{"role": "user", "content": QUESTION}])) == ids
    own = [{"role": "system", "content": "Mine."}, {"role": "user", "content": QUESTION}]
    assert plain.with_system(own) == own
    other = generator_of("--model", trained, "--system", "Mine.", "x")
    text = other.tokenizer.decode(other.encode(other.conversation(QUESTION)))
    assert "Mine." in text
    assert "Be brief." not in text
    assert "<reasoning>" in text
    without = generator_of(
        "--model", trained, "--chat-template", trained / "chat_template.original.jinja", "x"
    )
    text = without.tokenizer.decode(without.encode(without.conversation(QUESTION)))
    assert "Be brief." not in text
    assert "<reasoning>" not in text


def test_rows_of_messages_get_the_system_prompt_they_lack(ask, trained, tmp_path):
    user = {"role": "user", "content": QUESTION}
    rows = [{"messages": [user]}, {"prompt": QUESTION}]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    code, out, _ = ask("--model", trained, "--batch", path, "--max-tokens", 5)
    assert code == 0
    first, second = map(json.loads, out.splitlines())
    assert first["completion"] == second["completion"]
    assert first["completion"].startswith("<reasoning>\n")


def test_ctrl_c_before_the_first_token_stops_the_reply_only(ask, monkeypatch):
    """The prefix is on the terminal by then."""

    def interrupted(self, ids):
        raise KeyboardInterrupt

    monkeypatch.setattr(inference.Chat, "prepare_cache", interrupted)
    code, out, err = ask("--model", TINY, "--grpo-prompt", "--chat", stdin="Hello\n/quit\n")
    assert code == 0
    assert "<reasoning>" in out
    assert " (stopped)" in err


def test_ctrl_c_ends_a_reply_cleanly(endless):
    process = start("--model", endless, "Hello", "--stream", "--max-tokens", 10**6)
    assert process.stdout.read(20)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert err.decode() == "\nstopped\n"


def test_ctrl_c_in_a_chat_stops_the_reply_only(endless):
    process = start("--model", endless, "--chat", "--max-tokens", 10**6)
    process.stdin.write(b"Hello\n")
    process.stdin.flush()
    assert process.stdout.read(20)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(b"/history\n/quit\n", timeout=60)
    assert process.returncode == 0
    assert b" (stopped)\n> [user] Hello" in err


@pytest.mark.parametrize("mode", mostly_long(["--stream", "--batch"], "--stream"))
def test_a_reader_that_goes_away_ends_it_quietly(endless, tmp_path, mode):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("Hello\n" * 200)
    words = ["--batch", prompts, "--max-tokens", 5] if mode == "--batch" else ["Hello", mode]
    process = start("--model", endless, "--max-tokens", 10**6, *words)
    assert process.stdout.read(10)
    process.stdout.close()
    process.stdin.close()
    assert process.wait(timeout=60) == 0
    assert process.stderr.read() == b""


@pytest.mark.parametrize("script", ["inference.py", "evaluate_model.py"])
def test_help_teaches_at_once(script, tmp_path):
    result, packages = imports_of(ROOT / "utils" / script, "--help", folder=tmp_path)
    assert result.returncode == 0
    assert not packages & {*SLOW, "mlx", "numpy"}
    assert result.stdout.count(f"uv run python utils/{script}") >= 4
    assert max(map(len, result.stdout.splitlines())) <= 100
    assert not list(Path(tmp_path).iterdir())


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"reward_weights": [1.0, 2.0, 3.0]}, "reward_weights has 3 values for 4 reward_funcs"),
        ({"reward_weights": [1.0], "reward_funcs": []}, "reward_weights has 1 value for 0"),
        ({"reward_funcs": "int"}, "reward_funcs = 'int' must be a list"),
        ({"reward_funcs": [["int"]]}, "reward_funcs = ['int'] must be text"),
        ({"reward_kwargs": [1]}, "reward_kwargs = [1] must be a table"),
        ({"stop_strings": 3}, "stop_strings = 3 must be a list"),
        ({"temperature": "hot"}, "temperature = 'hot' must be a number"),
        ({"seed": None}, "seed = None holds something else"),
    ],
)
@pytest.mark.parametrize("place", ["trainer_state.json", "config.resolved.json"])
def test_settings_that_no_run_had(tmp_path, settings, said, place):
    """Of a damaged or foreign trainer_state.json, and of the run beside a final/."""
    folder = tmp_path / "final"
    folder.mkdir()
    funcs = ["file.py:f", "correctness", "xmlcount", "int"]
    config = {"reward_funcs": funcs, "reward_weights": [1.0] * 4} | settings
    if place == "trainer_state.json":
        (folder / place).write_text(json.dumps({"config": config}))
    else:
        (tmp_path / place).write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"\.json: ") as raised:
        inference.settings_of_run(str(folder))
    assert said in str(raised.value)
    assert place in str(raised.value)


def test_a_final_on_another_disk_is_asked_as_its_run_did(tmp_path):
    (tmp_path / "disk" / "final").mkdir(parents=True)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "final").symlink_to(tmp_path / "disk" / "final")
    record = tmp_path / "out" / "config.resolved.json"
    record.write_text('{"system_prompt": "Be brief."}')
    found, source = inference.settings_of_run(str(tmp_path / "out" / "final"))
    assert (found, source) == ({"system_prompt": "Be brief."}, record)


EVIL = "\x1b]52;c;ZXZpbA==\x07 \x9b2J\u202e\b\r"
SHOWN = r"\x1b]52;c;ZXZpbA==\x07 \x9b2J\u202e\x08\r"


@pytest.mark.parametrize("how", [["--stream", "Hello"], ["Hello"], ["--chat"]])
def test_what_a_model_says_is_shown_and_not_obeyed(ask, monkeypatch, how):
    """In a conversation too, where it is said again; lines and tabs stay."""
    monkeypatch.setattr(inference.Generator, "stream", lambda *_: iter(["a\n\tb", EVIL, "c"]))
    typed = f"{EVIL.strip()}\n/history\n/quit\n"
    monkeypatch.setattr(inference.Chat, "trimmable", lambda _: False)
    code, out, err = ask("--model", TINY, *how, stdin=typed)
    assert code == 0, err
    assert f"a\n\tb{SHOWN}c\n" in out
    if how == ["--chat"]:
        assert f"[assistant] a\n\tb{SHOWN}c" in err
    assert not set(EVIL) - set(" ;]25bcJZXpA=") & set(out + err)


def test_lines_of_a_batch_hold_the_data_as_they_are(ask, monkeypatch, tmp_path):
    """On the terminal as well: what it would obey is an escape of JSON's."""
    row = {"prompt": f"What {EVIL}?", "a \x9b column": EVIL}
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row) + "\n")
    code, out, err = ask("--model", TINY, "--batch", path, "--max-tokens", 2)
    assert code == 0, err
    assert row.items() <= json.loads(out).items()
    assert not {"\x1b", "\x9b", "\x07", "\u202e", "\b", "\r"} & set(out)
