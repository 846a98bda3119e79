"""Ask a model: one prompt, a conversation, or a file of prompts.

    uv run python utils/inference.py --model outputs/tiny-math/final --grpo-prompt "Ann has 3 ..."
    uv run python utils/inference.py --model Qwen/Qwen2.5-1.5B-Instruct --chat

A model is a hub name, a converted folder, or what training wrote: `final/` and `checkpoint-N/`,
full or adapters (those name their base in adapter_config.json). Text goes to standard output,
everything else to standard error.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import importlib
import math
import os
import sys
import typing
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict, TypeVar

if __name__ == "__main__" and not __package__:  # typed as a script: sys.path[0] is utils/ itself
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
    __package__ = "utils"

from .base.errors import RunError, UserError
from .base.json_files import read_object
from .base.say import Parser, complain, put, tell_everything
from .base.script import load_script
from .base.task_progress import Progress
from .base.text import counted, is_unicode, json_line, shown
from .data.files import Row
from .data.questions import encode_prompt
from .data.served_template import PROMPT
from .data.tokenizer import Messages
from .model import served_prompt
from .model.served_prompt import OF_A_RUN, PROMPT_SETTINGS
from .model.shape import JsonObject
from .rewards.answers import extract_xml_answer

if TYPE_CHECKING:  # `--help` answers without them
    import mlx.core as mx

    from .data.completion import Completion
    from .model.loading import LoadedModel
    from .rollouts.caches import Cache
    from .settings.run_settings import Settings

N = TypeVar("N", int, float)
COMMAND = "uv run python utils/inference.py"
EXAMPLES = f"""examples:
  {COMMAND} --model Qwen/Qwen2.5-1.5B-Instruct "Why is it blue?"
  {COMMAND} --model outputs/tiny-math/final --grpo-prompt \\
      "Ann has 3 cups and buys 4. How many cups has Ann got?"
      with the prompt that it was trained with; shows the answer that the trainer would read
  {COMMAND} --model outputs/run/checkpoint-200 --chat
      in the conversation: /clear, /history, /system TEXT, /help, /quit; Ctrl-C stops a reply
  {COMMAND} --model utils/mlx_model --batch prompts.txt
      one prompt a line, or rows (.jsonl, .json, .csv, .parquet) with prompt, question or messages
  echo "Why is the sky blue?" | {COMMAND} --model utils/mlx_model

--grpo-prompt takes its settings (system prompt, reasoning prefix, chat template, stop strings) from
--config and --set, else from the run that made the model, else the trainer's defaults."""

SYSTEM_ROLES = ("system", "developer")

# Rewards that send completions to a server, load another model, or need code.
ELSEWHERE = ("remote_rm", "judge", "reward_model", "environment")


def number(kind: Callable[[str], N], holds: Callable[[N], bool], rule: str) -> Callable[[str], N]:
    """An argparse type: a number for which `holds`."""

    def parse(text: str) -> N:
        with contextlib.suppress(ValueError):
            value = kind(text)
            if holds(value):
                return value
        raise argparse.ArgumentTypeError(f"{text!r} must be {rule}")

    return parse


