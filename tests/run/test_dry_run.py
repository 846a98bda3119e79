"""--dry-run: the plan first, then the settings, and nothing that the run itself would refuse."""

import dataclasses
import tomllib

import pytest
from helpers import assert_names


def settings_of(out):
    plan, _, settings = out.partition("\n\nSettings that differ from the defaults:\n")
    lines, last, rest = settings.partition("The others have their defaults: --dry-run --all shows")
    assert last
    assert rest == " them.\n"
    return plan, tomllib.loads(lines)


def test_the_plan_comes_first_then_what_differs(typed):
    code, out, _, _ = typed("--dry-run", "--set", "seed=7", temperature=0.5, max_new_tokens=512)
    assert code == 0
    plan, printed = settings_of(out)
    assert plan.startswith("train_type resolves to full")
    assert "fits:" in plan
    assert "updates:" in plan
    assert (printed["seed"], printed["temperature"]) == (7, 0.5)
    assert "top_k" not in printed
    assert "max_new_tokens" not in printed  # its default


def test_all_shows_every_setting_as_it_resolves(typed, grpo):
    code, out, _, _ = typed("--dry-run", "--all", "--set", "seed=7", temperature=0.5)
    assert code == 0
    plan, _, settings = out.partition("\n\nAll settings:\n")
    assert plan.startswith("train_type resolves to full")
    printed = tomllib.loads(settings.replace("= {}", "= []"))
    assert printed.keys() == {f.name for f in dataclasses.fields(grpo.MLXGRPOConfig)}
    assert (printed["seed"], printed["temperature"], printed["top_k"]) == (7, 0.5, 0)


def test_all_needs_a_dry_run(grpo, capsys):
    with pytest.raises(SystemExit) as stop:
        grpo.main(["--all"])
    assert stop.value.code == 2
    assert "--all goes with --dry-run" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("spec", "complaint"),
    [
        ("rewards.py:nope", "rewards.py has no function 'nope'"),
        ("nowhere.py:short", "file nowhere.py does not exist"),
        ("no_such_module:short", "No module named 'no_such_module'"),
        ("corectness", "did you mean 'correctness'?"),
    ],
)
def test_reward_functions_are_looked_up(refused, tmp_path, monkeypatch, spec, complaint):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rewards.py").write_text("def short(completions): return []\n")
    assert_names(refused("--dry-run", reward_funcs=[spec]), complaint)


def test_a_typed_learning_rate_of_adapters_is_in_the_plan(typed):
    _, out, *_ = typed("--dry-run", "--set", "learning_rate=5e-7", train_type="lora")
    line = "learning_rate has no effect on adapters; lora_learning_rate = 2e-5 counts"
    assert line in out.partition("\n\n")[0]
