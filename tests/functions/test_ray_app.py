"""The Ray application as Ray takes it, its manifests, and the whole cluster as a soak run."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml  # type: ignore[import-untyped]

from pilotlight.artifact import Artifact
from pilotlight.config import load_settings

ROOT = Path(__file__).parents[2]
PYTHON = ROOT / ".venv-ray" / "bin" / "python"
INFRA = ROOT / "infra" / "ray"

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
    print(name, config.max_ongoing_requests, *((scaling.min_replicas, scaling.max_replicas) if scaling else ()))
"""


def run_with_ray(*command: str, timeout_s: float = 120.0) -> subprocess.CompletedProcess[str]:
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
    ],
)
def test_what_cannot_be_deployed_is_refused(
    toy_artifact: Artifact, tmp_path: Path, cluster: str, ledger: str, problem: str
) -> None:
    done = run_with_ray("-c", BUILD, str(config(tmp_path / "p.toml", toy_artifact, cluster, ledger)))
    assert done.returncode == 1
    assert problem in done.stderr


def manifests(name: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((INFRA / name).read_text(encoding="utf-8")))


def test_the_manifest_of_the_service_names_what_there_is(tmp_path: Path) -> None:
    service, config_map = manifests("rayservice.yaml")
    assert (service["apiVersion"], service["kind"]) == ("ray.io/v1", "RayService")
    serve = yaml.safe_load(service["spec"]["serveConfigV2"])
    (application,) = serve["applications"]
    module, _, function = application["import_path"].partition(":")
    assert f"def {function}(" in (ROOT / "functions" / "ray_app" / f"{module}.py").read_text()
    written = tmp_path / "pilotlight.toml"
    written.write_text(config_map["data"]["pilotlight.toml"])
    settings = load_settings(written, {})
    assert settings.host.ledger.startswith("postgresql://")
    cluster = service["spec"]["rayClusterConfig"]
    assert cluster["rayVersion"] in (ROOT / "pyproject.toml").read_text()
    assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    (gateway,) = settings.cluster.gateway_resources
    assert gateway in cluster["headGroupSpec"]["rayStartParams"]["resources"]
    for group in cluster["workerGroupSpecs"]:
        grace_s = group["template"]["spec"]["terminationGracePeriodSeconds"]
        assert grace_s > settings.host.drain_timeout_s


def test_the_autoscaler_of_hosts_asks_for_metrics_that_there_are() -> None:
    (scaled,) = manifests("keda.yaml")
    from pilotlight.api.metrics import GAUGES

    for trigger in scaled["spec"]["triggers"]:
        query = trigger["metadata"]["query"]
        assert any(name in query for name in GAUGES), query


@pytest.mark.soak
@pytest.mark.e2e
@needs_ray
def test_a_cluster_loses_a_node_and_drains_one_without_losing_a_token(demo_int4: Artifact) -> None:
    if os.geteuid() != 0 or shutil.which("ip") is None:
        pytest.skip("network namespaces need root and the program ip")
    done = run_with_ray("bench/cluster_demo.py", str(demo_int4.path), timeout_s=600.0)
    sys.stdout.write(done.stdout)
    assert done.returncode == 0, done.stderr[-3000:]
