"""Moves the weights that ONNX Runtime saved beside a graph to addresses that its kernels can read.

The kernels of ONNX Runtime 1.31.1 round the addresses of their packed weights up to 64 bytes, but the runtime saves
them wherever the file has got to. Mapped from there, they would be read from a few bytes too far on. So every tensor
and every packed blob gets a place of its own at a multiple of 64.

Source: the fields of onnx.proto that are named below; all others travel through unread.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

ALIGNMENT_BYTES = 64
_PACKED = "prepacked_"


def align_weights(graph: Path, weights: Path) -> None:
    """Rewrite ``weights``, and where ``graph`` says that each tensor and packed blob lies.

    Raises:
        OSError: a file cannot be written.
    """
    model = _model_class()()
    model.ParseFromString(graph.read_bytes())
    aligned = weights.with_suffix(".aligned")
    with aligned.open("wb") as target:
        places = _Places(np.memmap(weights, np.uint8, "r"), target)
        for tensor in model.graph.initializer:
            entries = {entry.key: entry for entry in tensor.external_data}
            if entries:
                offset = places.move(int(entries["offset"].value), int(entries["length"].value))
                entries["offset"].value = str(offset)
            for entry in (entry for key, entry in entries.items() if key.startswith(_PACKED)):
                entry.value = "|".join(_moved(entry.value, places))
    aligned.replace(weights)
    graph.write_bytes(model.SerializeToString())


class _Places:
    """Where each part of the old file went; tensors that share a part go on sharing it."""

    def __init__(self, source: np.memmap[Any, np.dtype[np.uint8]], target: BinaryIO) -> None:
        self._source = source
        self._target = target
        self._moved: dict[tuple[int, int], int] = {}

    def move(self, offset: int, size: int) -> int:
        if (offset, size) not in self._moved:
            self._target.write(bytes(-self._target.tell() % ALIGNMENT_BYTES))
            self._moved[offset, size] = self._target.tell()
            self._target.write(self._source[offset : offset + size].data)
        return self._moved[offset, size]


def _moved(packed: str, places: _Places) -> Iterator[str]:
    """Yield the parts of a packed weight's description: its key, then ``offset;length;checksum`` of each blob."""
    key, *blobs = packed.split("|")
    yield key
    for blob in blobs:
        offset, size, checksum = blob.split(";")
        yield f"{places.move(int(offset), int(size))};{size};{checksum}"


def _model_class() -> Any:
    """Return a message class for the few fields of a model that matter here.

    The package onnx has them all, but it is no dependency of the runtime; protobuf is one of ONNX Runtime's.
    """
    from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

    field = descriptor_pb2.FieldDescriptorProto
    file = descriptor_pb2.FileDescriptorProto(name="weight_alignment.proto", package="weight_alignment")
    for message, name, number, repeated, kind in (
        ("Entry", "key", 1, False, None),
        ("Entry", "value", 2, False, None),
        ("Tensor", "external_data", 13, True, "Entry"),
        ("Graph", "initializer", 5, True, "Tensor"),
        ("Model", "graph", 7, False, "Graph"),
    ):
        known = {described.name: described for described in file.message_type}
        (known.get(message) or file.message_type.add(name=message)).field.add(
            name=name,
            number=number,
            label=field.LABEL_REPEATED if repeated else field.LABEL_OPTIONAL,
            type=field.TYPE_MESSAGE if kind else field.TYPE_STRING,
            type_name=f".weight_alignment.{kind}" if kind else None,
        )
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("weight_alignment.Model"))
