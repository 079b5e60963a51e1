"""What an engine does once it stands: generations, conversations, measuring, and its end."""

from __future__ import annotations

import atexit
import itertools
import os
import warnings
from asyncio import AbstractEventLoop
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from threading import Lock, Thread
from typing import TYPE_CHECKING, Any, Literal, NoReturn, Protocol, Self
from weakref import WeakSet, finalize

from pipeinfer_dask.models.checkpoint import Checkpoint
from pipeinfer_dask.policies import Policy
from pipeinfer_dask.runtime.head.chat import Chat
from pipeinfer_dask.runtime.head.conversation import Conversation
from pipeinfer_dask.runtime.head.generation import Generation
from pipeinfer_dask.runtime.head.result import Result
from pipeinfer_dask.runtime.head.text import TokenTexts, text_of
from pipeinfer_dask.runtime.planning.admission import Admission
from pipeinfer_dask.runtime.planning.clusters import call_on, check_apart
from pipeinfer_dask.runtime.planning.opening import explained
from pipeinfer_dask.runtime.planning.settings import split
from pipeinfer_dask.simulation import Costs
from pipeinfer_dask.trace import Trace

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedTokenizerBase


OURS = ("generation_config", "seed", "logprobs")
"""Options of `Serving.start` that are neither settings of `GenerationConfig` nor knobs."""


CLOSED = "this engine is closed: open another one"


class EngineClosedError(RuntimeError):
    """The engine has been closed, its pipeline is lost, or it is of the process that forked."""


class Driver(Protocol):
    """Drives the generations: a `Head` here, or a `RemoteHead` for one on a worker."""

    @property
    def loop(self) -> AbstractEventLoop:
        """To which all methods belong but `start`, `cancel` and `forget`."""
        ...

    @property
    def lost(self) -> Exception | None:
        """What the pipeline was lost by."""
        ...

    @property
    def max_concurrent(self) -> int:
        """Most generations that run at once."""
        ...

    def start(self, generation: Generation) -> None:
        """Queue a generation."""
        ...

    def cancel(self, generation: Generation) -> None:
        """Stop a generation, running or queued."""
        ...

    def forget(self, conversation: Conversation) -> None:
        """Give up a conversation's KV cache."""
        ...

    async def measure_costs(self, request: int, *, drafter: bool) -> Costs:
        """Measure what each part of the pipeline costs."""
        ...

    def end(self, error: Exception) -> None:
        """Fail all generations, and any that is started later."""
        ...


