"""Work that takes longer than an answer may: one piece at a time, asked for once, looked at until it is done."""

from __future__ import annotations

import logging
import secrets
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Hashable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from nearfar.data.files import Json
from nearfar.errors import NearfarError

__all__ = ["Job", "Jobs", "Say"]

log = logging.getLogger("nearfar.board")

#: is told what is being done, in words
Say = Callable[[str], None]
#: pieces of work whose outcome is kept
KEPT = 40


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
            while len(self._jobs) > KEPT:
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