POSITIVE = number(int, lambda v: v >= 1, "a whole number, at least 1")
TEMPERATURE = number(
    float, lambda v: v == 0 or 1e-3 <= v < math.inf, "0 (greedy), or a number from 0.001 up"
)
TOP_P = number(float, lambda v: 0 < v <= 1, "above 0, at most 1")
PENALTY = number(float, lambda v: 0 < v < math.inf, "above 0 (1 is none)")
SEED = number(int, lambda v: 0 <= v < 2**64, "a whole number, at least 0, below 2 ** 64")


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="inference.py",
        description="Ask a model: one prompt, a conversation, or a file of prompts.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("prompt", nargs="?", help="the prompt; read from standard input when that is a pipe")
    add("--model", required=True, metavar="MODEL", help="folder, checkpoint or name on the hub")
    add("--adapter", default="", metavar="FOLDER", help="LoRA or DoRA adapters to put on the model")
    add("--trust-remote-code", action="store_true", help="run Python code that comes with it")
    add("--chat", action="store_true", help="a conversation")
    add("--batch", type=Path, metavar="FILE", help="many prompts, answered in batches as JSONL")
    add("--output", type=Path, metavar="FILE", help="where --batch writes; default: the terminal")
    add("--batch-size", type=POSITIVE, metavar="N", help="prompts at once; default 32")
    add("--stream", action="store_true", help="show the text while it comes (--chat always does)")
    add("--system", metavar="TEXT", help="system prompt")
    add("--max-tokens", type=POSITIVE, default=512, metavar="N", help="default 512")
    add("--temperature", type=TEMPERATURE, default=0.0, metavar="T", help="default 0: greedy")
    add("--top-p", type=TOP_P, default=1.0, metavar="P", help="sample from this much probability")
    add(
        "--repetition-penalty",
        type=PENALTY,
        default=1.0,
        metavar="F",
        help="above 1: repeat less of the last 20 tokens; default 1",
    )
    add("--seed", type=SEED, default=0, metavar="N", help="of the sampling; default 0")
    add("--stop", action="append", metavar="TEXT", help="text that ends a reply (repeatable); "
        "default: what the model's generation_config.json says")  # fmt: skip
    add("--chat-template", metavar="FILE", help='Jinja file, or "plain" for models without one')
    add("--grpo-prompt", action="store_true", help="ask as the trainer does, show its answer")
    add("--config", metavar="TOML", help="with --grpo-prompt: the settings of the training run")
    add("--set", action="append", default=[], metavar="KEY=VALUE", help="override one of them")
    return parser


def check_arguments(args: argparse.Namespace) -> None:
    """Refuse what contradicts itself before anything is loaded. Raises UserError."""
    for text, wrong in contradictions(args):
        if wrong:
            raise UserError(text)
    if args.output:
        check_output(args.output)


def contradictions(args: argparse.Namespace) -> Iterator[tuple[str, bool]]:
    """Complaints, each with whether it is justified; the first such one is raised."""
    yield from about_modes(args)
    yield from about_grpo_prompt(args)
    yield "--stop '' is empty: it would end every reply at once", "" in (args.stop or [])


def about_modes(args: argparse.Namespace) -> Iterator[tuple[str, bool]]:
    batch = args.batch is not None
    modes = [args.prompt is not None, args.chat, batch]
    yield "a prompt, --chat and --batch exclude each other", sum(modes) > 1
    of_batch = bool(args.output or args.batch_size)
    yield "--output and --batch-size need --batch", of_batch and not batch
    at_once = batch and args.stream
    yield "--stream shows one reply as it comes: leave it out with --batch", at_once


def about_grpo_prompt(args: argparse.Namespace) -> Iterator[tuple[str, bool]]:
    settings = bool(args.config or args.set)
    yield "--config and --set need --grpo-prompt", settings and not args.grpo_prompt
    keys = [text.partition("=")[0].strip() for text in args.set]
    yield (
        "--batch reads the columns prompt and question: question_column has no effect",
        "question_column" in keys,
    )
    others = args.system is not None or bool(args.chat_template)
    yield (
        "--grpo-prompt has its own: --set system_prompt=..., --set chat_template=",
        args.grpo_prompt and others,
    )


def check_output(path: Path) -> None:
    """Raises UserError when a new file can't be made there."""
    if path.exists():
        raise UserError(f"--output {path} exists already: delete it, or choose another name")
    if not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
        raise UserError(f"--output {path}: {path.parent} is no folder that can be written to")


def note(text: str) -> None:
    complain(text)


def locate(name: str, adapter: str = "") -> tuple[str, str]:
    """(base model, adapters or ""); a checkpoint that holds adapters names its base itself.

    Raises:
        UserError: a folder that is no model, or adapters whose base is not known.
    """
    folder = Path(name).expanduser()
    if not folder.is_dir():
        return name, os.path.expanduser(adapter)
    if (folder / "config.json").is_file():
        return str(folder), os.path.expanduser(adapter)
    if not (folder / "adapter_config.json").is_file():
        hint = hint_at_models(folder)
        raise UserError(f"{name} is a folder without config.json or adapter_config.json{hint}")
    if adapter:
        raise UserError(f"{name} holds adapters itself: --model BASE --adapter {adapter}")
    return base_of_adapters(folder, name), str(folder)


