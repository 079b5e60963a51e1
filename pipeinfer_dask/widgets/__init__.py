"""Live views of generations for notebooks; each also stands still in a page without scripts."""

from pipeinfer_dask.widgets.channel import Channel
from pipeinfer_dask.widgets.feed import Feed
from pipeinfer_dask.widgets.panel import Controls, Dashboard, dashboard
from pipeinfer_dask.widgets.stepper import Clock, Stepper
from pipeinfer_dask.widgets.view import TraceView
from pipeinfer_dask.widgets.views import DraftTree, Metrics, Timeline, TokenStream

__all__ = [
    "Channel",
    "Clock",
    "Controls",
    "Dashboard",
    "DraftTree",
    "Feed",
    "Metrics",
    "Stepper",
    "Timeline",
    "TokenStream",
    "TraceView",
    "dashboard",
]
