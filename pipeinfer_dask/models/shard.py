"""A stage's share of a model: its layers, its KV cache, and one pass through them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedModel

from pipeinfer_dask.models.attention import SLOT_ATTENTION
from pipeinfer_dask.models.cache import SlotCache
from pipeinfer_dask.models.checkpoint import check_tensors
from pipeinfer_dask.models.conversion import rehearse_names
from pipeinfer_dask.models.device_names import CPU, Dtype
from pipeinfer_dask.models.devices import Device, device_of
from pipeinfer_dask.models.families import context_of, model_class
from pipeinfer_dask.models.graphs import StaticPasses, padded_slots
from pipeinfer_dask.models.inputs import Inputs, Numbers
from pipeinfer_dask.models.linears import Weights, check_weights, has_kernels
from pipeinfer_dask.models.packing import keep_stored, pack
from pipeinfer_dask.models.passes import FusedPass, fused_pass
from pipeinfer_dask.models.quiet import without_progress_bars
from pipeinfer_dask.models.sampling import Choice, Sampler, logprobs
from pipeinfer_dask.models.sequences import Sequences, SequenceState
from pipeinfer_dask.models.sources import SINGLE_FILE, Source, locate
from pipeinfer_dask.models.splice import SplicedPass, spliced
from pipeinfer_dask.models.stage import CountBytes, HiddenStates, StageOutput
from pipeinfer_dask.models.tensors import (
    listed_tensors,
    stored_tensors,
    unread,
)
from pipeinfer_dask.protocol.messages import NO_PARENT, Batch
from pipeinfer_dask.protocol.sampling import Sampling

LONGEST_PASS = 128
"""Most tokens in one pass of a draft model: its attention mask and activations stay small."""

# While transformers builds a model it changes settings of the whole process (the default
# dtype, how tensors are made): two threads must not do so at once.
building = Lock()


class Shard:
    """A contiguous share of a model's layers, ready to compute.

    It is a `Stage`; one that holds every layer is a `DraftModel` too. Use `load`.

    Parameters
    ----------
    model : PreTrainedModel
        Made by the class that `spliced` returns.
    layers : range
        The layers that it has, numbered as in the whole model.
    capacity : int
        Slots of each KV cache.
    parameters : int
        How many it has; tied ones count once.
    target_vocab_size : int, optional
        Of a draft model: rows of the target's head. It proposes no token beyond them.
    device : Device, optional
        Where the model is, and computes. By default the CPU.
    static : bool
        Whether small passes are padded and captured; see `pipeinfer_dask.models.graphs`.
    fused : FusedPass, optional
        What computes the model's passes; by default its family's own code.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        layers: range,
        *,
        capacity: int,
        parameters: int,
        target_vocab_size: int | None = None,
        device: Device | None = None,
        static: bool = False,
        fused: FusedPass | None = None,
    ) -> None:
        self.layers = layers
        self.capacity = capacity
        self.parameters = parameters
        self.is_first = layers.start == 0
        self.is_last = layers.stop == model.config.num_hidden_layers
        self._model = model
        self._hidden_size: int = model.config.hidden_size
        self._vocab_size: int = model.config.vocab_size
        self._context = context_of(model.config)
        self._target_vocab_size = target_vocab_size
        self._device = device or Device()
        self._static = static
        slots = padded_slots(capacity) if static else capacity
        whole = static or self._device.is_gpu
        self._sequences = Sequences(partial(SlotCache, layers, slots, whole=whole))
        self._pass = fused or SplicedPass(model, first=self.is_first, last=self.is_last)

    @classmethod
    def load(
        cls,
        source: str | Path | Source,
        layers: range,
        *,
        capacity: int,
        weights: Weights = "auto",
        threads: int = 1,
        target_vocab_size: int | None = None,
        device: str = CPU,
        dtype: Dtype = "float32",
        static: bool = False,
        count: CountBytes | None = None,
    ) -> Shard:
        """Load a share of a checkpoint, reading no other tensors than its own.

        Parameters
        ----------
        source : str, Path or Source
            A directory or hub name in Hugging Face format. Only the files that hold the share's
            own tensors need be there, and only they are downloaded.
        layers : range
            The layers to hold, in [0, num_layers).
        capacity : int
            Slots of the KV cache: the longest text, and room for drafts.
        weights : {"auto", "fp16", "fp32"}
            How matrices are held on a CPU. There all is computed in 32 bits: 16 bits are slow on
            it, and change what is generated. "auto" holds those of a 16-bit checkpoint in 16
            bits where this machine can multiply by them, and "fp16" those of any.
        threads : int
            Threads that share a multiplication by a matrix of 16 bits.
        target_vocab_size : int, optional
            Of a draft model: rows of the target's head.
        device : str
            ``"cpu"``, ``"cuda"`` or ``"cuda:N"``.
        dtype : {"float32", "float16", "bfloat16"}
            What a GPU holds and computes in.
        static : bool
            Whether small passes are padded to a few sizes, which a GPU replays as CUDA graphs.
        count : callable, optional
            Told from time to time of the bytes that were read so far, and of all.

        Raises
        ------
        ValueError
            If the layers are not in the model, the checkpoint lacks tensors of theirs or they
            do not fit, the capacity is not positive, or weights can't be held so. Nothing has
            been read then.
        FileNotFoundError
            If files are missing.
        """
        if capacity < 1:
            raise ValueError(f"the capacity of a KV cache must be at least 1 slot, not {capacity}")
        check_weights(weights)
        where = device_of(device, dtype)
        with building:
            packed = not where.is_gpu and weights != "fp32" and has_kernels()
        if weights == "fp16" and not packed and not where.is_gpu:
            raise ValueError(
                "expected weights='auto' or 'fp32', got 'fp16', by which torch can't multiply on "
                "this machine"
            )
        found = source if isinstance(source, Source) else locate(source)
        path = found.directory()
        config = AutoConfig.from_pretrained(path)
        if not (0 <= layers.start < layers.stop <= config.num_hidden_layers and layers.step == 1):
            raise ValueError(
                f"{path} has layers 0 to {config.num_hidden_layers - 1}; {layers} was asked for"
            )
        family = model_class(config)
        with building, torch.device("meta"):
            share = spliced(family, layers)(config)
        files = listed_tensors(path)
        if files is None:
            found.fetch([SINGLE_FILE])
        with building:
            names = stored_tensors(path) if files is None else files
            own = {tensor.name for tensor in rehearse_names(share, names).used}
        if files is not None:
            found.fetch(files[name] for name in own)
        stored = stored_tensors(path, own.__contains__)
        with building:
            check_tensors(path, stored, stored, share)

        def prepare(model: PreTrainedModel) -> None:
            if packed:
                keep_stored(model, stored)

        with building, without_progress_bars():
            loaded: Any = spliced(family, layers, prepare).from_pretrained(
                None,
                config=config,
                state_dict=unread(stored, count),
                dtype=where.dtype,
                attn_implementation=SLOT_ATTENTION,
                output_loading_info=True,
            )
        model, report = loaded
        # What is missing would silently stay random.
        if missing := sorted(report["missing_keys"]):
            raise ValueError(f"{path} lacks {len(missing)} tensors of {layers}, first {missing[0]}")
        model.requires_grad_(False)
        parameters = sum(parameter.numel() for parameter in model.parameters())
        if packed:
            if layers.start > 0:
                # A tied head had it; what came here is hidden states.
                model.set_input_embeddings(nn.Identity())
            pack(model, everything=weights == "fp16", threads=threads)
        if where.is_gpu:
            with where.computing():  # what its stream reads is copied by it
                model.to(where.place)
        shard = cls(
            model,
            layers,
            capacity=capacity,
            parameters=parameters,
            target_vocab_size=target_vocab_size,
            device=where,
            static=static,
            fused=None if where.is_gpu else fused_pass(model, layers),
        )
        if where.is_gpu:
            shard._try_out()
        return shard

    def _try_out(self) -> None:
        """Compute one token: a cache that has no room is told now, and a first run waits less."""
        size: int = self._model.config.hidden_size
        hidden = None if self.is_first else np.zeros((1, size), np.float32)
        self.run(Batch((0,), (0,), (0,), (NO_PARENT,)), hidden, picks=1, stopped=bool)

    def modules(self) -> Iterator[nn.Module]:
        """Go through what the shard is made of."""
        return self._model.modules()

    @property
    def cache_nbytes(self) -> int:
        """Bytes that the KV caches hold by now."""
        return self._sequences.nbytes

    def release(self, cache: int) -> None:
        """Let the next text that is new have a KV cache; see `Stage.release`."""
        self._sequences.release(cache)

    def run(
        self,
        batch: Batch,
        hidden: HiddenStates | None,
        *,
        picks: int,
        stopped: Callable[[], bool],
        sampling: Sampling | None = None,
        cache: int = 0,
    ) -> StageOutput:
        """Evaluate one run; see `Stage.run`.

        Raises
        ------
        ValueError
            If a slot is beyond the capacity, or the hidden states don't fit.
        """
        sequence = self._sequences.of(cache)
        with torch.inference_mode(), self._device.computing():
            result = self._evaluate(sequence, batch, hidden, picks, stopped)
            layers = self._pass.computed
            if result is None:
                return StageOutput(None, None, layers)
            if not self.is_last:
                return StageOutput(self._device.take(result).numpy(), None, layers)
            if sampling is None:
                return StageOutput(None, tuple(result.argmax(dim=-1).tolist()), layers)
            result = self._device.take(result)
            ends = batch[len(batch) - picks :]
            choices = _choices(sequence, ends, result, sampling)
            tokens = tuple(choice.best for choice in choices)
            if not sampling.logprobs:
                return StageOutput(None, tokens, layers)
            probable = logprobs(result, torch.tensor(tokens, dtype=torch.long), sampling.logprobs)
            return StageOutput(None, tokens, layers, tuple(probable))

    def logits(
        self,
        batch: Batch,
        picks: int,
        stopped: Callable[[], bool],
        *,
        hidden: HiddenStates | None = None,
        cache: int = 0,
    ) -> Tensor | None:
        """Evaluate a batch on the last stage, or on a shard that holds every layer.

        Returns
        -------
        Tensor, [picks, vocab_size], or None
            The logits after each of the last ``picks`` tokens, on the CPU; None if it was
            stopped.

        Raises
        ------
        ValueError
            If this is not the last stage, a slot is beyond the capacity, or the hidden states
            don't fit.
        """
        if not self.is_last:
            raise ValueError(f"only the last stage has logits, and this one holds {self.layers}")
        with torch.inference_mode(), self._device.computing():
            sequence = self._sequences.of(cache)
            result = self._evaluate(sequence, batch, hidden, picks, stopped)
            return None if result is None else self._device.take(result)

    def candidates(
        self,
        batch: Batch,
        frontier: int,
        *,
        width: int,
        stopped: Callable[[], bool],
        sampling: Sampling | None = None,
        cache: int = 0,
    ) -> list[list[tuple[int, float]]] | None:
        """Evaluate a batch and say what may come next; see `DraftModel.candidates`."""
        ends = batch[len(batch) - frontier :]
        # What only the target knows is something else to a draft model: a token, or a place beyond
        # its context. Its guesses may be worse for it, and the text is the target's all the same.
        batch = replace(
            batch,
            tokens=tuple(min(token, self._vocab_size - 1) for token in batch.tokens),
            positions=tuple(min(place, self._context - 1) for place in batch.positions),
        )
        # A prompt comes in one batch, and only its end is extended.
        while len(batch) - frontier > LONGEST_PASS:
            if self.logits(batch[:LONGEST_PASS], 0, stopped, cache=cache) is None:
                return None
            batch = batch[LONGEST_PASS:]
        logits = self.logits(batch, frontier, stopped, cache=cache)
        if logits is None:
            return None
        logits = logits[:, : self._target_vocab_size]
        if sampling is not None:
            choices = _choices(self._sequences.of(cache), ends, logits, sampling)
            return [choice.candidates(width) for choice in choices]
        top = torch.softmax(logits.float(), dim=-1).topk(min(width, logits.shape[-1]))
        return [
            list(zip(tokens, confidences, strict=True))
            for tokens, confidences in zip(top.indices.tolist(), top.values.tolist(), strict=True)
        ]

    def _evaluate(
        self,
        sequence: SequenceState,
        batch: Batch,
        hidden: HiddenStates | None,
        picks: int,
        stopped: Callable[[], bool],
    ) -> Tensor | None:
        """Return hidden states [n, hidden_size], on the last stage logits [picks, vocab_size]."""
        if max(batch.slots) >= self.capacity:
            raise ValueError(
                f"slot {max(batch.slots)} is beyond the KV cache's capacity of {self.capacity}: "
                "shorten the text, or load the model with more capacity"
            )
        attendance = sequence.ancestry.attend(batch)
        given = np.array(batch.tokens) if self.is_first else self._received(hidden, len(batch))
        positions, slots = np.array(batch.positions), np.array(batch.slots)
        inputs = Inputs(given, positions, slots, attendance.mask, attendance.positions)
        if self._static and (picks or not self.is_last):
            if sequence.passes is None:
                compute = partial(self.compute_all, cache=sequence.cache)
                scratch = padded_slots(self.capacity) - 1
                sequence.passes = StaticPasses(compute, self._device, scratch)
            self._pass.computed = 0
            if stopped():
                return None
            if (result := sequence.passes.run(inputs)) is not None:
                self._pass.computed = len(self.layers)
                return result[len(result) - picks :] if self.is_last else result
        on_device = Inputs(*map(self._device.put, inputs))
        return self._compute(sequence.cache, on_device, picks, stopped)

    def compute_all(self, inputs: Inputs[Tensor], cache: SlotCache | None = None) -> Tensor:
        """Compute a pass over tensors that are on the device, beside what `run` keeps.

        Parameters
        ----------
        inputs : Inputs
        cache : SlotCache, optional
            By default that of a text of its own.

        Returns
        -------
        Tensor, [n, hidden_size], on the last stage [n, vocab_size]
        """
        cache = self._sequences.of(0).cache if cache is None else cache
        result = self._compute(cache, inputs, len(inputs.slots), bool)
        assert result is not None, "nobody stops a pass that is captured"
        return result

    def _compute(
        self, cache: SlotCache, inputs: Inputs[Tensor], picks: int, stopped: Callable[[], bool]
    ) -> Tensor | None:
        # A GPU is told of a layer long before it computes it: there a run that is stopped saves
        # what was not yet told, which may be little, and the copy of the result.
        cache.turn_to(inputs.slots, inputs.allowed.shape[1])
        if not self.is_first:
            inputs = inputs._replace(given=inputs.given.to(self._device.dtype))
        return self._pass(inputs, cache, picks, stopped)

    def _received(self, hidden: HiddenStates | None, n: int) -> Numbers:
        expected = (n, self._hidden_size)
        if hidden is None or hidden.shape != expected:
            came = "nothing" if hidden is None else f"shape {hidden.shape}"
            raise ValueError(f"layers {self.layers} take hidden states of {expected}; {came} came")
        return hidden


def _choices(
    sequence: SequenceState, ends: Batch, logits: Tensor, sampling: Sampling
) -> list[Choice]:
    """Return what may follow each of these tokens, by its row of logits."""
    sampler = sequence.sampler
    if sampler is None or sampler.sampling != sampling:
        sampler = sequence.sampler = Sampler(sampling, logits.shape[-1])
    return [
        sampler.choose(
            row, position + 1, sequence.ancestry.path(slot) if sampling.looks_back else None
        )
        for row, position, slot in zip(logits, ends.positions, ends.slots, strict=True)
    ]
