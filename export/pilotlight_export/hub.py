"""Models from the Hugging Face hub: one commit, its small files first, then the weights that they call for.

The environment that huggingface_hub reads (HF_TOKEN, HF_HOME, HF_ENDPOINT, HF_HUB_OFFLINE) holds here too.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from pilotlight_export.errors import SourceError, first_line
from pilotlight_export.pickles import PICKLE_PATTERN
from pilotlight_export.safetensors_headers import INDEX, SINGLE, listed_files

SMALL_FILES = ["*.json", "*.jinja", "LICENSE*", "LICENCE*", "README.md", "tokenizer.model"]
NUM_ATTEMPTS = 4


def fetch_model(model: str, revision: str | None, check: Callable[[Path], object], *, allow_pickle: bool) -> Path:
    """Download a model, or find it in the cache, and return its directory, whose name is the commit.

    ``check`` sees the small files before any weight is downloaded, and may refuse them.

    Raises:
        SourceError: there is no such model or revision, it is gated, or the hub does not answer.
    """
    directory = _download(model, revision, SMALL_FILES)
    check(directory)
    commit = directory.name
    shards = [path.name for path in listed_files(directory)] if (directory / INDEX).exists() else [SINGLE]
    directory = _download(model, commit, [*SMALL_FILES, *shards])
    if allow_pickle and not any((directory / name).exists() for name in shards):
        return _download(model, commit, [*SMALL_FILES, PICKLE_PATTERN])
    return directory


def _download(model: str, revision: str | None, patterns: list[str]) -> Path:
    import huggingface_hub
    import requests
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )
    from huggingface_hub.utils.tqdm import disable_progress_bars

    if not sys.stderr.isatty():
        disable_progress_bars()
    try:
        return _again_when_broken(
            lambda: Path(huggingface_hub.snapshot_download(model, revision=revision, allow_patterns=patterns))
        )
    except GatedRepoError as error:
        raise SourceError(f"{model}: is gated; accept its licence on the hub and set HF_TOKEN") from error
    except RevisionNotFoundError as error:
        raise SourceError(f"{model}: the hub has no revision {revision!r} of it") from error
    except RepositoryNotFoundError as error:
        raise SourceError(f"{model}: no such directory, and no such model on the hub") from error
    except LocalEntryNotFoundError as error:
        raise SourceError(f"{model}: no such directory, and the hub cannot be reached") from error
    except HfHubHTTPError as error:
        raise SourceError(f"{model}: the hub refused it ({first_line(error)})") from error
    except requests.RequestException as error:
        raise SourceError(
            f"{model}: the connection to the hub broke off; the same command again goes on from there"
        ) from error
    except (OSError, ValueError) as error:
        raise SourceError(f"{model}: cannot be downloaded ({first_line(error)})") from error


def _again_when_broken(download: Callable[[], Path]) -> Path:
    """Take up a download where the connection dropped: huggingface_hub itself does that for other failures only."""
    import requests

    for _ in range(NUM_ATTEMPTS - 1):
        with suppress(requests.exceptions.ChunkedEncodingError):
            return download()
    return download()
