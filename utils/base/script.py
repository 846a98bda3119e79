"""mlx-grpo.py as the module `mlx_grpo`: its name has a hyphen, so it can't be imported by name."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parent.parent.parent


def load_script() -> ModuleType:
    """The module, loaded once (registered before it runs, because dataclasses look there)."""
    if "mlx_grpo" not in sys.modules:
        spec = importlib.util.spec_from_file_location("mlx_grpo", ROOT / "mlx-grpo.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules["mlx_grpo"] = module
        spec.loader.exec_module(module)
    return sys.modules["mlx_grpo"]
