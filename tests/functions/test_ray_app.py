"""The Ray application as Ray takes it, and the whole cluster as a soak run."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from pilotlight.artifact import Artifact
from support import PATIENCE_S

ROOT = Path(__file__).parents[2]
PYTHON = ROOT / ".venv-ray" / "bin" / "python"

needs_ray = pytest.mark.skipif(not PYTHON.exists(), reason=f"no environment with Ray at {PYTHON}: make ray")

BUILD = """
import sys
from pathlib import Path
import ray_deploy
from pilotlight.errors import ConfigError
try:
    app = ray_deploy.application({"config": sys.argv[1]})
except ConfigError as error:
    sys.exit(error.message)
deployments = {}
def collect(one):
    deployments[one._bound_deployment.name] = one._bound_deployment
    for value in [*one._bound_deployment.init_args, *one._bound_deployment.init_kwargs.values()]:
        for inner in value.values() if isinstance(value, dict) else [value]:
            if isinstance(inner, type(app)):
                collect(inner)
collect(app)
for name, deployment in sorted(deployments.items()):
    config = deployment._deployment_config
    scaling = config.autoscaling_config
    options = deployment.ray_actor_options or {}
    print(name, config.max_ongoing_requests, *((scaling.min_replicas, scaling.max_replicas) if scaling else ()),
          *options.get("resources", ()))
"""


def run_with_ray(*command: str, timeout_s: float = 600.0) -> subprocess.CompletedProcess[str]:
    folders = [ROOT / "runtime", ROOT / "functions" / "ray_app", ROOT / "bench", ROOT / "tests"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, folders)), "RAY_USAGE_STATS_ENABLED": "0"}
    return subprocess.run(
        [str(PYTHON), *command], env=environment, cwd=ROOT, capture_output=True, text=True, timeout=timeout_s
    )


def config(path: Path, artifact: Artifact, cluster: str = "", ledger: str = "postgresql://u@h/d") -> Path:
    path.write_text(
        f'[host]\nledger = "{ledger}"\n[cluster]\n{cluster}\n'
        + "".join(
            f'[functions.{name}]\nartifact = "{artifact.path}"\nnum_slots = 4\nmax_replicas = 3\n' for name in "abc"
        )
    )
    return path


@needs_ray
def test_each_function_or_pool_is_a_deployment_behind_one_gateway(toy_artifact: Artifact, tmp_path: Path) -> None:
    path = config(tmp_path / "p.toml", toy_artifact, 'pools = { shared = ["a", "b"] }')
    done = run_with_ray("-c", BUILD, str(path))
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["c 5 0 3", "gateway 10000", "shared 5 0 3"]


@needs_ray
@pytest.mark.parametrize(
    ("cluster", "ledger", "problem"),
    [
        ("", "usage.db", "on a cluster it is shared: postgresql://"),
        ('pools = { x = ["none"] }', "postgresql://h/d", "'none' is not a function, or is in two pools"),
        ('pools = { x = ["a"], y = ["a"] }', "postgresql://h/d", "'a' is not a function, or is in two pools"),
        ('pools = { a = ["b"] }', "postgresql://h/d", "is the name of a function"),
        ('pools = { a-spot = ["b"] }\nmix = {}', "postgresql://h/d", "'a-spot' is what 'a' is called on spot machines"),
    ],
)
def test_what_cannot_be_deployed_is_refused(
    toy_artifact: Artifact, tmp_path: Path, cluster: str, ledger: str, problem: str
) -> None:
    done = run_with_ray("-c", BUILD, str(config(tmp_path / "p.toml", toy_artifact, cluster, ledger)))
    assert done.returncode == 1
    assert problem in done.stderr


@needs_ray
def test_a_mixed_function_is_two_deployments_on_machines_of_two_kinds(toy_artifact: Artifact, tmp_path: Path) -> None:
    mixed = 'pools = { shared = ["a", "b"] }\nmix = { on_demand_floor = 1, spot_surplus = 2 }'
    done = run_with_ray("-c", BUILD, str(config(tmp_path / "p.toml", toy_artifact, mixed)))
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "c 5 0 3 on_demand",
        "c-spot 5 0 5 spot",
        "gateway 10000",
        "shared 5 0 3 on_demand",
        "shared-spot 5 0 5 spot",
    ]


BY_VALUE = """
from ray.serve.config import AutoscalingPolicy, RequestRouterConfig
import ray_mix, ray_place, ray_replicas
router = RequestRouterConfig(request_router_class="ray_router:PrefixRouter").get_request_router_class()
ray_replicas.leave_out("demo-abc")
print(router.choose_replicas.__globals__["ray_replicas"].is_spared("demo", "abc"))
kwargs = {"pool": "f", "mix": {}, "num_slots": 4}
for kind in ("on_demand", "spot"):
    policy = AutoscalingPolicy(policy_function="ray_scaling:MixedPolicy").get_policy()
    policy(kind=kind, **kwargs)
print(len(ray_mix._functions))
"""


@needs_ray
def test_what_serve_takes_by_value_shares_its_state_with_the_process() -> None:
    done = run_with_ray("-c", BY_VALUE)
    assert done.stdout.split() == ["True", "1"], done.stderr


ROUTER = """
import asyncio
import ray_replicas
from ray.serve._private.common import DeploymentHandleSource, DeploymentID, ReplicaID, RequestMetadata
from ray.serve._private.request_router.common import PendingRequest
from ray_router import PrefixRouter

