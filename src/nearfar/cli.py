"""The terminal: one thin command per verb. Heavy libraries are imported by the verb that needs them.

Here are the verbs that train, test statements and say what there is. Those that look at runs stand in `doctor_cli.py`,
those that judge them in `compare_cli.py`, those that use them in `use_cli.py`, beside `data_cli.py` and
`mine_cli.py`.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from nearfar import terminal
from nearfar.compare_cli import compare_app
from nearfar.data_cli import data_app, neighbors_app
from nearfar.doctor_cli import doctor_app
from nearfar.mine_cli import mine_app
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
app.add_typer(doctor_app)
app.add_typer(compare_app)
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
    from nearfar.lab.ensemble import cross_validate
    from nearfar.lab.table import differences_table, estimates_table
    from nearfar.launch import launch

    console = terminal.console()
    result = cross_validate(list(context.args), folds, launch)
    console.print(estimates_table(f"{result.folder} · {folds} folds, every pair once", result.estimates))
    console.print(differences_table("fused probe minus control, paired", result.differences))
    terminal.say(console, f"written: {result.folder / 'crossval.json'}")


@app.command(
    context_settings={"allow_extra_args": True},  # but no unknown --options, as nothing here goes to Hydra
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
