"""Settings that are out of range, contradict each other, or would do nothing are refused."""

import json
import math

import pytest
from conftest import ROOT
from helpers import assert_names

from utils.base.errors import UserError
from utils.model import loading
from utils.settings import idle, reading

SETTINGS = [
    # out of range
    ("num_generations=1", "num_generations = 1 must be at least 2"),
    ("temperature=0", "temperature = 0.0 must be at least 0.001 and finite"),
    ("temperature=1e-38", "temperature = 1e-38 must be at least 0.001 and finite"),
    ("learning_rate=nan", "learning_rate = nan must be above 0 and finite"),
    ("learning_rate=-1e-6", "learning_rate = -1e-06 must be above 0"),
    ("kl_coeff=inf", "kl_coeff = inf must be at least 0 and finite"),
    ("warmup_ratio=10", "warmup_ratio = 10.0 must be between 0 and 1"),
    ("top_p=0", "top_p = 0.0 must be above 0, at most 1"),
    ("adam_beta2=1", "adam_beta2 = 1.0 must be at least 0, below 1"),
    ("lora_layers=0", "lora_layers = 0 must be -1 (all) or at least 1"),
    ("clip_eps=1.5", "clip_eps = 1.5 must be above 0, below 1"),
    ("seed=18446744073709551616", "seed = 18446744073709551616 must be at least 0, below 2 ** 64"),
    ("max_train_samples=-1", "max_train_samples = -1 must be at least 0"),
    ("output_dir=", "output_dir = '' must be text that is not empty"),
    ("loss_type=ppo", "loss_type = 'ppo', allowed: grpo, bnpo, dapo, dr_grpo, gspo, gmpo"),
    ("train_type=qlora", "train_type = 'qlora', allowed: auto, full, lora, dora"),
    ("temperature=true", "temperature = True must be a number"),
    # contradictions
    ("reward_funcs=[]", "reward_funcs is empty: nothing would be learned"),
    ("reward_funcs=int,int", "reward_funcs names a function twice"),
    ("reward_weights=1,2", "reward_weights has 2 values for 4 reward_funcs: give each"),
    ("reward_weights=[nan, 1, 1, 1]", "reward_weights = [nan, 1, 1, 1] must hold finite numbers"),
    ("reward_weights=1,1,-inf,1", "reward_weights = [1.0, 1.0, -inf, 1.0] must hold finite"),
    ("reward_weights=[1e999, 1]", "must hold finite numbers: neither nan nor inf"),
    (
        "reward_kwargs={int = {list = [{deep = nan}]}}",
        "reward_kwargs = {'int': {'list': [{'deep': nan}]}} must hold finite numbers",
    ),
    ("chat_template_kwargs={a = -inf}", "chat_template_kwargs = {'a': -inf} must hold finite"),
    ("reward_weights=1", "reward_weights has 1 value for 4 reward_funcs"),
    ("eval_metric=accuracy", "eval_metric = 'accuracy' is neither em nor one of reward_funcs"),
    ("stop_strings=['']", "stop_strings holds an empty string"),
    ("stop_strings=<reasoning>", "stop string '<reasoning>' is part of reasoning_prefix"),
    (
        "report_to=wandbb",
        "report_to: 'wandbb' is unknown, allowed are csv, tensorboard, wandb",
    ),
    ("chat_template=no.jinja", "chat_template = 'no.jinja' is neither a file nor plain"),
    ("resume=checkpoint-7", "resume = 'checkpoint-7' is not a checkpoint folder"),
]


@pytest.mark.parametrize(
    ("override", "complaint"), SETTINGS, ids=[case[0][:40] for case in SETTINGS]
)
def test_a_setting_out_of_range_or_against_another(refused, override, complaint):
    assert_names(refused("--set", override), complaint)


OBJECTIVES = [
    (
        "advantage_estimator=gspo loss_type=dapo",
        "advantage_estimator = 'gspo' stands for loss_type = 'gspo' with group_norm, but",
    ),
    ("loss_type=sapo delta=3", "delta = 3.0 bounds PPO's clipped ratio, which loss_type = sapo"),
    ("delta=1.1", "delta = 1.1 must be above 1 + clip_eps_high = 1.2"),
    ("delta=1.2", "delta = 1.2 must be above 1 + clip_eps_high = 1.2"),
    ("loss_type=dapo delta=1.25", "delta = 1.25 must be above 1 + clip_eps_high = 1.28"),
    (
        "loss_type=gmpo importance_sampling_level=sequence",
        "has no meaning for loss_type = gmpo, which averages token ratios itself",
    ),
    (
        "loss_type=cpgd importance_sampling_level=sequence",
        "has no meaning for loss_type = cpgd, which has a gradient per token",
    ),
    ("loss_type=gspo top_entropy_quantile=0.2", "the gradient of a ratio per sequence goes to all"),
    ("loss_type=gmpo top_entropy_quantile=0.2", "the gradient of a ratio per sequence goes to all"),
    ("kl_coeff=0.1 kl_estimator=k1", "kl_estimator = k1 in the loss has a gradient of mean zero"),
    (
        "kl_coeff=0.1 kl_placement=reward kl_bias_correction=true",
        "kl_bias_correction is about a gradient, which a penalty in the reward has not",
    ),
    ("importance_floor=3", "importance_floor = 3.0 is above importance_cap = 2.0"),
    ("reward_running_norm_minus_mean=true", "needs reward_running_norm"),
    (
        "early_stopping_patience=2 eval_samples=5 eval_steps=0",
        "early_stopping_patience counts evaluations on the test split, which need eval_samples",
    ),
    (
        "reward_running_norm=true advantage_estimator=rloo reward_running_norm_minus_mean=true",
        "reward_running_norm_minus_mean needs reward_clip",
    ),
    (
        "reward_running_norm=true",
        "advantage_estimator = group_norm divides by a standard deviation itself",
    ),
    (
        "advantages_norm=true advantage_estimator=reinforce",
        "advantage_estimator = reinforce does that already",
    ),
    ("advantage_estimator=gdpo reward_clip=1", "reward_clip acts on the total reward"),
    (
        "advantage_estimator=gdpo kl_coeff=0.1 kl_placement=reward",
        "kl_placement = reward acts on the total reward",
    ),
    ("advantage_estimator=gdpo reward_funcs=int", "gdpo needs at least two reward_funcs"),
    ("kl_estimator=k2 kl_target=0.1", "kl_estimator, kl_target has no effect with kl_coeff = 0"),
    ("kl_coeff=0.1 kl_horizon=5", "kl_horizon has no effect with kl_target = 0"),
    ("kl_coeff=0.1 ref_sync_alpha=0.5", "ref_sync_alpha has no effect with ref_sync_updates = 0"),
    ("loss_type=cispo clip_eps=0.1", "clip_eps has no effect with a loss_type without a lower"),
    (
        "clip_eps=0.1 delta=3",
        "clip_eps, delta has no effect with num_iterations = 1, where the ratio",
    ),
    ("loss_type=gspo clip_eps_high=0.3", "clip_eps_high has no effect with num_iterations = 1"),
    ("loss_type=sapo clip_eps_high=1", "clip_eps_high has no effect with a loss_type without a"),
    (
        "advantage_estimator=rloo advantage_eps=1e-6",
        "advantage_eps has no effect with an advantage_estimator without a group's standard",
    ),
    (
        "kl_coeff=0.1 ref_sync_updates=4 train_type=full",
        "rounded away in the 4-bit reference of full fine-tuning; set quantize_for_rollouts",
    ),
]


