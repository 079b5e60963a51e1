"""``%%pipeinfer``: a cell whose text is a prompt. Loaded by ``%load_ext pipeinfer_dask``."""

from __future__ import annotations

import sys
from keyword import iskeyword
from typing import Any

from IPython.core.error import UsageError
from IPython.core.magic import Magics, cell_magic, magics_class
from IPython.core.magic_arguments import argument, magic_arguments, parse_argstring

from pipeinfer_dask.engine import Chat, Engine, Generation, GenerationInterrupted, Result


@magics_class
class PipeInferMagics(Magics):
    """The cell magic."""

    @magic_arguments()
    @argument(
        "engine",
        nargs="?",
        help="Name of the engine or chat. May be left out where there is only one engine.",
    )
    @argument("--strategy", "-s", help="As for Engine.start.")
    @argument("--max-new-tokens", "-n", type=int, help="As for Engine.start.")
    @argument("--out", "-o", metavar="NAME", help="Keep under this name what comes of it.")
    @cell_magic
    def pipeinfer(self, line: str, cell: str) -> None:
        """Generate from the cell's text, and show what comes as it comes."""
        if not {"--help", "-h"}.isdisjoint(line.split()):
            sys.stdout.write(self.pipeinfer.parser.format_help())
            return
        try:
            asked = parse_argstring(self.pipeinfer, line)
        except ValueError as error:  # a quotation that does not end
            raise UsageError(f"expected arguments as in a shell, got {line!r}: {error}") from None
        who = self._named(asked.engine) if asked.engine else self._only_engine()
        if asked.out is not None and (not asked.out.isidentifier() or iskeyword(asked.out)):
            raise UsageError(f"expected a name behind --out, got {asked.out!r}")
        try:
            generation: Generation = who.start(
                cell.removesuffix("\n"),
                max_new_tokens=asked.max_new_tokens,
                strategy=asked.strategy,
            )
        except (ValueError, RuntimeError) as error:
            raise UsageError(str(error)) from None
        try:
            for piece in generation:
                sys.stdout.write(piece)
                sys.stdout.flush()
            result = generation.result()
            self._keep(asked.out, result)
        except GenerationInterrupted as error:  # what came so far stands above it
            self._keep(asked.out, error)
            raise UsageError(str(error)) from None
        except KeyboardInterrupt:
            self._keep(asked.out, generation)
            raise
        except RuntimeError as error:
            raise UsageError(str(error)) from None
        finally:
            sys.stdout.write("\n")

    def _keep(self, name: str | None, text: Result | Generation | GenerationInterrupted) -> None:
        if name is not None:
            self._names[name] = text

    @property
    def _names(self) -> dict[str, Any]:
        assert self.shell is not None, "a magic belongs to a shell"
        names: dict[str, Any] = self.shell.user_ns
        return names

    def _named(self, name: str) -> Engine | Chat:
        found: Any = self._names.get(name)
        if not isinstance(found, Engine | Chat):
            what = "nothing" if found is None else type(found).__name__
            raise UsageError(
                f"expected {name} to be an engine or a chat, got {what}: make it first"
            )
        return found

    def _only_engine(self) -> Engine:
        # An underscore begins what the shell itself keeps of a cell's last value.
        names = {n: e for n, e in self._names.items() if isinstance(e, Engine) and n[0] != "_"}
        still_open = {name: engine for name, engine in names.items() if not engine._closed}
        names = still_open or names
        engines = list({id(engine): engine for engine in names.values()}.values())
        if len(engines) != 1:
            which = ", ".join(names) or "none"
            raise UsageError(f"expected one engine, got {which}: name it behind %%pipeinfer")
        return engines[0]
