"""The commands that judge: score, compare, ensemble, rescore."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from nearfar import terminal
from nearfar.errors import NearfarError

compare_app = typer.Typer()

Qrels = Annotated[
    Path | None,
    typer.Option(
        help="Judgments: a TREC, .csv, .tsv, .jsonl, .json or .parquet file, or a folder of BEIR's."
    ),
]
Metric = Annotated[
    list[str] | None,
    typer.Option(
        "--metric",
        "-m",
        help="nDCG@10, MAP, MRR@10, recall@100, precision@10, R-precision, hit@10, …; may be repeated.",
    ),
]
Documents = Annotated[
    int | None,
    typer.Option(help="How many documents there are, for the chance level; of a BEIR folder it is known."),
]
Ties = Annotated[str, typer.Option(help="Equal scores: expected, optimistic or pessimistic.")]
Gain = Annotated[str, typer.Option(help="Of nDCG: linear (the grade) or exponential (2^grade - 1).")]
By = Annotated[str, typer.Option(help="Order documents by score, or by rank (the column of places).")]
Part = Annotated[
    str | None, typer.Option(help="Subset/split of a file of mteb's predictions, e.g. default/test.")
]


@compare_app.command(epilog=terminal.example("nearfar score bm25.run --qrels qrels.txt --metric nDCG@10"))
def score(
    rankings: Annotated[
        list[Path],
        typer.Argument(
            help="TREC runs; .csv, .tsv, .jsonl or .parquet tables; .json, also mteb's predictions."
        ),
    ],
    qrels: Qrels = None,
    metric: Metric = None,
    documents: Documents = None,
    missing: Annotated[
        str, typer.Option(help="Judged queries that are not ranked: zero (they score 0) or skip.")
    ] = "zero",
    ties: Ties = "expected",
    gain: Gain = "linear",
    by: By = "score",
    part: Part = None,
    split: Annotated[str, typer.Option(help="Of a BEIR folder: qrels/SPLIT.tsv.")] = "test",
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Also write estimates and each query's scores as .json."),
    ] = None,
) -> None:
    """Score rankings of any tool against qrels: nDCG, MAP, recall, … with interval and chance level."""
    from nearfar.lab.rankings import RANKING_METRICS, Judged, RankingOptions, score_file, write_scores
    from nearfar.lab.table import estimates_table

    if qrels is None:
        raise NearfarError("--qrels FILE is needed: which documents are relevant to which query.")
    options = RankingOptions(
        documents=documents, missing=missing, ties=ties, gain=gain, by=by, part=part, split=split,
        metrics=metric or RANKING_METRICS
    )  # fmt: skip
    judged, console = Judged.read(qrels, options), terminal.console()
    scored = [score_file(path, judged, options, str(path)) for path in rankings]
    for each in scored:
        console.print(estimates_table(f"{each.name} · {qrels}", each.estimates))
    for note in dict.fromkeys(note for each in scored for note in each.notes):
        terminal.say(console, note)
    if output is not None:
        terminal.say(console, f"written: {write_scores(scored, output)}")


@compare_app.command(epilog=terminal.example("nearfar compare runs/samplers --baseline sampler=random"))
def compare(
    runs: Annotated[
        list[Path], typer.Argument(help="Run folders, or folders of runs; with --qrels files of rankings.")
    ],
    baseline: Annotated[
        str | None, typer.Option(help="The arm to compare with, by its label, e.g. sampler=random.")
    ] = None,
    split: Annotated[
        str | None,
        typer.Option(help="test or val; test where there is one. Of a BEIR folder: qrels/SPLIT.tsv."),
    ] = None,
    over: Annotated[
        str | None,
        typer.Option(
            help="The option by which the folds of a cross-validation differ, e.g. data.hold_out: they are one arm."
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            help="Where report.html goes; by default into the folder common to the runs. Of rankings: a .json file.",
        ),
    ] = None,
    fail_on_worse: Annotated[
        bool,
        typer.Option(
            "--fail-on-worse", help="Exit with 1 if an arm is worse than the baseline or not compared."
        ),
    ] = False,
    qrels: Qrels = None,
    metric: Metric = None,
    documents: Documents = None,
    missing: Annotated[
        str,
        typer.Option(
            help="Queries that not all rankings have: refuse, zero (they score 0) or skip (they are left out)."
        ),
    ] = "refuse",
    ties: Ties = "expected",
    gain: Gain = "linear",
    by: By = "score",
    part: Part = None,
) -> None:
    """Compare runs, or rankings of any tools: paired differences with interval and verdict, or why there are none.

    [bold]nearfar compare a.run b.run --qrels qrels.txt[/bold] compares query by query, by each metric and by all
    together, and says how many queries would tell the difference.
    """
    if qrels is not None:
        from nearfar.lab.rankings import (
            RANKING_METRICS,
            Judged,
            RankingOptions,
            compare_rankings,
            describe_rankings,
        )
        from nearfar.lab.report import write_rankings
        from nearfar.lab.table import comparison_tables

        options = RankingOptions(
            documents=documents, missing=missing, ties=ties, gain=gain, by=by, part=part,
            split=split or "test", metrics=metric or RANKING_METRICS,
        )  # fmt: skip
        compared = compare_rankings(runs, Judged.read(qrels, options), options, baseline)
        console = terminal.console()
        for table in comparison_tables(compared):
            console.print(table)
        for paragraph in describe_rankings(compared):
            terminal.say(console, paragraph)
        if output is not None:
            terminal.say(console, f"written: {write_rankings(compared, output)}")
        raise typer.Exit(1 if fail_on_worse and compared.worse else 0)
    from nearfar.lab.compare import compare_runs
    from nearfar.lab.report import write_comparison
    from nearfar.lab.summary import describe_comparison
    from nearfar.lab.table import comparison_tables

    comparison = compare_runs(runs, baseline=baseline, split=split, over=over)
    console = terminal.console()
    for table in comparison_tables(comparison):
        console.print(table)
    for paragraph in describe_comparison(comparison):
        terminal.say(console, paragraph + "\n")
    terminal.say(console, f"report: {write_comparison(comparison, output)}")
    if fail_on_worse and comparison.worse:
        raise typer.Exit(1)


@compare_app.command(epilog=terminal.example("nearfar ensemble runs/a runs/b -o runs/both"))
def ensemble(
    runs: Annotated[list[Path], typer.Argument(help="Finished runs on the same data, two or more.")],
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Its folder; by default ensemble beside the runs."),
    ] = None,
) -> None:
    """Average the outputs of several runs, evaluate that, and write it as a run that compare and report read."""
    from nearfar.lab.ensemble import write_ensemble
    from nearfar.lab.table import metrics_tables

    console = terminal.console()
    folder = write_ensemble(runs, output, lambda text: terminal.say(console, text, style="dim"))
    for table in metrics_tables(folder):
        console.print(table)
    terminal.say(console, f"report: {folder.path / 'report.html'}")


@compare_app.command(epilog=terminal.example("nearfar rescore runs/relations --classes top5"))
def rescore(
    run: Annotated[Path, typer.Argument(help="A finished run of the relation system.")],
    classes: Annotated[
        str, typer.Option(help="top5, all10, or names with commas: the classes to judge it on.")
    ] = "top5",
    split: Annotated[str | None, typer.Option(help="test or val; test where there is one.")] = None,
) -> None:
    """Judge an older model on some of its classes: what fewer classes are worth without any training."""
    from nearfar.lab.table import estimates_table
    from nearfar.systems import reevaluator

    chosen = classes if classes in ("top5", "all10") else [name.strip() for name in classes.split(",")]
    estimates = reevaluator(run, "rescore").rescore(run, chosen, split)
    terminal.console().print(estimates_table(f"{run} · {classes}", estimates))
