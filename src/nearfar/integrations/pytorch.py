"""Any training loop, watched: ten lines write a run folder that ``nearfar doctor``, ``compare`` and ``report`` read."""

from __future__ import annotations

import io
import json
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import yaml
from torch import Tensor, nn
from torch.nn.functional import normalize

from nearfar.data.files import Json, make_folder, write_atomically
from nearfar.doctor import Diagnosis, diagnose
from nearfar.doctor.run import WATCHED
from nearfar.errors import NearfarError, nearest_name
from nearfar.integrations._weight_movement import WeightMovement
from nearfar.metrics import (
    Estimate,
    embedding_health,
    rank_estimates,
    retrieval_ranks,
    split_hash,
)
from nearfar.training.evaluation import gains
from nearfar.training.probe import preserve_state
from nearfar.training.run_folder import RunFolder, environment
from nearfar.training.system import Evaluation

__all__ = ["Monitor", "Scores", "retrieval_scores"]

SYSTEM = WATCHED
#: the embeddings and scores before the first step, for a run that is resumed
START = "start.npz"
#: difference of two columns of logits, as a share of their spread, that rounding makes of copies; rows compared
COPIED, MOST_COPIES = 1e-5, 256


@dataclass
class Scores:
    """What an evaluation gives: estimates (or plain numbers) by metric, and, for paired comparison, the score of every
    item under each, in the order of ``ids``."""

    estimates: Mapping[str, Estimate | float]
    per_item: Mapping[str, np.ndarray] = field(default_factory=dict)
    ids: Sequence[str] = ()

    @classmethod
    def of(cls, value: Scores | Mapping[str, Estimate | float]) -> Scores:
        """From a mapping of metrics; ``NearfarError`` for anything else."""
        if not isinstance(value, (Scores, Mapping)):
            raise NearfarError(
                f"the scores of validation are a {type(value).__name__}: evaluate is to return Scores (as "
                "retrieval_scores gives them) or a dictionary of numbers by metric."
            )
        return value if isinstance(value, Scores) else cls(dict(value))

    @property
    def values(self) -> dict[str, float]:
        """The numbers alone."""
        return {
            name: float(each.value if isinstance(each, Estimate) else each)
            for name, each in self.estimates.items()
        }


def retrieval_scores(
    queries: Tensor,
    keys: Tensor,
    relevant: object = None,
    *,
    ks: Sequence[int] = (1, 5, 10),
    ids: Sequence[str] | None = None,
    bootstrap: int = 1000,
) -> Scores:
    """R@k and MRR of queries among keys with interval and chance level, and each query's own scores.

    Args:
        queries, keys: embeddings (n, d) and (m, d); row i of the one belongs to row i of the other unless ``relevant``
            (labels of both, a mask, lists: `nearfar.metrics.retrieval_metrics`) says otherwise.
        ids: names of the queries, by which runs are compared; None: their positions.
        bootstrap: draws for the interval of the MRR.

    >>> x = torch.eye(8)
    >>> scores = retrieval_scores(x, x + 0.01, bootstrap=100)
    >>> scores.values["R@1"], scores.per_item["MRR"].shape
    (1.0, (8,))
    """
    ranks = retrieval_ranks(queries, keys, relevant)
    names = [str(i) for i in range(len(queries))] if ids is None else [str(each) for each in ids]
    estimates = rank_estimates(ranks, ks, bootstrap=bootstrap, split=split_hash(names))
    per_item: dict[str, np.ndarray] = {}
    if len(ranks.queries) == len(names):
        per_item = {f"R@{k}": ranks.hits(k) for k in ks} | {"MRR": ranks.reciprocal()}
    return Scores(estimates, per_item, names)


