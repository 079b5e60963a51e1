"""Who is to load what: layers shared out among workers, and whether their memory holds them."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final, Literal
from uuid import uuid4

from distributed import Client

from pipeinfer_dask.drafting.ngram import NGRAM
from pipeinfer_dask.models.checkpoint import Checkpoint
from pipeinfer_dask.models.device_names import CPU
from pipeinfer_dask.models.layers import balanced_layers, split_layers
from pipeinfer_dask.models.linears import Weights, has_kernels
from pipeinfer_dask.models.probe import cache_width, layer_seconds
from pipeinfer_dask.models.sizes import Width
from pipeinfer_dask.models.specs import NgramSpec, ShardSpec
from pipeinfer_dask.runtime.planning.admission import SPECULATIVE_SLOTS
from pipeinfer_dask.runtime.planning.gpus import Devices, check_gpus, gpu_count, gpu_pools
from pipeinfer_dask.runtime.planning.memory import (
    HERE,
    Load,
    Need,
    Pool,
    check_memory,
    pools_here,
    pools_of,
)
from pipeinfer_dask.runtime.planning.placement import Placement
from pipeinfer_dask.runtime.planning.workers import ask

AUTO: Final = "auto"
"""The layer split that is made by measuring the workers."""
Draft = Checkpoint | Literal["ngram"] | None
"""A draft model, prompt lookup, or nothing that drafts."""
LayerSplit = Sequence[float] | Literal["auto"] | None
"""Weights, one for each stage, `AUTO`, or None for an even split."""

PROBE_TIMEOUT_S = 300.0
"""How long the workers may take to measure a layer; they may import torch first."""


@dataclass(frozen=True)
class Models:
    """What is to be loaded.

    Attributes
    ----------
    target : Checkpoint
    draft : Checkpoint, `NGRAM` or None
    weights : {"auto", "fp16", "fp32"}
        How matrices are held on CPUs.
    devices : Devices
    caches : int
        KV caches of each node. On a CPU they take memory as they are used.
    """

    target: Checkpoint
    draft: Draft
    weights: Weights
    devices: Devices
    caches: int = 1

    def check_here(self, ranges: Sequence[range], *, in_process: bool) -> None:
        """Check that this machine can hold all of it.

        The GPUs' memory is left to the workers where there are any: only they touch GPUs.

        Raises
        ------
        ValueError
            If it lacks a GPU that a node is to use.
        MemoryError
            If it has not the memory.
        """
        nodes = self._nodes(ranges, [HERE] * len(ranges), HERE)
        on_gpus = [node for node in nodes if node.on_gpu]
        check_gpus((node.gpu for node in on_gpus), {HERE: gpu_count()})
        on_cpu = sum(node.nbytes for node in nodes if not node.on_gpu)
        needs, pools = [Need("the models", HERE, on_cpu)], {HERE: pools_here()}
        if in_process and on_gpus:
            found = gpu_pools({node.device for node in on_gpus})
            needs += [node.need for node in on_gpus]
            pools |= {node.place: [found[node.device]] for node in on_gpus}
        check_memory(needs, pools)

    def share_out(
        self,
        stages: int,
        layer_split: LayerSplit,
        placement: Placement,
        client: Client,
    ) -> list[range]:
        """Decide which layers each stage holds, and check that its worker has the memory.

        Parameters
        ----------
        stages : int
        layer_split : LayerSplit
        placement : Placement
        client : Client

        Raises
        ------
        FileNotFoundError
            If a worker finds no weights where the model is to be.
        MemoryError
            If a worker, or the machine that it shares with others, has not.
        ValueError
            If the split makes no sense, or a worker lacks a GPU that it is to use.
        RuntimeError
            If a worker could not measure a layer, or does not answer.
        """
        _check_weights(self.target, placement.stages, client)
        if isinstance(self.draft, Checkpoint) and placement.drafter is not None:
            _check_weights(self.draft, [placement.drafter], client)
        even = self._nodes(self.split(stages, None), placement.stages, placement.drafter)
        pools = _pools(even, client)
        if layer_split == AUTO and stages > 1:
            speeds = _speeds(self.target, even[:stages], placement.threads, client)
            most = self._most_layers(even, stages, pools)
            ranges = balanced_layers(
                self.target.num_layers, speeds, head=self.target.sizes.head_layers, most=most
            )
        else:
            ranges = self.split(stages, layer_split)
        nodes = self._nodes(ranges, placement.stages, placement.drafter)
        check_memory([node.need for node in nodes], pools)
        return ranges

    def split(self, stages: int, layer_split: LayerSplit) -> list[range]:
        """Split the layers without a look at any worker: all are taken to be alike.

        Raises
        ------
        ValueError
            If the split makes no sense.
        """
        layers = self.target.num_layers
        if layer_split != AUTO:
            return split_layers(layers, stages, layer_split)
        head = self.target.sizes.head_layers
        return balanced_layers(layers, [1.0] * stages, head=head, most=[layers] * stages)

    def take_turns(self, stages: int) -> bool:
        """Say whether so many stages and the draft model, in one process, compute by turns.

        They do where there are not two cores for each: side by side, one would slow the other.
        """
        return (os.cpu_count() or 1) < 2 * self._computing(stages)

    def _computing(self, stages: int) -> int:
        return stages + isinstance(self.draft, Checkpoint)

    def specs(
        self, ranges: Sequence[range], placement: Placement | None
    ) -> tuple[list[ShardSpec], ShardSpec | NgramSpec | None]:
        """Return what each node loads."""

        def spec(
            model: Checkpoint, layers: range, worker: str | None, name: str, device: str
        ) -> ShardSpec:
            sharers = None
            if placement is None or worker is None:
                sharers = os.cpu_count() if self.take_turns(len(ranges)) else None
                threads = max(1, (os.cpu_count() or 1) // self._computing(len(ranges)))
            else:
                threads = placement.threads[worker]
            return ShardSpec(
                source=model.source,
                first=layers.start,
                last=layers.stop,
                capacity=self._capacity,
                threads=threads,
                width=model.config.hidden_size,
                name=name,
                weights=self.weights,
                sharers=sharers,
                device=device,
                dtype=self.devices.dtype_of(model, device),
                static=self.devices.cuda_graphs and device != CPU,
            )

        stage_workers = placement.stages if placement is not None else [None] * len(ranges)
        stages = [
            spec(self.target, layers, worker, f"layers {layers.start} to {layers.stop - 1}", device)
            for layers, worker, device in zip(
                ranges, stage_workers, self.devices.for_stages(len(ranges)), strict=True
            )
        ]
        if self.draft is None:
            return stages, None
        if self.draft == NGRAM:
            return stages, NgramSpec(self._capacity)
        drafter = placement.drafter if placement is not None else None
        layers = range(self.draft.num_layers)
        name = self.draft.path.name
        drafting = spec(self.draft, layers, drafter, name, self.devices.draft)
        return stages, replace(drafting, target_vocab_size=self.target.vocab_size)

    def loads(self, ranges: Sequence[range], placement: Placement) -> tuple[Load, ...]:
        """Return what each node is going to hold, wherever it may be."""
        nodes = self._nodes(ranges, placement.stages, placement.drafter)
        return tuple(Load(node.node, node.nbytes, node.device) for node in nodes)

    @property
    def _capacity(self) -> int:
        # The longest text that the target may be asked for. On a CPU the cache grows as it is used.
        return self.target.context + SPECULATIVE_SLOTS

    def _nodes(
        self, ranges: Sequence[range], workers: Sequence[str], drafter: str | None
    ) -> list[Holding]:
        """Return what each stage holds, and then the drafter where there is a draft model."""
        devices = self.devices.for_stages(len(ranges))
        nodes = [
            self._holding(f"stage {stage}", self.target, layers, worker, device)
            for stage, (layers, worker, device) in enumerate(
                zip(ranges, workers, devices, strict=True)
            )
        ]
        if isinstance(self.draft, Checkpoint) and drafter is not None:
            layers, device = range(self.draft.num_layers), self.devices.draft
            nodes.append(self._holding("drafter", self.draft, layers, drafter, device))
        return nodes

    def _holding(
        self, node: str, model: Checkpoint, layers: range, worker: str, device: str
    ) -> Holding:
        width = self._width(model, device)
        cached = 0
        if device != CPU:  # rehearsing a layer takes longer than all else here
            numbers = self.caches * self._capacity * cache_width(model.config)
            cached = numbers * width.matrices
        return Holding(
            node=node,
            worker=worker,
            device=device,
            nbytes=model.sizes.nbytes(layers, width) + cached * len(layers),
            layer_nbytes=width.matrices * max(model.sizes.layers) + cached,
            layers=len(layers),
        )

    def _width(self, model: Checkpoint, device: str) -> Width:
        if device != CPU:
            each = 4 if self.devices.dtype_of(model, device) == "float32" else 2
            return Width(each, each)
        # Workers are taken to have the kernels that this machine has.
        packed = self.weights != "fp32" and has_kernels()
        return Width(
            matrices=2 if packed and (model.narrow or self.weights == "fp16") else 4,
            tables=2 if packed and model.narrow else 4,
        )

    def _most_layers(
        self, nodes: Sequence[Holding], stages: int, pools: Mapping[str, Sequence[Pool]]
    ) -> list[int]:
        """Return how many layers each stage has room for, where stages share a pool evenly."""

        def room(stage: Holding, pool: Pool) -> int:
            users = [n for n in nodes if pool.name in {p.name for p in pools[n.place]}]
            sharing = [user for user in users if user in nodes[:stages]]
            rest = [max(0, n.nbytes - n.layers * n.layer_nbytes * (n in sharing)) for n in users]
            left = pool.available - sum(rest)
            return max(0, left) // len(sharing) // stage.layer_nbytes

        return [min(room(stage, pool) for pool in pools[stage.place]) for stage in nodes[:stages]]


@dataclass(frozen=True, slots=True)
class Holding:
    """What a node is to hold, and where."""

    node: str
    worker: str
    device: str
    nbytes: int
    layer_nbytes: int
    """Bytes of the largest layer, its cache included where that stands from the first."""
    layers: int

    @property
    def on_gpu(self) -> bool:
        return self.device != CPU

    @property
    def gpu(self) -> tuple[str, str, str]:
        return self.node, self.worker, self.device

    @property
    def place(self) -> str:
        """Whose memory it takes, for messages and as a key."""
        return f"{self.device} of {self.worker}" if self.on_gpu else self.worker

    @property
    def need(self) -> Need:
        return Need(self.node, self.place, self.nbytes)


def _check_weights(model: Checkpoint, workers: Sequence[str], client: Client) -> None:
    """Check that workers will find a model's weights, or the hub's name for them."""
    lacking: dict[str, str | None] = ask(client, workers, model.source.lacking)
    for worker, reason in lacking.items():
        if reason is not None:
            raise FileNotFoundError(f"worker {worker} finds no model: {reason}")


def _pools(nodes: Sequence[Holding], client: Client) -> dict[str, list[Pool]]:
    """Return what memory each node may take, by its place; all GPUs that are named are there."""
    workers = {node.worker for node in nodes}
    pools: dict[str, list[Pool]] = ask(client, workers, pools_of)
    if on_gpus := [node for node in nodes if node.on_gpu]:
        theirs = {node.worker for node in on_gpus}
        check_gpus((node.gpu for node in on_gpus), ask(client, theirs, gpu_count))
        for worker in theirs:
            names = {node.device for node in on_gpus if node.worker == worker}
            found: dict[str, Pool] = ask(client, [worker], gpu_pools, names)[worker]
            pools |= {f"{name} of {worker}": [pool] for name, pool in found.items()}
    return pools


def _speeds(
    target: Checkpoint, stages: Sequence[Holding], threads: Mapping[str, int], client: Client
) -> list[float]:
    """Measure each stage's device: layers a second. All at once, as they will compute."""
    probes = {
        stage.place: client.submit(
            layer_seconds,
            target.source,
            threads[stage.worker],
            stage.device,
            key=f"pipeinfer-probe-{uuid4().hex}",
            workers=[stage.worker],
            allow_other_workers=False,
        )
        for stage in {stage.place: stage for stage in stages}.values()
    }
    seconds: dict[str, float] = {}
    try:
        for place, probe in probes.items():
            try:
                seconds[place] = probe.result(timeout=PROBE_TIMEOUT_S)
            except Exception as error:
                raise RuntimeError(
                    f"worker {place} could not measure a layer: {type(error).__name__}: {error}"
                ) from error
        return [1 / seconds[stage.place] for stage in stages]
    finally:
        client.cancel(list(probes.values()))
