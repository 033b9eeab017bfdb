"""A search for options on a Ray cluster: Optuna draws, weak trials end early, the best is judged on new seeds."""

from __future__ import annotations

import importlib.metadata
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from hydra.core.override_parser.types import IntervalSweep, Override
from hydra.errors import HydraException
from rich.console import Console

from nearfar import terminal
from nearfar.cluster import connect, total
from nearfar.config.compose import changed_values, compose_config, merge_overrides, parse, quote_paths
from nearfar.config.training import RunOptions
from nearfar.directions import lower_is_better
from nearfar.errors import NearfarError
from nearfar.lab.compare import compare_runs
from nearfar.lab.groups import group_runs
from nearfar.launch import absolute_paths, check_runs, objective, run_name, run_one, with_saved_overrides
from nearfar.systems import build_system, check_config
from nearfar.training.run_folder import RunFolder

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution
    from ray.tune import Callback, Result
    from ray.tune.experiment import Trial
    from ray.tune.search.optuna import OptunaSearch

    from nearfar.data.files import Json
    from nearfar.lab.compare import Comparison

__all__ = ["Candidate", "search_space", "tune"]

#: of the trials that reach a rung, one in so many goes on (Li et al. 2020, ASHA)
REDUCTION = 3
#: epochs that every trial has, as a share of all: earlier values are of a model that has hardly begun
GRACE = 0.1
#: with fewer epochs there is next to nothing to save
LEAST_EPOCHS = 4


@dataclass(frozen=True)
class Candidate:
    """One trial: its ``values``, the monitored metric on validation, and after how many epochs it ended."""

    run: str
    values: dict[str, str]
    objective: float | None
    epochs: int
    pruned: bool
    error: str | None = None

    @property
    def cut_off(self) -> bool:
        """Whether the trial neither ended, nor was ended, nor failed: it goes on from its checkpoint."""
        return self.objective is None and not self.pruned and self.error is None


def search_space(overrides: Sequence[str]) -> tuple[list[str], dict[str, Override]]:
    """The overrides that have one value, and by their keys those that a search draws.

    >>> fixed, drawn = search_space(["experiment=molecules", "lr=tag(log,interval(1e-4,1e-2))", "sampler=hard,random"])
    >>> fixed, sorted(drawn)
    (['experiment=molecules'], ['lr', 'sampler'])
    """
    fixed, drawn = [], {}
    for text, parsed in zip(overrides, parse(overrides), strict=True):
        if parsed.is_sweep_override():
            drawn[str(parsed.get_key_element())] = parsed
        else:
            fixed.append(text)
    if not drawn:
        raise NearfarError(
            "there is nothing to search: give an option several values, such as sampler=hard,random or "
            "'lr=tag(log,interval(1e-4,1e-2))'."
        )
    for key in ("seed", "name", "experiment", "exists", "resume_from"):
        if key in drawn:
            raise NearfarError(
                f"{key} has one value in a search; the best candidate is judged on new seeds (--judge N)."
            )
    return fixed, drawn


def _distribution(drawn: Override) -> BaseDistribution:
    """Optuna's distribution of an option: of an interval between its ends, or of the values that are listed."""
    from optuna import distributions

    value = drawn.value()
    try:
        if not isinstance(value, IntervalSweep):
            return distributions.CategoricalDistribution(list(drawn.sweep_string_iterator()))
        low, high, log = value.start, value.end, "log" in value.tags
        if isinstance(low, int) and isinstance(high, int):
            return distributions.IntDistribution(low, high, log=log)
        return distributions.FloatDistribution(float(low or 0), float(high or 0), log=log)
    except (ValueError, HydraException) as error:
        why = " ".join(str(error).split()).rstrip(".")
        raise NearfarError(
            f"'{drawn.input_line}' is nothing to draw from ({why}). Give a list of values (lr=0.1,0.2), or "
            "an interval from the smaller end to the larger, above 0 with log ('lr=tag(log,interval(1e-4,1e-2))')."
        ) from None


