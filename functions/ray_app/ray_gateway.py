"""The gateway on Ray Serve: clients' connections, the text side of all functions, their journals and the ledger."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pilotlight.api.app import Api
from pilotlight.api.idempotency import KeptAnswers
from pilotlight.api.metrics import Metrics
from pilotlight.api.response_store import ResponseStore
from pilotlight.api.resumption import resume_tokens
from pilotlight.artifact import open_artifact
from pilotlight.config import Settings
from pilotlight.function import Function
from pilotlight.host.pooled import replica_spec
from pilotlight.host.remote import Place, RemoteBackend, RemoteSettings
from pilotlight.host.sizing import max_context_tokens
from pilotlight.metering.database import located
from pilotlight.metering.keyring import Keyring
from pilotlight.metering.opening import open_ledger
from pilotlight.metering.price_schedule import PriceSchedule
from pilotlight.metering.record import Capacity
from pilotlight.metering.signing import Signer
from ray_mixed_place import MixedPlace, capacity_of, spot_name
from ray_place import ServePlace

if TYPE_CHECKING:
    from ray.serve.handle import DeploymentHandle

logger = logging.getLogger("pilotlight.ray")


class Gateway:
    """What Serve makes the ingress of. Each replica of it is a writer of the shared ledger."""

    def __init__(self, settings: Settings, pools: Mapping[str, DeploymentHandle], pool_of: Mapping[str, str]) -> None:
        """Open the ledger, and the text side of every function; ``pool_of`` names the pool of each.

        A pool with replicas on spot machines has a second deployment for them.

        Raises:
            StartupError: a setting, an artifact or the ledger is not usable.
        """
        host = self._host = settings.host
        location = located(host.ledger)
        signer = Signer.from_file(Path(host.signing_key)) if host.signing_key else None
        self._ledger = open_ledger(location, signer, host.cache_dir)
        self._keyring = Keyring(location)
        self._responses = ResponseStore.open(host)
        self._metrics = Metrics()
        shared = {name for name, pool in pool_of.items() if pool != name}
        self._functions = {
            name: self._open(name, settings, pools[pool], pools.get(spot_name(pool)), shared=name in shared)
            for name, pool in ((name, pool_of[name]) for name in settings.functions)
        }
        self._metrics.watch(self._functions)
        self._kept_answers = KeptAnswers(
            self._ledger,
            host.resume_window_s,
            host.idempotency_ttl_s,
            host.max_kept_answer_bytes,
            resumes_all_streams=host.resumable_streams == "all",
        )

    async def __serve_build_asgi_app__(self) -> Any:
        for function in self._functions.values():
            await self._ledger.register_prices(function.prices.tables)
        api = Api(
            self._functions,
            self._ledger,
            self._metrics,
            self._host.max_body_bytes,
            self._responses,
            self._keyring,
            self._kept_answers,
            resume_tokens=resume_tokens(self._host),
        )
        return api.app()

    async def close(self) -> None:
        """Serve has waited for the running requests. What is left now ends as cancelled, with its record."""
        await asyncio.gather(*(function.close() for function in self._functions.values()))
        await self._kept_answers.close()
        self._keyring.close()
        self._responses.close()
        self._ledger.close()

    def _open(
        self, name: str, settings: Settings, handle: DeploymentHandle, on_spot: DeploymentHandle | None, *, shared: bool
    ) -> Function:
        of_function = settings.functions[name]
        artifact = open_artifact(Path(of_function.artifact))
        context = max_context_tokens(name, of_function, artifact)
        spec = replica_spec(name, of_function, settings.host, artifact, context)
        place: Place = (on_demand := ServePlace(handle, spec, shared=shared))
        if on_spot is not None:
            place = MixedPlace(on_demand, ServePlace(on_spot, spec, shared=shared), spec)
        max_open = of_function.num_slots * max(1, of_function.max_replicas) + of_function.max_queued_requests
        backend = RemoteBackend(RemoteSettings(name, max_open, of_function.max_queued_tokens), place, self._metrics)
        return Function(
            name,
            artifact,
            backend,
            self._ledger,
            PriceSchedule.from_config(of_function.prices, f"functions.{name}.prices"),
            max_context_tokens=context,
            max_duration_s=of_function.max_duration_s,
            capacity=Capacity(settings.host.capacity),
            capacity_of=None if on_spot is None else partial(capacity_of, pool=handle.deployment_name),
            observer=self._metrics,
        )
