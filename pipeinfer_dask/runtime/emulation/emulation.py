"""An emulated engine: real processes, links and scheduling around models that only wait."""

from __future__ import annotations

import asyncio
import itertools
import math
import os
from contextlib import ExitStack, suppress
from dataclasses import dataclass, fields, replace
from functools import partial
from types import TracebackType
from typing import Any, Literal, Self

from distributed import Client

from pipeinfer_dask.policies import Policy, policy_of
from pipeinfer_dask.protocol.request import Request
from pipeinfer_dask.protocol.sampling import Sampling
from pipeinfer_dask.runtime.emulation.lags import (
    Distance,
    DistantHead,
    DistantSpec,
    LaggingHead,
    LaggingLocalPipeline,
    LaggingPipeline,
)
from pipeinfer_dask.runtime.emulation.paced import paced_specs
from pipeinfer_dask.runtime.head.generation import Generation
from pipeinfer_dask.runtime.head.head import MAX_CONCURRENT, Head
from pipeinfer_dask.runtime.head.head_actor import HeadActor, PipelinePlan
from pipeinfer_dask.runtime.head.measuring import measure_hop
from pipeinfer_dask.runtime.head.remote_head import RemoteHead
from pipeinfer_dask.runtime.head.result import Result
from pipeinfer_dask.runtime.head.serving import Driver
from pipeinfer_dask.runtime.nodes.actors import NodeActor
from pipeinfer_dask.runtime.nodes.pauses import short_collections
from pipeinfer_dask.runtime.pipeline.dask_pipeline import DaskPipeline
from pipeinfer_dask.runtime.pipeline.interface import DEADLINE_S, Pipeline
from pipeinfer_dask.runtime.pipeline.local_pipeline import LocalPipeline
from pipeinfer_dask.runtime.pipeline.recovery import NONE
from pipeinfer_dask.runtime.planning.clusters import (
    LoopThread,
    call_on,
    loop_of,
    own_cluster,
    workers_of,
)
from pipeinfer_dask.runtime.planning.opening import check_room, explained, open_on
from pipeinfer_dask.runtime.planning.placement import WORKER, head_worker, place
from pipeinfer_dask.runtime.planning.workers import check_packages
from pipeinfer_dask.simulation import PROMPT_TOKENS, SLOTS, Costs
from pipeinfer_dask.simulation.truth import SyntheticPair
from pipeinfer_dask.trace import Trace


def default_processes(stages: int) -> int:
    """Return how many worker processes serve best: as many as can run at once, at least two.

    Nodes hardly compute, so they share processes; more of them only make hops slower. With
    two some hops are from process to process, as on a cluster.
    """
    return max(2, min(os.cpu_count() or 1, stages + 1))


@dataclass(frozen=True)
class EmulatedResult(Result):
    """A generation by emulated models: the times are real, the computing was not."""

    def __repr__(self) -> str:
        return (
            f"EmulatedResult(strategy={self.strategy!r}, tokens={len(self.token_ids)}, "
            f"finish_reason={self.finish_reason!r})"
        )


