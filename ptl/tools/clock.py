"""What time it is."""

from __future__ import annotations

from datetime import datetime


def now(zone: str = "") -> str:
    """Date, weekday and time.

    Args:
        zone: a name such as ``Europe/Paris``; empty for this machine's own.

    Raises:
        ValueError: there is no such zone.
    """
    from zoneinfo import ZoneInfo

    try:
        at = datetime.now(ZoneInfo(zone.strip())) if zone.strip() else datetime.now().astimezone()
    except (OSError, ValueError):
        raise ValueError(f"there is no time zone {zone.strip()[:60]!r}; expected a name such as Europe/Paris") from None
    return at.strftime("%A %Y-%m-%d %H:%M:%S %z")
