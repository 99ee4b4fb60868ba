"""``GET /attestation``: the evidence of where a function runs, bound to its keys, its artifact and the caller's nonce.

It is open to everybody: who has to decide whether to trust a server with a key or a prompt has not shown it one yet.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Annotated, Protocol

import msgspec
from msgspec import Meta
from starlette.requests import Request
from starlette.responses import Response

from pilotlight.api.endpoint import Endpoint
from pilotlight.api.intake import json_response
from pilotlight.api.wire import parse_text
from pilotlight.errors import (
    CapacityError,
    EngineError,
    FunctionNotFound,
    InvalidRequest,
    QueueFull,
)
from pilotlight.function import Function
from pilotlight.tee import Attestation, BindingsObject, TeeLabel

MAX_WAITING = 32
"""Reports are made one after another, and hardware takes its time for each."""
NO_KEY = bytes(32).hex()


class AttestationQuery(msgspec.Struct, frozen=True):
    """``model`` may be left out where one function is served."""

    nonce: Annotated[str, Meta(pattern=r"^[0-9a-f]{64}$")]
    model: str | None = None


class Attester(Protocol):
    """What makes evidence of this process."""

    @property
    def label(self) -> TeeLabel:
        """What such evidence is worth, by our own appraisal at the start."""

    def attest(self, nonce: bytes, manifest_digest: bytes) -> Attestation:
        """Return fresh evidence; may block.

        Raises:
            EvidenceUnavailable: the source has none at present.
        """

    def take_hpke_key(self, key: bytes) -> None:
        """Bind evidence to another key of encrypted requests from now on."""


class Unattested:
    """Stands where there is no source of evidence, and says so."""

    label = TeeLabel.NONE

    def take_hpke_key(self, key: bytes) -> None:
        """There is nothing to bind."""

    def attest(self, nonce: bytes, manifest_digest: bytes) -> Attestation:
        return Attestation(self.label, nonce.hex(), BindingsObject(NO_KEY, NO_KEY, NO_KEY, manifest_digest.hex()))


class Attestations:
    """The endpoint, over the functions of this process."""

    def __init__(self, functions: Mapping[str, Function], attester: Attester) -> None:
        self._functions = functions
        self._attester = attester
        self._turn = asyncio.Lock()
        self._num_waiting = 0

    def endpoint(self) -> Endpoint:
        return Endpoint(
            "GET",
            "/attestation",
            self.attestation,
            "Prove where a function runs",
            answer=Attestation,
            query=AttestationQuery,
            refusals=(InvalidRequest, FunctionNotFound, CapacityError, EngineError),
        )

    async def attestation(self, request: Request) -> Response:
        query = parse_text(request.query_params, AttestationQuery)
        digest = self._function(query.model).artifact.digest.removeprefix("sha256:")
        if self._num_waiting >= MAX_WAITING:
            raise QueueFull(MAX_WAITING, of="attestations")
        self._num_waiting += 1
        try:
            async with self._turn:
                made = await asyncio.to_thread(self._attester.attest, bytes.fromhex(query.nonce), bytes.fromhex(digest))
        finally:
            self._num_waiting -= 1
        return json_response(made)

    def _function(self, name: str | None) -> Function:
        if name is None and len(self._functions) == 1:
            return next(iter(self._functions.values()))
        if name is None:
            raise InvalidRequest("model", "model: several functions are served here; name one")
        if name not in self._functions:
            raise FunctionNotFound(name, [])
        return self._functions[name]
