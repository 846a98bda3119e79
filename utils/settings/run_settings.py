"""Settings that change only on what, where, how fast or in how much memory a run goes.

Those of the algorithm are in mlx-grpo.py, whose MLXGRPOConfig extends this class.
"""

import dataclasses
import os
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, Self

from ..base.errors import UserError

SYSTEM_PROMPT = """
Respond in the following format:
<reasoning>
...
</reasoning>
<answer>
...
</answer>
"""


@dataclass
class RunSettings:
    """Settings of the run: data, adapters, reward calls, evaluation, logs, checkpoints, memory."""

    # What is trained, asked and rewarded

    model_name: str = "Qwen/Qwen2.5-1.5B-Instruct"
    """Model to train: a folder, or a Hugging Face hub name."""
    dataset: str = "openai/gsm8k"
    """Hub name, or a .jsonl/.json/.csv/.parquet file, or a folder of such files by split (also as
    the hub and datasets.save_to_disk lay it out)."""
    train_type: str = "auto"
    """full, lora, dora; auto is full, or lora when the model is quantized."""

    system_prompt: str = SYSTEM_PROMPT
    """System message; empty for none."""
    reasoning_prefix: str = "<reasoning>\n"
    """Text every completion starts with; given, not sampled."""
    max_prompt_length: int = 512
    """Longer prompts (tokens) are left out and counted, never cut."""

    reward_funcs: list[str] = field(
        default_factory=lambda: ["correctness", "xmlcount", "soft_format", "int"]
    )
    """Built-in names (correctness, int, strict_format, soft_format, xmlcount, last_number, math,
    cosine, length, soft_overlong, repetition, environment, remote_rm, reward_model, judge), or
    module:function, or file.py:function with TRL's interface. Reward files are code: they run with
    your rights."""
    reward_weights: list[float] = field(default_factory=list)
    """One factor per reward function; empty: all 1."""

    # The run

    output_dir: str = "outputs/Qwen-1.5B-MLX-GRPO"
    """Where logs, checkpoints and the final model go."""
    run_name: str = "Qwen-1.5B-MLX-GRPO-gsm8k"
    """Name of the run in logs and trackers."""
    resume: str = ""
    """auto continues output_dir's newest whole checkpoint (or starts, which is said); or a
    checkpoint's folder, or its name there."""
    overwrite: bool = False
    """Replace a run that output_dir already holds. In a settings file, only one that was made of
    the same data and model; typed with --set, any."""
    max_hours: float = 0.0
    """Stop cleanly after so many hours; 0 never."""
    rank_timeout: float = 60.0
    """Of several machines, one that nothing is heard of for so many seconds is lost, and the others
    stop."""

    dataset_config: str = "main"
    """Configuration (subset) of a hub data set."""
    train_split: str = "train"
    """Split to train on."""
    test_split: str = "test"
    """Split to evaluate on; a single local file keeps its last tenth for this."""
    question_column: str = "question"
    """Column with the question, or with messages that end in it."""
    answer_column: str = "answer"
    """Column with the answer, or a.b in a table; what follows `####` counts where that occurs."""
    max_train_samples: int = 0
    """Train on the first so many questions; 0 all."""
    dataset_mix: list[dict[str, Any]] = field(default_factory=list)
    """Train on several data sets (evaluation stays on `dataset`): tables with dataset, and if need
    be weight (its share of the prompts), samples, dataset_config, train_split, question_column,
    answer_column. Rows say where they are from in the column data_source."""
    shuffle: bool = True
    """Ask the questions in a new random order every epoch; false: in the order of the data."""
    curriculum: str = "none"
    """weights (ask a question in proportion to curriculum_column), easy_to_hard (by it, the
    smallest first, in every epoch) or none."""
    curriculum_column: str = "difficulty"
    """Column with each question's sampling weight or difficulty."""
    chat_template: str = ""
    """Empty: the tokenizer's own. A Jinja file, or "plain" for models without a template."""
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)
    """Passed on to the chat template, such as {enable_thinking = false}."""

    environment: str = ""
    """What answers the model, in turns (docs/environments.md): file.py:Class or module:Class, made
    once for each completion, in processes of their own. It is code: it runs with your rights."""
    tools: list[str] = field(default_factory=list)
    """What the model may call, in turns: calculator, file.py:function or module:function, with a
    docstring and type hints as TRL's tools; also beside an environment of TRL's, whose methods are
    tools. Calls are found by mlx-lm's parser for the model. They are code: they run with your
    rights."""
    max_turns: int = 8
    """Most turns of the model in a conversation."""
    max_tool_tokens: int = 256
    """Longer answers of an environment are cut to so many tokens."""
    environment_timeout: float = 60.0
    """Seconds that an environment may take for an answer; then its process is ended."""
    on_environment_error: str = "mask"
    """When an environment fails: mask (the completion is left out, and counted) or stop the run."""

    lora_rank: int = 16
    """Rank of the adapters."""
    lora_scale: float = 2.0
    """Factor on the adapters' output (alpha / rank in other libraries)."""
    lora_layers: int = -1
    """Adapt the last so many layers; -1 all."""
    lora_keys: list[str] = field(default_factory=list)
    """Names inside a layer to adapt, such as self_attn.q_proj; empty: every linear layer."""
    lora_dropout: float = 0.0
    """Dropout on the adapters' input."""
    lora_plus_ratio: float = 1.0
    """The second matrix of an adapter, which starts at 0, learns at so many times the rate (LoRA+,
    arXiv:2402.12354, has 16); 1: at the same rate."""
    adapter_path: str = ""
    """Adapters to start from (a checkpoint folder, or one that mlx_lm.lora wrote)."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model. Only for models you trust."""

    reward_kwargs: dict[str, Any] = field(default_factory=dict)
    """Parameters of reward functions, by their names in reward_funcs, such as
    {soft_overlong = {cache = 100}}; docs/rewards.md has those of the built-in ones."""
    reward_workers: int = 0
    """Processes for own reward functions: each call gets one prompt's completions, while others are
    computed or sampled; 0: called here, with all completions of an update."""
    reward_timeout: float = 180.0
    """Seconds for a call of a reward function of your own (with all completions of an update, or in
    a worker with one prompt's), or one request to a server. A call that takes longer fails the run.
    Python code, sleep and waiting are interrupted, even in code that catches everything; C code
    that does not return can only be ended in a worker. Loading functions has no limit."""
    remote_rm_url: list[str] = field(default_factory=list)
    """Reward servers that the reward remote_rm asks (OpenRLHF's protocol). $NAME in a URL is an
    environment variable."""
    reward_model: str = ""
    """Model that the reward of this name scores with (a folder or a hub name): a classifier's head,
    or how probable a Yes is."""

    eval_steps: int = 50
    """Evaluate on the test split every so many batches; 0 only before and after training."""
    eval_samples: int = 200
    """Test questions per evaluation; 0 turns evaluation on the test split off."""
    eval_every_updates: int = 25
    """Evaluate on a subset of the training questions every so many updates; 0 never."""
    eval_subset_size: int = 200
    """Training questions in that subset; 0 none."""
    eval_max_new_tokens: int = 128
    """Most tokens per evaluated completion."""
    eval_metric: str = "em"
    """em (exact match: numbers as numbers, else to the letter; see docs/rewards.md), or a reward
    function whose mean is reported."""

    logging_steps: int = 1
    """One training record every so many batches."""
    log_jsonl: bool = True
    """Write training_log.jsonl."""
    log_completions: int = 0
    """Show so many sampled completions with their rewards at every training record."""
    quiet: bool = False
    """Show only warnings, errors and how the run ended, as --quiet does."""
    keep_completions: str = "all"
    """Keep every completion, with its tokens and rewards, in output_dir/completions: all, none, or
    sample:N (those of N prompts of each update and evaluation)."""
    max_completions_gb: float = 0.5
    """Keep so many GB of them: the oldest updates lose their tokens first; 0 any size."""
    report_to: list[str] = field(default_factory=list)
    """Trackers beside the log: csv, tensorboard (shown by `uvx tensorboard --logdir FOLDER`),
    wandb, trackio (the last three are optional extras). One that fails says so, and stops no
    run."""
    plot_every: int = 10
    """Show trackers distributions of rewards and lengths, and completions as a table, every so many
    updates; 0 never."""
    wandb_project: str = ""
    """Project at W&B; empty: the variable WANDB_PROJECT, then mlx-grpo."""
    wandb_entity: str = ""
    """User or team at W&B; empty: the variable WANDB_ENTITY, then W&B's own default."""
    watchdog_window: int = 20
    """Warn when learning has gone wrong over so many updates, at most once in as many; 0 never."""
    stop_without_reward: bool = False
    """Stop after five updates in a row in which no reward function gave any completion a value."""
    closing_note: str = ""
    """Text to show when the run ends."""
    report: bool = True
    """Write report.html, a page that shows the run, when it ends (utils/report.py at any time)."""

    save_steps: int = 100
    """Checkpoint every so many batches; 0 only at the end."""
    save_total_limit: int = 3
    """Keep the newest so many checkpoints; 0 all."""
    max_ckpt_gb: float = 0.0
    """Keep the newest checkpoints that fit into so many GB together, at least one; 0 any size."""
    save_best: bool = False
    """Keep the model of the best evaluation on the test split, if it beats the first, in best/."""
    early_stopping_patience: int = 0
    """Stop after so many evaluations on the test split in a row without a new best; 0 never."""

    dtype: str = "auto"
    """auto (float32 on the CPU, the model's own on a GPU), float32, bfloat16 or float16."""
    master_weights: bool = True
    """Keep the bits that bfloat16 weights lack of float32 ones (2 bytes each); false: round the
    weights at random instead (0 bytes)."""
    moment_bits: int = 32
    """AdamW's moments in 32 bits, or in 8 with a scale per 256."""
    use_compile: bool = True
    """Compile the gradient step (slow first step per shape; pays on GPUs, not on CPUs)."""
    gradient_checkpointing: bool = False
    """Recompute each layer in the backward pass: less memory, a third more time."""
    rollout_batch_size: int = 0
    """Completions sampled at once; 0: as many as memory allows."""
    micro_batch_tokens: int = 0
    """Tokens (with padding) per forward and backward pass; 0: as many as memory allows."""
    wired_limit_gb: float = 0.0
    """Metal: memory kept resident; 0 is MLX's recommendation."""
    cache_limit_gb: float = 0.0
    """Freed memory that MLX keeps for reuse; 0 is MLX's default."""
    memory_limit_gb: float = 0.0
    """Memory to plan for and stay within where that is possible; 0: the device's."""

    explicit = frozenset[str]()  # what was set on purpose
    inherited = frozenset[str]()  # what of that a file says, and not this command
    from_preset = False  # whether that file is one of this project's
    started_on = ""  # date and time of the run's start, which some chat templates tell the model
    tool_schemas = tuple[dict, ...]()  # that prompts tell the model of, once tools are loaded
    started_in = "."  # the current folder when the settings were made: others' code may leave it

    def __new__(cls, **given: object) -> Self:
        config = super().__new__(cls)
        own = dataclasses.fields(cls)
        set_ = {
            name
            for name, value in given.items()
            if not isinstance(value, BroughtFloat | BroughtText)
        }
        if len(given) == len(own):  # `dataclasses.replace` gives everything
            set_ -= {f.name for f in own if given[f.name] == default_of(f)}
        config.__dict__["explicit"] = frozenset(set_)
        config.__dict__["started_in"] = current_folder()
        config.__dict__["started_on"] = datetime.now().isoformat()
        return config

    @property
    def start(self) -> str:
        """What paths count from; empty while that is the current folder, so that they are shown as
        they were written."""
        return "" if current_folder() == self.started_in else self.started_in

    @property
    def has_turns(self) -> bool:
        """Whether completions are conversations."""
        return bool(self.environment or self.tools)

    def located(self, path: str | Path) -> Path:
        """Where a path that a setting names is, whatever folder is the current one by now."""
        return Path(self.started_in, os.path.expanduser(path))

    def __post_init__(self) -> None:
        self.__dict__["complete"] = True

    def __setattr__(self, name: str, value: object) -> None:
        """From outside, to assign is to set on purpose."""
        super().__setattr__(name, value)
        if "complete" in self.__dict__ and name != "explicit":
            self.__dict__["explicit"] |= {name}
            self.follow(name)

    def follow(self, name: str) -> None:
        """A setting has changed: others that go by it may."""

    def bring(self, name: str, value: float | str) -> None:
        """Give a setting the value that another one brings with it, unless it was set."""
        if name not in self.explicit or getattr(self, name) == "auto":
            kind = BroughtText if isinstance(value, str) else BroughtFloat
            self.__dict__[name] = kind(value)