def base_of_adapters(folder: Path, name: str) -> str:
    """The model that adapters are for, as their folder, which was given as `name`, says.

    Raises:
        UserError: it names none, or one that is not there.
    """
    settings_file = folder / "adapter_config.json"
    settings = read_object(settings_file)
    base = settings.get("model") or settings.get("base_model_name_or_path")  # PEFT's name for it
    if not isinstance(base, str) or not base:
        raise UserError(f"{settings_file} names no base: --model BASE --adapter {name}")
    if base.count("/") != 1 and not Path(base).expanduser().is_dir():
        raise UserError(f"{settings_file} names the base {base}, which is not there: "
                        f"--model BASE --adapter {name}")  # fmt: skip
    return os.path.expanduser(base)


def hint_at_models(folder: Path) -> str:
    """Which of the folders in this one may have been meant."""
    inside = sorted(path.parent for path in folder.glob("*/*config.json"))
    models = list(dict.fromkeys(map(str, inside)))
    return f"; did you mean {' or '.join(models[-3:])}?" if models else ""


def in_our_words(error: UserError) -> str:
    """The trainer's settings have other names here."""
    return str(error).replace("model_name = ", "model ").replace("adapter_path", "--adapter")


def check_model(name: str, adapter: str = "") -> tuple[str, str]:
    """(base, adapters) of a model whose files are there and whole; gigabytes are not read.

    Raises:
        UserError: what is missing or damaged.
    """
    from .model import loading

    base, adapter = locate(name, adapter)
    try:
        loading.check_model(base or "''")
    except UserError as error:
        raise UserError(in_our_words(error)) from None
    return base, adapter


def open_model(name: str, adapter: str = "", *, trust: bool = False) -> LoadedModel:
    """The model for anything that a person may call a model, ready to answer.

    Raises:
        UserError: no such model, a damaged one, or adapters that don't fit.
        RunError: the hub is out of reach.
    """
    grpo = load_script()
    base, adapter = check_model(name, adapter)
    try:
        config = grpo.MLXGRPOConfig(model_name=base, adapter_path=adapter, trust_remote_code=trust)
        loaded = grpo.load_model(config)
    except UserError as error:
        raise UserError(in_our_words(error)) from error
    if loaded.train_type != "full" and not adapter:  # new adapters on a 4-bit base, for training
        loaded.model = grpo.without_adapters(loaded.model)
    return loaded


def settings_of_run(model: str) -> tuple[JsonObject, Path | None]:
    """How the run that made `model` asked it (keys OF_A_RUN), and the file that says so."""
    from .settings import reading

    folder = Path(model).expanduser()
    if not folder.is_dir():
        return {}, None
    found, source = recorded_settings(folder)
    types = typing.get_type_hints(load_script().MLXGRPOConfig)
    try:
        values = {k: reading.check_type(k, found[k], types[k]) for k in OF_A_RUN if k in found}
    except UserError as error:
        raise UserError(f"{source}: {error}") from None
    refuse_uneven(values, source)
    return without_code(values), source if values else None


def recorded_settings(folder: Path) -> tuple[JsonObject, Path]:
    """What a model's folder, or else that of its run, records; empty where nothing is."""
    if found := served_prompt.settings_in(folder):
        return found, folder / served_prompt.MARKER
    source = folder / "trainer_state.json"
    found = read_object(source).get("config") or {}
    if not found:
        source = record_beside(folder)
        found = read_object(source)
    if not isinstance(found, dict):
        raise UserError(f"{source}: config is no JSON object")
    return found, source


def record_beside(folder: Path) -> Path:
    """Where the settings of the run are that wrote it, also where it is a link to another disk."""
    places = [Path(os.path.abspath(folder)).parent, folder.resolve().parent]
    places = [place.parent if folder.name == "adapters" else place for place in places]
    records = [place / "config.resolved.json" for place in places]
    return next((path for path in records if path.is_file()), records[-1])


def refuse_uneven(values: JsonObject, source: Path) -> None:
    """Raises UserError for settings of rewards that no run can have had."""
    names, weights = values.get("reward_funcs", []), values.get("reward_weights") or []
    if weights and len(weights) != len(names):
        raise UserError(
            f"{source}: reward_weights has {counted(len(weights), 'value')} for "
            f"{len(names)} reward_funcs; --config FILE takes the place of these settings"
        )


def without_code(values: JsonObject) -> JsonObject:
    """Leave out rewards in files and by others: a folder that was downloaded must not run code,
    and must not send what it is asked elsewhere."""
    names = values.get("reward_funcs", [])
    foreign = [name for name in names if ":" in name or name in ELSEWHERE]
    if not foreign:
        return values
    note(f"left out: {', '.join(foreign)} is code or asks others; --set reward_funcs=[...] runs it")
    return values | only_rewards(values, [name for name in names if name not in foreign])


