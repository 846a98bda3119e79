"""What the guides name exists: settings, values, tests."""

import dataclasses
import re
from pathlib import Path

import pytest

from utils.base.script import load_script
from utils.settings import checks, reading

ROOT = Path(__file__).resolve().parents[2]
FIELDS = {field.name for field in dataclasses.fields(load_script().MLXGRPOConfig)}
SETTING = re.compile(r"`([a-z][a-z0-9_]*) (?:=|>) [^`]+`")


def read(name):
    return (ROOT / "docs" / name).read_text(encoding="utf-8")


@pytest.mark.parametrize("name", ["objectives.md", "lightrft.md"])
def test_settings_that_are_assigned_exist(name):
    found = SETTING.findall(read(name))
    assert len(found) > 2
    assert not {*found} - FIELDS - {"w", "r", "high", "s", "x", "ref", "old"}


def test_every_objective_has_its_paragraph():
    grpo, text = load_script(), read("objectives.md")
    losses, advantages = text.split("## Advantages")
    assert re.findall(r"^\*\*(\w+)\*\*: ", losses, re.M) == [*grpo.LOSSES]
    assert re.findall(r"^\*\*(\w+)\*\*: ", advantages, re.M) == [*grpo.ADVANTAGES]
    assert all(f"**{name}** `" in advantages for name in grpo.KL)


def test_every_setting_of_the_objective_is_in_the_guide():
    names = [field.name for field in dataclasses.fields(load_script().MLXGRPOConfig)]
    mine = names[names.index("loss_type") : names.index("learning_rate")]
    assert len(mine) > 25
    text = read("objectives.md")
    assert [name for name in mine if name not in text] == []


def test_the_guide_states_the_widths_that_are_used():
    text, losses = read("objectives.md"), load_script().LOSSES
    widths = {name: (loss.clip_eps, loss.clip_eps_high) for name, loss in losses.items()}
    assert f"with `high = {losses['dapo'].clip_eps_high}`" in text
    assert "1 - 3e-4, 1 + 4e-4" in text
    assert widths["gspo"] == (3e-4, 4e-4)
    assert "clip(log r, -0.4, 0.4)" in text
    assert widths["gmpo"] == (0.4, 0.4)
    assert "`clip_eps_high = 4` is a cap of 5" in text
    assert widths["cispo"] == (None, 4.0)


OPTION = re.compile(r"^\| `--(\w+)`[^|]* \|(.*)\|(.*)\|(.*)\|$", re.M)
# Every option of LightRFT's "configuration parameters" page, in its order.
LIGHTRFT = """
pretrain reward_pretrain remote_rm_url max_len prompt_max_len
num_episodes max_epochs actor_learning_rate critic_learning_rate lr_warmup_ratio max_norm l2
adam_betas
train_batch_size micro_train_batch_size rollout_batch_size micro_rollout_batch_size
advantage_estimator n_samples_per_prompt kl_estimator init_kl_coef kl_target clip_range
clip_range_higher temperature top_p
zero_stage fsdp fsdp_cpu_offload bf16 gradient_checkpointing sp_size
engine_type engine_tp_size engine_mem_util enable_engine_sleep disable_engine_sleep rm_use_engine
adam_offload use_mp_opt packing_samples fused_linear_logprob chunk_size
log_dir plot_every use_tensorboard use_wandb wandb_org wandb_run_name
save_path ckpt_path load_checkpoint save_interval max_ckpt_num max_ckpt_mem
reward_running_norm reward_running_norm_minus_mean advantages_norm advantage_clip reward_clip
mixed_mm_data processor
"""


def test_every_option_of_lightrft_has_its_line():
    assert [row[0] for row in OPTION.findall(read("lightrft.md"))] == LIGHTRFT.split()


def test_lightrfts_options_name_settings_and_tests_that_exist():
    for option, ours, _, test in OPTION.findall(read("lightrft.md")):
        named = re.findall(r"`([a-z_0-9]+)`", ours)
        assert named or ours.strip() in ("none", "not yet", "always"), option
        assert not {*named} - FIELDS, option
        tests = re.findall(r"`(test_\w+)\.py(?:::(\w+))?(?:\[(\w+)\])?`", test)
        assert bool(named) <= bool(tests), f"{option} names a setting and no test"
        for file, function, case in tests:
            source = next(ROOT.glob(f"tests/*/{file}.py")).read_text(encoding="utf-8")
            assert not function or f"def {function}(" in source, f"{file}::{function}"
            assert not case or f'"{case}"' in source, case


def test_the_example_is_accepted(tmp_path):
    toml = read("lightrft.md").partition("```toml\n")[2].partition("```")[0]
    (tmp_path / "example.toml").write_text(toml)
    config = reading.resolve(load_script().MLXGRPOConfig, tmp_path / "example.toml")
    checks.refuse_dead_settings(config, "full")
    assert (config.num_generations, config.kl_coeff, config.batch_size) == (8, 0.001, 64)
