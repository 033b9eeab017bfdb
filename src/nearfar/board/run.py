"""What a run's page shows: curves, findings, results, examples, files. All of it is read from the run's folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from urllib.parse import quote

from nearfar.board.discover import Place
from nearfar.board.table import foreign_columns, living, row_of, signals_of
from nearfar.data.files import Json, check_shape, read_json, read_text
from nearfar.doctor import diagnose
from nearfar.doctor.levels import levels
from nearfar.doctor.rule import TooLittle
from nearfar.doctor.series import Series
from nearfar.doctor.signals import Signals
from nearfar.errors import NearfarError
from nearfar.lab.curves import Curves, Line, series_of, training_curves
from nearfar.terminal import metric_words
from nearfar.training.run_folder import SHAPES, RunFolder

__all__ = ["curves_of", "examples_of", "files_of", "run_content", "sections_of"]

#: points of a line that are sent; of longer ones every so many
POINTS = 1000
#: bytes of a file that is shown as text
FILE_BYTES = 1 << 20
#: numbers of every step that are drawn on request: field, words
STEP_FIELDS = {
    "Probability of the positive": ("p_positive", "hardest_share"),
    "Learning rate": ("lr",),
    "Gradient norm before clipping": ("gradient_norm",),
    "Scale (1 / temperature)": ("scale",),
    "Seconds per step": ("seconds_per_step",),
}
FIELD_WORDS = {
    "p_positive": "probability of the positive",
    "hardest_share": "share of the push on the hardest negative",
    "lr": "learning rate",
    "gradient_norm": "gradient norm",
    "scale": "scale",
    "temperature": "temperature",
    "seconds_per_step": "seconds per step",
}


def run_content(place: Place) -> Json:
    """Everything of a run that changes while it trains: row, curves, the doctor's diagnosis, results.

    Raises:
        NearfarError: a run that cannot be read; the message says which file and why.
    """
    row = row_of(place)
    if row["problem"]:
        raise NearfarError(row["problem"])
    signals = signals_of(place)
    if not place.own:
        row |= foreign_columns(signals)
    diagnosis = diagnose(signals).to_dict()
    curves, more = curves_of(place, signals)
    content: Json = {
        "row": {key: value for key, value in living(row, place).items() if key != "options"},
        "path": str(place.path),
        "kind": place.kind,
        "diagnosis": diagnosis,
        "curves": [_thinned(each).to_dict() for each in curves],
        "more": [_thinned(each).to_dict() for each in more],
        "results": [],
    }
    if place.own:
        content |= _results(place)
    return content


# -- curves --------------------------------------------------------------------------------------------------
def curves_of(place: Place, signals: Signals) -> tuple[list[Curves], list[Curves]]:
    """The curves of a run, and those that are drawn on request."""
    if not place.own:
        return foreign_curves(signals)
    records = list(RunFolder(place.path).log())
    steps = [record for record in records if record.get("kind") == "step"]
    more = []
    for title, names in STEP_FIELDS.items():
        lines = {FIELD_WORDS[name]: series_of(steps, name) for name in names}
        lines = {name: line for name, line in lines.items() if line[0]}
        if lines:
            more.append(Curves(title, lines, "optimiser step", ""))
    return training_curves(records, *_monitored(place)), more


def _monitored(place: Place) -> tuple[str | None, float | None]:
    """The monitored metric and its chance level on validation, of a run that is finished."""
    if not (place.path / "metrics.json").exists():
        return None, None
    metrics = RunFolder(place.path).read_json("metrics.json")
    estimate = metrics["splits"].get("val", {}).get(metrics["monitor"], {})
    chance = estimate.get("chance")
    return metrics["monitor"], float(chance) if isinstance(chance, int | float) else None


def foreign_curves(signals: Signals) -> tuple[list[Curves], list[Curves]]:
    """Of a log of a different trainer: losses with what guessing costs and the floor, metrics of validation."""
    try:
        level = next((each for each in levels(signals) if each.name == "loss"), None)
    except TooLittle:
        level = None
    known = {}
    if level is not None and len(level.uniform):
        words = f"guessing ({level.assumed})" if level.assumed else "guessing"
        known[words] = float(level.uniform.numbers[-1])
        known["floor of the loss"] = float(level.floor.numbers[-1])
    names = {"loss": "training", "train_loss": "training, by epoch", "val_loss": "validation"}
    losses = {words: _line(signals.series(name)) for name, words in names.items()}
    curves = [("Training loss", losses, "loss (nats)", known)]
    metrics: dict[bool, dict[str, Line]] = {True: {}, False: {}}
    for name in sorted(name for name in signals.fields if name.startswith("val/")):
        line = _line(signals.series(name))
        metrics[all(0 <= value <= 1 for value in line[1])][metric_words(name.removeprefix("val/"))] = line
    curves += [
        ("Validation", metrics[True], "value", {}),
        ("Validation, other scores", metrics[False], "value", {}),
    ]
    health = {
        "Mean cosine of different rows": signals.named("*/mean_cosine"),
        "Effective rank of the embeddings": signals.named("*/effective_rank"),
    }
    curves += [
        (title, {name: _line(s) for name, s in each.items()}, "", {}) for title, each in health.items()
    ]
    more: list[tuple[str, dict[str, Line], str, dict[str, float]]] = [
        (title, {FIELD_WORDS[name]: _line(signals.series(name)) for name in fields}, "", {})
        for title, fields in (*STEP_FIELDS.items(), ("Temperature", ("temperature",)))
    ]
    return _with_points(curves), _with_points(more)


def _with_points(given: Sequence[tuple[str, Mapping[str, Line], str, Mapping[str, float]]]) -> list[Curves]:
    kept = [
        (title, {n: line for n, line in lines.items() if line[0]}, unit, known)
        for title, lines, unit, known in given
    ]
    return [
        Curves(title, lines, "optimiser step", unit, known) for title, lines, unit, known in kept if lines
    ]


def _line(series: Series) -> Line:
    series = series.finite()
    return series.steps.tolist(), series.numbers.tolist()


def _thinned(curves: Curves) -> Curves:
    """Every so many points of a long line, and its last."""
    lines: dict[str, Line] = {}
    for name, (x, y) in curves.series.items():
        stride = -(-len(x) // POINTS)
        at = [*range(0, len(x), stride)] if stride > 1 else range(len(x))
        chosen = [*at, len(x) - 1] if stride > 1 and at[-1] != len(x) - 1 else list(at)
        lines[name] = [x[i] for i in chosen], [y[i] for i in chosen]
    return Curves(curves.title, lines, curves.xlabel, curves.ylabel, curves.levels)


# -- results -------------------------------------------------------------------------------------------------
def _results(place: Place) -> Json:
    """A table of estimates for each split and question, and what lies in the folder."""
    folder = RunFolder(place.path)
    names = ("examples.json", "sections.json", "map.npz", "report.html", "config.yaml", "dataset_layout.json")
    has = {name: folder.has(name) for name in names}
    has["checkpoint"] = any((folder.checkpoints / name).exists() for name in ("best.ckpt", "last.ckpt"))
    if not folder.finished:
        return {"has": has}
    metrics = folder.read_json("metrics.json")
    tables: dict[tuple[str, str], list[Json]] = {}
    for split, estimates in sorted(metrics["splits"].items()):  # test before val
        before = (metrics.get("before_training") or {}).get(split) or {}
        gains = (metrics.get("gain") or {}).get(split) or {}
        for name, e in estimates.items():
            row = {key: e.get(key) for key in ("value", "low", "high", "chance", "n", "trivial", "control")}
            row |= {
                "metric": name,
                "words": metric_words(name, " · "),
                "gallery": e["protocol"].get("gallery"),
            }
            row |= {"before": (before.get(name) or {}).get("value"), "gain": gains.get(name)}
            tables.setdefault((split, str(e["protocol"].get("question", ""))), []).append(row)
    results = [
        {"split": split, "question": question, "rows": rows} for (split, question), rows in tables.items()
    ]
    return {
        "has": has,
        "results": results,
        "monitor": metrics["monitor"],
        "best_epoch": metrics.get("best_epoch"),
    }


# -- on request ----------------------------------------------------------------------------------------------
def examples_of(place: Place) -> list[Json]:
    """Retrieval examples of a finished run: the query, and the items that came first."""
    folder = RunFolder(place.path)
    if not place.own or not folder.has("examples.json"):
        return []
    examples = folder.read_json("examples.json")
    for example in examples:
        example["query"] = _shown(example["query"])
        example["items"] = [_shown(item) for item in example["items"]]
    return list(examples)


def _shown(item: Json) -> Json:
    """An item whose drawing is the address of a picture, in which nothing runs and nothing is loaded."""
    picture = item.get("svg") or item.get("image") or ""
    kept = {key: item.get(key) for key in ("text", "rank", "score", "correct") if key in item}
    return kept | {"picture": picture_address(str(picture))}


def picture_address(source: str) -> str | None:
    """A picture of a run's files as ``<img src=…>`` takes it; None for whatever is neither drawn nor a JPEG or PNG."""
    if source.lstrip().startswith("<svg"):
        return "data:image/svg+xml," + quote(_with_namespace(source))
    return source if source.startswith(("data:image/png;base64,", "data:image/jpeg;base64,")) else None


