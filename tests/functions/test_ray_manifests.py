"""The manifests for Kubernetes, as far as that goes without a cluster: kinds, fields, and what they name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml  # type: ignore[import-untyped]

from pilotlight.api.metrics import GAUGES
from pilotlight.config import Settings, load_settings

ROOT = Path(__file__).parents[2]
INFRA = ROOT / "infra" / "ray"

FIELDS: dict[str, tuple[set[str], set[str]]] = {
    "RayService": (set(), {"serveConfigV2", "rayClusterConfig", "serveService"}),
    "RayCluster": (
        {"headGroupSpec"},
        {"workerGroupSpecs", "rayVersion", "enableInTreeAutoscaling", "autoscalerOptions", "suspend"},
    ),
    "HeadGroup": ({"rayStartParams", "template"}, {"serviceType", "headService", "enableIngress"}),
    "WorkerGroup": (
        {"groupName", "rayStartParams", "template", "minReplicas", "maxReplicas"},
        {"replicas", "numOfHosts", "scaleStrategy"},
    ),
    "AutoscalerOptions": (set(), {"resources", "image", "env", "idleTimeoutSeconds", "upscalingMode"}),
    "ScaledObject": (
        {"scaleTargetRef", "triggers"},
        {"pollingInterval", "cooldownPeriod", "minReplicaCount", "maxReplicaCount", "advanced", "fallback"},
    ),
    "Trigger": ({"type", "metadata"}, {"name", "metricType", "authenticationRef"}),
}
"""Which fields a spec must have and may have. Source: the API references of KubeRay (ray.io/v1) and KEDA (v1alpha1)."""


def check_fields(kind: str, spec: dict[str, Any]) -> None:
    required, optional = FIELDS[kind]
    assert required <= spec.keys() <= required | optional, (kind, spec.keys() ^ required)


def manifests(name: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((INFRA / name).read_text(encoding="utf-8")))


def settings_in(config_map: dict[str, Any], folder: Path) -> Settings:
    written = folder / "pilotlight.toml"
    written.write_text(config_map["data"]["pilotlight.toml"])
    return load_settings(written, {})


def pods(service: dict[str, Any]) -> list[dict[str, Any]]:
    cluster = service["spec"]["rayClusterConfig"]
    return [group["template"] for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"])]


def test_the_service_has_the_fields_that_kuberay_knows() -> None:
    service, _ = manifests("rayservice.yaml")
    assert (service["apiVersion"], service["kind"]) == ("ray.io/v1", "RayService")
    check_fields("RayService", service["spec"])
    cluster = service["spec"]["rayClusterConfig"]
    check_fields("RayCluster", cluster)
    check_fields("AutoscalerOptions", cluster["autoscalerOptions"])
    check_fields("HeadGroup", cluster["headGroupSpec"])
    for group in cluster["workerGroupSpecs"]:
        check_fields("WorkerGroup", group)
        assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        assert all(isinstance(value, str) for value in group["rayStartParams"].values()), "as for a command line"


def test_the_service_names_what_there_is(tmp_path: Path) -> None:
    service, config_map = manifests("rayservice.yaml")
    serve = yaml.safe_load(service["spec"]["serveConfigV2"])
    (application,) = serve["applications"]
    module, _, function = application["import_path"].partition(":")
    assert f"def {function}(" in (ROOT / "functions" / "ray_app" / f"{module}.py").read_text()
    settings = settings_in(config_map, tmp_path)
    assert settings.host.ledger.startswith("postgresql://")
    cluster = service["spec"]["rayClusterConfig"]
    assert cluster["rayVersion"] in (ROOT / "pyproject.toml").read_text()
    assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    for pod in pods(service)[1:]:
        assert pod["spec"]["terminationGracePeriodSeconds"] > settings.host.drain_timeout_s


def test_nodes_have_the_resources_that_are_asked_for(tmp_path: Path) -> None:
    service, config_map = manifests("rayservice.yaml")
    settings = settings_in(config_map, tmp_path).cluster
    cluster = service["spec"]["rayClusterConfig"]
    head, on_demand, spot = (
        json.loads(json.loads(group["rayStartParams"]["resources"]))
        for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"])
    )
    assert settings.mix is not None
    assert settings.gateway_resources.keys() <= head.keys()
    assert settings.mix.on_demand_resources.keys() <= on_demand.keys()
    assert settings.mix.spot_resources.keys() <= spot.keys()
    assert not spot.keys() & on_demand.keys()
    on_demand_group = cluster["workerGroupSpecs"][0]
    assert on_demand_group["maxReplicas"] >= settings.mix.on_demand_floor


def test_the_autoscaler_of_hosts_asks_for_metrics_that_there_are(tmp_path: Path) -> None:
    deployment, config_map, service, scaled = manifests("keda.yaml")
    assert (scaled["apiVersion"], scaled["kind"]) == ("keda.sh/v1alpha1", "ScaledObject")
    check_fields("ScaledObject", scaled["spec"])
    assert scaled["spec"]["scaleTargetRef"]["name"] == deployment["metadata"]["name"]
    assert service["spec"]["selector"] == deployment["spec"]["template"]["metadata"]["labels"]
    for trigger in scaled["spec"]["triggers"]:
        check_fields("Trigger", trigger)
        query = trigger["metadata"]["query"]
        assert any(name in query for name in GAUGES), query
        assert float(trigger["metadata"]["threshold"]) > 0
    host = settings_in(config_map, tmp_path).host
    pod = deployment["spec"]["template"]["spec"]
    assert pod["terminationGracePeriodSeconds"] > host.drain_timeout_s + 10, "streams first, then the records"
    (container,) = pod["containers"]
    assert container["ports"][0]["containerPort"] == host.port


def made_by_keda(scaled: dict[str, Any]) -> dict[str, Any]:
    """Return the HorizontalPodAutoscaler that KEDA makes of a ScaledObject, as far as we say what is in it."""
    spec = scaled["spec"]
    return {
        "apiVersion": "autoscaling/v2",
        "kind": "HorizontalPodAutoscaler",
        "metadata": {"name": "keda-hpa-pilotlight"},
        "spec": {
            "scaleTargetRef": {"apiVersion": "apps/v1", "kind": "Deployment", **spec["scaleTargetRef"]},
            "minReplicas": spec["minReplicaCount"],
            "maxReplicas": spec["maxReplicaCount"],
            "behavior": spec["advanced"]["horizontalPodAutoscalerConfig"]["behavior"],
            "metrics": [
                {
                    "type": "External",
                    "external": {
                        "metric": {"name": f"s{index}-prometheus"},
                        "target": {"type": "AverageValue", "averageValue": trigger["metadata"]["threshold"]},
                    },
                }
                for index, trigger in enumerate(spec["triggers"])
            ],
        },
    }


def kubernetes_kinds() -> list[tuple[str, dict[str, Any]]]:
    """Return what Kubernetes itself knows of our manifests, and what the operators would make of the rest."""
    service, config_map = manifests("rayservice.yaml")
    *of_hosts, scaled = manifests("keda.yaml")
    (attested,) = yaml.safe_load_all((ROOT / "infra" / "confidential" / "coco" / "pod.yaml").read_text("utf-8"))
    ray_pods = [
        {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "ray", **pod.get("metadata", {})}, "spec": pod["spec"]}
        for pod in pods(service)
    ]
    found = [config_map, *ray_pods, *of_hosts, made_by_keda(scaled), attested]
    return [(f"{index} {one['kind']}", one) for index, one in enumerate(found)]


@pytest.mark.parametrize("manifest", [pytest.param(one, id=name) for name, one in kubernetes_kinds()])
def test_kubernetes_schemas_accept_it(manifest: dict[str, Any]) -> None:
    schemas = pytest.importorskip("kubernetes_validate", reason="kubernetes-validate is not installed")
    schemas.validate(manifest, schemas.latest_version(), strict=True)


def test_the_schemas_refuse_a_field_that_is_not_there() -> None:
    schemas = pytest.importorskip("kubernetes_validate", reason="kubernetes-validate is not installed")
    pod = next(one for _, one in kubernetes_kinds() if one["kind"] == "Pod")
    wrong = {**pod, "spec": {**pod["spec"], "terminationGraceSeconds": 3}}
    with pytest.raises(schemas.ValidationError):
        schemas.validate(wrong, schemas.latest_version(), strict=True)