def _bare(value: str) -> str:
    """A value of the command line without its quotes, as a run's record has it."""
    return value[1:-1] if len(value) > 1 and value[0] == value[-1] and value[0] in "'\"" else value


def tune(
    overrides: Sequence[str],
    *,
    trials: int = 20,
    prune: bool = False,
    at_once: int | None = None,
    judge: int = 3,
    console: Console | None = None,
) -> Comparison | None:
    """Search the options that have several values, and judge the best candidate beside the defaults on new seeds.

    Every trial is a run in ``runs_dir/NAME/search``, and climbs the monitored metric on validation. The same call again
    goes on: finished trials are known to the search, those that were cut off go on from their checkpoints.

    Args:
        overrides: as of ``nearfar train``; ``key=a,b`` and ``key=interval(low,high)`` are drawn.
        trials: how many, with those that are there.
        prune: end trials early whose validation is weaker than others' after as many epochs (ASHA).
        at_once: trials at a time; None: as many as the cluster has room for.
        judge: new seeds on which the best and the options' own defaults are trained and compared; 0: none.

    Returns the comparison, and None without one.
    """
    if trials < 1 or judge < 0:
        raise NearfarError(f"--trials {trials}, --judge {judge}: at least one trial, and no negative number.")
    _check_optuna()
    out = console or terminal.console()
    fixed, drawn = search_space(with_saved_overrides(quote_paths(list(overrides))))
    first = check_runs([*fixed, *(str(each.input_line) for each in drawn.values())], sweep=True, search=True)[
        0
    ]
    if prune:
        _check_pruning(first, drawn)
    name = first.name or f"tune-{dict(text.split('=', 1) for text in fixed)['experiment']}"
    fixed = merge_overrides(absolute_paths(first, fixed), [f"runs_dir={Path(first.runs_dir).absolute()}"])
    home = RunFolder(Path(first.runs_dir).absolute() / name)
    cpus, falls = (first.trainer.threads or 1) + first.trainer.workers, _falls(first)

    def say(text: str) -> None:
        terminal.say(out, text)

    with connect("nearfar tune", cpus=cpus):
        wants_gpu = first.trainer.accelerator in ("gpu", "cuda")
        gpus = int(wants_gpu or (first.trainer.accelerator == "auto" and total("GPU") > 0))
        ended = _search(
            fixed, drawn, first, falls, name, home, trials, prune, at_once, {"CPU": cpus, "GPU": gpus}, say
        )
        finished = [each for each in ended if each.objective is not None and not each.pruned]
        best = (min if falls else max)(finished, key=lambda each: each.objective or 0.0, default=None)
        # also of a search that was stopped: the next call knows by it which trials were ended early
        record = {"best": best and best.run, "trials": [asdict(each) for each in ended]}
        home.write_json("search.json", record)
        if cut_off := [each for each in ended if each.cut_off]:
            raise NearfarError(
                f"{home.path}: the search was stopped, {len(cut_off)} of its trials before their end. The same command "
                "goes on with them."
            )
        if best is None:
            raise NearfarError(
                f"{home.path}: no trial has finished ({ended[0].error if ended else 'none began'})."
            )
        chosen = [f"{key}={value}" for key, value in best.values.items()]
        pruned = sum(each.pruned for each in ended)
        score = f"{best.objective:.4f} on validation"
        say(f"best of {len(ended)} trials ({pruned} ended early): {' '.join(chosen)}, {score}")
        for each in ended:
            if each.error is not None:
                say(f"failed: {each.run}: {each.error}")
        if not judge:
            return None
        default = check_config(compose_config(fixed))
        if not changed_values(default, check_config(compose_config(merge_overrides(fixed, chosen)))):
            say("these are the options' own defaults: there is nothing to judge")
            return None
        seeds = [first.seed + number for number in range(1, judge + 1)]
        say(f"it was chosen by that number: both it and the defaults are trained on new seeds {seeds}")
        # the best under its values: going on with a search may find a better one
        arms = {f"best,{Path(best.run).name}": chosen, "default": []}
        judged = _judge(fixed, arms, seeds, f"{name}/judged", cpus, gpus)
    runs = [Path(first.runs_dir).absolute() / each for each in judged]
    groups = group_runs([RunFolder(run) for run in runs])
    baseline = next(
        arm for arm in groups if any(run.path.name.startswith("default,") for run in arm.runs.values())
    )
    return compare_runs(runs, baseline=baseline.label)


