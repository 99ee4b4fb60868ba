"""The Modal app: the real SDK deploys it to a fake of Modal's API, and its hooks run here as a container runs them."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import pytest
from packaging.requirements import Requirement

from deployment import MOUNTED_CONFIG, Deployment, load_deployment
from fake_modal_api import FakeModalApi, fake_modal_api
from pilotlight.artifact import WEIGHTS, Artifact, open_artifact
from pilotlight.config import FunctionSettings, HostSettings, ModalSettings
from pilotlight.errors import ArtifactError, ConfigError
from pilotlight.host.shelf import INCOMING, name_of, place
from support import events, write_artifact

ROOT = Path(__file__).parents[2]
APP = ROOT / "functions" / "modal_app" / "app.py"
CONFIG = """
[host]
drain_timeout_s = 20

[functions.toy]
artifact = "{artifact}"
provider = "cuda"
num_slots = 16
max_queued_requests = 32
min_replicas = 1
max_replicas = 5
idle_timeout_s = 120

[modal]
app = "my-llm"
gpu = ["L40S", "A10", "T4"]
secrets = ["pilotlight-ledger"]
routing_region = "eu-west"
compute_regions = ["eu-west-1", "eu-west-2"]
startup_timeout_s = 400
gpu_snapshot = true
"""


def environment(config: Path, **more: str) -> dict[str, str]:
    """Return what a user's shell has, and nothing of ours; the home directory is a fresh one."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PILOTLIGHT_", "MODAL_"))}
    paths = [str(ROOT / "runtime"), str(APP.parent), *sys.path]
    ours = {"PILOTLIGHT_CONFIG": str(config), "PYTHONPATH": os.pathsep.join(paths), "HOME": str(config.parent)}
    return {**kept, **ours, **more}


@dataclass(frozen=True)
class Deployed:
    api: FakeModalApi
    config: Path
    output: str

    def function(self, name: str) -> Any:
        return self.api.functions()[name]

    def server(self, rank: int = 0) -> Any:
        """Return the server as Modal would run it on the GPU of that rank."""
        return self.function("Server").function_data.ranked_functions[rank].function


@pytest.fixture(scope="module")
def deployed(toy_artifact: Artifact, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployed]:
    """A checkout in which ``make deploy-modal`` has built a wheel, deployed by Modal's own command."""
    directory = tmp_path_factory.mktemp("modal")
    (directory / "dist" / "modal").mkdir(parents=True)
    (directory / "dist" / "modal" / "pilotlight-0.1.0-py3-none-any.whl").write_bytes(b"a wheel")
    app = directory / "functions" / "modal_app"
    app.mkdir(parents=True)
    for path in APP.parent.glob("[!_]*.*"):
        (app / path.name).write_bytes(path.read_bytes())
    config = directory / "pilotlight.toml"
    config.write_text(CONFIG.format(artifact=toy_artifact.path))
    with fake_modal_api() as api:
        account = {"MODAL_SERVER_URL": api.url, "MODAL_TOKEN_ID": "ak-1", "MODAL_TOKEN_SECRET": "as-1"}
        command = [sys.executable, "-m", "modal", "deploy", str(app / "app.py")]
        variables = environment(config, HOME=str(directory), **account)
        done = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=3000, cwd=directory)
        assert done.returncode == 0, done.stdout + done.stderr
        yield Deployed(api, config, done.stdout)


def test_everything_is_deployed_under_the_apps_name(deployed: Deployed) -> None:
    assert deployed.api.calls["AppCreate"][0].description == "my-llm"
    assert deployed.api.functions().keys() == {"Server", "Answers.*", "fill"}
    published = deployed.api.calls["AppPublish"][0]
    assert published.function_ids.keys() == {"Server", "Answers.*", "fill"}


@pytest.mark.parametrize("name", ["Server", "Answers.*"])
def test_gpus_are_asked_for_in_order(deployed: Deployed, name: str) -> None:
    ranked = deployed.function(name).function_data.ranked_functions
    assert [one.rank for one in ranked] == [0, 1, 2]
    gpus = [one.function.resources.gpu_config for one in ranked]
    assert [(gpu.gpu_type, gpu.count) for gpu in gpus] == [("L40S", 1), ("A10", 1), ("T4", 1)]


