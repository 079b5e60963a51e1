"""Checkpoints in Hugging Face format: found, and found sound, before anything is loaded.

Only the configuration and the headers of the weight files are read, so a mistake is
told in a moment and in one line, however large the model.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.activations import ACT2FN

from pipeinfer_dask.models.conversion import rehearse, rehearse_names
from pipeinfer_dask.models.device_names import Dtype
from pipeinfer_dask.models.families import context_of, model_class, refusal
from pipeinfer_dask.models.sizes import Sizes
from pipeinfer_dask.models.sources import SINGLE_FILE, Source, locate
from pipeinfer_dask.models.tensors import (
    FLOAT_TYPES,
    StoredTensor,
    listed_tensors,
    stored_tensors,
    usual_dtype,
)

ACTIVATIONS = ("hidden_act", "hidden_activation", "activation_function")
"""What families call the field that names their activation."""
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")

HARMLESS = re.compile(r"(rotary_emb\.inv_freq|attn\.(masked_)?bias|position_ids)$")
"""Tensors of old checkpoints that today's models compute for themselves."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A model on disk that can be split into stages.

    Attributes
    ----------
    path : Path
        Its directory on this machine.
    source : Source
        Where any machine finds it.
    config : PreTrainedConfig
        The family's own configuration.
    model_type : str
        The family.
    num_layers : int
        Decoder layers.
    hidden_size : int
        Width of what travels between stages.
    vocab_size : int
        Rows of the output head.
    context : int
        Longest text, in tokens.
    eos_token_ids : tuple of int
        The tokens that end a generation.
    sizes : Sizes
        How large its parts are.
    dtype : {"float32", "float16", "bfloat16"}
        What most of its weights are stored in; float32 also for float64.
    generation_config : dict
        The fields of its generation_config.json; empty if it has none.
    """

    path: Path
    source: Source
    config: PreTrainedConfig
    model_type: str
    num_layers: int
    hidden_size: int
    vocab_size: int
    context: int
    eos_token_ids: tuple[int, ...]
    sizes: Sizes
    dtype: Dtype
    generation_config: dict[str, Any]

    @property
    def narrow(self) -> bool:
        """Whether its weights are stored in 16 bits."""
        return self.dtype != "float32"


def open_checkpoint(source: str | Path, *, elsewhere: bool = False) -> Checkpoint:
    """Find a checkpoint and check all that can be checked without reading weights.

    Parameters
    ----------
    source : str or Path
        A directory, or a name on the Hugging Face hub. Of the latter only the small files are
        downloaded, unless they are in the cache already; weights are left to the workers.
    elsewhere : bool
        Whether the weights may be on other machines alone. What of them is here is checked.

    Raises
    ------
    FileNotFoundError
        If the directory, or a file that the model needs, is not there.
    ValueError
        If it is no model, its architecture can't be split into stages, a file is corrupt, or
        the weights do not fit the configuration.
    """
    found = locate(source)
    path = found.directory()
    fields = _read_json(path / "config.json")
    if not isinstance(fields.get("model_type"), str):
        raise ValueError(f"{path} is no model: its config.json names no model_type")
    if reason := refusal(fields):
        raise ValueError(f"{path} can't be split into stages: {reason}")
    if not any((path / name).is_file() for name in TOKENIZER_FILES):
        raise FileNotFoundError(
            f"{path} has no tokenizer: expected one of {', '.join(TOKENIZER_FILES)}; "
            "save the tokenizer beside the model"
        )
    listed, stored = _seen(path, elsewhere=elsewhere or found.revision is not None)
    if listed:
        _check_layers(path, fields, len(listed))
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
        with torch.device("meta"):
            model = model_class(config)(config)
    # A configuration can be wrong in as many ways as there are families.
    except Exception as error:
        for name in ACTIVATIONS:
            if isinstance(given := fields.get(name), str) and given not in ACT2FN:
                raise ValueError(
                    f"{path / 'config.json'}: expected {name} as the name of an activation, such "
                    f"as 'silu', got {given!r}: download it again"
                ) from error
        wrong = error.__cause__ or error  # which field is wrong, below the name of a validator
        raise ValueError(
            f"{path / 'config.json'} is wrong for a {fields['model_type']} model: "
            f"{type(wrong).__name__}: {' '.join(str(wrong).split()).rstrip('.')}: download it again"
        ) from error
    context = context_of(config)
    if context < 2:  # a token of the prompt, and a new one
        raise ValueError(
            f"{path / 'config.json'}: expected a context of at least 2 tokens, got {context}: "
            "download it again"
        )
    sizes = Sizes.of(model)  # before it is filled: then nothing is tied any more
    if listed:
        check_tensors(path, listed, stored, model)
    file = path / "generation_config.json"
    generation_config = _read_json(file) if file.is_file() else None
    return Checkpoint(
        path=path,
        source=found,
        config=config,
        model_type=config.model_type,
        num_layers=config.num_hidden_layers,
        hidden_size=config.hidden_size,
        vocab_size=config.vocab_size,
        context=context,
        eos_token_ids=_end_of_text(path, fields, generation_config),
        sizes=sizes,
        dtype=_dtype(config, stored),
        generation_config=generation_config or {},
    )


def load_tokenizer(checkpoint: Checkpoint) -> PreTrainedTokenizerBase:
    """Load a checkpoint's tokenizer.

    Raises
    ------
    ValueError
        If its files are corrupt.
    """
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            checkpoint.path, trust_remote_code=False
        )
    # The tokenizers library raises bare exceptions.
    except Exception as error:
        raise ValueError(
            f"the tokenizer in {checkpoint.path} can't be loaded: "
            f"{' '.join(str(error).split())}: download its files again, or "
            "install what they need"
        ) from error
    return tokenizer


def check_pair(target: Checkpoint, draft: Checkpoint) -> None:
    """Check that a draft model speaks the target's tokens.

    Their heads may differ in size: many are padded, and what only one of them knows is kept
    from the other.

    Raises
    ------
    ValueError
        If their tokenizers differ in any token.
    """
    ours, theirs = (load_tokenizer(checkpoint).get_vocab() for checkpoint in (target, draft))
    known = min(max(ours.values()), max(theirs.values()))
    # Tokens that only one of them has behind all others are like rows of a padded head.
    differing = [
        (token, number)
        for token, number in ours.items() ^ theirs.items()
        if number <= known or (token in ours and token in theirs)
    ]
    if differing:
        first = min(number for _, number in differing)
        here, there = (
            next((repr(token) for token, number in vocabulary.items() if number == first), "none")
            for vocabulary in (ours, theirs)
        )
        raise ValueError(
            f"the vocabularies of target and draft differ: token {first} is {here} in "
            f"{target.path}, and {there} in {draft.path}; use a draft of the target's family"
        )


def _read_json(file: Path) -> dict[str, Any]:
    if not file.is_file():
        raise FileNotFoundError(f"{file.parent} is no model: it has no {file.name}")
    try:
        fields = json.loads(file.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is not valid JSON ({error}): download it again") from error
    if not isinstance(fields, dict):
        raise ValueError(f"{file} must hold a JSON object, not a {type(fields).__name__}")
    return fields


def _seen(path: Path, *, elsewhere: bool) -> tuple[Collection[str], dict[str, StoredTensor]]:
    """Return the names of all tensors, as far as they are known here, and those that are here."""
    if not elsewhere:
        stored = stored_tensors(path)
        return stored, stored
    files = listed_tensors(path)
    if files is None and not (path / SINGLE_FILE).is_file():
        return (), {}
    stored = stored_tensors(path, lambda name: files is None or (path / files[name]).is_file())
    return files or stored, stored


def _check_layers(path: Path, fields: Mapping[str, Any], tensors: int) -> None:
    # Each layer takes memory and time before its tensors can be looked for.
    names = CONFIG_MAPPING[fields["model_type"]].attribute_map
    layers = fields.get(names.get("num_hidden_layers", "num_hidden_layers"))
    if isinstance(layers, int) and layers > tensors:
        raise ValueError(
            f"{path / 'config.json'} speaks of {layers} layers, but there are no more than "
            f"{tensors} tensors: the files are not of one model"
        )


def check_tensors(
    path: Path,
    listed: Collection[str],
    stored: Mapping[str, StoredTensor],
    model: PreTrainedModel,
) -> None:
    """Check that a checkpoint's tensors are those of a model.

    Parameters
    ----------
    path : Path
        The directory, for messages.
    listed : collection of str
        Names of the tensors that there are.
    stored : mapping of str to StoredTensor
        Those whose headers are known.
    model : PreTrainedModel
        The model that they are to fill, or a stage of it, on torch's meta device.

    Raises
    ------
    ValueError
        If the model lacks a tensor or has no use for one, or one has another shape or is of
        no floating type.
    """
    named = rehearse_names(model, listed)
    if named.missing:
        raise ValueError(
            f"{path} lacks the tensor {named.missing[0]} that its config.json calls for: "
            "download it again"
        )
    found = rehearse(model, stored)
    for tensor in found.used:
        if tensor.dtype not in FLOAT_TYPES:
            raise ValueError(
                f"{tensor.name} in {tensor.file} is stored as {tensor.dtype}, expected one of "
                f"{', '.join(sorted(FLOAT_TYPES))}: give a checkpoint that is not quantised"
            )
    for name, given, own in found.misfits:
        place = stored[name].file if name in stored else path
        raise ValueError(
            f"{name} in {place} has shape {list(given)}, but config.json calls for {list(own)}: "
            "the files are not of one model"
        )
    # What one tensor is made of may be in several files, and not all of them here.
    for name, error in found.errors.items() if len(stored) == len(listed) else ():
        raise ValueError(
            f"{name} can't be made of the tensors in {path}: {' '.join(error.split())}; "
            "download it again"
        )
    ignored = [*(model._keys_to_ignore_on_load_unexpected or ()), HARMLESS.pattern]
    known = re.compile("|".join(f"(?:{pattern})" for pattern in ignored))
    used = {tensor.name for tensor in named.used}
    if extra := sorted(name for name in listed if name not in used and not known.search(name)):
        raise ValueError(
            f"{path} holds {len(extra)} tensors that its config.json has no use for, the first "
            f"{extra[0]}: the files are not of one model, or are quantised"
        )


def _dtype(config: PreTrainedConfig, stored: Mapping[str, StoredTensor]) -> Dtype:
    # Where no file is here to tell, the configuration may.
    kind = usual_dtype(stored) or getattr(config, "dtype", None)
    if kind == torch.float16:
        return "float16"
    return "bfloat16" if kind == torch.bfloat16 else "float32"


def _end_of_text(
    path: Path, fields: Mapping[str, Any], generation_config: Mapping[str, Any] | None
) -> tuple[int, ...]:
    ids = (fields if generation_config is None else generation_config).get("eos_token_id")
    if ids is None:
        return ()
    listed = ids if isinstance(ids, list) else [ids]
    for token in listed:
        # Some have one that the model can't pick: it ends nothing, and does no harm.
        if isinstance(token, bool) or not isinstance(token, int) or token < 0:
            file = "config.json" if generation_config is None else "generation_config.json"
            raise ValueError(
                f"expected eos_token_id in {path / file} as a token id or a list of them, got "
                f"{ids!r}: correct the file"
            )
    return tuple(listed)
