"""What transformers 5 writes into config.json, as mlx-lm reads it."""

import hf_layout
import pytest

from utils.base.errors import UserError
from utils.model.hf_config import translate_config


def test_scaled_rope_of_transformers_5_is_kept():
    scaled = {"rope_theta": 7.0, "rope_type": "llama3", "factor": 8.0}
    config = {"model_type": "llama", "rope_parameters": scaled}
    assert translate_config(config) == {"rope_theta": 7.0, "rope_scaling": scaled}
    assert translate_config(config | {"model_type": "qwen3"}) == {}


def test_rope_per_kind_of_layer_is_refused_where_mlx_lm_has_one():
    config = hf_layout.as_transformers_5(hf_layout.make_config("gemma3_text", True))
    with pytest.raises(UserError, match="no rope_parameters per kind of layer"):
        translate_config(config | {"model_type": "llama"})