def test_concurrency_comes_from_the_slots(deployed: Deployed) -> None:
    for rank in range(3):
        server = deployed.server(rank)
        assert server.autoscaler_settings.target_concurrency_float == 16
        assert server.max_concurrent_inputs == 48


def test_scaling_and_timeouts_are_those_of_the_settings(deployed: Deployed) -> None:
    scaling = deployed.server().autoscaler_settings
    assert (scaling.min_containers, scaling.max_containers, scaling.scaledown_window) == (1, 5, 120)
    http = deployed.server().http_config
    assert (http.port, http.startup_timeout, http.exit_grace_period) == (8000, 400, 28)
    assert list(http.proxy_regions) == ["eu-west"]
    assert not http.unauthenticated
    assert list(deployed.server().scheduler_placement.regions) == ["eu-west-1", "eu-west-2"]
    assert deployed.function("Answers.*").function_data.timeout_secs == 3608


def test_containers_start_from_a_snapshot(deployed: Deployed) -> None:
    server = deployed.server()
    assert server.checkpointing_enabled
    assert server.experimental_options["enable_gpu_snapshot"] == "True"


def test_weights_lie_on_a_volume_that_only_the_filler_writes(deployed: Deployed) -> None:
    assert [request.deployment_name for request in deployed.api.calls["VolumeGetOrCreate"]] == ["pilotlight-artifacts"]
    (read,) = deployed.server().volume_mounts
    (written,) = deployed.function("fill").function.volume_mounts
    assert read.volume_id == written.volume_id
    assert (read.mount_path, read.read_only) == ("/artifacts", True)
    assert (written.mount_path, written.read_only) == ("/artifacts", False)


def test_keys_come_as_secrets(deployed: Deployed) -> None:
    assert [request.deployment_name for request in deployed.api.calls["SecretGetOrCreate"]] == ["pilotlight-ledger"]
    assert len(deployed.server().secret_ids) == 1


def test_the_image_is_the_wheel_and_pinned_packages(deployed: Deployed, toy_artifact: Artifact) -> None:
    steps = [list(request.image.dockerfile_commands) for request in deployed.api.calls["ImageGetOrCreate"]]
    assert steps[0][0].startswith("FROM python:3.11")
    (pinned,) = (step for step in steps[1] if step.startswith("RUN"))
    assert "--no-deps --requirements /.uv/0/requirements.txt --requirements /.uv/1/requirements-gpu.txt" in pinned
    assert steps[2] == ["FROM base", "COPY . /"]
    assert steps[3][-1].endswith("--no-deps /wheels/pilotlight-0.1.0-py3-none-any.whl")
    place = f"/artifacts/{toy_artifact.digest.replace(':', '-')}"
    assert steps[4] == [
        "FROM base",
        f"ENV PILOTLIGHT_CONFIG={MOUNTED_CONFIG}",
        f"ENV PILOTLIGHT_ARTIFACT={place}",
    ]
    assert "torch" not in str(steps)


def test_containers_get_the_settings_and_two_files(deployed: Deployed) -> None:
    mounted = {file.filename for request in deployed.api.calls["MountGetOrCreate"] for file in request.files}
    assert MOUNTED_CONFIG in mounted
    assert {"app.py", "deployment.py"} <= {PurePosixPath(name).name for name in mounted}
    assert not any("torch" in name or name.endswith(".onnx.data") for name in mounted)


def test_pins_are_exact_and_what_the_package_asks_for() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lists = {path.stem: path.read_text() for path in APP.parent.glob("requirements*.txt")}
    pins = {
        name: {match[1].lower().replace("_", "-"): match[2] for match in re.finditer(r"(?m)^([\w.-]+)==(\S+)$", text)}
        for name, text in lists.items()
    }
    for name, text in lists.items():
        assert len([line for line in text.splitlines() if line and line[0] != "#"]) == len(pins[name])
    for extra, file in (("cpu", "requirements-cpu"), ("gpu", "requirements-gpu")):
        wanted = [Requirement(line) for line in (*project["dependencies"], *project["optional-dependencies"][extra])]
        given = {**pins["requirements"], **pins[file]}
        for requirement in wanted:
            assert requirement.specifier.contains(given[requirement.name.lower()]), requirement
    assert not any(name in {"torch", "transformers", "optimum"} for found in pins.values() for name in found)


