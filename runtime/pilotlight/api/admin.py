"""The operator's endpoints: what runs, and which version of it."""

from __future__ import annotations

from typing import Annotated, Protocol

import msgspec
from msgspec import Meta
from starlette.requests import Request
from starlette.responses import Response

from pilotlight.api.endpoint import ANY, Endpoint
from pilotlight.api.intake import Intake, json_response
from pilotlight.api.wire import Body, parse
from pilotlight.errors import FunctionNotFound, SwapFailed


class ReplicaStatus(msgspec.Struct, frozen=True, kw_only=True):
    """One replica. Memory is resident, ``private_bytes`` of it its own; the stages are those of its start."""

    id: str
    state: str
    pid: int | None
    num_running: int
    num_slots: int
    memory_bytes: int | None
    private_bytes: int | None
    origin: str | None
    fork_ms: float
    map_ms: float
    session_ms: float
    warm_up_ms: float
    unseal_ms: float = 0.0


class VersionStatus(msgspec.Struct, frozen=True, kw_only=True):
    """One version of a function. ``sleeps_in_s`` counts down while it is idle."""

    artifact: str
    digest: str
    role: str
    sleep: str
    replicas: list[ReplicaStatus]
    template_pid: int | None
    num_open: int
    num_queued: int
    num_queued_tokens: int
    sleeps_in_s: float | None
    failure: str | None


class FunctionStatus(msgspec.Struct, frozen=True, kw_only=True):
    """A function and its versions: the current one, a canary, and old ones with streams that still run."""

    name: str
    versions: list[VersionStatus]


class HostStatus(msgspec.Struct, frozen=True, kw_only=True):
    """All of a host. ``memory_taken_bytes`` is reserved for replicas and templates, of ``memory_budget_bytes``."""

    host_pid: int
    zygote_pid: int | None
    memory_budget_bytes: int
    memory_taken_bytes: int
    functions: list[FunctionStatus]


class SwapBody(Body, frozen=True, kw_only=True):
    """``artifact`` is a path on the host; a canary gets so many of a hundred requests."""

    artifact: Annotated[str, Meta(pattern=r"^[^\x00]+$")]
    canary_percent: Annotated[float, Meta(gt=0, lt=100)] | None = None


class SwapReport(msgspec.Struct, frozen=True, kw_only=True):
    """What came of a swap."""

    function: str
    digest: str
    previous_digest: str
    role: str
    num_probe_tokens: int
    ready_ms: float


class Control(Protocol):
    """What a host lets its operator do."""

    def status(self) -> HostStatus:
        """Return what runs; wakes nothing."""

    async def swap(self, name: str, artifact: str, canary_percent: float | None) -> SwapReport:
        """Have another artifact serve a function, or a share of its requests.

        Raises:
            SwapFailed: the old version goes on, and the message says why.
        """


class Admin:
    """The routes under ``/admin/``; the doorkeeper lets only admin keys through."""

    def __init__(self, intake: Intake, control: Control) -> None:
        self._intake = intake
        self._control = control

    def endpoints(self) -> list[Endpoint]:
        return [
            Endpoint("GET", "/admin/functions", self.functions, "Show what runs", answer=HostStatus),
            Endpoint(
                "POST",
                "/admin/functions/{name:path}/swap",
                self.swap,
                "Serve another artifact",
                answer=SwapReport,
                body=SwapBody,
                refusals=(*ANY, FunctionNotFound, SwapFailed),
            ),
        ]

    async def functions(self, request: Request) -> Response:
        return json_response(self._control.status())

    async def swap(self, request: Request) -> Response:
        body = parse(await self._intake.read_body(request), SwapBody)
        report = await self._control.swap(request.path_params["name"], body.artifact, body.canary_percent)
        return json_response(report)
