"""How sure a share is that was counted."""

from __future__ import annotations

import math

Z95 = 1.959963984540054


def wilson(count: int, total: int, z: float = Z95) -> tuple[float, float]:
    """Wilson's score interval of a share, within [0, 1]; all of it where nothing was counted.

    Args:
        count: how often, 0 to ``total``.
        total: of how many, 0 or more.
        z: quantile of the normal distribution; the default gives 95 %.

    Raises:
        ValueError: a count out of its range.
    """
    if not 0 <= count <= total:
        raise ValueError(f"a share needs 0 <= count <= total, got {count} of {total}")
    if total == 0:
        return 0.0, 1.0
    share, square = count / total, z * z / total
    middle = (share + square / 2) / (1 + square)
    half = z / (1 + square) * math.sqrt(share * (1 - share) / total + square / (4 * total))
    return max(0.0, middle - half), min(1.0, middle + half)
