"""The table of all runs: a row for each, read anew where its files have changed, and the doctor's findings."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

from nearfar.board.discover import Place, find_places
from nearfar.config.registry import role_of
from nearfar.data.files import Json, parse_json, read_json, read_similar_yaml
from nearfar.doctor import diagnose, read_run
from nearfar.doctor.phases import monitored_gain
from nearfar.doctor.signals import Signals
from nearfar.errors import NearfarError
from nearfar.terminal import metric_words

__all__ = ["Runs", "foreign_columns", "living", "row_of", "signals_of"]

log = logging.getLogger("nearfar.board")

#: a run whose log was written in these last seconds, and that is not finished, is training; a checkpoint of a large
#: model or an evaluation may take this long
LIVE_SECONDS = 180.0
#: seconds for which a look at the folders holds
SCAN_SECONDS = 1.0
#: bytes at the end of a log that are read for the table: of a run in progress, and of one that is finished
TAIL, TAIL_FINISHED = 65_536, 4096
#: seconds that an answer takes to read runs that are new; the others are read beside
READ_SECONDS = 0.45
#: options that are columns of the table, at most
OPTIONS = 40


def signals_of(place: Place) -> Signals:
    """The log of a run, of nearfar or of a different trainer, as the doctor reads it."""
    return read_run(place.path) if place.own else Signals.of(place.path)


class Runs:
    """The runs below a folder.

    Every file is read once for each of its states, the newest runs first. What an answer would take too long for (very
    many runs that were not read yet, the doctor's rules for runs in progress and for logs of other trainers) is done in
    a thread beside, and stands in a later answer.
    """

    def __init__(self, root: Path) -> None:
        if not root.exists():
            raise NearfarError(
                f"{root}: no such folder. Name the folder that holds your runs: nearfar board FOLDER."
            )
        self.root = root
        self._places: dict[str, Place] = {}
        self._looked = -math.inf
        self._rows: dict[str, tuple[object, Json]] = {}
        self._judged: dict[str, tuple[object, Json]] = {}
        self._asked: set[str] = set()
        self._reading = False
        self._lock = threading.Lock()
        self._beside = ThreadPoolExecutor(1, "doctor")

    def begin(self) -> None:
        """Read beside what the first page is going to ask for."""
        self._aside(self.table)

    def close(self) -> None:
        """End the thread beside."""
        self._beside.shutdown(wait=False, cancel_futures=True)

    # -- runs ------------------------------------------------------------------------------------------------
    def places(self) -> dict[str, Place]:
        """The runs by key, as they were at most a second ago."""
        with self._lock:
            if time.monotonic() - self._looked > SCAN_SECONDS:
                self._places = {place.key: place for place in find_places(self.root)}
                self._looked = time.monotonic()
                for kept in (self._rows, self._judged):
                    for key in kept.keys() - self._places.keys():
                        del kept[key]
            return self._places

    def place(self, key: str) -> Place:
        """A run by its key.

        Raises:
            NearfarError: no run of this key, or not any more.
        """
        place = self.places().get(key)
        if place is None or not place.path.exists():
            raise NearfarError(f"this run is not in {self.root} any more: it was removed or renamed.")
        return place

    # -- rows ------------------------------------------------------------------------------------------------
    def table(self) -> Json:
        """``rows``, the ``options`` in which runs of a system differ, and ``skipped``, files that are no logs.

        ``judging`` counts runs that the doctor is asked about, ``unread`` those of which only the name is known yet.
        """
        rows, skipped, unread = [], [], []
        deadline = time.monotonic() + READ_SECONDS
        stamped = [(place, place.stamp()) for place in list(self.places().values())]
        for place, stamp in sorted(stamped, key=lambda pair: max(pair[1], default=()), reverse=True):
            if place.key not in self._rows and time.monotonic() > deadline:
                unread.append(place)
                rows.append(living(blank(place), place) | {"status": "", "findings": []})
                continue
            row = self._row(place, stamp)
            if not place.sure and row.get("problem"):
                skipped.append({"name": place.name, "problem": row["problem"]})
            else:
                rows.append(row)
        self._read(unread)
        options = varying([row for row in rows if row["options"]])
        shown = [
            {**row, "options": {key: row["options"][key] for key in options if key in row["options"]}}
            for row in rows
        ]
        return {
            "root": str(self.root),
            "rows": shown,
            "options": options,
            "skipped": skipped,
            "judging": len(self._asked),
            "unread": len(unread),
        }

    def _read(self, places: Sequence[Place]) -> None:
        """Read runs beside, unless that is being done."""
        if self._reading or not places:
            return
        self._reading = True

        def work() -> None:
            try:
                for place in places:
                    self._rows[place.key] = place.stamp(), row_of(place)
            finally:
                self._reading = False

        self._aside(work)

    def _row(self, place: Place, stamp: object) -> Json:
        known = self._rows.get(place.key)
        if known is None or known[0] != stamp:
            known = stamp, row_of(place)
            self._rows[place.key] = known
        row = living(known[1], place)
        judged = self._judged.get(place.key)
        if row["findings"] is None and row["status"] != "broken":
            if judged is None or judged[0] != stamp:
                self._judge(place, stamp)
            if judged is not None:  # of an earlier state, until the new one is judged
                row |= judged[1]
        return row

    def _judge(self, place: Place, stamp: object) -> None:
        """Ask the doctor beside, at most once at a time for each run."""
        if place.key in self._asked:
            return
        self._asked.add(place.key)

        def work() -> None:
            try:
                self._judged[place.key] = stamp, judged(place)
            except Exception:
                log.exception("the doctor failed at %s", place.path)
                self._judged[place.key] = stamp, {"findings": [["error", "the doctor failed"]]}
            finally:
                self._asked.discard(place.key)

        self._aside(work)

    def _aside(self, work: Callable[[], object]) -> None:
        with suppress(RuntimeError):  # the board is closing
            self._beside.submit(work)


def judged(place: Place) -> Json:
    """What the table shows of a run that the doctor reads: findings, and of other trainers' logs loss and metric."""
    try:
        signals = signals_of(place)
        findings = _findings(diagnose(signals).to_dict())
        return {"findings": findings} if place.own else {"findings": findings, **foreign_columns(signals)}
    except NearfarError as error:
        return {"findings": [], "problem": str(error), "status": "broken"}


def _findings(doctor: Json) -> list[list[str]]:
    """Severity and id of each."""
    return [[str(f.get("severity", "note")), str(f.get("id", ""))] for f in doctor.get("findings") or []]


# -- a row ---------------------------------------------------------------------------------------------------
def blank(place: Place) -> Json:
    """A row of which only the run's name is known."""
    return {
        "key": place.key, "name": place.name, "kind": place.kind, "status": "", "system": None, "seed": None,
        "epoch": None, "epochs": None, "step": None, "loss": None, "result": None, "gain": None, "seconds": None,
        "findings": None, "options": {}, "problem": None,
    }  # fmt: skip


def row_of(place: Place) -> Json:
    """What the files of a run say in short; ``problem`` where one of them cannot be read."""
    row = blank(place)
    if not place.own:
        return row
    try:
        if (place.path / "config.yaml").exists():
            row |= _configured(read_similar_yaml(place.path / "config.yaml"))
        if (place.path / "metrics.json").exists():
            row |= _measured(read_json(place.path / "metrics.json", dict)) | {"status": "finished"}
            if (place.path / "doctor.json").exists():
                row["findings"] = _findings(read_json(place.path / "doctor.json", dict))
        last = tail(place.log, TAIL_FINISHED if row["status"] == "finished" else TAIL)
        row["loss"] = next(
            (r["loss"] for r in reversed(last) if isinstance(r.get("loss"), int | float)), None
        )
        if row["status"] != "finished":
            row |= _so_far(last)
    except NearfarError as error:
        row |= {"status": "broken", "problem": str(error), "findings": []}
    return row


def living(row: Json, place: Place) -> Json:
    """A row with what changes by itself: when the log was written last, and whether that is training."""
    written, status = place.written, row["status"]
    if not status:
        status = "training" if time.time() - written < LIVE_SECONDS else "stopped" if place.own else ""
    return row | {"status": status, "written": written}


def _configured(content: object) -> Json:
    if not isinstance(content, Mapping):
        raise NearfarError("config.yaml: not the configuration of a run.")
    options = {key: value for key, value in _flat(content).items() if key != "overrides"}
    trainer = content.get("trainer")
    most = trainer.get("max_steps") if isinstance(trainer, Mapping) else None
    epochs = content.get("epochs")
    return {
        "system": str(content.get("system") or "nearfar"),
        "seed": content.get("seed") if isinstance(content.get("seed"), int) else None,
        "epochs": epochs if isinstance(epochs, int) else None,
        "max_steps": most if isinstance(most, int) else None,
        "options": options,
    }


def _flat(content: Mapping[object, object], before: str = "") -> dict[str, object]:
    flat: dict[str, object] = {}
    for key, value in content.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{before}{key}.")
        else:
            flat[f"{before}{key}"] = value
    return flat


def _measured(metrics: Json) -> Json:
    """The monitored estimate, of test where there is one, and what training changed in it."""
    splits, monitor = metrics.get("splits"), metrics.get("monitor")
    split = next(
        (s for s in ("test", "val") if isinstance(splits, Mapping) and monitor in (splits.get(s) or {})), None
    )
    result: Json | None = None
    if split is not None and isinstance(splits, Mapping):
        estimate = splits[split][monitor]
        result = {"metric": str(monitor), "words": metric_words(str(monitor)), "split": split}
        result |= {key: _number(estimate.get(key)) for key in ("value", "low", "high", "chance")}
        result["rises"] = bool(estimate.get("higher_is_better", True))
    known = monitored_gain(metrics.get("gain") or {}, monitor)
    gain = (
        None
        if known is None
        else {"verdict": str(known[2].get("verdict")), "value": _number(known[2].get("value"))}
    )
    plain = {key: metrics.get(key) for key in ("epochs", "steps", "best_epoch")}
    return {
        "result": result,
        "gain": gain,
        "epoch": plain["epochs"],
        "step": plain["steps"],
        "seconds": _number(metrics.get("train_seconds")),
    }


def _number(value: object) -> float | None:
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def _so_far(last: Sequence[Json]) -> Json:
    """Of a run in progress: where it is, and its newest validation."""
    row: Json = {}
    for record in last:
        row["step"] = record.get("step", row.get("step"))
        row["epoch"] = record.get("epoch", row.get("epoch"))
        if record.get("kind") in ("start", "epoch") and isinstance(record.get("val"), Mapping):
            row["newest"] = {str(name): _number(value) for name, value in list(record["val"].items())[:12]}
    return row


def tail(path: Path, most: int = TAIL) -> list[Json]:
    """The records at the end of a log; a first line that was cut is left out."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, 2)
            file.seek(max(0, size - most))
            lines = file.read(most).split(b"\n")
    except OSError:
        return []
    records = []
    for line in lines[1:] if size > most else lines:
        try:
            record = parse_json(line)
        except ValueError:
            continue
        if isinstance(record, dict):
            records.append(record)
    return records


def foreign_columns(signals: Signals) -> Json:
    """The last loss, step and epoch of a log of a different trainer, and its first metric of validation."""
    loss = signals.series("loss").finite() or signals.series("train_loss").finite()
    row: Json = {"epoch": signals.last_epoch}
    if loss:
        row |= {"loss": float(loss.numbers[-1]), "step": int(loss.steps[-1])}
    monitor = signals.text("monitor")
    names = [name for name in signals.fields if name.startswith("val/")]
    for name in [f"val/{monitor}", *names]:
        if name in names and (series := signals.series(name).finite()):
            words = metric_words(name.removeprefix("val/"))
            row["result"] = {
                "metric": name,
                "words": words,
                "split": "val",
                "value": float(series.numbers[-1]),
            }
            break
    return row


def varying(rows: Iterable[Json]) -> list[str]:
    """The options in which runs of one system differ, without those that only say where a run is stored.

    >>> rows = [{"system": "pairs", "options": {"lr": lr, "epochs": 2, "name": lr}} for lr in (0.1, 0.2)]
    >>> varying(rows)
    ['lr']
    """
    by_system: dict[str, list[Mapping[str, object]]] = {}
    for row in rows:
        by_system.setdefault(str(row["system"]), []).append(row["options"])
    keys: dict[str, None] = {}
    for system, options in by_system.items():
        differing = _differing(options)
        named = {key.split(".")[0]: key for key in differing if key.endswith((".name", ".kind"))}
        for key in sorted(differing):
            name = named.get(key.split(".")[0], key)
            # A sampler's options follow from its name, unless samplers of one name differ in them.
            peers = [options] if name == key else _by_value(options, name)
            if role_of(key, system) not in ("repeat", "place") and any(
                key in _differing(each) for each in peers
            ):
                keys[key] = None
    return list(keys)[:OPTIONS]


def _differing(options: Sequence[Mapping[str, object]]) -> set[str]:
    first = options[0]
    return {key for one in options for key in one.keys() | first.keys() if one.get(key) != first.get(key)}


def _by_value(options: Sequence[Mapping[str, object]], key: str) -> list[list[Mapping[str, object]]]:
    groups: dict[str, list[Mapping[str, object]]] = {}
    for one in options:
        groups.setdefault(str(one.get(key)), []).append(one)
    return list(groups.values())
