"""The commands that look at runs: doctor, report, board."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from nearfar import terminal
from nearfar.errors import NearfarError

doctor_app = typer.Typer()


@doctor_app.command(epilog=terminal.example("nearfar doctor path/to/your/run"))
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


@doctor_app.command(epilog=terminal.example("nearfar report runs/molecules_demo"))
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


@doctor_app.command(epilog=terminal.example("nearfar board runs/"))
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
