"""The model card of an exported folder: ``README.md`` with the metadata that the Hugging Face hub reads."""

from __future__ import annotations

import html
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import yaml

from nearfar.config.options import to_dict
from nearfar.data.files import Json, read_json
from nearfar.doctor.phases import gain_sentence
from nearfar.metrics import Estimate
from nearfar.serving.exported import places_of, without_places
from nearfar.serving.trained import Trained
from nearfar.terminal import interval_words, metric_words, short_number
from nearfar.training.run_folder import RunFolder

__all__ = ["model_card"]

_LIBRARY = {
    "safetensors": "nearfar",
    "sentence-transformers": "sentence-transformers",
    "onnx": "onnx",
    "torch": "pytorch",
}
#: for the hub's search; of runs that embed, by the kinds of their views
_TASKS = {
    "detector": "object-detection",
    "fair_detection": "object-detection",
    "aspects": "text-classification",
}
_MOST = 40  # rows of a table of metrics
#: options that say nothing of what was learned
_NOT_SHOWN = (
    "name",
    "runs_dir",
    "exists",
    "overrides",
    "resume_from",
    "init_from",
    "needs_init_from",
    "logger",
)


def model_card(trained: Trained, format: str, details: Json | None = None, license: str | None = None) -> str:
    """The card of a run exported in a format: what it is, data, results with intervals and chance, the doctor's
    findings, how it is loaded, and what was not measured.

    Everything is read from the run's folder. Names and texts from data are escaped, and folders of this machine do not
    occur: of a path the last part is kept. ``details`` are ``tower`` (of sentence-transformers) and ``graphs`` (views
    with their inputs). ``license`` is an identifier of the hub, such as "apache-2.0".
    """
    card = _Card(trained, format, dict(details or {}), license)
    return card.text()


