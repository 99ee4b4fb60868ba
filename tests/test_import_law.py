"""The import law of docs/architecture.md: every import in the sources, and what a start really loads."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
RUNTIME = ROOT / "runtime" / "pilotlight"
EXPORT = ROOT / "export" / "pilotlight_export"
FUNCTIONS = ROOT / "functions"

# What each part may import besides itself. Nobody imports `cli` but the two ways to start the program, and it loads a
# command only when that is called; so `commands` is where the program's ends meet.
GROUND = {"errors", "tee"}
CONTRACTS = GROUND | {"request", "artifact", "config", "mailbox", "scratch"}
ANSWER = CONTRACTS | {"text"}
FUNCTION = ANSWER | {"answer", "metering"}
API = FUNCTION | {"function", "confidential"}
HOST = API | {"api", "engine"}
PLAN = CONTRACTS | {"engine", "host"}  # drives the engine's and the host's decisions, and none of their surfaces
COMMANDS = (HOST | {"host", "plan"}) - {"engine"}
LAW = {
    "errors": set(),
    "tee": {"errors"},  # one word, which records and headers say and only `confidential` can earn
    "request": GROUND,
    "mailbox": GROUND | {"request"},  # apart from `request`: a replica has no event loop, and should not pay for one
    "artifact": GROUND,
    "config": GROUND,
    "scratch": set(),
    "text": CONTRACTS,
    "metering": CONTRACTS,
    "engine": CONTRACTS,
    "answer": ANSWER,  # what the API shows of a function, apart from how it is run
    "function": FUNCTION,
    "confidential": CONTRACTS | {"metering"},  # an extra: whoever needs it imports it where it is used
    "api": API,
    "host": HOST,
    "plan": PLAN,
    "commands": COMMANDS,
    "cli": GROUND | {"commands"},
    "__main__": {"cli"},
    "__init__": set(),
    "functions": COMMANDS,
    "pilotlight_export": {"artifact", "errors", "scratch"},
}
COMMAND_MODULES = sorted(path.stem for path in (RUNTIME / "commands").glob("[!_]*.py"))
EXPORT_ONLY = {"pilotlight_export", "torch", "optimum", "transformers"}
SESSIONS = ("pilotlight.engine.session", "pilotlight.engine.device")
"""One for the processor's own memory, where arrays are bound as they lie, and one for a device's."""
EXTRA = ("pilotlight.confidential", "cryptography", "cbor2", "dcap_qvl", "joserfc", "pyhpke", "signxml", "lxml")


def violations(module: str, source: str) -> list[str]:
    """Return what the module ``module`` imports against the law, one line each."""
    part = part_of(module)
    found = []
    for imported in imports(source):
        if imported.startswith("."):
            found.append(f"{module} imports {imported}: write imports in full")
        elif is_runtime(imported) and part_of(imported) not in LAW[part] | {part, "__init__"}:
            found.append(f"{module} imports {imported}: {part} may not know {part_of(imported)}")
        elif root_of(imported) in EXPORT_ONLY and part != "pilotlight_export":
            found.append(f"{module} imports {imported}: it belongs to the export")
        elif root_of(imported) == "onnxruntime" and part != "pilotlight_export" and module not in SESSIONS:
            found.append(f"{module} imports {imported}: only {' and '.join(SESSIONS)} may")
    return found


def imports(source: str) -> Iterator[str]:
    """Yield every module that the source imports, wherever in it; ``from m import n`` counts as ``m.n``."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{'.' * node.level}{node.module or ''}.{alias.name}" for alias in node.names)


def part_of(module: str) -> str:
    """Return the part of the house that a module of ours belongs to: `engine` for `pilotlight.engine.slots`."""
    root, _, rest = module.partition(".")
    if root != "pilotlight":
        return root
    name = rest.partition(".")[0]
    return name if name in LAW else "__init__"


def is_runtime(module: str) -> bool:
    return root_of(module) == "pilotlight"


def root_of(module: str) -> str:
    return module.partition(".")[0]


def modules() -> dict[str, Path]:
    """Return all modules of ours by name."""
    found = {}
    for directory in (RUNTIME, EXPORT, FUNCTIONS):
        for path in sorted(directory.rglob("*.py")):
            found[".".join(path.relative_to(directory.parent).with_suffix("").parts)] = path
    return found


