"""Fills the tables of docs/design/architecture.md from the code.

    python -m docs.make_architecture

A test makes them again, and fails where the page is stale. Line counts are rounded, and stand until
they are off by more than a tenth: else every change would change the page.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import textwrap
from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from docs.import_reasons import REASONS
from docs.tables import fill, table
from pipeinfer_dask.core.machine import Machine
from pipeinfer_dask.protocol import messages

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "design" / "architecture.md"
API = ROOT / "docs" / "api.md"
PACKAGE = ROOT / "pipeinfer_dask"

PACKAGES = {
    "protocol": "the words that all parts share: events, commands, requests, sampling settings",
    "core": "what must hold whatever is chosen: the machine, the token tree, slots, runs",
    "drafting": "how guesses grow into a tree; guesses without a model",
    "policies": "what to run and what to draft next, and what is learnt for it",
    "trace": "what happened: the record, and figures, stories, files and pictures made of it",
    "simulation": "the same machine in virtual time",
    "models": "what computes: shards, KV caches, checkpoints, devices, the embedded pair",
    "testing": "synthetic pairs whose agreement is set by a dial",
    "runtime.links": "messages, their bytes, and the connections that carry them",
    "runtime.nodes": "a stage or a drafter on its worker: thread, links, loading",
    "runtime.planning": "what is asked, and who is to hold what: checked before any is loaded",
    "runtime.pipeline": "all nodes as one pipeline: opened, watched, mended",
    "runtime.head": "who drives it; requests, generations, conversations",
    "runtime.emulation": "real pipelines of emulated models, and emulated distance",
    "engine": "what users call from Python",
    "terminal": "a generation in a terminal",
    "timeline": "a trace as a picture of characters",
    "hpc": "engines on job queues",
    "widgets": "live views for notebooks",
    "bench": "benchmarks, a module for each suite",
    "cli": "what users call from a shell",
}
"""In the order in which imports may run: a package imports from those above it."""


def code(names: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in names) or "-"


# --- the machine ------------------------------------------------------------------


class Function(NamedTuple):
    """A function of the core, and its class; "" where it stands alone."""

    owner: str
    name: str
    node: ast.FunctionDef


class Place(NamedTuple):
    """A node of the source, the class that it stands in, and what its parameters were given as."""

    owner: str
    node: ast.AST
    given: dict[str, str]


class Calls:
    """Which commands each function of the core may lead to, by the names that it calls."""

    def __init__(self) -> None:
        self.commands = {kind.__name__ for kind in messages.Command.__args__}
        self.functions: dict[str, list[Function]] = {}
        for path in sorted((PACKAGE / "core").glob("*.py")):
            if path.name == "sharing.py":
                continue  # it drives machines, and is none
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, (ast.ClassDef, ast.Module)):
                    owner = node.name if isinstance(node, ast.ClassDef) else ""
                    for part in node.body:
                        if isinstance(part, ast.FunctionDef):
                            known = self.functions.setdefault(part.name, [])
                            known.append(Function(owner, part.name, part))

    def called(self, call: ast.Call, owner: str) -> tuple[str, list[Function]]:
        """Return the name that is called, and the functions that it may be."""
        if not isinstance(call.func, ast.Attribute):
            name = getattr(call.func, "id", "")
            return name, [known for known in self.functions.get(name, ()) if not known.owner]
        name = call.func.attr
        methods = [known for known in self.functions.get(name, ()) if known.owner]
        own = ast.unparse(call.func.value) == "self"
        return name, [known for known in methods if not own or known.owner == owner]

    def reached(
        self, nodes: Iterable[ast.AST], inside: Place, seen: set[tuple[str, str]] | None = None
    ) -> Iterator[Place]:
        """Yield what stands in these nodes of a function, and in what they call."""
        seen = set() if seen is None else seen
        for node in (inner for outer in nodes for inner in ast.walk(outer)):
            yield inside._replace(node=node)
            if isinstance(node, ast.Call):
                name, functions = self.called(node, inside.owner)
                arguments = [ast.unparse(each) for each in node.args]
                for function in functions:
                    if (function.owner, name) not in seen:
                        seen.add((function.owner, name))
                        names = [each.arg for each in function.node.args.args if each.arg != "self"]
                        given = dict(zip(names, arguments, strict=False))
                        place = Place(function.owner, function.node, given)
                        yield from self.reached([function.node], place, seen)

    def of_the_machine(self, nodes: Sequence[ast.AST]) -> Iterator[Place]:
        """Yield what stands in these nodes of the machine's class, and in what they call."""
        return self.reached(nodes, Place(Machine.__name__, nodes[0], {}))

    def made(self, nodes: Sequence[ast.AST]) -> list[str]:
        """Return the commands that these nodes of the machine may lead to, in their order."""
        names = {
            self.called(node, owner)[0]
            for owner, node, _ in self.of_the_machine(nodes)
            if isinstance(node, ast.Call)
        }
        return [kind.__name__ for kind in messages.Command.__args__ if kind.__name__ in names]

    def put(self, nodes: Sequence[ast.AST], state: Collection[str]) -> list[str]:
        """Return what these nodes of the machine may make of its state."""
        found: dict[str, None] = {}
        for owner, node, given in self.of_the_machine(nodes):
            if owner == Machine.__name__ and isinstance(node, ast.Assign):
                value = ast.unparse(node.value)
                value = given.get(value, value)
                for target in map(ast.unparse, node.targets):
                    if target.removeprefix("self.") in state and target != value:
                        found[f"{target} = {value}"] = None
        return list(found)


