"""Generations in an asyncio program: awaited, streamed, and given up after a time.

.venv/bin/python examples/asynchronous.py
"""

import asyncio

import pipeinfer_dask as pi


async def first_line(engine: pi.Engine, prompt: str) -> str:
    """Stream, and stop as soon as there is enough."""
    generation = engine.start(prompt, max_new_tokens=200)
    line = ""
    async for piece in generation:
        line += piece
        if "\n" in line.strip():
            break
    generation.cancel()  # no effect on one that is done
    return line.strip().partition("\n")[0]


async def within(engine: pi.Engine, prompt: str, seconds: float) -> str:
    """Return what there is after so many seconds."""
    generation = engine.start(prompt, max_new_tokens=400)
    try:
        # A cancelled await cancels nothing else: the generation would go on.
        async with asyncio.timeout(seconds):
            await generation
    except TimeoutError:
        generation.cancel()
    result = await generation
    return f"{len(result.token_ids)} tokens, {result.finish_reason}"


async def generate(engine: pi.Engine) -> None:
    whole = engine.start("import os", max_new_tokens=32)  # returns at once
    line, whole_result = await asyncio.gather(first_line(engine, "def main"), whole)
    print("first line:", line)
    print("whole text:", repr(whole_result.text))
    print("in half a second:", await within(engine, "class Stack:", 0.5))


def main() -> None:
    pair = pi.demo_pair()
    with pi.Engine.from_pretrained(
        pair.target, draft=pair.draft, stages=2, in_process=True
    ) as engine:
        asyncio.run(generate(engine))


if __name__ == "__main__":
    main()
