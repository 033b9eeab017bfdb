"""Logs that were printed: open_clip's ``out.log``, dictionaries of Hugging Face trainers, lines of ``name: number`` or
``name number``."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from nearfar.data.files import Json
from nearfar.doctor.logs.log import Log, open_log, suffix
from nearfar.doctor.logs.names import map_names
from nearfar.doctor.logs.tables import (
    HYPERPARAMETERS,
    hyperparameters,
    leave_out_summary,
    newest,
    printed_dictionary,
    read_json_lines,
    whole_epochs,
)

__all__ = ["open_clip_log", "printed_log", "read_open_clip", "read_printed"]

_NUMBER = r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?|nan|NaN|inf|-inf"
#: a name of one word, a second with a capital ("Logit Scale"), and before it words that say of what ("val loss")
_NAME = (
    r"(?:(?:train(?:ing)?|val(?:id(?:ation)?)?|eval(?:uation)?|dev|test|avg|average|mean|total|running)\s)*"
    r"[a-z][\w@/.-]*(?:\s(?-i:[A-Z][a-z]+))?"
)
_PAIR = re.compile(rf"(?<![\w@/.-])({_NAME})\s*[:=]\s*((?-i:{_NUMBER}))(%?)(?![\w.:])", re.IGNORECASE)
#: between pairs without a colon: "step 100 | loss 4.158", "Loss 6.9e+00 (6.9e+00)<tab>Acc@1 0.2 (0.1)"
_BETWEEN = re.compile(r"[|,;\t]|\s-+\s|(?<=\d):\s|\]:?\s")
_SPACED = re.compile(rf"({_NAME})\s+((?-i:{_NUMBER}))(%?)(?:\s*\([^)]*\))?(?=\s|$)", re.IGNORECASE)
_SPACED_LINE = re.compile(rf"(?:\s*{_SPACED.pattern})+\s*", re.IGNORECASE)
_EPOCH = re.compile(r"\b(?:epoch\s*[:=#]?\s*\[?|train:\s*\[(?=\d+\]\[))(\d+)", re.IGNORECASE)
_STEP = re.compile(r"\b(?:step|iter(?:ation)?)\s*[:=#]?\s*\[?(\d+)", re.IGNORECASE)
_LONGEST = 20_000  # characters of a line that are looked at


# -- open_clip -----------------------------------------------------------------------------------------------
_OPEN_CLIP = re.compile(r"Train Epoch: (\d+) \[\s*([\d,]+)/\s*([\d,]+) \(\d+%\)\](.*)")
_OPEN_CLIP_EVAL = re.compile(r"Eval Epoch: (\d+) (.*)")
_PARAMETER = re.compile(r"^\s*(\w+): (.*)$")


def open_clip_log(path: Path) -> Path | None:
    """``out.log`` of open_clip, or ``results.jsonl`` of its evaluations: the file, or in the folder of a run."""
    if path.is_file():
        if path.name == "results.jsonl":
            return path
        return path if suffix(path) in (".log", ".txt") and _is_open_clip(path) else None
    log = path / "out.log"
    if log.is_file() and _is_open_clip(log):
        return log
    for place in (path / "results.jsonl", path / "checkpoints" / "results.jsonl"):
        if place.is_file():
            return place
    return None


def _is_open_clip(path: Path) -> bool:
    return any(_OPEN_CLIP.search(line) for line in _lines(path, most=2000))


def read_open_clip(path: Path) -> Log:
    """Steps and evaluations of its log; of ``results.jsonl`` the evaluations alone. Epochs are counted from 0."""
    folder = path.parent.parent if path.parent.name == "checkpoints" else path.parent
    context: Json = {"loss_kind": "softmax"}
    parameters = folder / "params.txt"
    if parameters.is_file():
        pairs = (_PARAMETER.match(line) for line in _lines(parameters))
        values: Json = {pair.group(1): pair.group(2).strip() for pair in pairs if pair}
        context |= hyperparameters(values)
        if values.get("siglip") == "True":
            context["loss_kind"] = "sigmoid"
    if path.suffix == ".jsonl":
        log = read_json_lines(path)
        for record in log.records:
            if isinstance(record.get("epoch"), (int, float)):
                record["epoch"] = int(record["epoch"])
        return Log("open_clip results.jsonl", path, log.records, context | _gallery(log.records), log.unread,
                   validation=True)  # fmt: skip
    records: list[Json] = []
    for line in _lines(path):
        step = _OPEN_CLIP.search(line)
        if step:
            numbers: Json = {name.replace(" ", "_"): value for name, value, _ in _PAIR.findall(step.group(4))}
            records.append({"epoch": int(step.group(1)) + 1, **numbers})
            continue
        evaluation = _OPEN_CLIP_EVAL.search(line)
        if evaluation:  # printed after so many epochs
            scores: Json = {f"eval/{name}": value for name, value, _ in _PAIR.findall(evaluation.group(2))}
            records.append({"epoch": max(1, int(evaluation.group(1))), **scores})
    return Log("open_clip out.log", path, records, context | _gallery(records))


def _gallery(records: list[Json]) -> Json:
    for record in reversed(records):
        for name in ("num_samples", "eval/num_samples"):
            try:
                return {"gallery": int(float(record[name]))}
            except (KeyError, TypeError, ValueError):
                continue
    return {}


# -- any -----------------------------------------------------------------------------------------------------
def printed_log(path: Path) -> Path | None:
    """A ``.log``, ``.out`` or ``.txt`` file; in a folder the newest."""
    if path.is_file():
        return path if suffix(path) in (".log", ".out", ".txt") else None
    return newest([each for suffix in ("*.log", "*.out") for each in path.glob(suffix)])


def read_printed(path: Path) -> Log:
    """Every line with a dictionary, or with pairs of a name and a number; progress bars are split at their returns.

    A line without such pairs is no record; an epoch that a line of its own announces holds for those after it. Options
    that are printed once (``batch_size=64``) are known of the run. A percentage is the share that it is.
    """
    records: list[Json] = []
    epoch: int | None = None
    for line in _lines(path):
        dictionary = printed_dictionary(line)
        if dictionary is not None:
            records.append(dictionary)
            continue
        pairs = _pairs(line)
        at_epoch, at_step = _EPOCH.search(line), _STEP.search(line)
        if at_epoch:
            epoch = int(at_epoch.group(1))
        for name in [name for name in pairs if name.lower() in ("epoch", "step", "iter", "iteration")]:
            del pairs[name]
        if not pairs:
            continue
        if epoch is not None:
            pairs["epoch"] = epoch
        if at_step:
            pairs["step"] = int(at_step.group(1))
        records.append(pairs)
    if any(isinstance(record.get("epoch"), float) for record in records):
        whole_epochs(records)
    notes = leave_out_summary(records)
    return Log("printed log", path, list(filter(None, records)), _printed_once(records), notes=notes)


def _pairs(line: str) -> Json:
    """Names and numbers of a line; those without a colon only where nothing else stands between separators and one of
    the names is known.

    >>> _pairs("epoch 2: train loss: 4.16, val loss: 4.2"), _pairs("step 100 | loss 4.158 | acc 2.0%")
    ({'train loss': '4.16', 'val loss': '4.2'}, {'step': '100', 'loss': '4.158', 'acc': 0.02})
    >>> _pairs("Loaded 3 files"), _pairs("Saved model 7")
    ({}, {})
    """
    known = {name: _share(value, percent) for name, value, percent in _PAIR.findall(line)}
    spaced: Json = {}
    for part in _BETWEEN.split(line):
        if _SPACED_LINE.fullmatch(part):
            spaced |= {name: _share(value, percent) for name, value, percent in _SPACED.findall(part)}
    if any(field not in ("step", "epoch") for field in map_names(spaced).used):
        known = spaced | known
    return known


def _share(value: str, percent: str) -> str | float:
    return float(value) / 100 if percent else value


def _printed_once(records: list[Json]) -> Json:
    """Takes options that one record alone has out of the records; what they say of the run."""
    known: Json = {}
    for spelling in (each for spellings in HYPERPARAMETERS.values() for each in spellings if each != "loss"):
        having = [record for record in records if spelling in record]
        if len(having) == 1 and len(records) > 1:
            known[spelling] = having[0].pop(spelling)
    return hyperparameters(known)


def _lines(path: Path, most: int | None = None) -> Iterator[str]:
    count = 0
    with open_log(path) as file:
        for line in file:
            for part in line.split("\r"):
                if part.strip():
                    yield part.strip()[:_LONGEST]
            count += 1
            if most is not None and count >= most:
                return
