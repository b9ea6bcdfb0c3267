"""What CONTRIBUTING says: imports go one way, each big package has its rooms, and the light modules stay light."""

from __future__ import annotations

import ast
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import sslscale

PACKAGE = Path(sslscale.__file__).parent

# A room imports from itself and from rooms above it, wherever in a file the import stands. Rooms in a row are peers:
# they do not import each other.
ROOMS = (
    ("errors",),
    ("retry",),
    ("storage",),
    ("lease",),
    ("config", "rundir", "provenance"),
    ("runtime",),
    ("shards",),
    ("views",),
    ("models",),
    ("objectives",),
    ("features",),
    ("pretrain",),
    ("embed",),
    ("index",),
    ("cluster", "anomaly", "reduce"),
    ("dedup", "corpus"),
    ("report",),
    ("plan",),
    ("pipeline", "doctor", "summary", "status"),
    ("options",),
    ("cli",),
)
LEVEL = {room: level for level, rooms in enumerate(ROOMS) for room in rooms}

# Where a package may be imported at all.
HOMES = {
    "ray": ("runtime/ray.py", "runtime/submit.py", "pretrain/launch.py", "report/explore/"),
    "deepspeed": ("pretrain/engine.py", "plan/probe.py"),
    "faiss": ("index/", "cluster/", "anomaly/", "reduce/"),
    "webdataset": ("shards/",),
    "transformers": ("models/",),
    "tokenizers": ("shards/text.py",),
    "av": ("shards/video.py", "shards/sources/moving_digits.py"),
}

# What `import sslscale` and `sslscale --help` load imports nothing heavy at its top.
LIGHT = (
    "__init__.py",
    "cli.py",
    "options.py",
    "errors.py",
    "retry.py",
    "storage.py",
    "lease.py",
    "rundir.py",
    "pipeline.py",
    "doctor.py",
    "config/",
    "runtime/base.py",
)
HEAVY = {"torch", "torchvision", "timm", "transformers", "sklearn", "pyarrow", "numpy", "fsspec", "PIL", *HOMES}


def violations(package: Path) -> list[str]:
    """Every import under `package` that breaks a rule, as `file:line: what`."""
    found = []
    for file in sorted(package.rglob("*.py")):
        relative = file.relative_to(package).as_posix()
        tree = ast.parse(file.read_text(), str(file))
        lazy = {id(node) for outer in ast.walk(tree) if _is_late(outer) for node in ast.walk(outer)}
        for node in ast.walk(tree):
            for module in _imported(node, package.name, relative):
                complaint = _complaint(module, relative, package.name, late=id(node) in lazy)
                if complaint:
                    found.append(f"{relative}:{node.lineno}: {complaint}")  # type: ignore[attr-defined]
    return found


def _is_late(node: ast.AST) -> bool:
    """Its imports do not run when the module is imported: a function, or `if TYPE_CHECKING`."""
    if isinstance(node, ast.If):
        return isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
    return isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)


def _imported(node: ast.AST, package: str, relative: str) -> Iterator[str]:
    """Absolute names of the modules that an import statement, or `import_module("literal")`, asks for."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        parts = [package, *Path(relative).parts[:-1]]
        base = [*parts[: len(parts) - node.level + 1]] if node.level else []
        module = ".".join([*base, *([node.module] if node.module else [])])
        yield from ([f"{module}.{alias.name}" for alias in node.names] if module == package else [module])
    elif isinstance(node, ast.Call) and getattr(node.func, "attr", getattr(node.func, "id", "")) == "import_module":
        yield from (arg.value for arg in node.args if isinstance(arg, ast.Constant) and isinstance(arg.value, str))


def _complaint(module: str, relative: str, package: str, late: bool) -> str | None:
    top, _, rest = module.partition(".")
    if top == package:
        own, other = _room(relative), rest.split(".")[0]
        if other not in LEVEL and other != "__version__":
            return f"{module}: {other!r} has no place in the order of rooms" if other else None
        if own and own != other and LEVEL.get(other, -1) >= LEVEL.get(own, -1):
            return f"{own} imports {module}, which is not above it"
    if top in HOMES and not relative.startswith(HOMES[top]):
        return f"{top} is imported outside of {', '.join(HOMES[top])}"
    if top in HEAVY and not late and relative.startswith(LIGHT):
        return f"{top} is imported at the top of a light module"
    return None


def _room(relative: str) -> str:
    """The room of a file; the package's own __init__ has none, and may import nothing of it but what is light."""
    return Path(relative).parts[0].removesuffix(".py") if relative != "__init__.py" else ""


def test_imports_go_one_way() -> None:
    assert violations(PACKAGE) == []


def test_every_room_has_a_place() -> None:
    rooms = {_room(file.relative_to(PACKAGE).as_posix()) for file in PACKAGE.rglob("*.py")} - {""}
    assert rooms <= LEVEL.keys()


@pytest.mark.parametrize(
    ("file", "line", "complaint"),
    [
        ("shards/plan.py", "from sslscale.embed.worker import EmbedWorker", "shards imports sslscale.embed.worker"),
        ("shards/plan.py", "from sslscale import pipeline", "shards imports sslscale.pipeline"),
        ("shards/plan.py", "from ..embed import worker", "shards imports sslscale.embed"),
        ("errors.py", "def late():\n    import sslscale.rundir", "errors imports sslscale.rundir"),
        ("cluster/measures.py", "import sslscale.anomaly", "cluster imports sslscale.anomaly"),
        ("runtime/base.py", "import sslscale.novelty", "'novelty' has no place"),
        ("embed/worker.py", "def late():\n    import ray.train", "ray is imported outside"),
        ("pretrain/loop.py", "from deepspeed.ops import adam", "deepspeed is imported outside"),
        (
            "features/store.py",
            "import importlib\nfaiss = importlib.import_module('faiss')",
            "faiss is imported outside",
        ),
        ("models/image.py", "import webdataset as wds", "webdataset is imported outside"),
        ("rundir.py", "import torch", "torch is imported at the top"),
        ("config/load.py", "try:\n    import numpy\nexcept ImportError:\n    pass", "numpy is imported at the top"),
    ],
)
def test_a_planted_import_is_found(tmp_path: Path, file: str, line: str, complaint: str) -> None:
    copy = tmp_path / "sslscale"
    shutil.copytree(PACKAGE, copy, ignore=shutil.ignore_patterns("__pycache__"))
    target = copy / file
    target.parent.mkdir(exist_ok=True)
    with target.open("a") as source:
        source.write(f"\n{line}\n")
    found = violations(copy)
    assert len(found) == 1
    assert found[0].startswith(f"{file}:")
    assert complaint in found[0]


def test_a_late_import_is_allowed_in_a_light_module(tmp_path: Path) -> None:
    copy = tmp_path / "sslscale"
    copy.mkdir()
    (copy / "errors.py").write_text("def late():\n    import torch\n")
    assert violations(copy) == []


@pytest.mark.parametrize(
    "code",
    [
        "import sslscale",
        "import sslscale.config, sslscale.errors, sslscale.rundir, sslscale.runtime.base, sslscale.doctor",
        "from typer.testing import CliRunner; from sslscale.cli import app; "
        "assert CliRunner().invoke(app, ['--help']).exit_code == 0",
    ],
)
def test_nothing_heavy_is_loaded(code: str) -> None:
    script = f"{code}\nimport sys; print(sorted(sys.modules.keys() & {sorted(HEAVY)}))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
