"""Live views of generations for notebooks; each also stands still in a page without scripts."""

from pipeinfer_dask.widgets.channel import Channel
from pipeinfer_dask.widgets.panel import Controls, Dashboard, dashboard
from pipeinfer_dask.widgets.stepper import Stepper
from pipeinfer_dask.widgets.views import DraftTree, Metrics, Timeline, TokenStream

__all__ = [
    "Channel",
    "Controls",
    "Dashboard",
    "DraftTree",
    "Metrics",
    "Stepper",
    "Timeline",
    "TokenStream",
    "dashboard",
]
