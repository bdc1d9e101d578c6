"""Statistics of measured values."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence


def percentile(values: Sequence[float], share: float) -> float:
    """Return the smallest value that at least `share` (0 to 1) of the values do not exceed: nearest rank."""
    return sorted(values)[max(math.ceil(share * len(values)) - 1, 0)]