def only_rewards(values: JsonObject, kept: list[str]) -> JsonObject:
    """The settings of these rewards; those of `correctness` where there are none."""
    names, given = values["reward_funcs"], values.get("reward_kwargs", {})
    weights = values.get("reward_weights") or [1.0] * len(names)
    pairs = zip(names, weights, strict=True)
    return {
        "reward_funcs": kept or ["correctness"],
        "reward_weights": [weight for name, weight in pairs if name in kept] or [1.0],
        "reward_kwargs": {name: given[name] for name in kept if name in given},
    }


def trainer_settings(
    file: str | None, overrides: list[str], models: list[str]
) -> tuple[Settings, str]:
    """The trainer's configuration to ask `models` by, and where it is from.

    `file` (with `overrides` on top), else the first run among those that made the models, else the
    defaults.

    Raises:
        UserError: unknown keys, wrong values, missing files.
    """
    from .settings import reading

    grpo = load_script()
    if file:
        return grpo.read_config(file, overrides), file
    given = reading.resolve(grpo.MLXGRPOConfig, None, overrides)
    values, source = settings_of_first_run(models)
    config = grpo.MLXGRPOConfig(**values | {name: getattr(given, name) for name in given.explicit})
    check_template("chat_template =", config.chat_template)
    if source is None:
        return config, "the trainer's defaults"
    return config, min(str(source), os.path.relpath(source), key=len)


def settings_of_first_run(models: list[str]) -> tuple[JsonObject, Path | None]:
    """`settings_of_run` of the first model that has some; says where those of others differ."""
    runs = [run for run in map(settings_of_run, models) if run[0]]
    values, source = runs[0] if runs else ({}, None)
    for name in OF_A_RUN[:PROMPT_SETTINGS]:
        if any(run[0].get(name) != values.get(name) for run in runs):
            note(f"the runs that made these models differ in {name}; taken from {source}")
    return values, source


def check_template(option: str, template: str) -> None:
    """Raises UserError, naming the option, for a chat template that is not there."""
    if template not in ("", "plain") and not Path(template).is_file():
        raise UserError(f"{option} {template!r} is neither a file nor plain")


def chat_settings(args: argparse.Namespace, loaded: LoadedModel) -> Settings:
    """A configuration for ordinary questions: as the model was trained, or by its own template.

    What --chat-template names takes the place of all that training added, too.
    """
    base, adapter = locate(args.model, args.adapter)
    trained, _ = settings_of_run(adapter or str(loaded.folder))
    asked: JsonObject = {"system_prompt": "", "reasoning_prefix": ""}
    if args.chat_template:
        check_template("--chat-template", args.chat_template)
        asked["chat_template"] = args.chat_template
    else:
        asked |= {name: trained[name] for name in PROMPT if name in trained}
        check_template("chat_template =", trained.get("chat_template", ""))
        if asked["system_prompt"] or asked["reasoning_prefix"]:
            note("asked as in training; --system and --chat-template take the place of its prompt")
    if args.system is not None:
        asked["system_prompt"] = args.system
    asked["stop_strings"] = args.stop or stop_strings_of(base, loaded, trained)
    return load_script().MLXGRPOConfig(**asked)


def stop_strings_of(base: str, loaded: LoadedModel, trained: JsonObject) -> list[str]:
    """Of the run that made the model or its adapters, else the model's generation_config.json."""
    found = read_object(loaded.folder / "generation_config.json").get("stop_strings") or []
    found = trained.get("stop_strings", found)
    found = [found] if isinstance(found, str) else found
    if not isinstance(found, list) or not all(isinstance(text, str) and text for text in found):
        raise UserError(
            f"generation_config.json of {base}: stop_strings = {shown(found)} is no list of texts; "
            "--stop TEXT takes its place"
        )
    return found


class MlxLmSampling(TypedDict):
    """How mlx-lm samples, as its functions take it."""

    max_tokens: int
    sampler: Callable[[mx.array], mx.array]
    logits_processors: list[Callable[[mx.array, mx.array], mx.array]]


