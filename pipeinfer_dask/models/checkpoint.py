"""Checkpoints in Hugging Face format: found, and found sound, before anything is loaded.

Only the configuration and the headers of the weight files are read, so a mistake is
told in a moment and in one line, however large the model.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError
from transformers import (
    AutoConfig,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from pipeinfer_dask.models.conversion import rehearse
from pipeinfer_dask.models.families import context_of, model_class, refusal
from pipeinfer_dask.models.tensors import FLOAT_TYPES, StoredTensor, stored_tensors

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")
HUB_FILES = ("*.json", "*.safetensors", "*.model", "*.txt", "*.jinja")


GREEDY_SETTINGS: dict[str, object] = {
    "repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "min_length": 0,
    "min_new_tokens": 0,
    "bad_words_ids": None,
    "suppress_tokens": None,
    "begin_suppress_tokens": None,
    "sequence_bias": None,
    "forced_eos_token_id": None,
}
"""Fields of a generation_config.json that change what is generated greedily, when not neutral."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A model on disk that can be split into stages.

    Attributes
    ----------
    path : Path
        Its directory.
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
    nbytes : int
        Bytes of weights on disk.
    unapplied : tuple of str
        What its generation_config.json asks for and we don't do, such as
        ``"repetition_penalty=1.1"``.
    """

    path: Path
    config: PreTrainedConfig
    model_type: str
    num_layers: int
    hidden_size: int
    vocab_size: int
    context: int
    eos_token_ids: tuple[int, ...]
    nbytes: int
    unapplied: tuple[str, ...]


def open_checkpoint(source: str | Path) -> Checkpoint:
    """Find a checkpoint and check all that can be checked without reading weights.

    Parameters
    ----------
    source : str or Path
        A directory, or a name on the Hugging Face hub, which is downloaded unless it is in
        the cache already.

    Raises
    ------
    FileNotFoundError
        If the directory, or a file that the model needs, is not there.
    ValueError
        If it is no model, its architecture can't be split into stages, a file is corrupt, or
        the weights do not fit the configuration.
    """
    path = _directory(source)
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
    tensors = stored_tensors(path)
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
        with torch.device("meta"):
            model = model_class(config)(config)
    # A configuration can be wrong in as many ways as there are families.
    except Exception as error:
        raise ValueError(
            f"{path / 'config.json'} describes no {fields['model_type']} model: "
            f"{' '.join(str(error).split())}"
        ) from error
    _check_tensors(path, tensors, model)
    return Checkpoint(
        path=path,
        config=config,
        model_type=config.model_type,
        num_layers=config.num_hidden_layers,
        hidden_size=config.hidden_size,
        vocab_size=config.vocab_size,
        context=context_of(config),
        eos_token_ids=_end_of_text(path, fields),
        nbytes=sum(tensor.nbytes for tensor in tensors.values()),
        unapplied=_unapplied(path),
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
            f"the tokenizer in {checkpoint.path} can't be loaded: {' '.join(str(error).split())}"
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
    if differing := ours.items() ^ theirs.items():
        first = min(number for _, number in differing)
        here, there = (
            next((repr(token) for token, number in vocabulary.items() if number == first), "none")
            for vocabulary in (ours, theirs)
        )
        raise ValueError(
            f"the vocabularies of target and draft differ: token {first} is {here} in "
            f"{target.path}, and {there} in {draft.path}; use a draft of the target's family"
        )


def _directory(source: str | Path) -> Path:
    path = Path(source)
    if path.is_dir():
        return path
    if path.exists():
        raise ValueError(
            f"expected the directory of a model, but {path} is a file: give its folder"
        )
    try:
        return Path(snapshot_download(str(source), allow_patterns=list(HUB_FILES)))
    except HFValidationError:
        raise FileNotFoundError(
            f"there is no directory {path}: give a model's directory or its name on the hub"
        ) from None
    # Offline, not there, not allowed: the hub's errors are all of these two.
    except (OSError, ValueError) as error:
        raise FileNotFoundError(
            f"there is no directory {path}, and it can't be had from the Hugging Face hub "
            f"({type(error).__name__}): give a model's directory or its name on the hub"
        ) from error


def _read_json(file: Path) -> dict[str, Any]:
    if not file.is_file():
        raise FileNotFoundError(f"{file.parent} is no model: it has no {file.name}")
    try:
        fields = json.loads(file.read_bytes())
    except ValueError as error:
        raise ValueError(f"{file} is not valid JSON ({error}): download it again") from error
    if not isinstance(fields, dict):
        raise ValueError(f"{file} must hold a JSON object, not a {type(fields).__name__}")
    return fields


def _check_tensors(path: Path, stored: Mapping[str, StoredTensor], model: PreTrainedModel) -> None:
    found = rehearse(model, stored)
    if found.missing:
        raise ValueError(
            f"{path} lacks the tensor {found.missing[0]} that its config.json calls for: "
            "download it again"
        )
    for name, given, own in found.misfits:
        place = stored[name].file if name in stored else path
        raise ValueError(
            f"{name} in {place} has shape {list(given)}, but config.json calls for {list(own)}: "
            "the files are not of one model"
        )
    for name, error in found.errors.items():
        raise ValueError(
            f"{name} can't be made of the tensors in {path}: {' '.join(error.split())}; "
            "download it again"
        )
    for tensor in found.used:
        if tensor.dtype not in FLOAT_TYPES:
            raise ValueError(
                f"{tensor.name} in {tensor.file} is stored as {tensor.dtype}, expected one of "
                f"{', '.join(sorted(FLOAT_TYPES))}: give a checkpoint that is not quantised"
            )


def _end_of_text(path: Path, fields: Mapping[str, Any]) -> tuple[int, ...]:
    file = path / "generation_config.json"
    ids = (_read_json(file) if file.is_file() else fields).get("eos_token_id")
    if ids is None:
        return ()
    return tuple(ids) if isinstance(ids, list) else (ids,)


def _unapplied(path: Path) -> tuple[str, ...]:
    file = path / "generation_config.json"
    fields = _read_json(file) if file.is_file() else {}
    return tuple(
        f"{name}={fields[name]}"
        for name, neutral in GREEDY_SETTINGS.items()
        if fields.get(name) not in (None, neutral)
    )
