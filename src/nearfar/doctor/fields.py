"""The names that the doctor knows: what a log may hold, and what is said of a run as a whole.

``*`` stands for a name that the run chooses: an objective's term, a view of the embeddings, a group, a metric.
"""

from __future__ import annotations

import re
from functools import lru_cache

__all__ = [
    "CONTEXT",
    "FIELDS",
    "LISTED",
    "NUMBERS",
    "OF_AN_EPOCH",
    "SWITCHES",
    "TEXTS",
    "WORDS",
    "is_field",
    "is_text",
    "matches",
]

#: fields of a log, by where ``nearfar train`` writes them
FIELDS: dict[str, dict[str, str]] = {
    "step": {
        "loss": "the training loss of the step, in nats",
        "lr": "learning rate",
        "candidates": "keys each query chose from, its positives included",
        "positives_per_row": "mean number of positives",
        "positives_min": "least number of positives",
        "rows_without_positives": "rows that have none, and are left out",
        "rows": "rows of the batch, of this process",
        "world_size": "processes that train together",
        "rows_without_negatives": "rows that a mask leaves no negative",
        "masked_per_row": "negatives of a query that a mask leaves out",
        "debias_clamped": "share of rows whose debiased sum of negatives stands at its least",
        "p_positive": "probability given to the positive",
        "hardest_share": "share of the push that goes to the hardest negative",
        "uniform_level": "what guessing costs",
        "floor": "the least the loss can be",
        "scale": "1 / temperature",
        "temperature": "read where no `scale` is logged",
        "scale_max": "where the scale is clamped",
        "at_clamp": "1 where the scale stands there",
        "largest_logit": "scale × largest cosine, or its bound",
        "finite": "false where the loss is infinite or not a number",
        "rows_with_neighbors": "share of rows whose target has mass on neighbours",
        "anchors": "rows that a loss by score takes as anchors",
        "positives": "rows that it takes as positives",
        "middle_share": "share of rows that it takes as neither",
        "scores_missing": "rows that have no score",
        "score_gap": "mean score of its positives less that of its anchors",
        "memory_age": "mean age of a memory's rows, in steps",
        "duplicate_keys": "share of rows with an equal other row that is not masked",
        "false_negative_share": "share of negatives, not masked, that are likely positives",
        "gradient_norm": "norm of all gradients before clipping",
        "clipped": "1 where they were clipped",
        "weights_moved": "share of the weights with a gradient that have changed since the record before",
        "gradient_ratio": "gradient norm of several processes over that of one",
        "*/raw": "value of an objective's term; `*/value` is read as well",
        "*/value": "the same",
        "*/weight": "its weight",
        "*/weighted": "value times weight",
        "*/share": "its share of the gradient",
        "*/cosine/*": "cosine of two terms' gradients",
        "*/candidates": "as above, of one term",
        "*/uniform_level": "as above, of one term",
        "*/floor": "as above, of one term",
        "group_share/*": "share of a group in the batch",
        "anchor_share/*": "share of a group among the anchors",
        "score/*": "mean score of a group",
        "feature_gap": "distance of the groups' mean unit features",
    },
    "probe": {
        "*/effective_rank": "exp of the entropy of the normalised singular values of the centred embeddings",
        "*/rank_limit": "the most it can be: min(rows − 1, dimensions)",
        "*/dimensions": "dimensions of the embedding",
        "*/variance": "1: as spread as uniform on the sphere, 0: all in one point",
        "*/uniformity": "ln mean exp(−2 |x − y|²) over different rows",
        "*/mean_cosine": "mean cosine of different rows",
        "*/std": "standard deviation over rows, mean over dimensions; of unit vectors at most 1 / √dimensions",
        "*/moved": "1 − mean cosine of the probe's rows with themselves before training",
        "alignment": "mean squared distance of partners",
        "modality_gap": "distance of the two views' mean unit vectors",
        "hubness": "skewness of how often a key is among the ten nearest",
        "probe_rows": "rows of the probe",
        "val_loss": "the training loss on probe rows, in random batches of the training size",
        "val_uniform_level": "what guessing costs there",
        "val_candidates": "candidates there",
        "train_loss_same_composition": "the same on as many training rows",
    },
    "plan": {
        "hard_ratio": "share of a batch that is to be hard",
        "hardness_k": "neighbours that hard items are drawn from",
        "composes_hard_batches": "whether the sampler composes hard batches, after random ones or from the start",
        "random_phase": "true while a curriculum still takes random batches",
        "hardness": "an item's nearest neighbours in its batch, whole or by quarter of the epoch",
        "hardness_random": "the same for random batches",
        "hardness_neighbors": "how many nearest neighbours are looked for",
        "last_to_first": "hardness of the epoch's last tenth over its first",
        "nominal_hard": "share of hard items promised",
        "realised_hard": "share delivered, whole or by quarter",
        "false_negatives": "share of in-batch pairs that are likely positives, masked or not",
        "anchors_with_false_negative": "share of anchors that have one",
        "false_negative_threshold": "similarity from which a pair counts as one",
    },
    "epoch": {
        "train_loss": "mean training loss of the epoch",
        "val/*": "a validation metric",
        "seconds": "length of the epoch",
        "weights_trained": "weights that require a gradient",
        "weights_unmoved": "those that had gradients and have not changed; by name in `weights_unmoved_names`",
        "weights_without_gradient": "those without a gradient in every look, that have not changed; by name in "
        "`weights_without_gradient_names`",
        "evaluated_in_training": "1 where dropout or batch statistics were at work during the evaluation",
    },
}

