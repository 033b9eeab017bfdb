"""The terminal: one thin command per verb. Heavy libraries are imported by the verb that needs them."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from nearfar import terminal
from nearfar.data_cli import data_app
from nearfar.errors import NearfarError
from nearfar.mine_cli import mine_app
from nearfar.neighbors_cli import neighbors_app
from nearfar.use_cli import use_app

app = typer.Typer(
    name="nearfar",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    help="Train contrastive models, see why they learn, and compare runs honestly.\n\n"
    "Start with [bold]nearfar train --list[/bold], or [bold]nearfar train experiment=molecules_demo[/bold].",
    epilog=terminal.example("nearfar doctor path/to/your/run"),
)
verify_app = typer.Typer(
    no_args_is_help=True,
    help="Self-tests that certify a part of nearfar on this machine.",
    epilog=terminal.example("nearfar verify ddp --loss InfoNCELoss"),
)
app.add_typer(verify_app, name="verify")
app.add_typer(data_app, name="data")
app.add_typer(use_app)
app.add_typer(mine_app)
app.add_typer(neighbors_app)

HYDRA = {"allow_extra_args": True, "ignore_unknown_options": True}


@app.command(
    context_settings=HYDRA,
    epilog=terminal.example(
        "nearfar train experiment=pairs data.train=words.tsv views=[definition,word] epochs=3"
    ),
)
def train(
    context: typer.Context,
    list_: Annotated[bool, typer.Option("--list", help="Show the experiments.")] = False,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run", help="Show data, model, memory and an estimate of the time; train nothing."
        ),
    ] = False,
) -> None:
    """Train: experiment=NAME key=value …

    Everything after [bold]train[/bold] goes to Hydra: [bold]-m[/bold] sweeps over comma-separated values,
    [bold]--cfg job[/bold] prints the composed configuration. [bold]nearfar options SYSTEM[/bold] lists the options.
    """
    if list_:
        from nearfar.config.registry import config_packages
        from nearfar.configs import experiments

        known = experiments(config_packages())
        width = max(map(len, known))
        for name, line in known.items():
            typer.echo(f"{name:<{width}}  {line}")
        return
    arguments = list(context.args)
    if dry_run:
        from nearfar.launch import dry_run as describe

        describe(arguments, terminal.console())
        return
    from nearfar.launch import launch

    launch(arguments)


@app.command(epilog=terminal.example("nearfar check"))
def check(
    json_: Annotated[bool, typer.Option("--json", help="Print the data as JSON.")] = False,
) -> None:
    """What is installed: versions, extras and what each gives, weights at hand, cores, GPU, cache."""
    from nearfar.lab.installation import extra_table, inspect_installation, machine_table

    installation, console = inspect_installation(), terminal.console()
    if json_:
        console.print_json(data=installation.to_dict())
        return
    console.print(machine_table(installation))
    console.print(extra_table(installation))
    if any(not extra.installed for extra in installation.extras):
        terminal.say(
            console,
            "An extra is installed by its name: pip install 'nearfar[NAME]', or '.[NAME]' in a clone.",
        )


@app.command(epilog=terminal.example("nearfar options pairs"))
def options(
    system: Annotated[str, typer.Argument(help="A system, such as molecules.")],
    markdown: Annotated[bool, typer.Option("--markdown", help="The tables of the docs.")] = False,
) -> None:
    """The options of a system: their defaults, the values they may have, and what they do."""
    from nearfar.config.registry import options_class
    from nearfar.config.tables import markdown_table, option_rows, options_table
    from nearfar.config.training import RunOptions

    if markdown:
        typer.echo(markdown_table(option_rows(options_class(system), RunOptions)))
        return
    for table in options_table(system):
        terminal.console().print(table)


@app.command(epilog=terminal.example("nearfar new crystals"))
def new(
    name: Annotated[
        str, typer.Argument(help="Its name: small letters, digits, underscores, such as crystals.")
    ],
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="The folder to write; by default one of that name, here."),
    ] = None,
) -> None:
    """Write a system of your own, ready to install and train: reader, options, towers, experiment, sample, test."""
    from nearfar.lab.new_system import write_system

    console = terminal.console()
    folder = write_system(name, output)
    terminal.say(console, f"written: {folder}")
    for command in (f"pip install -e {folder}", f"nearfar train experiment={name}", f"pytest {folder}"):
        terminal.say(console, f"  {command}")


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


@app.command(epilog=terminal.example("nearfar score bm25.run --qrels qrels.txt --metric nDCG@10"))
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
    from nearfar.errors import NearfarError
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


@app.command(epilog=terminal.example("nearfar compare runs/samplers --baseline sampler=random"))
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


@app.command(epilog=terminal.example("nearfar doctor path/to/your/run"))
def doctor(
    run: Annotated[
        Path, typer.Argument(help="A run folder, finished or not; or the log of a different trainer.")
    ],
    map_: Annotated[
        list[str] | None,
        typer.Option("--map", help="FIELD=NAME: what a name of that log means, e.g. loss=train/contrast."),
    ] = None,
    json_: Annotated[
        bool, typer.Option("--json", help="Print what doctor.json holds, and nothing else.")
    ] = False,
    strict: Annotated[
        bool, typer.Option("--strict", help="Exit with 1 where there is a warning or an error.")
    ] = False,
    what_if: Annotated[
        bool,
        typer.Option("--what-if", help="Batches of the run under each counterfactual; nothing is trained."),
    ] = False,
    try_: Annotated[
        int | None,
        typer.Option("--try", help="So many steps with the first prescription against as many without."),
    ] = None,
    override: Annotated[
        list[str] | None,
        typer.Option(help="key=value: what to try, or a further counterfactual; may be repeated."),
    ] = None,
    batch: Annotated[
        int | None,
        typer.Option("--batch", help="Explain this batch of the epoch, row by row; counted from 1."),
    ] = None,
    false_negatives: Annotated[
        bool,
        typer.Option(
            "--false-negatives", help="Write the negatives that are most likely positives, to be marked."
        ),
    ] = False,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="With --false-negatives: the table. Default: exclude.csv."),
    ] = None,
    rows: Annotated[
        int | None,
        typer.Option(help="Rows of --batch (8), or pairs of --false-negatives (100).", min=1),
    ] = None,
    html: Annotated[
        Path | None,
        typer.Option(
            help="With --batch or --false-negatives: write them with texts and pictures to this page."
        ),
    ] = None,
    batches: Annotated[int, typer.Option(help="With --what-if: how many batches.")] = 8,
    checkpoint: Annotated[str, typer.Option(help="With --what-if and --batch: last or best.")] = "last",
    seeds: Annotated[int, typer.Option(help="With --try: draws of batches.")] = 1,
    start_epoch: Annotated[
        int | None, typer.Option(help="With --try: the epoch from which the schedules go on.")
    ] = None,
) -> None:
    """Why a run stalls: findings with evidence, cause and what to try; written to doctor.json as well.

    Reads runs of nearfar, and logs of Hugging Face trainers, sentence-transformers, Lightning, TensorBoard,
    Weights & Biases, MLflow, Trackio and open_clip, tables, JSON lines and printed logs.
    [bold]--what-if[/bold] evaluates the run's batches under other options, [bold]--try N[/bold] tests a prescription.
    """
    from nearfar.lab.doctor_command import examine, print_diagnosis, read_names

    console = terminal.console()

    def say(text: str) -> None:
        terminal.say(console, text, style="dim")

    diagnosis = examine(run, say, read_names(map_))
    if json_:
        console.print_json(data=diagnosis.to_dict())
    elif not what_if and try_ is None and batch is None and not false_negatives:
        print_diagnosis(diagnosis, run, console)
    if html is not None and batch is None and not false_negatives:
        raise NearfarError(
            "--html is the page of an explained batch: name one, --batch N; or --false-negatives."
        )
    if html is not None and batch is not None and false_negatives:
        raise NearfarError("--html is one page: ask for --batch and --false-negatives one after the other.")
    if output is not None and not false_negatives:
        raise NearfarError("--output is the table of --false-negatives; give that, too.")
    if false_negatives:
        from nearfar.lab.suspicious_negatives import suspicious_negatives

        table = output or Path("exclude.csv")
        for each in suspicious_negatives(run, table, rows=rows or 100, page=html, say=say)[:10]:
            terminal.say(console, f"{each.score:+.3f}, own partner {each.positive_score:+.3f}: {each.text}")
    if batch is not None:
        from nearfar.lab.explain_run import explain_run

        pairs = explain_run(run, batch, rows=rows or 8, checkpoint=checkpoint, page=html, say=say)
        for pair, explained in pairs.items():
            terminal.say(console, pair, style="bold")
            terminal.say(console, str(explained))
    if what_if:
        from nearfar.lab.table import describe_what_if, what_if_table
        from nearfar.lab.what_if import what_if as ask

        further = [override] if override else []
        answer = ask(run, checkpoint=checkpoint, batches=batches, overrides=further, say=say)
        console.print(what_if_table(answer))
        for line in describe_what_if(answer):
            terminal.say(console, line)
    if try_ is not None:
        from nearfar.lab.table import describe_trial, trial_table
        from nearfar.lab.trial import try_prescription

        trial = try_prescription(run, try_, overrides=override, seeds=seeds, start_epoch=start_epoch, say=say)
        console.print(trial_table(trial))
        for line in describe_trial(trial):
            terminal.say(console, line)
        terminal.say(console, f"trial: {trial.folder}")
    raise typer.Exit(1 if strict and not diagnosis.healthy else 0)


@app.command(epilog=terminal.example("nearfar report runs/molecules_demo"))
def report(run: Annotated[Path, typer.Argument(help="A run folder.")]) -> None:
    """Write report.html of a finished run anew and print its table."""
    from nearfar.lab.report import write_report
    from nearfar.lab.table import metrics_tables
    from nearfar.training.run_folder import RunFolder

    folder = RunFolder(run)
    path = write_report(folder)
    console = terminal.console()
    for table in metrics_tables(folder):
        console.print(table)
    terminal.say(console, f"report: {path}")


@app.command(epilog=terminal.example("nearfar board runs/"))
def board(
    runs: Annotated[
        Path, typer.Argument(help="A folder with runs and logs anywhere below it, a run, or a log.")
    ] = Path("runs"),
    host: Annotated[
        str, typer.Option(help="Where to listen; 0.0.0.0 is every address of this machine.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 8100,
    allow_host: Annotated[
        list[str] | None,
        typer.Option(
            "--allow-host", help="A name under which the board may be asked; may be repeated. * is any."
        ),
    ] = None,
) -> None:
    """Watch runs in the browser: a table, live curves and findings, comparisons, maps, search and prediction.

    Shows runs of nearfar, and every log that [bold]nearfar doctor[/bold] reads. Nothing is written into the folder, and
    only this machine reaches the board unless --host says otherwise; there is no login.
    """
    from nearfar.board.server import build_board
    from nearfar.serving.limits import local_hosts
    from nearfar.serving.listen import serve

    console = terminal.console()
    answer = build_board(runs, hosts=local_hosts(host, allow_host or ()))
    serve(
        answer,
        host,
        port,
        lambda address: terminal.say(console, f"{runs}: {address} (stop with Ctrl-C)"),
    )


@app.command(epilog=terminal.example("nearfar ensemble runs/a runs/b -o runs/both"))
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


@app.command(epilog=terminal.example("nearfar claims --list"))
def claims(
    wanted: Annotated[
        list[str] | None, typer.Argument(help="Claims by id, row or group; all of them by default.")
    ] = None,
    list_: Annotated[bool, typer.Option("--list", help="Show the claims, run nothing.")] = False,
    seeds: Annotated[
        int | None, typer.Option(help="Seeds of each experiment instead of the ledger's.")
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="Tiny settings that show that everything runs; no results.")
    ] = False,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="A folder for claims.json, with every quantity and seed."),
    ] = None,
    ledger: Annotated[
        list[Path] | None,
        typer.Option(help="A ledger of your own (YAML) instead of that of the clone."),
    ] = None,
) -> None:
    """Test statements by experiment: supported, refuted or not distinguishable, and did the prediction hold?"""
    from nearfar.lab.claims import choose, read_ledger
    from nearfar.lab.claims.table import claim_table, outcome_table

    chosen, console = choose(read_ledger(ledger), wanted or []), terminal.console()
    if list_:
        console.print(claim_table(chosen))
        return
    from nearfar.lab.claims.run import run_claims, write_outcomes

    progress = terminal.console(stderr=True)
    outcomes = run_claims(
        chosen, seeds=seeds, quick=quick, before=lambda c: terminal.say(progress, f"{c.id} …")
    )
    waiting = [claim for claim in chosen if claim.waits_for]
    console.print(outcome_table(outcomes, waiting))
    if output is not None:
        terminal.say(console, f"written: {write_outcomes(outcomes, waiting, output)}")


@app.command(epilog=terminal.example("nearfar rescore runs/relations --classes top5"))
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


@app.command(
    context_settings=HYDRA,
    epilog=terminal.example("nearfar crossval experiment=relations data=vrd data.dir=vrd/ name=folds"),
)
def crossval(
    context: typer.Context,
    folds: Annotated[int, typer.Option(help="How many folds; every picture is in the test set of one.")] = 5,
) -> None:
    """Cross-validation: train once a fold (experiment=NAME key=value …), judge all test sets together.

    The runs are a sweep over [bold]data.fold[/bold] called [bold]name=[/bold]; [bold]exists=skip[/bold] keeps what is
    finished.
    """
    from nearfar.crossval import cross_validate
    from nearfar.lab.table import differences_table, estimates_table
    from nearfar.launch import launch

    console = terminal.console()
    result = cross_validate(list(context.args), folds, launch)
    console.print(estimates_table(f"{result.folder} · {folds} folds, every pair once", result.estimates))
    console.print(differences_table("fused probe minus control, paired", result.differences))
    terminal.say(console, f"written: {result.folder / 'crossval.json'}")


@app.command(
    context_settings=HYDRA,
    epilog=terminal.example(
        "nearfar tune experiment=molecules sampler=hard 'lr=tag(log,interval(1e-4,1e-2))' name=search --trials 40"
    ),
)
def tune(
    context: typer.Context,
    trials: Annotated[int, typer.Option(help="How many trials, with those that are there already.")] = 20,
    prune: Annotated[
        bool,
        typer.Option("--prune", help="End trials early that are weaker than others after as many epochs."),
    ] = False,
    at_once: Annotated[
        int | None, typer.Option(help="Trials at a time; by default as many as the cluster has room for.")
    ] = None,
    judge: Annotated[
        int,
        typer.Option(help="New seeds on which the best and the defaults are trained and compared; 0: none."),
    ] = 3,
) -> None:
    """Search options on a Ray cluster, or this machine: experiment=NAME sampler=hard,random 'lr=interval(1e-4,1e-2)' …

    Optuna draws, by what earlier trials scored on validation. The best is a candidate: it is judged on new seeds.
    """
    from nearfar.lab.report import write_comparison
    from nearfar.lab.summary import describe_comparison
    from nearfar.lab.table import comparison_tables
    from nearfar.tune import tune as search

    console = terminal.console()
    comparison = search(
        list(context.args), trials=trials, prune=prune, at_once=at_once, judge=judge, console=console
    )
    if comparison is None:
        return
    for table in comparison_tables(comparison):
        console.print(table)
    for paragraph in describe_comparison(comparison):
        terminal.say(console, paragraph + "\n")
    terminal.say(console, f"report: {write_comparison(comparison)}")


@data_app.command(
    "read",
    context_settings=HYDRA,
    epilog=terminal.example("nearfar data experiment=pairs data.train=words.tsv views=[definition,word]"),
)
def data(context: typer.Context) -> None:
    """Read an experiment's data and show what was taken, rejected and why: experiment=NAME data.train=…"""
    from nearfar.launch import single_config
    from nearfar.systems import build_system

    console = terminal.console()
    system: Any = build_system(single_config(list(context.args)))
    contents = system.load_data(lambda text: terminal.say(console, text))
    terminal.say(console, contents.summary())
    console.print_json(data=contents.layout())


