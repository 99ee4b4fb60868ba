"""Deploy the functions of a pilotlight.toml on a Ray cluster: ``python ray_deploy.py pilotlight.toml``.

Also an application builder for Serve's own tools: ``serve run ray_deploy:application config=pilotlight.toml``.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from ray import serve
from ray.serve.config import AutoscalingConfig, AutoscalingPolicy, RequestRouterConfig

from pilotlight.artifact import open_artifact
from pilotlight.config import FunctionSettings, HostSettings, MixSettings, Settings, load_settings
from pilotlight.errors import ConfigError, PilotlightError
from pilotlight.host.autoscaler import Policy
from pilotlight.host.loaded import Loaded
from pilotlight.host.mix import MixPolicy, mix
from pilotlight.host.pooled import replica_spec
from pilotlight.host.server import check_is_guarded
from pilotlight.host.sizing import max_context_tokens
from pilotlight.host.wire import ReplicaSpec
from pilotlight.metering.database import URL_SCHEMES, located
from pilotlight.metering.keyring import Keyring
from pilotlight.metering.opening import open_ledger
from ray_engine import EngineReplica
from ray_gateway import Gateway
from ray_mix import ON_DEMAND, SPOT
from ray_mixed_place import spot_name

LOOK_AHEAD = 1
SIGNALS_INTERVAL_S = 0.5
SIGNALS_WINDOW_S = 1.0
HEALTH_CHECK_PERIOD_S = 2.0
"""Serve learns by its next health check that a replica has died, and only then starts another one."""

LOOK_AGAIN_S = 0.1
"""How long Serve pauses at most before it asks full replicas again; a place that comes free waits so long."""

APPLICATION = "pilotlight"


def pools_of(settings: Settings) -> dict[str, tuple[str, ...]]:
    """Return which functions share replicas: the pools of the configuration, and one for each other function.

    Raises:
        ConfigError: a pool has an unknown function, one that another pool has, or it or a function an unusable name.
    """
    pools = dict(settings.cluster.pools)
    pooled: set[str] = set()
    if settings.cluster.mix is not None:
        for name in {*pools, *settings.functions}:
            if spot_name(name) in {*pools, *settings.functions}:
                raise ConfigError(
                    f"{spot_name(name)!r} is what {name!r} is called on spot machines; choose another name"
                )
    for pool, names in pools.items():
        if pool in settings.functions:
            raise ConfigError(f"cluster.pools.{pool}: is the name of a function; choose another one")
        for name in names:
            if name not in settings.functions or name in pooled:
                raise ConfigError(f"cluster.pools.{pool}: {name!r} is not a function, or is in two pools")
            pooled.add(name)
    return pools | {name: (name,) for name in settings.functions if name not in pooled}


def application(arguments: Mapping[str, str]) -> serve.Application:
    """Return the Serve application of a configuration: a gateway before one deployment a pool.

    Raises:
        StartupError: a setting or an artifact is not usable.
    """
    return build(load_settings(Path(arguments["config"])))


def build(settings: Settings) -> serve.Application:
    """Return the Serve application of settings.

    Raises:
        StartupError: a setting or an artifact is not usable.
    """
    if not settings.functions:
        raise ConfigError("there is no function to deploy; add a table [functions.NAME]")
    if not settings.host.ledger.startswith(URL_SCHEMES):
        raise ConfigError(
            f"host.ledger is {settings.host.ledger!r}; on a cluster it is shared: postgresql://user@host/database"
        )
    pools = pools_of(settings)
    engines: dict[str, serve.Application] = {}
    for pool, names in pools.items():
        engines |= _engines(pool, names, settings)
    pool_of = {name: pool for pool, names in pools.items() for name in names}
    cluster = settings.cluster
    gateway = serve.deployment(serve.ingress()(_Ingress)).options(
        name="gateway",
        num_replicas=cluster.gateways,
        max_ongoing_requests=10_000,
        graceful_shutdown_timeout_s=settings.host.drain_timeout_s,
        ray_actor_options={"num_cpus": cluster.gateway_cpus, "resources": cluster.gateway_resources},
    )
    return gateway.bind(settings, engines, pool_of)


def replica_class(max_functions: int) -> type[EngineReplica]:
    """Return what Serve makes replicas of: one that loads up to so many functions when they are called."""

    class Replica(EngineReplica):
        def __init__(self, specs: Mapping[str, ReplicaSpec], notices: str) -> None:
            context = serve.get_replica_context()
            super().__init__(f"{context.deployment}-{context.replica_id.unique_id}", specs, notices)

        async def engine(self, function: str) -> Loaded:
            return self._loaded[function] if len(self.specs) == 1 else await self.load(function)

        @serve.multiplexed(max_num_models_per_replica=max_functions)  # type: ignore[untyped-decorator]
        async def load(self, function: str) -> Loaded:
            return await self.open(function, partial(_Evictable, self, function))

        async def __del__(self) -> None:
            await self.close()

    return Replica


class _Evictable(Loaded):
    """An engine that Serve ends when another function needs its place: by ``__del__``, which it waits for."""

    def __init__(self, replica: EngineReplica, function: str, spec: ReplicaSpec) -> None:
        super().__init__(spec)
        self._replica = replica
        self._function = function

    async def __del__(self) -> None:
        await self._replica.unload(self._function)


class _Ingress(Gateway):
    async def __del__(self) -> None:
        await self.close()


def _engines(pool: str, names: tuple[str, ...], settings: Settings) -> dict[str, serve.Application]:
    """Return the deployment of a pool, or the two of a mixed one, by name.

    What it may have is the most that any of its functions asks for.
    """
    of_pool = [settings.functions[name] for name in names]
    specs = {name: _spec(name, settings.functions[name], settings.host) for name in names}
    num_slots = max(spec.num_slots for spec in specs.values())
    policies = [Policy.from_settings(one, num_slots) for one in of_pool]
    policy = dataclasses.replace(
        policies[0],
        min_replicas=max(one.min_replicas for one in policies),
        max_replicas=max(one.max_replicas for one in policies),
        idle_timeout_s=max(one.idle_timeout_s for one in policies),
    )
    cluster = settings.cluster
    return {
        name: serve.deployment(replica_class(cluster.max_functions_per_replica))
        .options(
            name=name,
            max_ongoing_requests=num_slots + LOOK_AHEAD,
            graceful_shutdown_timeout_s=settings.host.drain_timeout_s,
            health_check_period_s=HEALTH_CHECK_PERIOD_S,
            autoscaling_config=scaling,
            request_router_config=RequestRouterConfig(
                request_router_class="ray_router:PrefixRouter", max_backoff_s=LOOK_AGAIN_S
            ),
            ray_actor_options={"num_cpus": cluster.replica_cpus, "resources": {**cluster.replica_resources, **where}},
        )
        .bind(specs, cluster.notices)
        for name, scaling, where in _deployments(pool, policy, cluster.mix)
    }


def _deployments(
    pool: str, policy: Policy, wanted: MixSettings | None
) -> list[tuple[str, AutoscalingConfig, dict[str, float]]]:
    """Return the deployments of a pool: how each is called and scaled, and what places it."""
    kwargs = {key: value for key, value in dataclasses.asdict(policy).items() if key != "sleep"}
    if wanted is None:
        return [(pool, _scaling("TokenAwarePolicy", kwargs, policy.min_replicas, policy), {})]
    of_mix = MixPolicy(wanted.on_demand_floor, wanted.spot_surplus, wanted.fall_back)
    first = mix(policy.min_replicas, 0, of_mix)

    def scaling(kind: str, initial: int) -> AutoscalingConfig:
        return _scaling(
            "MixedPolicy", {**kwargs, "pool": pool, "kind": kind, "mix": dataclasses.asdict(of_mix)}, initial, policy,
            surplus=wanted.spot_surplus if kind == SPOT else 0, lowest=0,
        )  # fmt: skip

    return [
        (pool, scaling(ON_DEMAND, first.on_demand), wanted.on_demand_resources),
        (spot_name(pool), scaling(SPOT, first.spot), wanted.spot_resources),
    ]


def _scaling(
    decides: str, kwargs: dict[str, Any], initial: int, policy: Policy, *, surplus: int = 0, lowest: int | None = None
) -> AutoscalingConfig:
    """Return how a deployment is scaled: by our policy alone, within the function's bounds."""
    return AutoscalingConfig(
        min_replicas=policy.min_replicas if lowest is None else lowest,
        max_replicas=policy.max_replicas + surplus,
        initial_replicas=initial,
        policy=AutoscalingPolicy(policy_function=f"ray_scaling:{decides}", policy_kwargs=kwargs),
        metrics_interval_s=SIGNALS_INTERVAL_S,
        look_back_period_s=SIGNALS_WINDOW_S,
        upscale_delay_s=0.0,  # when to scale is our policy's business
        downscale_delay_s=0.0,
    )


