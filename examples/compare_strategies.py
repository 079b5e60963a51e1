"""All strategies on one prompt: figures, a plot, and a timeline of each.

    .venv/bin/pip install -c constraints.txt '.[examples]'
    .venv/bin/python examples/compare_strategies.py plots
    .venv/bin/python examples/compare_strategies.py plots --target my/target --draft my/draft

Nodes that share the cores of one machine are no pipeline. So the plot has a second panel: what the
same costs would give on machines of their own, in virtual time.
"""

from __future__ import annotations

from pathlib import Path

import click

try:
    import matplotlib
except ImportError:
    raise SystemExit(
        "this needs matplotlib: .venv/bin/pip install -c constraints.txt '.[examples]'"
    ) from None
matplotlib.use("Agg")  # files only: no window
import matplotlib.pyplot as plt

import pipeinfer_dask as pi
from pipeinfer_dask.trace import History
from pipeinfer_dask.widgets import Timeline

STRATEGIES = ("iterative", "speculative", "pipeinfer", "adaptive")
Outcomes = dict[str, pi.Result] | dict[str, pi.Simulation]


def plot(measured: Outcomes, foreseen: Outcomes, target: Path) -> None:
    """Draw the text's length over time, one line for each strategy."""
    figure, panels = plt.subplots(1, 2, figsize=(10, 4), sharey=True, layout="constrained")
    for panel, outcomes, title in (
        (panels[0], measured, "here"),
        (panels[1], foreseen, "each node on a machine of its own (simulated)"),
    ):
        for (name, outcome), dashes in zip(outcomes.items(), ("-", "--", "-.", ":"), strict=False):
            history = History(outcome.trace)
            times = [token.time - history.began for token in history.tokens]
            panel.plot(times, range(1, len(times) + 1), dashes, label=name)
        panel.set_title(title)
        panel.set_xlabel("seconds")
    panels[0].set_ylabel("tokens")
    panels[0].legend()
    figure.savefig(target)
    plt.close(figure)


@click.command(help=__doc__.split("\n")[0])
@click.argument("output", type=click.Path(file_okay=False, path_type=Path))
@click.option("--target", help="Directory or hub name; by default the embedded one.")
@click.option("--draft", help="Likewise, or ngram; without it a --target decodes plainly.")
@click.option("--prompt", default="def main", show_default=True)
@click.option("--stages", default=2, show_default=True)
@click.option("--max-new-tokens", default=64, show_default=True)
@click.option("--in-process", is_flag=True, help="No worker processes: threads.")
def main(
    output: Path,
    target: str | None,
    draft: str | None,
    prompt: str,
    stages: int,
    max_new_tokens: int,
    in_process: bool,
) -> None:
    pair = pi.demo_pair()
    # The embedded draft model fits the embedded target alone.
    models = (pair.target, draft or pair.draft) if target is None else (target, draft)
    with pi.Engine.from_pretrained(*models, stages=stages, in_process=in_process) as engine:
        costs = engine.measure_costs()
        names = [name for name in STRATEGIES if engine.draft is not None or name == "iterative"]
        measured = {
            name: engine.generate(prompt, max_new_tokens=max_new_tokens, strategy=name)
            for name in names
        }
    agreement = [result.metrics.agreement_rate for result in measured.values()]
    acceptance = next((rate for rate in reversed(agreement) if rate is not None), 0.0)
    foreseen = {
        name: pi.simulate(name, costs=costs, acceptance=acceptance, max_new_tokens=max_new_tokens)
        for name in names
    }

    output.mkdir(parents=True, exist_ok=True)
    plot(measured, foreseen, output / "tokens.svg")
    for name, result in measured.items():
        result.trace.save(output / f"{name}.trace")
        (output / f"{name}.html").write_text(Timeline(result).to_html(), encoding="utf-8")
        seen, simulated = result.metrics.tokens_per_s, foreseen[name].metrics.tokens_per_s
        click.echo(f"{name:12} {seen:7.1f} tokens/s here, {simulated:7.1f} on machines of its own")
    click.echo(f"plot, timelines and traces are in {output}")


if __name__ == "__main__":
    main()
