"""Structured logs of every program: JSON unless a person is watching. A leaf (extra ``service``).

Log digests, sizes, counts and times; never values, secrets or who a client is. What is logged by
mistake is held back here, by its type and by its name. Text cannot be told apart from text: an
event is a constant, and what happened to it comes in keywords.
"""

from __future__ import annotations

import contextlib
import logging
import math
import sys
import traceback
from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path

import structlog

__all__ = ["configure", "redact", "where"]

_LOG = structlog.get_logger(__name__)
_MAX_TEXT = 2000
_MAX_DEPTH = 8
_MAX_BITS = 64
_SECRETS = ("mnemonic", "passphrase", "password", "privatekey", "secret", "seed", "share", "token")
_TRACES = frozenset({"exc_info", "exception", "stack", "stack_info"})


def configure(level: str = "info") -> None:
    """Send structured logs to standard error from ``level`` up, through `redact`.

    Warnings of other libraries join them, without their text: nobody knows what is in it.
    """
    renderer: structlog.typing.Processor = (
        structlog.dev.ConsoleRenderer()
        if sys.stderr.isatty()
        else structlog.processors.JSONRenderer()
    )
    structlog.configure(
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            redact,
            renderer,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(
            logging.getLevelNamesMapping()[level.upper()]
        ),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
    )
    if not any(isinstance(handler, _Libraries) for handler in logging.root.handlers):
        logging.root.addHandler(_Libraries(logging.WARNING))


def redact(_logger: object, _method: str, event: Mapping[str, object]) -> Mapping[str, object]:
    """The structlog processor that lets through text, numbers, None and lists and tables of them.

    Bytes become ``<N bytes>``, any other object ``<TypeName>``, what is named like a secret
    ``<omitted>``. Text is cut to 2000 characters, and escaped where a terminal would obey it; stack
    traces are dropped. It never raises, and what it returns is JSON.
    """
    return _table({key: value for key, value in event.items() if key not in _TRACES}, ())


def where(error: BaseException) -> list[str]:
    """Where an unexpected error came from, innermost last; its text stays out of the log."""
    frames = traceback.extract_tb(error.__traceback__)[-5:]
    return [f"{Path(frame.filename).name}:{frame.lineno} {frame.name}" for frame in frames]


def _safe(value: object, above: tuple[int, ...]) -> object:
    """What may be shown of a value; ``above`` are the ids of the containers it is in."""
    # Exact types: a subclass may print, or hide, anything.
    if value is None or type(value) is bool:
        return value
    if type(value) is str or isinstance(value, StrEnum):
        return _text(str.__str__(value))
    if type(value) is int and value.bit_length() <= _MAX_BITS:
        return value
    if type(value) is float:
        return value if math.isfinite(value) else str(value)
    if type(value) is bytes or type(value) is bytearray:
        return f"<{len(value)} bytes>"
    if id(value) not in above and len(above) < _MAX_DEPTH:
        inside = (*above, id(value))
        if type(value) is dict:
            return _table(value, inside)
        if type(value) is list or type(value) is tuple:
            return [_safe(item, inside) for item in value]
    return f"<{type(value).__name__}>"


def _table(table: Mapping[object, object], above: tuple[int, ...]) -> dict[str, object]:
    named = ((str(_safe(key, above)), value) for key, value in table.items())
    return {name: "<omitted>" if _is_secret(name) else _safe(value, above) for name, value in named}


def _text(text: str) -> str:
    start = text[: _MAX_TEXT + 1]
    if not start.isprintable():
        start = start.encode("unicode_escape").decode()
    return start if len(start) <= _MAX_TEXT else f"{start[: _MAX_TEXT - 1]}…"


def _is_secret(name: str) -> bool:
    plain = "".join(filter(str.isalnum, name.lower()))
    return any(secret in plain for secret in _SECRETS)


class _Libraries(logging.Handler):
    """Takes the standard library's log records, which would go to standard error in full."""

    def emit(self, record: logging.LogRecord) -> None:
        error = record.exc_info[1] if record.exc_info else None
        # Nobody could be told that telling failed.
        with contextlib.suppress(Exception):
            _LOG.log(
                logging.ERROR if record.levelno >= logging.ERROR else logging.WARNING,
                "library_warning",
                library=record.name,
                file=record.filename,
                line=record.lineno,
                error=type(error).__name__ if error else None,
                at=where(error) if error else None,
            )