def _falls(config: RunOptions) -> bool:
    """Whether the monitored metric is better when lower; the views of a table name it once the table is read."""
    system = build_system(config)
    if not hasattr(system, "monitor"):
        system.prepare(lambda _: None)
    return lower_is_better(system.monitor)


def _check_optuna() -> None:
    """Before anything is started: an Optuna that Ray Tune can use. The extra ``search`` brings an older one."""
    try:
        version = importlib.metadata.version("optuna")
    except importlib.metadata.PackageNotFoundError:
        raise NearfarError(
            "nearfar tune draws by Optuna, which is not installed: pip install 'nearfar[tune]'"
        ) from None
    if int(version.split(".")[0]) < 3:
        raise NearfarError(
            f"nearfar tune needs Optuna 3 or newer, and {version} is here, as the extra search needs it: install "
            "'nearfar[tune]' in an environment without that, or search with hydra/sweeper=search (docs/sweeps.md)."
        )


def _check_pruning(config: RunOptions, drawn: dict[str, Override]) -> None:
    for key in ("epochs", "batch_size"):
        if key in drawn:
            raise NearfarError(
                f"--prune compares trials after as many epochs, and {key} changes what an epoch is: leave one out."
            )
    if config.epochs < LEAST_EPOCHS:
        raise NearfarError(
            f"--prune with epochs={config.epochs}: there is nothing to save in runs of fewer than {LEAST_EPOCHS}."
        )


def _search(
    fixed: list[str],
    drawn: dict[str, Override],
    config: RunOptions,
    falls: bool,
    name: str,
    home: RunFolder,
    trials: int,
    prune: bool,
    at_once: int | None,
    resources: dict[str, float],
    say: Callable[[str], None],
) -> list[Candidate]:
    os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")  # runs have their own logs
    os.environ.setdefault("RAY_CHDIR_TO_TRIAL_DIR", "0")
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")  # its tables; a line for each trial is said here
    import optuna
    from ray import tune as ray_tune
    from ray.tune.schedulers import ASHAScheduler

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    mode: Literal["min", "max"] = "min" if falls else "max"
    known, cut_off = _earlier(home, fixed, drawn, name)
    if known or cut_off:
        say(f"{home.path}: {len(known)} trials are finished, {len(cut_off)} go on")
    searcher = _searcher(drawn, mode, config.seed, known, cut_off)
    left = trials - len(known)
    if left <= 0:
        return known
    scheduler = None
    if prune:
        scheduler = ASHAScheduler(
            time_attr="epoch",
            metric="objective",
            mode=mode,
            max_t=config.epochs,
            grace_period=max(1, math.ceil(GRACE * config.epochs)),
            reduction_factor=REDUCTION,
        )

    def trial(values: dict[str, object]) -> None:
        given, run = _trial_of(fixed, {key: str(value) for key, value in values.items()}, name)
        place = {"run": str(home.path.parent / run)}

        def watch(epoch: int, value: float) -> None:
            if epoch < config.epochs:  # after the last, the evaluation of the best follows
                ray_tune.report({"objective": value, "epoch": epoch} | place)

        try:
            value = objective(_carry_out(given, watch))
        except NearfarError as error:  # which no new start mends
            ray_tune.report({"objective": math.nan, "epoch": config.epochs, "why": str(error)} | place)
            return
        ray_tune.report({"objective": value, "epoch": config.epochs, "whole": True} | place)

    tuner = ray_tune.Tuner(
        ray_tune.with_resources(trial, resources),
        tune_config=ray_tune.TuneConfig(
            search_alg=searcher,
            scheduler=scheduler,
            num_samples=left,
            max_concurrent_trials=at_once,
            reuse_actors=True,
        ),
        run_config=ray_tune.RunConfig(
            name=name.replace("/", "-"),
            storage_path=str(home.path.parent / ".sweeps"),
            callbacks=[_reporter(config.epochs, trials - left, trials)],
            failure_config=ray_tune.FailureConfig(max_failures=config.trainer.restarts),
            verbose=0,
        ),
    )
    results = tuner.fit()
    return [*known, *(_candidate(results[at], prune) for at in range(len(results)))]