def machine_table() -> str:
    """Return what the machine does about each event, as it stands in `Machine.handle`."""
    calls = Calls()
    (handle,) = ast.parse(textwrap.dedent(inspect.getsource(Machine.handle))).body
    assert isinstance(handle, ast.FunctionDef)
    state = decisive(handle)
    rows: list[list[str]] = []
    for statement in handle.body:
        if isinstance(statement, ast.Match):
            for case in statement.cases:
                events = re.findall(r"(\w+)\(\)", ast.unparse(case.pattern))
                guard = case.guard or condition(case.body[0])
                said = f"`{ast.unparse(guard)}`" if guard is not None else "any"
                rows.append([code(events), said, *does(case.body, calls, state)])
        elif isinstance(statement, ast.If):
            rows += branches(statement, calls, state)
    return table(
        ["event", "state", "what is done", "next state", "commands it may lead to"],
        rows,
    )


def decisive(handle: ast.FunctionDef) -> set[str]:
    """Return what of the machine a method's conditions look at: the state that the table has."""
    conditions = [node.test for node in ast.walk(handle) if isinstance(node, ast.If)]
    guards = [node.guard for node in ast.walk(handle) if isinstance(node, ast.match_case)]
    looked_at = (node for each in (*conditions, *filter(None, guards)) for node in ast.walk(each))
    return {
        node.attr
        for node in looked_at
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "self"
    }


def condition(statement: ast.stmt) -> ast.expr | None:
    """Return what has to hold for a case to do anything, where that is asked of the state alone."""
    if not isinstance(statement, ast.If):
        return None
    is_plain = not any(isinstance(node, ast.NamedExpr) for node in ast.walk(statement.test))
    return statement.test if is_plain else None


def branches(statement: ast.If, calls: Calls, state: Collection[str]) -> Iterator[list[str]]:
    """Yield a row for each branch of a condition that stands outside the events."""
    asked = f"`{ast.unparse(statement.test)}`"
    leaves = isinstance(statement.body[-1], ast.Return)
    when = "before any" if leaves else "after each"
    yield [when, asked, *does(statement.body, calls, state)]
    for other in statement.orelse:
        if isinstance(other, ast.If):
            yield from branches(other, calls, state)


def does(body: Sequence[ast.stmt], calls: Calls, state: Collection[str]) -> tuple[str, str, str]:
    """Return which methods the machine calls, its next state, and the commands it may give."""
    own: dict[str, None] = {}
    for node in (inner for statement in body for inner in ast.walk(statement)):
        if isinstance(node, ast.AugAssign) and isinstance(node.target, ast.Attribute):
            own[f"{node.target.attr} {OPERATORS.get(type(node.op), '')}= 1"] = None
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            target = ast.unparse(node.func)
            if target.startswith("self."):
                own[target.removeprefix("self.")] = None
    return code(own), code(calls.put(body, state)), code(calls.made(body))


OPERATORS = {ast.Add: "+", ast.Sub: "-"}


