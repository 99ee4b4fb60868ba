"""Issues the receipts of one server, and keeps the last ones in memory.

They are not written to a disk unless a directory is named for them: the hash of a short prompt tells the prompt to
whoever can guess. Whoever wants a receipt fetches it when the answer has ended, as the proxy does.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import os
from collections import OrderedDict
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Protocol

import msgspec

from pilotlight.confidential.appraisal import Roots, from_wire
from pilotlight.confidential.attested import appraise_attestation
from pilotlight.confidential.attester import ANYTHING
from pilotlight.confidential.receipt_files import ReceiptFiles
from pilotlight.confidential.receipts import Exchange, Receipt, Standing, issue, measurements_of
from pilotlight.errors import RequestNotFound
from pilotlight.metering.record import UsageRecord
from pilotlight.metering.signing import Signer
from pilotlight.tee import Attestation

MAX_KEPT = 10_000

logger = logging.getLogger("pilotlight.receipts")


class Attester(Protocol):
    """Gives evidence that is bound to this process's keys and an artifact."""

    def attest(self, nonce: bytes, manifest_digest: bytes) -> Attestation: ...


class Issuer:
    """``find_record`` may block, and returns None as long as an invocation has not ended."""

    def __init__(
        self,
        signer: Signer,
        find_record: Callable[[str], UsageRecord | None],
        attester: Attester | None,
        roots: Roots,
        max_kept: int = MAX_KEPT,
        files: ReceiptFiles | None = None,
    ) -> None:
        self._signer = signer
        self._find_record = find_record
        self._attester = attester
        self._roots = roots
        self._max_kept = max_kept
        self._files = files
        self._numbers = itertools.count(1)
        self._kept: OrderedDict[str, Receipt | Exchange] = OrderedDict()
        """Receipts share the text of their evidence, which may have megabytes where there are GPUs."""
        self._standings: dict[str, Standing] = {}

    async def ended(self, request_id: str, exchange: Exchange) -> None:
        """Take note of an exchange, and issue its receipt if its record is there already."""
        self._keep(request_id, exchange)
        await self._issue(request_id, exchange)

    async def receipt(self, request_id: str, may_see: Callable[[str | None], bool]) -> bytes:
        """Return a receipt.

        Raises:
            RequestNotFound: there is none, it is kept no longer, or the caller may not see it.
        """
        kept: Receipt | Exchange | bytes | None = self._kept.get(request_id) or await self._written(request_id)
        record = await asyncio.to_thread(self._find_record, request_id)
        if kept is None or record is None or not may_see(record.key_id):
            raise RequestNotFound(f"there is no receipt of a request {request_id!r}, or it is kept no longer")
        if isinstance(kept, Exchange):
            kept = await self._issue(request_id, kept) or b""
        return kept.encode() if isinstance(kept, Receipt) else kept

    async def _written(self, request_id: str) -> bytes | None:
        return None if self._files is None else await asyncio.to_thread(self._files.read, request_id)

    async def _issue(self, request_id: str, exchange: Exchange) -> Receipt | None:
        receipt = await asyncio.to_thread(self._make, request_id, exchange)
        if receipt is not None:
            self._keep(request_id, receipt)
        return receipt

    def _make(self, request_id: str, exchange: Exchange) -> Receipt | None:
        record = self._find_record(request_id)
        if record is None:
            return None
        standing = self._standing(record.artifact_digest)
        receipt = issue(record, exchange, self._signer, standing, next(self._numbers))
        if self._files is not None:
            try:
                self._files.write(request_id, receipt.encode())
            except OSError as error:  # the answer is worth more than its receipt, which is still in memory
                logger.warning("the receipt of %s cannot be written (%s)", request_id, error.strerror)
        return receipt

    def _standing(self, artifact_digest: str) -> Standing | None:
        """Return the evidence for one artifact, made once: hardware takes its time for each."""
        if self._attester is None:
            return None
        if artifact_digest not in self._standings:
            nonce = os.urandom(32)
            digest = bytes.fromhex(artifact_digest.removeprefix("sha256:"))
            attestation = self._attester.attest(nonce, digest)
            content = msgspec.json.encode(attestation)
            _, appraisal = appraise_attestation(
                content, nonce=nonce, policy=ANYTHING, at=datetime.now(UTC), roots=self._roots
            )
            assert attestation.evidence is not None
            evidence = from_wire(attestation.evidence)
            self._standings[artifact_digest] = Standing(
                content.decode(),
                evidence.digest,
                evidence.kind,
                measurements_of(appraisal) if appraisal.accepted else None,
            )
        return self._standings[artifact_digest]

    def _keep(self, request_id: str, kept: Receipt | Exchange) -> None:
        self._kept[request_id] = kept
        self._kept.move_to_end(request_id)
        while len(self._kept) > self._max_kept:
            self._kept.popitem(last=False)
