"""A text as it comes, each piece marked by its origin. Ctrl-C ends the text, not the engine.

.venv/bin/python examples/streaming.py
.venv/bin/python examples/streaming.py "class Stack:" --temperature 0.8 --seed 1
"""

import click

import pipeinfer_dask as pi

STYLES = {
    "accepted": {"fg": "green"},  # guessed by the draft model, and right
    "corrected": {"fg": "yellow"},  # guessed wrong: the target's own
    "plain": {},  # nothing was guessed there
}


@click.command(help=__doc__.split("\n")[0])
@click.argument("prompt", default="def main")
@click.option("--max-new-tokens", default=96, show_default=True)
@click.option("--temperature", type=float)
@click.option("--seed", type=int)
def main(prompt: str, max_new_tokens: int, temperature: float | None, seed: int | None) -> None:
    if seed is not None and temperature is None:
        raise click.UsageError(
            "expected --temperature with --seed: a greedy text has no chance in it"
        )
    settings = {} if temperature is None else {"temperature": temperature, "seed": seed}
    pair = pi.demo_pair()
    # Threads of this process instead of worker processes: nothing to start for models this small.
    with pi.Engine.from_pretrained(
        pair.target, draft=pair.draft, stages=2, in_process=True
    ) as engine:
        generation = engine.start(prompt, max_new_tokens=max_new_tokens, **settings)
        click.echo(prompt, nl=False)
        try:
            for piece in generation:
                click.secho(piece, nl=False, **STYLES[piece.origin])
        except KeyboardInterrupt:
            generation.cancel()
        click.echo(f"\n[{generation.result().finish_reason}]")


if __name__ == "__main__":
    main()