def _searcher(
    drawn: Mapping[str, Override],
    mode: Literal["min", "max"],
    seed: int,
    known: Sequence[Candidate],
    cut_off: Sequence[Candidate],
) -> OptunaSearch:
    """Optuna's draws: first the trials that were cut off, then new ones, by what the known trials have reached."""
    from ray.tune.search.optuna import OptunaSearch

    searcher = OptunaSearch(
        space={key: _distribution(each) for key, each in drawn.items()},
        metric="objective",
        mode=mode,
        seed=seed + len(known) + len(cut_off),  # the seed of an earlier call would draw its trials again
        points_to_evaluate=[_typed(each.values, drawn) for each in cut_off],
    )
    for each in known:
        if each.objective is not None:
            searcher.add_evaluated_point(_typed(each.values, drawn), each.objective)
    return searcher


def _reporter(epochs: int, ended: int, all_trials: int) -> Callback:
    """Says a line about every trial that ends. Ray Tune copies it, so that it holds no console."""
    from ray.tune import Callback

    class Reporter(Callback):
        ended = 0

        def on_trial_complete(
            self, iteration: int, trials: list[Trial], trial: Trial, **info: object
        ) -> None:
            self._say(trial, trial.last_result or {})

        def on_trial_recover(self, iteration: int, trials: list[Trial], trial: Trial, **info: object) -> None:
            terminal.say(
                terminal.console(),
                f"{_words(trial.config)}: its process was lost; it goes on from its checkpoint",
            )

        def _say(self, trial: Trial, last: Json) -> None:
            Reporter.ended += 1
            value, epoch = last.get("objective", math.nan), last.get("epoch", 0)
            number = f"trial {ended + Reporter.ended} of {all_trials}"
            line = f"{number}: {_words(trial.config)}: {value:.4f} after {epoch} of {epochs} epochs"
            terminal.say(terminal.console(), line)

    return Reporter()


def _words(values: dict[str, object]) -> str:
    return " ".join(f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}" for k, v in values.items())


def _trial_of(fixed: Sequence[str], values: dict[str, str], name: str) -> tuple[list[str], str]:
    """The overrides of a trial, and the name of its run."""
    texts = [f"{key}={value}" for key, value in values.items()]
    run = run_name(texts, f"{name}/search", True, swept=list(values))
    return merge_overrides(fixed, [*texts, f"name='{run}'", "exists=skip"]), run


def _carry_out(overrides: list[str], watch: Callable[[int, float], None] | None = None) -> RunFolder:
    """A run in this process, which goes on where one of that name was cut off; it says nothing."""
    options = check_config(compose_config(overrides))
    with open(os.devnull, "w") as nowhere:
        return run_one(
            options, overrides, False, Console(file=nowhere), together=True, first=False, watch=watch
        )


def _candidate(result: Result, prune: bool) -> Candidate:
    """What Ray Tune says of a trial; one that was lost, failed or cut off has no value, whatever it had reached."""
    last = result.metrics or {}
    value, epoch = last.get("objective"), int(last.get("epoch", 0))
    error = last.get("why")
    if error is None and result.error is not None:
        error = (str(result.error).strip().splitlines() or [type(result.error).__name__])[-1]
    pruned = prune and not last.get("whole") and error is None
    known = value is not None and not math.isnan(value) and (pruned or last.get("whole"))
    return Candidate(
        str(last.get("run", "")),
        {key: str(each) for key, each in (result.config or {}).items()},
        float(value) if known and value is not None and error is None else None,
        epoch,
        pruned=pruned,
        error=error,
    )


