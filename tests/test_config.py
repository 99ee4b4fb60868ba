"""Settings: which source wins, what is refused and with which line, and the example file."""

from __future__ import annotations

import re
from pathlib import Path

import msgspec
import pytest

from pilotlight.confidential.key_release import UnsealSettings
from pilotlight.config import (
    LOOPBACK,
    ClusterSettings,
    ConfidentialSettings,
    EventSettings,
    FunctionSettings,
    HostSettings,
    MixSettings,
    ModalSettings,
    Settings,
    load_settings,
)
from pilotlight.errors import ConfigError
from pilotlight.metering.price_schedule import PriceSchedule
from pilotlight.metering.prices import PriceTable

EXAMPLE = Path(__file__).parents[1] / "pilotlight.example.toml"
HOST_KEYS = ", ".join(field.name for field in msgspec.structs.fields(HostSettings))
FUNCTION_KEYS = ", ".join(field.name for field in msgspec.structs.fields(FunctionSettings))


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "pilotlight.toml"


def refusal(path: Path | None, environment: dict[str, str], **options: object) -> str:
    with pytest.raises(ConfigError) as caught:
        load_settings(path, environment, **options)
    assert "\n" not in caught.value.message
    return caught.value.message


def test_without_anything_the_defaults_hold() -> None:
    assert load_settings(None, {}) == Settings(HostSettings(), {})
    assert load_settings(None, {}, port=None, ledger=None).host == HostSettings()


def test_option_over_environment_over_file_over_default(file: Path) -> None:
    file.write_text("[host]\nport = 1\nledger = 'file.db'\naddress = '::1'\n")
    environment = {"PILOTLIGHT_PORT": "2", "PILOTLIGHT_LEDGER": "environment.db"}
    host = load_settings(file, environment, port=3).host
    assert host == HostSettings(address="::1", port=3, ledger="environment.db")


def test_a_file_defines_functions(file: Path) -> None:
    file.write_text('[functions."org/my.model-2"]\nartifact = "a"\nnum_slots = 2\n[functions.other]\nartifact = "b"\n')
    functions = load_settings(file, {}).functions
    assert functions == {
        "org/my.model-2": FunctionSettings(artifact="a", num_slots=2),
        "other": FunctionSettings(artifact="b"),
    }


def test_an_unknown_variable_is_an_error() -> None:
    assert refusal(None, {"PILOTLIGHT_PROT": "1"}) == (
        "unknown variable PILOTLIGHT_PROT = '1'; did you mean PILOTLIGHT_PORT? "
        "expected one of PILOTLIGHT_ADDRESS, PILOTLIGHT_PORT, PILOTLIGHT_LEDGER, "
        "PILOTLIGHT_MAX_BODY_BYTES, PILOTLIGHT_CACHE_DIR, PILOTLIGHT_RESPONSE_STORE, "
        "PILOTLIGHT_RESPONSE_TTL_S, PILOTLIGHT_MAX_STORED_RESPONSE_BYTES, PILOTLIGHT_DRAIN_TIMEOUT_S, "
        "PILOTLIGHT_MEMORY_BUDGET_MB, PILOTLIGHT_HANG_TIMEOUT_S, "
        "PILOTLIGHT_SIGNING_KEY, PILOTLIGHT_CAPACITY, PILOTLIGHT_NOTICES, "
        "PILOTLIGHT_RESUME_WINDOW_S, PILOTLIGHT_RESUMABLE_STREAMS, PILOTLIGHT_IDEMPOTENCY_TTL_S, "
        "PILOTLIGHT_MAX_KEPT_ANSWER_BYTES, PILOTLIGHT_RESUME_SECRET, PILOTLIGHT_RESUME_TTL_S, "
        "PILOTLIGHT_ARTIFACT, PILOTLIGHT_CONFIG, PILOTLIGHT_INVOKE_MODE, PILOTLIGHT_LEDGER_TABLE, "
        "PILOTLIGHT_REQUIRE_KEYS"
    )
    assert load_settings(None, {"PILOTLIGHT_ARTIFACT": "demo"}).host == HostSettings()