class _Card:
    def __init__(self, trained: Trained, format: str, details: Json, license: str | None) -> None:
        self.trained, self.format, self.details, self.license = trained, format, details, license
        folder = RunFolder(trained.path)
        self.metrics: Json = folder.read_json("metrics.json") if folder.has("metrics.json") else {}
        self.layout: Json = (
            folder.read_json("dataset_layout.json") if folder.has("dataset_layout.json") else {}
        )
        self.doctor: Json = read_json(trained.path / "doctor.json", dict) if folder.has("doctor.json") else {}
        self.environment: Json = (
            folder.read_json("environment.json") if folder.has("environment.json") else {}
        )
        self.config = trained.config
        splits = self.metrics.get("splits", {})
        self.split = "test" if "test" in splits else next(iter(splits), "")
        self.gain: Json = (self.metrics.get("gain") or {}).get(self.split) or {}
        self._places = places_of(trained.config, trained.path)

    # -- text ------------------------------------------------------------------------------------------------
    def plain(self, value: object) -> str:
        """A text from data for Markdown: one line, no markup, no folder of this machine."""
        text = " ".join(str(value).split())
        text = without_places(text, self._places)
        # an underscore inside a word is no markup
        return re.sub(r"([\\`*\[\]|~]|(?<!\w)_|_(?!\w))", r"\\\1", html.escape(text, quote=False))

    def table(self, header: Sequence[str], rows: Sequence[Sequence[object]]) -> list[str]:
        lines = [f"| {' | '.join(header)} |", f"|{'---|' * len(header)}"]
        return lines + [f"| {' | '.join(self.plain(cell) for cell in row)} |" for row in rows]

    def text(self) -> str:
        sections = [
            ("", self.what()),
            ("## Use", self.use()),
            ("## Data", self.data()),
            ("## Results", self.results()),
            ("## What the doctor found", self.findings()),
            ("## Training", self.training()),
            ("## Limits", self.limits()),
        ]
        body = [
            line
            for title, lines in sections
            if lines
            for line in ([title, ""] if title else []) + lines + [""]
        ]
        return f"---\n{self.metadata()}---\n\n" + "\n".join(body).rstrip() + "\n"

    def metadata(self) -> str:
        """The YAML that the hub reads."""
        trained = self.trained
        kinds = sorted({trained.kind(view) for view in trained.views})
        task = _TASKS.get(self.config.system, "feature-extraction")
        if self.format == "sentence-transformers" or (kinds == ["text"] and self.config.system != "aspects"):
            task = "sentence-similarity"
        elif kinds == ["image"]:
            task = "image-feature-extraction"
        about: Json = {"library_name": _LIBRARY[self.format], "pipeline_tag": task}
        if self.license:
            about["license"] = self.license
        about["tags"] = ["nearfar", "contrastive-learning", self.config.system, *kinds]
        results = [
            {
                "type": name.replace("/", "_"),
                "name": metric_words(name),
                "value": round(e.value, 4),
            }
            for name, e in self.estimates().items()
            if not e.trivial and not e.control and math.isfinite(e.value)
        ]
        if results:
            data = {"name": self._data_name(), "type": "custom", "split": self.split}
            entry = {"task": {"type": task}, "dataset": data, "metrics": results[:_MOST]}
            about["model-index"] = [{"name": self._name(), "results": [entry]}]
        return yaml.safe_dump(about, sort_keys=False, allow_unicode=True)

    # -- sections --------------------------------------------------------------------------------------------
    def what(self) -> list[str]:
        trained = self.trained
        many = len(trained.members)
        kind = f"An ensemble of {many} models" if many > 1 else "A model"
        lines = [
            f"# {self.plain(self._name())}",
            "",
            f"{kind} of the system `{self.config.system}` of nearfar, a toolkit for contrastive learning.",
        ]
        views = [
            (view, trained.kind(view), trained.system.towers[view].description) for view in trained.views
        ]
        if views:
            lines += [
                f"Each view is embedded as a unit vector of {trained.dim} numbers; similarity is their cosine.",
                "",
            ]
            lines += self.table(["view", "kind", "tower"], views)
        verdict = self._headline()
        return lines + (["", verdict] if verdict else [])

    def use(self) -> list[str]:
        name = "FOLDER"
        match self.format:
            case "safetensors":
                call = "model.predict(...)"
                if self.trained.views:
                    view = self.trained.views[0]
                    call = f"vectors = model.embed([...], tower={view!r})"
                code = [
                    "import nearfar",
                    "",
                    f'model = nearfar.load("{name}")  # or the name on the hub',
                    call,
                ]
                lead = "Weights are `model.safetensors`; nothing in this folder is pickled or runs code."
            case "sentence-transformers":
                code = [
                    "from sentence_transformers import SentenceTransformer",
                    "",
                    f'model = SentenceTransformer("{name}")',
                    'vectors = model.encode(["a text", "a second one"])',
                ]
                view = self.plain(self.details.get("tower", ""))
                lead = f"The tower of the view '{view}', with its head and normalisation."
            case "onnx":
                view, inputs = self._first_graph()
                given = ", ".join(f'"{each}": {each}' for each in inputs)
                code = [
                    "import onnxruntime",
                    "",
                    f'session = onnxruntime.InferenceSession("{name}/{view}/model.onnx")',
                    f'vectors = session.run(["vectors"], {{{given}}})[0]',
                ]
                lead = "`preprocessing.json` beside each graph says how its inputs are made; nearfar is not needed."
            case _:
                view, inputs = self._first_graph()
                code = [
                    "import torch",
                    "",
                    f'model = torch.export.load("{name}/{view}/model.pt2").module()',
                    f"vectors = model({', '.join(inputs)})",
                ]
                lead = "`preprocessing.json` beside each program says how its inputs are made; nearfar is not needed."
        lines = [lead, "", "```python", *(line.replace("```", "") for line in code), "```"]
        graphs = self.details.get("graphs") or {}
        if graphs:
            rows = [
                (
                    folder,
                    about["view"],
                    "; ".join(f"{i['name']} {i['dtype']} {_shape(i['shape'])}" for i in about["inputs"]),
                )
                for folder, about in graphs.items()
            ]
            lines += ["", *self.table(["folder", "view", "inputs"], rows)]
        return lines

    def data(self) -> list[str]:
        rows = []
        for name, split in (self.layout.get("splits") or {}).items():
            rejected = split.get("rejections") or {}
            rows.append(
                (
                    name,
                    Path(str(split.get("source", ""))).name,
                    split.get("rows", split.get("n", "")),
                    split.get("split_hash", split.get("content", "")),
                    rejected.get("total", 0) if isinstance(rejected, Mapping) else "",
                )
            )
        lines = self.table(["split", "source", "rows", "hash", "rejected rows"], rows) if rows else []
        if self.layout.get("data_hash"):
            lines += ["", f"Hash of all splits: `{self.plain(self.layout['data_hash'])}`."]
        leaks = [f"{pair}: {_count(what)}" for pair, what in (self.layout.get("leaks") or {}).items() if what]
        if leaks:
            lines += ["", f"Items that stand in two splits: {self.plain('; '.join(leaks))}."]
        return lines

    def results(self) -> list[str]:
        estimates = self.estimates()
        if not estimates:
            return ["This run has no metrics yet."]
        before = self._baselines()
        header = ["metric", "value", "95 % interval", "chance", "n", *before]
        header += ["changed by training"] if self.gain else []
        rows = []
        for name, e in list(estimates.items())[:_MOST]:
            note = " (control)" if e.control else " (trivial)" if e.trivial else ""
            gained = self.gain.get(name)
            changed = [_change(gained)] if self.gain else []
            beside = [short_number(each[name]) if name in each else "" for each in before.values()]
            rows.append(
                (
                    metric_words(name) + note,
                    short_number(e.value),
                    interval_words(e.low, e.high),
                    short_number(e.chance),
                    e.n,
                    *beside,
                    *changed,
                )
            )
        lead = f"On the split `{self.plain(self.split)}`, by the best checkpoint. Chance is what guessing scores."
        more = len(estimates) - _MOST
        return [lead, "", *self.table(header, rows)] + (
            [f"\n{more} further metrics are in `metrics.json`."] if more > 0 else []
        )

    def findings(self) -> list[str]:
        if not self.doctor:
            return ["The doctor has not judged this run."]
        lines = [f"{self.plain(self.doctor.get('verdict', ''))}", ""]
        for finding in self.doctor.get("findings") or []:
            evidence = finding.get("evidence") or {}
            text = evidence.get("text", "") if isinstance(evidence, Mapping) else evidence
            title = str(finding.get("title") or finding.get("id", "")).rstrip(".")
            lines.append(
                f"- **{self.plain(finding.get('severity', 'note'))}**: {self.plain(title)}. {self.plain(text)}"
            )
        return lines if len(lines) > 2 else lines[:1]

    def training(self) -> list[str]:
        values = to_dict(self.config)
        shown = {
            key: value
            for key, value in values.items()
            if key not in _NOT_SHOWN and not isinstance(value, Mapping) and value is not None
        }
        groups = {
            key: value.get("name") or value.get("kind")
            for key, value in values.items()
            if isinstance(value, Mapping) and key not in ("trainer", "data")
        }
        shown |= {key: value for key, value in groups.items() if value}
        rows = [(key, value) for key, value in shown.items() if value not in ([], {}, "")]
        packages = self.environment.get("packages") or {}
        versions = ", ".join(f"{name} {version}" for name, version in packages.items())
        devices = self.environment.get("devices") or ["CPU"]
        took = self.metrics.get("train_seconds")
        lines = self.table(["option", "value"], rows)
        lines += [
            "",
            f"Trained on {self.plain(', '.join(map(str, devices)))}"
            + (f" in {took:.0f} s" if took else "")
            + ".",
        ]
        return lines + ([f"With {self.plain(versions)}."] if versions else [])

    def limits(self) -> list[str]:
        lines = []
        splits = self.metrics.get("splits", {})
        if splits and "test" not in splits:
            lines.append(
                "- There was no test split: the results are of the split by which the epoch was chosen, and are "
                "optimistic."
            )
        if len(self.trained.members) == 1:
            lines.append(
                "- One training with one seed: how much results differ between seeds was not measured."
            )
        lines.append("- Results are of data like that of training; on other data nothing was measured.")
        if not self.metrics.get("groups"):
            lines.append("- Whether it serves groups of people or items differently was not measured.")
        unjudged = self.doctor.get("unjudged") or []
        if unjudged:
            lines.append(
                f"- {len(unjudged)} rules of the doctor could not be judged from what the run recorded."
            )
        frozen = [
            view
            for view in self.trained.views
            if self.trained.system.towers[view].train in ("head", "frozen")
        ]
        if frozen:
            lines.append(
                f"- The encoder of {self.plain(', '.join(frozen))} was not trained; what it learned elsewhere, its "
                "biases included, is part of this model, and its own license holds for it."
            )
        if not self.license:
            lines.append("- No license is stated: add one to the metadata before you publish.")
        return lines

    # -- numbers ---------------------------------------------------------------------------------------------
    def estimates(self) -> dict[str, Estimate]:
        """Those of the reported split, the monitored metric first, controls last."""
        content = self.metrics.get("splits", {}).get(self.split, {})
        known = {name: Estimate.from_dict(each) for name, each in content.items()}
        monitor = self.metrics.get("monitor")
        return dict(sorted(known.items(), key=lambda item: (item[0] != monitor, item[1].control)))

    def _baselines(self) -> dict[str, dict[str, float]]:
        """By name of the baseline its value of each metric; first those of the model before training."""
        columns: dict[str, dict[str, float]] = {}
        start = (self.metrics.get("before_training") or {}).get(self.split)
        if start:
            columns["before training"] = {
                name: Estimate.from_dict(content).value for name, content in start.items()
            }
        for metric, content in (self.metrics.get("baselines") or {}).get(self.split, {}).items():
            if isinstance(content, Mapping) and isinstance(content.get("value"), int | float):
                columns.setdefault(str(content.get("name", "baseline")), {})[metric] = float(content["value"])
        return columns

    def _headline(self) -> str:
        name = self.metrics.get("monitor")
        e = self.estimates().get(name) if name else None
        if e is None:
            return ""
        words = f"{self.plain(metric_words(str(name)))} on {self.plain(self.split)}"
        value = f"**{short_number(e.value)}** {interval_words(e.low, e.high)} (95 % interval)"
        gain = gain_sentence(self.metrics)
        lines = f"{words}: {value}, chance {short_number(e.chance)}, n = {e.n}."
        return f"{lines} {self.plain(gain)}." if gain else lines

    def _name(self) -> str:
        return str(self.config.name or self.trained.name)

    def _data_name(self) -> str:
        sources = [
            Path(str(each.get("source", ""))).name for each in (self.layout.get("splits") or {}).values()
        ]
        return next((each for each in sources if each), "own data")

    def _first_graph(self) -> tuple[str, list[str]]:
        graphs = self.details.get("graphs") or {}
        folder = next(iter(graphs), "VIEW")
        return folder, [each["name"] for each in graphs.get(folder, {}).get("inputs", [])]


def _change(gain: Json | None) -> str:
    """What training changed in a metric."""
    if gain is None:
        return ""
    return f"{gain['value']:+.3f} [{gain['low']:+.3f}, {gain['high']:+.3f}] {gain['verdict']}"


def _shape(shape: Sequence[int | str]) -> str:
    return f"({', '.join(map(str, shape))})"


def _count(what: object) -> str:
    if isinstance(what, Mapping):
        return ", ".join(
            f"{name} {value.get('shared', value) if isinstance(value, Mapping) else value}"
            for name, value in what.items()
        )
    return str(what)
