"""The server process: owns the socket, the functions and the ledger, and ends them in the right order."""

from __future__ import annotations

import asyncio
import contextlib
import math
import os
import signal
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import uvicorn
from starlette.types import ASGIApp

from pilotlight.api.app import Api
from pilotlight.api.idempotency import KeptAnswers
from pilotlight.api.metrics import Metrics
from pilotlight.api.response_store import ResponseStore
from pilotlight.api.resumption import resume_tokens
from pilotlight.config import LOOPBACK, FunctionSettings, HostSettings, Settings
from pilotlight.errors import ConfigError
from pilotlight.function import Function
from pilotlight.host.attesting import open_attester
from pilotlight.host.courier import Courier
from pilotlight.host.departure import MARGIN_S, admission_s
from pilotlight.host.deployments import Deployments, Version
from pilotlight.host.encryption import open_encryption, open_receipts
from pilotlight.host.launcher import ZygoteLauncher
from pilotlight.host.machine import Machine
from pilotlight.host.notice import Kind, Notice, ToldNotices, open_source, watch
from pilotlight.host.pooled import Surroundings, cache_dir, open_pooled
from pilotlight.host.replica_meter import Rate, ReplicaMeter, Seen
from pilotlight.host.serving import server_config
from pilotlight.host.swap import HostControl
from pilotlight.host.verified import Verified
from pilotlight.metering.database import located
from pilotlight.metering.keyring import Keyring
from pilotlight.metering.machine_cost import micros_per_hour
from pilotlight.metering.opening import open_ledger
from pilotlight.metering.signing import Signer
from pilotlight.metering.sql_ledger import SqlLedger
from pilotlight.tee import TeeLabel

BACKLOG = 2048
CLOSE_TIMEOUT_S = 5
"""How long a connection may take to close after its stream was ended."""

OnReady = Callable[[str, Mapping[str, Function]], None]


def run(settings: Settings, on_ready: OnReady) -> None:
    """Serve the functions of ``settings`` until SIGTERM or SIGINT, then drain. ``on_ready`` gets the base URL.

    Raises:
        StartupError: the address is taken, or a function or the ledger cannot be opened.
    """
    with asyncio.Runner(loop_factory=_loop_factory()) as runner:
        runner.run(_serve(settings, on_ready))


async def _serve(settings: Settings, on_ready: OnReady) -> None:
    # the port first: a start in vain should not load a model
    sources = [source for source in (open_source(settings.host.notices),) if source is not None]
    ledger_at = located(settings.host.ledger)
    encryption = open_encryption(settings)
    attester = open_attester(settings, *(() if encryption is None else (encryption.public_key,)))
    with (
        _bind(settings.host) as listener,
        open_ledger(ledger_at, signer_of(settings.host), settings.host.cache_dir) as ledger,
        Keyring(ledger_at) as keyring,
        ResponseStore.open(settings.host) as responses,
    ):
        check_is_guarded(settings.host, keyring)
        metrics = Metrics()
        host = settings.host
        machine = Machine(host.memory_budget_mb * 1_000_000)
        launcher = ZygoteLauncher()
        tee = TeeLabel.NONE if attester is None else attester.label
        verified = Verified(cache_dir(host))
        around = Surroundings(host, ledger, metrics, launcher, machine, verified, tee, settings.confidential)
        functions = Deployments()
        control = HostControl(functions, around, launcher)
        ticks: asyncio.Task[None] | None = None
        kept_answers = kept_answers_for(host, ledger)
        meter = ReplicaMeter(ledger)
        clerks: list[asyncio.Task[None]] = []
        try:
            for name, of_function in settings.functions.items():
                function, pool = open_pooled(name, of_function, around)
                functions.add(name, Version(of_function, function, pool))
                pool.act()
                _meter_replicas(meter, name, of_function, functions)
            metrics.watch(functions)
            around_bodies = (
                None if encryption is None else encryption.middleware(attester),
                open_receipts(settings, signer_of(host), ledger, attester),
            )
            app = Api(
                functions,
                ledger,
                metrics,
                host.max_body_bytes,
                responses,
                keyring,
                kept_answers,
                control,
                attester,
                resume_tokens(host),
                [one for one in around_bodies if one is not None],
            ).app()
            launcher.start()
            ticks = asyncio.create_task(machine.run())
            clerks = await _clerks(settings, functions, ledger, meter)
            on_ready(_url(listener, settings.host.address), functions)
            server = _Server(app, functions, settings.host.drain_timeout_s)
            clerks.append(asyncio.create_task(watch([server.told, *sources], server.noticed), name="notices"))
            await server.serve(sockets=[listener])
        finally:
            await functions.close()
            await kept_answers.close()
            await meter.write()
            for task in clerks:
                task.cancel()
            if ticks is not None:
                ticks.cancel()
            launcher.close()


