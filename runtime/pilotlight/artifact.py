"""The artifact: a directory with a model ready to serve, described and sealed by ``manifest.json``.

This module is the one contract between export and runtime. The graph's interface is part of it (letters: B batch rows,
T new tokens, N requested positions, V vocabulary, C cache length, D head size):

=============================  ==========================  ==================================================
input                          shape, type                 meaning
=============================  ==========================  ==================================================
``input_ids``                  [B, T] int64                new tokens
``seqlens_k``                  [B] int32                   tokens of a row after this run, minus one
``total_sequence_length``      scalar int32                C in a run on a cache with a past; T in a first run
``logits_indices``             [N] int64                   positions in the flattened [B * T] to get logits for
``past_key_values.i.key``      [B, kv heads, C, D]         cache of layer i (and ``.value``)
=============================  ==========================  ==================================================

Outputs are ``logits`` [N, V] float32 and ``present.i.key`` / ``present.i.value``, bound to the same memory as the past.

An artifact of precision ``hybrid`` has more graphs of the same interface: ``prefill.onnx`` for prompts and
``batch.onnx`` for large batches (where there is none, ``prefill.onnx`` is for both). All of them work on the same
tokens, so a runtime may change from one to another between any two runs. Weights lie in the ``.data`` file beside a
graph, or in that of a graph before it where both use the same ones.

Where the manifest says that the cache is ``int8``, the cache of ``model.onnx`` and ``batch.onnx`` is; that of
``prefill.onnx`` is float32, because attention over many new tokens is much faster so. A runtime quantizes what a
prefill has written: ``kv_scales.npy``, float32 [layers, 2 (keys, values), kv heads, D], has the scale of each channel,
and a value becomes the nearest integer to value / scale within ±127.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, Protocol

import msgspec
from msgspec import Meta

from pilotlight.errors import ArtifactError

FORMAT_VERSION = 2
"""2 has ``probe`` in the manifest. Older ones are read as they are."""
MANIFEST = "manifest.json"
SEALED_MANIFEST = "sealed.json"
GRAPH = "model.onnx"
WEIGHTS = "model.onnx.data"
PREFILL_GRAPH = "prefill.onnx"
PREFILL_WEIGHTS = "prefill.onnx.data"
BATCH_GRAPH = "batch.onnx"
KV_SCALES = "kv_scales.npy"
KV_STEPS = 127
TOKENIZER = "tokenizer.json"
CHAT_TEMPLATE = "chat_template.jinja"
GENERATION_CONFIG = "generation_config.json"
LICENSE = "LICENSE"
REQUIRED_FILES = (GRAPH, WEIGHTS, TOKENIZER)
FILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")

Positive = Annotated[int, Meta(ge=1)]


class Source(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Where the weights came from: ``model`` is a hub id or a directory's name, never a path."""

    model: str
    revision: str | None
    license: str | None