@pytest.mark.parametrize(("overrides", "complaint"), OBJECTIVES, ids=[o[0] for o in OBJECTIVES])
def test_an_objective_that_makes_no_sense(refused, overrides, complaint):
    words = [word for override in overrides.split() for word in ("--set", override)]
    assert_names(refused(*words, quantize_for_rollouts=True), complaint)


def test_no_setting_takes_a_number_that_is_none(grpo):
    """Whatever way it comes: all that are numbers, and all that hold some."""
    defaults, refused_ones = grpo.MLXGRPOConfig(), 0
    for name, kind in reading.types_of(grpo.MLXGRPOConfig).items():
        value = getattr(defaults, name)
        for none in (math.nan, math.inf, -math.inf):
            if kind is float:
                given = none
            elif kind is int or not isinstance(value, list | dict):
                continue
            else:
                given = [none] if isinstance(value, list) else {"deep": [{"down": none}]}
            with pytest.raises(UserError, match=name):
                grpo.MLXGRPOConfig(**{name: given})
            refused_ones += 1
    assert refused_ones >= 3 * 30


IDLE = "learning_rate has no effect on adapters; lora_learning_rate = 2e-5 counts"


def own_file(tmp_path, **values):
    lines = (f"{name} = {json.dumps(value)}" for name, value in values.items())
    (tmp_path / "own.toml").write_text("\n".join(lines))
    return str(tmp_path / "own.toml")


@pytest.mark.parametrize("train_type", ["lora", "dora"])
def test_a_learning_rate_in_a_file_of_ones_own_needs_one_for_adapters(grpo, tmp_path, train_type):
    path = own_file(tmp_path, learning_rate=1e-5, train_type=train_type)
    with pytest.raises(UserError, match=r"learning_rate = 1e-5 has no effect on adapters.*write "):
        grpo.read_config(path, [])
    assert grpo.read_config(path, ["lora_learning_rate=1e-4"]).lora_learning_rate == 1e-4
    config = grpo.read_config(path, ["learning_rate=3e-6"])  # typed: the run goes on and says so
    assert idle.learning_rate(config, train_type) == IDLE
    both = own_file(tmp_path, learning_rate=1e-5, lora_learning_rate=1e-4, train_type=train_type)
    assert idle.learning_rate(grpo.read_config(both, []), train_type) == ""
    full = own_file(tmp_path, learning_rate=1e-5, train_type="full")
    assert idle.learning_rate(grpo.read_config(full, []), "full") == ""


def test_a_quantized_model_stops_it_as_well(grpo, tmp_path):
    config = grpo.read_config(own_file(tmp_path, learning_rate=1e-5), [])
    assert loading.resolve_train_type(config, quantized=False) == "full"
    with pytest.raises(UserError, match="train_type = lora"):
        loading.resolve_train_type(config, quantized=True)


def test_a_learning_rate_of_a_preset_says_nothing_and_a_typed_one_does(grpo, tmp_path):
    shipped = ROOT / "configs/prod.toml"
    config = grpo.read_config(str(shipped), [])
    assert "learning_rate" in config.inherited
    assert loading.resolve_train_type(config, quantized=True) == "lora"
    assert idle.learning_rate(config, "lora") == ""
    typed = grpo.read_config(str(ROOT / "configs/default.toml"), ["learning_rate=5e-7"])
    assert idle.learning_rate(typed, "lora") == IDLE
    python = grpo.MLXGRPOConfig(learning_rate=5e-7, train_type="lora", lora_learning_rate=5e-5)
    assert idle.learning_rate(python, "lora").endswith("lora_learning_rate = 5e-5 counts")
    copied = tmp_path / "prod.toml"
    copied.write_text(shipped.read_text())  # one's own now
    with pytest.raises(UserError, match="learning_rate = 1e-6 has no effect"):
        loading.resolve_train_type(grpo.read_config(str(copied), []), quantized=True)
