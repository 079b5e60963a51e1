"""Who is to load what: layers shared out among workers, and whether their memory holds them."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final, Literal
from uuid import uuid4

from distributed import Client

from pipeinfer_dask.core.ngram import NGRAM
from pipeinfer_dask.models.checkpoint import Checkpoint
from pipeinfer_dask.models.layers import balanced_layers, split_layers
from pipeinfer_dask.models.linears import Weights, has_kernels
from pipeinfer_dask.models.probe import layer_seconds
from pipeinfer_dask.models.sizes import Width
from pipeinfer_dask.models.specs import NgramSpec, ShardSpec
from pipeinfer_dask.runtime.admission import SPECULATIVE_SLOTS
from pipeinfer_dask.runtime.memory import HERE, Need, Pool, check_memory, pools_here, pools_of
from pipeinfer_dask.runtime.placement import Placement

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
        How matrices are held.
    """

    target: Checkpoint
    draft: Draft
    weights: Weights

    def check_memory_here(self) -> None:
        """Check that this machine can hold all of it; see `check_memory`."""
        layers = range(self.target.num_layers)
        total = self._nbytes(self.target, layers) + self._draft_nbytes
        check_memory([Need("the models", HERE, total)], {HERE: pools_here()})

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
        MemoryError
            If a worker, or the machine that it shares with others, has not.
        ValueError
            If the split makes no sense.
        RuntimeError
            If a worker could not measure a layer.
        """
        workers = {*placement.stages, *([placement.drafter] if placement.drafter else [])}
        pools: dict[str, list[Pool]] = client.run(pools_of, workers=list(workers))
        if layer_split == AUTO and stages > 1:
            speeds = _speeds(self.target, placement, client)
            most = self._most_layers(placement, pools)
            ranges = balanced_layers(
                self.target.num_layers, speeds, head=self.target.sizes.head_layers, most=most
            )
        else:
            ranges = self.split(stages, layer_split)
        check_memory(self._needs(ranges, placement), pools)
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

    def specs(
        self, ranges: Sequence[range], placement: Placement | None
    ) -> tuple[list[ShardSpec], ShardSpec | NgramSpec | None]:
        """Return what each node loads."""

        def spec(model: Checkpoint, layers: range, worker: str | None, name: str) -> ShardSpec:
            sharers = None
            if placement is None or worker is None:
                sharers = os.cpu_count()
                nodes = len(ranges) + isinstance(self.draft, Checkpoint)
                threads = max(1, (os.cpu_count() or 1) // nodes)
            else:
                threads = placement.threads[worker]
            return ShardSpec(
                source=model.source,
                first=layers.start,
                last=layers.stop,
                # The longest text that the target may be asked for; the cache grows as it is used.
                capacity=self.target.context + SPECULATIVE_SLOTS,
                threads=threads,
                name=name,
                weights=self.weights,
                sharers=sharers,
            )

        stage_workers = placement.stages if placement is not None else [None] * len(ranges)
        stages = [
            spec(self.target, layers, worker, f"layers {layers.start} to {layers.stop - 1}")
            for layers, worker in zip(ranges, stage_workers, strict=True)
        ]
        if self.draft is None:
            return stages, None
        if self.draft == NGRAM:
            return stages, NgramSpec()
        drafter = placement.drafter if placement is not None else None
        layers = range(self.draft.num_layers)
        drafting = spec(self.draft, layers, drafter, self.draft.path.name)
        return stages, replace(drafting, target_vocab_size=self.target.vocab_size)

    @property
    def _draft_nbytes(self) -> int:
        if not isinstance(self.draft, Checkpoint):
            return 0
        return self._nbytes(self.draft, range(self.draft.num_layers))

    def _nbytes(self, model: Checkpoint, layers: range) -> int:
        return model.sizes.nbytes(layers, self._width(model))

    def _width(self, model: Checkpoint) -> Width:
        # Workers are taken to have the kernels that this machine has.
        packed = self.weights != "fp32" and has_kernels()
        return Width(
            matrices=2 if packed and (model.narrow or self.weights == "fp16") else 4,
            tables=2 if packed and model.narrow else 4,
        )

    def _needs(self, ranges: Sequence[range], placement: Placement) -> list[Need]:
        needs = [
            Need(f"stage {stage}", worker, self._nbytes(self.target, layers))
            for stage, (layers, worker) in enumerate(zip(ranges, placement.stages, strict=True))
        ]
        if placement.drafter is not None:
            needs.append(Need("drafter", placement.drafter, self._draft_nbytes))
        return needs

    def _most_layers(self, placement: Placement, pools: Mapping[str, Sequence[Pool]]) -> list[int]:
        """Return how many layers each stage has room for, where stages share a pool evenly."""
        stages, sizes, width = placement.stages, self.target.sizes, self._width(self.target)
        extra = [0] * len(stages)
        extra[0] += width.tables * sizes.first
        extra[-1] += width.matrices * sizes.last

        def users(name: str) -> list[int]:
            return [s for s, worker in enumerate(stages) if name in {p.name for p in pools[worker]}]

        def room(pool: Pool) -> int:
            left = pool.available - sum(extra[stage] for stage in users(pool.name))
            if placement.drafter and pool.name in {p.name for p in pools[placement.drafter]}:
                left -= self._draft_nbytes
            return max(0, left) // len(users(pool.name)) // (width.matrices * max(sizes.layers))

        return [min(room(pool) for pool in pools[worker]) for worker in stages]


def _speeds(target: Checkpoint, placement: Placement, client: Client) -> list[float]:
    """Measure each stage's worker: layers a second. All at once, as they will compute."""
    probes = {
        worker: client.submit(
            layer_seconds,
            target.source,
            placement.threads[worker],
            key=f"pipeinfer-probe-{uuid4().hex}",
            workers=[worker],
            allow_other_workers=False,
        )
        for worker in dict.fromkeys(placement.stages)
    }
    seconds: dict[str, float] = {}
    try:
        for worker, probe in probes.items():
            try:
                seconds[worker] = probe.result(timeout=PROBE_TIMEOUT_S)
            except Exception as error:
                raise RuntimeError(
                    f"worker {worker} could not measure a layer: {type(error).__name__}: {error}"
                ) from error
        return [1 / seconds[worker] for worker in placement.stages]
    finally:
        client.cancel(list(probes.values()))
