"""The Ray application as Ray takes it, and the whole cluster as a soak run."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from pilotlight.artifact import Artifact

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


ORDER = """
import asyncio
from types import SimpleNamespace
from ray.serve._private.common import DeploymentHandleSource, DeploymentID, RequestMetadata
from ray.serve._private.request_router.common import PendingRequest
from ray_router import PrefixRouter

async def main():
    router = PrefixRouter(DeploymentID("f", "app"), DeploymentHandleSource.REPLICA)
    def request(name, moved, function=""):
        metadata = RequestMetadata(request_id=name, internal_request_id=name, multiplexed_model_id=function)
        return PendingRequest(args=[], kwargs={"moved": moved}, metadata=metadata)
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
    done = run_with_ray("-c", ORDER)
    assert done.stdout.splitlines()[-2:] == ["c d a b", "c a"], done.stderr


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