def test_every_host_setting_has_its_variable() -> None:
    environment = {
        "PILOTLIGHT_ADDRESS": "localhost",
        "PILOTLIGHT_PORT": "0",
        "PILOTLIGHT_LEDGER": "other.db",
        "PILOTLIGHT_MAX_BODY_BYTES": "10",
        "PILOTLIGHT_CACHE_DIR": "",
        "PILOTLIGHT_RESPONSE_STORE": "responses.db",
        "PILOTLIGHT_RESPONSE_TTL_S": "60",
        "PILOTLIGHT_MAX_STORED_RESPONSE_BYTES": "20",
        "PILOTLIGHT_DRAIN_TIMEOUT_S": "0.5",
        "PILOTLIGHT_MEMORY_BUDGET_MB": "100",
        "PILOTLIGHT_HANG_TIMEOUT_S": "5",
        "PILOTLIGHT_SIGNING_KEY": "key.pem",
        "PILOTLIGHT_CAPACITY": "spot",
        "PILOTLIGHT_NOTICES": "aws",
        "PILOTLIGHT_RESUME_WINDOW_S": "2",
        "PILOTLIGHT_RESUMABLE_STREAMS": "all",
        "PILOTLIGHT_IDEMPOTENCY_TTL_S": "3",
        "PILOTLIGHT_MAX_KEPT_ANSWER_BYTES": "4",
        "PILOTLIGHT_RESUME_SECRET": "quite a long secret",
        "PILOTLIGHT_RESUME_TTL_S": "5",
    }
    names = {f"PILOTLIGHT_{field.name.upper()}" for field in msgspec.structs.fields(HostSettings)}
    assert names == environment.keys()
    assert load_settings(None, environment).host == HostSettings(
        "localhost", 0, "other.db", 10, "", "responses.db", 60.0, 20, 0.5, 100, 5.0, "key.pem", "spot", "aws", 2, "all",
        3, 4, "quite a long secret", 5.0,
    )  # fmt: skip


def test_port_is_honoured_and_our_own_variable_wins() -> None:
    assert load_settings(None, {"PORT": "5000"}).host.port == 5000
    assert load_settings(None, {"PORT": "5000", "PILOTLIGHT_PORT": "6000"}).host.port == 6000


@pytest.mark.parametrize("address", LOOPBACK)
def test_loopback_is_served(address: str) -> None:
    assert load_settings(None, {}, address=address).host.address == address


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("[", "is not valid TOML (Invalid initial character for a key part (at end of document))"),
        ("colour = 1", "unknown key colour = 1; expected one of host, functions, events, confidential, modal, cluster"),
        ("[hosts]\nport = 1", "unknown key hosts = {'port': 1}; did you mean host? "
         "expected one of host, functions, events, confidential, modal, cluster"),
        ("host = 1", "host is 1; expected a table [host]"),
        ("functions = []", "functions is []; expected a table [functions]"),
        ("[host]\nprot = 80", f"unknown key host.prot = 80; did you mean port? expected one of {HOST_KEYS}"),
        ("[host]\nport = '80'", "host.port is '80'; expected int, got str"),
        ("[host]\nport = true", "host.port is True; expected int, got bool"),
        ("[host]\nport = 65536", "host.port is 65536; expected int <= 65535"),
        ("[host]\nport = -1", "host.port is -1; expected int >= 0"),
        ("[host]\nledger = 1", "host.ledger is 1; expected str, got int"),
        ("[host]\nledger = ''", "host.ledger is ''; expected a file"),
        ("[host]\nledger = '/'", "host.ledger is '/'; expected a file"),
        ("[host]\nmax_body_bytes = 0", "host.max_body_bytes is 0; expected int >= 1"),
        ("[host]\ndrain_timeout_s = -1", "host.drain_timeout_s is -1; expected float >= 0.0"),
        ("[host]\ndrain_timeout_s = inf", "host.drain_timeout_s is inf; expected float <= 3600.0"),
        ("[functions]\na = 1", "functions.a is 1; expected a table [functions.a]"),
        ("[functions.a]", "functions.a.artifact is missing"),
        ("[functions.a]\nartifact = 1", "functions.a.artifact is 1; expected str, got int"),
        ("[functions.a]\nartifact = 'a'\nslots = 1", "unknown key functions.a.slots = 1; did you mean num_slots? "
         f"expected one of {FUNCTION_KEYS}"),
        ("[functions.a]\nartifact = 'a'\nnum_slots = 0", "functions.a.num_slots is 0; expected int >= 1"),
        ("[functions.a]\nartifact = 'a'\nprices = 1", "functions.a.prices is 1; expected object | array, got int"),
        ("[functions.a]\nartifact = 'a'\nprices.per_second = 0.1",
         "functions.a.prices is {'per_second': 0.1}; expected str, got float"),
        ("[functions.'a b']\nartifact = 'a'", "function name 'a b'; "
         "expected letters, digits and . _ / -, 128 at most"),
    ],
)  # fmt: skip
def test_a_bad_file(file: Path, text: str, problem: str) -> None:
    file.write_text(text)
    assert refusal(file, {}) == f"{file}: {problem}"


