"""Progress of long work, and times for people."""

from __future__ import annotations


def clock(seconds: float) -> str:
    """Hours, minutes, seconds."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}"
