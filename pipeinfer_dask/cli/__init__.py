"""The commands: ``pipeinfer``, and the same as ``dask pipeinfer``."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict
from functools import partial
from importlib import import_module
from inspect import signature
from typing import TYPE_CHECKING, Any

import click

from pipeinfer_dask.bench import SUITES
from pipeinfer_dask.bench.limits import check
from pipeinfer_dask.cli.errors import Commands
from pipeinfer_dask.cli.values import settings_of, shares_of
from pipeinfer_dask.drafting.ngram import NGRAM
from pipeinfer_dask.policies import STRATEGIES, Speculative, make_policy
from pipeinfer_dask.simulation.costs import MOST_STAGES

if TYPE_CHECKING:
    from rich.console import Console

    from pipeinfer_dask.engine import Engine, Result
    from pipeinfer_dask.runtime.planning.admission import Admission


@click.group("pipeinfer", cls=Commands)
@click.version_option(package_name="pipeinfer-dask")
def main() -> None:
    """Pipelined speculative decoding of language models on Dask workers."""


as_json = click.option(
    "--json", "as_json", is_flag=True, help="Print one JSON object as the last line of stdout."
)
timeline_option = partial(
    click.option, "--timeline/--no-timeline", help="Draw who worked on what, and when."
)
SEED = click.IntRange(0, 2**63 - 1)
COUNT = click.IntRange(min=1)
EMPTY = "expected a prompt of at least one token, got an empty one"
stages_option = click.option("--stages", type=COUNT, help="Stages of the pipeline.")


@main.command()
@click.option("--prompt", help="Text to continue. By default some Python.")
@click.option(
    "--max-new-tokens", type=COUNT, default=64, show_default=True, help="Tokens to generate."
)
@stages_option
@click.option(
    "--strategy",
    "strategies",
    multiple=True,
    help="A strategy to show; may be given several times. By default all.",
)
@timeline_option(default=True)
@as_json
def demo(
    prompt: str | None,
    max_new_tokens: int,
    stages: int | None,
    strategies: tuple[str, ...],
    timeline: bool,
    as_json: bool,
) -> None:
    """Generate with the embedded models on a cluster of this machine, by every strategy."""
    names = strategies or tuple(STRATEGIES)
    for name in names:
        make_policy(name)  # what needs no model is looked at before torch is imported
    if prompt == "":
        raise ValueError(EMPTY)
    from pipeinfer_dask.models.demo_pair import DEMO_PROMPT, demo_pair

    prompt = DEMO_PROMPT if prompt is None else prompt
    pair = demo_pair()
    admission = _admission(pair.target, pair.draft)
    admission.request(0, prompt, max_new_tokens)
    for name in names:
        admission.policy(name, {})
    console = _console(as_json)
    with _engine(console, pair.target, pair.draft, stages=stages) as engine:
        _warm_up(engine, names)
        results = [
            _show(console, engine, prompt, strategy=name, max_new_tokens=max_new_tokens)
            for name in names
        ]
    from pipeinfer_dask import terminal
    from pipeinfer_dask import timeline as pictures

    if console.is_terminal:  # elsewhere nothing is marked
        console.print(terminal.legend())
    console.print()
    if timeline:
        pictures.show(console, [(result.strategy, result.trace) for result in results])
    console.print(terminal.table([(r.strategy, r.metrics) for r in results]))
    console.print(terminal.headings())
    different = [result for result in results if result.token_ids != results[0].token_ids]
    if different:
        raise RuntimeError(
            f"{different[0].strategy} generated another text than {results[0].strategy}: this is "
            f"a bug in pipeinfer_dask, please report it"
        )
    console.print(
        f"All {len(results)} outputs are identical, token for token. These workers share one "
        f"machine's cores: on a cluster, each stage has its own."
    )
    if as_json:
        _print_json(results)


@main.command()
@click.argument("prompt")
@click.option("--target", help="Directory or hub name of the target. By default the embedded one.")
@click.option(
    "--draft", help="Directory or hub name of the draft; ngram: look up (that directory: ./ngram)."
)
@click.option("--strategy", help="By default adaptive, or iterative where there is no draft.")
@click.option(
    "--set", "options", multiple=True, metavar="NAME=VALUE", help="A knob, or a generation setting."
)
@click.option("--max-new-tokens", type=COUNT, help="Tokens to generate. By default 64.")
@click.option("--temperature", type=float, help="Sample at this temperature; 0 is greedy.")
@click.option("--top-k", type=int, help="Sample from so many best tokens.")
@click.option("--top-p", type=float, help="Sample from the best tokens of this probability.")
@click.option("--seed", type=SEED, help="Of the sampling. By default a random one.")
@click.option("--stop", "stop_strings", multiple=True, help="End the text with this string.")
@click.option(
    "--logprobs", type=click.IntRange(min=0), help="With --json: of so many tokens, up to all."
)
@stages_option
@click.option(
    "--layer-split",
    metavar="W,W,...|auto",
    help="Relative shares of layers, one a stage; or by what each worker can do.",
)
@click.option("--weights", default="auto", help="How CPUs hold matrices: auto, fp16 or fp32.")
@click.option("--devices", help="Where to compute: cpu, cuda or cuda:N, one for all or A,B,...")
@click.option("--dtype", help="In what GPUs compute: float32, float16 or bfloat16.")
@click.option("--scheduler", metavar="ADDRESS", help="Use this Dask cluster, not one of its own.")
@click.option(
    "--head",
    default="client",
    show_default=True,
    help="What drives the pipeline: client, worker, or a worker's address.",
)
@click.option("--share-workers", is_flag=True, help="Several stages may be on one worker.")
@click.option("--in-process", is_flag=True, help="No cluster: stages are threads.")
@timeline_option(default=False)
@as_json
def generate(
    prompt: str,
    target: str | None,
    draft: str | None,
    strategy: str | None,
    options: tuple[str, ...],
    stop_strings: tuple[str, ...],
    stages: int | None,
    layer_split: str | None,
    weights: str,
    devices: str | None,
    dtype: str | None,
    scheduler: str | None,
    head: str,
    share_workers: bool,
    in_process: bool,
    timeline: bool,
    as_json: bool,
    **asked: Any,
) -> None:
    """Continue PROMPT ("-" reads it from stdin)."""
    # What needs no model is looked at before torch is imported, which takes seconds.
    if prompt == "-":
        try:
            prompt = sys.stdin.read()
        except UnicodeDecodeError as error:
            raise ValueError(
                f"expected a prompt in UTF-8, got one that is not ({error}): save it as UTF-8"
            ) from error
    if not prompt:
        raise ValueError(EMPTY)
    if strategy is not None:
        make_policy(strategy)
    shares = shares_of(layer_split)
    asked = {name: value for name, value in asked.items() if value is not None}
    if stop_strings:
        asked["stop_strings"] = stop_strings
    given = settings_of(options)
    if twice := asked.keys() & given.keys():
        name = min(twice)
        raise ValueError(f"expected {name} once, got it as an option and by --set: leave one out")
    asked |= given
    if asked.get("logprobs") and not as_json:
        raise ValueError("expected --logprobs along with --json, which shows them: add --json")
    if in_process and scheduler is not None:
        raise ValueError("expected --in-process or --scheduler, got both: leave one out")
    if in_process and head != "client":
        raise ValueError("expected --in-process or --head, got both: leave one out")
    if target is None:
        if draft not in (None, NGRAM):
            raise ValueError(f"expected --target or --draft {NGRAM}, got --draft {draft} alone")
        from pipeinfer_dask.models.demo_pair import demo_pair

        pair = demo_pair()
        target, draft = str(pair.target), draft or str(pair.draft)
    from pipeinfer_dask.models.linears import check_weights
    from pipeinfer_dask.runtime.planning.clusters import connected
    from pipeinfer_dask.runtime.planning.settings import split

    settings, knobs = split(asked)
    check_weights(weights)
    admission = _admission(target, draft, elsewhere=scheduler is not None)
    admission.policy(strategy, knobs)
    admission.request(0, prompt, **settings)
    console = _console(as_json)
    with ExitStack() as stack:
        client = None if scheduler is None else stack.enter_context(connected(scheduler))
        engine = stack.enter_context(
            _engine(
                console,
                target,
                draft,
                client=client,
                stages=stages,
                layer_split=shares,
                weights=weights,
                devices=devices,
                dtype=dtype,
                head=head,
                share_workers=share_workers,
                in_process=in_process,
            )
        )
        result = _show(console, engine, prompt, strategy=strategy, **settings, **knobs)
    if timeline:
        from pipeinfer_dask import timeline as pictures

        pictures.show(console, [(result.strategy, result.trace)])
    if as_json:
        _print_json([result])
    else:
        from pipeinfer_dask import terminal

        console.print(terminal.table([(result.strategy, result.metrics)]))
        if result.seed is not None:
            console.print(f"sampled with seed {result.seed}")


@main.command()
@click.option(
    "--stages",
    type=click.IntRange(1, MOST_STAGES),
    default=8,
    show_default=True,
    help="Equal stages.",
)
@click.option(
    "--acceptance",
    default=0.8,
    show_default=True,
    help="Mean chance of the draft's first choice; at 0 second choices may still be right.",
)
@click.option("--stage-ms", default=50.0, show_default=True, help="A one-token run on a stage.")
@click.option(
    "--token-cost", default=0.05, show_default=True, help="Each further token, relative to that."
)
@click.option(
    "--draft-cost", default=0.15, show_default=True, help="A draft pass, relative to that."
)
@click.option("--hop-cost", default=0.02, show_default=True, help="A hop, relative to that.")
@click.option("--strategy", "strategies", multiple=True, help="May be given several times.")
@click.option(
    "--max-new-tokens", type=COUNT, default=200, show_default=True, help="Tokens to generate."
)
@click.option("--seed", default=0, show_default=True, help="Of the synthetic text.")
@timeline_option(default=True)
@as_json
def simulate(
    stages: int,
    acceptance: float,
    stage_ms: float,
    token_cost: float,
    draft_cost: float,
    hop_cost: float,
    strategies: tuple[str, ...],
    max_new_tokens: int,
    seed: int,
    timeline: bool,
    as_json: bool,
) -> None:
    """Show in virtual time what each strategy would do on a pipeline that you describe."""
    from pipeinfer_dask import terminal
    from pipeinfer_dask import timeline as pictures
    from pipeinfer_dask.simulation import Costs, best_chain
    from pipeinfer_dask.simulation import simulate as run

    if not 1e-6 <= stage_ms <= 1e9:
        raise ValueError(f"expected --stage-ms from 1e-6 to 1e9, got {stage_ms:g}")
    costs = Costs.even(
        stages,
        stage_s=stage_ms / 1e3,
        token_cost=token_cost,
        draft_cost=draft_cost,
        hop_cost=hop_cost,
    )
    world: dict[str, Any] = {
        "acceptance": acceptance,
        "costs": costs,
        "max_new_tokens": max_new_tokens,
        "seed": seed,
    }
    results, notes = {}, []
    for name in strategies or tuple(STRATEGIES):
        if name != "speculative":
            results[name] = run(name, **world)
            continue
        usual, best = Speculative().k, best_chain(**world)
        for k in dict.fromkeys((usual, best)):
            results[f"{name} k={k}"] = run(name, k=k, **world)
        notes.append(f"k: guesses in each run; {usual} unless set, {best} is the fastest here.")
    console = _console(as_json)
    if timeline:
        pictures.show(console, [(label, result.trace) for label, result in results.items()])
    console.print(terminal.table([(label, result.metrics) for label, result in results.items()]))
    console.print("\n".join([terminal.headings(), *notes, "All figures are of virtual time."]))
    if as_json:
        rows = [
            {
                "strategy": result.strategy,
                "label": label,
                "token_ids": result.token_ids,
                "metrics": result.metrics.to_dict(),
            }
            for label, result in results.items()
        ]
        click.echo(json.dumps({"results": rows}))


@main.command()
@click.argument("suite", type=click.Choice(SUITES))
@click.option(
    "--dial",
    type=click.IntRange(0, 100),
    multiple=True,
    help="compute: only this agreement, in percent.",
)
@click.option("--quick", is_flag=True, help="compute: small models and short texts, once.")
@click.option("--faults", type=click.IntRange(0), help="faults: so many in all.")
@click.option("--generations", type=click.IntRange(1), help="faults, soak: so many texts.")
@click.option("--cancels", type=click.IntRange(1), help="cancels: so many.")
@as_json
def bench(suite: str, as_json: bool, **asked: Any) -> None:
    """Measure one part on this machine. The last line of stdout is one JSON object.

    The documentation's page on performance says what each suite measures. Where a suite has limits
    and one is broken, the exit status is 1.
    """
    unset = (None, (), False)
    given = {n: value for n, value in asked.items() if not any(value is one for one in unset)}
    run = getattr(import_module(f"pipeinfer_dask.bench.{suite}"), f"run_{suite}_bench")
    if beyond := given.keys() - signature(run).parameters.keys():
        raise ValueError(f"expected options of suite {suite}, got --{min(beyond)}: leave it out")
    report: dict[str, Any] = run(**given)
    if not as_json:
        from rich.table import Table

        for rows in (report["rows"], report.get("clients", [])):
            table = Table(*(rows[0] if rows else ()), box=None)
            for row in rows:
                shown = (f"{v:.4g}" if isinstance(v, float) else str(v) for v in row.values())
                table.add_row(*shown)
            _console(as_json).print(table)
    click.echo(json.dumps(report))
    check(report)


def _console(as_json: bool) -> Console:
    from rich.console import Console

    return Console(stderr=as_json, highlight=False)


def _engine(console: Console, target: Any, draft: Any, **options: Any) -> Engine:
    from pipeinfer_dask import terminal
    from pipeinfer_dask.engine import Engine

    with terminal.loading(console) as progress:
        return Engine.from_pretrained(target, draft, progress=progress, **options)


def _admission(
    target: str | os.PathLike[str],
    draft: str | os.PathLike[str] | None,
    *,
    elsewhere: bool = False,
) -> Admission:
    """Return who can say, before a cluster is started, whether a request can be served."""
    from pipeinfer_dask.models.checkpoint import load_tokenizer, open_checkpoint
    from pipeinfer_dask.runtime.planning.admission import Admission

    checkpoint = open_checkpoint(os.fspath(target), elsewhere=elsewhere)
    return Admission(checkpoint, load_tokenizer(checkpoint), has_draft=draft is not None)


def _warm_up(engine: Engine, strategies: Sequence[str]) -> None:
    """Let every worker compute once: a first pass allocates, and would be measured."""
    for name in strategies:
        engine.generate([0, 1], max_new_tokens=8, strategy=name)


def _show(console: Console, engine: Engine, prompt: str, **options: Any) -> Result:
    """Generate before the reader's eyes; an interrupt ends the generation and the text."""
    from pipeinfer_dask import terminal

    generation = engine.start(prompt, **options)
    console.rule(generation.strategy, align="left")
    try:
        terminal.stream(console, prompt, generation)
    except KeyboardInterrupt:
        generation.cancel()
        raise
    return generation.result()


def _print_json(results: Sequence[Result]) -> None:
    click.echo(
        json.dumps(
            {
                "results": [
                    {
                        "strategy": result.strategy,
                        "text": result.text,
                        "token_ids": result.token_ids,
                        "finish_reason": result.finish_reason,
                        "seed": result.seed,
                        "logprobs": result.logprobs and list(map(asdict, result.logprobs)),
                        "metrics": result.metrics.to_dict(),
                    }
                    for result in results
                ]
            }
        )
    )