def settings(artifact: Artifact, ledger: Path, **more: str) -> str:
    lines = "\n".join(f"{name} = {value}" for name, value in more.items())
    return f'[host]\nledger = "{ledger}"\n[functions.demo]\nartifact = "{artifact.path}"\nnum_slots = 2\n{lines}\n'


def run_here(code: str, config: Path) -> Any:
    """Run code beside the app as somebody's script, and return the JSON that it prints last."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        env=environment(config),
        capture_output=True,
        text=True,
        timeout=3000,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


LOCAL = """
import json, app
body = {"messages": [{"role": "user", "content": "What is 47 plus 38?"}], "stream_options": {"include_usage": True}}
print(json.dumps([piece for piece in app.Answers().ask.local(body)]))
"""

CONTAINER = """
import json, httpx, modal
from modal._partial_function import _find_callables_for_obj, _PartialFunctionFlags as Flags
import app

def run_hooks(flag):
    for hook in _find_callables_for_obj(served, flag).values():
        hook()

app.PORT = 0
served = app.Server._get_user_cls()()
run_hooks(Flags.ENTER_PRE_SNAPSHOT)
assert served.running is None and served.session is None, "a snapshot holds neither a socket nor a device"
run_hooks(Flags.ENTER_POST_SNAPSHOT)
port = served.running.port
body = {"model": "demo", "prompt": "Sort these words: velvet, anchor", "max_tokens": 8, "stream": True}
answer = httpx.post(f"http://127.0.0.1:{port}/v1/completions", json=body, timeout=300)
models = httpx.get(f"http://127.0.0.1:{port}/v1/models", timeout=300).json()
run_hooks(Flags.EXIT)
try:
    httpx.get(f"http://127.0.0.1:{port}/livez", timeout=300)
    alive = True
except httpx.TransportError:
    alive = False