@verify_app.command("sampler", epilog=terminal.example("nearfar verify sampler"))
def verify_sampler(
    seed: Annotated[int, typer.Option(help="Seed of the vectors and the batches.")] = 0,
) -> None:
    """100 vectors in 5 clusters: are hard batches harder than random ones, and is a misaligned list detected?"""
    from nearfar.batching import verify_sampler
    from nearfar.lab.table import cluster_table, verdict_table

    verdict = verify_sampler(seed=seed)
    console = terminal.console()
    console.print(cluster_table(verdict))
    console.print(verdict_table(verdict))
    raise typer.Exit(0 if verdict.passed else 1)


@verify_app.command("ddp", epilog=terminal.example("nearfar verify ddp --loss InfoNCELoss"))
def verify_ddp(
    processes: Annotated[int, typer.Option(help="Processes that train together.")] = 2,
    loss: Annotated[str, typer.Option(help="The name of one loss, such as InfoNCELoss, or all.")] = "all",
) -> None:
    """Do several processes give the loss and gradients of one? Measured under real DDP, for each loss and option."""
    from nearfar.lab.table import ddp_table
    from nearfar.training.verify_ddp import verify_ddp

    verdict = verify_ddp(processes, None if loss == "all" else [loss])
    terminal.console().print(ddp_table(verdict))
    raise typer.Exit(0 if verdict.passed else 1)


@app.callback(invoke_without_command=True)
def root(
    version: Annotated[bool, typer.Option("--version", help="Print the version.", is_eager=True)] = False,
) -> None:
    """Options of nearfar itself."""
    if version:
        from nearfar import __version__

        typer.echo(f"nearfar {__version__}")
        raise typer.Exit


def main() -> None:
    """Entry point: errors a user can mend are printed without a traceback."""
    try:
        app()
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        sys.exit(terminal.report_error(error))


if __name__ == "__main__":
    main()
