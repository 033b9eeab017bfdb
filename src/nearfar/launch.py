"""From the command line to runs: this file names each run and starts it; a sweep is carried out by Hydra.

Every run of a sweep is composed and checked before the first one starts: a misspelt option is answered with the
nearest name, and a sweep of twenty runs does not fail at its nineteenth because of a typo. What fails later all
the same does not end the sweep; it is listed when the others are done.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import re
import sys
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from hydra.core.override_parser.types import IntervalSweep
from omegaconf import DictConfig, OmegaConf
from rich.console import Console

from nearfar import terminal
from nearfar.config.compose import (
    CONFIGS,
    changed_values,
    compose_config,
    expand,
    merge_overrides,
    parse,
    path_options,
    quote_paths,
    register_configs,
    saved_values,
    searchpath,
    with_open_keys,
)
from nearfar.config.options import set_option
from nearfar.config.registry import role_of, systems
from nearfar.config.training import RunOptions
from nearfar.data.files import make_folder
from nearfar.errors import NearfarError
from nearfar.training import ranks
from nearfar.training.checkpoint import Resume, find_checkpoint
from nearfar.training.fabric import processes_to_start
from nearfar.training.ranks import run_processes
from nearfar.training.run_folder import RunFolder, same_file

if TYPE_CHECKING:
    from nearfar.training.loop import Watch

__all__ = [
    "absolute_paths",
    "check_runs",
    "dry_run",
    "launch",
    "objective",
    "run_name",
    "run_on_ray",
    "run_one",
    "single_config",
    "with_saved_overrides",
]

#: bytes of a part of a name; a folder may have 255, of which temporary files need some
LONGEST_NAME = 200
SUFFIXES = (".tsv", ".txt", ".csv", ".parquet", ".ckpt")
#: Hydra's flags that take a word after them
FLAGS_WITH_VALUE = (
    "--cfg",
    "-c",
    "--package",
    "-p",
    "--info",
    "-i",
    "--config-dir",
    "-cd",
    "--config-name",
    "-cn",
)
#: Hydra's flags that show something and train nothing
SHOWING = {"--cfg", "-c", "--info", "-i", "--help", "-h", "--hydra-help"}
#: Hydra's sweepers and launchers that come as packages of their own: the module, and the extra that brings it
PLUGINS = {
    ("hydra/sweeper", "optuna"): ("hydra_plugins.hydra_optuna_sweeper", "search"),
    ("hydra/sweeper", "search"): ("hydra_plugins.hydra_optuna_sweeper", "search"),
    ("hydra/launcher", "joblib"): ("hydra_plugins.hydra_joblib_launcher", "train"),
    ("hydra/launcher", "submitit"): ("hydra_plugins.hydra_submitit_launcher", "slurm"),
    ("hydra/launcher", "ray"): ("hydra_plugins.hydra_ray_launcher", "ray"),
}


# -- naming --------------------------------------------------------------------------------------------------
def run_name(overrides: Sequence[str], name: str | None, sweep: bool, swept: Sequence[str] = ()) -> str:
    """What a run is called: its name or experiment, and in a sweep (or without a name) what was overridden.

    A named sweep names its runs after the ``swept`` keys alone: the others are the same for all of them.

    >>> run_name(["experiment=molecules", "seed=1", "data.train=/some/where/train.tsv"], None, False)
    'molecules/seed=1,data.train=train'
    >>> run_name(["experiment=molecules"], "first", False)
    'first'
    >>> run_name(["experiment=molecules", "lr=0.1", "epochs=3"], "grid", True, swept=["lr"])
    'grid/lr=0.1'
    """
    values = dict(text.lstrip("+").split("=", 1) for text in overrides if "=" in text)
    parts = []
    for key, value in values.items():
        if key == "experiment" or role_of(key) == "place" or (name and swept and key not in swept):
            continue
        if key.startswith(("trainer.", "hydra")) and key not in swept:
            continue
        value = value.strip("'\"")
        if "/" in value and key not in swept:
            path = Path(value)
            value = path.stem if path.suffix in SUFFIXES else path.name
        parts.append(f"{key}={value}")
    details = re.sub(r"[^\w=,.+-]+", "_", ",".join(parts))
    if len(details) > 120:
        details = f"{details[:110]}-{hashlib.sha256(details.encode()).hexdigest()[:8]}"
    if name and not sweep:
        return name
    return f"{name or values['experiment']}/{details or 'default'}"


def check_name(name: str) -> None:
    """``NearfarError`` for the name of a run that could not be a folder below ``runs_dir``.

    >>> check_name("samplers/sampler=hard,seed=0")
    """
    parts = name.split("/")
    problem = None
    if Path(name).is_absolute() or ".." in parts:
        problem = "leads out of runs_dir; a run lies below it. Choose a different place with runs_dir="
    elif not all(part.strip() and part != "." for part in parts):
        problem = "has an empty part; use letters and digits"
    elif not name.isprintable():
        problem = "holds control characters; use letters and digits"
    elif "\\" in name:
        problem = "holds a backslash; divide parts by /"
    elif max(len(part.encode()) for part in parts) > LONGEST_NAME:
        problem = f"has a part of more than {LONGEST_NAME} bytes, which a file system may refuse; give a shorter name"
    if problem:
        shown = name if len(name) <= 60 else f"{name[:57]}…"
        raise NearfarError(f"name={shown!r} {problem}.")


def _free(path: Path) -> Path:
    number = 2
    while path.with_name(f"{path.name}-{number}").exists():
        number += 1
    return path.with_name(f"{path.name}-{number}")


def choose_folder(
    config: RunOptions, overrides: Sequence[str], sweep: bool, swept: Sequence[str] = ()
) -> tuple[RunFolder, Resume | None]:
    """The folder of a run, and the run it continues, by ``exists`` and ``resume_from``."""
    resume = Resume.find(config.resume_from, config) if config.resume_from else None
    if resume is not None and resume.exact and config.name is None and not sweep:
        return resume.folder, resume
    name = run_name(overrides, config.name, sweep, swept)
    check_name(name)
    path = Path(config.runs_dir) / name
    folder = RunFolder(path)
    folder.check_own()
    if not folder.started:
        return folder, resume
    if config.exists == "number":
        return RunFolder(_free(path)), resume
    if config.exists == "replace":
        return folder, resume
    changed = changed_values(saved_values(folder.config()), config)
    if changed:
        keys = ", ".join(changed)
        raise NearfarError(
            f"{path} is a run with a different configuration ({keys}); use exists=number or a name=."
        )
    if not folder.finished and (folder.checkpoints / "last.ckpt").exists():
        return folder, Resume.find(str(path), config)
    return folder, resume


def absolute_paths(config: RunOptions, overrides: Sequence[str]) -> list[str]:
    """Make paths independent of the working directory, in ``config`` and in the overrides that are returned."""
    changed = {key: str(path.absolute()) for key, path in path_options(config).items()}
    for key, path in changed.items():
        set_option(config, key, path)
    return [
        quote_paths([f"{key}={changed[key]}"])[0] if (key := text.split("=")[0]) in changed else text
        for text in overrides
    ]


# -- running -------------------------------------------------------------------------------------------------
def run_one(
    config: DictConfig | RunOptions,
    overrides: Sequence[str],
    sweep: bool,
    console: Console,
    swept: Sequence[str] = (),
    together: bool = False,
    first: bool = True,
    place: tuple[RunFolder, Resume | None] | None = None,
    watch: Watch | None = None,
) -> RunFolder:
    """Carry out one composed configuration, whose options are checked here.

    ``together`` with other processes on the same terminal, each line names its run, and only the ``first`` run says
    what its data are. ``place``: its folder and the run it continues, where a caller has chosen them, who then shows
    the results. ``watch`` is told the monitored metric on validation after every epoch.
    """
    from nearfar.lab.report import write_report
    from nearfar.systems import build_system, check_config
    from nearfar.training.fit import fit

    options = check_config(config)
    if ranks.count() > 1:
        by_ray = options.trainer.engine == "ray"
        options.trainer.devices = ranks.count() if by_ray else ranks.on_this_machine()
    overrides = absolute_paths(options, overrides)
    folder, resume = place or ranks.from_first(lambda: choose_folder(options, overrides, sweep, swept))
    prefix = f"{folder.name}: " if together else ""
    first_process = ranks.is_first()

    def say(text: str) -> None:
        if not first_process:
            return
        for line in text.splitlines():
            terminal.say(console, prefix + line)

    if options.exists == "skip" and folder.finished and resume is None:
        say(f"{folder}: finished before, kept")
        if first_process and options.report and not (folder.path / "report.html").exists():
            write_report(folder)
        return folder
    say(f"run {folder}")
    if resume is not None and resume.exact and folder.path == resume.folder.path:
        saved = folder.config()  # it keeps its name and place
        options.name, options.runs_dir = saved.name, saved.runs_dir
        options.overrides = list(saved.get("overrides", []))
    else:
        not_saved = ("resume_from=", "start_epoch=", "exists=")
        options.overrides = [o for o in overrides if not o.startswith(not_saved)]
    system = build_system(options)
    ranks.one_after_the_other(lambda: system.prepare(say if first or not together else lambda _: None))
    fit(system, options, folder, resume, say, None if together else console, watch)
    if not first_process:
        return folder
    if options.report:
        write_report(folder)
    if place is None:  # else `run_on_ray` shows them: the last lines of a process on Ray may be lost with it
        _show_results(folder, options, console, prefix, tables=not together)
    return folder


def _show_results(
    folder: RunFolder, options: RunOptions, console: Console, prefix: str = "", tables: bool = True
) -> None:
    from nearfar.lab.table import metrics_tables

    for table in metrics_tables(folder) if tables else ():
        console.print(table)
    if options.report:
        terminal.say(console, f"{prefix}report: {folder.path / 'report.html'}")


def run_on_ray(
    config: DictConfig | RunOptions,
    overrides: Sequence[str],
    sweep: bool,
    console: Console,
    swept: Sequence[str] = (),
) -> RunFolder:
    """As `run_one`, in processes on the nodes of a Ray cluster (``trainer.engine=ray``).

    The folder is chosen here. Processes that start again, because one was lost, go on from the checkpoint in it.
    """
    from nearfar.systems import check_config
    from nearfar.training.ray_workers import run_on_cluster

    options = check_config(config)
    overrides = absolute_paths(options, overrides)
    folder, resume = choose_folder(options, overrides, sweep, swept)
    if options.exists == "skip" and folder.finished and resume is None:
        return run_one(options, overrides, sweep, console, swept, place=(folder, resume))
    folder = RunFolder(folder.path.absolute())
    if resume is None and folder.started:
        folder.clear()
    elif resume is not None and resume.exact and resume.path != folder.checkpoints / "last.ckpt":
        same_file(resume.path, folder.checkpoints / "last.ckpt")
    # Processes on other nodes have other working folders.
    options.runs_dir = str(Path(options.runs_dir).absolute())

    def work() -> None:
        run_one(
            options, overrides, sweep, terminal.console(), swept, place=_going_on(options, folder, resume)
        )

    run_on_cluster(work, options.trainer, lambda text: terminal.say(console, text))
    _show_results(folder, options, console)
    return folder


def _going_on(
    options: RunOptions, folder: RunFolder, resume: Resume | None
) -> tuple[RunFolder, Resume | None]:
    """Where a run starts, or starts again: at the checkpoint in its folder, once there is one. Collective."""
    if ranks.from_first((folder.checkpoints / "last.ckpt").exists):
        options.start_epoch = None  # it was counted from when the run began
        return folder, ranks.from_first(lambda: Resume.find(str(folder.path), options))
    return folder, resume


def _job(config: DictConfig, swept: Sequence[str], failures: str) -> str | float:
    """One run of a job or sweep, in this process or in one of a launcher's workers.

    ``swept``: the options that the sweep changes. ``failures``: the file in which a run notes that it failed.
    """
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode

    settings = HydraConfig.get()
    sweep = settings.mode == RunMode.MULTIRUN
    together = sweep and "joblib" in str(settings.launcher.get("_target_", ""))
    task = [text.lstrip("+") for text in settings.overrides.task]
    try:
        first = OmegaConf.is_missing(settings.job, "num") or settings.job.num == 0
        if OmegaConf.select(config, "trainer.engine") == "ray" and ranks.count() == 1:
            folder = run_on_ray(config, task, sweep, terminal.console(), swept)
        else:
            folder = run_one(config, task, sweep, terminal.console(), swept, together, first)
        return objective(folder) if "optuna" in str(settings.sweeper.get("_target_", "")) else str(folder)
    except Exception as error:
        code = terminal.report_error(error, shown=_shown_here(error))
        if not sweep or code == 130:
            raise SystemExit(code) from None
        with open(failures, "a") as file:
            file.write(json.dumps({"run": " ".join(task), "why": str(error)}) + "\n")
        return "failed"


def _shown_here(error: Exception) -> bool:
    """Whether this process, of those that train together, is to show its error."""
    if type(error).__name__ == "Interrupted":  # of all at once
        return ranks.is_first()
    return ranks.is_first_error()


def objective(folder: RunFolder) -> float:
    """What a search climbs: the monitored metric on validation. Test is for the comparison afterwards."""
    metrics = folder.read_json("metrics.json")
    estimate = metrics["splits"].get("val", {}).get(metrics["monitor"])
    if estimate is None:
        raise NearfarError(
            f"{folder}: a search needs {metrics['monitor']} on a validation split, and there is none."
        )
    return float(estimate["value"])


def launch(arguments: Sequence[str]) -> None:
    """``nearfar train …``: check every run, then let Hydra carry out the job or the sweep.

    A run of several processes is started anew as so many (``training/ranks.py``), unless this is one of them.
    """
    try:
        ranks.start()
        _launch(arguments)
    except Exception as error:
        if ranks.count() == 1:
            raise
        raise SystemExit(terminal.report_error(error, shown=_shown_here(error))) from None


def _launch(arguments: Sequence[str]) -> None:
    import hydra

    words = {arguments[i + 1] for i, a in enumerate(arguments[:-1]) if a in FLAGS_WITH_VALUE}
    flags = [a for a in arguments if a.startswith("-") or a in words]
    overrides = with_saved_overrides(quote_paths([a for a in arguments if a not in flags]))
    sweep = "-m" in flags or "--multirun" in flags
    runs: list[RunOptions] = []
    own_configs = {"--config-dir", "-cd", "--config-name", "-cn", "--hydra-help", "--version"} & {
        flag.split("=")[0] for flag in flags
    }
    if not own_configs:
        search = _check_plugins(overrides)
        runs = check_runs([o for o in overrides if not o.startswith("hydra")], sweep, search)
        _check_processes(runs, sweep)
        processes = processes_to_start(runs[0].trainer)
        if processes > 1 and ranks.count() == 1 and not {*flags} & SHOWING:
            code, why = run_processes(processes, "nearfar.cli", ["train", *arguments])
            if why:
                raise NearfarError(why)
            raise SystemExit(code)
        if not flags and not any(text.startswith("hydra") for text in overrides):
            by_ray = runs[0].trainer.engine == "ray" and ranks.count() == 1
            (run_on_ray if by_ray else run_one)(runs[0], overrides, False, terminal.console())
            return
    swept = [] if own_configs else [str(o.key_or_group) for o in parse(overrides) if o.is_sweep_override()]
    handle, failures = tempfile.mkstemp(
        prefix="nearfar-",
        suffix=".jsonl",
        dir=_shared(runs[0].runs_dir if runs else "runs") if sweep else None,
    )
    os.close(handle)
    sys.argv = ["nearfar train", *flags, *with_open_keys(overrides), *searchpath()]

    # Hydra's launchers send this function to their workers with what it closes over.
    def job(config: DictConfig) -> str | float:
        return _job(config, swept, failures)

    # joblib replaces a worker whose memory has grown by a third of a gigabyte, as a run's data do; no run is lost.
    warnings.filterwarnings("ignore", "A worker stopped while some jobs were given", UserWarning)
    try:
        register_configs(*dict.fromkeys(run.system for run in runs), *(systems() if own_configs else ()))
        hydra.main(version_base="1.3", config_path="pkg://" + CONFIGS, config_name="train")(job)()
        failed = [json.loads(line) for line in Path(failures).read_text().splitlines()]
    finally:
        Path(failures).unlink(missing_ok=True)
    if failed:
        lines = [f"{len(failed)} run(s) of the sweep failed:", *(f"  {f['run']}: {f['why']}" for f in failed)]
        raise NearfarError("\n".join(lines))


def _shared(runs_dir: str) -> Path:
    """A folder that the workers of a launcher see too, on whatever node they run."""
    folder = (Path(runs_dir) / ".sweeps").absolute()
    make_folder(folder)
    return folder


def _check_plugins(overrides: Sequence[str]) -> bool:
    """Whether a search draws the values; a launcher or sweeper that is not installed is an error."""
    for text in overrides:
        key, _, value = text.partition("=")
        module, extra = PLUGINS.get((key, value.split("_")[0]), ("", ""))
        if module and importlib.util.find_spec(module) is None:
            raise NearfarError(f"{text} needs a plugin that is not installed: pip install 'nearfar[{extra}]'")
    return any(text in ("hydra/sweeper=optuna", "hydra/sweeper=search") for text in overrides)


def _check_processes(runs: Sequence[RunOptions], sweep: bool) -> None:
    """A sweep starts its runs in processes of its own choosing, which cannot be several at a time for each."""
    if sweep and (ranks.count() > 1 or any(processes_to_start(run.trainer) > 1 for run in runs)):
        raise NearfarError(
            "a sweep (-m) trains each run in one process: set trainer.devices=1, or trainer.engine=ray, which starts "
            "the processes of each run anew; or start the runs one by one, as in a shell's loop over seed=."
        )


def check_runs(overrides: Sequence[str], sweep: bool, search: bool = False) -> list[RunOptions]:
    """The options of every run of a sweep, or of the ends of what a search draws, checked before one starts."""
    from nearfar.systems import check_config

    runs = list(expand(_ends(overrides) if search else overrides))
    if len(runs) > 1 and not sweep:
        raise NearfarError(f"these options are a sweep of {len(runs)} runs: add -m to carry it out.")
    return [check_config(compose_config(run)) for run in runs]


def _ends(overrides: Sequence[str]) -> list[str]:
    """Both ends in place of an interval that a search draws from: they are checked, and with them what lies between.

    >>> _ends(["lr=tag(log,interval(1e-4,1e-2))", "epochs=3"])
    ['lr=0.0001,0.01', 'epochs=3']
    """
    checked = []
    for text, parsed in zip(overrides, parse(overrides), strict=True):
        interval = parsed.value()
        if isinstance(interval, IntervalSweep):
            ends = (interval.start, interval.end)
            if not all(isinstance(end, int) for end in ends):
                ends = (float(ends[0] or 0), float(ends[1] or 0))
            text = f"{parsed.get_key_element()}={ends[0]},{ends[1]}"
        checked.append(text)
    return checked


def dry_run(arguments: Sequence[str], console: Console) -> None:
    """``nearfar train --dry-run``."""
    from nearfar.systems import build_system
    from nearfar.training.estimate import describe

    config = single_config(arguments)
    describe(build_system(config), config, console)


def single_config(arguments: Sequence[str]) -> RunOptions:
    """The one run that ``key=value`` arguments describe, checked; flags and sweeps are refused."""
    from nearfar.systems import check_config

    for argument in arguments:
        if argument.startswith("-"):
            raise NearfarError(f"{argument} has no meaning here; give key=value options only.")
    runs = list(expand(with_saved_overrides(quote_paths(arguments))))
    if len(runs) > 1:
        raise NearfarError(f"these options are a sweep of {len(runs)} runs; give one value each.")
    return check_config(compose_config(runs[0]))


def with_saved_overrides(overrides: Sequence[str]) -> list[str]:
    """Put the overrides of the run that ``resume_from`` names before the ones given now."""
    values = dict(text.split("=", 1) for text in overrides if "=" in text)
    source = values.get("resume_from", "")
    if not source or source == "null":
        return list(overrides)
    (parsed,) = parse([f"resume_from={source}"])
    if parsed.is_sweep_override():
        raise NearfarError("resume_from takes one run; start a sweep for each of them.")
    saved = RunFolder.of(find_checkpoint(str(parsed.value()))).config()
    earlier = [str(o) for o in saved.get("overrides", [])]
    experiment = next((o for o in earlier if o.startswith("experiment=")), None)
    if experiment and values.get("experiment") not in (None, experiment.split("=", 1)[1]):
        system_now = compose_config([f"experiment={values['experiment']}"]).system
        if saved.get("system") != system_now:
            raise NearfarError(
                f"resume_from={source}: that run belongs to system '{saved.get('system')}', "
                f"experiment={values['experiment']} is of system '{system_now}'. Take weights alone with init_from=."
            )
    # Names and places of the earlier run are its own.
    earlier = [o for o in earlier if o.split("=")[0] not in ("name", "runs_dir")]
    return merge_overrides(earlier, overrides)