print(json.dumps([answer.status_code, answer.text, models["data"][0]["id"], alive]))
"""


@pytest.mark.model
@pytest.mark.parametrize("snapshots", ["true", "false"])
def test_a_local_call_runs_the_hooks_and_streams_through_asgi(
    demo_int4: Artifact, tmp_path: Path, snapshots: str
) -> None:
    config = tmp_path / "pilotlight.toml"
    config.write_text(settings(demo_int4, tmp_path / "usage.db") + f"[modal]\nmemory_snapshot = {snapshots}\n")
    pieces = run_here(LOCAL, config)
    frames = events("".join(pieces))
    assert len(pieces) > 3, "it came in pieces"
    assert "".join(choice["delta"].get("content", "") for frame in frames for choice in frame["choices"]) == "85"
    usage = frames[-1]["usage"]
    assert usage["completion_tokens"] == 3
    assert usage["pilotlight"]["cold_start_ms"] > 0


@pytest.mark.model
@pytest.mark.parametrize("snapshots", ["true", "false"])
def test_a_container_serves_http_between_its_hooks(demo_int4: Artifact, tmp_path: Path, snapshots: str) -> None:
    config = tmp_path / "pilotlight.toml"
    config.write_text(settings(demo_int4, tmp_path / "usage.db") + f"[modal]\nmemory_snapshot = {snapshots}\n")
    status, text, model, alive = run_here(CONTAINER, config)
    assert (status, model, alive) == (200, "demo", False)
    assert text.endswith("data: [DONE]\n\n")


def deployment(**changes: Any) -> Deployment:
    fields: dict[str, Any] = {
        "name": "toy",
        "function": FunctionSettings(artifact="a"),
        "host": HostSettings(),
        "modal": ModalSettings(),
        "digest": "sha256:ab",
        "config_path": Path("pilotlight.toml"),
    }
    return Deployment(**{**fields, **changes})


def test_drains_end_before_a_preemption_does() -> None:
    patient = deployment(host=HostSettings(drain_timeout_s=600))
    assert (patient.drain_timeout_s, patient.exit_grace_s) == (22, 30)
    quick = deployment(host=HostSettings(drain_timeout_s=0.5))
    assert (quick.drain_timeout_s, quick.exit_grace_s) == (0.5, 9)


def test_what_modal_cannot_do_is_cut_to_what_it_can() -> None:
    assert deployment(function=FunctionSettings(artifact="a", idle_timeout_s=0)).scaledown_window_s == 2
    assert deployment(function=FunctionSettings(artifact="a", idle_timeout_s=9e9)).scaledown_window_s == 3600
    assert deployment(function=FunctionSettings(artifact="a", max_duration_s=86_400)).timeout_s == 86_400


def test_without_a_gpu_none_is_asked_for() -> None:
    assert deployment(modal=ModalSettings(gpu_snapshot=True)).gpu is None
    assert not deployment(modal=ModalSettings(gpu_snapshot=True)).gpu_snapshot
    with_gpu = FunctionSettings(artifact="a", provider="cuda")
    assert deployment(function=with_gpu).gpu == ["L4", "A10", "L40S"]
    assert deployment(function=with_gpu, modal=ModalSettings(gpu_snapshot=True)).gpu_snapshot
    no_memory = ModalSettings(gpu_snapshot=True, memory_snapshot=False)
    assert not deployment(function=with_gpu, modal=no_memory).gpu_snapshot


def test_a_container_comes_to_the_same_deployment(toy_artifact: Artifact, tmp_path: Path) -> None:
    config = tmp_path / "pilotlight.toml"
    config.write_text(CONFIG.format(artifact=toy_artifact.path))
    here = load_deployment({"PILOTLIGHT_CONFIG": str(config)})
    there = load_deployment({**here.environment, "PILOTLIGHT_CONFIG": str(config)})
    assert here.digest == there.digest == toy_artifact.digest
    assert (here.function.artifact, there.function.artifact) == (str(toy_artifact.path), here.artifact)
    assert there.host.ledger == "/tmp/pilotlight.db"
    assert (here.gpu, here.exit_grace_s, here.modal) == (there.gpu, there.exit_grace_s, there.modal)


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("", "defines 0 functions; a Modal app serves one"),
        ('[functions.a]\nartifact="x"\n[functions.b]\nartifact="x"\n', "defines 2 functions"),
        ('[functions.a]\nartifact="{path}"\nprovider="cuda"\n[modal]\ngpu=[]\n', "modal.gpu is empty"),
        ('[functions.a]\nartifact="{path}"\n[modal]\ngpus=["L4"]\n', "unknown key modal.gpus"),
        ('[functions.a]\nartifact="{path}"\nprovider="tpu"\n', "functions.a.provider is 'tpu'"),
        ('[functions.a]\nartifact="{path}"\n[confidential]\nrequire_tee=true\n', "require_tee"),
        ('[functions.a]\nartifact="{path}"\n[confidential]\nencrypted_prompts="accepted"\n', "encrypted_prompts"),
    ],
)
def test_what_cannot_be_deployed_is_named(toy_artifact: Artifact, tmp_path: Path, content: str, problem: str) -> None:
    config = tmp_path / "pilotlight.toml"
    config.write_text(content.replace("{path}", str(toy_artifact.path)))
    with pytest.raises(ConfigError, match=problem):
        load_deployment({"PILOTLIGHT_CONFIG": str(config)})


def test_an_uploaded_artifact_is_placed_once_it_is_verified(tmp_path: Path) -> None:
    artifact = write_artifact(tmp_path / "made")
    digest = open_artifact(artifact).digest
    incoming = tmp_path / "shelf" / INCOMING / name_of(digest)
    incoming.parent.mkdir(parents=True)
    artifact.rename(incoming)
    placed = place(tmp_path / "shelf", digest)
    assert placed.path == tmp_path / "shelf" / name_of(digest)
    placed.verify()
    assert place(tmp_path / "shelf", digest).digest == digest, "again changes nothing"
    assert not incoming.exists()


def test_a_damaged_upload_is_not_placed(tmp_path: Path) -> None:
    made = write_artifact(tmp_path / "made")
    digest = open_artifact(made).digest
    shelf = tmp_path / "shelf"
    with pytest.raises(ArtifactError, match="does not exist"):
        place(shelf, digest)
    incoming = shelf / INCOMING / name_of(digest)
    incoming.parent.mkdir(parents=True)
    made.rename(incoming)
    (incoming / WEIGHTS).write_bytes(b"no w3ights")
    with pytest.raises(ArtifactError, match="was altered"):
        place(shelf, digest)
    assert not (shelf / name_of(digest)).exists()
    other = "sha256:" + "0" * 64
    incoming.rename(incoming.with_name(name_of(other)))
    with pytest.raises(ArtifactError, match=f"and not {other}"):
        place(shelf, other)
