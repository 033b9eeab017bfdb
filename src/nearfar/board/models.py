"""What needs a run's model or its scores: comparisons, explained batches, search and prediction.

Work that takes longer than an answer may: one piece at a time, asked for once, looked at until it is done.
"""

from __future__ import annotations

import logging
import secrets
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Collection, Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from nearfar.board.discover import Place
from nearfar.data.cache import cache_dir, content_key
from nearfar.data.files import Json
from nearfar.errors import NearfarError
from nearfar.training.run_folder import RunFolder

if TYPE_CHECKING:
    from nearfar.lab.compare import Comparison
    from nearfar.serving.limits import Guard
    from nearfar.serving.trained import Trained

__all__ = ["Job", "Jobs", "Models", "Say", "compare_places", "explain_place"]


log = logging.getLogger("nearfar.board")

#: is told what is being done, in words
Say = Callable[[str], None]
#: pieces of work whose outcome is kept
KEPT_JOBS = 40


@dataclass
class Job:
    """A piece of work: ``state`` is waiting, working, done or failed; ``says`` is what it is doing."""

    id: str
    state: str = "waiting"
    says: str = ""
    result: Json | None = None
    problem: str | None = None
    began: float = field(default_factory=time.monotonic)

    def to_dict(self) -> Json:
        """As the page reads it."""
        known = {
            "id": self.id,
            "state": self.state,
            "says": self.says,
            "seconds": time.monotonic() - self.began,
        }
        return known | {"result": self.result, "problem": self.problem}


class Jobs:
    """A thread for what needs a model: training beside it is slowed by one piece of work at most.

    >>> jobs = Jobs()
    >>> job = jobs.start("sum", lambda say: {"sum": 1 + 1})
    >>> jobs.close(wait=True)
    >>> job.state, job.result
    ('done', {'sum': 2})
    """

    def __init__(self) -> None:
        self._jobs: OrderedDict[str, tuple[Hashable, Job]] = OrderedDict()
        self._thread = ThreadPoolExecutor(1, "board")
        self._lock = threading.Lock()

    def start(self, key: Hashable, work: Callable[[Say], Json], again: bool = False) -> Job:
        """Begin, unless work of the same key waits, runs or (but for ``again``) is done; failed work begins anew."""
        over = ("failed", "done") if again else ("failed",)
        with self._lock:
            for known, job in self._jobs.values():
                if known == key and job.state not in over:
                    return job
            job = Job(secrets.token_hex(6))
            self._jobs[job.id] = key, job
            while len(self._jobs) > KEPT_JOBS:
                self._jobs.popitem(last=False)
        self._thread.submit(self._work, job, work)
        return job

    def get(self, identity: str) -> Job:
        """A piece of work by its id; ``NearfarError`` where it is not known any more."""
        with self._lock:
            known = self._jobs.get(identity)
        if known is None:
            raise NearfarError("this is not known any more: ask for it again.")
        return known[1]

    def close(self, wait: bool = False) -> None:
        """Begin nothing new."""
        self._thread.shutdown(wait=wait, cancel_futures=not wait)

    def _work(self, job: Job, work: Callable[[Say], Json]) -> None:
        def say(text: str) -> None:
            job.says = text

        job.state = "working"
        try:
            job.result = work(say)
            job.state = "done"
        except NearfarError as error:
            job.problem, job.state = str(error), "failed"
        except ModuleNotFoundError as error:
            job.problem = (
                f"this needs {error.name}, which is not installed here (nearfar check lists the extras)."
            )
            job.state = "failed"
        except Exception:
            number = secrets.token_hex(4)
            log.exception("error %s", number)
            job.problem = f"this failed; the board's terminal has the reason under {number}."
            job.state = "failed"


Key = TypeVar("Key")
Value = TypeVar("Value")

#: trained runs that are kept in memory, each with what is searched in
KEPT_MODELS = 2
#: rows of a batch that are explained
ROWS = 8


# -- comparison ----------------------------------------------------------------------------------------------
def compare_places(places: Sequence[Place], baseline: str | None, split: str | None, say: Say) -> Json:
    """The finished runs of a selection, by `compare_runs`; ``left_out`` has the reason for each of the others.

    Raises:
        NearfarError: fewer than two finished runs, runs of different systems, an unknown baseline or split.
    """
    left_out, runs = {}, []
    for place in places:
        if not place.own:
            left_out[place.name] = (
                f"a log of a different trainer ({place.kind}) has no scores of single items to pair"
            )
        elif not RunFolder(place.path).finished:
            left_out[place.name] = "it is not finished"
        else:
            runs.append(place)
    if len(runs) < 2:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in left_out.items())
        raise NearfarError(f"verdicts need at least two finished runs of nearfar. {reasons}".strip())
    say("importing what compares")
    from nearfar.lab.compare import compare_runs
    from nearfar.lab.report import comparison_record
    from nearfar.lab.summary import describe_comparison

    say(f"comparing {len(runs)} runs")
    comparison = compare_runs([place.path for place in runs], baseline=baseline, split=split)
    return {
        "paragraphs": describe_comparison(comparison),
        "record": comparison_record(comparison),
        "monitor": comparison.monitor,
        "arms": [_arm(comparison, index, runs) for index in range(len(comparison.arms))],
        "tables": _tables(comparison),
        "judged_together": comparison.judged_together,
        "splits": _splits(runs),
        "left_out": left_out,
    }