def messages_table(kinds: Iterable[type]) -> str:
    """Return events or commands, with the first sentence of what they say of themselves."""
    return table(
        ["name", "meaning", "fields"],
        ([f"`{kind.__name__}`", summary(kind), code(kind.__annotations__)] for kind in kinds),
    )


def summary(thing: object) -> str:
    """Return the first paragraph of a docstring."""
    return (inspect.getdoc(thing) or "").split("\n\n")[0].replace("\n", " ")


# --- packages ---------------------------------------------------------------------


def modules(package: str) -> list[Path]:
    """Return the modules of a package, or the one module of that name."""
    folder = PACKAGE.joinpath(*package.split("."))
    return sorted(folder.rglob("*.py")) if folder.is_dir() else [folder.with_suffix(".py")]


def there() -> list[str]:
    return [name for name in PACKAGES if all(path.is_file() for path in modules(name))]


def lines(package: str) -> int:
    return sum(len(path.read_text(encoding="utf-8").splitlines()) for path in modules(package))


def imports(package: str) -> list[str]:
    """Return the packages that one imports from, in their order."""
    found = set()
    for path in modules(package):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.module is not None:
                # `from pipeinfer_dask import x`: x is a package, or a public name
                names = [f"{node.module}.{alias.name}." for alias in node.names]
                found |= {
                    name
                    for name in PACKAGES
                    if any(each.startswith(f"{PACKAGE.name}.{name}.") for each in names)
                }
    return [name for name in PACKAGES if name in found - {package}]


def packages_table(shown: str) -> str:
    """Return the packages; a line count that the page shows stays while it is about right."""
    rows_shown = re.findall(r"^\| `([\w.]+)` \| (\d+) \|", shown, re.M)
    said = {name: int(count) for name, count in rows_shown}
    rows = []
    for name in there():
        count = lines(name)
        if abs(said.get(name, 0) - count) > max(50, count / 10):
            said[name] = max(50, round(count, -2))
        rows.append([f"`{name}`", said[name], PACKAGES[name]])
    return table(["package", "lines, about", "what it is for"], rows)


def imports_table() -> str:
    """Return what each package imports from, and why.

    Raises
    ------
    ValueError
        If an import has no reason, or a reason no import.
    """
    rows = []
    for name in there():
        reasons = REASONS.get(name, {})
        if wrong := reasons.keys() ^ set(imports(name)):
            raise ValueError(f"imports of {name} without a reason, or the other way: {wrong}")
        rows += [[f"`{name}`", f"`{other}`", reasons[other]] for other in imports(name)]
    return table(["package", "imports from", "why"], rows)


# --- public names -----------------------------------------------------------------


class Section(NamedTuple):
    """A part of the API page: its heading, why its names are public, and their full names."""

    heading: str
    reason: str
    names: list[str]


def public() -> list[Section]:
    """Return what the API page lists."""
    _, *parts = re.split(r"^## ", API.read_text(encoding="utf-8"), flags=re.M)
    sections, module = [], PACKAGE.name
    for part in parts:
        heading, reason = part.split("\n\n")[:2]
        section = Section(heading, reason.replace("\n", " "), [])
        for found in re.finditer(r"^\.\. currentmodule:: (\S+)$|^   (\w+)$", part, re.M):
            module = found[1] or module
            if found[2]:
                section.names.append(f"{module}.{found[2]}")
        sections.append(section)
    return sections


def named(name: str) -> Any:
    """Return what has this full name."""
    module, _, last = name.rpartition(".")
    return getattr(importlib.import_module(module), last)


def names_table() -> str:
    """Return the public names: why they are public, and what they say of themselves."""
    return "\n\n".join(
        f"**{section.heading}.** {section.reason}\n\n"
        + table(
            ["name", "what it is"], ([f"`{name}`", summary(named(name))] for name in section.names)
        )
        for section in public()
    )


def filled(page: str) -> str:
    """Return the page with its tables made anew."""
    parts = {
        "machine": machine_table(),
        "events": messages_table(messages.Event.__args__),
        "commands": messages_table(messages.Command.__args__),
        "packages": packages_table(page),
        "imports": imports_table(),
        "names": names_table(),
    }
    for name, part in parts.items():
        page = fill(page, name, part)
    return page


if __name__ == "__main__":
    PAGE.write_text(filled(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
