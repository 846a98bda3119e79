"""Which numbers the settings of `utils/pretrain.py` may be."""

import math
from collections.abc import Collection, Mapping

from ..base.errors import UserError


def check_numbers(settings: Mapping[str, object], may_be_zero: Collection[str]) -> None:
    """Raise UserError for a number that is negative or not finite, or a zero that may not be."""
    for name, value in settings.items():
        if isinstance(value, bool) or not isinstance(value, int | float):
            continue
        zero = name in may_be_zero
        if not math.isfinite(value) or value < 0 or (value == 0 and not zero):
            low = "0 or more" if zero else "more than 0"
            raise UserError(f"{name} = {value!r}: must be {low}")