@pytest.mark.parametrize(("module", "path"), modules().items(), ids=str)
def test_module_keeps_the_law(module: str, path: Path) -> None:
    assert violations(module, path.read_text(encoding="utf-8")) == []


def test_every_part_of_the_runtime_is_under_the_law() -> None:
    parts = {path.stem for path in RUNTIME.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}
    assert parts == LAW.keys() - {"functions", "pilotlight_export"}


@pytest.mark.parametrize(
    ("module", "source", "problem"),
    [
        ("pilotlight.errors", "import pilotlight.config", "errors may not know config"),
        ("pilotlight.text.tokenizer", "from pilotlight.engine import engine", "text may not know engine"),
        ("pilotlight.engine.engine", "from pilotlight.metering.usage import Usage", "engine may not know metering"),
        ("pilotlight.function", "from pilotlight import engine", "function may not know engine"),
        ("pilotlight.api.app", "from pilotlight.host.inprocess import open_function", "api may not know host"),
        ("pilotlight.host.server", "from pilotlight.cli import main", "host may not know cli"),
        ("pilotlight.host.server", "import pilotlight.commands.serve", "host may not know commands"),
        ("pilotlight.commands.serve", "import pilotlight.engine.session", "commands may not know engine"),
        ("pilotlight.host.pool", "import pilotlight.plan.agenda", "host may not know plan"),
        ("pilotlight.plan.fleet", "import pilotlight.api.app", "plan may not know api"),
        ("pilotlight.cli", "import pilotlight.engine.session", "cli may not know engine"),
        (
            "pilotlight.artifact",
            "def f():\n    from pilotlight.request import Sequence",
            "artifact may not know request",
        ),
        ("pilotlight.engine.engine", "from . import slots", "write imports in full"),
        ("pilotlight.cli", "import pilotlight_export.cli", "it belongs to the export"),
        (
            "pilotlight.engine.slots",
            "try:\n    import torch.cuda\nexcept ImportError: pass",
            "it belongs to the export",
        ),
        ("pilotlight.text.tokenizer", "from transformers import AutoTokenizer", "it belongs to the export"),
        ("functions.modal_app.app", "from optimum import version", "it belongs to the export"),
        (
            "pilotlight.engine.slots",
            "import onnxruntime as ort",
            "only pilotlight.engine.session and pilotlight.engine.device may",
        ),
        ("pilotlight_export.pack", "from pilotlight.request import Sequence", "may not know request"),
    ],
)
def test_a_broken_law_is_noticed(module: str, source: str, problem: str) -> None:
    (line,) = violations(module, source)
    assert line.startswith(f"{module} imports ")
    assert line.endswith(problem)


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("pilotlight.cli", "from pilotlight import __version__"),
        ("pilotlight.engine.session", "import onnxruntime as ort"),
        ("pilotlight.host.inprocess", "from pilotlight.engine.backend import EngineBackend"),
        ("pilotlight_export.pack", "import torch, onnxruntime\nfrom pilotlight.artifact import Manifest"),
        ("functions.aws_lambda.app", "from pilotlight.host.inprocess import open_function"),
    ],
)
def test_what_the_law_allows(module: str, source: str) -> None:
    assert violations(module, source) == []


@pytest.mark.parametrize(
    ("started", "unwanted"),
    [
        ("pilotlight.cli", ["onnxruntime", "numpy", "jinja2", "tokenizers", "starlette", "pilotlight.config", *EXTRA]),
        *(
            (f"pilotlight.commands.{name}", ["onnxruntime", "numpy", "jinja2", "tokenizers", "starlette", *EXTRA])
            for name in COMMAND_MODULES
        ),
        (
            "pilotlight.host.server",
            ["onnxruntime", "numpy", "torch", "optimum", "onnx", "pilotlight_export", "pilotlight.plan", *EXTRA],
        ),
        ("pilotlight.plan.compare", ["onnxruntime", "starlette", "uvicorn", "tokenizers", "jinja2"]),
    ],
)
def test_a_start_loads_only_what_it_needs(started: str, unwanted: list[str]) -> None:
    code = f"import sys, {started}; print([name for name in {unwanted} if name in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout == "[]\n"
