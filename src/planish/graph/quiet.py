"""Silence for what torch's exporters log on every call."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Sequence


@contextlib.contextmanager
def silenced(names: Sequence[str], level: int = logging.CRITICAL) -> Iterator[None]:
    """Within, loggers say nothing below `level`; afterwards what they said before."""
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(level)
    try:
        yield
    finally:
        for logger, before in zip(loggers, levels, strict=True):
            logger.setLevel(before)
