"""The command line: help, exit statuses, what goes to standard output and what to standard error."""

from __future__ import annotations

import asyncio
import csv
import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import click
import msgspec
import pytest
from click.testing import CliRunner, Result

from pilotlight import __version__
from pilotlight.artifact import WEIGHTS, Artifact, open_artifact
from pilotlight.cli import main
from pilotlight.config import FunctionSettings, HostSettings, Settings
from pilotlight.engine.backend import EngineBackend
from pilotlight.engine.fake import FakeSession
from pilotlight.engine.policy import Policy
from pilotlight.function import Function
from pilotlight.metering.keyring import Keyring
from pilotlight.metering.keys import Limits
from pilotlight.metering.ledger import Ledger
from pilotlight.metering.ledger_reader import LedgerReader
from pilotlight.metering.machine_cost import ReplicaTime
from pilotlight.metering.outbox import Buried
from pilotlight.metering.prices import PriceTable
from pilotlight.metering.record import Admission, UsageRecord, final_record, utc_text
from pilotlight.metering.signing import Signer
from pilotlight.metering.usage import Timings, Usage
from pilotlight.request import FinishReason
from support import PRICES, VOCAB_SIZE, expected_tokens, toy_tokenizer, write_artifact

COMMANDS = {
    "serve": "Serve functions over the OpenAI API.",
    "invoke": "Answer one prompt on the terminal, without a server.",
    "export": "Turn a Hugging Face model into an artifact.",
    "verify": "Compare an artifact with its source again.",
    "evaluate": "Find the smallest artifact that is good enough.",
    "inspect": "Describe an artifact and verify its checksums.",
    "seal": "Encrypt an artifact for its recipients, and sign it.",
    "keyserver": "Give the keys of sealed artifacts for evidence.",
    "proxy": "Encrypt a client's prompts for a server that proves itself.",
    "receipt": "Verify receipts of invocations, offline.",
    "ps": "Show the functions of a running server.",
    "swap": "Serve another artifact under a function's name.",
    "bench": "Measure an artifact's speed, and where the time of a step goes.",
    "plan": "Say what a trace would cost on different machines.",
    "usage": "Show what was used and what it cost.",
    "keys": "Make, list, end and renew API keys.",
}
PROGRAM = Path(sys.executable).with_name("pilotlight")


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Run in an empty directory, without settings of the environment that the tests are run in."""
    for name in [name for name in os.environ if name == "PORT" or name.startswith("PILOTLIGHT_")]:
        monkeypatch.delenv(name)
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    return tmp_path / "cwd"


@pytest.fixture
def taken_port() -> Iterator[int]:
    """A port on which somebody else listens."""
    with socket.create_server(("127.0.0.1", 0)) as other:
        yield other.getsockname()[1]


def run(*arguments: object, stdin: str | None = None) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments], input=stdin, prog_name="pilotlight")


def failure(*arguments: object) -> str:
    """Run a command that fails, and return its one line on standard error."""
    result = run(*arguments)
    assert (result.exit_code, result.stdout) == (1, ""), result.output
    assert result.stderr.startswith("pilotlight: ")
    assert result.stderr.count("\n") == 1
    return result.stderr.removeprefix("pilotlight: ").rstrip("\n")


def wrong_usage(*arguments: object) -> str:
    """Run a command that is used wrongly, and return the last line on standard error, without "Error: "."""
    result = run(*arguments)
    assert (result.exit_code, result.stdout) == (2, ""), result.output
    usage, *_, problem = result.stderr.splitlines()
    assert usage.startswith("Usage: ")
    return problem.removeprefix("Error: ")


def test_help_lists_the_commands_in_order_and_in_whole_sentences() -> None:
    result = run("--help")
    listed = result.stdout.partition("Commands:\n")[2].splitlines()
    assert [line.split(maxsplit=1) for line in listed] == [[name, text] for name, text in COMMANDS.items()]


@pytest.mark.parametrize("command", ["serve", "invoke", "inspect", "usage"])
@pytest.mark.parametrize("option", ["-h", "--help"])
def test_each_command_explains_its_options(command: str, option: str) -> None:
    result = run(command, option)
    assert result.exit_code == 0
    assert result.stdout.startswith(f"Usage: pilotlight {command} ")
    loaded = main.get_command(click.Context(main), command)
    assert loaded is not None
    assert {param.opts[0] for param in loaded.params if param.opts[0].startswith("--")} <= set(result.stdout.split())


def test_version() -> None:
    done = subprocess.run([sys.executable, "-m", "pilotlight", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout == f"pilotlight, version {__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["sing"], "No such command 'sing'."),
        (["inspect"], "Missing argument 'ARTIFACT'."),
        (["invoke", "toy"], "Missing argument 'PROMPT'."),
        (["invoke", "toy", "hi", "--max-tokens", "0"], "Invalid value for '--max-tokens': 0 is not in the range x>=1."),
        (["invoke", "toy", "hi", "--temperature", "3"],
         "Invalid value for '--temperature': 3.0 is not in the range 0<=x<=2."),
        (["invoke", "toy", "hi", "--seed", str(2**63)], f"Invalid value for '--seed': {2**63} is not in the range "
         f"{-(2**63)}<=x<={2**63 - 1}."),
        (["serve"], "name either an ARTIFACT or a --config file"),
        (["serve", "toy", "--config", "pilotlight.toml"], "name either an ARTIFACT or a --config file"),
        (["serve", "--config", "pilotlight.toml", "--slots", "2"],
         "--name and --slots go with an ARTIFACT; a --config file has its own"),
        (["serve", "--config", "pilotlight.toml", "--name", "toy"],
         "--name and --slots go with an ARTIFACT; a --config file has its own"),
        (["serve", "toy", "--port", "65536"], "Invalid value for '--port': 65536 is not in the range 0<=x<=65535."),
        (["serve", "toy", "--name", "a b"], "'a b' cannot be the name of a function; choose a --name of letters, "
         "digits and . _ / -, 128 at most"),
        (["serve", "toy", "--name", ""], "'' cannot be the name of a function; choose a --name of letters, "
         "digits and . _ / -, 128 at most"),
        (["usage", "--limit", "3"], "--function and --limit go with --records"),
        (["usage", "--function", "toy"], "--function and --limit go with --records"),
        (["usage", "--records", "--margin"], "choose one of --by, --records, --margin and --reprice"),
        (["usage", "--reprice"], "--reprice and --config go together"),
        (["usage", "--since", "24"], "Invalid value for --since: '24' is not a span such as 24h or 7d"),
        (["usage", "--since", "h"], "Invalid value for --since: 'h' is not a span such as 24h or 7d"),
        (["usage", "--since", "²d"], "Invalid value for --since: '²d' is not a span such as 24h or 7d"),
        (["usage", "--since", "999999d"], "Invalid value for --since: '999999d' is too long ago"),
    ],
)  # fmt: skip
def test_wrong_usage_is_status_2(arguments: list[str], problem: str) -> None:
    assert wrong_usage(*arguments) == problem


class TestInspect:
    def test_a_person_reads_what_it_is(self, tmp_path: Path) -> None:
        measured = {"mean_kl": 0.0419999, "num_positions": 7}
        path = write_artifact(tmp_path / "toy", recipe={"block": 32}, verification=measured)
        result = run("inspect", path)
        lines = dict(line.split(maxsplit=1) for line in result.stdout.splitlines())
        assert result.exit_code == 0
        assert lines["artifact"] == open_artifact(path).digest
        assert lines["precision"] == "fp32 (block 32)"
        assert lines["verification"] == "mean_kl 0.042"
        assert lines["num_positions"] == "7"
        assert lines["shapes"] == "1 layers, 1 heads of 16 (1 for keys and values), vocabulary 258"
        assert lines["model.onnx"].startswith("8 bytes")
        assert lines["checksums"].startswith("all 5 files verified, ")

    def test_what_is_empty_is_left_out(self, toy_artifact: Artifact) -> None:
        lines = run("inspect", toy_artifact.path).stdout.splitlines()
        assert "precision                fp32" in lines
        assert not [line for line in lines if line.startswith(("verification", "tools"))]

    def test_a_program_reads_the_manifest(self, toy_artifact: Artifact) -> None:
        result = run("inspect", toy_artifact.path, "--json")
        assert result.stdout.encode() == toy_artifact.manifest.encode()

    def test_an_altered_file(self, tmp_path: Path) -> None:
        path = write_artifact(tmp_path / "toy")
        (path / WEIGHTS).write_bytes(b"NO WEIGHTS")
        expected = f"{path}/model.onnx.data: was altered: its sha256 is not the one in the manifest"
        assert failure("inspect", path) == expected
        assert failure("inspect", path, "--json") == expected

    def test_a_failure_is_status_1_and_one_line_of_the_process_too(self, tmp_path: Path) -> None:
        command = [sys.executable, "-m", "pilotlight", "inspect", str(tmp_path / "none")]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert (done.returncode, done.stdout) == (1, "")
        assert done.stderr == f"pilotlight: {tmp_path}/none: does not exist\n"


class TestServe:
    @pytest.fixture
    def served(self, monkeypatch: pytest.MonkeyPatch) -> list[Settings]:
        """What would have been served."""
        found: list[Settings] = []
        monkeypatch.setattr("pilotlight.host.server.run", lambda settings, on_ready: found.append(settings))
        return found

    def test_an_artifact_is_named_after_its_directory(self, toy_artifact: Artifact, served: list[Settings]) -> None:
        assert run("serve", toy_artifact.path, "--port", 0).exit_code == 0
        (settings,) = served
        assert settings.host.port == 0
        assert settings.functions == {"toy": FunctionSettings(artifact=str(toy_artifact.path))}

    def test_options_become_settings(self, served: list[Settings]) -> None:
        options = ["--name", "org/mine", "--slots", 3, "--address", "::1", "--ledger", "u.db"]
        assert run("serve", "some/where", *options).exit_code == 0
        (settings,) = served
        assert settings.functions == {"org/mine": FunctionSettings(artifact="some/where", num_slots=3)}
        assert (settings.host.address, settings.host.ledger) == ("::1", "u.db")

    def test_options_win_over_the_file(self, elsewhere: Path, served: list[Settings]) -> None:
        (elsewhere / "my.toml").write_text("[host]\nport = 1\nledger = 'f.db'\n[functions.a]\nartifact = 'x'\n")
        assert run("serve", "--config", "my.toml", "--port", 2).exit_code == 0
        (settings,) = served
        assert (settings.host.port, settings.host.ledger) == (2, "f.db")
        assert settings.functions == {"a": FunctionSettings(artifact="x")}

    def test_a_file_without_functions(self, elsewhere: Path) -> None:
        (elsewhere / "my.toml").touch()
        assert failure("serve", "--config", "my.toml") == "my.toml: defines no function; add a table [functions.NAME]"

    def test_a_file_that_is_not_there(self) -> None:
        assert failure("serve", "--config", "my.toml") == "my.toml: cannot be read (No such file or directory)"

    def test_an_address_for_everybody(self) -> None:
        assert failure("serve", "toy", "--address", "0.0.0.0", "--port", 0) == (
            "host.address is '0.0.0.0'; without keys the server listens on loopback only (127.0.0.1, ::1, localhost); "
            "make a key with: pilotlight keys create"
        )

    def test_a_port_that_is_taken(self, toy_artifact: Artifact, taken_port: int, elsewhere: Path) -> None:
        command = [sys.executable, "-m", "pilotlight", "serve", str(toy_artifact.path), "--port", str(taken_port)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert (done.returncode, done.stdout) == (1, "")
        assert (
            done.stderr
            == f"pilotlight: cannot listen on 127.0.0.1:{taken_port}: Address already in use; choose another --port\n"
        )
        assert [*elsewhere.iterdir()] == []

    def test_an_artifact_that_is_not_there(self, elsewhere: Path) -> None:
        assert failure("serve", "none", "--port", 0) == "none: does not exist"

    def test_an_artifact_that_was_altered(self, elsewhere: Path) -> None:
        graph = write_artifact(elsewhere / "altered") / "model.onnx"
        graph.write_bytes(graph.read_bytes()[::-1])
        expected = "altered/model.onnx: was altered: its sha256 is not the one in the manifest"
        assert failure("serve", "altered", "--port", 0) == expected

    def test_a_context_that_the_model_has_not(self, elsewhere: Path, toy_artifact: Artifact) -> None:
        table = f"[functions.toy]\nartifact = '{toy_artifact.path}'\nmax_context_tokens = 65\n"
        (elsewhere / "my.toml").write_text(f"[host]\nport = 0\n{table}")
        expected = "functions.toy.max_context_tokens is 65; the model's context is 64"
        assert failure("serve", "--config", "my.toml") == expected

    def test_a_context_that_the_budget_cannot_hold(self, elsewhere: Path, toy_artifact: Artifact) -> None:
        table = f"[functions.toy]\nartifact = '{toy_artifact.path}'\nmax_context_tokens = 60\nkv_budget_tokens = 59\n"
        (elsewhere / "my.toml").write_text(f"[host]\nport = 0\n{table}")
        expected = "functions.toy.kv_budget_tokens is 59; one request alone may need the 60 of max_context_tokens"
        assert failure("serve", "--config", "my.toml") == expected


class TestInvoke:
    @pytest.fixture(autouse=True)
    def on_a_fake_session(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def open_function(name: str, settings: FunctionSettings, host: HostSettings, ledger: Ledger) -> Function:
            backend = EngineBackend(FakeSession(VOCAB_SIZE, settings.num_slots), 0, Policy.from_settings(settings))
            artifact = open_artifact(Path(settings.artifact))
            function = Function(name, artifact, backend, ledger, PriceTable.from_config(PRICES), max_context_tokens=64)
            backend.start()
            return function

        monkeypatch.setattr("pilotlight.host.inprocess.open_function", open_function)

    @staticmethod
    def answer(prompt: str, max_new_tokens: int) -> str:
        tokenizer = toy_tokenizer()
        ids = tokenizer.encode(prompt, add_special_tokens=False).ids
        text: str = tokenizer.decode(expected_tokens(ids, max_new_tokens), skip_special_tokens=True)
        return text.rstrip("\ufffd")

    def test_the_answer_is_the_output_and_the_usage_is_beside_it(self, toy_artifact: Artifact) -> None:
        result = run("invoke", toy_artifact.path, "hi", "--max-tokens", 5)
        prompt = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
        assert result.exit_code == 0
        assert result.stdout == self.answer(prompt, 5) + "\n"
        assert result.stderr.startswith("21 + 5 tokens, first after ")
        assert result.stderr.endswith(" ms, cost 31000000 micro-USD (length)\n")

    @pytest.mark.parametrize("arguments", [["hello", "--raw"], ["-", "--raw"]])
    def test_raw_continues_the_text_as_it_stands(self, toy_artifact: Artifact, arguments: list[str]) -> None:
        result = run("invoke", toy_artifact.path, *arguments, "--max-tokens", 4, stdin="hello")
        assert result.stdout == self.answer("hello", 4) + "\n"

    def test_json_is_the_text_with_its_record(self, toy_artifact: Artifact) -> None:
        result = run("invoke", toy_artifact.path, "hello", "--raw", "--max-tokens", 4, "--json", "--ledger", "u.db")
        printed = json.loads(result.stdout)
        assert printed["text"] == self.answer("hello", 4)
        assert printed["usage"]["completion_tokens"] == 4
        with LedgerReader(Path("u.db")) as reader:
            (record,) = reader.records()
        assert record.event_id == printed["usage"]["event_id"]
        assert result.stderr == ""

    def test_an_empty_prompt(self, toy_artifact: Artifact) -> None:
        assert failure("invoke", toy_artifact.path, "", "--raw") == "the prompt is empty"

    def test_a_prompt_that_is_too_long(self, toy_artifact: Artifact) -> None:
        assert failure("invoke", toy_artifact.path, "x" * 64, "--raw") == (
            "the prompt has 64 tokens; this model's maximum context length is 64, "
            "of which at least one is left for the answer"
        )

    def test_no_artifact(self, elsewhere: Path) -> None:
        assert failure("invoke", "none", "hi") == f"{elsewhere}/none: does not exist"


class TestUsage:
    @pytest.fixture
    def ledger(self, elsewhere: Path) -> Path:
        """Three finished invocations, of which one is two days old, and an open one."""
        path = elsewhere / "pilotlight.db"
        with Ledger(path) as ledger:
            asyncio.run(_fill(ledger))
        return path

    @pytest.mark.usefixtures("ledger")
    def test_totals_are_a_table(self) -> None:
        heading, new, old = run("usage").stdout.splitlines()
        assert (
            heading.split() == "function num_invocations prompt_tokens completion_tokens cost_micros currency".split()
        )
        assert new.split() == ["new", "2", "20", "5", "30000000", "USD"]
        assert old.split() == ["old", "1", "10", "1", "12000000", "USD"]

    @pytest.mark.usefixtures("ledger")
    def test_records_are_a_table_the_latest_first(self) -> None:
        heading, *rows = run("usage", "--records").stdout.splitlines()
        assert heading.split()[:3] == ["started_at_utc", "request_id", "function"]
        assert [row.split()[1:5] for row in rows] == [
            ["new-2", "new", "10", "3"],
            ["new-1", "new", "10", "2"],
            ["old-1", "old", "10", "1"],
        ]
        assert len({line.index(word) for line, word in zip([heading, *rows], ["function", "new ", "new ", "old "],
                                                           strict=True)}) == 1  # fmt: skip

    @pytest.mark.usefixtures("ledger")
    def test_json_is_one_object_a_line(self) -> None:
        totals = [json.loads(line) for line in run("usage", "--json").stdout.splitlines()]
        assert [(row["function"], row["cost_micros"]) for row in totals] == [("new", 30_000_000), ("old", 12_000_000)]
        result = run("usage", "--records", "--json")
        records: list[dict[str, Any]] = [json.loads(line) for line in result.stdout.splitlines()]
        assert [record["request_id"] for record in records] == ["new-2", "new-1", "old-1"]
        assert records[0]["finish_reason"] == "stop"
        assert records[0]["artifact_digest"] == "sha256:0"

    @pytest.mark.usefixtures("ledger")
    @pytest.mark.parametrize(
        ("options", "expected"),
        [
            (["--function", "old"], ["old-1"]),
            (["--function", "other"], []),
            (["--limit", "2"], ["new-2", "new-1"]),
            (["--since", "24h"], ["new-2", "new-1"]),
            (["--since", "1d"], ["new-2", "new-1"]),
            (["--since", "3d"], ["new-2", "new-1", "old-1"]),
            (["--since", "3d", "--function", "new", "--limit", "1"], ["new-2"]),
        ],
    )
    def test_records_are_filtered(self, options: list[str], expected: list[str]) -> None:
        lines = run("usage", "--records", "--json", *options).stdout.splitlines()
        assert [json.loads(line)["request_id"] for line in lines] == expected

    @pytest.mark.usefixtures("ledger")
    def test_totals_since(self) -> None:
        (row,) = run("usage", "--since", "24h", "--json").stdout.splitlines()
        assert json.loads(row)["function"] == "new"

    @pytest.mark.usefixtures("ledger")
    def test_totals_by_anything(self) -> None:
        by = run("usage", "--by", "day", "--by", "function", "--by", "key", "--by", "tenant", "--by", "model", "--json")
        rows = [json.loads(line) for line in by.stdout.splitlines()]
        assert [list(row)[:5] for row in rows] == [["day", "function", "key", "tenant", "model"]] * 2
        assert [row["function"] for row in rows] == ["old", "new"], "in the order of the days"
        assert sum(row["cost_micros"] for row in rows) == 42_000_000

    @pytest.mark.usefixtures("ledger")
    def test_other_prices_show_what_would_change_and_change_nothing(self, elsewhere: Path) -> None:
        prices = "\n".join(f'{name} = "{amount}"' for name, amount in PRICES.items())
        dearer = f'[[functions.new.prices]]\n{prices}\nvalid_from = "2000-01-01"\nper_invocation = "1"\n'
        table = f"[functions.new]\nartifact = 'x'\n[[functions.new.prices]]\n{dearer}[functions.old]\nartifact = 'x'\n"
        (elsewhere / "my.toml").write_text(table)
        rows = [
            json.loads(line) for line in run("usage", "--reprice", "--config", "my.toml", "--json").stdout.splitlines()
        ]
        assert [(row["function"], row["num_changed"], row["difference_micros"]) for row in rows] == [
            ("new", 2, 2_000_000),
            ("old", 1, -12_000_000),
        ]
        totals = [json.loads(line) for line in run("usage", "--json").stdout.splitlines()]
        assert [row["cost_micros"] for row in totals] == [30_000_000, 12_000_000]

    @pytest.mark.usefixtures("ledger")
    def test_margins(self, elsewhere: Path) -> None:
        with Ledger(elsewhere / "pilotlight.db") as ledger:
            spent = ReplicaTime("r", "new", utc_text(datetime.now(UTC))[:10], "USD", 3_600_000, 7000, 0)
            asyncio.run(ledger.add_replica_time(spent))
        new, old = (json.loads(line) for line in run("usage", "--margin", "--json").stdout.splitlines())
        assert (new["warm_micros"], new["margin_micros"]) == (7_000, 29_993_000)
        assert old["margin_micros"] == 12_000_000

    def test_a_ledger_without_records(self, elsewhere: Path) -> None:
        with Ledger(elsewhere / "empty.db"):
            result = run("usage", "--ledger", "empty.db")
        assert (result.exit_code, result.stdout, result.stderr) == (0, "", "nothing was used yet\n")
        assert run("usage", "--ledger", "empty.db", "--json").output == ""

    def test_no_ledger(self, elsewhere: Path) -> None:
        assert failure("usage") == "pilotlight.db: there is no usage ledger here; name that of the server with --ledger"
        assert [*elsewhere.iterdir()] == []

    def test_a_file_that_is_no_ledger(self, elsewhere: Path) -> None:
        (elsewhere / "notes.db").write_text("milk, bread, and a long line of other things to buy " * 20)
        line = failure("usage", "--ledger", "notes.db")
        assert line == "notes.db: cannot be used as a usage ledger (file is not a database)"

    def test_the_environment_may_name_the_ledger(self, ledger: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir("/")
        monkeypatch.setenv("PILOTLIGHT_LEDGER", str(ledger))
        assert len(run("usage", "--records", "--json").stdout.splitlines()) == 3


class TestUsageExport:
    IDS = ("new-2", "new-1", "old-1")

    @pytest.fixture(autouse=True)
    def ledger(self, elsewhere: Path) -> None:
        run("keys", "signing", "key.pem")
        with Ledger(elsewhere / "pilotlight.db", Signer.from_file(Path("key.pem"))) as ledger:
            asyncio.run(_fill(ledger))

    def test_json_lines(self) -> None:
        lines = run("usage", "export").stdout.splitlines()
        assert [json.loads(line)["request_id"] for line in lines] == [*self.IDS]
        assert run("usage", "export", "all.jsonl").stdout == ""
        assert Path("all.jsonl").read_text().splitlines() == lines

    def test_csv(self) -> None:
        rows = list(csv.DictReader(run("usage", "export", "--format", "csv").stdout.splitlines()))
        assert [row["request_id"] for row in rows] == [*self.IDS]
        assert [field.name for field in msgspec.structs.fields(UsageRecord)] == list(rows[0])
        assert (rows[0]["cost_micros"], rows[0]["tenant"]) == ("16000000", "")

    def test_parquet(self) -> None:
        import pyarrow.parquet

        assert run("usage", "export", "all.parquet", "--format", "parquet").exit_code == 0
        rows = pyarrow.parquet.read_table("all.parquet").to_pylist()
        lines = run("usage", "export").stdout.splitlines()
        assert rows == [json.loads(line) for line in lines]
        assert wrong_usage("usage", "export", "--format", "parquet") == "parquet is written into a FILE"

    def test_receipts_are_verified_without_the_ledger(self, elsewhere: Path) -> None:
        run("usage", "export", "all.jws", "--format", "jws")
        (elsewhere / "pilotlight.db").rename("elsewhere.db")
        result = run("usage", "verify", "all.jws", "--public-key", "key.pem.pub")
        assert result.stdout == "3 receipts are genuine\n"
        lines = Path("all.jws").read_text().splitlines()
        lines[1] = lines[1][:-20] + "A" * 20
        Path("all.jws").write_text("\n".join(lines))
        forged = run("usage", "verify", "all.jws", "--public-key", "key.pem.pub")
        assert (forged.exit_code, forged.stdout) == (1, "")
        assert forged.stderr.splitlines() == [
            "receipt 2: was altered, or signed with another key",
            "pilotlight: 1 of 3 receipts are not genuine",
        ]

    def test_a_ledger_verifies_itself(self) -> None:
        assert run("usage", "verify", "--public-key", "key.pem.pub").stdout == "3 receipts are genuine\n"


class TestOutbox:
    def test_dead_letters_are_tried_again(self, elsewhere: Path) -> None:
        assert (
            failure("usage", "outbox")
            == "pilotlight.db: there is no usage ledger here; name that of the server with --ledger"
        )
        with Ledger(elsewhere / "pilotlight.db") as ledger:
            asyncio.run(ledger.subscribe("http://127.0.0.1:1/"))
            asyncio.run(_fill(ledger))
            asyncio.run(ledger.settle_events([Buried(1, "2026-11-22T12:00:00.000000Z", "status 500")]))
        shown = json.loads(run("usage", "outbox", "--json").stdout)
        assert shown == {"url": "http://127.0.0.1:1/", "num_waiting": 2, "num_dead": 1}
        assert run("usage", "outbox", "--retry-dead").stderr == "1 dead letters are tried again\n"
        assert json.loads(run("usage", "outbox", "--json").stdout)["num_waiting"] == 3


class TestKeys:
    def test_a_token_is_printed_once_and_opens_the_key(self, elsewhere: Path) -> None:
        created = run("keys", "create", "app", "--function", "toy", "--tokens-per-day", 1000, "--cost-per-month", "2.5")
        token = created.stdout.strip()
        assert created.exit_code == 0
        assert "not shown again" in created.stderr
        assert "pilotlight.db is a new ledger" in created.stderr
        with Keyring(elsewhere / "pilotlight.db") as ring:
            key = ring.find(token)
        assert key is not None
        assert (key.name, key.tenant, key.functions, key.admin) == ("app", "app", ("toy",), False)
        assert key.limits == Limits(tokens_per_day=1000, micros_per_month=2_500_000)
        assert token.rpartition("_")[2] not in run("keys", "list").stdout

    @pytest.mark.parametrize("arguments", [("list",), ("revoke", "a"), ("rotate", "a")])
    def test_looking_in_the_wrong_place_makes_no_ledger_there(
        self, arguments: tuple[str, ...], elsewhere: Path
    ) -> None:
        assert failure("keys", *arguments).startswith("pilotlight.db: there is no usage ledger here")
        assert list(elsewhere.iterdir()) == []

    def test_keys_are_listed_for_people_and_programs(self, elsewhere: Path) -> None:
        with Ledger(elsewhere / "pilotlight.db"):
            assert run("keys", "list").stderr == "there are no keys\n"
        made = json.loads(run("keys", "create", "app", "--tenant", "acme", "--admin", "--json").stdout)
        (listed,) = [json.loads(line) for line in run("keys", "list", "--json").stdout.splitlines()]
        assert listed == {name: made[name] for name in made if name != "token"} | {"revoked_at_utc": None}
        heading, row = run("keys", "list").stdout.splitlines()
        assert heading.split()[:5] == ["key_id", "name", "tenant", "functions", "admin"]
        assert row.split()[:5] == [made["key_id"], "app", "acme", "all", "yes"]

    def test_a_key_is_rotated_and_revoked(self, elsewhere: Path) -> None:
        made = json.loads(run("keys", "create", "app", "--json").stdout)
        renewed = run("keys", "rotate", made["key_id"], "--grace", "1h").stdout.strip()
        with Keyring(elsewhere / "pilotlight.db") as ring:
            assert ring.find(made["token"]) == ring.find(renewed) is not None
            assert run("keys", "revoke", made["key_id"]).exit_code == 0
            assert ring.find(made["token"]) is ring.find(renewed) is None
        assert failure("keys", "rotate", made["key_id"]).startswith(f"the key {made['key_id']!r} was revoked at ")
        assert failure("keys", "revoke", "none") == "there is no key 'none'"

    @pytest.mark.parametrize(
        ("options", "problem"),
        [
            (["--cost-per-day", "0"], "Invalid value for '--cost-per-day': '0' is not an amount such as 5 or 0.25"),
            (["--cost-per-day", "1e3"], "Invalid value for '--cost-per-day': '1e3' is not an amount such as 5 or 0.25"),
            (["--currency", "usd"], "Invalid value for --currency: expected the three letters of a currency, "
             "such as USD"),
            (["--max-concurrent", "0"], "Invalid value for '--max-concurrent': 0 is not in the range x>=1."),
        ],
    )  # fmt: skip
    def test_wrong_limits(self, elsewhere: Path, options: list[str], problem: str) -> None:
        assert wrong_usage("keys", "create", "app", *options) == problem
        assert [*elsewhere.iterdir()] == []


class TestExport:
    @pytest.mark.parametrize("command", ["export", "verify", "evaluate"])
    def test_it_is_another_program_with_the_same_arguments(self, command: str, monkeypatch: pytest.MonkeyPatch) -> None:
        started: list[list[str]] = []
        monkeypatch.setattr("os.execv", lambda path, arguments: started.append([path, *arguments]))
        arguments = ["org/model", "--precision", "int8", "--help", "-h", "--unknown"]
        assert run(command, *arguments).exit_code == 0
        assert started == [[sys.executable, sys.executable, "-P", "-m", "pilotlight_export", command, *arguments]]

    @pytest.mark.parametrize("command", ["export", "verify", "evaluate"])
    def test_without_the_extra_it_says_what_to_install(self, command: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
        expected = f"{command} needs more than a runtime does; install it with: pip install 'pilotlight[export]'"
        assert failure(command, "org/model") == expected

    def test_its_help_and_its_exit_status_come_through(self) -> None:
        done = subprocess.run([PROGRAM, "export", "--help"], capture_output=True, text=True, check=True)
        assert "--precision [fp32|" in done.stdout
        failed = subprocess.run([PROGRAM, "export", "--colour"], capture_output=True, text=True, check=False)
        assert failed.returncode == 2

    def test_files_beside_the_user_are_not_imported(self, elsewhere: Path) -> None:
        (elsewhere / "click.py").write_text("raise SystemExit('the wrong click')")
        subprocess.run([PROGRAM, "export", "--help"], capture_output=True, check=True)


async def _fill(ledger: Ledger) -> None:
    now = datetime.now(UTC)
    for number, (name, started_at) in enumerate([("old", now - timedelta(days=2)), ("new", now), ("new", now)]):
        admission = _admission(f"{name}-{max(number, 1)}", name, started_at)
        await ledger.admit(admission)
        usage = Usage(prompt_tokens=10, completion_tokens=number + 1, delivered_tokens=number + 1)
        await ledger.finish(final_record(admission, usage, Timings(ttft_ms=1.5), FinishReason.STOP))
    await ledger.admit(_admission("open-1", "new", now))


def _admission(request_id: str, function: str, started_at: datetime) -> Admission:
    return Admission(
        request_id=request_id,
        function=function,
        artifact_digest="sha256:0",
        precision="fp32",
        provider="cpu",
        replica_id="replica",
        started_at_utc=utc_text(started_at),
        prices=PriceTable.from_config(PRICES),
    )
