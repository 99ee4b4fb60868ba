"""Answers that were cut off and go on: who is given a resume token, and what the bearer of one gets."""

from __future__ import annotations

import asyncio
import dataclasses
from functools import partial

from starlette.requests import Request

from pilotlight.api.auth import caller_of
from pilotlight.api.catalogue import Catalogue
from pilotlight.api.resume_token import PARAM, Bound, ResumeTokens, continuation_id
from pilotlight.api.wire import ResumableBody, SamplingBody
from pilotlight.config import HostSettings
from pilotlight.errors import InvalidRequest
from pilotlight.function import Function, UsageLedger
from pilotlight.function import Request as FunctionRequest
from pilotlight.request import FinishReason

CAME_TO_NOTHING = frozenset({FinishReason.REJECTED, FinishReason.CRASHED, FinishReason.ERROR})
"""A continuation that ended so may be asked for again as if it had not been."""


class Resumption:
    """Gives and takes the tokens of all functions of a host."""

    def __init__(self, tokens: ResumeTokens | None, ledger: UsageLedger) -> None:
        """Without ``tokens`` no answer can be continued."""
        self._tokens = tokens
        self._ledger = ledger

    def version(self, body: SamplingBody, functions: Catalogue) -> Function | None:
        """Return the version of a function that a request has to run on; None where any will do.

        Raises:
            InvalidRequest: the request's token is not one of ours, or has expired.
        """
        token = _token(body)
        if token is None:
            return None
        if self._tokens is None:
            raise InvalidRequest(PARAM, f"{PARAM} is not supported here", "unsupported_parameter")
        digest = self._tokens.artifact_digest(token)
        versions = (function for function in functions.versions() if function.name == body.model)
        return next((function for function in versions if function.artifact.digest == digest), None)

    async def prepared(
        self, request: Request, body: SamplingBody, asked: FunctionRequest, function: Function
    ) -> FunctionRequest:
        """Return what is asked of a function, with what its token says, and able to give the next one.

        The prompt of an answer that was paid for is free in its first continuation. A second one under the same token
        is work like any other.

        Raises:
            InvalidRequest: the token does not belong to this request.
            LedgerUnavailable: the ledger cannot tell whether the token was used.
        """
        token = _token(body)
        if self._tokens is None or not isinstance(body, ResumableBody) or not body.resumable:
            if token is not None:
                raise InvalidRequest(PARAM, f"{PARAM}: an answer of this kind cannot be continued")
            return asked
        bound = _bound(request, function)
        asked = dataclasses.replace(asked, seal=partial(self._tokens.seal, bound))
        if token is None:
            return asked
        continues = self._tokens.open(token, bound)
        first_use = await asyncio.to_thread(self._first_use, token) if continues.paid else None
        if first_use is None:
            return dataclasses.replace(asked, continues=dataclasses.replace(continues, paid=False))
        request.state.request_id = first_use
        request.state.headers.update({"x-request-id": first_use, "request-id": first_use})
        return dataclasses.replace(asked, id=first_use, continues=continues)

    def _first_use(self, token: str) -> str | None:
        """Return the request id under which a token is used for the first time; None when it was used before."""
        attempt = 0
        while (record := self._ledger.get(continuation_id(token, attempt))) is not None:
            if record.finish_reason not in CAME_TO_NOTHING:
                return None
            attempt += 1
        return continuation_id(token, attempt)


def resume_tokens(host: HostSettings) -> ResumeTokens | None:
    """Return what seals the tokens of a host, where it has a secret.

    Raises:
        ConfigError: the secret is too short to be one.
    """
    return ResumeTokens(host.resume_secret, host.resume_ttl_s) if host.resume_secret else None


def _token(body: SamplingBody) -> str | None:
    return body.resume_token if isinstance(body, ResumableBody) else None


def _bound(request: Request, function: Function) -> Bound:
    caller = caller_of(request)
    return Bound(
        function=function.name,
        artifact_digest=function.artifact.digest,
        tenant=caller.tenant,
        key_id=caller.key_id,
        path=request.scope["path"],
        body=request.state.body,
    )
