"""How long headers may be: what the largest honest one needs, and no more.

To read a byte of a header takes up to 60 bytes of memory. So each link takes only what commands
and runs need, and more where a whole text comes, or where more was asked for.
"""

from __future__ import annotations

from pipeinfer_dask.protocol.messages import StartDraft, StartRun, TreePlan
from pipeinfer_dask.protocol.request import Request
from pipeinfer_dask.protocol.sampling import Sampling

MOST_HEADER = 1 << 20
"""Bytes of a header where nothing more is said.

Those of a run are its settings, at most `MOST_SETTINGS`, and 25 for each of its tokens, which are
no more than the slots for speculation or those that are read at once.
"""
MOST_SETTINGS = 3 << 18
"""Bytes that the token ids in a request's settings may take: each run takes them along."""
A_TOKEN = 32
"""Bytes that a token of a batch or a proposal takes, a candidate and its log-probability, too."""
A_RECORDED_TOKEN = 64
"""Bytes that the same takes as text, in an entry of a trace."""


def of_settings(sampling: Sampling) -> int:
    """Return what a request's settings may take: 5 bytes for a token id, 12 for a word beside."""
    words = [*sampling.bad_words_ids, *(words for words, _ in sampling.sequence_bias)]
    alone = len(sampling.suppress_tokens) + len(sampling.end_tokens)
    return 5 * (alone + sum(map(len, words))) + 12 * len(words)


def of_text(tokens: int) -> int:
    """Return what a message may take that brings a whole text of so many tokens."""
    return MOST_HEADER + A_TOKEN * tokens


def of_answer(asked: StartRun | StartDraft) -> int:
    """Return what the answer to a run or a draft may take."""
    if isinstance(asked, StartRun):
        logprobs = asked.sampling.logprobs if asked.sampling is not None else 0
        return of_text(len(asked.batch) + asked.picks * logprobs)
    width = asked.plan.width if isinstance(asked.plan, TreePlan) else 1
    return of_text(len(asked.batch) + (asked.frontier + len(asked.slots)) * width)


def of_record(request: Request) -> int:
    """Return what an entry of a request's trace may take, and small ones before it."""
    text = len(request.prompt) + request.max_new_tokens
    logprobs = request.sampling.logprobs if request.sampling is not None else 0
    candidates = logprobs * (request.capacity - text + 1)
    return 2 * MOST_HEADER + A_RECORDED_TOKEN * (request.capacity + candidates)
