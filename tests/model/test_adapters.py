"""Adapters: where they go, and files of them that are wrong."""

import pytest
from helpers import assert_names


def test_lora_settings(refused):
    message = refused(train_type="lora", lora_keys=["q_proj"])
    assert_names(
        message, "lora_keys ['q_proj'] match nothing", "self_attn.q_proj, self_attn.v_proj"
    )
    assert "norm" not in message, "what can't be adapted is no advice"
    # "auto" means full fine-tuning of this model, so the rank would do nothing.
    assert_names(refused(lora_rank=4), "lora_rank has no effect with train_type = full")


ADAPTERS = {
    "missing": (None, "adapter_config.json cannot be read: No such file"),
    "no JSON": ("{", "adapter_config.json cannot be read"),
    "a list": ("[]", "holds no JSON object"),
    "not adapters": ('{"fine_tune_type": "full"}', "fine_tune_type = 'full' is not lora or dora"),
    "another kind": ('{"fine_tune_type": "dora"}', "holds dora adapters, but train_type = lora"),
    "incomplete": ('{"fine_tune_type": "lora"}', "lacks num_layers: it describes neither"),
    "no weights": (
        '{"num_layers": 2, "lora_parameters": {"rank": 2, "scale": 1.0, "dropout": 0.0}}',
        "adapters.safetensors",
    ),
}


@pytest.mark.parametrize("what", ADAPTERS)
def test_wrong_adapters(refused, tmp_path, what):
    text, complaint = ADAPTERS[what]
    (tmp_path / "adapters").mkdir()
    if text is not None:
        (tmp_path / "adapters" / "adapter_config.json").write_text(text)
    message = refused(adapter_path="adapters", train_type="lora")
    assert_names(message, "adapter", complaint)
