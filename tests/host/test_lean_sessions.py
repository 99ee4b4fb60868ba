"""What a replica opens first: which graph, and whether its weights are laid out beforehand."""

from __future__ import annotations

from typing import Any

import pytest

from pilotlight.artifact import BATCH_GRAPH, GRAPH, Artifact
from pilotlight.engine.policy import Policy
from pilotlight.engine.session import ALL_GRAPHS
from pilotlight.host import replica
from pilotlight.host.wire import ReplicaSpec

pytestmark = pytest.mark.model


def opened(monkeypatch: pytest.MonkeyPatch, artifact: Artifact, policy: Policy, *, for_long: bool) -> dict[str, Any]:
    asked: dict[str, Any] = {}
    monkeypatch.setattr(replica, "OnnxSession", lambda *_, **options: asked.update(options))
    replica.load(ReplicaSpec("r", str(artifact.path), 1, 64, policy, 2, None, 0.0), for_long=for_long)
    return asked


@pytest.mark.parametrize("for_long", [True, False])
def test_only_a_template_lays_out_what_can_do_without(
    monkeypatch: pytest.MonkeyPatch, demo_hybrid: Artifact, for_long: bool
) -> None:
    asked = opened(monkeypatch, demo_hybrid, Policy(), for_long=for_long)
    assert asked == {"graphs": (BATCH_GRAPH,), "prepacks": for_long}


def test_a_graph_of_int4_products_is_always_laid_out(monkeypatch: pytest.MonkeyPatch, demo_int4: Artifact) -> None:
    assert opened(monkeypatch, demo_int4, Policy(), for_long=False) == {"graphs": (GRAPH,), "prepacks": True}


def test_a_deterministic_function_has_all_graphs_from_the_start(
    monkeypatch: pytest.MonkeyPatch, demo_hybrid: Artifact
) -> None:
    asked = opened(monkeypatch, demo_hybrid, Policy(deterministic=True), for_long=False)
    assert asked == {"graphs": ALL_GRAPHS, "prepacks": True}
