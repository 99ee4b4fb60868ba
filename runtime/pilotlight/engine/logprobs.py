"""Log probabilities of tokens, for the sequences that ask for them.

They are those of the model itself: without temperature, penalties, bias or grammar. So they have to be taken from the
logits before the sampler changes them.
"""

from __future__ import annotations

from collections.abc import Sequence as Rows

import numpy as np
from numpy.typing import NDArray

from pilotlight.engine.device_logits import DeviceLogits
from pilotlight.request import TokenLogprobs

Floats = NDArray[np.float32]


def keep_asked(logits: Floats | DeviceLogits, nums_top: Rows[int | None]) -> list[Floats | None]:
    """Return a copy of the rows [V] of ``logits`` [N, V] whose number of top tokens is not None."""
    return [None if num_top is None else logits[row].copy() for row, num_top in enumerate(nums_top)]


def token_logprobs(logits: Floats, token_id: int, num_top: int) -> TokenLogprobs:
    """Return what the model's logits [V] say of a token, and of its ``num_top`` likeliest ones, likeliest first."""
    peak = logits.max()
    total = peak + np.log(np.exp(logits - peak, dtype=np.float64).sum())
    top = _likeliest(logits, min(num_top, len(logits)))
    return TokenLogprobs(
        float(logits[token_id] - total), tuple((int(other), float(logits[other] - total)) for other in top)
    )


def _likeliest(logits: Floats, num_top: int) -> NDArray[np.int64]:
    """Return the ids of the largest logits, largest first, the smaller id first among equals."""
    if num_top == 0:
        return np.empty(0, np.int64)
    threshold = np.partition(logits, -num_top)[-num_top]
    ids = np.flatnonzero(logits >= threshold)
    return ids[np.argsort(-logits[ids], kind="stable")][:num_top]