class Monitor:
    """Watches a training loop: loss, gradient norm, embeddings of some rows, and the score before training.

    Args:
        model: the module that is trained; its gradient norm is logged.
        probe: rows that are looked at again and again: what ``model(probe)`` embeds, or a function of the model that
            gives the embeddings of fixed rows: a tensor, or one for each view (a dictionary, a tuple). None: no probes.
        folder: where the run is written; not a folder that holds anything else.
        evaluate: gives the scores of validation, `Scores` or a mapping of metrics to estimates or numbers; called
            before the first step, at every `epoch` and at the end. None: hand scores to `epoch` and `finish`.
        config: what is known of the run: ``batch_size``, ``lr``, ``temperature``, …; options of your own too, by which
            ``nearfar compare`` tells arms apart.
        seed: of the run; runs that differ in it alone are repeats.
        monitor: the metric that matters; None: the first.
        log_every: steps between records.
        probe_every: steps between probes; None: one an epoch.
        resume: the step at which an earlier part of this run is gone on with, which wrote into ``folder``: its log up
            to there, the score before training and the first look at the embeddings are kept. 0: a new run.

    The model is left as it is found: probes run in eval mode without gradients, and generators and buffers are put
    back.

    >>> import tempfile
    >>> model, x, y = nn.Linear(8, 4), torch.randn(32, 8), torch.randn(32, 4)
    >>> from nearfar.losses import InfoNCELoss
    >>> loss_of, optimizer = InfoNCELoss(), torch.optim.SGD(model.parameters(), 0.1)
    >>> scores = lambda: retrieval_scores(model(x), y, bootstrap=100)
    >>> folder = Path(tempfile.mkdtemp()) / "run"
    >>> watch = Monitor(model, x, folder, evaluate=scores, config={"batch_size": 32})
    >>> for epoch in range(2):
    ...     for step in range(20):
    ...         loss = loss_of(model(x), y)
    ...         optimizer.zero_grad(); loss.backward()
    ...         watch.step(loss, record=loss_of.record)
    ...         optimizer.step()
    ...     scored = watch.epoch()
    >>> diagnosis = watch.finish()
    >>> sorted(path.name for path in folder.iterdir())[:4]
    ['config.yaml', 'dataset_layout.json', 'doctor.json', 'environment.json']
    """

    def __init__(
        self,
        model: nn.Module,
        probe: object = None,
        folder: str | os.PathLike[str] = "runs/watched",
        *,
        evaluate: Callable[[], Scores | Mapping[str, Estimate | float]] | None = None,
        config: Mapping[str, object] | None = None,
        seed: int = 0,
        monitor: str | None = None,
        log_every: int = 10,
        probe_every: int | None = None,
        resume: int = 0,
    ) -> None:
        if log_every < 1 or (probe_every is not None and probe_every < 1):
            raise NearfarError(
                f"log_every={log_every}, probe_every={probe_every}: at least 1 step is needed."
            )
        self.model, self.probe, self.evaluate = model, probe, evaluate
        self.folder = RunFolder(Path(folder))
        self.monitor, self.log_every, self.probe_every = monitor, log_every, probe_every
        self.steps = 0
        self.epochs = 0
        self.before: Scores | None = None
        self.best: tuple[int, float] | None = None
        self._first: dict[str, Tensor] = {}
        self._losses: list[Tensor] = []
        self._weights = WeightMovement(model)
        self._looked: Json = {}
        self._in_training = False
        self._started = self._epoch_started = time.perf_counter()
        self._logged = (resume, self._started)
        goes_on = resume > 0 and self._take_up(resume)
        self._begin(dict(config or {}), seed, goes_on)

    def _take_up(self, step: int) -> bool:
        """Go on with what an earlier part of the run wrote up to ``step``; False where there is nothing of it."""
        self.steps = step
        if not (self.folder.is_run and self.folder.has("train_log.jsonl")):
            return False
        self.folder.keep_log_until(step)
        self.epochs = sum(each.get("kind") == "epoch" for each in self.folder.log())
        (self.folder.path / "metrics.json").unlink(missing_ok=True)
        if self.folder.has(START):
            start = self.folder.read_arrays(START)
            self._first = {n[6:]: torch.from_numpy(a) for n, a in start.items() if n.startswith("probe/")}
            if "estimates" in start:
                records = json.loads(str(start["estimates"]))
                per_item = {n[5:]: a for n, a in start.items() if n.startswith("item/")}
                estimates = {name: Estimate.from_dict(each) for name, each in records.items()}
                self.before = Scores(estimates, per_item, [str(each) for each in start["ids"]])
        return True

    def _begin(self, config: Json, seed: int, goes_on: bool) -> None:
        self.folder.check_own()
        make_folder(self.folder.path)
        if not goes_on:
            self.folder.clear()
            (self.folder.path / START).unlink(missing_ok=True)
        plain = {name: value for name, value in config.items() if _is_plain(value)}
        strange = sorted(set(config) - set(plain))
        if strange:
            raise NearfarError(
                f"config: {', '.join(strange)} is no plain value (number, text, list or dictionary of these): give its "
                "name."
            )
        content = {"system": SYSTEM, "seed": int(seed), "trainer": {}, "overrides": [], **plain}
        self.folder.write_text("config.yaml", yaml.safe_dump(content, sort_keys=False, allow_unicode=True))
        self.folder.write_json("environment.json", environment())
        modules = list(self.model.modules())
        norms = (nn.modules.batchnorm._BatchNorm,)
        self.folder.write_json(
            "model.json",
            {
                "parameters": sum(p.numel() for p in self.model.parameters()),
                "trained_parameters": sum(p.numel() for p in self.model.parameters() if p.requires_grad),
                "batchnorm": sum(isinstance(module, norms) for module in modules),
            },
        )
        if not goes_on:
            self.folder.write_text("train_log.jsonl", "")

    # -- training --------------------------------------------------------------------------------------------
    def start(self) -> None:
        """Look at the embeddings and take the score before the first step; `step` does it where nobody has."""
        if self._first or self.before is not None:
            return
        self._probe(epoch=1)
        if self.evaluate is not None:
            self.before = self.scores()
            self._watched(self.before)  # a wrong name is an error before anything is trained
            self.folder.append({"kind": "start", "step": 0, "val": self.before.values})
        self._keep_start()

    def _keep_start(self) -> None:
        """What a run that is resumed needs of its beginning."""
        arrays: dict[str, np.ndarray] = {f"probe/{name}": each.numpy() for name, each in self._first.items()}
        if self.before is not None:
            records = {name: _estimate(name, each).to_dict() for name, each in self.before.estimates.items()}
            arrays["estimates"] = np.asarray(json.dumps(records), dtype=np.str_)
            arrays["ids"] = np.asarray(list(self.before.ids), dtype=np.str_)
            arrays |= {f"item/{name}": np.asarray(each) for name, each in self.before.per_item.items()}
        if arrays:
            self._write_arrays(START, arrays)

    def _write_arrays(self, name: str, arrays: Mapping[str, np.ndarray]) -> None:
        buffer = io.BytesIO()
        np.savez_compressed(buffer, **arrays)  # type: ignore[arg-type]  # numpy's stub wants allow_pickle first
        write_atomically(self.folder.path / name, lambda file: file.write(buffer.getvalue()))

    def step(
        self,
        loss: Tensor | float,
        *,
        record: object = None,
        lr: float | None = None,
        gradient_norm: float | Tensor | None = None,
        logits: Tensor | None = None,
        **fields: float,
    ) -> None:
        """Count a step, after its backward pass and before the optimiser moves the weights.

        Args:
            loss: of the step.
            record: ``loss_fn.record`` of a nearfar loss, or a mapping of the doctor's fields (``candidates``, …).
            lr: learning rate.
            gradient_norm: where it is known; None: computed from the model's gradients in logged steps.
            logits: (n, m) what the loss is the cross-entropy of, column i being the positive of row i: of a loss
                without a record the number of candidates, the probability of the positive, and copies among the keys.
            fields: further fields of the log.
        """
        if self.steps == 0:
            self.start()
        self.steps += 1
        value = loss.detach() if isinstance(loss, Tensor) else torch.tensor(float(loss))
        self._losses.append(value.float().reshape(()))
        if self.steps % self.log_every == 0 or self.steps == 1:
            now = time.perf_counter()
            entry: Json = {"kind": "step", "epoch": self.epochs + 1, "step": self.steps, "loss": float(value)}
            if lr is not None:
                entry["lr"] = float(lr)
            norm = self._gradient_norm() if gradient_norm is None else float(gradient_norm)
            if norm is not None:
                entry["gradient_norm"] = norm
            if self.steps > self._logged[0] + 1:
                entry["seconds_per_step"] = round((now - self._logged[1]) / (self.steps - self._logged[0]), 6)
            self._logged = (self.steps, now)
            entry |= (
                self._temperature() | self._weights.look() | ({} if logits is None else _of_logits(logits))
            )
            self.folder.append(entry | _record(record) | {name: float(each) for name, each in fields.items()})
        if self.probe_every and self.steps % self.probe_every == 0:
            self._probe(self.epochs + 1)

    def look_at_weights(self) -> None:
        """See which weights have a gradient and move, after a backward pass and before the optimiser's step; `step`
        does it in logged steps."""
        self._looked = self._weights.look()

    def log(self, step: int, *, record: object = None, **fields: float) -> None:
        """Log a step of a trainer that counts its steps and averages its losses itself.

        Args:
            step: how many steps were made.
            record: as in `step`.
            fields: of the log: ``loss``, ``lr``, ``gradient_norm``, …
        """
        self.steps = step
        now = time.perf_counter()
        entry: Json = {"kind": "step", "epoch": self.epochs + 1, "step": step}
        if step > self._logged[0]:
            entry["seconds_per_step"] = round((now - self._logged[1]) / (step - self._logged[0]), 6)
        self._logged = (step, now)
        entry |= self._looked
        self._looked = {}
        if "loss" in fields:
            self._losses.append(torch.tensor(float(fields["loss"])))
        self.folder.append(entry | _record(record) | {name: float(each) for name, each in fields.items()})

    def epoch(
        self, metrics: Scores | Mapping[str, Estimate | float] | None = None, **fields: float
    ) -> dict[str, float]:
        """End an epoch: probe, evaluate (unless ``metrics`` are given) and log, with further ``fields`` such as
        ``val_loss``; returns the metrics' values."""
        self.epochs += 1
        if not self.probe_every:
            self._probe(self.epochs)
        scores = (
            Scores.of(metrics)
            if metrics is not None
            else self.scores()
            if self.evaluate is not None
            else None
        )
        losses = torch.stack(self._losses).cpu() if self._losses else torch.zeros(0)
        entry: Json = {"kind": "epoch", "epoch": self.epochs, "step": self.steps, **fields}
        if len(losses):
            entry["train_loss"] = float(losses.mean())
        entry["seconds"] = round(time.perf_counter() - self._epoch_started, 3)
        self._epoch_started, self._losses = time.perf_counter(), []
        if scores is not None:
            entry["val"] = scores.values
            self._keep_best(scores)
        if self.evaluate is not None:
            entry["evaluated_in_training"] = int(self._in_training)
        self.folder.append(entry | self._weights.summary())
        self._logged = (self.steps, time.perf_counter())
        return {} if scores is None else scores.values

    def finish(
        self,
        metrics: Scores | Mapping[str, Estimate | float] | None = None,
        test: Scores | Mapping[str, Estimate | float] | None = None,
    ) -> Diagnosis:
        """Write the final scores of validation (``metrics``, or by ``evaluate``) and of a test split; then diagnose.

        The scores stand beside those before training, with an interval on the paired difference where there are scores
        of every item.
        """
        splits: dict[str, Scores] = {}
        if metrics is not None or self.evaluate is not None:
            splits["val"] = Scores.of(metrics) if metrics is not None else self.scores()
        if test is not None:
            splits["test"] = Scores.of(test)
        if splits:
            self._write(splits)
        diagnosis = diagnose(self.folder.path)
        self.folder.write_json("doctor.json", diagnosis.to_dict())
        return diagnosis

    # -- parts -----------------------------------------------------------------------------------------------
    def _gradient_norm(self) -> float | None:
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        if not gradients:
            trained = any(p.requires_grad for p in self.model.parameters())
            return 0.0 if trained else None
        return float(torch.nn.utils.get_total_norm(gradients))

    def _temperature(self) -> Json:
        """Scale or temperature that the model learns, where a parameter of one number has a usual name."""
        for name, parameter in self.model.named_parameters():
            if parameter.numel() != 1:
                continue
            value, last = float(parameter.detach()), name.rpartition(".")[2]
            if last in ("logit_scale", "log_scale"):  # the logarithm, as CLIP has it
                return {"scale": math.exp(min(value, 700.0))}
            if last in ("temperature", "temp", "tau") and value > 0:
                return {"temperature": value}
        return {}

    def _embeddings(self) -> dict[str, Tensor]:
        given = self.probe(self.model) if callable(self.probe) else self.model(self.probe)
        if isinstance(given, Tensor):
            given = {"embeddings": given}
        elif isinstance(given, (tuple, list)):
            given = {f"view{i}": each for i, each in enumerate(given)}
        known = given.items() if isinstance(given, Mapping) else ()
        views = {str(name): each for name, each in known if isinstance(each, Tensor) and each.ndim == 2}
        if not views:
            raise NearfarError(
                "the probe gives no embeddings: a tensor (rows, d), or one for each view, is needed."
            )
        return {name: each.detach().float().cpu() for name, each in views.items()}

    def _probe(self, epoch: int) -> None:
        if self.probe is None:
            return
        with preserve_state(self.model):
            views = self._embeddings()
        entry: Json = {"kind": "probe", "epoch": epoch, "step": self.steps, "probe_split": "val",
                       "probe_rows": len(next(iter(views.values())))}  # fmt: skip
        bad = [name for name, view in views.items() if not bool(view.isfinite().all())]
        if bad:
            self.folder.append(entry | {"finite": False})
            return
        health: Json = dict(embedding_health(views))
        if not self._first:
            self._first = views
        for name, view in views.items():
            first = self._first.get(name)
            if first is not None and first.shape == view.shape and self.steps:
                same = (normalize(first, dim=1) * normalize(view, dim=1)).sum(1)
                health[f"{name}/moved"] = max(0.0, 1.0 - float(same.double().mean()))
        self.folder.append(entry | health)

    def scores(self) -> Scores:
        """The scores of validation as the model stands, which is left as it is found."""
        if self.evaluate is None:
            raise NearfarError("evaluate is None: give a function that gives the scores of validation.")
        with preserve_state(self.model):
            scores = Scores.of(self.evaluate())
            self._in_training |= any(module.training for module in self.model.modules() if _differs(module))
        return scores

    def _watched(self, scores: Scores) -> str:
        name = self.monitor or next(iter(scores.estimates))
        if name not in scores.estimates:
            raise NearfarError(
                f"monitor={name!r}: no metric has this name; {nearest_name(name, scores.estimates)}"
            )
        return name

    def _keep_best(self, scores: Scores) -> None:
        name = self._watched(scores)
        estimate, value = scores.estimates[name], scores.values[name]
        rises = estimate.higher_is_better if isinstance(estimate, Estimate) else True
        if self.best is None or (value > self.best[1] if rises else value < self.best[1]):
            self.best = (self.epochs, value)

    def _write(self, splits: Mapping[str, Scores]) -> None:
        arrays: dict[str, np.ndarray] = {}
        estimates: dict[str, dict[str, Json]] = {}
        for split, scores in splits.items():
            estimates[split] = {
                name: _estimate(name, each).to_dict() for name, each in scores.estimates.items()
            }
            if scores.per_item:
                n = len(next(iter(scores.per_item.values())))
                ids = list(scores.ids) or [str(i) for i in range(n)]
                arrays[f"{split}/ids"] = np.asarray(ids, dtype=np.str_)
                for name, values in scores.per_item.items():
                    arrays[f"{split}/{name}"] = np.asarray(values, dtype=np.float32)
        self._write_arrays("per_item.npz", arrays)
        hashes = {split: split_hash(scores.ids) for split, scores in splits.items() if scores.ids}
        layout = {name: {"rows": len(splits[name].ids), "split_hash": each} for name, each in hashes.items()}
        self.folder.write_json("dataset_layout.json", {"system": SYSTEM, "data_hash": None, "splits": layout})
        last = splits["val" if "val" in splits else "test"]
        self.folder.write_json("examples.json", [])
        self.folder.write_json("sections.json", [])
        about: Json = {
            "system": SYSTEM,
            "monitor": self._watched(last),
            "best_epoch": None if self.best is None else self.best[0],
            "epochs": self.epochs,
            "steps": self.steps,
            "train_seconds": round(time.perf_counter() - self._started, 2),
        }
        evaluations = {split: self._evaluation(split, scores) for split, scores in splits.items()}
        start = {} if self.before is None else {"val": self._evaluation("val", self.before)}
        self.folder.write_json("metrics.json", about | gains(evaluations, start) | {"splits": estimates})

    def _evaluation(self, split: str, scores: Scores) -> Evaluation:
        estimates = {name: _estimate(name, each) for name, each in scores.estimates.items()}
        return Evaluation(split, estimates, list(scores.ids), scores.per_item)