def _earlier(
    home: RunFolder, fixed: Sequence[str], drawn: Mapping[str, Override], name: str
) -> tuple[list[Candidate], list[Candidate]]:
    """The trials of an earlier call that were finished or ended early, and those that were cut off.

    Trials outside of what is drawn now are left out. Raises ``NearfarError`` for one that was trained with other fixed
    options: what it reached says nothing about these.
    """
    ended: dict[str, Candidate] = {}
    if home.has("search.json"):
        for each in home.read_json("search.json")["trials"]:
            ended[each["run"]] = Candidate(**each)
    known, cut_off = [], []
    for path in sorted((home.path / "search").glob("*/config.yaml")):
        run = RunFolder(path.parent)
        given = dict(str(text).split("=", 1) for text in run.config().get("overrides", []))
        if not set(drawn) <= given.keys():
            continue
        values = {key: given[key] for key in drawn}
        now = check_config(compose_config(_trial_of(fixed, values, name)[0]))
        if changed := changed_values(run.config(), now):
            raise NearfarError(
                f"{home.path}: trials of an earlier search differ in {', '.join(changed)}, so that they say nothing "
                "about this one. Give it a name of its own (name=…), or remove that folder."
            )
        if not _is_drawn(values, drawn):
            continue
        if run.finished:
            epochs = int(run.read_json("metrics.json").get("epochs") or 0)
            known.append(Candidate(str(run.path), values, objective(run), epochs, pruned=False))
        elif str(run.path) in ended and ended[str(run.path)].pruned:
            known.append(ended[str(run.path)])
        else:
            cut_off.append(Candidate(str(run.path), values, None, 0, pruned=False))
    return known, cut_off


def _is_drawn(values: dict[str, str], drawn: Mapping[str, Override]) -> bool:
    """Whether the search may draw these values."""
    from optuna.distributions import CategoricalDistribution

    try:
        typed = _typed(values, drawn)
    except ValueError:
        return False
    for key, each in drawn.items():
        kind, value = _distribution(each), typed[key]
        if isinstance(kind, CategoricalDistribution):
            if value not in kind.choices:
                return False
        elif not kind.low <= float(value) <= kind.high:
            return False
    return True


def _typed(values: dict[str, str], drawn: Mapping[str, Override]) -> dict[str, str | int | float]:
    """Values of the command line as Optuna has drawn them."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution

    typed: dict[str, str | int | float] = {}
    for key, each in drawn.items():
        kind, value = _distribution(each), values[key]
        if isinstance(kind, CategoricalDistribution):
            choices = [str(choice) for choice in kind.choices]
            typed[key] = next((choice for choice in choices if _bare(choice) == _bare(value)), value)
        else:
            typed[key] = float(value) if isinstance(kind, FloatDistribution) else int(value)
    return typed


def _judge(
    fixed: Sequence[str],
    arms: Mapping[str, Sequence[str]],
    seeds: Sequence[int],
    name: str,
    cpus: float,
    gpus: float,
) -> list[str]:
    """Train every arm on the new seeds, wherever there is room; a lost node starts its runs again. The runs' names."""
    import ray

    run = ray.remote(num_cpus=cpus, num_gpus=gpus, max_retries=-1)(_carry_out)
    runs = {f"{name}/{arm},seed={seed}": [*arms[arm], f"seed={seed}"] for seed in seeds for arm in arms}
    waiting = [
        run.remote(merge_overrides(fixed, [*texts, f"name='{each}'", "exists=skip"]))
        for each, texts in runs.items()
    ]
    try:
        ray.get(waiting)
    except Exception as error:
        cause = getattr(error, "cause", None)
        if isinstance(cause, NearfarError):
            raise NearfarError(str(cause)) from None
        raise
    return list(runs)
