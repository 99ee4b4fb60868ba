"""Silence for libraries that warn, log and print as they work."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def quiet() -> Iterator[None]:
    """Silence the warnings and log lines of PyTorch, transformers and Optimum, which say nothing about the model."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), _without_prints():
            warnings.simplefilter("ignore")
            _hide_progress_bars()
            yield
    finally:
        logging.disable(disabled)


@contextmanager
def _without_prints() -> Iterator[None]:
    """Send file descriptor 1 nowhere: compiled libraries print to it, and standard output is for our results."""
    sys.stdout.flush()
    kept = os.dup(1)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.close(nowhere)
    try:
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)


def _hide_progress_bars() -> None:
    """Keep transformers' bars off the line on which our own progress is shown."""
    from transformers.utils import logging as transformers_logging

    library: Any = transformers_logging
    library.disable_progress_bar()
