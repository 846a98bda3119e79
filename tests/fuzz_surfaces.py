"""The surfaces that tests/fuzz.py covers: how each makes its cases, and what it promises."""

import contextlib
import csv
import dataclasses
import io
import json
import math
import random
import shutil
import struct
import tomllib
import typing
from pathlib import Path
from types import SimpleNamespace

import numpy as np
from conftest import ROOT
from fuzz import Case, Surface, World

from utils import inference
from utils.base.errors import UserError
from utils.data import files as datafiles
from utils.data.questions import encode_questions
from utils.memory.memory import RolloutSize
from utils.model import loading
from utils.rewards import by_name
from utils.rewards.answers import as_number
from utils.rewards.calls import RewardCalls, TrainerState
from utils.rewards.number_forms import read_number
from utils.rollouts import sampler
from utils.rollouts.stop_rule import StopRule
from utils.run import checkpoints, folders, trackers
from utils.settings import reading

Random = random.Random
VOCABULARY = 384  # of the random model

# Text that has broken readers before: NUL, marks, directions, halves, digits, tags, escapes.
PIECES = (
    *("", " ", "\0", "\ufeff", "\r\n", "\u2028", "\x1b[2J", "\u202e", "e\u0301", "\U0001f600"),
    *("'", '"', '\\"', "\\", "{", "}", "[[", "]]", ",", ";", "=", "#", "####", "$", "%s", "{0}"),
    *("<reasoning>", "</reasoning>", "<answer>", "</answer>", "<answer", "<|im_end|>", "</s>"),
    *("nan", "inf", "-0", "1e999", "0x1F", "1_000", "9" * 5000, "1,234.50", "-.5", "\u0663"),
    *("How many is 3 + 4?", "seven", "\\boxed{7}", "{{ messages }}", "{% for %}", "../../etc"),
    *("https://user:password@host/?api_key=secret", "file.py:function", "null", "true", "[]", "{}"),
)


def text(rng: Random, longest: int = 8) -> str:
    """A few pieces; now and then one of them very often."""
    parts = [rng.choice(PIECES) for _ in range(rng.randrange(longest))]
    if parts and rng.random() < 0.03:
        parts *= rng.choice((10, 100, 1000))
    return "".join(parts)


def plain_text(rng: Random) -> str:
    words = ("how", "many", "is", "7", "and", "12", "Ann", "buys", "\u00fcber", "\u4e09", "apples?")
    return " ".join(rng.choice(words) for _ in range(rng.randrange(1, 9)))


def value(rng: Random, depth: int = 2) -> object:
    """Something that JSON can write."""
    kind = rng.randrange(9 if depth else 7)
    if kind == 7:
        return [value(rng, depth - 1) for _ in range(rng.randrange(4))]
    if kind == 8:
        return {text(rng, 2): value(rng, depth - 1) for _ in range(rng.randrange(4))}
    whole = (0, 1, -1, 2, 7, 64, 2**31 - 1, 2**31, -(2**31), 2**63, 2**64, 10**12, 10**400)
    real = (0.0, -0.0, 0.5, 1.0, 1e-6, 1e308, -1.5, math.nan, math.inf, -math.inf)
    makers = (
        lambda: None,
        lambda: rng.random() < 0.5,
        lambda: rng.choice(whole),
        lambda: rng.choice(real),
        lambda: plain_text(rng),
        lambda: text(rng, 4),
        lambda: rng.choice(whole) if rng.random() < 0.5 else str(rng.choice(real)),
    )
    return makers[kind]()


def damaged(rng: Random, data: bytes) -> bytes:
    """The bytes with a few random faults: flips, cuts, repeats, insertions."""
    for _ in range(rng.choice((1, 1, 1, 2, 5))):
        at = rng.randrange(len(data) + 1)
        end = min(len(data), at + rng.choice((1, 1, 4, 64, 10_000)))
        data = rng.choice(
            (
                lambda d, a, e: d[:a],
                lambda d, a, e: d[:a] + d[e:],
                lambda d, a, e: d[:a] + d[a:e] * 3 + d[e:],
                lambda d, a, e: d[:a] + rng.randbytes(rng.choice((1, 1, 4, 100))) + d[a:],
                lambda d, a, e: d[:a] + text(rng, 3).encode("utf-8", "replace") + d[a:],
                lambda d, a, e: d[:a] + rng.choice((b"[", b"{", b'{"a":', b"(")) * 5000 + d[a:],
            )
        )(data, at, end)
    return data


def parses(reader: typing.Callable[[bytes], object], data: bytes) -> bool:
    try:
        reader(data)
    except (ValueError, RecursionError):
        return False
    return True


# --- settings -------------------------------------------------------------------------------------


