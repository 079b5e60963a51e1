"""Imports run downwards only, and the pure layers load nothing heavy."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = "pipeinfer_dask"
# Low to high. A module imports from its own layer or from a lower one.
LAYERS = (
    "protocol",
    "core",
    "drafting",
    "policies",
    "trace",
    "simulation",
    "models",
    "testing",
    "runtime.links",
    "runtime.nodes",
    "runtime.planning",
    "runtime.pipeline",
    "runtime.head",
    "runtime.emulation",
    "engine",
    "terminal",
    "timeline",
    "hpc",
    "widgets",
    "bench",
    "cli",
)
UPWARD = {"engine imports pipeinfer_dask.widgets.dashboard"}
"""Where a layer may import from above: `Engine.dashboard`, when it is called. The views are built
upon the engine, and an engine in a notebook should show itself without another import."""
PURE = ("protocol", "core", "drafting", "policies")
"""What decides: standard library alone."""
HEAVY = {"torch", "transformers", "dask", "distributed"}


def imported(tree: ast.AST) -> Iterator[str]:
    """Yield the full names of all modules that are imported, wherever in the file."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports are not used here"
            assert node.module is not None
            # `from package import x`: x may be a module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def modules(root: Path) -> list[Path]:
    return sorted((root / PACKAGE).rglob("*.py"))


def layer_of(module: str) -> str:
    """Return the layer of a module, given by its full name; "" where it has none."""
    if module == PACKAGE:
        return "widgets"  # from which it may load the highest of its names
    name = module.removeprefix(f"{PACKAGE}.")
    return next((each for each in LAYERS if f"{name}.".startswith(f"{each}.")), "")


def layer(path: Path, root: Path) -> str:
    return layer_of(".".join(path.relative_to(root).with_suffix("").parts))


def test_every_module_has_a_layer(root: Path) -> None:
    homeless = [path.relative_to(root / PACKAGE) for path in modules(root) if not layer(path, root)]
    assert [str(path) for path in homeless] == ["__init__.py", "__main__.py", "runtime/__init__.py"]


def test_no_module_imports_from_a_layer_above_its_own(root: Path) -> None:
    upward = {
        f"{layer(path, root)} imports {name}"
        for path in modules(root)
        if layer(path, root)
        for name in imported(ast.parse(path.read_text()))
        if name.partition(".")[0] == PACKAGE and layer_of(name)
        if LAYERS.index(layer_of(name)) > LAYERS.index(layer(path, root))
    }
    assert upward == UPWARD


def test_what_decides_is_made_of_the_standard_library_alone(root: Path) -> None:
    foreign = {
        f"{path.name} imports {name}"
        for path in modules(root)
        if layer(path, root) in PURE
        for name in imported(ast.parse(path.read_text()))
        if name.split(".")[0] not in sys.stdlib_module_names
        if not name.startswith(tuple(f"{PACKAGE}.{pure}." for pure in PURE))
    }
    assert foreign == set()


@pytest.mark.parametrize("pure", ["core.machine", "policies", "trace", "simulation"])
def test_pure_layers_load_neither_torch_nor_dask(pure: str) -> None:
    script = f"import sys, {PACKAGE}.{pure}; print(*{{name.split('.')[0] for name in sys.modules}})"
    child = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert child.returncode == 0, child.stderr
    assert HEAVY.isdisjoint(child.stdout.split())


def test_no_module_outgrows_a_readers_head(root: Path) -> None:
    lines = {path: len(path.read_text().splitlines()) for path in modules(root)}
    assert {path.name: count for path, count in lines.items() if count > 450} == {}
    assert sum(count for path, count in lines.items() if layer(path, root) == "core") < 1500
