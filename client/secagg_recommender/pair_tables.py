"""Exact sums of a huge, sparse table of pairs of items, in a small encrypted vector.

A table of 12 000 x 12 000 counts has 146 million cells, of which all users together fill under one
in a hundred. An invertible Bloom lookup table (Goodrich and Mitzenmacher 2011, "Invertible Bloom
Lookup Tables", arXiv 1101.2245) holds such counts in little more cells than there are pairs. It is
linear: the sum of clients' tables is the table of their summed counts, and tells what these tell,
no more. From that sum the counts are read back exactly, or, where there are more pairs than
planned, not at all; they never come out wrong unnoticed.

Each pair lies in one cell of each of three parts, by three public bijections that scatter pairs.
A cell sums up the counts of its pairs, and their counts times a *word*: the bits of the pair that
the cell's place does not tell, and a checksum of the rest. A cell with one pair left is recognised
by its word, read, and taken out of all three parts, which leaves other cells with one.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Final

import numpy as np
import numpy.typing as npt

from secagg.sampling import Stream
from secagg_recommender.interactions import DataError

__all__ = ["WORD_BITS", "PairCounts", "PairTable"]

WORD_BITS: Final = 30
"""Of a pair's word, its checksum included: the most for which a sum over 100 clients of up to 63 a
cell still fits into one coefficient of the cipher's ring."""

_PARTS: Final = 3
_CHECK_BITS: Final = 12
_FEISTEL_ROUNDS: Final = 4
# Three parts can be read while pairs are below 0.818 of the cells (Molloy 2005); small tables
# stray further from their mean.
_CELLS_A_PAIR: Final = 1.27
_SPARE_CELLS: Final = 96
_SAME_CELLS_CHANCE: Final = 1 / 2000
"""Of a table that cannot be read because two of its pairs share all three cells, at most."""
_DENSE: Final = 1 / 4

_Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True, eq=False)
class PairCounts:
    """Pairs of items with their counts, in order of the pairs; a pair that is not there has none.

    *Shapes*: int64 ``(pairs,)`` each; ``keys`` are ``first * n_items + second``, ascending.
    """

    n_items: int
    keys: _Ints
    counts: _Ints

    def __post_init__(self) -> None:
        if self.keys.shape != self.counts.shape or self.keys.ndim != 1:
            raise DataError(
                f"expected a count for each pair, got keys={self.keys.shape} "
                f"counts={self.counts.shape}; build with PairCounts.of()"
            )
        outside = self.keys.size and (self.keys[0] < 0 or self.keys[-1] >= self.n_items**2)
        if outside or np.any(np.diff(self.keys) <= 0):
            raise DataError(
                f"expected ascending, distinct pairs of {self.n_items} items; build with "
                "PairCounts.of()"
            )

    @classmethod
    def of(cls, n_items: int, keys: _Ints, counts: _Ints) -> PairCounts:
        """Counts of pairs in any order; those of one pair are added up, and zeros left out."""
        distinct, place = np.unique(keys, return_inverse=True)
        totals = np.zeros(distinct.size, dtype=np.int64)
        np.add.at(totals, place, counts)
        kept = totals != 0
        return cls(n_items, distinct[kept], totals[kept])


