"""From the command line to runs: Hydra composes the configuration, this file names the run and starts it.

Every run of a sweep is composed and checked before the first one starts: a misspelt option is answered with the
nearest name, and a sweep of twenty runs does not fail at its nineteenth because of a typo. What fails later all
the same does not end the sweep; it is listed when the others are done.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import re
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_module
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException, OverrideParseException
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from nearfar.configs import experiments
from nearfar.errors import NearfarError, nearest_name
from nearfar.training.checkpoint import find_checkpoint
from nearfar.training.resume import Resume, changed_values, flatten
from nearfar.training.run_folder import RunFolder

__all__ = ["compose_config", "dry_run", "launch", "run_one", "single_config"]

CONFIGS = "nearfar.configs"
NOT_IN_NAME = ("experiment", "name", "runs_dir", "exists", "resume_from", "start_epoch", "logger")
#: options whose value is a path and may hold what Hydra's grammar would read as syntax
PATHS = ("resume_from", "init_from", "data.train", "data.val", "data.test", "data.dir", "text_encoder.model")
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
#: where runs of a sweep, perhaps in other processes, note that they failed
FAILURES = "NEARFAR_SWEEP_FAILURES"
SWEPT = "NEARFAR_SWEPT"


# -- overrides -----------------------------------------------------------------------------------------------
def _parse(overrides: Sequence[str]) -> list[Override]:
    try:
        return OverridesParser.create().parse_overrides(list(overrides))
    except OverrideParseException as error:
        raise NearfarError(
            f"'{error.override}' is not of the form key=value. Quote a value with spaces, commas or brackets: "
            "'key=\"a, b\"'."
        ) from None


def quote_paths(overrides: Sequence[str]) -> list[str]:
    """Quote values that are paths on this machine: ``resume_from=runs/a/seed=1,lr=2`` is neither a sweep nor a mistake.

    >>> quote_paths(["lr=0.1", "resume_from=no/such,path"])
    ['lr=0.1', 'resume_from=no/such,path']
    """
    quoted = []
    for text in overrides:
        key, _, value = text.partition("=")
        path = Path(value).expanduser() if value else None
        if key in PATHS and path is not None and value[0] not in "'\"" and path.exists():
            text = f"{key}='" + str(path).replace("\\", "\\\\").replace("'", "\\'") + "'"
        quoted.append(text)
    return quoted


def expand(overrides: Sequence[str]) -> Iterator[list[str]]:
    """The overrides of every run of a sweep.

    >>> list(expand(["lr=1", "seed=0,1"]))
    [['lr=1', 'seed=0'], ['lr=1', 'seed=1']]
    """
    choices = []
    for parsed in _parse(overrides):
        if parsed.is_sweep_override():
            try:
                values = list(parsed.sweep_string_iterator())
            except HydraException:
                raise NearfarError(
                    f"'{parsed.input_line}': list the values, such as {parsed.key_or_group}=a,b or range(1,4)."
                ) from None
            choices.append([f"{parsed.get_key_element()}={value}" for value in values])
        else:
            choices.append([str(parsed.input_line)])
    for combination in itertools.product(*choices):
        yield list(combination)


def merge_overrides(earlier: Sequence[str], later: Sequence[str]) -> list[str]:
    """Overrides of a saved run followed by new ones; the later wins.

    >>> merge_overrides(["experiment=molecules", "lr=0.1"], ["lr=0.2", "epochs=3"])
    ['experiment=molecules', 'lr=0.2', 'epochs=3']
    """
    return list({text.split("=")[0].lstrip("+~"): text for text in [*earlier, *later]}.values())


def compose_config(overrides: Sequence[str]) -> DictConfig:
    """The configuration that these overrides compose, with every mistake answered by the nearest name."""
    values = dict(text.split("=", 1) for text in overrides if "=" in text)
    known = experiments()
    if "experiment" not in values:
        raise NearfarError(
            "say which experiment to run: experiment=NAME, with NAME one of " + ", ".join(known)
        )
    if values["experiment"] not in known:
        name = values["experiment"]
        raise NearfarError(f"experiment={name}: there is no such experiment; {nearest_name(name, known)}")
    for text in overrides:
        if text[0] in "+~" and not text.lstrip("+~").startswith("hydra"):
            raise NearfarError(
                f"'{text}': options are fixed; write {text.lstrip('+~')} to set one that exists."
            )
    try:
        with initialize_config_module(CONFIGS, version_base="1.3"):
            return compose("train", overrides=list(overrides))
    except (HydraException, OmegaConfBaseException, ValueError) as error:  # ValueError: a group set to null
        raise NearfarError(_explain(error, overrides)) from None


def single_config(arguments: Sequence[str]) -> DictConfig:
    """Compose and check the one configuration of ``key=value`` arguments; flags and sweeps are refused."""
    from nearfar.systems import check_config

    for argument in arguments:
        if argument.startswith("-"):
            raise NearfarError(f"{argument} has no meaning here; give key=value options only.")
    runs = list(expand(with_saved_overrides(quote_paths(arguments))))
    if len(runs) > 1:
        raise NearfarError(f"these options are a sweep of {len(runs)} runs; give one value each.")
    config = compose_config(runs[0])
    check_config(config)
    return config


def _explain(error: Exception, overrides: Sequence[str]) -> str:
    text = str(error)
    misspelt = re.search(r"Could not override '([^']+)'", text)
    if misspelt:
        key = misspelt.group(1)
        groups = [
            f.name for f in resources.files(CONFIGS).iterdir() if f.is_dir() and not f.name.startswith("_")
        ]
        base = [o for o in overrides if o.split("=")[0].lstrip("+~") in groups]
        try:
            with initialize_config_module(CONFIGS, version_base="1.3"):
                keys = list(flatten(compose("train", overrides=base)))
        except (HydraException, OmegaConfBaseException):
            keys = []
        return f"there is no option '{key}': {nearest_name(key, [*keys, *groups])}"
    choice = re.search(r"Could not find '([^/']+)/([^']+)'", text)
    if choice:
        group, name = choice.groups()
        folder = resources.files(CONFIGS).joinpath(group)
        if folder.is_dir():
            names = [f.name[:-5] for f in folder.iterdir() if f.name.endswith(".yaml")]
            return f"{group}={name}: there is no such {group}; {nearest_name(name, names)}"
    return text.strip()


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
        if key in NOT_IN_NAME or (name and swept and key not in swept):
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


def _free(path: Path) -> Path:
    number = 2
    while path.with_name(f"{path.name}-{number}").exists():
        number += 1
    return path.with_name(f"{path.name}-{number}")


def choose_folder(
    config: DictConfig, overrides: Sequence[str], sweep: bool, swept: Sequence[str] = ()
) -> tuple[RunFolder, Resume | None]:
    """The folder of a run, and the run it continues, by ``exists`` and ``resume_from``."""
    resume = Resume.find(config.resume_from, config) if config.resume_from else None
    if resume is not None and resume.exact and config.name is None and not sweep:
        return resume.folder, resume
    path = Path(config.runs_dir) / run_name(overrides, config.name, sweep, swept)
    folder = RunFolder(path)
    if not folder.started:
        return folder, resume
    if config.exists == "number":
        return RunFolder(_free(path)), resume
    if config.exists == "replace":
        return folder, resume
    changed = changed_values(folder.config(), config)
    if changed:
        keys = ", ".join(changed)
        raise NearfarError(
            f"{path} is a run with another configuration ({keys}); use exists=number or a name=."
        )
    if not folder.finished and (folder.checkpoints / "last.ckpt").exists():
        return folder, Resume.find(str(path), config)
    return folder, resume


def absolute_paths(config: DictConfig, overrides: Sequence[str]) -> list[str]:
    """Make paths independent of the working directory, in ``config`` and in the overrides that are returned."""
    changed = {}
    for key in PATHS:
        value = OmegaConf.select(config, key)
        if value and Path(str(value)).expanduser().exists():
            changed[key] = str(Path(str(value)).expanduser().absolute())
            OmegaConf.update(config, key, changed[key])
    return [
        quote_paths([f"{key}={changed[key]}"])[0] if (key := text.split("=")[0]) in changed else text
        for text in overrides
    ]


# -- running -------------------------------------------------------------------------------------------------
def run_one(
    config: DictConfig,
    overrides: Sequence[str],
    sweep: bool,
    console: Any,
    swept: Sequence[str] = (),
    together: bool = False,
    first: bool = True,
) -> RunFolder:
    """Carry out one composed configuration.

    ``together`` with other processes on the same terminal, each line names its run, and only the ``first`` run says
    what its data are.
    """
    from nearfar.lab.report import write_report
    from nearfar.lab.table import metrics_table
    from nearfar.systems import build_system, check_config
    from nearfar.training.fit import fit

    check_config(config)
    overrides = absolute_paths(config, overrides)
    folder, resume = choose_folder(config, overrides, sweep, swept)
    prefix = f"{folder.name}: " if together else ""

    def say(text: str) -> None:
        for line in text.splitlines():
            console.print(prefix + line, markup=False, highlight=False, soft_wrap=True)

    if config.exists == "skip" and folder.finished and resume is None:
        say(f"{folder}: finished before, kept")
        if not (folder.path / "report.html").exists():
            write_report(folder)
        return folder
    say(f"run {folder}")
    with open_dict(config):
        if resume is not None and resume.exact and folder.path == resume.folder.path:
            saved = folder.config()  # it keeps its name and place
            config.name, config.runs_dir, config.overrides = (
                saved.name,
                saved.runs_dir,
                saved.get("overrides", []),
            )
        else:
            not_saved = ("resume_from=", "start_epoch=", "exists=")
            config.overrides = [o for o in overrides if not o.startswith(not_saved)]
    system = build_system(config)
    system.prepare(say if first or not together else lambda _: None)
    fit(system, config, folder, resume, say, None if together else console)
    report = write_report(folder)
    if not together:
        console.print(metrics_table(folder))
    say(f"report: {report}")
    return folder


def _job(config: DictConfig) -> str:
    """What Hydra calls for every run, in this process or in one of its launcher's workers."""
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode

    from nearfar.cli import _console, _report

    settings = HydraConfig.get()
    sweep = settings.mode == RunMode.MULTIRUN
    together = sweep and "joblib" in str(settings.launcher.get("_target_", ""))
    swept = json.loads(os.environ.get(SWEPT, "[]"))
    task = list(settings.overrides.task)
    try:
        first = OmegaConf.is_missing(settings.job, "num") or settings.job.num == 0
        return str(run_one(config, task, sweep, _console(), swept, together, first))
    except Exception as error:
        code = _report(error)
        if not sweep or code == 130:
            raise SystemExit(code) from None
        with open(os.environ[FAILURES], "a") as file:
            file.write(json.dumps({"run": " ".join(task), "why": str(error)}) + "\n")
        return "failed"