def toml_literal(item: object) -> str:
    if isinstance(item, dict):
        pairs = (f"{json.dumps(str(k))} = {toml_literal(v)}" for k, v in item.items())
        return "{" + ", ".join(pairs) + "}"
    if isinstance(item, list):
        return "[" + ", ".join(map(toml_literal, item)) + "]"
    if isinstance(item, float):
        return str(item)
    if isinstance(item, int) and abs(item) >= 10**300:
        return hex(item)  # TOML takes any number of these digits
    # JSON's escapes are TOML's, but for null and halves of surrogate pairs.
    return json.dumps(item if item is not None else "")


def fields(world: World) -> list[dataclasses.Field]:
    return [f for f in dataclasses.fields(world.grpo.MLXGRPOConfig) if f.init]


def setting(world: World, rng: Random) -> tuple[str, object]:
    """A name of a setting, seldom mistyped, with its default, a neighbour of it, or anything."""
    chosen = rng.choice(fields(world))
    default = chosen.default
    if default is dataclasses.MISSING:
        default = chosen.default_factory()
    name = chosen.name if rng.random() < 0.95 else rng.choice((chosen.name[1:], text(rng, 3)))
    kind = rng.random()
    if kind < 0.4:
        return name, default
    if kind < 0.7 and isinstance(default, int | float) and not isinstance(default, bool):
        return name, rng.choice((default + 1, default * 2, -default, default / 3, 0, 1))
    return name, value(rng)


def check_config(world: World, config: object) -> None:
    """What the rest of a run relies on."""
    types = typing.get_type_hints(world.grpo.MLXGRPOConfig)
    for f in fields(world):
        kind = typing.get_origin(types[f.name]) or types[f.name]
        assert isinstance(getattr(config, f.name), kind), f.name
    recorded = reading.recorded(config)
    assert json.loads(json.dumps(recorded, allow_nan=False)) == recorded
    json.dumps(recorded, ensure_ascii=False).encode()
    world.grpo.MLXGRPOConfig(**dataclasses.asdict(config))
    by_name.load_rewards(config, world.grpo.REWARDS)


def toml_case(world: World, rng: Random) -> Case:
    good = rng.random() < 0.2
    if good:
        source = rng.choice(sorted((ROOT / "configs").glob("*.toml"))).read_text()
        source = rng.choice(("", "\ufeff", "# a remark\n")) + source
        data = source.replace("\n", rng.choice(("\n", "\r\n"))).encode()
    else:
        pairs = dict(setting(world, rng) for _ in range(rng.randrange(1, 6)))
        names = ((k if k.isidentifier() else json.dumps(k)) for k in pairs)
        lines = [f"{k} = {toml_literal(v)}" for k, v in zip(names, pairs.values(), strict=True)]
        if rng.random() < 0.3:
            lines.insert(0, "[mlx_grpo]")
        data = "\n".join(lines).encode("utf-8", "replace")
        if rng.random() < 0.4:
            data = damaged(rng, data)
    path = world.file("settings.toml", data)

    def run() -> None:
        check_config(world, world.grpo.read_config(str(path), []))

    return Case(run, parses(lambda d: tomllib.loads(d.decode("utf-8-sig")), data), good)


def override_case(world: World, rng: Random) -> Case:
    overrides, valid = [], True
    for _ in range(rng.randrange(1, 4)):
        name, item = setting(world, rng)
        written = toml_literal(item) if rng.random() < 0.7 else str(item)[:10_000]
        if rng.random() < 0.2:
            written = rng.choice(('"{}"', "'{}'", "[{}]", "{}\nseed = 1", " {} ")).format(written)
        override = f"{name}{rng.choice(('=', '=', '=', ' = ', '==', ''))}{written}"
        if rng.random() < 0.1:
            typed = damaged(rng, override.encode("utf-8", "replace"))
            override = typed.decode("utf-8", "surrogateescape")  # as sys.argv has it
        valid = valid and hasattr(world.grpo.MLXGRPOConfig, override.partition("=")[0].strip())
        overrides.append(override)
    empty = str(world.file("empty.toml", b""))
    return Case(lambda: check_config(world, world.grpo.read_config(empty, overrides)), valid)


# --- data -----------------------------------------------------------------------------------------


def cell(rng: Random, good: bool) -> object:
    if good:
        return plain_text(rng)
    return value(rng) if rng.random() < 0.3 else text(rng)


def as_json_text(item: object, rng: Random) -> bytes:
    ascii_only = rng.random() < 0.5
    return json.dumps(item, ensure_ascii=ascii_only).encode("utf-8", "surrogatepass")


def data_rows(rng: Random, good: bool) -> list[dict]:
    count = rng.choice((1, 2, 3, 8)) if not good else rng.choice((2, 5))
    rows = [{"question": cell(rng, good), "answer": cell(rng, good)} for _ in range(count)]
    for row in rows if not good else []:
        if rng.random() < 0.1:
            column = rng.choice(("prompt", "completions", "self", "", "prompt_ids", "\0"))
            row[column] = cell(rng, False)
        if rng.random() < 0.05:
            row.pop(rng.choice(("question", "answer")))
    if rng.random() < 0.004:
        rows[0]["answer"] = "7" * 10_000_000
    return rows


