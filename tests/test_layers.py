"""Imports point downward only: a module sees lower layers, never its own or a higher one. Read from the source text, so
that imports inside functions and behind TYPE_CHECKING count as well."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# The loader is the module that `mlxmoe.load` comes from
LOADER = "loading"
# Lowest first. The modules of one line do not know each other.
PACKAGE_LAYERS = [
    ["errors"],
    ["units", "arguments", "machine", "files", "pressure"],
    ["formats", "budget", "router", "policies", "prefetch", "rotation"],
    ["plan", "kernels", "cache", "copies"],
    ["reference", "store", "residency", "work"],
    ["checkpoint", "models", "experts", "reader", "pictures", "parts"],
    ["banks", "blocks", "kernel_choice", "stacked", "gates"],
    ["repack", "shelves", "lookahead"],
    ["arena"],
    ["streaming", "runtime"],
    ["expert_memory", "elastic"],
    ["prepared"],
    [LOADER],
    ["upkeep"],
    ["session", "evaluate", "inspect", "doctor"],
    ["chat", "generate", "forecast", "trace"],
    ["replay"],
    ["explain"],
    ["cli"],
    ["__main__"],
]
CONVERT_LAYERS = [
    ["calibrate", "selftext", "quantize", "gptq"],
    ["config", "rotate", "domains", "hubtext"],
    ["source", "replicas"],
    ["measure", "stream", "written", "watch"],
    ["stats", "sensitivity", "strategies", "walk"],
    ["awq"],
    ["allocate", "calibrated", "changes"],
    ["write", "scores", "activations", "polish"],
    ["coded", "ensemble", "tokens"],
    ["layers", "compare"],
    ["gather", "route"],
    ["weigh", "coding"],
    ["polished"],
    ["passes"],
    ["refine"],
    ["job"],
    ["cli", "make_demo"],
]
BENCH_LAYERS = [
    ["arguments", "checkpoint", "child", "decode", "timing", "kernels", "launches", "pages", "ranking"],
    ["stock"],
    ["baseline", "cache_attempts", "class_weights", "convert", "simulate", "streaming_model", "reads", "stats"],
    ["cli", "memory", "chapter", "quantizers", "sensitivity", "report"],
    ["variants"],
]
HIGHEST_FOR_CONVERT = LOADER
# What `mlxmoe.NAME` gives is imported when it is asked for, by the package itself
LAZY_IN_PACKAGE = {"errors", LOADER}


def ranks() -> dict[str, int]:
    """Module, as in ``mlxmoe.convert.job``, to its layer: the package, above it the converter, above that bench."""
    lines = [[f"mlxmoe.{name}" for name in line] for line in PACKAGE_LAYERS]
    lines += [[f"mlxmoe.convert.{name}" for name in line] for line in CONVERT_LAYERS]
    lines += [[f"mlxmoe.bench.{name}" for name in line] for line in BENCH_LAYERS]
    return {name: rank for rank, line in enumerate(lines) for name in line}


RANKS = ranks()
SOURCES = {
    f"mlxmoe.{prefix}{path.stem}": path
    for prefix, folder in (("", "mlxmoe"), ("convert.", "convert"), ("bench.", "bench"))
    for path in sorted((ROOT / folder).glob("*.py"))
    if path.stem != "__init__"
}


def imported(tree: ast.AST, module: str) -> Iterator[str]:
    """Every module of the package that `module` imports: the longest known name, or what stands there."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(module.split(".")[: -node.level]) if node.level else ""
            base = ".".join(part for part in (base, node.module) if part)
            names = [f"{base}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in ("import_module", "__import__"):
            names = [arg.value for arg in node.args if isinstance(arg, ast.Constant) and isinstance(arg.value, str)]
        else:
            continue
        for name in names:
            if name.split(".")[0] != "mlxmoe":
                continue
            parts = name.split(".")
            known = [".".join(parts[:n]) for n in range(len(parts), 0, -1) if ".".join(parts[:n]) in RANKS]
            yield known[0] if known else name


def faults(text: str, module: str) -> list[str]:
    """One sentence for every import of `module`, with the source `text`, that does not point down."""
    found = []
    convert_sees = RANKS[f"mlxmoe.{HIGHEST_FOR_CONVERT}"]
    for name in imported(ast.parse(text), module):
        if name == "mlxmoe.__version__":
            continue
        if name not in RANKS:
            found.append(f"{module} imports {name}, which is no module; import the module that defines it")
        elif RANKS[name] >= RANKS[module]:
            found.append(f"{module} imports {name}, which is not below it")
        elif module.startswith("mlxmoe.convert.") and name.count(".") == 1 and RANKS[name] > convert_sees:
            found.append(f"{module} imports {name}, and the converter may import up to {HIGHEST_FOR_CONVERT} only")
    return found


def test_every_module_has_a_layer() -> None:
    new = sorted(SOURCES.keys() - RANKS.keys())
    gone = sorted(RANKS.keys() - SOURCES.keys())
    assert not new, f"{', '.join(new)} has no layer: say in tests/test_layers.py which modules it may import"
    assert not gone, f"{', '.join(gone)} is listed in tests/test_layers.py and is no longer there"


@pytest.mark.parametrize("module", SOURCES)
def test_imports_point_down(module: str) -> None:
    if module not in RANKS:
        pytest.fail(f"{module} has no layer: see test_every_module_has_a_layer")
    assert faults(SOURCES[module].read_text(encoding="utf-8"), module) == []


def test_the_package_itself_imports_lazily() -> None:
    tree = ast.parse((ROOT / "mlxmoe" / "__init__.py").read_text(encoding="utf-8"))
    at_import = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
    outside = {name for node in at_import for name in imported(node, "mlxmoe.__init__")}
    assert outside == set(), "import mlxmoe must stay quick: import inside __getattr__"
    assert set(imported(tree, "mlxmoe.__init__")) <= {f"mlxmoe.{name}" for name in LAZY_IN_PACKAGE}


@pytest.mark.parametrize("folder", ["convert", "bench"])
def test_folders_at_the_top_hold_their_modules_only(folder: str) -> None:
    """`convert/__init__.py` imports nothing, so that importing one stage does not import the others."""
    tree = ast.parse((ROOT / folder / "__init__.py").read_text(encoding="utf-8"))
    assert list(imported(tree, f"mlxmoe.{folder}.__init__")) == []
    assert (ROOT / "mlxmoe" / folder).resolve() == ROOT / folder


@pytest.mark.parametrize(
    ("module", "text", "words"),
    [
        ("mlxmoe.plan", "from mlxmoe.cli import main", "imports mlxmoe.cli, which is not below"),
        ("mlxmoe.plan", "def f():\n    import mlxmoe.chat as c", "imports mlxmoe.chat, which is not below"),
        ("mlxmoe.plan", "from mlxmoe import chat", "imports mlxmoe.chat, which is not below"),
        ("mlxmoe.plan", "from . import chat", "imports mlxmoe.chat, which is not below"),
        ("mlxmoe.plan", "from .chat import Chat", "imports mlxmoe.chat, which is not below"),
        ("mlxmoe.plan", "import importlib\nimportlib.import_module('mlxmoe.chat')", "imports mlxmoe.chat"),
        ("mlxmoe.plan", "if TYPE_CHECKING:\n    from mlxmoe.store import ExpertStore", "imports mlxmoe.store"),
        ("mlxmoe.plan", "import mlxmoe.plan", "imports mlxmoe.plan, which is not below"),
        ("mlxmoe.plan", f"from mlxmoe import {LOADER}", "which is not below"),
        ("mlxmoe.plan", "import mlxmoe.metal", "is no module"),
        ("mlxmoe.cli", "from mlxmoe.convert.job import Job", "imports mlxmoe.convert.job, which is not below"),
        ("mlxmoe.cli", "import mlxmoe.bench.cli", "imports mlxmoe.bench.cli, which is not below"),
        ("mlxmoe.store", "from mlxmoe.reference import f", "imports mlxmoe.reference, which is not below"),
        ("mlxmoe.convert.source", "from ..session import Engine", f"up to {LOADER} only"),
        ("mlxmoe.convert.source", "from mlxmoe.convert.job import Job", "which is not below"),
        ("mlxmoe.convert.source", "from mlxmoe.bench.timing import median", "which is not below"),
    ],
)
def test_a_fault_is_seen(module: str, text: str, words: str) -> None:
    (fault,) = faults(text, module)
    assert words in fault


@pytest.mark.parametrize(
    ("module", "text"),
    [
        ("mlxmoe.plan", "from mlxmoe.formats import LEVELS\nimport json, mlx.core"),
        ("mlxmoe.cli", "from mlxmoe import __version__\nimport mlxmoe.errors"),
        ("mlxmoe.convert.job", "from mlxmoe.checkpoint import Checkpoint\nfrom .source import Source"),
        ("mlxmoe.bench.cli", "from mlxmoe.chat import Chat\nfrom mlxmoe.convert.job import Job"),
        ("mlxmoe.plan", "import mlxmoe_other"),
    ],
)
def test_what_is_allowed(module: str, text: str) -> None:
    assert faults(text, module) == []