DEPLOYMENT = DeploymentID("f", "app")

class Replica:
    multiplexed_model_ids = ()
    max_ongoing_requests = 8
    num_ongoing = 0
    def __init__(self, name):
        self.replica_id = ReplicaID(name, DEPLOYMENT)
    async def get_queue_len(self, *, deadline_s):
        return self.num_ongoing

class Router(PrefixRouter):
    num_pauses = 0
    async def _backoff(self, attempt):
        self.num_pauses += 1
        await asyncio.sleep(0)

def request(name, moved, function=""):
    metadata = RequestMetadata(request_id=name, internal_request_id=name, multiplexed_model_id=function)
    return PendingRequest(args=[], kwargs={"moved": moved}, metadata=metadata)

async def placed(router, request):
    replica = await router._choose_replica_for_request(request)
    replica.num_ongoing += 1
    router.on_send_request(replica.replica_id)
    return replica.replica_id.unique_id
"""

ORDER = """
async def main():
    router = Router(DEPLOYMENT, DeploymentHandleSource.REPLICA)
    asked = [request("a", False, "m"), request("b", False), request("c", True, "m"), request("d", True)]
    waiting = [asyncio.ensure_future(router._choose_replica_for_request(one)) for one in asked]
    await asyncio.sleep(0)
    print(*(one.metadata.request_id for one in router._pending_requests_to_fulfill))
    print(*(one.metadata.request_id for one in router._pending_requests_by_model_id["m"]))
    for one in waiting:
        one.cancel()

asyncio.run(main())
"""


@needs_ray
def test_what_was_moved_goes_before_all_that_waits() -> None:
    done = run_with_ray("-c", ROUTER + ORDER)
    assert done.stdout.splitlines()[-2:] == ["c d a b", "c a"], done.stderr


NOBODY_TAKES_IT = """
async def main():
    router = Router(DEPLOYMENT, DeploymentHandleSource.REPLICA)
    leaving, other = Replica("leaving"), Replica("other")
    ray_replicas.leave_out("f-leaving")
    router.update_replicas([leaving])
    waiting = asyncio.ensure_future(placed(router, request("a", True)))
    while router.num_pauses < 3:
        await asyncio.sleep(0)
    router.update_replicas([leaving, other])
    print(await waiting)

asyncio.run(main())
"""


@needs_ray
def test_what_nobody_may_be_sent_waits_without_stopping_the_router() -> None:
    done = run_with_ray("-c", ROUTER + NOBODY_TAKES_IT, timeout_s=PATIENCE_S)
    assert done.stdout.split() == ["other"], done.stderr


PLACES_COME_FREE = """
async def main(function):
    router = Router(DEPLOYMENT, DeploymentHandleSource.REPLICA)
    replica = Replica("a")
    replica.num_ongoing = replica.max_ongoing_requests
    router.update_replicas([replica])
    first = [asyncio.ensure_future(placed(router, request(f"first-{n}", False, function))) for n in range(2)]
    while router.num_pauses < 3:  # what finds places has begun to look for one for these
        await asyncio.sleep(0)
    moved = [asyncio.ensure_future(placed(router, request(f"moved-{n}", True, function))) for n in range(6)]
    await asyncio.sleep(0)
    replica.num_ongoing = 0
    num_before = router.num_pauses
    await asyncio.gather(*moved)
    num_pauses = router.num_pauses - num_before
    await asyncio.gather(*first)
    print(num_pauses)

asyncio.run(main(""))
asyncio.run(main("m"))
"""


@needs_ray
def test_places_that_come_free_are_given_away_without_pauses_between() -> None:
    """What looks for a place has one pause behind it, in which the places came free; there are two that look."""
    done = run_with_ray("-c", ROUTER + PLACES_COME_FREE, timeout_s=PATIENCE_S)
    assert [int(number) <= 2 for number in done.stdout.split()] == [True, True], done.stdout + done.stderr


MORE_THAN_THERE_ARE_PLACES = """
async def main():
    router = Router(DEPLOYMENT, DeploymentHandleSource.REPLICA, use_replica_queue_len_cache=True)
    replica = Replica("a")
    waiting = [asyncio.ensure_future(placed(router, request(f"{n}", n % 3 == 0))) for n in range(20)]
    await asyncio.sleep(0)
    router.update_replicas([replica])
    while router.num_pauses < 3:
        await asyncio.sleep(0)
    print(replica.num_ongoing)
    for one in waiting:
        one.cancel()

asyncio.run(main())
"""


@needs_ray
def test_hardly_more_is_sent_than_there_are_places() -> None:
    """Two look for places at the same time, and both may find the last one; the replica refuses one of them."""
    done = run_with_ray("-c", ROUTER + MORE_THAN_THERE_ARE_PLACES, timeout_s=PATIENCE_S)
    assert done.stdout.split() in (["8"], ["9"]), done.stdout + done.stderr


@pytest.mark.soak
@pytest.mark.e2e
@needs_ray
def test_a_cluster_loses_a_node_and_drains_one_without_losing_a_token(demo_int4: Artifact) -> None:
    if os.geteuid() != 0 or shutil.which("ip") is None:
        pytest.skip("network namespaces need root and the program ip")
    done = run_with_ray("bench/cluster_demo.py", str(demo_int4.path), timeout_s=600.0)
    sys.stdout.write(done.stdout)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count('"added_niceness": 0') == 2, "Ray's replicas wait for whatever else runs here"
