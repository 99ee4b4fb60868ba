"""Who calls: API keys at the door, before a body is read. Without any key in the ledger, everybody may do everything.

A route that nobody thought of is closed: all but the health checks, the API's description and the evidence of where it
runs need a key, and those of the operator an admin key.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from starlette.requests import Request
from starlette.types import ASGIApp, Receive, Scope, Send

from pilotlight.api.errors import error_response
from pilotlight.errors import InvalidKey, NotPermitted, PilotlightError
from pilotlight.metering.keys import Key

OPEN_PATHS = frozenset({"/livez", "/readyz", "/openapi.json", "/docs", "/attestation", "/.well-known/hpke-keys"})
ADMIN_PATHS = ("/admin/", "/metrics")


class Keys(Protocol):
    """Where API keys are looked up."""

    @property
    def guarded(self) -> bool:
        """Whether a request needs a key."""

    def find(self, token: str) -> Key | None:
        """Return the key that a token opens; may block for a moment."""


@dataclass(frozen=True, slots=True)
class Caller:
    """Who a request comes from; ``functions`` None means all of them."""

    key_id: str | None = None
    tenant: str | None = None
    functions: tuple[str, ...] | None = None
    admin: bool = False

    def may_call(self, function: str) -> bool:
        return self.functions is None or function in self.functions

    def may_see(self, key_id: str | None) -> bool:
        """Whether what was made with that key is the caller's own."""
        return self.admin or self.key_id == key_id


ANYONE = Caller(admin=True)
"""The caller of a server without keys, which only this machine can reach."""
STRANGER = Caller(functions=())


class Doorkeeper:
    """Puts the ``caller`` into the state of every request, or refuses it."""

    def __init__(self, app: ASGIApp, keyring: Keys | None) -> None:
        self._app = app
        self._keyring = keyring

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        try:
            scope.setdefault("state", {})["caller"] = self._admit(Request(scope))
        except PilotlightError as refusal:
            await error_response(refusal, scope)(scope, receive, send)
            return
        await self._app(scope, receive, send)

    def _admit(self, request: Request) -> Caller:
        if self._keyring is None or not self._keyring.guarded:
            return ANYONE
        path = request.scope["path"]  # not that of request.url, which a Host header can change
        if path in OPEN_PATHS:
            return STRANGER
        caller = _caller(self._keyring, request)
        if path.startswith(ADMIN_PATHS):
            require_admin(caller)
        return caller


def caller_of(request: Request) -> Caller:
    """Return who a request comes from."""
    caller: Caller = request.state.caller
    return caller


def require_admin(caller: Caller) -> None:
    """Let only an operator through.

    Raises:
        NotPermitted: the caller's key is not an admin key.
    """
    if not caller.admin:
        raise NotPermitted("this needs an admin key, as made by: pilotlight keys create --admin")


def _caller(keyring: Keys, request: Request) -> Caller:
    key = keyring.find(_token(request))
    if key is None:
        raise InvalidKey
    return Caller(key.key_id, key.tenant, key.functions, key.admin)


def _token(request: Request) -> str:
    """Return the token of OpenAI's header or of Anthropic's."""
    scheme, _, token = request.headers.get("authorization", "").partition(" ")
    return token.strip() if scheme.lower() == "bearer" else request.headers.get("x-api-key", "")
