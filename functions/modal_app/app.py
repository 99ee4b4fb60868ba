"""The Modal app: ``modal deploy app.py`` serves the function of pilotlight.toml. docs/modal.md has the steps.

Here is what Modal is asked for and when its containers do what; ``deployment`` has the numbers, the runtime the rest.
"""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import modal

from deployment import MOUNTED_CONFIG, PORT, SHELF, load_deployment

if TYPE_CHECKING:
    from pilotlight.host.inprocess import Prepared
    from pilotlight.host.lone import LoneFunction

HERE = Path(__file__).parent
WHEELS = HERE.parents[1] / "dist" / "modal" if modal.is_local() else Path("/wheels")

wanted = load_deployment()
wheel = next(WHEELS.glob("pilotlight-*.whl"), WHEELS / "pilotlight-missing.whl")
pins = ["requirements.txt", "requirements-gpu.txt" if wanted.gpu else "requirements-cpu.txt"]

image = (
    modal.Image.debian_slim(python_version="3.11")
    .uv_pip_install(requirements=[str(HERE / name) for name in pins], extra_options="--no-deps")
    .add_local_file(wheel, f"/wheels/{wheel.name}", copy=True)
    .uv_pip_install(f"/wheels/{wheel.name}", extra_options="--no-deps")
    .env(dict(wanted.environment))
    .add_local_file(wanted.config_path, MOUNTED_CONFIG)
    .add_local_python_source("deployment")
)
volume = modal.Volume.from_name(wanted.modal.volume, create_if_missing=True)
shelf: dict[Any, Any] = {SHELF: volume.with_mount_options(read_only=True)}
secrets = [modal.Secret.from_name(name) for name in wanted.modal.secrets]
app = modal.App(wanted.modal.app, image=image, secrets=secrets)


class Served:
    """The function's life in a container: what a snapshot may hold, what comes after it, and the end."""

    prepared: Prepared | None = None
    session: Any = None
    running: LoneFunction | None = None

    @modal.enter(snap=wanted.modal.memory_snapshot)
    def prepare(self) -> None:
        """Do what a snapshot may hold; without snapshots, Modal calls the two hooks in any order."""
        self.load()

    @modal.enter(snap=False)
    def begin(self) -> None:
        """Open what a snapshot must not hold, and begin to answer."""
        self.run(_listener())

    @modal.exit()
    def end(self) -> None:
        """Let streams finish as far as the notice allows; the others end with a resume token, and metered."""
        if self.running is not None:
            self.running.stop(wanted.drain_timeout_s)

    def load(self) -> Prepared:
        """Import everything, verify the artifact and load its texts; with GPU snapshots, its model too."""
        import pilotlight.host.lone  # noqa: F401 - for its imports
        from pilotlight.host.inprocess import open_session, prepare

        if self.prepared is None:
            self.prepared = prepare(wanted.name, wanted.function)
            self.session = open_session(self.prepared, wanted.host) if wanted.gpu_snapshot else None
        return self.prepared

    def run(self, listener: socket.socket | None) -> None:
        begun_at = time.monotonic()
        from pilotlight.host.inprocess import open_session
        from pilotlight.host.lone import LoneFunction

        prepared = self.load()
        session = self.session or open_session(prepared, wanted.host)
        needs_keys = listener is not None and wanted.modal.unauthenticated
        self.running = LoneFunction(prepared, session, wanted.host, needs_keys=needs_keys)
        self.running.start(listener, (time.monotonic() - begun_at) * 1000)


@app.server(
    port=PORT,
    gpu=wanted.gpu,
    cpu=wanted.modal.cpu,
    memory=wanted.modal.memory_mb,
    volumes=shelf,
    target_concurrency=wanted.target_concurrency,
    max_concurrency=wanted.max_concurrency,
    min_containers=wanted.function.min_replicas,
    max_containers=wanted.max_containers,
    buffer_containers=wanted.modal.buffer_containers,
    scaledown_window=wanted.scaledown_window_s,
    startup_timeout=wanted.modal.startup_timeout_s,
    exit_grace_period=wanted.exit_grace_s,
    routing_region=wanted.modal.routing_region,
    compute_region=list(wanted.modal.compute_regions) or None,
    unauthenticated=wanted.modal.unauthenticated,
    enable_memory_snapshot=wanted.modal.memory_snapshot,
    experimental_options={"enable_gpu_snapshot": True} if wanted.gpu_snapshot else None,
)
class Server(Served):
    """The OpenAI API over HTTP."""


@app.cls(
    gpu=wanted.gpu,
    cpu=wanted.modal.cpu,
    memory=wanted.modal.memory_mb,
    volumes=shelf,
    timeout=wanted.timeout_s,
    startup_timeout=wanted.modal.startup_timeout_s,
    scaledown_window=2,
    max_containers=1,
    enable_memory_snapshot=wanted.modal.memory_snapshot,
)
class Answers(Served):
    """The same without HTTP, for trying a deployment: ``modal run app.py::try_out``. It has no socket to begin with."""

    @modal.enter(snap=False)
    def begin(self) -> None:
        self.run(None)

    @modal.method()
    def ask(
        self, body: dict[str, Any], path: str = "/v1/chat/completions", headers: dict[str, str] | None = None
    ) -> Iterator[str]:
        """Yield a streamed answer, frame by frame. An input that was preempted and starts again is billed once."""
        assert self.running is not None
        raw = json.dumps({"model": wanted.name, "stream": True, **body}).encode()
        for piece in self.running.ask_to_the_end(path, raw, modal.current_input_id(), headers):
            yield piece.decode()


@app.function(volumes={SHELF: volume}, timeout=3600)
def fill(digest: str) -> list[str]:
    """Verify every checksum of an uploaded artifact, and put it where servers look; return its files."""
    from pilotlight.host.shelf import place

    volume.reload()
    artifact = place(Path(SHELF), digest)
    volume.commit()
    return sorted(artifact.manifest.files)


@app.local_entrypoint()
def upload() -> None:
    """Put the function's artifact on the volume, once."""
    from pilotlight.artifact import open_artifact
    from pilotlight.host.shelf import INCOMING, name_of

    artifact = open_artifact(Path(wanted.function.artifact))
    artifact.verify()
    with volume.batch_upload(force=True) as batch:
        batch.put_directory(str(artifact.path), f"/{INCOMING}/{name_of(artifact.digest)}")
    print(f"{wanted.artifact}: {len(fill.remote(artifact.digest))} files, all as their checksums say")


@app.local_entrypoint()
def try_out(prompt: str = "Say hello.", key: str = "") -> None:
    """Stream one answer out of a container, with an API key where the ledger has some."""
    headers = {"authorization": f"Bearer {key}"} if key else {}
    for frames in Answers().ask.remote_gen({"messages": [{"role": "user", "content": prompt}]}, headers=headers):
        print(frames, end="", flush=True)


def _listener() -> socket.socket:
    """Listen where Modal's proxy looks; on a machine of one's own, on loopback only."""
    return socket.create_server(("127.0.0.1" if modal.is_local() else "0.0.0.0", PORT), backlog=2048)  # noqa: S104