def encoded_rows(rows: list[dict], kind: str, rng: Random) -> bytes:
    if kind == ".jsonl":
        end = rng.choice((b"\n", b"\r\n", b"\n\n"))
        return b"".join(as_json_text(row, rng) + end for row in rows)
    if kind == ".json":
        return as_json_text(rows, rng)
    if kind == ".csv":
        names = list(dict.fromkeys(name for row in rows for name in row))
        out = io.StringIO()
        writer = csv.DictWriter(out, names, restval="", quoting=csv.QUOTE_ALL)
        writer.writeheader()
        for row in rows:
            short = {k: 7 if isinstance(v, int) else str(v)[:200_000] for k, v in row.items()}
            writer.writerow(short)
        return out.getvalue().encode("utf-8", "surrogatepass")
    return parquet(rows)


def parquet(rows: list[dict]) -> bytes:
    import pyarrow
    import pyarrow.parquet

    out = io.BytesIO()
    try:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), out)
    except (pyarrow.ArrowException, OverflowError, UnicodeEncodeError):  # mixed types, empty tables
        out = io.BytesIO()
        texts = [{k: repr(v)[:999] for k, v in row.items()} for row in rows]
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(texts), out)
    return out.getvalue()


def data_is_valid(kind: str, data: bytes) -> bool:
    decoded = "utf-8-sig"
    readers = {
        ".jsonl": lambda d: [json.loads(x) for x in d.decode(decoded).split("\n") if x.strip()],
        ".json": lambda d: json.loads(d.decode(decoded)),
        ".csv": lambda d: d.decode(decoded),
        ".parquet": lambda d: struct.unpack("<4s", d[:4]) == (b"PAR1",) == (d[-4:],) or 1 / 0,
    }
    try:
        return parses(readers[kind], data)
    except (ZeroDivisionError, struct.error):
        return False


def data_case(world: World, rng: Random) -> Case:
    good = rng.random() < 0.2
    kind = rng.choice(datafiles.SUFFIXES) if rng.random() < 0.9 else ".jsonl"
    data = encoded_rows(data_rows(rng, good), kind, rng)
    if rng.random() < 0.3 and kind != ".parquet":
        data = b"\xef\xbb\xbf" + data
    if not good and rng.random() < 0.4:
        data = damaged(rng, data)
    path = world.file(f"train{kind}", data)
    config = world.config(dataset=str(path if rng.random() < 0.8 else path.parent))

    def run() -> None:
        rows = world.grpo.load_questions(config, "train")
        for row in rows:
            assert isinstance(row["answer"], str)
            assert row["answer"].strip()
            perfect = f"<reasoning>\n</reasoning>\n<answer>\n{row['answer']}\n</answer>"
            once = "answer>" not in row["answer"]
            assert not once or world.grpo.correctness_reward_func(
                [[{"content": perfect}]], answer=[row["answer"]]
            ) == [2.0]
        datafiles.fingerprint(rows)
        for row in rows[:3]:
            check_ids(world, config, row)

    return Case(run, data_is_valid(kind, data), good)


def check_ids(
    world: World, config: object, row: dict, loaded: object = None, read: bool = False
) -> None:
    """Encode as the trainer does; what it lets through is safe for MLX, which may read it."""
    loaded = loaded or world.loaded
    tokenizer = loaded.tokenizer
    prefix = tokenizer.encode(config.reasoning_prefix, add_special_tokens=False)
    stop = StopRule(tokenizer, tuple(config.stop_strings), config.reasoning_prefix)
    row = row | {"prompt": [{"role": "user", "content": str(row["question"])[:50_000]}]}
    for kept in encode_questions(tokenizer, loaded.vocabulary, config, [row], "training"):
        if read:  # bounds_checked of fuzz.py stands before MLX
            ask = sampler.Sampler(world.grpo.sample_batch, stop, RolloutSize(1))
            how = sampler.sampling_settings(config, len(prefix), 0.0, 2)
            ask(loaded.model, [kept], [world.grpo.random_key(0, 0, ())], how)
        assert all(type(i) is int and 0 <= i < VOCABULARY for i in kept["prompt_ids"])


# --- model folders --------------------------------------------------------------------------------


def model_folder(world: World) -> Path:
    return Path(shutil.copytree(world.model_dir, world.files / "model"))


SIZES = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "head_dim")
OTHERS = (
    *("model_type", "num_key_value_heads", "intermediate_size", "rms_norm_eps", "rope_theta"),
    *("tie_word_embeddings", "eos_token_id", "quantization", "text_config", "rope_parameters"),
    *("rope_scaling", "model_file", "quantization_config", "auto_map", "max_position_embeddings"),
)
KINDS = ("llama", "qwen2", "mixtral", "cache", "base", "../llama", "gemma3_text", "")


