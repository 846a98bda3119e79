"""The wheel's build hook: mlx-grpo.py becomes the package's __init__, with `utils` inside it.

Run from a checkout, the script finds `utils` beside itself; installed, a package of that name would
be in everybody's way.
"""

import re
import tempfile
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class ScriptAsPackage(BuildHookInterface):
    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        script = Path(self.root, "mlx-grpo.py").read_text(encoding="utf-8")
        self.folder = tempfile.TemporaryDirectory()  # there until the wheel is written
        package = Path(self.folder.name, "__init__.py")
        package.write_text(re.sub(r"(?m)^from utils\b", "from .utils", script), encoding="utf-8")
        build_data["force_include"][str(package)] = "mlx_grpo/__init__.py"
