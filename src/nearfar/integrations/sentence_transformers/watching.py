"""An evaluator for sentence-transformers whose scores have an interval and a chance level, and a callback."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sentence_transformers import SentenceTransformer
from sentence_transformers.base.evaluation import BaseEvaluator
from torch import Tensor, nn

from nearfar.data.files import Json
from nearfar.errors import NearfarError
from nearfar.integrations.pytorch import Scores, retrieval_scores
from nearfar.integrations.sentence_transformers.batches import HardBatches, PartitionBatches, UniqueBatches
from nearfar.integrations.transformers import WatchCallback

if TYPE_CHECKING:
    from transformers import TrainerControl, TrainerState, TrainingArguments

__all__ = ["RetrievalEvaluator", "Watch"]

#: similarity from which a pair of a batch is counted as likely positives, where the batches have no threshold
LIKELY = 0.95
#: what nearfar's own runs call these samplers
NAMES: dict[type, str] = {HardBatches: "hard", PartitionBatches: "partition", UniqueBatches: "unique"}


class RetrievalEvaluator(BaseEvaluator):
    """Recall@k and MRR of queries among documents, each with interval and chance level.

    The trainer is given the values; ``scores`` (`Scores`) holds the estimates and the score of every query of the last
    evaluation, and a file beside the trainer's evaluations the estimates of each.

    Args:
        queries, documents: texts; document i belongs to query i unless ``relevant`` says otherwise.
        relevant: labels of both, a mask, or lists, as in `nearfar.metrics.retrieval_metrics`.
        ids: names of the queries, by which runs are compared; None: their positions.
        ks: of recall@k.
        name: prefix of the metrics.
        batch_size: texts that are encoded at a time.
        bootstrap: draws for the interval of the MRR.
    """

    def __init__(
        self,
        queries: Sequence[str],
        documents: Sequence[str],
        relevant: object = None,
        *,
        ids: Sequence[str] | None = None,
        ks: Sequence[int] = (1, 5, 10),
        name: str = "",
        batch_size: int = 32,
        bootstrap: int = 1000,
    ) -> None:
        super().__init__()
        self.queries, self.documents, self.relevant = list(queries), list(documents), relevant
        if not self.queries or not self.documents:
            raise NearfarError(
                f"RetrievalEvaluator was given {len(self.queries)} queries and {len(self.documents)} documents: at "
                "least one of each is needed."
            )
        if relevant is None and len(self.queries) != len(self.documents):
            raise NearfarError(
                f"RetrievalEvaluator was given {len(self.queries)} queries and {len(self.documents)} documents, and "
                "document i belongs to query i: give as many of both, or state in relevant= which belong together."
            )
        self.ids, self.ks, self.name = ids, tuple(ks), name
        self.batch_size, self.bootstrap = batch_size, bootstrap
        self.primary_metric = f"{name}_MRR" if name else "MRR"
        self.scores: Scores | None = None
        self.step = -1

    def score(self, model: SentenceTransformer) -> Scores:
        """The estimates, and each query's own scores, of a model as it stands."""

        def encode(how: Callable[..., Tensor], texts: list[str]) -> Tensor:
            options = {"batch_size": self.batch_size, "show_progress_bar": False, "convert_to_tensor": True}
            return how(texts, **options).detach().float().cpu()

        queries = encode(model.encode_query, self.queries)
        documents = encode(model.encode_document, self.documents)
        return retrieval_scores(
            queries, documents, self.relevant, ks=self.ks, ids=self.ids, bootstrap=self.bootstrap
        )

    def __call__(
        self,
        model: Any,
        output_path: str | None = None,
        epoch: int = -1,
        steps: int = -1,
    ) -> dict[str, float]:
        self.scores, self.step = self.score(model), steps
        metrics = self.prefix_name_to_metrics(self.scores.values, self.name)
        self.store_metrics_in_model_card_data(model, metrics, epoch, steps)
        if output_path is not None:
            records = {n: e.to_dict() for n, e in self.scores.estimates.items() if not isinstance(e, float)}
            line = json.dumps({"epoch": epoch, "steps": steps, "estimates": records})
            name = f"retrieval_{self.name}_estimates.jsonl" if self.name else "retrieval_estimates.jsonl"
            with (Path(output_path) / name).open("a", encoding="utf-8") as file:
                file.write(line + "\n")
        return metrics

    def get_config_dict(self) -> Json:
        return {"queries": len(self.queries), "documents": len(self.documents), "ks": list(self.ks)}


