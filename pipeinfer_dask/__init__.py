"""Pipelined speculative decoding of language models on Dask workers.

The public names below are loaded when they are first used (PEP 562): importing
the package, or one of its pure parts, loads neither torch nor Dask.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__all__ = [
    "Costs",
    "Emulation",
    "Engine",
    "Generation",
    "Result",
    "Simulation",
    "Trace",
    "dashboard",
    "demo_pair",
    "simulate",
]

if TYPE_CHECKING:
    __version__: str
    from pipeinfer_dask.engine import Engine, Generation, Result
    from pipeinfer_dask.models.demo_pair import demo_pair
    from pipeinfer_dask.runtime.emulation.emulation import Emulation
    from pipeinfer_dask.simulation import Costs, Simulation, simulate
    from pipeinfer_dask.trace import Trace
    from pipeinfer_dask.widgets import dashboard
else:
    _HOMES = {
        "Engine": "pipeinfer_dask.engine",
        "Generation": "pipeinfer_dask.engine",
        "Result": "pipeinfer_dask.engine",
        "demo_pair": "pipeinfer_dask.models.demo_pair",
        "Costs": "pipeinfer_dask.simulation",
        "Emulation": "pipeinfer_dask.runtime.emulation.emulation",
        "Simulation": "pipeinfer_dask.simulation",
        "simulate": "pipeinfer_dask.simulation",
        "Trace": "pipeinfer_dask.trace",
        "dashboard": "pipeinfer_dask.widgets",
    }

    def __getattr__(name):
        if name == "__version__":  # known to whoever built or installed it: by the tag
            from importlib.metadata import version

            return version("pipeinfer-dask")
        if name not in _HOMES:
            from difflib import get_close_matches

            near = get_close_matches(name, __all__, n=1)
            hint = f": did you mean {near[0]!r}?" if near else ""
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}{hint}")
        value = globals()[name] = getattr(import_module(_HOMES[name]), name)
        return value


def load_ipython_extension(shell: Any) -> None:
    """Give a notebook the cell magic ``%%pipeinfer``: called by ``%load_ext pipeinfer_dask``."""
    from pipeinfer_dask.widgets.magic import PipeInferMagics

    shell.register_magics(PipeInferMagics)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
