"""One process of atheris over one target; `fuzz` starts it and reads what it prints.

An input that raises what it should not is written beside its traceback, once for each place that
raises, and the fuzzing goes on. What stops the process (a crash, a hang, too much memory) is
libFuzzer's to write.
"""

from __future__ import annotations

import logging
import operator
import resource
import shlex
import sys
import time
import traceback
import warnings
from functools import cache
from pathlib import Path
from random import Random
from typing import NoReturn

import atheris
import structlog

__all__ = ["place_of"]

_OURS = ["secagg", "secagg_client", "secagg_recommender", "secagg_server", "secagg_keyholder"]
_ROOM_BYTES = 768 << 20
"""What one input may take beyond what the process needs anyway; MemoryError is a finding."""


def place_of(error: BaseException) -> str:
    """Kind of an error and where it was raised: a name for all inputs that fail alike."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    where = f"{Path(last.filename).stem}-{last.lineno}"
    return f"{type(error).__name__}-{where}"


def _limit_memory() -> None:
    pages = int(Path("/proc/self/statm").read_text("ascii").split()[0])
    limit = pages * resource.getpagesize() + _ROOM_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


_MOST_CPU_S = 5.0
"""Seconds of processor that one input may take, whatever else the machine does."""


# In the order of `dis.cmp_op`.
_COMPARISONS = (*(operator.lt, operator.le, operator.eq, operator.ne, operator.gt, operator.ge),)
_PLAIN = (int, str, bytes)


@cache
def _trace_plain_values() -> None:
    """Have atheris compare what it learns from alone, and all else be compared as Python does.

    Version 3.0.0 never frees what a comparison gives, such as an array, or an expression of SQL.
    For the first input: what compares is put into its place by `atheris.Fuzz`.
    """
    traced = atheris._trace_cmp

    def compared(left: object, right: object, how: int, *rest: object) -> object:
        if isinstance(left, _PLAIN) and isinstance(right, _PLAIN):
            return traced(left, right, how, *rest)
        return _COMPARISONS[how](left, right)

    atheris._trace_cmp = compared


def _silent(_logger: object, _name: str, _event: object) -> NoReturn:
    raise structlog.DropEvent


def _main(name: str, findings: Path, arguments: list[str]) -> None:
    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)
    structlog.configure(processors=[_silent])
    with atheris.instrument_imports(include=_OURS, exclude=["secagg.wire.v1"]):
        from fuzz_targets import target

        chosen = target(name)
        chosen.prepare()
        for seed in chosen.seeds().values():
            chosen.one(seed)

    def one(data: bytes) -> None:
        _trace_plain_values()
        started = time.process_time()
        try:
            chosen.one(data)
            if (taken := time.process_time() - started) > _MOST_CPU_S:
                raise TimeoutError(f"expected at most {_MOST_CPU_S} s; it took {taken:.1f} s")
        except Exception as error:
            place = findings / place_of(error)
            if not place.exists():
                place.write_bytes(data)
                lines = traceback.format_exception(error)
                place.with_suffix(".txt").write_text("".join(lines), "utf-8")

    def mutate(data: bytes, most: int, seed: int) -> bytes:
        random = Random(seed)
        if chosen.mutate is None or random.random() < 0.3:
            return bytes(atheris.Mutate(data, most))
        return chosen.mutate(data, random)[:most]

    _limit_memory()
    # By which libFuzzer starts itself again where it merges.
    again = shlex.join([sys.executable, "-m", "fuzz_one", name, str(findings)])
    atheris.Setup([again, *arguments], one, custom_mutator=mutate)
    atheris.Fuzz()


if __name__ == "__main__":
    _main(sys.argv[1], Path(sys.argv[2]), sys.argv[3:])
