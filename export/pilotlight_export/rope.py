"""The rotary settings in a config.json: both ways of writing them, which are supported, and what context they allow."""

from __future__ import annotations

from typing import Any

from pilotlight_export.errors import SourceError, UnsupportedModel
from pilotlight_export.families import LONG_ROPE, Family

LOCAL_LAYERS, GLOBAL_LAYERS = "sliding_attention", "full_attention"


def with_older_rope_keys(config: dict[str, Any]) -> dict[str, Any]:
    """Rewrite the ``rope_parameters`` of transformers 5 as transformers 4 reads them; other configs stay as they are.

    Raises:
        SourceError: they are malformed.
        UnsupportedModel: they have no older form.
    """
    try:
        return _with_older_rope_keys(config)
    except (KeyError, TypeError, AttributeError) as error:
        raise SourceError(f"config.json has malformed rope_parameters ({error!r})") from error


def _with_older_rope_keys(config: dict[str, Any]) -> dict[str, Any]:
    parameters = config.get("rope_parameters")
    if not parameters or "rope_theta" in config:
        return config
    rest = {key: value for key, value in config.items() if key != "rope_parameters"}
    if "rope_theta" in parameters:
        return rest | _older(parameters)
    if set(parameters) != {LOCAL_LAYERS, GLOBAL_LAYERS} or _rope_type(parameters[LOCAL_LAYERS]) != "default":
        raise UnsupportedModel(f"rope_parameters for {', '.join(sorted(parameters))} cannot be written as rope_scaling")
    local_theta = parameters[LOCAL_LAYERS]["rope_theta"]
    return rest | _older(parameters[GLOBAL_LAYERS]) | {"rope_local_base_freq": local_theta}


def check_rope(config: dict[str, Any], family: Family) -> None:
    """Refuse a rotary scaling that the family is not exported with.

    Raises:
        SourceError: it is malformed.
        UnsupportedModel: the scaling is another one.
    """
    found = _rope_type(_scaling(config))
    if found not in family.rope_types:
        supported = ", ".join(sorted(family.rope_types))
        raise UnsupportedModel(f"rope scaling {found!r} is not supported in {family.name}; supported: {supported}")


def usable_context_tokens(config: dict[str, Any]) -> int:
    """Return the longest text for which the angles depend on the position alone.

    With longrope the angles of all positions change when a text outgrows the original context. Keys in the KV cache
    keep the angles that they were written with, so such a model is exported for texts up to there.
    """
    max_tokens = int(config["max_position_embeddings"])
    if _rope_type(_scaling(config)) not in LONG_ROPE:
        return max_tokens
    return min(max_tokens, int(config["original_max_position_embeddings"]))


def _scaling(config: dict[str, Any]) -> dict[str, Any]:
    scaling = config.get("rope_scaling") or {}
    if not isinstance(scaling, dict):
        raise SourceError(f"config.json has a malformed rope_scaling ({scaling!r})")
    return scaling


def _rope_type(scaling: dict[str, Any]) -> str:
    return str(scaling.get("rope_type", scaling.get("type", "default")))


def _older(parameters: dict[str, Any]) -> dict[str, Any]:
    scaling = {key: value for key, value in parameters.items() if key != "rope_theta"}
    older: dict[str, Any] = {"rope_theta": parameters["rope_theta"]}
    for key in ("partial_rotary_factor", *_beside_longrope(scaling)):
        if key in scaling:
            older[key] = scaling.pop(key)
    if _rope_type(scaling) in LONG_ROPE:  # Phi-3's own check knows no other key
        scaling["type"] = scaling.pop("rope_type")
    if _rope_type(scaling) != "default":
        older["rope_scaling"] = scaling
    return older


def _beside_longrope(scaling: dict[str, Any]) -> list[str]:
    return ["original_max_position_embeddings"] if _rope_type(scaling) in LONG_ROPE else []