#: what does not change during a run
CONTEXT: dict[str, str] = {
    "batch_size": "rows per step and process",
    "epochs": "epochs planned",
    "precision": '"32-true", "bf16-mixed", "16-mixed"',
    "accumulate": "batches per optimiser step",
    "world_size": "processes that train together",
    "sampler": "name of the sampler",
    "composes_hard_batches": "whether it composes hard batches",
    "order": "how a hard sampler fills batches: level, greedy",
    "loss": "name of the loss, where it is a text",
    "loss_kind": '"softmax" (a choice among candidates), "sigmoid" (a question about each pair), "other"',
    "positives_by": 'what makes positives: "pair", "class", "overlap" (of labels), "weights", "scores"',
    "loss_weight_names": "names of the objective's terms",
    "lr": "peak learning rate",
    "temperature": "temperature at the start",
    "learn_temperature": "whether it learns",
    "scale_max": "where 1 / temperature is clamped",
    "memory": "rows of earlier batches that are further negatives",
    "curriculum_epoch": "epochs of random batches before hard ones",
    "hard_ratio": "as in the plan",
    "hardness_k": "as in the plan",
    "false_negative_threshold": "similarity from which negatives are masked; absent: none are",
    "mask_duplicates": "whether equal rows are masked",
    "batchnorm": "BatchNorm layers in training mode",
    "monitor": "the metric that chooses the best epoch",
    "gradient_ratio": "gradient norm of several processes over that of one",
    "classes": "number of classes",
    "gallery": "candidates of the validation's retrieval metrics",
    "metrics": "{split: {metric: estimate, or its to_dict()}}",
    "estimates": "{metric: {chance, trivial, gallery}} of validation",
    "splits": "{split: {rows, hash, ids, gallery}}",
    "leaks": "{pair of splits: number of shared items, or {what: {shared, rows}}}",
    "baselines": "{metric: what a constant or majority predictor scores}, or by split; an entry with a `name` is "
    "a different model",
    "groups": "{metric: {group: value}}",
    "change": "{metric: {group: difference between two systems}}",
    "comparison": "{metric: {value, low, high}, or {per_seed}, or {values, baseline} by seed, or {value, sd}}",
    "before_training": "{split: {metric: estimate}}, of the model before its first step",
    "gain": "{split: {metric: {value, low, high, verdict}}}, what training changed",
}

#: those of the context that are numbers
NUMBERS = frozenset(
    {
        *("batch_size", "epochs", "accumulate", "world_size", "lr", "temperature", "scale_max", "memory"),
        *("curriculum_epoch", "hard_ratio", "hardness_k", "false_negative_threshold", "batchnorm"),
        *("gradient_ratio", "classes", "gallery"),
    }
)
#: those that are true or false
SWITCHES = frozenset({"learn_temperature", "mask_duplicates", "composes_hard_batches"})
#: those that are words
WORDS = frozenset({"precision", "sampler", "order", "loss", "loss_kind", "positives_by", "monitor"})
#: fields of a log that are text
TEXTS = (WORDS - {"loss"}) | {
    *("kind", "loss_name", "probe_split", "time"),
    *("weights_unmoved_names", "weights_without_gradient_names"),
}
_WILD = {name: re.compile(re.escape(name).replace(r"\*", ".+")) for name in (*FIELDS["step"], *FIELDS["probe"],
         *FIELDS["plan"], *FIELDS["epoch"]) if "*" in name}  # fmt: skip
_PLAIN = {name for table in FIELDS.values() for name in table if "*" not in name}
#: fields of which there is one value per epoch, so that their column may be as long as there are epochs
OF_AN_EPOCH = (*FIELDS["plan"], *FIELDS["epoch"], *FIELDS["probe"])
#: fields that may have a value for each quarter of an epoch
LISTED = tuple(FIELDS["plan"])


@lru_cache(maxsize=1 << 16)
def matches(pattern: str, name: str) -> bool:
    """Whether ``name`` is what ``pattern`` means.

    >>> matches("*/share", "focal/share"), matches("loss", "train_loss")
    (True, False)
    """
    return pattern == name or (pattern in _WILD and _WILD[pattern].fullmatch(name) is not None)


def is_text(name: str) -> bool:
    """Whether a field of a log is text; that of an objective's term as well.

    >>> is_text("loss_kind"), is_text("contrastive/loss_kind"), is_text("loss")
    (True, True, False)
    """
    return name in TEXTS or name.rpartition("/")[2] in ("loss_kind", "positives_by")


@lru_cache(maxsize=1 << 14)
def is_field(name: str) -> bool:
    """Whether a log may hold a field of this name."""
    return name in _PLAIN or any(wild.fullmatch(name) for wild in _WILD.values())