def launch(arguments: Sequence[str], console: Any) -> None:
    """``nearfar train …``: check every run, then let Hydra carry out the job or the sweep."""
    import hydra

    words = {arguments[i + 1] for i, a in enumerate(arguments[:-1]) if a in FLAGS_WITH_VALUE}
    flags = [a for a in arguments if a.startswith("-") or a in words]
    overrides = with_saved_overrides(quote_paths([a for a in arguments if a not in flags]))
    sweep = "-m" in flags or "--multirun" in flags
    own_configs = {"--config-dir", "-cd", "--config-name", "-cn", "--hydra-help", "--version"} & set(flags)
    if not own_configs:
        _check_runs([o for o in overrides if not o.startswith("hydra")], sweep)
    swept = [] if own_configs else [str(o.key_or_group) for o in _parse(overrides) if o.is_sweep_override()]
    handle, failures = tempfile.mkstemp(prefix="nearfar-", suffix=".jsonl")
    os.close(handle)
    os.environ |= {SWEPT: json.dumps(swept), FAILURES: failures}
    sys.argv = ["nearfar train", *flags, *overrides]
    try:
        hydra.main(version_base="1.3", config_path="pkg://" + CONFIGS, config_name="train")(_job)()
        failed = [json.loads(line) for line in Path(failures).read_text().splitlines()]
    finally:
        Path(failures).unlink(missing_ok=True)
    if failed:
        lines = [f"{len(failed)} run(s) of the sweep failed:", *(f"  {f['run']}: {f['why']}" for f in failed)]
        raise NearfarError("\n".join(lines))


def _check_runs(overrides: Sequence[str], sweep: bool) -> None:
    from nearfar.systems import check_config

    runs = list(expand(overrides))
    if len(runs) > 1 and not sweep:
        raise NearfarError(f"these options are a sweep of {len(runs)} runs: add -m to carry it out.")
    for run in runs:
        check_config(compose_config(run))


def dry_run(arguments: Sequence[str], console: Any) -> None:
    """``nearfar train --dry-run``."""
    from nearfar.training.estimate import describe

    describe(single_config(arguments), console)


def with_saved_overrides(overrides: Sequence[str]) -> list[str]:
    """Put the overrides of the run that ``resume_from`` names before the ones given now."""
    values = dict(text.split("=", 1) for text in overrides if "=" in text)
    source = values.get("resume_from", "")
    if not source or source == "null":
        return list(overrides)
    (parsed,) = _parse([f"resume_from={source}"])
    if parsed.is_sweep_override():
        raise NearfarError("resume_from takes one run; start a sweep for each of them.")
    folder = RunFolder.of(find_checkpoint(str(parsed.value())))
    saved = OmegaConf.to_container(folder.config())
    assert isinstance(saved, Mapping)
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