class _Server(uvicorn.Server):
    def __init__(self, app: ASGIApp, functions: Deployments, drain_timeout_s: float) -> None:
        super().__init__(server_config(app, int(drain_timeout_s) + CLOSE_TIMEOUT_S))
        self.told = ToldNotices()
        self._functions = functions
        self._drain_timeout_s = drain_timeout_s
        self._ends_at = math.inf

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Exit in order on a signal. Uvicorn's own way raises it again, which would cut off what comes after."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self._signalled, number)
        yield

    def noticed(self, notice: Notice) -> None:
        """This machine goes: be no longer ready, and exit so early that running streams have their time."""
        if notice.kind is not Kind.INTERRUPTION:
            return
        for function in self._functions.versions():
            function.leave()
        self._ends_at = min(self._ends_at, time.monotonic() + notice.seconds_left)
        admits_s = admission_s(notice.seconds_left, self._drain_timeout_s)
        asyncio.get_running_loop().call_later(admits_s, setattr, self, "should_exit", True)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Let running streams finish for a while and end the others, while uvicorn waits for their connections."""
        timeout_s = max(0.0, min(self._drain_timeout_s, self._ends_at - MARGIN_S - time.monotonic()))
        drains = asyncio.gather(*(function.drain(timeout_s) for function in self._functions.versions()))
        await super().shutdown(sockets)
        await drains

    def _signalled(self, number: int) -> None:
        """Take a signal for a notice; the next one is meant more seriously."""
        if self.told.told or math.isfinite(self._ends_at):
            self.handle_exit(number, None)
        else:
            self.told.tell(self._drain_timeout_s + MARGIN_S)


async def _clerks(
    settings: Settings, functions: Mapping[str, Function], ledger: SqlLedger, meter: ReplicaMeter
) -> list[asyncio.Task[None]]:
    """Tell the ledger what prices mean and who is told of records, and start what writes and tells beside the rest."""
    for function in functions.values():
        await ledger.register_prices(function.prices.tables)
    await ledger.subscribe(None if settings.events is None else settings.events.url)
    clerks = [asyncio.create_task(meter.run(), name="replica meter")]
    if settings.events is not None:
        clerks.append(asyncio.create_task(Courier(ledger, settings.events).run(), name="courier"))
    return clerks


def _meter_replicas(meter: ReplicaMeter, name: str, settings: FunctionSettings, functions: Deployments) -> None:
    cost = micros_per_hour(settings.replica_cost_per_hour, f"functions.{name}.replica_cost_per_hour")
    if cost:
        deployment = functions.deployment(name)
        rate = Rate(name, functions[name].prices.tables[-1].currency, cost)
        meter.watch(rate, lambda: [Seen(replica.id, bool(replica.entries)) for replica in deployment.replicas])


def signer_of(host: HostSettings) -> Signer | None:
    """Return what signs usage records, where the settings name a key."""
    return Signer.from_file(Path(host.signing_key)) if host.signing_key else None


def kept_answers_for(host: HostSettings, ledger: SqlLedger) -> KeptAnswers:
    """Return what keeps answers for clients that come back, as the settings say."""
    return KeptAnswers(
        ledger,
        host.resume_window_s,
        host.idempotency_ttl_s,
        host.max_kept_answer_bytes,
        resumes_all_streams=host.resumable_streams == "all",
    )


def check_is_guarded(host: HostSettings, keyring: Keyring) -> None:
    """Let nobody in from other machines who has no key.

    Raises:
        ConfigError: the address is not a loopback one, and there are no keys.
    """
    if host.address not in LOOPBACK and not keyring.usable:
        raise ConfigError(
            f"host.address is {host.address!r}; without keys the server listens on loopback only "
            f"({', '.join(LOOPBACK)}); make a key with: pilotlight keys create"
        )


def _bind(host: HostSettings) -> socket.socket:
    family = socket.AF_INET6 if ":" in host.address else socket.AF_INET
    try:
        return socket.create_server((host.address, host.port), family=family, backlog=BACKLOG)
    except OSError as error:
        raise ConfigError(
            f"cannot listen on {host.address}:{host.port}: {os.strerror(error.errno or 0)}; choose another --port"
        ) from error


def _url(listener: socket.socket, address: str) -> str:
    return f"http://{f'[{address}]' if ':' in address else address}:{listener.getsockname()[1]}"


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    try:
        import uvloop
    except ImportError:  # not made for Windows
        return None
    return uvloop.new_event_loop
