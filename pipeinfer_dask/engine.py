"""The public face: open a target and a draft on a cluster, and generate."""

from __future__ import annotations

import asyncio
import os
import warnings
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, Self

from distributed import Client

from pipeinfer_dask.drafting.ngram import NGRAM
from pipeinfer_dask.models.checkpoint import (
    Checkpoint,
    check_pair,
    load_tokenizer,
    open_checkpoint,
)
from pipeinfer_dask.models.device_names import Dtype
from pipeinfer_dask.models.layers import check_stages
from pipeinfer_dask.models.linears import Weights
from pipeinfer_dask.models.selftest import check_split
from pipeinfer_dask.models.specs import ShardSpec
from pipeinfer_dask.runtime.head.chat import Chat
from pipeinfer_dask.runtime.head.generation import Generation
from pipeinfer_dask.runtime.head.head import MAX_CONCURRENT, Head
from pipeinfer_dask.runtime.head.head_actor import HeadActor, PipelinePlan
from pipeinfer_dask.runtime.head.remote_head import RemoteHead
from pipeinfer_dask.runtime.head.result import GenerationInterrupted, Piece, Result
from pipeinfer_dask.runtime.head.serving import Driver, EngineClosedError, Serving
from pipeinfer_dask.runtime.nodes.actors import NodeActor
from pipeinfer_dask.runtime.nodes.loading import HERE, Loading, Progress, shown
from pipeinfer_dask.runtime.nodes.pauses import short_collections
from pipeinfer_dask.runtime.pipeline.interface import Pipeline
from pipeinfer_dask.runtime.pipeline.local_pipeline import LocalPipeline
from pipeinfer_dask.runtime.pipeline.recovery import Recovery
from pipeinfer_dask.runtime.pipeline.scaling import keep_nodes
from pipeinfer_dask.runtime.planning.admission import Admission
from pipeinfer_dask.runtime.planning.clusters import (
    LoopThread,
    call_on,
    keep_nannies,
    loop_of,
    names_of,
    own_cluster,
    workers_of,
)
from pipeinfer_dask.runtime.planning.ending import Resources
from pipeinfer_dask.runtime.planning.gpus import Devices
from pipeinfer_dask.runtime.planning.models import AUTO, Draft, LayerSplit, Models
from pipeinfer_dask.runtime.planning.opening import (
    check_asked,
    check_recovery,
    check_room,
    explained,
    open_on,
)
from pipeinfer_dask.runtime.planning.placement import (
    default_stages,
    head_worker,
    place,
    without_spares,
)
from pipeinfer_dask.runtime.planning.workers import check_packages
from pipeinfer_dask.trace.picture import table_html

if TYPE_CHECKING:
    from ipywidgets import VBox

__all__ = [
    "Chat",
    "Engine",
    "EngineClosedError",
    "Generation",
    "GenerationInterrupted",
    "Loading",
    "Piece",
    "Result",
]

DEFAULT_STAGES = 3
"""Stages of an engine that brings its own workers."""