def _with_namespace(svg: str) -> str:
    """A drawing that stands in a page needs no namespace, one that is a picture does."""
    head = svg[: svg.find(">") + 1]
    return svg if "xmlns=" in head else svg.replace("<svg", '<svg xmlns="http://www.w3.org/2000/svg"', 1)


def sections_of(place: Place) -> list[Json]:
    """Tables and pictures that the run's system adds to its report."""
    folder = RunFolder(place.path)
    if not place.own or not folder.has("sections.json"):
        return []
    sections = folder.read_json("sections.json")
    for section in sections:
        for table in section["tables"]:
            check_shape(table, {"columns": [str], "rows": [list]}, str(folder.path / "sections.json"))
        section["pictures"] = [
            {"picture": picture_address(p["source"]), "caption": p["caption"]} for p in section["pictures"]
        ]
    return list(sections)


def files_of(place: Place) -> list[Json]:
    """The texts that say what a run is: configuration, data, environment."""
    names = ("config.yaml", "dataset_layout.json", "environment.json", "model.json", "resumed.json")
    files = []
    for name in names if place.own else ():
        path = place.path / name
        if not path.exists():
            continue
        if name in SHAPES:
            read_json(path, SHAPES[name])
        files.append({"name": name, "text": read_text(path, FILE_BYTES)})
    return files