def change_config(rng: Random, config: dict) -> dict:
    for _ in range(rng.choice((1, 1, 2))):
        name = rng.choice((*SIZES, *SIZES, *OTHERS))
        if rng.random() < 0.15:
            config.pop(name, None)
        elif name == "model_type":
            config[name] = rng.choice(KINDS)
        elif name in SIZES and rng.random() < 0.5:
            config[name] = rng.choice((0, 1, 3, 16, 383, 385, 10**6, 10**12, -2))
        else:
            config[name] = value(rng)
    return config


def change_header(rng: Random, data: bytes) -> bytes:
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    name = rng.choice([n for n in header if n != "__metadata__"])
    entry = header[name]
    kind = rng.randrange(6)
    if kind == 0:
        entry["data_offsets"] = rng.choice(
            ([0, 4], [4, 0], [-8, 8], [0, 2**63], [0.5, 1], ["0", "4"], [0], None, [0, 10**400])
        )
    elif kind == 1:
        entry["shape"] = rng.choice(([], [0], [2**31], [-1, 4], [384, 16, 1], ["4"], None, [1e9]))
    elif kind == 2:
        entry["dtype"] = rng.choice(("F64", "BF16", "I8", "BOOL", "F4", "x", None, 3, [], "F16"))
    elif kind == 3:
        header[name + ".scales"] = entry
    elif kind == 4:
        header[rng.choice(("", "lm_head.weight", "model", name))] = value(rng)
    else:
        header.pop(name)
    made = json.dumps(header).encode()
    length = rng.choice((len(made),) * 6 + (0, len(made) + 1, 2**63, 2**32))
    return struct.pack("<Q", length) + made + data[8 + struct.unpack("<Q", data[:8])[0] :]


def header_parses(path: Path) -> bool:
    def read(data: bytes) -> object:
        if len(data) < 8 or (length := struct.unpack("<Q", data[:8])[0]) > len(data):
            raise ValueError
        return json.loads(data[8 : 8 + length])

    return parses(read, path.read_bytes())


def model_case(world: World, rng: Random) -> Case:
    folder = model_folder(world)
    weights, settings_file = folder / "model.safetensors", folder / "config.json"
    good, kind = False, rng.random()
    if kind < 0.15:
        good = True
    elif kind < 0.45:
        changed = change_config(rng, json.loads(settings_file.read_text()))
        settings_file.write_text(json.dumps(changed))
    elif kind < 0.55:
        settings_file.write_bytes(damaged(rng, settings_file.read_bytes()))
    elif kind < 0.8:
        weights.write_bytes(change_header(rng, weights.read_bytes()))
    elif kind < 0.9:
        weights.write_bytes(damaged(rng, weights.read_bytes()))
    else:
        index = {"weight_map": value(rng)} if rng.random() < 0.7 else value(rng)
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    config = world.config(model_name=str(folder))

    def run() -> None:
        loading.check_model(str(folder))
        loaded = world.grpo.load_model(config)
        check_ids(world, config, {"question": "How many is 3?"}, loaded, read=True)

    valid = parses(json.loads, settings_file.read_bytes()) and header_parses(weights)
    return Case(run, valid, good)


TEMPLATES = (
    *("{{ messages[0].content }}", "{{ messages }}", "{{ messages[9].content }}", "{{ x.y.z }}"),
    *("{% for m in messages %}", "{{ 1 / 0 }}", "{{ raise_exception('no') }}", "", "   ", "{{ '"),
    "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ messages[0].content }}<|im_start|><|extra|><|beyond|>",
    "{% set x = messages.append(messages[0]) %}{{ x }}",
    "{{ strftime_now('%Y') }}{{ messages | tojson }}",
)


