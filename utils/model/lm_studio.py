"""Where LM Studio looks for models: ~/.lmstudio/models/PUBLISHER/NAME, as its documents say."""

import re
from pathlib import Path

from ..base.errors import UserError
from ..base.json_files import read_object

POINTER = ".lmstudio-home-pointer"  # in the home folder, where LM Studio's own is another


def place(name: str) -> Path:
    """The folder of the model PUBLISHER/NAME.

    Raises:
        UserError: another kind of name.
    """
    if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name):
        raise UserError(
            f"--lm-studio {name} should be PUBLISHER/NAME, such as my-models/tiny-math: the two "
            "folders below LM Studio's models"
        )
    return models() / name


def models() -> Path:
    """LM Studio's folder of models; the one that a person chose in the program, if any."""
    home = Path.home() / ".lmstudio"
    pointer = Path.home() / POINTER
    if pointer.is_file():
        home = Path(pointer.read_text(encoding="utf-8", errors="replace").strip() or home)
    try:
        chosen = read_object(home / "settings.json").get("downloadsFolder")
    except UserError:
        chosen = None
    return Path(chosen) if isinstance(chosen, str) and Path(chosen).is_dir() else home / "models"
