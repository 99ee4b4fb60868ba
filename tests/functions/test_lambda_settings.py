"""What the environment of a Lambda function means."""

from __future__ import annotations

from pathlib import Path

import pytest

from event import Reading
from lambda_settings import LambdaSettings, load_lambda_settings
from pilotlight.errors import ConfigError


def load(**environment: str) -> LambdaSettings:
    return load_lambda_settings({"PILOTLIGHT_ARTIFACT": "/opt/demo-int4", **environment})


def test_an_artifact_is_enough() -> None:
    settings = load()
    assert (settings.name, settings.function.artifact) == ("demo-int4", "/opt/demo-int4")
    assert (settings.num_pollers, settings.function.num_slots, settings.function.num_threads) == (1, 1, None)
    assert (settings.url_reading, settings.ledger_table, settings.has_snapshots) == (Reading.HTTP_STREAM, None, False)
    assert settings.host.ledger == "/tmp/pilotlight.db"
    assert settings.host.cache_dir == ""


@pytest.mark.parametrize(("memory_mib", "num_threads"), [(512, 1), (1769, 1), (3538, 2), (10240, 6)])
def test_the_threads_are_those_that_the_memory_pays_for(memory_mib: int, num_threads: int) -> None:
    assert load(AWS_LAMBDA_FUNCTION_MEMORY_SIZE=str(memory_mib)).function.num_threads == num_threads


def test_every_invocation_at_a_time_has_a_poller_and_a_slot() -> None:
    settings = load(AWS_LAMBDA_MAX_CONCURRENCY="16")
    assert (settings.num_pollers, settings.function.num_slots) == (16, 16)


def test_a_snapshots_copies_share_no_sandbox() -> None:
    assert load(AWS_LAMBDA_LOG_STREAM_NAME="a").environment == "a"
    copied = load(AWS_LAMBDA_LOG_STREAM_NAME="a", AWS_LAMBDA_INITIALIZATION_TYPE="snap-start")
    assert (copied.environment, copied.has_snapshots) == (None, True)


def test_a_platform_that_proves_nothing_serves_nobody_who_requires_it(tmp_path: Path) -> None:
    config = tmp_path / "pilotlight.toml"
    config.write_text("[confidential]\nrequire_tee = true\n")
    with pytest.raises(ConfigError, match="the label is 'none', and 'hardware' is required"):
        load(PILOTLIGHT_CONFIG=str(config))


def test_a_configuration_names_and_prices_the_function(tmp_path: Path) -> None:
    config = tmp_path / "pilotlight.toml"
    prices = '[functions.chat.prices]\nper_invocation = "0.01"\n'
    config.write_text(f'[functions.chat]\nartifact = "/opt/artifact"\n{prices}')
    settings = load_lambda_settings({"PILOTLIGHT_CONFIG": str(config)})
    assert (settings.name, settings.function.artifact) == ("chat", "/opt/artifact")
    assert settings.function.prices == {"per_invocation": "0.01"}
    assert load(PILOTLIGHT_CONFIG=str(config)).function.artifact == "/opt/demo-int4"
    config.write_text('[functions.a]\nartifact = "a"\n[functions.b]\nartifact = "b"\n')
    with pytest.raises(ConfigError, match="defines 2 functions; a Lambda function serves one"):
        load(PILOTLIGHT_CONFIG=str(config))


def test_what_is_wrong_is_named() -> None:
    with pytest.raises(ConfigError, match="PILOTLIGHT_ARTIFACT is not set"):
        load_lambda_settings({})
    with pytest.raises(ConfigError, match="PILOTLIGHT_INVOKE_MODE is 'buffer'; expected one of RESPONSE_STREAM, BUFF"):
        load(PILOTLIGHT_INVOKE_MODE="buffer")
    with pytest.raises(ConfigError, match="AWS_LAMBDA_MAX_CONCURRENCY is 'many'; expected a number"):
        load(AWS_LAMBDA_MAX_CONCURRENCY="many")
