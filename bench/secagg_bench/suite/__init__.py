"""The benchmark suite: named scenarios over every system, in one run, into tidy rows."""

from __future__ import annotations

__all__: list[str] = []
