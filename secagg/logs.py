"""Structured logs of every program: JSON unless a person is watching. A leaf (extra ``service``).

Log digests, sizes, counts and times; never values, secrets or who a client is.
"""

from __future__ import annotations

import logging
import sys
import traceback
from pathlib import Path

import structlog

__all__ = ["configure", "where"]


def configure(level: str = "info") -> None:
    """Send structured logs to standard error from ``level`` up."""
    renderer: structlog.typing.Processor = (
        structlog.dev.ConsoleRenderer()
        if sys.stderr.isatty()
        else structlog.processors.JSONRenderer()
    )
    structlog.configure(
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            renderer,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(
            logging.getLevelNamesMapping()[level.upper()]
        ),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
    )


def where(error: BaseException) -> list[str]:
    """Where an unexpected error came from, innermost last; its text stays out of the log."""
    frames = traceback.extract_tb(error.__traceback__)[-5:]
    return [f"{Path(frame.filename).name}:{frame.lineno} {frame.name}" for frame in frames]