@dataclass(frozen=True)
class PairTable:
    """Size and hashing of a table; all clients and whoever reads the sum use an equal one.

    Attributes:
        n_items: of the catalogue; pairs are ordered, and of any two items.
        cells: in each of the three parts; :meth:`for_pairs` knows how many.

    Raises:
        DataError: no items or cells, or so few cells that words have no room for a checksum.
    """

    n_items: int
    cells: int

    def __post_init__(self) -> None:
        if self.n_items < 1 or self.cells < 1:
            raise DataError(
                f"expected items and cells of 1 or more, got n_items={self.n_items} "
                f"cells={self.cells}; use PairTable.for_pairs()"
            )
        if self._checks < 1 << _CHECK_BITS:
            raise DataError(
                f"expected cells enough for a checksum of {_CHECK_BITS} bits beside what they do "
                f"not tell of a pair, got cells={self.cells} for {self.n_items} items; "
                f"cells={-(-(self.n_items**2) >> (WORD_BITS - _CHECK_BITS)) + 1} would work"
            )

    @classmethod
    def for_pairs(cls, n_items: int, pairs: int) -> PairTable:
        """A table from whose sum up to so many distinct pairs can be read.

        Two pairs that share their cells in all three parts can never be told apart, so one table
        in 2,000 cannot be read at worst (up to about 13,000 pairs; one in 9,000 at 50,000): that is
        always noticed, and cured by another number of pairs.
        """
        every = n_items**2
        if pairs > _DENSE * every:
            # Bijections fill cells evenly: hardly any cell of a dense table has one pair alone.
            return cls(n_items, every)
        cells = -(-int(_CELLS_A_PAIR * pairs) // _PARTS) + _SPARE_CELLS
        apart = math.ceil((pairs**2 / 2 / _SAME_CELLS_CHANCE) ** (1 / _PARTS))
        return cls(n_items, max(cells, apart, (every >> (WORD_BITS - _CHECK_BITS)) + 1))

    @property
    def parts(self) -> int:
        """Cells that each pair lies in."""
        return _PARTS

    @property
    def size(self) -> int:
        """Integers in each of the two vectors, of counts and of words."""
        return _PARTS * self.cells

    @property
    def pairs(self) -> int:
        """Distinct pairs that the sum has room for."""
        if self.cells >= self.n_items**2:
            return self.n_items**2
        return int((self.size - _PARTS * _SPARE_CELLS) / _CELLS_A_PAIR)

    def encode(self, pairs: PairCounts) -> tuple[_Ints, _Ints]:
        """The table of a client's counts: counts and words, int64 ``(size,)`` each.

        Raises:
            DataError: pairs of another catalogue.
        """
        if pairs.n_items != self.n_items:
            raise DataError(
                f"expected pairs of {self.n_items} items, got n_items={pairs.n_items}; use the "
                "data set that the task was prepared from"
            )
        counts, words = np.zeros(self.size, dtype=np.int64), np.zeros(self.size, dtype=np.int64)
        self._add(counts, words, pairs.keys, pairs.counts)
        return counts, words

    def decode(self, counts: npt.NDArray[np.integer], words: npt.NDArray[np.integer]) -> PairCounts:
        """The exact counts of a summed table.

        Raises:
            DataError: no integers of this table's shape; more pairs than it has room for, or a
                client that did not follow the plan: then something is left when no pair can be
                read any more, or a count comes out negative.
        """
        for part in (counts, words):
            if part.shape != (self.size,) or part.dtype.kind not in "iu":
                raise DataError(
                    f"expected {self.size} integers, got shape={part.shape}, dtype={part.dtype}; "
                    "pass the released sums, and the table that the task was prepared with"
                )
        left = counts.astype(np.int64), words.astype(np.int64)
        found = list(self._peeled(*left))
        keys, totals = (np.concatenate(part) for part in zip(*found, strict=True))
        pairs = PairCounts.of(self.n_items, keys, totals)
        if left[0].any() or left[1].any() or pairs.counts.min(initial=1) < 1:
            raise DataError(
                f"expected a sum of up to {self.pairs} distinct pairs with positive counts; it "
                "cannot be read: there are more, or a client did not follow the plan; prepare the "
                "task for more pairs"
            )
        return pairs

    def _peeled(self, counts: _Ints, words: _Ints) -> Iterator[tuple[_Ints, _Ints]]:
        """Takes pairs out of the table for as long as a cell has one by itself.

        A cell of several pairs that looks like one, by chance, is put right later: what was taken
        too much of is left as a pair of negative count.
        """
        yield np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64)
        parts = [np.arange(p * self.cells, (p + 1) * self.cells) for p in range(_PARTS)]
        idle = 0
        # A chance likeness could go in circles; many more passes than a readable table needs.
        for step in range(_PARTS * 1000):
            cells = parts[step % _PARTS]
            keys, totals = self._alone(step % _PARTS, cells[counts[cells] != 0], counts, words)
            idle = 0 if keys.size else idle + 1
            if idle == _PARTS:
                return
            self._add(counts, words, keys, -totals)
            yield keys, totals

    def _alone(self, part: int, cells: _Ints, counts: _Ints, words: _Ints) -> tuple[_Ints, _Ints]:
        """Pairs that are by themselves in a cell of a part, with their counts."""
        totals = counts[cells]
        word, rest = np.divmod(words[cells], totals)
        whole = (rest == 0) & (word >= 0) & (word < self._rests * self._checks)
        cells, totals, word = cells[whole], totals[whole], word[whole]
        mixed = (cells - part * self.cells) * self._rests + word // self._checks
        inside = mixed < self.n_items**2
        cells, totals, word, mixed = cells[inside], totals[inside], word[inside], mixed[inside]
        keys = self._unmix(part, mixed)
        true = self._check(part, keys) == word % self._checks
        return keys[true], totals[true]

    def _add(self, counts: _Ints, words: _Ints, keys: _Ints, times: _Ints) -> None:
        for part in range(_PARTS):
            mixed = self._mix(part, keys)
            cells = part * self.cells + mixed // self._rests
            word = mixed % self._rests * self._checks + self._check(part, keys)
            np.add.at(counts, cells, times)
            np.add.at(words, cells, times * word)

    @property
    def _rests(self) -> int:
        """Pairs that share a cell: what its place does not tell."""
        return -(-(self.n_items**2) // self.cells)

    @property
    def _checks(self) -> int:
        """Values of the checksum."""
        return (1 << WORD_BITS) // self._rests

    def _check(self, part: int, keys: _Ints) -> _Ints:
        return self._mix(part + _PARTS, keys) % self._checks

    @cached_property
    def _shifts(self) -> _Ints:
        """Random public shifts, for each bijection, round and item."""
        shape = (2 * _PARTS, _FEISTEL_ROUNDS, self.n_items)
        stream = Stream.derive("pair table", self.n_items, self.cells)
        drawn = stream.uint64(shape[0] * shape[1] * shape[2]) % np.uint64(self.n_items)
        return drawn.astype(np.int64).reshape(shape)

    def _mix(self, which: int, keys: _Ints) -> _Ints:
        """A bijection of all pairs: an unbalanced Feistel network of modular shifts."""
        left, right = np.divmod(keys, self.n_items)
        for shifts in self._shifts[which]:
            left, right = right, (left + shifts[right]) % self.n_items
        return left * self.n_items + right

    def _unmix(self, which: int, mixed: _Ints) -> _Ints:
        """Its inverse."""
        left, right = np.divmod(mixed, self.n_items)
        for shifts in self._shifts[which][::-1]:
            left, right = (right - shifts[left]) % self.n_items, left
        return left * self.n_items + right