def _spec(name: str, settings: FunctionSettings, host: HostSettings) -> ReplicaSpec:
    if settings.unseal:
        raise ConfigError(f"functions.{name}.unseal: a sealed artifact's key does not travel over a cluster")
    artifact = open_artifact(Path(settings.artifact))
    return replica_spec(name, settings, host, artifact, max_context_tokens(name, settings, artifact))


def main(arguments: list[str]) -> None:
    """Deploy a configuration on the cluster that this machine belongs to, and return once it serves."""
    parser = argparse.ArgumentParser(description="Deploy the functions of a pilotlight.toml on a Ray cluster.")
    parser.add_argument("config", type=Path)
    parser.add_argument("--address", default="auto", help="The Ray cluster [default: the one of this machine].")
    parser.add_argument("--proxies", choices=["HeadOnly", "EveryNode"], default="EveryNode",
                        help="Where clients can connect to [default: EveryNode].")  # fmt: skip
    options = parser.parse_args(arguments)
    import ray

    settings = load_settings(options.config)
    app = build(settings)
    open_ledger(located(settings.host.ledger), cache_dir=settings.host.cache_dir).close()
    with Keyring(located(settings.host.ledger)) as keyring:
        check_is_guarded(settings.host, keyring)
    ray.init(address=options.address, log_to_driver=False, configure_logging=False)
    serve.start(
        proxy_location=options.proxies, http_options={"host": settings.host.address, "port": settings.host.port}
    )
    serve.run(app, name=APPLICATION, route_prefix="/")
    print(f"serving http://{settings.host.address}:{settings.host.port}/v1 on the cluster", flush=True)


if __name__ == "__main__":
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        main(sys.argv[1:])
    except PilotlightError as error:
        sys.exit(f"error: {error.message}")