class Generator:
    """A model with the way it is asked and sampled."""

    def __init__(self, args: argparse.Namespace) -> None:
        import mlx.core as mx

        from .device import runtime
        from .rollouts.stop_rule import StopRule

        self.args = args
        config: Settings | None = None
        if args.grpo_prompt:  # before the model: a mistyped setting should not wait for it
            models = [args.adapter, args.model] if args.adapter else [args.model]
            config, source = trainer_settings(args.config, args.set, models)
            note(f"prompt settings from {source}")
        if kernels := runtime.keep_compiled_kernels():
            note(kernels)
        loaded = open_model(args.model, args.adapter, trust=args.trust_remote_code)
        self.tokenizer = loaded.tokenizer
        self.config = config or chat_settings(args, loaded)
        self.config.model_name = args.model
        if args.grpo_prompt and args.stop:
            self.config.stop_strings = args.stop
        self.loaded = loaded
        prefix = self.config.reasoning_prefix
        self.stop = StopRule(self.tokenizer, self.config.stop_strings, prefix)
        mx.random.seed(args.seed)

    def encode(self, messages: Messages) -> list[int]:
        """Token ids by the trainer's own function. Raises UserError for a template that refuses."""
        from .data import files
        from .model import loading

        try:
            ids = encode_prompt(self.tokenizer, self.config, {"prompt": messages})
        except ValueError as error:  # nanochat's tokenizer, for turns that it can't render
            raise UserError(str(error)) from None
        unlimited = dataclasses.replace(self.config, max_prompt_length=2**31 - 1)
        files.check_prompts(unlimited, [{"prompt_ids": ids}], "given", self.loaded.vocabulary)
        most = len(ids) + self.args.max_tokens  # mlx-lm also reads the last token that it samples
        if beyond := loading.beyond_context(self.loaded, self.args.model, len(ids), most):
            note(f"note: {beyond}: the prompt")
        return ids

    def conversation(self, question: str) -> Messages:
        """The messages of a first question."""
        return self.with_system([{"role": "user", "content": question}])

    def with_system(self, messages: Messages) -> Messages:
        """Messages that bring no system prompt of their own get the one that is set."""
        if not self.config.system_prompt or messages[0]["role"] in SYSTEM_ROLES:
            return messages
        return [{"role": "system", "content": self.config.system_prompt}, *messages]

    def sampling(self) -> MlxLmSampling:
        from mlx_lm.sample_utils import make_logits_processors, make_sampler

        penalty = self.args.repetition_penalty
        return {
            "max_tokens": self.args.max_tokens,
            "sampler": make_sampler(self.args.temperature, self.args.top_p),
            "logits_processors": make_logits_processors(
                repetition_penalty=penalty if penalty != 1 else None
            ),
        }

    def stream(
        self, ids: list[int], tokens: list[int], cache: Cache | None = None
    ) -> Iterator[str]:
        """Pieces of the reply as they come; `tokens` collects its ids.

        The text so far is decoded anew for each token: with a byte-level vocabulary one character
        may take several, and a stop string ends where it ends in training.
        """
        import mlx.core as mx
        from mlx_lm.generate import generate_step, generation_stream, wired_limit

        model, shown = self.loaded.model, 0
        with wired_limit(model, [generation_stream]):
            steps = generate_step(mx.array(ids), model, prompt_cache=cache, **self.sampling())
            for token, _ in steps:
                tokens.append(int(token))
                ended = self.stop.length(tokens, len(tokens) - 1) is not None
                text = self.stop.text(tokens)
                if not ended and len(tokens) < self.args.max_tokens:
                    text = text.rstrip(" \ufffd")  # what the next token may still change
                yield text[shown:]
                shown = max(shown, len(text))
                if ended:
                    return

    def batch(
        self,
        questions: list[Row],
        so_far: Callable[[list[Completion]], None] = lambda _: None,
        pulse: Callable[[str], None] = lambda _: None,
    ) -> list[Completion]:
        """A completion of each row's `prompt_ids`, sampled as in training; `so_far` gets what is
        done.

        Each prompt has a random key of its own, so no sample depends on the batch size.
        """
        from .device import runtime
        from .rollouts.asking import sampler_of_command
        from .rollouts.sampler import Sampling

        args, config, grpo = self.args, self.config, load_script()
        if args.repetition_penalty != 1:
            note("--repetition-penalty: one prompt at a time, as batches keep no history of tokens")
            return self.one_by_one([row["prompt_ids"] for row in questions], so_far)
        runtime.set_memory_limits(config.wired_limit_gb, config.cache_limit_gb)
        size = args.batch_size or 32
        ask = sampler_of_command(grpo.sample_batch, self.stop, config, self.loaded, size)
        ask.pulse = pulse
        keys = [grpo.random_key(args.seed, grpo.EVALUATION, [i]) for i in range(len(questions))]
        given = config.max_turns * config.max_tool_tokens if config.has_turns else 0
        how = Sampling(args.temperature, args.max_tokens, top_p=args.top_p, given=given)
        return ask(self.loaded.model, questions, keys, how, so_far)

    def one_by_one(
        self, prompts: list[list[int]], so_far: Callable[[list[Completion]], None]
    ) -> list[Completion]:
        """What `batch` gives, by mlx-lm."""
        from .data.completion import Completion

        done: list[Completion] = []
        for ids in prompts:
            tokens: list[int] = []
            for _ in self.stream(ids, tokens):
                pass
            text = self.stop.prefix + self.stop.text(tokens)
            reason = "length" if self.stop.length(tokens, 0) is None else "stop"
            done.append(Completion(tokens, [], [1] * len(tokens), reason, text))
            so_far(done)
        return done

    def extracted(self, text: str) -> str:
        """The line that --grpo-prompt adds to a reply."""
        answer = extract_xml_answer(text)
        return f"answer: {answer}" if answer else "answer: none (no <answer>...</answer> in it)"