def _differs(module: nn.Module) -> bool:
    """Whether a module computes something else in training mode."""
    if isinstance(module, nn.modules.dropout._DropoutNd):
        return module.p > 0
    return isinstance(module, nn.modules.batchnorm._BatchNorm)


def _of_logits(logits: Tensor) -> Json:
    """What a matrix of logits says of a step: row i's positive is column i."""
    if logits.ndim != 2 or logits.shape[0] > logits.shape[1]:
        raise NearfarError(
            f"logits of shape {tuple(logits.shape)}: a matrix (n, m) is needed, whose column i is row i's positive."
        )
    values = logits.detach().float()
    n, m = values.shape
    positive = values.diagonal()
    fields: Json = {
        "candidates": m,
        "uniform_level": math.log(m),
        "p_positive": float((positive - values.logsumexp(1)).exp().mean()),
        "largest_logit": float(values.abs().max()),
    }
    spread = (values - values.mean(1, keepdim=True)).abs().max()
    if spread > COPIED * values.abs().max():  # otherwise all keys are one, and no copies
        apart = (values[:, None, :n] - values[:, :n, None]).abs().amax(0) if n <= MOST_COPIES else None
        if apart is not None:
            copies = (apart <= COPIED * spread).fill_diagonal_(False)
            fields["duplicate_keys"] = float(copies.any(1).float().mean())
    return fields


def _estimate(name: str, value: Estimate | float) -> Estimate:
    """A plain number is an estimate without interval: nothing is known of its chance level."""
    if isinstance(value, Estimate):
        return value
    nothing = math.nan
    return Estimate(float(value), nothing, nothing, nothing, 0, False, name, {})


def _record(record: object) -> Json:
    """The fields of a nearfar loss's record, or of a mapping."""
    if record is None:
        return {}
    given = record.to_dict() if hasattr(record, "to_dict") else record
    if not isinstance(given, Mapping):
        raise NearfarError(
            f"record is a {type(record).__name__}: give loss.record, or a mapping of fields to numbers."
        )
    return {str(name): value.item() if isinstance(value, Tensor) else value for name, value in given.items()}


def _is_plain(value: object) -> bool:
    if isinstance(value, Mapping):
        return all(isinstance(name, str) and _is_plain(each) for name, each in value.items())
    if isinstance(value, (list, tuple)):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, (bool, int, float, str))