class Emulation:
    """Emulated stages and an emulated drafter, and the real head that drives them.

    Made by `open`. Use it in a ``with`` block, or call `close`.

    Parameters
    ----------
    costs : Costs
        How long the nodes take.
    acceptance : float
        The chance of a guess to be right.
    seed : int
        Of the synthetic text.
    distance : Distance or None
        What every hop adds to the real one.
    head : Driver
        Who drives the nodes.
    resources : ExitStack
        What is released when it is closed.
    """

    def __init__(
        self,
        costs: Costs,
        acceptance: float,
        seed: int,
        distance: Distance | None,
        head: Driver,
        resources: ExitStack,
    ) -> None:
        self.costs = costs
        self.acceptance = acceptance
        self.seed = seed
        self._distance = distance
        self._head = head
        self._resources = resources
        self._requests = itertools.count()

    @classmethod
    @explained
    def open(
        cls,
        costs: Costs,
        *,
        acceptance: float = 0.8,
        seed: int = 0,
        client: Client | None = None,
        in_process: bool = False,
        distance: Distance | None = None,
        away: Distance | None = None,
        head: Literal["client", "worker"] = "client",
        max_concurrent: int = MAX_CONCURRENT,
    ) -> Self:
        """Start the nodes.

        Parameters
        ----------
        costs : Costs
            Only its computing is emulated: hops take what they take here.
        acceptance : float
            Of the synthetic text, as for `simulate`.
        seed : int
            Of the synthetic text.
        client : distributed.Client, optional
            The cluster to use; a worker may hold several nodes. Without one a cluster of a
            few processes is started, and ended with this.
        in_process : bool
            No cluster at all: nodes are threads of this process.
        distance : Distance, optional
            What every hop is to add to the real one: an emulated network, too.
        away : Distance, optional
            What only hops between this process and the workers are to add: those from worker to
            worker stay what they are.
        head : {"client", "worker"}
            As for `Engine.from_pretrained`.
        max_concurrent : int
            Most generations at once.

        Raises
        ------
        ValueError
            If these are no costs, no generation may run, the acceptance is no chance, there is a
            client as well as ``in_process``, or what is asked of a head on a worker can't be had.
        RuntimeError
            If a worker of the client's can't import this package.
        """
        if client is not None and in_process:
            raise ValueError("expected a client or in_process=True, got both: leave one out")
        if head == WORKER and (in_process or distance is not None):
            raise ValueError("expected head='worker' without in_process and distance: leave them")
        if not isinstance(costs, Costs):
            raise ValueError(f"expected costs as made by Costs.even, got {costs!r}")
        check_room(max_concurrent, 0, in_process=in_process)
        specs, draft_spec = paced_specs(costs, acceptance, seed)
        stages = len(specs)
        with ExitStack() as resources:
            if in_process:
                loop = resources.enter_context(LoopThread()).loop
            else:
                if client is None:
                    client = own_cluster(default_processes(stages), resources)
                loop = loop_of(client)
                where = place(workers_of(client), stages, drafter=True, share=True)
                actor = HeadActor if head == WORKER else NodeActor
                check_packages(client, where.threads, {actor, *map(type, [*specs, draft_spec])})

            async def open_pipeline() -> Pipeline:
                here = asyncio.get_running_loop()
                pipeline: Pipeline
                if client is None:
                    loads = [spec.load for spec in specs]
                    local = (
                        LocalPipeline(loads, draft_spec.load, here)
                        if distance is None
                        else LaggingLocalPipeline(loads, draft_spec.load, here, distance=distance)
                    )
                    pipeline = await local.loaded()
                else:
                    arguments = (where.stages, draft_spec, where.drafter)
                    most = max_concurrent
                    if distance is None:
                        pipeline = await DaskPipeline.open(
                            client, specs, *arguments, max_concurrent=most
                        )
                    else:
                        distant = [
                            DistantSpec(spec, distance, last=spec is specs[-1]) for spec in specs
                        ]
                        pipeline = await LaggingPipeline.open(
                            client, distant, *arguments, max_concurrent=most
                        )
                for way in (distance, away):
                    if way is not None:
                        pipeline = LaggingHead(pipeline, way, here)
                return pipeline

            async def start_head() -> Head:
                return Head(opened_pipeline, asyncio.get_running_loop(), max_concurrent)

            driver: Driver
            if head == WORKER and client is not None:
                driving = head_worker(WORKER, {}, where)
                assert driving is not None
                plan = PipelinePlan(
                    tuple(specs),
                    where.stages,
                    draft_spec,
                    where.drafter,
                    NONE,
                    DEADLINE_S,
                    max_concurrent,
                )
                kind = RemoteHead if away is None else DistantHead.at(away)
                driver = open_on(loop, partial(kind.open, client, plan, driving), resources)
            else:
                opened_pipeline = open_on(loop, open_pipeline, resources)
                driver = call_on(loop, start_head())
            resources.enter_context(short_collections())
            return cls(costs, acceptance, seed, distance, driver, resources.pop_all())

    def generate(
        self,
        strategy: str | Policy = "adaptive",
        *,
        max_new_tokens: int = 200,
        prompt_tokens: int = PROMPT_TOKENS,
        timeout: float | None = None,
        **knobs: Any,
    ) -> EmulatedResult:
        """Generate the synthetic text, and wait for it.

        Parameters
        ----------
        strategy : str or Policy
            As for `simulate`.
        max_new_tokens : int
            As for `simulate`.
        prompt_tokens : int
            As for `simulate`.
        timeout : float, optional
            Most seconds to wait.
        **knobs
            As for `simulate`.

        Returns
        -------
        EmulatedResult
            As a real engine's.

        Raises
        ------
        ValueError
            If strategy and knobs are not to be had.
        TimeoutError
            If it takes longer.
        GenerationInterrupted
            If the pipeline was lost.
        """
        generation = self.start(
            strategy, max_new_tokens=max_new_tokens, prompt_tokens=prompt_tokens, **knobs
        )
        try:
            result = generation.result(timeout)
        except (KeyboardInterrupt, TimeoutError):
            generation.cancel()
            raise
        return EmulatedResult(**{f.name: getattr(result, f.name) for f in fields(result)})

    def start(
        self,
        strategy: str | Policy = "adaptive",
        *,
        max_new_tokens: int = 200,
        prompt_tokens: int = PROMPT_TOKENS,
        seed: int | None = None,
        **knobs: Any,
    ) -> Generation:
        """Start to generate, and return at once.

        Parameters
        ----------
        strategy : str or Policy
            As for `generate`.
        max_new_tokens : int
            As for `generate`.
        prompt_tokens : int
            As for `generate`.
        seed : int, optional
            Of another text than the emulation's own.
        **knobs
            As for `generate`.

        Returns
        -------
        Generation
            As a real engine's.

        Raises
        ------
        ValueError
            If strategy and knobs are not to be had.
        """
        policy = policy_of(strategy, knobs)
        whole = SyntheticPair(self.acceptance, self.seed if seed is None else seed)
        request = Request(
            next(self._requests),
            whole.text(prompt_tokens),
            max_new_tokens,
            capacity=prompt_tokens + max_new_tokens + SLOTS,
            sampling=None if seed is None else Sampling(seed=seed),
        )
        trace = Trace(len(self.costs.stages))
        generation = Generation(request, policy, _Numbers(), trace, cancel=self._head.cancel)
        self._head.start(generation)
        return generation

    def text(
        self, max_new_tokens: int, prompt_tokens: int = PROMPT_TOKENS, seed: int | None = None
    ) -> list[int]:
        """Return what `generate` or `start` must give, whatever the strategy.

        Parameters
        ----------
        max_new_tokens : int
            As for `generate`.
        prompt_tokens : int
            As for `generate`.
        seed : int, optional
            As for `start`.

        Returns
        -------
        list of int
            Token ids.
        """
        pair = SyntheticPair(self.acceptance, self.seed if seed is None else seed)
        return list(pair.text(prompt_tokens + max_new_tokens)[prompt_tokens:])

    def measure_costs(self) -> Costs:
        """Measure the emulated nodes and the real links as `Engine.measure_costs` does.

        Returns
        -------
        Costs
            As measured.
        """
        return call_on(
            self._head.loop, self._head.measure_costs(next(self._requests), drafter=True)
        )

    def calibrated(self, rounds: int = 10) -> Costs:
        """Return the cost model with the hops that there really are, those of a distance included.

        What the simulator needs to tell how fast this emulation is.

        Parameters
        ----------
        rounds : int
            So many runs of one token measure them.

        Returns
        -------
        Costs
            Those of the emulation, with other hops.

        Raises
        ------
        ValueError
            If the head is on a worker: no hop is as long as the one from here to there.
        """
        if not isinstance(self._head, Head):
            raise ValueError("expected a head in this process to simulate, got one on a worker")
        hop_s = call_on(self._head.loop, measure_hop(self._head, next(self._requests), rounds))
        bandwidth = self._distance.bandwidth if self._distance is not None else math.inf
        costs = replace(self.costs, bandwidth=bandwidth)
        # All hops but the first and the last are between stages, and carry hidden states.
        stages = len(costs.stages)
        carrying = costs.hop(1) * (stages - 1) / (stages + 1)
        return replace(costs, hop_s=max(0.0, hop_s - carrying))

    def close(self) -> None:
        """Release every node, thread and link; can be called twice."""
        with suppress(RuntimeError):
            self._head.loop.call_soon_threadsafe(
                self._head.end, ConnectionError("the emulation was closed meanwhile")
            )
        self._resources.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<Emulation {len(self.costs.stages)} emulated stages>"


class _Numbers:
    """Synthetic tokens as text: their numbers."""

    def step(self, token: int) -> str:
        return f"{token} "

    def flush(self) -> str:
        return ""
