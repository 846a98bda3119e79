"""mlx-grpo.py as a module."""

import sys

from conftest import ROOT

from utils.base.script import load_script


def test_the_script_is_loaded_once_under_a_name_that_can_be_imported():
    script = load_script()
    assert load_script() is script is sys.modules["mlx_grpo"]
    assert script.__file__ == str(ROOT / "mlx-grpo.py")
    assert script.MLXGRPOConfig.__module__ == "mlx_grpo"