def write(text: str, file: typing.TextIO | None = None) -> None:
    """To standard output at once, with what the terminal can't show replaced."""
    put(text, file or sys.stdout)


def read_line(prompt: str) -> str:
    """A line from the terminal, with its editing, or from a pipe; the prompt is no output."""
    if sys.stdin.isatty() and sys.stdout.isatty():
        return input(prompt)
    complain(prompt, end="")
    return input()


def read_standard_input() -> str:
    """What was piped in. Raises UserError when it is no text."""
    try:
        return sys.stdin.read().rstrip("\n")
    except UnicodeDecodeError:
        raise UserError("standard input is not UTF-8 text") from None


def answer_one(args: argparse.Namespace) -> int:
    """One prompt, one reply."""
    question = args.prompt
    if question is None:
        if sys.stdin.isatty():
            raise UserError("nothing to do: give a prompt, --chat or --batch FILE")
        question = read_standard_input()
    if not question.strip():
        raise UserError("the prompt is empty")
    if not is_unicode(question):
        raise UserError("the prompt is not UTF-8 text")
    generator = Generator(args)
    note_one_turn(generator.config)
    ids = generator.encode(generator.conversation(question))
    text = generator.config.reasoning_prefix
    if args.stream:
        write(text)
    for piece in generator.stream(ids, []):
        text += piece
        if args.stream:
            write(piece)
    write("\n" if args.stream else f"{text}\n")
    if args.grpo_prompt:
        write(f"{generator.extracted(text)}\n")
    return 0


def note_one_turn(config: Settings) -> None:
    if config.has_turns:
        note("one turn: --chat and --batch go on with the environment")


QUIT = ("/quit", "/exit", "quit", "exit")


def load_line_editing() -> None:
    """Arrow keys and a history of lines, where Python has them."""
    try:
        importlib.import_module("readline")
    except ImportError:
        note("no readline: lines can't be edited with arrow keys")


def next_line() -> str:
    """What was typed in a conversation; the end of the input is the command to quit."""
    try:
        return read_line("> ").strip()
    except EOFError:
        note("")
        return QUIT[0]
    except UnicodeDecodeError:
        return "\udc80"  # refused as any text that is not Unicode


