"""A text through worker processes of this machine, and how it came about.

.venv/bin/python examples/local.py
.venv/bin/python examples/local.py "class Stack:"
"""

import sys

import pipeinfer_dask as pi

PROMPT = "import os\nimport sys\n\n\ndef split(path):\n    "


def main(prompt: str = PROMPT) -> None:
    pair = pi.demo_pair()  # or two folders, or two hub names, of your own
    with pi.Engine.from_pretrained(pair.target, draft=pair.draft, stages=3) as engine:
        result = engine.generate(prompt, max_new_tokens=64)
        plain = engine.generate(prompt, max_new_tokens=64, strategy="iterative")

    print(prompt + result.text)
    print()
    metrics = result.metrics
    print(f"{metrics.accepted_tokens} of {metrics.generated_tokens} tokens were guessed right,")
    print(f"{metrics.runs_cancelled} of {metrics.runs} runs were called off,")
    same = "is the same" if plain.token_ids == result.token_ids else "DIFFERS"
    print(f"and the text {same} without guesses.")


# Worker processes import this file again: without this line each would start workers of its own.
if __name__ == "__main__":
    main(" ".join(sys.argv[1:]) or PROMPT)
