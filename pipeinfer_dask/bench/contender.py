"""One contender of the compute benchmark, in a process of its own.

Otherwise settings of threads would interfere. Run as a module with what to open as JSON: it
reads a job from each line of stdin, answers with a line on stdout, and ends with stdin.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from contextlib import ExitStack
from types import TracebackType
from typing import Any, Protocol, Self

PATIENCE_S = 60.0
"""How long a contender's process may take to end."""
LOOKUP_TOKENS = 10
"""What the documentation of transformers gives to prompt lookup."""


class Contender(Protocol):
    """Generates greedily."""

    def generate(self, prompt: list[int], new_tokens: int, **how: Any) -> list[int]:
        """Return the new tokens."""
        ...


class Transformers:
    """What transformers itself offers."""

    def __init__(self, target: str, draft: str, dtype: str) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        self._models = [
            AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, dtype)).eval()
            for path in (target, draft)
        ]

    def generate(self, prompt: list[int], new_tokens: int, **how: Any) -> list[int]:
        """Generate ``plain``, ``assisted`` or by ``lookup``, on so many threads."""
        import torch

        torch.set_num_threads(how["threads"])
        target, draft = self._models
        options: dict[str, dict[str, Any]] = {
            "plain": {},
            "assisted": {"assistant_model": draft},  # how much it drafts, it decides itself
            "lookup": {"prompt_lookup_num_tokens": LOOKUP_TOKENS},
        }
        ids = torch.tensor([prompt])
        generate: Any = target.generate
        output = generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=new_tokens,
            **options[how["strategy"]],
        )
        tokens: list[int] = output[0, len(prompt) :].tolist()
        return tokens


class Ours:
    """An engine with the draft model, and one that looks up."""

    def __init__(self, resources: ExitStack, target: str, draft: str, **options: Any) -> None:
        from pipeinfer_dask.engine import Engine

        self._engines = {
            name: resources.enter_context(Engine.from_pretrained(target, one, **options))
            for name, one in (("model", draft), ("ngram", "ngram"))
        }

    def generate(self, prompt: list[int], new_tokens: int, **how: Any) -> list[int]:
        """Generate by a ``strategy`` with the draft ``model`` or ``ngram``."""
        engine = self._engines[how["draft"]]
        result = engine.generate(prompt, max_new_tokens=new_tokens, strategy=how["strategy"])
        return result.token_ids


class Process:
    """A contender's process, as the benchmark sees it. Use it in a ``with`` block.

    Parameters
    ----------
    who : str
        ``"transformers"`` or ``"ours"``.
    **options
        What that is opened with.
    """

    def __init__(self, who: str, **options: Any) -> None:
        command = [sys.executable, "-m", __name__, json.dumps({"who": who, **options})]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def generate(
        self, prompt: list[int], new_tokens: int, **how: Any
    ) -> tuple[list[int], float, float]:
        """Return the new tokens, the seconds from call to result, and the cores' seconds.

        Raises
        ------
        RuntimeError
            If the process has ended; what it said is on stderr.
        """
        assert self._process.stdin is not None and self._process.stdout is not None
        job = {"prompt": prompt, "new_tokens": new_tokens, **how}
        self._process.stdin.write(json.dumps(job) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"a contender has ended with status {self._process.wait()}")
        answer: dict[str, Any] = json.loads(line)
        return answer["tokens"], answer["seconds"], answer["core_seconds"]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            self._process.communicate(timeout=PATIENCE_S)  # closes stdin, and waits
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.communicate()


def _serve(who: str, **options: Any) -> None:
    with ExitStack() as resources:
        contender: Contender
        contender = Ours(resources, **options) if who == "ours" else Transformers(**options)
        for line in sys.stdin:
            job = json.loads(line)
            began, worked = time.perf_counter(), time.process_time()
            answer = {
                "tokens": contender.generate(**job),
                "seconds": time.perf_counter() - began,
                "core_seconds": time.process_time() - worked,
            }
            sys.stdout.write(json.dumps(answer) + "\n")
            sys.stdout.flush()


if __name__ == "__main__":
    _serve(**json.loads(sys.argv[1]))