class Chat:
    """A conversation in the terminal. The key-value cache is kept as far as the prompt agrees."""

    HELP = """/clear         forget the conversation
/history       show it
/system TEXT   another system prompt (clears); without TEXT: show it
/quit          end, as Ctrl-D does; Ctrl-C stops a reply"""

    def __init__(self, generator: Generator) -> None:
        self.generator = generator
        self.partner = None
        if generator.config.has_turns:
            from .rollouts import asking, partner  # nothing of it is loaded without

            given = generator.config, generator.tokenizer
            if made := asking.environments_of(*given):
                self.partner = partner.Partner(given[0], made, generator.args.seed, note)
        self.clear()

    def clear(self) -> None:
        self.messages: Messages = []
        self.cache: Cache = []
        self.cached: list[int] = []

    def run(self) -> int:
        if sys.stdin.isatty():
            load_line_editing()
        note("/help lists the commands, /quit ends")
        while True:
            line = next_line()
            if line in QUIT:
                return 0
            if not is_unicode(line):
                note("error: that is not UTF-8 text")
            elif line.startswith("/") or line == "clear":
                self.command(line)
            elif line:
                self.reply(line)

    def command(self, line: str) -> None:
        name, _, text = line.lstrip("/").partition(" ")
        config = self.generator.config
        if name == "clear":
            self.clear()
            note("(forgotten)")
        elif name == "history":
            note("\n".join(f"[{m['role']}] {m['content']}" for m in self.messages) or "(empty)")
        elif name == "system" and text.strip():
            config.system_prompt = text.strip()
            self.clear()
            note("(new system prompt, conversation forgotten)")
        elif name == "system":
            note(config.system_prompt.strip() or "(none)")
        else:
            note(self.HELP if name == "help" else f"unknown command /{name}\n{self.HELP}")

    def reply(self, line: str) -> None:
        """Ask, and go on for as long as an environment answers what is said."""
        question = {"role": "user", "content": line}
        first = [*self.messages, question] if self.messages else self.generator.conversation(line)
        if self.partner is None:
            self.turn(first)
            return
        messages = self.partner.begin(first)
        while messages and self.turn(messages):
            if answer := self.partner.answer(self.messages[-1]["content"]):
                write("".join(f"[{m['role']}] {m['content']}\n" for m in answer))
            messages = [*self.messages, *answer] if answer else []

    def turn(self, messages: Messages) -> bool:
        """Show the reply to these messages as it comes, and remember both; Ctrl-C keeps what came.
        Returns whether it came to its end."""
        generator, whole = self.generator, True
        try:
            ids = generator.encode(messages)
        except UserError as error:
            note(f"error: {error}")
            return False
        text, tokens = generator.config.reasoning_prefix, []  # type: tuple[str, list[int]]
        try:  # Ctrl-C is for the reply from its first character on, and that may be the prefix
            write(text)
            for piece in generator.stream(self.prepare_cache(ids), tokens, self.cache):
                text += piece
                write(piece)
            self.cached = (ids + tokens)[: self.cache[0].offset] if self.trimmable() else []
        except KeyboardInterrupt:  # mid-step: layers of the cache may differ in length
            self.cached, whole = [], False
            note(" (stopped)")
        write("\n")
        if self.generator.args.grpo_prompt:
            write(f"{generator.extracted(text)}\n")
        self.messages = [*messages, {"role": "assistant", "content": text}]
        return whole

    def trimmable(self) -> bool:
        from mlx_lm.models.cache import can_trim_prompt_cache

        same = len({getattr(layer, "offset", None) for layer in self.cache}) == 1
        return same and hasattr(self.cache[0], "offset") and can_trim_prompt_cache(self.cache)

    def prepare_cache(self, ids: list[int]) -> list[int]:
        """Cut the cache to what `ids` starts with; returns the ids that are still to be read."""
        from mlx_lm.models.cache import make_prompt_cache, trim_prompt_cache

        pairs = zip(self.cached, ids[:-1], strict=False)  # the last one is always read anew
        same = next((n for n, (a, b) in enumerate(pairs) if a != b), None)
        same = min(len(self.cached), len(ids) - 1) if same is None else same
        if same:
            trim_prompt_cache(self.cache, len(self.cached) - same)
            return ids[same:]
        self.cache = make_prompt_cache(self.generator.loaded.model)
        return ids


def read_prompts(path: Path, grpo_prompt: bool) -> list[Row]:
    """Rows with `prompt` or `messages`: of a data file, or one prompt a line of any other.

    Raises:
        UserError: missing, malformed, or without prompts.
    """
    from .data import files

    if path.suffix.lower() in files.SUFFIXES:
        rows = files.read_rows(path)
        for index, row in enumerate(rows, start=1):
            check_row(f"{path}, row {index}", row, grpo_prompt)
        return rows
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError:
        raise UserError(f"--batch {path} is not UTF-8 text") from None
    except OSError as error:
        raise UserError(f"--batch {path} cannot be read: {error.strerror}") from None
    rows = [{"prompt": line} for line in lines if line.strip()]
    if not rows:
        raise UserError(f"--batch {path} holds no prompts")
    if len(rows) < len(lines):
        note(f"{counted(len(lines) - len(rows), 'empty line')} of {path} left out")
    return rows


