"""Values that JSON can represent."""

from __future__ import annotations

import math
from typing import Any


def without_nan(value: Any) -> Any:
    """Returns `value` with null for NaN and the infinities, which JSON does not have."""
    if isinstance(value, dict):
        return {str(key): without_nan(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
