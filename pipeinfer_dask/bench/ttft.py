"""What speculation does to the time to first token, on the embedded pair."""

from __future__ import annotations

import statistics
from typing import Any

from pipeinfer_dask.engine import Engine
from pipeinfer_dask.models.demo_pair import DEMO_PROMPT, demo_pair
from pipeinfer_dask.policies import STRATEGIES

ROUNDS = 40
PROMPT_TOKENS = (16, 128)


def run_ttft_bench(rounds: int = ROUNDS) -> dict[str, Any]:
    """Measure each strategy's time to first token, in turns, in one run.

    Parameters
    ----------
    rounds : int
        Generations of each strategy and prompt length.

    Returns
    -------
    dict
        ``{"suite": "ttft", "rows": [{"prompt_tokens", "strategy", "ttft_ms_p50", "ratio"}]}``:
        milliseconds, and their ratio to plain decoding's.
    """
    rows: list[dict[str, Any]] = []
    pair = demo_pair()
    with Engine.from_pretrained(pair.target, pair.draft) as engine:
        text = engine.tokenizer(DEMO_PROMPT * 64)["input_ids"]
        for length in PROMPT_TOKENS:
            times: dict[str, list[float]] = {strategy: [] for strategy in STRATEGIES}
            for number in range(rounds + 2):  # the first two warm the workers up
                # Every prompt is another one, and every strategy gets the same.
                prompt = text[number : number + length]
                for strategy in STRATEGIES:
                    result = engine.generate(prompt, max_new_tokens=8, strategy=strategy)
                    ttft = result.metrics.ttft_s
                    if number >= 2 and ttft is not None:
                        times[strategy].append(ttft * 1e3)
            plain = statistics.median(times["iterative"])
            for strategy, measured in times.items():
                median = statistics.median(measured)
                rows.append(
                    {
                        "prompt_tokens": length,
                        "strategy": strategy,
                        "ttft_ms_p50": median,
                        "ratio": median / plain,
                    }
                )
    return {"suite": "ttft", "rows": rows}