def current_folder() -> str:
    try:
        return os.getcwd()
    except OSError:
        raise UserError("the current folder was deleted: go to another one") from None


class BroughtFloat(float):
    """A number that another setting brought with it: nobody set it."""


class BroughtText(str):
    """The same for a text."""


def default_of(field: dataclasses.Field) -> object:
    factory = field.default_factory
    return field.default if factory is dataclasses.MISSING else factory()


def differs(settings: RunSettings, name: str) -> bool:
    """Whether a setting has another value than the default."""
    field = next(f for f in dataclasses.fields(settings) if f.name == name)
    return bool(getattr(settings, name) != default_of(field))


class Loss(Protocol):
    """What settings have to know of an objective: its row of LOSSES in mlx-grpo.py."""

    @property
    def clip_eps(self) -> float | None:
        """None: it has no lower clip."""

    @property
    def clip_eps_high(self) -> float | None:
        """None: it has no upper clip."""

    @property
    def dual_clip(self) -> bool:
        """Whether `delta` acts."""

    @property
    def per_token(self) -> str:
        """Why a ratio per sequence has no meaning; empty where it has one."""

    @property
    def per_sequence(self) -> bool:
        """Whether all tokens of a sequence share one gradient, whatever the ratio is of."""


class Settings(RunSettings):
    """All settings, as rooms see them: those of the run, and what they read of the algorithm's.

    MLXGRPOConfig in mlx-grpo.py defines those, with defaults and meanings; a type checker holds
    that the types agree.
    """

    if TYPE_CHECKING:
        seed: int
        num_generations: int
        batch_size: int
        gradient_accumulation_steps: int
        num_epochs: int
        max_updates: int
        num_iterations: int
        sync_every_updates: int
        quantize_for_rollouts: bool
        temperature: float
        top_k: int
        top_p: float
        min_p: float
        max_new_tokens: int
        max_completion_length: int
        stop_strings: list[str]
        loss_type: str
        importance_sampling_level: str
        clip_eps: float
        clip_eps_high: float
        delta: float
        entropy_coeff: float
        top_entropy_quantile: float
        advantage_estimator: str
        advantage_eps: float
        advantages_norm: bool
        reward_running_norm: bool
        reward_running_norm_minus_mean: bool
        reward_clip: float
        dynamic_sampling: int
        kl_coeff: float
        kl_estimator: str
        kl_placement: str
        kl_bias_correction: bool
        kl_target: float
        ref_sync_updates: int
        importance_cap: float
        importance_floor: float
        learning_rate: float
        lora_learning_rate: float
        adam_beta1: float
        adam_beta2: float
        weight_decay: float

        @property
        def loss(self) -> Loss: ...