class Serving:
    """Takes what is asked for to the head, from any thread.

    Parameters
    ----------
    admission : Admission
    draft : Checkpoint, "ngram" or None
    layer_ranges : list of range
    head : Driver
    resources : ExitStack
        What is to be closed with it.
    """

    def __init__(
        self,
        admission: Admission,
        draft: Checkpoint | Literal["ngram"] | None,
        layer_ranges: list[range],
        head: Driver,
        resources: ExitStack,
    ) -> None:
        self.target = admission.target
        self.draft = draft
        self.layer_ranges = layer_ranges
        self._admission = admission
        self._texts = TokenTexts(admission.tokenizer)
        self._head = head
        self._resources = resources
        self._places: dict[str, str] = {}  # by node, as it is titled, its worker's address
        self._names: dict[str, str] = {}  # by address, its machine and worker
        self._requests = itertools.count()
        self._underway: WeakSet[Generation] = WeakSet()
        self._lock = Lock()
        self._closed = ""  # or why nothing can be asked of it any more
        self._forgotten = finalize(self, _let_go, head, resources, repr(self))
        self._forgotten.atexit = False
        _open.add(self)

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The target's tokenizer, which the draft shares."""
        return self._admission.tokenizer

    @property
    def stages(self) -> int:
        """Stages of the pipeline."""
        return len(self.layer_ranges)

    @explained
    def generate(
        self,
        prompt: str | Sequence[int],
        *,
        max_new_tokens: int | None = None,
        strategy: str | Policy | None = None,
        **options: Any,
    ) -> Result:
        """Generate, and wait for the result.

        Parameters
        ----------
        prompt : str or sequence of int
            Text, or token ids.
        max_new_tokens : int, optional
            As for `start`.
        strategy : str or Policy, optional
            As for `start`.
        **options
            As for `start`.

        Returns
        -------
        Result
            The text, its tokens, and all that happened.

        Raises
        ------
        ValueError, EngineClosedError
            As `start` does.
        GenerationInterrupted
            If the pipeline was lost; it holds the text so far.
        KeyboardInterrupt
            If the wait is interrupted. The generation is cancelled, and is the interrupt's
            ``generation``: its result holds the text so far.
        """
        generation = self.start(prompt, max_new_tokens=max_new_tokens, strategy=strategy, **options)
        try:
            return generation.result()
        except KeyboardInterrupt as interrupt:
            interrupt.generation = generation  # type: ignore[attr-defined]  # nobody else has it
            raise

    @explained
    def start(
        self,
        prompt: str | Sequence[int],
        *,
        max_new_tokens: int | None = None,
        strategy: str | Policy | None = None,
        generation_config: GenerationConfig | Mapping[str, Any] | None = None,
        seed: int | None = None,
        logprobs: int = 0,
        **options: Any,
    ) -> Generation:
        """Start to generate, and return at once.

        Several generations share the pipeline, up to the engine's ``max_concurrent``; others
        wait in a queue until one of these is over (``generation.status`` and ``.position`` tell).

        Parameters
        ----------
        prompt : str or sequence of int
            Text, or token ids.
        max_new_tokens : int, optional
            By default that of ``generation_config``, and 64 if it says nothing.
        strategy : str or Policy, optional
            ``"iterative"``, ``"speculative"``, ``"pipeinfer"`` or ``"adaptive"``; by default
            ``"adaptive"``, or ``"iterative"`` for an engine without a draft.
        generation_config : GenerationConfig or dict, optional
            Of transformers. What it asks for and can't be had is refused by name.
        seed : int, optional
            For sampling: it and the settings alone decide on the text. By default a random one,
            which the result names.
        logprobs : int
            Report log-probabilities of each token, and of so many best ones at its place: the
            log-softmax of the target's raw logits.
        **options
            Fields of `GenerationConfig`, with its meaning, which win over those of
            ``generation_config``: ``temperature``, ``top_p``, ``stop_strings``, ... And the
            strategy's own knobs, such as ``micro_batch``; see `pipeinfer_dask.policies`.

        Returns
        -------
        Generation
            The text on its way.

        Raises
        ------
        ValueError
            If the prompt is empty or holds an unknown token, prompt and new tokens are longer
            than the model's context, or a setting or a knob is not to be had.
        EngineClosedError
            If the engine is closed, or its pipeline is lost.

        Notes
        -----
        The text is greedy unless sampling is asked for: by ``do_sample=True``, or by any of
        ``temperature`` (0 is greedy), ``top_k``, ``top_p``, ``top_h``, ``min_p``, ``typical_p``,
        ``epsilon_cutoff``, ``eta_cutoff``. As in ``generate``, what is not given is taken from the
        checkpoint's generation_config.json, but for ``do_sample`` and the lengths: its temperature
        is that of texts that are sampled. Otherwise ``top_k`` is off by default, and not 50.
        """
        options.update(generation_config=generation_config, seed=seed, logprobs=logprobs)
        return self._start(prompt, max_new_tokens, strategy, options)

    def _start(
        self,
        prompt: str | Sequence[int],
        max_new_tokens: int | None,
        strategy: str | Policy | None,
        options: Mapping[str, Any],
        conversation: Conversation | None = None,
    ) -> Generation:
        self._check_open()
        if self._head.lost is not None:
            raise EngineClosedError(f"the pipeline is lost ({self._head.lost}): open another one")
        ours = {name: options[name] for name in OURS if name in options}
        settings, knobs = split({n: o for n, o in options.items() if n not in ours})
        policy = self._admission.policy(strategy, knobs)
        with self._lock:  # requests reach the head in the order of their numbers
            request = self._admission.request(
                next(self._requests),
                prompt,
                max_new_tokens,
                cache=conversation.cache if conversation is not None else None,
                **ours,
                **settings,
            )
            stream, stops = text_of(request, self.tokenizer)
            trace = Trace(self.stages, texts=self._texts, places=self._where())
            generation = Generation(
                request,
                policy,
                stream,
                trace,
                cancel=self._cancel,
                stops=stops,
                conversation=conversation,
            )
            try:
                if self._closed:
                    raise RuntimeError
                # Known at once: until the head has looked at it, as of what is not done by now.
                self._underway = WeakSet(one for one in self._underway if not one.done())
                if (place := len(self._underway) + 1 - self._head.max_concurrent) > 0:
                    generation.wait_in_line(place)
                self._head.start(generation)
                self._underway.add(generation)
            except RuntimeError:
                raise EngineClosedError(self._closed or CLOSED) from None
        return generation

    def _where(self) -> dict[str, str]:
        # Without asking anybody: a worker that came later goes by its address.
        return {
            node.partition(" (")[0]: self._names.get(where, where)
            for node, where in self._places.items()
        }

    @explained
    def chat(self, system: str | None = None, *, template: str | None = None) -> Chat:
        """Begin a conversation: its KV cache is kept from turn to turn.

        Parameters
        ----------
        system : str, optional
            What the model is told before all else.
        template : str, optional
            A chat template (Jinja) in place of the tokenizer's; ``"plain"`` for none: what is
            sent goes on with the text as it stands, as suits a model that was not made to chat.

        Returns
        -------
        Chat
            For a ``with`` block, which gives its KV cache to others at its end.

        Raises
        ------
        ValueError
            If neither the tokenizer nor you have a template, or it is none.
        EngineClosedError
            If the engine is closed.

        Notes
        -----
        Between turns a cache gives way where ``max_concurrent`` others are needed. The next turn
        then reads the whole text again.
        """
        self._check_open()
        with self._lock:
            conversation = Conversation(next(self._requests))

        def start(
            prompt: Sequence[int],
            max_new_tokens: int | None,
            strategy: str | Policy | None,
            options: Mapping[str, Any],
        ) -> Generation:
            return self._start(prompt, max_new_tokens, strategy, options, conversation)

        return Chat(
            self.tokenizer,
            start,
            lambda: None if self._closed else self._head.forget(conversation),
            system=system,
            template=template,
        )

    def measure_costs(self) -> Costs:
        """Measure what each part of this pipeline costs, for ``simulate(costs=...)``.

        Some runs of 1 to 8 tokens go through the pipeline, one at a time; generations that
        are started meanwhile wait. Stages on one machine share its cores: each is measured
        while the others idle, so a simulation with these costs is of machines of their own.

        Returns
        -------
        Costs
            Seconds of 1 to 8 tokens on each stage and on the draft model (0 where there is
            none, or it is lost), and of a hop.

        Raises
        ------
        EngineClosedError
            If the engine is closed, or its pipeline is lost.
        PipelineBusyError
            If a generation runs or waits: a `RuntimeError`.
        """
        with self._lock:
            self._check_open()
            if (lost := self._head.lost) is not None:
                raise EngineClosedError(f"the pipeline is lost ({lost}): open another one")
            request = next(self._requests)
        drafter = self.draft is not None
        return call_on(self._head.loop, self._head.measure_costs(request, drafter=drafter))

    def close(self) -> None:
        """Release every model, thread and link. Running generations fail; can be called twice."""
        check_apart(self._head.loop)
        with self._lock:
            closed, self._closed = self._closed, self._closed or CLOSED
        if closed:
            return
        self._forgotten.detach()
        _close(self._head, self._resources)

    def _check_open(self) -> None:
        if self._closed:
            raise EngineClosedError(self._closed)

    def _part(self) -> None:
        """Be closed in a process that was forked: all that it has is the parent's."""
        self._lock = Lock()  # the other may be held by a thread that is not here
        self._closed = (
            f"expected an engine of this process, got one that process {os.getppid()} opened "
            "before it forked: open one here"
        )
        self._forgotten.detach()
        for generation in self._underway:
            generation.part(EngineClosedError(self._closed))

    def _cancel(self, generation: Generation) -> None:
        # Through us: who holds a generation that is on its way holds its engine, too.
        self._head.cancel(generation)

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            "an engine can't be sent to workers or copied: call it here, or open it with "
            "head='worker'"
        )

    def __enter__(self) -> Self:
        self._check_open()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        # Of two interrupts, one in the block and one meanwhile, Python is to show one.
        with suppress(*[KeyboardInterrupt] if kind is KeyboardInterrupt else []):
            self.close()


_open: WeakSet[Serving] = WeakSet()


@atexit.register
def _close_open() -> None:
    """Close what is open when Python ends, while its loop still runs: before Dask ends that."""
    for serving in list(_open):
        # Whatever goes wrong, nobody is left who could do anything about it.
        with suppress(Exception, KeyboardInterrupt):
            serving.close()


def _part_open() -> None:
    for serving in _open:
        serving._part()
    _open.clear()


os.register_at_fork(after_in_child=_part_open)


def _close(head: Driver, resources: ExitStack) -> None:
    with suppress(RuntimeError):  # a loop that has ended has failed all generations
        head.loop.call_soon_threadsafe(
            head.end, EngineClosedError("the engine was closed meanwhile")
        )
    resources.close()


def _let_go(head: Driver, resources: ExitStack, name: str) -> None:
    """Close what nobody can close any more."""
    # Garbage is collected in any thread, maybe in that which closing has to wait for.
    closing = Thread(target=_close, args=(head, resources), name="pipeinfer-forgotten", daemon=True)
    closing.start()
    warnings.warn(f"{name} was never closed: use a with block", ResourceWarning, stacklevel=2)