def check_row(where: str, row: Row, grpo_prompt: bool) -> None:
    kinds = [name for name in ("messages", "prompt", "question") if row.get(name) is not None]
    if not kinds:
        raise UserError(f"{where}: needs prompt, question or messages; it has {', '.join(row)}")
    value = row[kinds[0]]
    if kinds[0] == "messages":
        check_messages(where, value, grpo_prompt)
    elif not isinstance(value, str) or not value.strip():
        raise UserError(f"{where}: {kinds[0]} = {value!r} is not a text")


def check_messages(where: str, value: object, grpo_prompt: bool) -> None:
    if grpo_prompt:
        raise UserError(f"{where}: messages can't be asked with --grpo-prompt; give a question")
    if not isinstance(value, list) or not value or not all(map(is_message, value)):
        raise UserError(f"{where}: messages must be a list of {{role, content}}, both texts")


def is_message(value: object) -> bool:
    return isinstance(value, dict) and all(
        isinstance(value.get(key), str) for key in ("role", "content")
    )


def answer_batch(args: argparse.Namespace) -> int:
    """All prompts of a file; results are written in order, as soon as their batch is done."""
    rows = read_prompts(args.batch, args.grpo_prompt)
    terminal = sys.stdout
    with contextlib.redirect_stdout(sys.stderr):  # what is said of memory and speed is no result
        generator = Generator(args)
        asked = [
            generator.with_system(row["messages"])
            if row.get("messages")
            else generator.conversation(row.get("prompt") or row["question"])
            for row in rows
        ]
        questions = [
            {**row, "prompt": messages, "prompt_ids": generator.encode(messages)}
            for row, messages in zip(rows, asked, strict=True)
        ]
        if args.output is None:
            write_results(generator, rows, questions, functools.partial(write, file=terminal))
            return 0
        with args.output.open("x", encoding="utf-8", buffering=1) as file:  # a line at a time
            write_results(generator, rows, questions, file.write)
    return 0


def write_results(
    generator: Generator,
    rows: list[Row],
    questions: list[Row],
    write_text: Callable[[str], object],
) -> None:
    written = 0
    with Progress(len(rows), "prompt", tell=note, calm=True) as shown:

        def so_far(done: list[Completion]) -> None:
            """Write what is new; after memory ran out, the first ones are done once more."""
            nonlocal written
            new = zip(rows[written : len(done)], done[written:], strict=True)
            for row, completion in new:
                write_text(as_line(row, completion, generator.args.grpo_prompt))
            count, written = len(done) - written, max(written, len(done))
            if count > 0:
                shown.step(count)

        generator.batch(questions, so_far, shown.stage)
    if generator.args.output:
        note(f"{counted(written, 'result')} in {generator.args.output}")


def as_line(row: Row, completion: Completion, with_answer: bool) -> str:
    """A row with what was replied to it, as JSON."""
    result: Row = {
        "completion": completion.text,
        "finish_reason": completion.finish_reason,
        "tokens": completion.sampled,
    }
    if completion.conversation:
        result["messages"] = completion.conversation.messages
    if with_answer:
        result["extracted_answer"] = extract_xml_answer(completion.text)
    return json_line(row | result, default=str) + "\n"


def run(command: Callable[[], int]) -> int:
    """The exit code of `command`, with every expected end turned into a line."""
    tell_everything()
    try:
        return command()
    except (UserError, RunError) as error:
        note(f"error: {error}")
        return error.exit_code
    except KeyboardInterrupt:
        note("\nstopped")
        return 130
    except BrokenPipeError:  # the reader has what it wanted (`| head`)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:  # a full disk
        note(f"error: {error}")
        return 1


def main(argv: list[str] | None = None) -> int:
    """Returns 0, 2 (bad input), 1 (a run that failed) or 130 (Ctrl-C)."""
    args = build_parser().parse_args(argv)

    def command() -> int:
        check_arguments(args)
        if args.chat:
            return Chat(Generator(args)).run()
        return answer_batch(args) if args.batch else answer_one(args)

    return run(command)


if __name__ == "__main__":
    sys.exit(main())