def test_a_file_that_cannot_be_read(tmp_path: Path, file: Path) -> None:
    assert refusal(file, {}) == f"{file}: cannot be read (No such file or directory)"
    assert refusal(tmp_path, {}) == f"{tmp_path}: cannot be read (Is a directory)"
    file.write_bytes(b"\xff")
    assert refusal(file, {}).startswith(f"{file}: is not valid TOML (")


@pytest.mark.parametrize(
    ("environment", "problem"),
    [
        ({"PORT": "web"}, "PORT is 'web'; expected a number"),
        ({"PORT": ""}, "PORT is ''; expected a number"),
        ({"PILOTLIGHT_PORT": "70000"}, "environment or option: host.port is 70000; expected int <= 65535"),
        ({"PILOTLIGHT_DRAIN_TIMEOUT_S": "soon"}, "PILOTLIGHT_DRAIN_TIMEOUT_S is 'soon'; expected a number"),
        ({"PILOTLIGHT_LEDGER": ""}, "environment or option: host.ledger is ''; expected a file"),
    ],
)
def test_a_bad_environment_is_not_blamed_on_the_file(file: Path, environment: dict[str, str], problem: str) -> None:
    file.write_text("[host]\nport = 1\n")
    assert refusal(file, environment) == problem


def test_the_example_holds_the_defaults() -> None:
    settings = load_settings(EXAMPLE, {})
    assert settings.host == HostSettings()
    assert settings.confidential == ConfidentialSettings()
    assert settings.cluster == ClusterSettings()
    (function,) = settings.functions.values()
    assert msgspec.structs.replace(function, prices={}) == FunctionSettings(artifact="artifacts/demo-int4")
    free = PriceSchedule.from_config({}, "prices")
    assert PriceSchedule.from_config(function.prices, "prices") == free
    assert settings.modal == ModalSettings()


def test_the_example_mentions_every_setting() -> None:
    keys = set(re.findall(r"^(?:# )?(\w+) = ", EXAMPLE.read_text(encoding="utf-8"), re.MULTILINE))
    tables = {"prices", "unseal", "mix"}
    structs = (
        HostSettings,
        FunctionSettings,
        EventSettings,
        UnsealSettings,
        ConfidentialSettings,
        ModalSettings,
        ClusterSettings,
        MixSettings,
    )
    expected = {field.name for struct in structs for field in msgspec.structs.fields(struct)} | {"valid_from"}
    expected |= {field.name.replace("_micros", "") for field in msgspec.structs.fields(PriceTable)}
    assert keys == expected - tables
