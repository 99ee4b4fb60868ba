"""Settings: frozen, read once per entry point. Explicit option over environment over file over default."""

from __future__ import annotations

import os
import re
import tomllib
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import msgspec
from msgspec import Meta

from pilotlight.errors import ConfigError

Positive = Annotated[int, Meta(ge=1)]
Port = Annotated[int, Meta(ge=0, le=65535)]
T = TypeVar("T", bound=msgspec.Struct)

FUNCTION_NAME = r"[A-Za-z0-9][A-Za-z0-9._/-]{0,127}"
OTHER_VARIABLES = (
    "PILOTLIGHT_ARTIFACT",
    "PILOTLIGHT_CONFIG",
    "PILOTLIGHT_INVOKE_MODE",
    "PILOTLIGHT_LEDGER_TABLE",
    "PILOTLIGHT_REQUIRE_KEYS",
)
"""Read by the serverless entry points, which have no command line."""
TABLES = ("host", "functions", "events", "confidential", "modal", "cluster")
LOOPBACK = ("127.0.0.1", "::1", "localhost")


class HostSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """``[host]``: where the server listens and what it keeps. An empty ``cache_dir`` keeps no optimized graphs.

    ``memory_budget_mb`` bounds all replicas together; 0 means most of what is free at the start. ``notices`` is where
    the host learns that its machine will be taken away, see ``host.notice``.
    """

    address: str = "127.0.0.1"
    port: Port = 8080
    ledger: str = "pilotlight.db"
    max_body_bytes: Positive = 4 * 1024 * 1024
    cache_dir: str = "~/.cache/pilotlight"
    response_store: str = ":memory:"
    response_ttl_s: Annotated[float, Meta(ge=0)] = 24 * 3600.0
    max_stored_response_bytes: Positive = 64 * 1024 * 1024
    drain_timeout_s: Annotated[float, Meta(ge=0, le=3600)] = 10.0
    memory_budget_mb: Annotated[int, Meta(ge=0)] = 0
    hang_timeout_s: Annotated[float, Meta(ge=1, le=3600)] = 30.0
    signing_key: str = ""
    capacity: Literal["on_demand", "spot"] = "on_demand"
    notices: str = ""
    resume_window_s: Annotated[float, Meta(gt=0, le=3600)] = 30.0
    resumable_streams: Literal["idempotent", "all"] = "idempotent"
    idempotency_ttl_s: Annotated[float, Meta(gt=0, le=31 * 86400)] = 86400.0
    max_kept_answer_bytes: Positive = 64 * 1024 * 1024
    resume_secret: str = ""
    resume_ttl_s: Annotated[float, Meta(gt=0, le=86400)] = 300.0


class FunctionSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """``[functions.NAME]``: one artifact and how much work it takes at a time.

    ``max_context_tokens`` left out means the model's own context, 4,096 at most; ``num_threads`` the machine's cores.
    ``max_inter_token_ms``, ``kv_budget_tokens``, ``deterministic``, ``prefix_cache_mb``,
    ``share_prefixes`` and ``speculation`` are explained in ``engine.policy``.
    After ``max_duration_s`` or ``max_answer_tokens`` an answer ends, whatever its request allows. ``prices`` are
    decimal strings, see ``metering.prices``, in one table or in several with a ``valid_from``;
    ``replica_cost_per_hour`` is in their currency. What scales and sleeps is described in docs/host.md. ``unseal`` says
    where the key of a sealed artifact comes from, see ``confidential.key_release``.
    With the ``provider`` "cuda" the model runs on a GPU, where slots and context shrink to what fits into
    ``hbm_budget_mb`` of its memory; 0 means most of what is free at the start.
    """

    artifact: str
    num_slots: Positive = 8
    max_context_tokens: Positive | None = None
    max_queued_requests: Annotated[int, Meta(ge=0)] = 64
    max_chunk_tokens: Positive = 256
    max_inter_token_ms: Annotated[float, Meta(gt=0)] | None = None
    kv_budget_tokens: Positive | None = None
    deterministic: bool = False
    prefix_cache_mb: Annotated[int, Meta(ge=0)] = 64
    share_prefixes: bool = False
    speculation: Literal["auto", "off"] = "auto"
    num_threads: Positive | None = None
    provider: Literal["cpu", "cuda"] = "cpu"
    hbm_budget_mb: Annotated[int, Meta(ge=0)] = 0
    max_duration_s: Annotated[float, Meta(gt=0, le=86400)] = 3600.0
    max_answer_tokens: Positive | None = None
    min_replicas: Annotated[int, Meta(ge=0, le=256)] = 0
    max_replicas: Annotated[int, Meta(ge=1, le=256)] = 1
    idle_timeout_s: Annotated[float, Meta(ge=0)] = 300.0
    sleep: Literal["light", "deep"] = "light"
    light_timeout_s: Annotated[float, Meta(ge=0)] = 3600.0
    max_queued_tokens: Positive = 65536
    replica_cost_per_hour: str = "0"
    prices: dict[str, str] | list[dict[str, str]] = {}
    unseal: dict[str, str] = {}


class EventSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """``[events]``: who is told of every usage record, as a CloudEvent from ``source`` over HTTP."""

    url: Annotated[str, Meta(pattern=r"^https?://[^/]+")]
    source: Annotated[str, Meta(min_length=1)] = "pilotlight"
    authorization: str = ""
    timeout_s: Annotated[float, Meta(gt=0, le=300)] = 10.0
    max_attempts: Positive = 20
    first_retry_s: Annotated[float, Meta(gt=0, le=600)] = 1.0


class ConfidentialSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """``[confidential]``: what proves where the functions run (docs/confidential.md).

    ``evidence`` is where it comes from; ``simulator`` is the file of the simulated chip, ``certificates`` one (PEM)
    with what the hardware does not give itself, ``collateral`` names files of what vendors publish and renew,
    ``tls_certificate`` that of what terminates TLS before this server. With ``require_tee`` nothing starts unless the
    label is ``hardware``. ``encrypted_prompts`` says whether requests with encrypted bodies are taken beside others, or
    no others. With ``receipts`` there is one of each invocation at ``/v1/receipts/{request_id}``, signed with
    ``host.signing_key``. They are kept in memory unless ``receipts_dir`` names a directory.
    """

    evidence: Literal["none", "hardware", "simulator"] = "none"
    require_tee: bool = False
    simulator: str = "~/.cache/pilotlight/simulator.pem"
    certificates: str = ""
    collateral: dict[Literal["crl", "tdx", "driver_rim", "vbios_rim"], str] = {}
    tls_certificate: str = ""
    encrypted_prompts: Literal["off", "accepted", "required"] = "off"
    receipts: bool = False
    receipts_dir: str = ""


NOT_CONFIDENTIAL = ConfidentialSettings()


class ModalSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """``[modal]``: what Modal is asked for, beside what ``[host]`` and the function say already. See docs/modal.md.

    The first of ``gpu`` that is free is taken; with the provider "cpu" none is asked for. ``secrets`` are names of
    Modal secrets whose variables the function sees. ``routing_region`` is where requests come in,
    ``compute_regions`` are where containers may run; none means anywhere.
    """

    app: Annotated[str, Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$")] = "pilotlight"
    gpu: tuple[str, ...] = ("L4", "A10", "L40S")
    cpu: Annotated[float, Meta(gt=0)] = 4.0
    memory_mb: Positive = 8192
    volume: str = "pilotlight-artifacts"
    secrets: tuple[str, ...] = ()
    startup_timeout_s: Positive = 300
    buffer_containers: Annotated[int, Meta(ge=0)] = 0
    routing_region: Annotated[str, Meta(min_length=1)] = "us-east"
    compute_regions: tuple[str, ...] = ()
    memory_snapshot: bool = True
    gpu_snapshot: bool = False
    unauthenticated: bool = False


class MixSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """``[cluster.mix]``: replicas on machines that may be taken away beside some that stay, see ``host.mix``.

    A replica on demand takes ``on_demand_resources`` of Ray's beside what every replica takes, one on a spot machine
    ``spot_resources``: that is what keeps them on their machines.
    """

    on_demand_floor: Annotated[int, Meta(ge=0)] = 1
    spot_surplus: Annotated[int, Meta(ge=0)] = 0
    fall_back: bool = True
    on_demand_resources: dict[str, float] = msgspec.field(default_factory=lambda: {"on_demand": 0.001})
    spot_resources: dict[str, float] = msgspec.field(default_factory=lambda: {"spot": 0.001})


class ClusterSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """``[cluster]``: how the functions lie on a Ray cluster. See docs/cluster.md.

    A gateway and a replica take so many logical CPUs and other resources of Ray's. The functions of one pool share
    replicas, each of which has at most ``max_functions_per_replica`` of them loaded; the others have replicas of their
    own. ``notices`` is where a node learns that it will be taken away, see ``host.notice``. With a ``mix``, every
    function or pool has replicas of two kinds.
    """

    gateways: Positive = 1
    gateway_cpus: Annotated[float, Meta(ge=0)] = 1.0
    gateway_resources: dict[str, float] = {}
    replica_cpus: Annotated[float, Meta(ge=0)] = 1.0
    replica_resources: dict[str, float] = {}
    pools: dict[str, tuple[str, ...]] = {}
    max_functions_per_replica: Positive = 4
    notices: str = ""
    mix: MixSettings | None = None


class Settings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """All of ``pilotlight.toml``."""

    host: HostSettings = HostSettings()
    functions: dict[str, FunctionSettings] = {}
    events: EventSettings | None = None
    confidential: ConfidentialSettings = NOT_CONFIDENTIAL
    modal: ModalSettings = ModalSettings()
    cluster: ClusterSettings = ClusterSettings()


def load_settings(path: Path | None, environment: Mapping[str, str] = os.environ, **options: object) -> Settings:
    """Merge defaults, the file, the environment and the given ``[host]`` options (None means not given).

    Raises:
        ConfigError: the file is missing or malformed, or a key or a value is not what was expected.
    """
    origin = str(path) if path is not None else "settings"
    content = read_toml(path) if path is not None else {}
    for key in content:
        if key not in TABLES:
            raise ConfigError(f"{origin}: unknown key {key} = {content[key]!r}; {_expected(key, TABLES)}")
    given = {key: value for key, value in options.items() if value is not None}
    from_file = _table(content.get("host", {}), origin, "host")
    _host(from_file, origin)  # so that a fault in the file is blamed on the file
    host = _host({**from_file, **_from_environment(environment), **given}, "environment or option")
    functions = {
        _function_name(name, origin): _parse(table, FunctionSettings, origin, f"functions.{name}")
        for name, table in _table(content.get("functions", {}), origin, "functions").items()
    }
    events = _parse(content["events"], EventSettings, origin, "events") if "events" in content else None
    confidential = _parse(content.get("confidential", {}), ConfidentialSettings, origin, "confidential")
    modal = _parse(content.get("modal", {}), ModalSettings, origin, "modal")
    cluster = _parse(content.get("cluster", {}), ClusterSettings, origin, "cluster")
    return Settings(host, functions, events, confidential, modal, cluster)


def read_toml(path: Path) -> dict[str, Any]:
    """Return the tables of a file.

    Raises:
        ConfigError: it cannot be read, or is no TOML.
    """
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: is not valid TOML ({error})") from error


def _from_environment(environment: Mapping[str, str]) -> dict[str, object]:
    """Read PILOTLIGHT_ADDRESS and so on, and the platforms' own PORT."""
    found: dict[str, object] = {}
    if "PORT" in environment:
        found["port"] = _number("PORT", environment["PORT"], int)
    fields = {f"PILOTLIGHT_{field.name.upper()}": field for field in msgspec.structs.fields(HostSettings)}
    for name in sorted(environment):
        if not name.startswith("PILOTLIGHT_") or name in OTHER_VARIABLES:
            continue
        if name not in fields:
            known = (*fields, *OTHER_VARIABLES)
            raise ConfigError(f"unknown variable {name} = {environment[name]!r}; {_expected(name, known)}")
        field, value = fields[name], environment[name]
        kind = type(field.default)
        found[field.name] = value if kind is str else _number(name, value, kind)
    return found


def _number(name: str, value: str, kind: type[int] | type[float]) -> int | float:
    try:
        return kind(value)
    except ValueError as error:
        raise ConfigError(f"{name} is {value!r}; expected a number") from error


def _table(value: object, origin: str, name: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ConfigError(f"{origin}: {name} is {value!r}; expected a table [{name}]")
    return value


def _host(table: dict[str, Any], origin: str) -> HostSettings:
    host = _parse(table, HostSettings, origin, "host")
    if not Path(host.ledger).name:
        raise ConfigError(f"{origin}: host.ledger is {host.ledger!r}; expected a file")
    return host


def _function_name(name: str, origin: str) -> str:
    if not re.fullmatch(FUNCTION_NAME, name):
        raise ConfigError(f"{origin}: function name {name!r}; expected letters, digits and . _ / -, 128 at most")
    return name


def _expected(key: str, known: Collection[str]) -> str:
    import difflib  # which only somebody who has mistyped pays for

    nearest = "".join(f"did you mean {one}? " for one in difflib.get_close_matches(key, known, n=1, cutoff=0.65))
    return f"{nearest}expected one of {', '.join(known)}"


def _parse(value: object, struct: type[T], origin: str, name: str) -> T:
    """Convert one table, naming key, value and expectation where that fails."""
    table = _table(value, origin, name)
    known = [field.name for field in msgspec.structs.fields(struct)]
    for key in table:
        if key not in known:
            raise ConfigError(f"{origin}: unknown key {name}.{key} = {table[key]!r}; {_expected(key, known)}")
    try:
        return msgspec.convert(table, struct)
    except msgspec.ValidationError as error:
        expectation, _, place = str(error).replace("`", "").partition(" - at $.")
        key = place.partition("[")[0]
        if key not in table:
            missing = expectation.removeprefix("Object missing required field ")
            raise ConfigError(f"{origin}: {name}.{missing} is missing") from error
        found = f"{name}.{key} is {table[key]!r}"
        raise ConfigError(f"{origin}: {found}; {expectation[:1].lower()}{expectation[1:]}") from error
