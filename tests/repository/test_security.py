"""Nothing in the package runs code that a file or a peer brings along."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

UNSAFE = {
    *("pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"),
    *("distributed.protocol.pickle.loads", "distributed.protocol.loads"),
    *("distributed.protocol.deserialize", "distributed.protocol.serialize.deserialize"),
    *("torch.load", "torch.jit.load", "torch.hub", "numpy.load", "np.load"),
    *("eval", "exec", "compile", "os.system", "yaml.load", "yaml.unsafe_load"),
}
"""What runs code that it reads."""


def unsafe(source: str) -> Iterator[str]:
    """Yield what a module says that runs what it reads."""
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Import(names):
                yield from (alias.name for alias in names if alias.name in UNSAFE)
            case ast.ImportFrom(module=str(module), names=names):
                yield from (
                    name
                    for alias in names
                    for name in (module, f"{module}.{alias.name}")
                    if name in UNSAFE
                )
            case ast.Attribute() | ast.Name() if ast.unparse(node) in UNSAFE:
                yield ast.unparse(node)
            case ast.keyword(
                arg="trust_remote_code" | "allow_pickle" | "shell" as name, value=value
            ):
                if not (isinstance(value, ast.Constant) and value.value is False):
                    yield name
            case ast.keyword(arg="weights_only", value=value):
                yield "weights_only"


def test_no_module_runs_what_it_reads(root: Path) -> None:
    files = sorted((root / "pipeinfer_dask").rglob("*.py"))
    assert len(files) > 50
    # A policy is of any class. It comes by a call of Dask's, from a client that may run anything.
    known = {"head_actor.py": ["distributed.protocol.pickle.loads"]}
    assert {file.name: found for file in files if (found := [*unsafe(file.read_text())])} == known


@pytest.mark.parametrize(
    "line",
    [
        "import pickle",
        "from pickle import loads",
        "from torch import load",
        "from distributed.protocol.pickle import dumps, loads",
        "torch.load(path)",
        "AutoConfig.from_pretrained(path, trust_remote_code=True)",
        "AutoConfig.from_pretrained(path, trust_remote_code=trusted)",
        "numpy.load(path, allow_pickle=True)",
        "eval(text)",
    ],
)
def test_what_runs_code_would_be_found(line: str) -> None:
    assert [*unsafe(line)]