class Watch(WatchCallback):
    """Watches a ``SentenceTransformerTrainer`` and ends with the doctor's verdict; see `WatchCallback`.

    Args:
        folder: where the run is written.
        evaluator: the trainer's own, or any of sentence-transformers; a `RetrievalEvaluator` gives intervals, chance
            levels and the paired gain over the score before training. None: what the trainer evaluates.
        probe: texts whose embeddings are looked at again and again; None: the first queries of a
            `RetrievalEvaluator`, otherwise none.
        loss: the trainer's loss; what it says of each step goes into the log, and what it learns (a temperature, a
            bias) into the trainer's checkpoints and back.
        batches: the trainer's ``batch_sampler``, whose measured hardness is logged at every epoch.
        options: further ones of `WatchCallback`: ``monitor``, ``config``, ``quiet``.
    """

    def __init__(
        self,
        folder: str | Path = "runs/watched",
        *,
        evaluator: BaseEvaluator | None = None,
        probe: Sequence[str] | None = None,
        loss: nn.Module | None = None,
        batches: object = None,
        **options: Any,
    ) -> None:
        self.evaluator, self.batches = evaluator, batches
        if probe is None and isinstance(evaluator, RetrievalEvaluator):
            probe = evaluator.queries[:256]
        texts = None if probe is None else list(probe)
        evaluate = None if evaluator is None else self._score
        watched = None if texts is None else lambda model: self._texts(model, texts)
        super().__init__(folder, probe=watched, evaluate=evaluate, loss=loss, **options)

    @staticmethod
    def _texts(model: SentenceTransformer, texts: list[str]) -> Tensor:
        return model.encode(texts, convert_to_tensor=True, show_progress_bar=False)

    def _score(self, model: SentenceTransformer) -> Scores:
        assert self.evaluator is not None
        if isinstance(self.evaluator, RetrievalEvaluator):
            return self.evaluator.score(model)
        value = self.evaluator(model)
        return Scores(value if isinstance(value, dict) else {"score": float(value)})

    def _latest(self, step: int) -> Scores | None:
        """The trainer has evaluated these rows at this step already."""
        evaluator = self.evaluator
        if isinstance(evaluator, RetrievalEvaluator) and evaluator.step == step:
            return evaluator.scores
        return None

    def _about(self) -> Json:
        if self.batches is None:
            return {}
        sampler: Json = {"name": NAMES.get(type(self.batches), type(self.batches).__name__)}
        for option, value in vars(self.batches).items():
            if value is None or isinstance(value, (bool, int, float, str)):
                sampler[option] = value
        sampler.pop("left", None)  # a result
        return {"sampler": sampler}

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Log how hard the batches of the epoch are."""
        epoch = int(state.epoch or 0)
        if self.watch is None or not isinstance(self.batches, (HardBatches, PartitionBatches)):
            return
        log = self.watch.folder.log()
        if any(each.get("kind") == "plan" and each.get("epoch") == epoch + 1 for each in log):
            return  # resumed in the middle of it
        threshold = self.batches.false_negative_threshold
        report = self.batches.hardness(epoch, LIKELY if threshold is None else threshold)
        self.watch.folder.append(
            {
                "kind": "plan",
                "epoch": epoch + 1,
                "step": int(state.global_step),
                "sampler": NAMES[type(self.batches)],
                "composes_hard_batches": True,
                "random_phase": epoch < self.batches.curriculum_epoch,
                "hardness": report.neighbors_by_quarter,
                "hardness_random": report.random,
                "hardness_neighbors": report.k,
                "last_to_first": report.last_to_first,
                "nominal_hard": report.nominal,
                "realised_hard": report.hard_share_by_quarter,
                "false_negatives": report.false_negatives,
                "anchors_with_false_negative": report.anchors_hit,
                "false_negative_threshold": report.threshold,
            }
        )