class Engine(Serving):
    """A target model cut into stages, a draft model beside it, and the head that drives them.

    Made by `from_pretrained`. Use it in a ``with`` block, or call `close`: both release
    every worker's models, threads and links. All methods may be called from any thread.

    Attributes
    ----------
    target : Checkpoint
    draft : Checkpoint, "ngram" or None
    layer_ranges : list of range
        The layers of each stage.
    """

    def __init__(self, *_: Any, **__: Any) -> None:
        raise TypeError(
            "expected Engine.from_pretrained(target, draft=...), which loads the models, got "
            "Engine(...)"
        )

    @classmethod
    @explained
    def from_pretrained(
        cls,
        target: str | os.PathLike[str],
        draft: str | os.PathLike[str] | None = None,
        *,
        client: Client | None = None,
        stages: int | None = None,
        layer_split: LayerSplit = None,
        weights: Weights = "auto",
        devices: str | Sequence[str] | None = None,
        draft_device: str | None = None,
        dtype: Dtype | None = None,
        cuda_graphs: bool = False,
        share_workers: bool = False,
        spares: int = 0,
        max_recoveries: int = 5,
        recovery_timeout: float = 300.0,
        move_in_after: float = 0.0,
        node_timeout: float = 15.0,
        in_process: bool = False,
        max_concurrent: int | None = None,
        head: str = "client",
        progress: Progress | bool | None = None,
        self_test: bool = True,
    ) -> Self:
        """Load a pair of models onto workers.

        Everything that can be wrong is looked for before any worker loads anything.

        Parameters
        ----------
        target, draft : str or path
            A local directory, or a hub name, in Hugging Face format. Without a draft only
            plain decoding is possible. The draft ``"ngram"`` is no model: what followed the
            same tokens earlier in the text is proposed (prompt lookup), beside the head and
            at next to no cost. A directory of that name is ``"./ngram"``.
        client : distributed.Client, optional
            The cluster to use; one that scales itself leaves alone what holds a node, and the
            spares. Without one the engine starts a `LocalCluster` of processes
            on this machine, and ends it when it is closed.
        stages : int, optional
            Stages of the pipeline. By default one for each worker, less one for the drafter;
            without a client, 3.
        layer_split : sequence of float or "auto", optional
            Relative shares of the layers, one for each stage; by default even. With ``"auto"``
            each worker computes a layer like the model's, and gets as many as its speed and
            its memory allow; the output head counts as what it costs.
        weights : {"auto", "fp16", "fp32"}
            How CPUs hold matrices; they compute all in 32 bits. "auto" holds those of a
            16-bit checkpoint in 16 bits where the worker's processor can multiply by them.
            "fp16" rounds those of a 32-bit one to 16 bits, which may change the text.
        devices : str or sequence of str, optional
            Where stages compute: ``"cpu"``, ``"cuda"`` (the worker's own current GPU) or
            ``"cuda:N"``; one for all, or one for each stage. Several may share a GPU.
        draft_device : str, optional
            The draft model's; by default that of the last stage.
        dtype : {"float32", "float16", "bfloat16"}, optional
            What GPUs compute in: by default the checkpoint's own. In 16 bits a text may depend
            on how runs are cut, as sums are rounded. CPUs compute in float32.
        cuda_graphs : bool
            Whether GPUs replay small runs as CUDA graphs: fewer launches, but a run that has
            begun can't be cancelled.
        share_workers : bool
            Whether one worker may hold several stages. The drafter shares one anyway where
            there are too few.
        spares : int
            Workers to keep free. A lost node goes to a free one, else to one with the memory.
        max_recoveries : int
            Losses in a row, with no token in between, that generations survive. They survive
            that of the drafter in any case, and go on without drafts.
        recovery_timeout : float, seconds
            How long a recovery may take, with the time until a worker is there for the node.
        move_in_after : float, seconds
            A lost node waits so long for a free worker to come, before it moves in with another
            one.
        node_timeout : float, seconds
            A node that gives no sign of life for so long, or whose computing does not move, is
            lost.
        in_process : bool
            No cluster at all: stages and drafter are threads of this process.
        max_concurrent : int, optional
            Most generations that share the pipeline at once, and most KV caches that each stage
            holds, those of conversations included. By default 4; where there are GPUs 1, since
            there each cache takes its memory from the first.
        head : str
            Where requests are driven from: ``"client"``, this process, or ``"worker"``, next to
            the pipeline, for clients that are far from the cluster. That is the drafter's
            worker, or the first stage's where the drafter has none; an address names another.
            If that worker is lost, another one drives, and all stages load again.
        progress : callable or bool, optional
            Told of each step of loading as a `Loading`: which node has read how many bytes, and
            which stands, of lost nodes too. True shows a bar, False none; notebooks show one. If it
            raises, the log says so, and it is told no more.
        self_test : bool
            Whether to try out first, on small random models of the same settings, that they
            say the same in stages as in one piece. It takes a second at most, once a process.

        Raises
        ------
        FileNotFoundError
            If a model is not there.
        ValueError
            If a model can't be used, the pair does not fit together, stages, layers and
            workers do not fit, or a worker lacks a GPU that it is to use.
        MemoryError
            If a worker has not enough memory for what it is to hold.
        RuntimeError
            If a worker can't import this package, or could not load its share.
        """
        asked = (target,) if draft is None else (target, draft)
        check_asked(asked, client, in_process, stages, layer_split, weights, progress, head)
        check_recovery(spares, max_recoveries, recovery_timeout, node_timeout, move_in_after)
        check_room(max_concurrent, spares, in_process=in_process)
        places = Devices.of(devices, draft_device, dtype, cuda_graphs=cuda_graphs)
        # A cluster's own machines may have their own copies; without one, all is here.
        elsewhere = client is not None
        opened = open_checkpoint(os.fspath(target), elsewhere=elsewhere)
        opened_draft: Draft = None
        if draft == NGRAM:
            opened_draft = NGRAM
        elif draft is not None:
            opened_draft = open_checkpoint(os.fspath(draft), elsewhere=elsewhere)
            check_pair(opened, opened_draft)
        # A lookup needs no worker.
        drafter = isinstance(opened_draft, Checkpoint)
        admission = Admission(opened, load_tokenizer(opened), opened_draft is not None)
        if beyond := admission.stated[1]:
            asks = f"{opened.path} asks for {', '.join(beyond)} in generation_config.json"
            warnings.warn(f"{asks}: this is not supported, and not applied", stacklevel=3)
        known = workers_of(client) if client is not None else {}
        workers = without_spares(known, spares) if client is not None else None
        if stages is None:
            available = DEFAULT_STAGES + drafter if workers is None else len(workers)
            stages = default_stages(available, opened.num_layers, drafter=drafter)
            if layer_split is not None and layer_split != AUTO:
                stages = len(layer_split)
            if len(places.names) > 1:
                stages = len(places.names)
        check_stages(opened.num_layers, stages)
        places.for_stages(stages)
        if max_concurrent is None:
            max_concurrent = 1 if places.on_gpu else MAX_CONCURRENT
        models = Models(opened, opened_draft, weights, places, max_concurrent)
        ranges = models.split(stages, layer_split)
        placement, driving = None, None
        if client is not None and workers is not None:
            placement = place(workers, stages, drafter=drafter, share=share_workers)
            driving = head_worker(head, known, placement)
            spare = known.keys() - workers.keys()
            used = {*placement.threads, *spare, driving or placement.stages[0]}
            actor = NodeActor if driving is None else HeadActor
            check_packages(client, used, (actor, ShardSpec))
        if self_test:
            check_split(opened)
            if isinstance(opened_draft, Checkpoint):
                check_split(opened_draft)

        if client is None:
            models.check_here(ranges, in_process=in_process)

        with Resources() as resources:
            if in_process:
                loop = resources.enter_context(LoopThread()).loop
            else:
                if client is None:
                    client = own_cluster(stages + drafter, resources, places, spares=spares)
                    resources.cluster = client.cluster
                    known = workers_of(client)
                    workers = without_spares(known, spares)
                    placement = place(workers, stages, drafter=drafter, share=True)
                else:
                    keep_nannies(client, resources)
                    keep_nodes(client, spares, resources)
                loop = loop_of(client)

            if client is not None and placement is not None:
                ranges = models.share_out(stages, layer_split, placement, client)
                admission = replace(admission, draft_apart=placement.draft_apart)
            admission = replace(admission, shares_cores=in_process and models.take_turns(stages))
            specs, draft_spec = models.specs(ranges, placement)
            plan = None
            if placement is not None:
                driving = head_worker(head, known, placement)
                plan = PipelinePlan(
                    tuple(specs),
                    placement.stages,
                    draft_spec,
                    placement.drafter,
                    Recovery(
                        max_recoveries,
                        recovery_timeout,
                        move_in_after,
                        models.loads(ranges, placement),
                    ),
                    node_timeout,
                    max_concurrent,
                    admission.tokenizer,
                )

            async def new_pipeline(told: Progress | None) -> Pipeline:
                if plan is not None and client is not None:
                    return await plan.open(client, told)
                loads = [spec.load for spec in specs]
                drafting = draft_spec.load if draft_spec is not None else None
                here = asyncio.get_running_loop()
                return await LocalPipeline(loads, drafting, here, told, node_timeout).loaded()

            def new_head(told: Progress | None) -> Driver:
                if plan is not None and client is not None and driving is not None:
                    opening = partial(RemoteHead.open, client, plan, driving, progress=told)
                    return open_on(loop, opening, resources)
                pipeline = open_on(loop, partial(new_pipeline, told), resources)
                resources.enter_context(short_collections())

                async def start_head() -> Head:
                    return Head(pipeline, asyncio.get_running_loop(), max_concurrent)

                return call_on(loop, start_head())

            addresses: dict[str, str] = {}
            with shown(progress) as told:

                def note(step: Loading) -> None:
                    addresses[step.node] = step.where
                    if told is not None:
                        told(step)

                driver = new_head(note)
            engine = cls.__new__(cls)
            Serving.__init__(engine, admission, opened_draft, ranges, driver, resources.pop_all())
            if client is not None:
                addresses["head"] = driving if driving is not None else "client"
                engine._places, engine._names = addresses, names_of(client)
            return engine

    def dashboard(self, **options: Any) -> VBox:
        """Return controls and live views for a notebook.

        Parameters
        ----------
        **options
            As for `pi.dashboard`.

        Returns
        -------
        Dashboard
            To be shown as a cell's last line.

        Raises
        ------
        EngineClosedError
            If the engine is closed.
        """
        self._check_open()
        from pipeinfer_dask.widgets import dashboard

        return dashboard(self, **options)

    def _repr_html_(self) -> str:
        ranges = [f"layers {layers.start} to {layers.stop - 1}" for layers in self.layer_ranges]
        rows = [(f"stage {n}", r) for n, r in enumerate(ranges)]
        return table_html([repr(self), ""], [*rows, ("head", self._where().get("head", HERE))])

    def __repr__(self) -> str:
        name = self.draft.path.name if isinstance(self.draft, Checkpoint) else self.draft
        draft = f", draft {name}" if name is not None else ""
        state = "closed" if self._closed else f"{self.stages} stages"
        return f"<Engine {self.target.path.name}{draft}, {state}>"