def _arm(comparison: Comparison, index: int, places: Sequence[Place]) -> Json:
    arm = comparison.arms[index]
    keys = {place.path: place.key for place in places}
    runs = [{"seed": seed, "key": keys.get(run.path), "name": run.name} for _, seed, run in arm.every_run()]
    return {"label": arm.label, "baseline": arm is comparison.baseline, "runs": runs}


def _tables(comparison: Comparison) -> list[Json]:
    """For each question the rows of all metrics: the arms' means and the differences from the baseline."""
    first = comparison.arms[0]
    estimates = next(iter(first.estimates.values()))
    tables = []
    for question, metrics in comparison.by_question(comparison.summary[first.label]).items():
        rows = []
        for metric in metrics:
            chance = estimates[metric].to_dict().get("chance") if metric in estimates else None
            rows.append({"metric": metric, "chance": chance, "control": metric in comparison.controls})
        tables.append({"question": question, "rows": rows})
    return tables


def _splits(runs: Sequence[Place]) -> list[str]:
    every = [set(RunFolder(place.path).read_json("metrics.json")["splits"]) for place in runs]
    return sorted(set.intersection(*every))


# -- a batch -------------------------------------------------------------------------------------------------
def explain_place(place: Place, batch: int, checkpoint: str, say: Say) -> Json:
    """A batch of the epoch that a run's checkpoint is in, as `nearfar doctor RUN --batch N` explains it."""
    _check_own(place)
    say("importing what trains")
    from nearfar.lab.explain_run import explained_batch

    say("reading the run's data")
    answer = explained_batch(place.path, batch, rows=ROWS, checkpoint=checkpoint, say=say)
    return {"title": answer.title, "about": answer.about, "batches": answer.batches, "pairs": answer.pairs}


def _check_own(place: Place) -> None:
    if not place.own:
        raise NearfarError(
            f"{place.name} is a log of a different trainer: it has no model that nearfar can load."
        )


# -- a trained run -------------------------------------------------------------------------------------------
class Models:
    """Trained runs in memory, and the pages on which they are asked; nothing is written into a run's folder.

    Vectors of galleries are kept in the cache, unless ``nearfar search`` has put them beside the run.
    """

    def __init__(self, hosts: Collection[str]) -> None:
        self.hosts = hosts
        self._trained: OrderedDict[Path, tuple[object, Trained]] = OrderedDict()
        self._apps: OrderedDict[str, Guard] = OrderedDict()
        self._left: list[Guard] = []
        self._lock = threading.Lock()

    def trained(self, place: Place, say: Say) -> Trained:
        """The run's best model, loaded anew where its checkpoint has changed."""
        _check_own(place)
        say("importing what embeds")
        from nearfar.serving.trained import load
        from nearfar.training.checkpoint import find_checkpoint

        try:
            state: object = find_checkpoint(place.path, prefer="best").stat().st_mtime_ns
        except (NearfarError, OSError):  # an ensemble has none of its own
            state = None
        known = self._trained.get(place.path)
        if known is None or known[0] != state:
            say("loading the model")
            known = state, load(place.path)
            self._keep(self._trained, place.path, known)
        return known[1]

    def open(self, place: Place, say: Say) -> Json:
        """Load a run and what it searches in, the run's own data; its page is then at ``address``."""
        trained = self.trained(place, say)
        from nearfar.serving.fill import own_source
        from nearfar.serving.gallery import Gallery
        from nearfar.serving.server import build_app

        gallery, note = None, None
        if trained.views:
            say("embedding the run's own data, which is searched in")
            try:
                gallery = Gallery.open(trained, own_source(trained), say=say, folder=gallery_folder(place))
            except NearfarError as error:
                note = str(error)
        app = build_app(trained, gallery, hosts=self.hosts)
        with self._lock:
            self._left.extend(self._keep(self._apps, place.key, app))
        return {"address": f"/use/{place.key}/", "note": note}

    def app(self, key: str) -> Guard | None:
        """The application of an opened run; None where it is not open (any more)."""
        with self._lock:
            return self._apps.get(key)

    async def close(self, every: bool = False) -> None:
        """Let go of the models whose place was taken by others, or of ``every`` one."""
        with self._lock:
            left, self._left = self._left, []
            if every:
                left += self._apps.values()
                self._apps.clear()
        for guard in left:
            server: Any = guard.app
            await server.close()

    @staticmethod
    def _keep(kept: OrderedDict[Key, Value], key: Key, value: Value) -> list[Value]:
        """Keep a value, and give back those that are not kept any more."""
        left = [kept.pop(key)] if key in kept else []
        kept[key] = value
        while len(kept) > KEPT_MODELS:
            left.append(kept.popitem(last=False)[1])
        return left


def gallery_folder(place: Place) -> Path:
    """Where vectors of a run's data are kept by the board."""
    return cache_dir() / "board" / content_key(str(place.path.resolve()))[:16]