class Shapes(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The dimensions that a runtime needs to allocate and to bound its work."""

    num_layers: Positive
    num_heads: Positive
    num_kv_heads: Positive
    head_size: Positive
    hidden_size: Positive
    vocab_size: Positive
    max_context_tokens: Positive


class SpecialTokens(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Token ids with a meaning of their own; any of ``eos_ids`` ends an answer."""

    bos_id: int | None
    eos_ids: list[int]
    pad_id: int | None


KV_VALUE_BYTES = {"float32": 4, "float16": 2, "int8": 1}


class KvLayout(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How one layer's key or value cache lies in memory."""

    dtype: Literal["float32", "float16", "int8"]
    axes: str = "batch, kv_heads, tokens, head_size"


class FileEntry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    sha256: str
    size_bytes: int


class Probe(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What the artifact answers, greedily, to a fixed prompt, so that whoever loads it can tell that it still does.

    ``token_ids`` ends before the first near tie, where another processor may round another way; it may be empty.
    """

    prompt_ids: list[int]
    token_ids: list[int]


class Manifest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Everything that is known about an artifact; its own digest names the artifact."""

    format_version: Positive
    source: Source
    family: str
    precision: str
    recipe: dict[str, str | int | float | bool]
    num_parameters: int
    shapes: Shapes
    special_tokens: SpecialTokens
    kv: KvLayout
    verification: dict[str, str | int | float | bool]
    files: dict[str, FileEntry]
    tools: dict[str, str]
    probe: Probe | None = None

    @property
    def stages_prompts(self) -> bool:
        """Whether prompts are read on a float32 cache and then quantized into the int8 one."""
        return self.kv.dtype == "int8" and PREFILL_GRAPH in self.files

    def encode(self) -> bytes:
        """Return the manifest as the bytes that are written and digested."""
        return msgspec.json.format(msgspec.json.encode(self, order="sorted"), indent=2) + b"\n"


class Grant(msgspec.Struct, array_like=True, frozen=True):
    """What opens a sealed artifact once more: its key, and the digest of the sealed manifest that was found genuine."""

    key: bytes
    sealed_digest: str

    def __repr__(self) -> str:
        return f"Grant({self.sealed_digest!r})"


class Contents(Protocol):
    """The files of an artifact that are not on the disk as they are: whoever wants one gets its bytes in memory.

    ``read_s`` is how long reading has taken so far.
    """

    read_s: float

    @property
    def grant(self) -> Grant: ...

    def read(self, name: str) -> memoryview:
        """Return a file's bytes, in memory that is the caller's. Raises ``ArtifactError`` where it was altered."""

    def verify(self, name: str) -> None:
        """Compare what is on the disk of one file with its checksums, as ``Artifact.verify_file`` does."""


@dataclass(frozen=True)
class Artifact:
    """An artifact whose manifest was read and whose files all exist at their right size.

    Where it has ``contents``, its files are not to be had under ``path``.
    """

    path: Path
    manifest: Manifest
    digest: str
    contents: Contents | None = None

    @property
    def graph_path(self) -> Path:
        return self.path / GRAPH

    @property
    def tokenizer_path(self) -> Path:
        return self.path / TOKENIZER

    @property
    def grant(self) -> Grant | None:
        """What another process needs to open this artifact; None where anybody can."""
        return None if self.contents is None else self.contents.grant

    def read(self, name: str) -> bytes | memoryview:
        """Return one of the files.

        Raises:
            ArtifactError: it is missing, cannot be read, or was altered where that shows.
        """
        if self.contents is not None:
            return self.contents.read(name)
        path = self.path / name
        try:
            return path.read_bytes()
        except OSError as error:
            raise ArtifactError(path, f"cannot be read ({error.strerror})") from error

    def optional_text(self, name: str) -> str | None:
        """Return an optional file's text, or None where the artifact has no such file."""
        if name not in self.manifest.files:
            return None
        return str(self.read(name), "utf-8")

    def verify(self) -> None:
        """Compare every file with its checksum.

        Raises:
            ArtifactError: a file was altered.
        """
        for name in self.manifest.files:
            self.verify_file(name)

    def verify_file(self, name: str) -> None:
        """Compare one file with its checksum.

        Raises:
            ArtifactError: the file was altered or cannot be read.
        """
        if self.contents is not None:
            self.contents.verify(name)
            return
        path = self.path / name
        try:
            found = sha256_of(path)
        except OSError as error:
            raise ArtifactError(path, f"cannot be read ({error.strerror})") from error
        if found != self.manifest.files[name].sha256:
            raise ArtifactError(path, "was altered: its sha256 is not the one in the manifest")


def open_artifact(path: Path) -> Artifact:
    """Read an artifact's manifest and check that each file is there at its right size.

    Checksums are not computed here; ``Artifact.verify`` does that.

    Raises:
        ArtifactError: the directory, the manifest or a file is missing, truncated, unreadable or of a newer format.
    """
    manifest_path = path / MANIFEST
    try:
        raw = manifest_path.read_bytes()
    except NotADirectoryError as error:
        raise ArtifactError(path, "is not a directory") from error
    except FileNotFoundError as error:
        if not path.exists():
            raise ArtifactError(path, "does not exist") from error
        if (path / SEALED_MANIFEST).exists():
            raise ArtifactError(path, "is sealed, and no key for it is configured: docs/confidential.md") from error
        raise ArtifactError(manifest_path, "is missing, so this is not an artifact") from error
    except OSError as error:
        raise ArtifactError(manifest_path, f"cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise ArtifactError(path, f"is no path ({error})") from error
    manifest = decode_manifest(raw, manifest_path)
    for file_path, entry in _files(path, manifest):
        _check_size(file_path, entry.size_bytes)
    return Artifact(path, manifest, f"sha256:{hashlib.sha256(raw).hexdigest()}")


def decode_manifest(raw: bytes, path: Path) -> Manifest:
    """Parse a manifest's bytes; ``path`` is only named in errors.

    Raises:
        ArtifactError: not a manifest, a newer format, or a file list that is incomplete or leaves the directory.
    """
    try:
        version = msgspec.json.decode(raw, type=dict[str, msgspec.Raw]).get("format_version")
        number = msgspec.json.decode(version, type=int) if version is not None else 0
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ArtifactError(path, f"is not a manifest ({error})") from error
    if number > FORMAT_VERSION:
        raise ArtifactError(path, f"has format version {number}; this version of Pilotlight reads {FORMAT_VERSION}")
    try:
        manifest = msgspec.json.decode(raw, type=Manifest)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ArtifactError(path, f"is not a manifest ({error})") from error
    missing = [name for name in REQUIRED_FILES if name not in manifest.files]
    if missing:
        raise ArtifactError(path, f"does not list {missing[0]}")
    for name in manifest.files:
        if not FILE_NAME.fullmatch(name) or name == MANIFEST:
            raise ArtifactError(path, f"lists {name!r}, which is not a plain file name")
    return manifest


def sha256_of(path: Path) -> str:
    """Return a file's SHA-256 in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _files(path: Path, manifest: Manifest) -> Iterator[tuple[Path, FileEntry]]:
    for name, entry in manifest.files.items():
        yield path / name, entry


def _check_size(path: Path, size_bytes: int) -> None:
    try:
        found = path.stat().st_size
    except FileNotFoundError as error:
        raise ArtifactError(path, "is missing") from error
    except OSError as error:
        raise ArtifactError(path, f"cannot be read ({error.strerror})") from error
    if found != size_bytes:
        problem = "is truncated" if found < size_bytes else "is too long"
        raise ArtifactError(path, f"{problem}: {found:,} bytes instead of {size_bytes:,}")
