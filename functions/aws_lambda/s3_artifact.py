"""An artifact that is not in the image: fetched from S3 into the sandbox's own storage, in ranges side by side.

Nothing is served before every file has the size and the checksum that the manifest promises, and the manifest the
digest that was asked for, where one was. A directory that is there under its name is complete.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from pilotlight.artifact import MANIFEST, FileEntry, decode_manifest, sha256_of
from pilotlight.errors import ArtifactError, ConfigError
from pilotlight.metering.aws_client import new_client

PART_BYTES = 8 * 1024 * 1024
NUM_CONNECTIONS = 16
"""One connection to S3 is slower than a sandbox's network."""
CHUNK_BYTES = 1 << 20
MAX_ATTEMPTS = 4
MIN_SPARE_BYTES = 16 * 1024 * 1024

_PLACE = re.compile(r"s3://([a-z0-9][a-z0-9.-]{1,61}[a-z0-9])/([^#?]*[^#?/])/?(?:#(sha256:[0-9a-f]{64}))?")


class Place(NamedTuple):
    """Where an artifact's files lie in S3, and which one it has to be."""

    bucket: str
    prefix: str
    digest: str | None

    @classmethod
    def parse(cls, uri: str) -> Place:
        """Read ``s3://BUCKET/PREFIX`` or ``s3://BUCKET/PREFIX#sha256:DIGEST``.

        Raises:
            ConfigError: it is neither.
        """
        match = _PLACE.fullmatch(uri)
        if match is None:
            raise ConfigError(
                f"PILOTLIGHT_ARTIFACT is {uri!r}; expected s3://BUCKET/PREFIX, or that and #sha256:DIGEST"
            )
        return cls(match[1], match[2], match[3])

    @property
    def name(self) -> str:
        return self.prefix.rpartition("/")[2]

    def path_of(self, file_name: str) -> Path:
        """Return what errors call a file."""
        return Path(self.bucket) / self.prefix / file_name


class Part(NamedTuple):
    """A range of one file."""

    file_name: str
    start: int
    num_bytes: int


def fetch(place: Place, directory: Path) -> Path:
    """Fetch an artifact into a directory of its own under ``directory``, unless it is there, and return that.

    Raises:
        ArtifactError: a file is missing, may not be read, or is not what the manifest says.
        ConfigError: it does not fit, or boto3 is not installed.
    """
    client = new_client("s3", NUM_CONNECTIONS)
    raw = _manifest(client, place)
    digest = f"sha256:{hashlib.sha256(raw).hexdigest()}"
    if place.digest not in (None, digest):
        raise ArtifactError(place.path_of(MANIFEST), f"has the digest {digest}; expected {place.digest}")
    target = directory / f"{place.name}-{digest[7:23]}"
    if target.exists():
        return target
    files = decode_manifest(raw, place.path_of(MANIFEST)).files
    unfinished = directory / f".{target.name}"
    shutil.rmtree(unfinished, ignore_errors=True)  # of a start that was cut off
    unfinished.mkdir(parents=True)
    try:
        _check_fits(unfinished, files)
        _fetch_files(client, place, unfinished, files)
        (unfinished / MANIFEST).write_bytes(raw)
        unfinished.rename(target)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise
    return target


def parts_of(files: Mapping[str, FileEntry], part_bytes: int = PART_BYTES) -> Iterator[Part]:
    """Yield ranges that cover every byte of every file once."""
    for name, entry in files.items():
        for start in range(0, entry.size_bytes, part_bytes):
            yield Part(name, start, min(part_bytes, entry.size_bytes - start))


def _fetch_files(client: Any, place: Place, folder: Path, files: Mapping[str, FileEntry]) -> None:
    """Fetch all files and compare them with their checksums; what differs is fetched once more."""
    for name, entry in files.items():
        with (folder / name).open("wb") as file:
            file.truncate(entry.size_bytes)
    with ThreadPoolExecutor(NUM_CONNECTIONS, "s3") as pool:
        damaged = list(files)
        for _ in range(2):
            wanted = {name: files[name] for name in damaged}
            for _ in pool.map(lambda part: _fetch_part(client, place, folder, part), parts_of(wanted)):
                pass
            sums = zip(wanted, pool.map(lambda name: sha256_of(folder / name), wanted), strict=True)
            damaged = [name for name, found in sums if found != files[name].sha256]
            if not damaged:
                return
    raise ArtifactError(place.path_of(damaged[0]), "was altered: its sha256 is not the one in the manifest")


def _fetch_part(client: Any, place: Place, folder: Path, part: Part) -> None:
    """Write one range to its place in its file. A body that breaks off is asked for again."""
    problem = ""
    for _ in range(MAX_ATTEMPTS):
        try:
            return _copy(_body(client, place, part), folder / part.file_name, part)
        except _Broken as error:
            problem = str(error)
    raise ArtifactError(place.path_of(part.file_name), f"cannot be fetched from S3 ({problem})")


class _Broken(Exception):
    """A range that did not arrive as it was asked for."""


def _body(client: Any, place: Place, part: Part) -> Any:
    wanted = f"bytes={part.start}-{part.start + part.num_bytes - 1}"
    response = _get(client, place, part.file_name, Range=wanted)
    total = response.get("ContentRange", "").rpartition("/")[2]
    if response["ContentLength"] != part.num_bytes:
        raise _Broken(f"{response['ContentLength']:,} bytes of {total or 'unknown'} came for {wanted}")
    return response["Body"]


def _copy(body: Any, path: Path, part: Part) -> None:
    at, end = part.start, part.start + part.num_bytes
    handle = os.open(path, os.O_WRONLY)
    try:
        for chunk in body.iter_chunks(CHUNK_BYTES):
            at += os.pwrite(handle, chunk, at)
    except Exception as error:  # botocore's and urllib3's errors have no base class in common
        if isinstance(error, OSError) and error.errno is not None and not isinstance(error, ConnectionError):
            raise ArtifactError(path, f"cannot be written ({error.strerror})") from error
        raise _Broken(f"{type(error).__name__} at byte {at:,}") from error
    finally:
        os.close(handle)
        body.close()
    if at != end:
        raise _Broken(f"it broke off at byte {at:,}")


def _manifest(client: Any, place: Place) -> bytes:
    for _ in range(MAX_ATTEMPTS):
        try:
            raw: bytes = _get(client, place, MANIFEST)["Body"].read()
        except ArtifactError:
            raise
        except Exception:  # noqa: BLE001, S112 - as above
            continue
        return raw
    raise ArtifactError(place.path_of(MANIFEST), "cannot be fetched from S3")


def _get(client: Any, place: Place, file_name: str, **options: str) -> dict[str, Any]:
    from botocore.exceptions import BotoCoreError, ClientError

    try:
        found: dict[str, Any] = client.get_object(Bucket=place.bucket, Key=f"{place.prefix}/{file_name}", **options)
    except (ClientError, BotoCoreError) as error:
        raise ArtifactError(place.path_of(file_name), f"cannot be fetched from S3 ({error})") from error
    return found


def _check_fits(folder: Path, files: Mapping[str, FileEntry]) -> None:
    needed = sum(entry.size_bytes for entry in files.values()) + MIN_SPARE_BYTES
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise ConfigError(
            f"the artifact takes {needed >> 20:,} MiB and {folder.parent} has {free >> 20:,} MiB; "
            f"give the function more ephemeral storage"
        )