def change_tokenizer(rng: Random, tokenizer: dict) -> dict:
    vocabulary = tokenizer["model"]["vocab"]
    kind = rng.randrange(8)
    name = rng.choice(list(vocabulary))
    if kind == 0:
        vocabulary[name] = rng.choice((-1, VOCABULARY, 10**6, 2**31, 2**32, "7", None, 1.5, 0))
    elif kind == 1:
        at = rng.choice((VOCABULARY, VOCABULARY + 5, 0, 10**7, -1))
        added = {"id": at, "content": rng.choice(("<|extra|>", "How", " ", "", "\0"))}
        flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        tokenizer["added_tokens"].append({**added, **flags, "special": rng.random() < 0.5})
    elif kind == 2:
        tokenizer["model"]["merges"] = rng.choice(([], None, ["a"], [["a", "b"]], ["a b c"], [3]))
    elif kind == 3:
        tokenizer[rng.choice(list(tokenizer))] = value(rng)
    elif kind == 4:
        tokenizer["model"][rng.choice(list(tokenizer["model"]))] = value(rng)
    elif kind == 5:
        vocabulary.pop(name)
    elif kind == 6:
        tokenizer["decoder"] = rng.choice((None, {"type": "Fuse"}, {"type": "WordPiece"}, 3))
    else:
        split = {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated"}
        tokenizer["pre_tokenizer"] = rng.choice((None, {**split, "invert": False}, split, 3))
    return tokenizer


TOKENIZER_KEYS = (
    *("tokenizer_class", "eos_token", "pad_token", "chat_template", "chat_template", "auto_map"),
    *("chat_template_type", "tool_parser_type", "added_tokens_decoder", "model_max_length"),
)
CLASSES = ("Qwen2Tokenizer", "LlamaTokenizer", "GPT2Tokenizer", "NoSuchTokenizer", "", 3, None)


def tokenizer_case(world: World, rng: Random) -> Case:
    folder = model_folder(world)
    main, extra = folder / "tokenizer.json", folder / "tokenizer_config.json"
    kind, good = rng.random(), False
    if kind < 0.1:
        good = True
    elif kind < 0.4:
        main.write_text(json.dumps(change_tokenizer(rng, json.loads(main.read_text()))))
    elif kind < 0.75:
        found = json.loads(extra.read_text())
        name = rng.choice(TOKENIZER_KEYS)
        if name == "chat_template":
            found[name] = rng.choice(TEMPLATES) if rng.random() < 0.9 else value(rng)
        else:
            found[name] = rng.choice(CLASSES) if name == "tokenizer_class" else value(rng)
        extra.write_text(json.dumps(found))
    elif kind < 0.82:
        (folder / "chat_template.jinja").write_text(rng.choice(TEMPLATES))
    else:
        broken = rng.choice((main, extra))
        broken.write_bytes(damaged(rng, broken.read_bytes()))
    options = rng.choice(({}, {}, {}, {"tokenize": False}, {"return_tensors": "np"}, {"x": 1}))
    config = world.config(model_name=str(folder), chat_template_kwargs=options if not good else {})

    def run() -> None:
        loaded = world.grpo.load_model(config)
        check_ids(world, config, {"question": "How many is <|extra|> 3?"}, loaded, read=True)

    valid = parses(json.loads, main.read_bytes()) and parses(json.loads, extra.read_bytes())
    return Case(run, valid, good)


def ids_case(world: World, rng: Random) -> Case:
    """Whatever ids a tokenizer gives, none beyond the embedding table gets into the model."""
    highest = VOCABULARY - 1
    wild = (-1, VOCABULARY, VOCABULARY + 7, 2**31, 2**40, -(2**31), 0, highest)
    good = rng.random() < 0.3
    count = rng.randrange(1, 12)
    ids = [rng.randrange(VOCABULARY) for _ in range(count)]
    where = rng.randrange(count)
    if not good:
        ids[where] = rng.choice(wild) if rng.random() < 0.8 else value(rng)
    prefix = [rng.randrange(VOCABULARY)] if good or rng.random() < 0.8 else [rng.choice(wild)]
    stub = SimpleNamespace(
        encode=lambda *_, **__: list(prefix),
        apply_chat_template=lambda *_, **__: ids,
        decode=lambda kept: "x" * len(kept),
        eos_token_ids={2},
    )
    loaded = dataclasses.replace(world.loaded, tokenizer=stub)
    config = world.config()
    row = {"question": "?", "prompt": []}
    valid = all(type(i) is int for i in ids)
    return Case(lambda: check_ids(world, config, row, loaded, read=True), valid, good)


# --- runs -----------------------------------------------------------------------------------------


def make_run(world: World) -> Path:
    """A checkpoint after two updates, as a run leaves it."""
    settings = {
        **world.settings,
        **{"dataset": str(world.data), "output_dir": str(world.folder / "run"), "seed": 3},
        **{"num_generations": 2, "max_new_tokens": 4, "gradient_accumulation_steps": 1},
        **{"use_compile": False, "quantize_for_rollouts": False, "eval_subset_size": 0},
    }
    world.trainer = world.grpo.build_trainer(world.grpo.MLXGRPOConfig(**settings), "fuzz")
    for _ in range(2):
        world.trainer.train_step([0])
    path = world.folder / "run" / "checkpoint-2"
    world.trainer.save_checkpoint(path)
    world.position = world.trainer.run.state.copied()
    return path


COUNTERS = ("step", "update_step", "rollout", "elapsed", "history", "pending", "config", "model")


def change_state(rng: Random, folder: Path) -> None:
    """Someone changed it, and knows about the manifest."""
    state = folder / folders.STATE
    found = json.loads(state.read_text())
    for _ in range(rng.choice((1, 1, 3))):
        name = rng.choice((*COUNTERS, *found))
        if rng.random() < 0.2:
            found.pop(name, None)
        else:
            found[name] = value(rng)
    state.write_text(json.dumps(found))


def change_manifest(rng: Random, folder: Path) -> None:
    manifest = folder / folders.MANIFEST
    found = json.loads(manifest.read_text())
    name = rng.choice((*found["files"], "../x", ""))
    entry = {"bytes": value(rng), "sha256": value(rng)}
    found["files"][name] = entry if rng.random() < 0.5 else value(rng)
    manifest.write_text(json.dumps(found))


def rot(rng: Random, folder: Path) -> None:
    """Bits flip, disks fill up, files vanish: what the manifest is for."""
    file = rng.choice(sorted(folder.iterdir()))
    before = file.read_bytes()
    if rng.random() < 0.2:
        file.unlink()
    elif rng.random() < 0.5 and len(before) > 9:
        at = rng.randrange(len(before))
        flipped = bytes([before[at] ^ (1 << rng.randrange(8))])
        file.write_bytes(before[:at] + flipped + before[at + 1 :])
    else:
        file.write_bytes(damaged(rng, before))


def checkpoint_case(world: World, rng: Random) -> Case:
    folder = Path(shutil.copytree(world.run_dir, world.files / "run" / "checkpoint-2"))
    kind = rng.random()
    good, sealed = kind < 0.15, 0.15 <= kind < 0.6
    if 0.15 <= kind < 0.5:
        change_state(rng, folder)
    elif 0.5 <= kind < 0.6:
        arrays = folder / rng.choice((folders.ARRAYS, "model.safetensors"))
        arrays.write_bytes(change_header(rng, arrays.read_bytes()))
    elif 0.6 <= kind < 0.75:
        change_manifest(rng, folder)
    elif not good:
        rot(rng, folder)
    if sealed:
        folders.seal(folder)
    files = [folder / f.name for f in world.run_dir.iterdir() if f.name != folders.MANIFEST]
    whole = all(
        f.is_file() and f.read_bytes() == (world.run_dir / f.name).read_bytes() for f in files
    )
    named = rng.choice(("auto", str(folder)))

    def run() -> None:
        chosen = folders.to_resume(folder.parent, named)
        assert whole or sealed, "a damaged checkpoint was taken for a whole one"
        check_resumed(world, chosen)

    manifest = folder / folders.MANIFEST
    valid = manifest.is_file() and parses(json.loads, manifest.read_bytes())
    return Case(run, valid, good)


def check_resumed(world: World, folder: Path) -> None:
    """A checkpoint that is taken leaves a trainer that can go on, and none of its parts changed."""
    trainer, kept = world.trainer, ("model", "tokenizer", "args", "run", "train_dataset")
    run, kept_of_run = trainer.run, ("log", "state")
    vars(run.state).update(vars(world.position.copied()))

    def parts() -> list[int]:
        found = [getattr(trainer, n) for n in kept] + [getattr(run, n) for n in kept_of_run]
        return [id(part) for part in found]

    before = parts()
    checkpoints.load(folder, trainer)
    assert before == parts()
    for name in ("step", "update_step", "rollout"):
        count = getattr(run.state, name)
        assert type(count) is int, name
        assert 0 <= count < 2**31, name
    assert math.isfinite(run.state.elapsed)
    rows = trainer.prompts_of_update(run.state.rollout)
    assert all(0 <= row < len(trainer.train_dataset) for row in rows)
    assert all(isinstance(r, dict) for r in [*run.log.history, *run.state.pending])
    question, key = trainer.train_dataset[0], world.grpo.random_key(0, 0, ())
    trainer.sampler(trainer.model, [question], [key], trainer.how(0.0, 1))


def log_line(rng: Random, update: int) -> bytes:
    if rng.random() < 0.75:
        record = {"update": update, "loss": rng.random(), "note": plain_text(rng)}
        return json.dumps(record, ensure_ascii=rng.random() < 0.5).encode()
    if rng.random() < 0.5:
        return json.dumps(value(rng)).encode()
    return damaged(rng, json.dumps({"update": value(rng)}).encode())


def log_case(world: World, rng: Random) -> Case:
    """The log of a run that goes on: whole lines that come back, once each, and nothing else."""
    lines = [log_line(rng, n) for n in range(1, rng.randrange(2, 12))]
    data = b"\n".join(lines) + (b"\n" if rng.random() < 0.7 else b"")
    good = rng.random() < 0.2
    path = world.file("training_log.jsonl", data)
    size = rng.randrange(len(data) + 1) if not good else len(data)

    def run() -> None:
        checkpoints.rewind_log(path, size)
        assert path.read_bytes() == data[:size]
        with contextlib.suppress(UserError):
            records, end = trackers.read_log(path)
            assert all(isinstance(record["update"], int) for record in records)
            assert trackers.read_log(path, end) == (records, end)
        tracker_file(world, data)

    return Case(run, all(parses(json.loads, line) for line in lines), good)


def tracker_file(world: World, data: bytes) -> None:
    from utils.run.trackers import CSVTracker

    world.file("out/metrics.csv", data)
    tracker = CSVTracker(world.files / "out")
    tracker.log({"update": 1, "loss": 0.5})
    tracker.log({"update": 2, "loss": 0.5, "new": None, "list": [1]})


# --- what models, reward functions and servers answer ---------------------------------------------


def output(rng: Random) -> str:
    """A completion: shaped as asked, or tags and text in any order, up to 100,000 characters."""
    if rng.random() < 0.35:
        inside = (plain_text(rng), rng.choice(("7", "1,234", "-.5", text(rng, 3))))
        return "<reasoning>\n{}\n</reasoning>\n<answer>\n{}\n</answer>".format(*inside)
    made = text(rng, 12)
    if rng.random() < 0.06:
        unit = rng.choice((made, "<answer>", "</answer>", "<reasoning>", "<answer", "7", " "))
        length = rng.choice((10_000, 100_000))
        return ((unit or "\n") * (length // max(len(unit), 1) + 1))[:length]
    return made


# name -> lowest and highest value; of functions that need no server.
BOUNDS = {
    **{"correctness": (0, 2), "int": (0, 0.5), "strict_format": (0, 0.5)},
    **{"soft_format": (0, 0.5), "xmlcount": (0, 0.5), "cosine": (-1, 1)},
    **{"length": (-1, 0), "soft_overlong": (-1, 0), "repetition": (-1, 0), "math": (0, 1)},
    "last_number": (0, 1),
}


def output_case(world: World, rng: Random) -> Case:
    texts = [output(rng) for _ in range(rng.randrange(1, 4))]
    answers = [rng.choice(("7", "1,234", plain_text(rng), text(rng, 2) or "x")) for _ in texts]
    ids = [[rng.randrange(VOCABULARY) for _ in range(rng.randrange(20))] for _ in texts]
    slow = rng.random() >= 0.02  # math-verify takes 50 ms and more for a text
    functions = {
        name: by_name.with_parameters(name, world.grpo.REWARDS[name], world.config(), True)
        for name in BOUNDS
        if name != "math" or not slow
    }
    columns = {
        "completions": [[{"role": "assistant", "content": t}] for t in texts],
        **{"completion_ids": ids, "answer": answers, "question": answers},
    }

    def run() -> None:
        values = RewardCalls()(functions, columns)
        for name, got in values.items():
            low, high = BOUNDS[name]
            known = got[~np.isnan(got)]
            numbers = sum(read_number(answer) is not None for answer in answers)
            applies = {"last_number": numbers}.get(name, len(texts))
            assert name == "math" or known.size == applies, name
            assert np.all((low - 1e-9 <= known) & (known <= high + 1e-9)), (name, known)
        for t in texts:
            found = world.grpo.extract_xml_answer(t)
            assert found == found.strip()
            assert found in t
            world.grpo.extract_hash_answer(t)
            number = as_number(t[:20_000])
            assert number is None or number.is_finite()
            assert world.grpo.same_answer(t, t)
        stop = world.grpo.StopRule(world.loaded.tokenizer, ["</answer>"])
        assert isinstance(stop.text(ids[0]), str)

    return Case(run, any("<" in t for t in texts))


class Odd:
    """A value of a reward function that is no number, whatever it says."""

    ndim = 0

    def __init__(self, answer: object) -> None:
        self.answer = answer

    def __float__(self) -> float:
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer  # type: ignore[return-value]


def reward_value(rng: Random) -> object:
    return rng.choice(
        (
            *(0.0, 1, True, None, np.float32(0.5), np.array(1.0), np.bool_(True)),
            *(math.nan, math.inf, -math.inf, 10**400, "1.0", b"1", [], {}, 1j, np.array([1.0])),
            *(Odd(0.5), Odd(math.nan), Odd("x"), Odd(ValueError("no")), np.float64("nan")),
        )
    )


def reward_case(world: World, rng: Random) -> Case:
    """Whatever a function returns: one finite number or None a completion, or the run stops."""
    count = rng.randrange(1, 5)
    good = rng.random() < 0.3
    easy = (0.0, 1, True, None, -2.5, np.float32(0.5))
    tame = [good or rng.random() < 0.6 for _ in range(count)]
    values = [rng.choice(easy) if is_tame else reward_value(rng) for is_tame in tame]
    returned: object = values
    if not good and rng.random() < 0.3:
        numbers = [v if isinstance(v, int | float) else 0.0 for v in values]
        shapes = (values[:-1], tuple(values), dict.fromkeys(range(count)), "1" * count)
        others = (iter(values), None, np.array(numbers, dtype=object), values * 2)
        returned = rng.choice(shapes + others)

    def function(completions: list, **_: object) -> object:
        return returned

    columns = {"completions": [[{"role": "assistant", "content": text(rng)}] for _ in range(count)]}

    def run() -> None:
        got = RewardCalls()({"odd": function}, columns, TrainerState())["odd"]
        assert got.shape == (count,)
        for number, given in zip(got, list(returned), strict=True):  # type: ignore[call-overload]
            assert math.isfinite(number) or (given is None and math.isnan(number)), given

    return Case(run, isinstance(returned, list), good)


def server_case(world: World, rng: Random) -> Case:
    """What a reward server or a judge answers, without the network between."""
    import asyncio

    from utils.rewards import servers

    body = rng.choice(
        (
            *({"rewards": [value(rng)]}, {"rewards": value(rng)}, value(rng), {"rewards": [0.5]}),
            {"choices": [{"message": {"content": f"Score: {value(rng, 0)}"}}]},
            {"choices": value(rng)},
            {"choices": [{"message": {"content": output(rng)}}]},
        )
    )
    url = "http://user:hunter2@localhost/?key=abcdef"
    asked = rng.choice(("judge", "server"))

    async def post(*_: object, **__: object) -> object:
        return body, "http://localhost"

    if asked == "judge":
        service: object = servers.Judge(9.0, url=url)
    else:
        service = servers.RemoteReward([url], 9.0)
    service.endpoint.post = post  # type: ignore[attr-defined]
    column = {"answer": ["7"], "completions": [[{"content": "7"}]]}

    def run() -> None:
        if asked == "judge":
            log = {"log_metric": lambda *_: None, "log_extra": lambda *_: None}
            got = asyncio.run(service(**column, question=["?"], **log))  # type: ignore[operator]
        else:
            got = asyncio.run(service(**column, prompt_texts=["?"]))  # type: ignore[operator]
        bound = 1 if asked == "judge" else math.inf
        assert all(v is None or 0 <= v <= bound or asked == "server" for v in got)

    return Case(run, isinstance(body, dict))


# --- inference and evaluation ---------------------------------------------------------------------


def inference_case(world: World, rng: Random) -> Case:
    kind, good = rng.randrange(4), False
    data = json.dumps(value(rng)).encode()
    if kind == 0:
        names = ("prompt", "question", "messages", "x")
        rows = [{rng.choice(names): cell(rng, rng.random() < 0.5)} for _ in range(3)]
        suffix = rng.choice((".jsonl", ".json", ".txt"))
        data = encoded_rows(rows, suffix if suffix != ".txt" else ".jsonl", rng)
        if rng.random() < 0.4:
            data = damaged(rng, data)
        path = world.file(f"prompts{suffix}", data)
        run = lambda: check_prompts(inference.read_prompts(path, rng.random() < 0.5))  # noqa: E731
    elif kind == 1:
        good = rng.random() < 0.3
        found = reading.recorded(world.config())
        if not good:
            for _ in range(3):
                name, item = setting(world, rng)
                found[name] = item
        whole = {"config": found if good or rng.random() < 0.8 else value(rng)}
        data = json.dumps(whole if good or rng.random() < 0.9 else value(rng)).encode()
        world.file("run/final/trainer_state.json", data)
        folder = str(world.files / "run" / "final")
        run = lambda: inference.trainer_settings(None, [], [folder])  # noqa: E731
    elif kind == 2:
        data = damaged(rng, data) if rng.random() < 0.3 else data
        path = world.file("model/adapter_config.json", data)
        run = lambda: inference.locate(str(path.parent))  # noqa: E731
    else:
        stops = json.dumps({"stop_strings": value(rng)}).encode()
        path = world.file("model/generation_config.json", stops)
        world.file("model/config.json", b"{}")
        base, loaded = str(path.parent), SimpleNamespace(folder=path.parent)
        run = lambda: check_texts(inference.stop_strings_of(base, loaded, {}))  # noqa: E731
        data = stops
    lines = [line for line in data.split(b"\n") if line.strip()]
    return Case(run, all(parses(json.loads, line) for line in lines), good)


def check_prompts(rows: list[dict]) -> None:
    for row in rows:
        assert row.get("messages") or (row.get("prompt") or row["question"]).strip()
        json.dumps(row, ensure_ascii=False, default=str).encode()


def check_texts(texts: list[str]) -> None:
    assert all(isinstance(t, str) and t for t in texts)


SURFACES = [
    Surface("TOML files", 0.14, 2000, toml_case),
    Surface("overrides", 0.14, 2000, override_case),
    Surface("data files", 0.14, 2000, data_case),
    Surface("model folders", 0.05, 800, model_case),
    Surface("tokenizers", 0.03, 500, tokenizer_case),
    Surface("token ids", 0.07, 1000, ids_case),
    Surface("checkpoints", 0.05, 800, checkpoint_case),
    Surface("logs", 0.06, 1000, log_case),
    Surface("model outputs", 0.12, 2000, output_case),
    Surface("reward values", 0.08, 1000, reward_case),
    Surface("reward servers", 0.05, 800, server_case),
    Surface("inference files", 0.07, 1000, inference_case),
]
