"""Logits that lie on a device, and the choice of tokens from them: what crosses is a row's likeliest, or the row.

Letters: N rows, V vocabulary, K candidates.
"""

from __future__ import annotations

from collections.abc import Sequence as Rows
from typing import Protocol, overload

import numpy as np
from numpy.typing import NDArray

from pilotlight.engine.draw import draw_among
from pilotlight.engine.sampler import SamplingRow, sample
from pilotlight.request import SamplingParams

Floats = NDArray[np.float32]
Ids = NDArray[np.int64]

MAX_CANDIDATES = 256
"""A row whose choice depends on so many of its likeliest tokens at most does not have to cross whole."""


class Picker(Protocol):
    """What brings parts of logits [N, V], by their address, to the host."""

    def likeliest(self, logits: int, axes: tuple[int, int], count: int) -> tuple[Floats, Ids]: ...
    def rows(self, logits: int, axes: tuple[int, int], indices: list[int]) -> Floats: ...


class DeviceLogits:
    """Some rows of logits on a device. An index gives a row [V] of the host's own, a slice or a list fewer rows."""

    def __init__(self, picker: Picker, address: int, rows: tuple[int, ...], vocab_size: int) -> None:
        self._picker = picker
        self._address = address
        self._rows = rows
        self._vocab_size = vocab_size

    @property
    def shape(self) -> tuple[int, int]:
        return len(self._rows), self._vocab_size

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, key: int) -> Floats: ...
    @overload
    def __getitem__(self, key: slice | list[int]) -> DeviceLogits: ...
    def __getitem__(self, key: int | slice | list[int]) -> Floats | DeviceLogits:
        if isinstance(key, int):
            row: Floats = self.host([key])[0]
            return row
        chosen = self._rows[key] if isinstance(key, slice) else tuple(self._rows[index] for index in key)
        return DeviceLogits(self._picker, self._address, chosen, self._vocab_size)

    def host(self, rows: list[int]) -> Floats:
        """Return some rows [N, V] whole, for the caller to keep."""
        return self._picker.rows(self._address, self._axes, [self._rows[row] for row in rows])

    def likeliest(self, count: int) -> tuple[Floats, Ids]:
        """Return values and ids [N, K] of the ``count`` largest logits of each row, largest first."""
        values, ids = self._picker.likeliest(self._address, self._axes, count)
        kept = list(self._rows)
        return values[kept], ids[kept]

    @property
    def _axes(self) -> tuple[int, int]:
        """The rows up to the last one that is wanted."""
        return max(self._rows) + 1, self._vocab_size


def choose(logits: Floats | DeviceLogits, rows: Rows[SamplingRow]) -> Ids:
    """Return one token id [N] for each row, the same from a device as from the host."""
    if not isinstance(logits, DeviceLogits):
        return sample(logits, rows)
    token_ids = np.empty(len(rows), np.int64)
    few = [index for index, row in enumerate(rows) if num_candidates(row, logits.shape[1]) <= MAX_CANDIDATES]
    if few:
        count = max(num_candidates(rows[index], logits.shape[1]) for index in few)
        values, ids = logits[few].likeliest(count)
        for place, index in enumerate(few):
            token_ids[index] = _choose(values[place], ids[place], rows[index])
    whole = [index for index in range(len(rows)) if index not in set(few)]
    if whole:
        token_ids[whole] = sample(logits.host(whole), [rows[index] for index in whole])
    return token_ids


def num_candidates(row: SamplingRow, vocab_size: int) -> int:
    """Return on how many of a row's likeliest tokens its choice depends."""
    if row.adjusts:
        return vocab_size
    if row.params.greedy:
        return 1
    return row.params.top_k if 0 < row.params.top_k < vocab_size else vocab_size


def _choose(values: Floats, ids: Ids, row: SamplingRow) -> int:
    """Choose among a row's likeliest tokens [K], largest first, and commit the choice."""
    token_id = int(ids[0]) if row.params.greedy else _drawn(values, ids, row.params, row)
    row.commit(token_id)
    return token_id


def _drawn(values: Floats, ids: Ids, params: SamplingParams, row: SamplingRow) -> int:
    candidates, logits = ids[: params.top_k], values[: params.top_k]
    order = np.argsort(candidates)
    order = order[logits[order] > -np.inf]
    return draw_among(candidates[order], logits[order], params, row.random)
