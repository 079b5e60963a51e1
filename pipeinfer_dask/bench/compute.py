"""Real computing on this machine's cores: our strategies against transformers' own generation.

A synthetic pair for each agreement of draft and target. Every contender has the whole machine
while it generates; they take turns, so that what else the machine does hits all alike.
"""

from __future__ import annotations

import itertools
import os
import random
import statistics
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers

from pipeinfer_dask.bench.contender import Process
from pipeinfer_dask.drafting.ngram import NGRAM
from pipeinfer_dask.policies import STRATEGIES
from pipeinfer_dask.testing import VOCABULARY, make_pair

DIALS = (80, 30)
"""Agreements of draft and target, in percent."""
PARAMETERS, SMALL = 200_000_000, 3_000_000
DTYPES = ("float32", "bfloat16")
"""What the peers compute in."""
STAGES = 2
PROMPT_TOKENS = 128
NEW_TOKENS, FEW_TOKENS = 200, 40
"""Of a measured run; of those that find each peer's best settings, and of a quick one."""
ROUNDS = 5


@dataclass
class Entry:
    """A contender with its settings, and what was measured of it."""

    process: Process
    runner: str
    strategy: str
    draft: str
    how: dict[str, Any]
    seconds: list[float] = field(default_factory=list)
    core_ms: list[float] = field(default_factory=list)
    texts: list[list[int]] = field(default_factory=list)

    def run(self, prompt: list[int], new_tokens: int) -> float:
        """Generate once; return the tokens per second."""
        tokens, seconds, core_seconds = self.process.generate(prompt, new_tokens, **self.how)
        self.seconds.append(seconds)
        self.core_ms.append(1e3 * core_seconds / len(tokens))
        self.texts.append(tokens)
        return len(tokens) / seconds

    @property
    def tokens_per_s(self) -> float:
        return statistics.median(
            len(text) / seconds for text, seconds in zip(self.texts, self.seconds, strict=True)
        )


