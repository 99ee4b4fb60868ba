"""`make gpu-check`: does it compute the right thing on this GPU, and how fast? One command, one report.

    python bench/gpu_check.py [--models demo qwen2.5-0.5b ...] [--artifacts DIR] [--out DIR]

Without an NVIDIA GPU it says so and ends well. `--provider cpu` runs the same code on the processor, to try the script.
Artifacts that are not in --artifacts are exported into it.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
from pathlib import Path

from gpu_measure import Wanted, measure
from gpu_parity import check
from gpu_report import Checked, Report
from machine import describe_machine
from models import GPU_SHAPES, write_model
from pilotlight.artifact import Artifact, open_artifact
from pilotlight.engine.device import Device, check_provider
from pilotlight.engine.nvml import Gpu
from pilotlight.errors import PilotlightError

ROOT = Path(__file__).parents[1]
DEMO = "demo"
DEMO_MODEL = ROOT / "models" / "demo" / "model"
PRECISIONS = {"fp16": ["--precision", "fp16"], "int4-fp16": ["--precision", "int4", "--recipe", "int4-fp16"]}
PROCESSOR_BUDGET_BYTES = 2_000_000_000
RANDOM_WEIGHTS_MAX_KL = "100"
"""What four bits do to random weights says nothing, and must not end an export."""


def main(arguments: list[str] | None = None) -> int:
    """Return the exit status: 0 when everything holds or there is no GPU, 1 when something fails, 2 for a bad setup."""
    args = _parser().parse_args(arguments)
    gpu = None
    if args.provider == "cuda":
        try:
            gpu = Gpu()
            check_provider("cuda")
        except (LookupError, PilotlightError) as reason:
            return _without(reason)
    device = Device(args.provider, num_threads=args.threads)
    wanted = Wanted(
        device,
        tuple(args.streams),
        context_tokens=args.prompt_tokens + args.steps + 64,
        prompt_tokens=args.prompt_tokens,
        num_steps=args.steps,
        gpu=gpu,
        budget_bytes=PROCESSOR_BUDGET_BYTES,
    )
    name = gpu.name if gpu is not None else "cpu provider"
    report = Report(name, describe_machine(args.threads), [])
    for model in args.models:
        for precision in args.precisions:
            print(f"gpu-check: {model}, {precision}", flush=True)
            report.checked.append(_checked(model, precision, args.artifacts, wanted))
            as_json, as_text = report.write(args.out)  # after each, so that a crash costs one
    print(report.text())
    print(f"gpu-check: {as_json} and {as_text.name}")
    return 0 if report.holds else 1


def _without(reason: Exception) -> int:
    """Say why nothing can be checked: that is well where there is no GPU, and a fault where there is one."""
    if shutil.which("nvidia-smi") is None:
        print(f"gpu-check: skipped, {reason}")
        return 0
    print(f"gpu-check: there seems to be a GPU, but {reason}", file=sys.stderr)
    return 2


def _checked(model: str, precision: str, directory: Path, wanted: Wanted) -> Checked:
    """Check one artifact; what goes wrong with it is a result, too."""
    checked = Checked(model, precision)
    try:
        source = DEMO_MODEL if model == DEMO else write_model(GPU_SHAPES[model], directory / "models" / model)
        artifact = _artifact(source, model, precision, directory)
        checked.parities = check(artifact, source, wanted.device, precision)
        checked.figures = measure(artifact, wanted)
    except Exception as error:  # noqa: BLE001 - the others are still worth knowing
        checked.failure = f"{type(error).__name__}: {error}".splitlines()[0]
    return checked


def _artifact(source: Path, model: str, precision: str, directory: Path) -> Artifact:
    target = directory / f"{model}-{precision}"
    if not (target / "manifest.json").exists():
        command = [sys.executable, "-m", "pilotlight", "export", str(source), *PRECISIONS[precision]]
        is_random = [] if model == DEMO else ["--max-kl", RANDOM_WEIGHTS_MAX_KL]
        subprocess.run([*command, *is_random, "--out", str(target)], check=True)
    return open_artifact(target)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    models = [DEMO, *GPU_SHAPES]
    parser.add_argument("--models", nargs="+", choices=models, default=models)
    parser.add_argument("--precisions", nargs="+", choices=PRECISIONS, default=[*PRECISIONS])
    parser.add_argument("--streams", nargs="+", type=int, default=[1, 8, 64])
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--steps", type=int, default=64)
    parser.add_argument("--threads", type=int, default=4, help="of the processor, for what runs there")
    parser.add_argument("--provider", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--artifacts", type=Path, default=ROOT / "artifacts" / "gpu")
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results")
    return parser


if __name__ == "__main__":
    sys.exit(main())
