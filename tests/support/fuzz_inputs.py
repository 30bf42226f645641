"""What fuzz targets are made of: inputs that steer a program, and a target's description."""

from __future__ import annotations

import base64
import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import TypeVar

from secagg.errors import SecaggError

__all__ = ["FOLDER", "Choices", "Target", "altered", "corpus_of", "found_of", "refusable"]

FOLDER = Path(__file__).parents[1] / "fuzz"
"""Where corpora and inputs that once failed lie."""

_MOST_INSERTED = 64

_T = TypeVar("_T")


@dataclass(frozen=True)
class Target:
    """One group of decoders, and what is thrown at them.

    Attributes:
        name: of its corpus, too.
        decodes: in words, for a table.
        entries: the functions that see the bytes first.
        one: decodes one input. Returns for a value and for an error that is documented; anything
            else that it raises is a finding.
        seeds: valid inputs by name, the same in every run.
        mutate: makes an input out of another one, where bytes alone would seldom stay decodable.
        prepare: sets up what all inputs share, so that no single input takes the time for it.
    """

    name: str
    decodes: str
    entries: tuple[str, ...]
    one: Callable[[bytes], None] = field(repr=False)
    seeds: Callable[[], dict[str, bytes]] = field(repr=False)
    mutate: Callable[[bytes, Random], bytes] | None = field(default=None, repr=False)
    prepare: Callable[[], object] = field(default=lambda: None, repr=False)


@contextlib.contextmanager
def refusable(*kinds: type[SecaggError]) -> Iterator[None]:
    """Let errors of these kinds end what is inside: the decoder has refused, as documented."""
    with contextlib.suppress(*kinds):
        yield


class Choices:
    """Decisions read off bytes, one after the other; zeros once they have run out."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    @property
    def left(self) -> bool:
        """Whether there are bytes left."""
        return self._at < len(self._data)

    def taken(self, count: int) -> bytes:
        """The next bytes as they are, fewer at the end."""
        part = self._data[self._at : self._at + count]
        self._at += count
        return part

    def rest(self) -> bytes:
        """All that is left."""
        return self.taken(len(self._data))

    def number(self, below: int) -> int:
        """A number from 0, below a bound."""
        size = ((below - 1).bit_length() + 7) // 8
        return int.from_bytes(self.taken(size), "little") % below

    def flip(self) -> bool:
        """One of two."""
        return self.number(256) & 1 == 1

    def pick(self, options: Sequence[_T]) -> _T:
        """One of several."""
        return options[self.number(len(options))]

    def altered(self, data: bytes) -> bytes:
        """Bytes with up to three changes; as they are where the first decision is 0."""
        for _ in range(self.number(4)):
            data = self._changed(data)
        return data

    def _changed(self, data: bytes) -> bytes:
        at = self.number(len(data) + 1)
        kind = self.number(6)
        if kind == 0:
            return data[:at]
        if kind == 1:
            return data[:at] + self.taken(1 + self.number(_MOST_INSERTED)) + data[at:]
        if kind == 2:
            return data[:at] + data[at + 1 + self.number(_MOST_INSERTED) :]
        if kind == 3:
            part = self.taken(1 + self.number(16))
            return (data[:at] + part + data[at + len(part) :])[: len(data)]
        if kind == 4:
            end = at + 1 + self.number(1 << 16)
            return data[:at] + b"\xff" * len(data[at:end]) + data[end:]
        return data + bytes(1 + self.number(1 << 16))


def altered(data: bytes, random: Random) -> bytes:
    """Bytes with a few random changes."""
    return Choices(bytes([1 + random.randrange(3)]) + random.randbytes(64)).altered(data)


def corpus_of(name: str) -> list[bytes]:
    """A target's committed corpus: in base64, an input a line."""
    file = FOLDER / "corpus" / f"{name}.txt"
    lines = file.read_text("ascii").split() if file.exists() else []
    return [base64.b64decode(line, validate=True) for line in lines]


def found_of(name: str) -> dict[str, bytes]:
    """Inputs of a target that once failed, by file name."""
    files = sorted((FOLDER / "found" / name).glob("*"))
    return {file.name: file.read_bytes() for file in files}
