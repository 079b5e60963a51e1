"""Settings of the picks are checked where they are made."""

from __future__ import annotations

from math import inf, nan
from typing import Any

import pytest

from pipeinfer_dask.protocol.sampling import Sampling

WRONG: dict[str, tuple[Any, str]] = {
    "temperature": (1e-7, "from 1e-6 to 1e6, got 1e-07"),
    "repetition_penalty": (inf, "from 1e-6 to 1e6, got inf"),
    "top_k": (2**31, r"from 0 to 2\*\*31 - 1, got 2147483648"),
    "top_p": (0.0, "above 0 and up to 1, got 0.0"),
    "typical_p": (1.5, "above 0 and up to 1, got 1.5"),
    "top_h": (0.0, "above 0 and up to 1, got 0.0"),
    "min_p": (nan, "from 0 to 1, got nan"),
    "epsilon_cutoff": (1.0, "from 0 to below 1, got 1.0"),
    "eta_cutoff": (-0.1, "from 0 to below 1, got -0.1"),
    "no_repeat_ngram_size": (-2, r"from 0 to 2\*\*31 - 1, got -2"),
    "min_length": (-2, r"from 0 to 2\*\*31 - 1, got -2"),
    "logprobs": (-1, r"from 0 to 2\*\*31 - 1, got -1"),
    "seed": (2**63, r"from 0 to 2\*\*63 - 1, got 9223372036854775808"),
    "bad_words_ids": (((),), "without an empty word"),
    "sequence_bias": ((((1,), inf),), "as token ids, at least one, and a number of at most 1e6"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_value_out_of_range_is_refused(name: str) -> None:
    value, message = WRONG[name]
    with pytest.raises(ValueError, match=f"expected {name} {message}"):
        Sampling(**{name: value})


@pytest.mark.parametrize(
    ("settings", "looks_back"),
    [
        ({}, False),
        ({"seed": 1, "temperature": 0.5, "top_k": 5, "top_p": 0.9, "logprobs": 3}, False),
        ({"suppress_tokens": (3,)}, False),
        ({"repetition_penalty": 1.1}, True),
        ({"no_repeat_ngram_size": 2}, True),
        ({"bad_words_ids": ((1, 2),)}, True),
        ({"sequence_bias": (((1,), 0.5),)}, True),
        ({"min_length": 9}, True),
    ],
)
def test_it_tells_whether_the_text_before_matters(
    settings: dict[str, Any], looks_back: bool
) -> None:
    assert Sampling(**settings).looks_back == looks_back
