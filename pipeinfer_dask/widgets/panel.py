"""A prompt and buttons, and the views of what they start."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from threading import Thread
from typing import TYPE_CHECKING, Any

import ipywidgets

from pipeinfer_dask.policies import STRATEGIES
from pipeinfer_dask.trace import Trace
from pipeinfer_dask.widgets.channel import Channel
from pipeinfer_dask.widgets.clock import Clock
from pipeinfer_dask.widgets.still import Still
from pipeinfer_dask.widgets.views import DraftTree, Metrics, Timeline, TokenStream

if TYPE_CHECKING:
    from pipeinfer_dask.engine import Engine, Generation

PROMPT = "def main"


class Controls(ipywidgets.VBox):  # type: ignore[misc]
    """A prompt, a strategy and its knobs, and buttons to run and to cancel.

    Parameters
    ----------
    engine : Engine
        What generates.
    started : callable, optional
        Called as ``started(generation)`` for each that is started.
    prompt : str
        What stands in the prompt's field at first.
    max_new_tokens : int
        The same of the tokens to generate.

    Attributes
    ----------
    generation : Generation or None
        The latest.
    """

    def __init__(
        self,
        engine: Engine,
        started: Callable[[Generation], None] | None = None,
        *,
        prompt: str = PROMPT,
        max_new_tokens: int = 64,
    ) -> None:
        self._engine = engine
        self._started = started
        self.generation: Generation | None = None
        wide = ipywidgets.Layout(width="auto")  # a full width would add the margins to it
        # What is typed is told as a whole when a field is left, so before a click: a field that
        # told each key at once would keep the last ones back until the first was answered.
        whole = {"continuous_update": False}
        self.prompt = ipywidgets.Textarea(
            prompt, description="Prompt", rows=2, layout=wide, **whole
        )
        names = list(STRATEGIES) if engine.draft is not None else ["iterative"]
        self.strategy = ipywidgets.Dropdown(
            options=names, value=names[-1], description="Strategy", layout={"width": "240px"}
        )
        self.knobs = ipywidgets.Text(
            placeholder="micro_batch=4", description="Knobs", layout={"width": "300px"}, **whole
        )
        self.max_new_tokens = ipywidgets.BoundedIntText(
            max_new_tokens, min=1, max=engine.target.context, description="New tokens", **whole
        )
        self.max_new_tokens.layout.width = "180px"
        self.run = ipywidgets.Button(description="Run", button_style="primary", icon="play")
        self.cancel = ipywidgets.Button(description="Cancel", icon="stop", disabled=True)
        self.status = ipywidgets.Label("Run starts a generation.")
        self.run.on_click(lambda _: self._run())
        self.cancel.on_click(lambda _: self._cancel())
        settings = [self.strategy, self.knobs, self.max_new_tokens]
        flow = ipywidgets.Layout(flex_flow="row wrap")
        super().__init__(
            [
                self.prompt,
                ipywidgets.HBox(settings, layout=flow),
                ipywidgets.HBox([self.run, self.cancel, self.status], layout=flow),
            ]
        )

    def _run(self) -> None:
        try:
            generation = self._engine.start(
                self.prompt.value,
                max_new_tokens=self.max_new_tokens.value,
                strategy=self.strategy.value,
                **_knobs(self.knobs.value),
            )
        except (ValueError, RuntimeError) as error:
            self.status.value = f"Not started: {error}"
            return
        self.generation = generation
        self.run.disabled, self.cancel.disabled = True, False
        self.status.value = "running"
        if self._started is not None:
            self._started(generation)
        Thread(
            target=self._await, args=(generation,), name="pipeinfer-controls", daemon=True
        ).start()

    def _cancel(self) -> None:
        if self.generation is not None:
            self.status.value = "cancelling"
            self.generation.cancel()

    def _await(self, generation: Generation) -> None:
        try:
            result = generation.result()
            self.status.value = f"{generation.status}: {len(result.token_ids)} tokens"
        except RuntimeError as error:
            self.status.value = f"failed: {error}"
        self.run.disabled, self.cancel.disabled = False, True


class Dashboard(Still, ipywidgets.VBox):  # type: ignore[misc]
    """Controls, and live views of what they start; a clock steps through what is over.

    Parameters
    ----------
    engine : Engine
        What generates.
    prompt : str
        What stands in the prompt's field at first.
    max_new_tokens : int
        The same of the tokens to generate.

    Attributes
    ----------
    controls : Controls
    channel : Channel
    clock : Clock
    timeline : Timeline
    text : TokenStream
    tree : DraftTree
    metrics : Metrics
    """

    label = "Dashboard"

    def __init__(self, engine: Engine, *, prompt: str = PROMPT, max_new_tokens: int = 64) -> None:
        self.channel = Channel(Trace(engine.stages))
        self.channel.at_end.append(self._wind)
        self.controls = Controls(engine, self.show, prompt=prompt, max_new_tokens=max_new_tokens)
        self.clock = Clock()
        self.text, self.timeline = TokenStream(self.channel), Timeline(self.channel)
        self.tree, self.metrics = DraftTree(self.channel), Metrics(self.channel)
        self.clock.link(self.views)
        super().__init__(
            [self.controls, self.clock, self.text, self.timeline, self.metrics, self.tree]
        )

    @property
    def views(self) -> tuple[TokenStream, Timeline, Metrics, DraftTree]:
        """The views, from top to bottom."""
        return self.text, self.timeline, self.metrics, self.tree

    @property
    def _channels(self) -> Sequence[Channel]:
        """What is shown."""
        return (self.channel,)

    @property
    def generation(self) -> Generation | None:
        """The latest generation that was started here."""
        return self.controls.generation

    def show(self, source: Any) -> None:
        """Show something in all views.

        Parameters
        ----------
        source : Trace, Generation, Result or Simulation
            What to show.
        """
        if self.clock.last:
            self.clock.wind([], -1.0)
        self.channel.show(source)

    def to_html(self) -> str:
        """Return all views as HTML that needs neither scripts nor the network.

        Returns
        -------
        str
            From the text to the tree.
        """
        return "".join(view.to_html() for view in self.views)

    @property
    def _hider(self) -> Clock:
        return self.clock

    def _wind(self) -> None:
        self.clock.wind([self.channel.feed], -1.0)


def dashboard(engine: Engine, *, prompt: str = PROMPT, max_new_tokens: int = 64) -> Dashboard:
    """Return controls for an engine and live views of what they start, for a notebook.

    Parameters
    ----------
    engine : Engine
        What generates.
    prompt : str
        What stands in the prompt's field at first.
    max_new_tokens : int
        The same of the tokens to generate.

    Returns
    -------
    Dashboard
        To be shown as a cell's last line.
    """
    return Dashboard(engine, prompt=prompt, max_new_tokens=max_new_tokens)


def _knobs(text: str) -> dict[str, Any]:
    """Return the settings in ``name=value, name=value``.

    Raises
    ------
    ValueError
        If it is written otherwise.
    """
    knobs = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        name, equals, value = (piece.strip() for piece in part.partition("="))
        try:
            if not equals or not name.isidentifier():
                raise ValueError
            knobs[name] = json.loads(value.lower())
        except ValueError:
            raise ValueError(f"expected knobs as name=value, got {part!r}") from None
    return knobs
