"""What the platform and the image say about the one function that this process serves."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import msgspec

from event import Reading
from pilotlight.config import FunctionSettings, HostSettings, load_settings
from pilotlight.errors import ConfigError
from pilotlight.tee import TeeLabel, require_hardware

MIB_PER_VCPU = 1769
"""The platform grants processor time in proportion to memory. Source: the AWS Lambda developer guide, "Memory"."""
MAX_ANSWER_TOKENS = 2048
MAX_BODY_BYTES = 6 * 1024 * 1024
SCRATCH_LEDGER = "/tmp/pilotlight.db"  # noqa: S108 - the only directory that can be written, and nobody else's
INVOKE_MODES = {"RESPONSE_STREAM": Reading.HTTP_STREAM, "BUFFERED": Reading.HTTP_OBJECT}


@dataclass(frozen=True, slots=True)
class LambdaSettings:
    """One function, where its records go, and how the platform calls.

    ``environment`` names the sandbox; a process that crashes is followed by another one in the same sandbox.
    """

    name: str
    function: FunctionSettings
    host: HostSettings
    ledger_table: str | None
    requires_keys: bool
    environment: str | None
    url_reading: Reading
    num_pollers: int
    has_snapshots: bool


def load_lambda_settings(environment: Mapping[str, str] = os.environ) -> LambdaSettings:
    """Read PILOTLIGHT_* and what Lambda sets itself.

    Raises:
        ConfigError: no artifact is named, a setting is malformed, or hardware that proves itself is required.
    """
    num_pollers = _count("AWS_LAMBDA_MAX_CONCURRENCY", environment.get("AWS_LAMBDA_MAX_CONCURRENCY", "1"))
    has_snapshots = environment.get("AWS_LAMBDA_INITIALIZATION_TYPE") == "snap-start"
    config = environment.get("PILOTLIGHT_CONFIG")
    settings = load_settings(None if config is None else Path(config), environment)
    require_hardware(settings.confidential.require_tee, TeeLabel.NONE)  # the platform has nothing to prove it with
    name, function = _only_function(settings.functions, environment)
    return LambdaSettings(
        name=name,
        function=_sized(function, num_pollers, environment),
        host=_host(settings.host, environment),
        ledger_table=environment.get("PILOTLIGHT_LEDGER_TABLE"),
        requires_keys=_requires_keys(environment),
        environment=None if has_snapshots else environment.get("AWS_LAMBDA_LOG_STREAM_NAME"),
        url_reading=_url_reading(environment.get("PILOTLIGHT_INVOKE_MODE", "RESPONSE_STREAM")),
        num_pollers=num_pollers,
        has_snapshots=has_snapshots,
    )


def _only_function(
    functions: Mapping[str, FunctionSettings], environment: Mapping[str, str]
) -> tuple[str, FunctionSettings]:
    """Return the function of the configuration with the environment's artifact, or one named like that artifact."""
    artifact = environment.get("PILOTLIGHT_ARTIFACT")
    if len(functions) > 1:
        raise ConfigError(f"PILOTLIGHT_CONFIG defines {len(functions)} functions; a Lambda function serves one")
    for name, function in functions.items():
        return name, msgspec.structs.replace(function, artifact=artifact or function.artifact)
    if not artifact:
        raise ConfigError("PILOTLIGHT_ARTIFACT is not set; expected the directory of an artifact")
    # in S3 a digest may follow the path
    return Path(artifact.partition("#")[0]).resolve().name, FunctionSettings(artifact=artifact)


def _sized(function: FunctionSettings, num_pollers: int, environment: Mapping[str, str]) -> FunctionSettings:
    """Fit a function to the sandbox: a slot for each invocation at a time, a thread for each vCPU that is paid for.

    An answer is bounded, since a client that leaves is not noticed and the rest of its answer is paid for.
    """
    memory_mib = environment.get("AWS_LAMBDA_FUNCTION_MEMORY_SIZE")
    if function.num_threads is None and memory_mib is not None:
        num_vcpus = _count("AWS_LAMBDA_FUNCTION_MEMORY_SIZE", memory_mib) / MIB_PER_VCPU
        function = msgspec.structs.replace(function, num_threads=max(1, round(num_vcpus)))
    return msgspec.structs.replace(
        function, num_slots=num_pollers, max_answer_tokens=function.max_answer_tokens or MAX_ANSWER_TOKENS
    )


def _host(host: HostSettings, environment: Mapping[str, str]) -> HostSettings:
    """Keep to the writable directory. A graph is loaded once in a sandbox, so a cache pays only inside the image."""
    scratch = {} if "PILOTLIGHT_LEDGER" in environment else {"ledger": SCRATCH_LEDGER}
    uncached = {} if "PILOTLIGHT_CACHE_DIR" in environment else {"cache_dir": ""}
    return msgspec.structs.replace(host, max_body_bytes=MAX_BODY_BYTES, **scratch, **uncached)


def _requires_keys(environment: Mapping[str, str]) -> bool:
    given = environment.get("PILOTLIGHT_REQUIRE_KEYS", "false")
    if given not in ("true", "false"):
        raise ConfigError(f"PILOTLIGHT_REQUIRE_KEYS is {given!r}; expected true or false")
    if given == "true" and "PILOTLIGHT_LEDGER_TABLE" not in environment:
        raise ConfigError(
            "PILOTLIGHT_REQUIRE_KEYS is true, and there is no PILOTLIGHT_LEDGER_TABLE that could hold any"
        )
    return given == "true"


def _count(name: str, value: str) -> int:
    if not value.isdecimal() or int(value) < 1:
        raise ConfigError(f"{name} is {value!r}; expected a number")
    return int(value)


def _url_reading(mode: str) -> Reading:
    if mode not in INVOKE_MODES:
        raise ConfigError(f"PILOTLIGHT_INVOKE_MODE is {mode!r}; expected one of {', '.join(INVOKE_MODES)}")
    return INVOKE_MODES[mode]