def run_compute_bench(
    dial: Sequence[int] = DIALS, quick: bool = False, rounds: int = ROUNDS
) -> dict[str, Any]:
    """Measure tokens per second of all contenders, in turns.

    Parameters
    ----------
    dial : sequence of int, percent
        A pair of models for each of these agreements.
    quick : bool
        A small pair, short texts, one round, and peers in float32 alone: to see that it works.
    rounds : int
        Each is another prompt, and a run of each contender.

    Returns
    -------
    dict
        ``{"suite": "compute", "rows": [{"model", "runner", "strategy", "draft",
        "threads", "tokens_per_s", "core_ms_per_token", "same_tokens"}], "best_peer", "best_ours",
        "ratio", "adaptive_to_iterative", ...}``: medians over the rounds, and the share of tokens
        that are those of our plain decoding. Of transformers' ways each is given with the
        settings that are its best here. What follows the rows is given for each model:
        ``ratio`` is how many times as fast our best is as the best peer, median of the rounds.
    """
    report: dict[str, Any] = {"suite": "compute", "rows": []}
    summary: dict[str, dict[str, Any]] = {
        name: {} for name in ("best_peer", "best_ours", "ratio", "adaptive_to_iterative")
    }
    measured: dict[str, float] = {}
    for percent in dial:
        with tempfile.TemporaryDirectory() as folder, ExitStack() as processes:
            pair = make_pair(
                folder, parameters=SMALL if quick else PARAMETERS, agreement=percent / 100
            )
            model = f"{percent}%"
            measured[model] = pair.agreement
            paths = {"target": str(pair.target), "draft": str(pair.draft)}
            peers = _peers(processes, paths, DTYPES[:1] if quick else DTYPES)
            ours = _ours(processes, paths)
            chosen = [*ours, *_best_of_each(peers, FEW_TOKENS // 4 if quick else FEW_TOKENS)]
            for number in range(1 if quick else rounds):
                prompt = _prompt(number)
                # Nobody always follows the same one.
                for entry in chosen[number:] + chosen[:number]:
                    entry.run(prompt, FEW_TOKENS if quick else NEW_TOKENS)
            for name, value in _summary(chosen).items():
                summary[name][model] = value
            report["rows"] += [_row(model, entry, ours[0]) for entry in chosen]
    cores = os.cpu_count()
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    return report | summary | {"agreement": measured, "cores": cores, **versions}


def _ours(processes: ExitStack, paths: dict[str, str]) -> list[Entry]:
    """Return our strategies, plain decoding first; each has warmed up."""
    process = processes.enter_context(Process("ours", **paths, stages=STAGES, in_process=True))
    entries = []
    for draft, strategy in itertools.product(("model", NGRAM), STRATEGIES):
        how = {"strategy": strategy, "draft": draft}
        if strategy == "iterative":
            if draft == NGRAM:
                continue  # the same again
            draft = "none"
        entries.append(Entry(process, "ours", strategy, draft, how))
        process.generate(_prompt(-1), FEW_TOKENS, **how)
    return entries


def _peers(processes: ExitStack, paths: dict[str, str], dtypes: Sequence[str]) -> list[Entry]:
    """Return what transformers offers, with all settings."""
    entries = []
    for dtype in dtypes:
        process = processes.enter_context(Process("transformers", **paths, dtype=dtype))
        drafts = {"plain": "none", "assisted": "model", "lookup": NGRAM}
        for strategy, threads in itertools.product(drafts, sorted({1, os.cpu_count() or 1})):
            how = {"strategy": strategy, "threads": threads}
            label = f"transformers {dtype}"
            entries.append(Entry(process, label, strategy, drafts[strategy], how))
    return entries


def _best_of_each(entries: Sequence[Entry], new_tokens: int) -> list[Entry]:
    """Return each strategy with the settings with which it is fastest, untouched."""
    best: dict[str, tuple[float, Entry]] = {}
    for entry in entries:
        # The first run warms up; one that was held up says nothing of the other.
        speed = max(entry.run(_prompt(-1), new_tokens) for _ in range(3))
        if entry.strategy not in best or speed > best[entry.strategy][0]:
            best[entry.strategy] = speed, entry
        entry.seconds.clear()
        entry.core_ms.clear()
        entry.texts.clear()
    return [entry for _, entry in best.values()]


def _prompt(number: int) -> list[int]:
    chance = random.Random(number)
    return [chance.randrange(VOCABULARY) for _ in range(PROMPT_TOKENS)]


def _row(model: str, entry: Entry, plain: Entry) -> dict[str, Any]:
    same = [
        ours == theirs
        for text, other in zip(plain.texts, entry.texts, strict=True)
        for ours, theirs in zip(text, other, strict=True)
    ]
    return {
        "model": model,
        "runner": entry.runner,
        "strategy": entry.strategy,
        "draft": entry.draft,
        "threads": entry.how.get("threads"),
        "tokens_per_s": entry.tokens_per_s,
        "core_ms_per_token": statistics.median(entry.core_ms),
        "same_tokens": statistics.mean(same),
    }


def _summary(entries: Sequence[Entry]) -> dict[str, Any]:
    def best(of: Sequence[Entry]) -> Entry:
        return max(of, key=lambda entry: entry.tokens_per_s)

    def ratio(entry: Entry, other: Entry) -> float:
        # Of runs of the same round: the machine may have had other work in another one.
        pairs = zip(entry.seconds, other.seconds, strict=True)
        return statistics.median(theirs / mine for mine, theirs in pairs)

    ours = [entry for entry in entries if entry.runner == "ours"]
    peer, mine = best([entry for entry in entries if entry.runner != "ours"]), best(ours)
    plain = ours[0]
    (adaptive,) = (e for e in ours if e.strategy == "adaptive" and e.draft == "model")
    return {
        "best_peer": f"{peer.runner}, {peer.strategy}",
        "best_ours": f"{mine.strategy}, draft {mine.draft}",
        "ratio": ratio(mine, peer),
        "adaptive_to_iterative": ratio(adaptive, plain),
    }
