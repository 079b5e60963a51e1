"""Where a model's files are: a directory, or a name on the hub, on whichever machine asks.

A `Source` travels to the workers, and each finds the files for itself: in its own
directory, its own cache, or on the hub, from which it downloads what it needs and no more.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import hf_hub_download, snapshot_download
from huggingface_hub.errors import HFValidationError

SMALL_FILES = ("*.json", "*.model", "*.txt", "*.jinja")
"""Configuration, tokenizer and index: all of a model but its weights."""
SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
PICKLED_FILES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
"""What checkpoints that are pickled are called."""


@dataclass(frozen=True, slots=True)
class Source:
    """A model, as it can be found on any machine. Made by `locate`.

    Attributes
    ----------
    name : str
        A directory, in which ``~`` and variables such as ``$SCRATCH`` mean what they mean on
        the machine that asks, or a name on the hub.
    revision : str or None
        The commit on the hub, so that all machines have the same; None for a directory.
    """

    name: str
    revision: str | None = None

    def directory(self) -> Path:
        """Return the directory on this machine, with the small files in it.

        Raises
        ------
        FileNotFoundError
            If it is not there, and can't be had from the hub.
        """
        if self.revision is not None:
            return _small_files(self.name, self.revision)
        path = _expanded(self.name)
        if not path.is_dir():
            raise FileNotFoundError(
                f"there is no directory {path} on this machine: copy the model there, or give a "
                "path that holds on every machine, such as one that begins with $HOME"
            )
        return path

    def lacking(self) -> str | None:
        """Return why there is nothing to load on this machine, if so. The hub is not asked."""
        try:
            if self.revision is None:
                weights_in(self.directory())
        except FileNotFoundError as error:
            return str(error)
        return None

    def fetch(self, files: Iterable[str]) -> None:
        """Have these files in the directory, if this is a model of the hub.

        Raises
        ------
        FileNotFoundError
            If one is neither in the cache nor to be had from the hub.
        """
        if self.revision is None:
            return
        for file in sorted(set(files)):
            try:
                hf_hub_download(self.name, file, revision=self.revision)
            except (OSError, ValueError) as error:
                raise FileNotFoundError(
                    f"{file} of {self.name} is not in this machine's cache, and can't be had from "
                    f"the Hugging Face hub ({type(error).__name__}): download it beforehand"
                ) from error


def locate(source: str | Path) -> Source:
    """Find a model from this machine; of one on the hub, only the small files are downloaded.

    Raises
    ------
    FileNotFoundError
        If there is no such directory, and it is no model on the hub that can be had.
    ValueError
        If it is a file, or no name at all.
    """
    if not str(source):
        raise ValueError("expected a model's directory or its name on the hub, got an empty name")
    path = _expanded(source)
    if path.is_dir():
        # What was written for each machine to fill in stays so; other paths hold from anywhere.
        portable = str(path) != str(Path(source))
        return Source(str(source) if portable else str(path.absolute()))
    if path.exists():
        raise ValueError(
            f"expected the directory of a model, but {path} is a file: give its folder"
        )
    return Source(str(source), _small_files(str(source)).name)


def weights_in(directory: Path) -> Path:
    """Return the file that says what weights a directory holds: their index, or all of them.

    Raises
    ------
    FileNotFoundError
        If there are no safetensors.
    """
    for name in (INDEX_FILE, SINGLE_FILE):
        if (directory / name).is_file():
            return directory / name
    pickled = [file for pattern in PICKLED_FILES for file in sorted(directory.glob(pattern))]
    if pickled:
        raise FileNotFoundError(
            f"{pickled[0]} is pickled, and reading it could run any code: expected {SINGLE_FILE} "
            "beside it, so save the model's weights as safetensors"
        )
    raise FileNotFoundError(
        f"{directory} holds no {SINGLE_FILE} and no {INDEX_FILE}: "
        "save the model's weights as safetensors"
    )


def _expanded(name: str | Path) -> Path:
    return Path(os.path.expandvars(name)).expanduser()


def _small_files(name: str, revision: str | None = None) -> Path:
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=list(SMALL_FILES)))
    except HFValidationError:
        raise FileNotFoundError(
            f"there is no directory {name}: give a model's directory or its name on the hub"
        ) from None
    # Offline, not there, not allowed: the hub's errors are all of these two.
    except (OSError, ValueError) as error:
        raise FileNotFoundError(
            f"there is no directory {name}, and it can't be had from the Hugging Face hub "
            f"({type(error).__name__}): give a model's directory or its name on the hub"
        ) from error
