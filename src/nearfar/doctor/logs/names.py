"""What the names of other trainers mean: their loss, learning rate and metrics by the names that the doctor knows."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from nearfar.doctor.fields import CONTEXT, is_field
from nearfar.doctor.log_tables import OF_A_VIEW
from nearfar.errors import NearfarError, nearest_name

__all__ = ["Names", "map_names"]

_TRAIN = r"(?:train(?:ing)?|trn|fit)"
_VALID = r"(?:eval(?:uation)?|val(?:id(?:ation)?)?|dev|test)"
#: what a name is once prefix, suffix and letter case are gone, by the doctor's field
_PLAIN: dict[str, tuple[str, ...]] = {
    "loss": ("loss", "total_loss", "batch_loss", "running_loss", "train_loss", "training_loss", "contrastive_loss",
             "clip_loss", "infonce_loss", "ntxent_loss", "nt_xent_loss", "contrast_loss", "avg_loss", "mean_loss",
             "average_loss", "loss_avg", "loss_mean"),
    "lr": ("lr", "learning_rate", "learningrate", "lr_adamw", "lr_adam", "lr_sgd"),
    "gradient_norm": ("grad_norm", "gradient_norm", "grad_2_0_norm_total", "total_grad_norm", "gnorm", "grad"),
    "scale": ("scale", "logit_scale"),
    "temperature": ("temperature", "temp", "tau"),
    "step": ("step", "global_step", "iter", "iteration", "iterations", "steps", "trainer_global_step",
             "train_global_step", "num_steps", "update", "global_step_max_steps"),
    "epoch": ("epoch", "epochs", "train_epoch", "current_epoch"),
    "candidates": ("candidates", "num_candidates"),
    "rows": ("rows",),
    "batch_size": ("batch_size", "bs", "bsz", "batchsize", "train_batch_size", "per_device_train_batch_size"),
}  # fmt: skip
_BY_NAME = {name: field for field, names in _PLAIN.items() for name in names}
#: what says nothing about learning: times, memory, counts of the trainer
_ASIDE = re.compile(
    r"(^|[/_ .])(runtime|samples_per_second|steps_per_second|steps_per_sec|model_preparation_time|flos|total_flos|"
    r"num_input_tokens_seen|tokens_per_second|data_time|batch_time|data|batch|samples_per_second_per_gpu|timestamp|"
    r"_?runtime|wall_time|walltime|time|date|elapsed_time|remaining_time|memory|memory\(gib\)|train_speed\(.*\)|"
    r"percentage|speed|eta|samples|num_samples|samples_seen|gpu.*|cpu.*|system.*|hostname|pid|_wandb|params?_count|"
    r"train_steps_per_second|train_samples_per_second|train_runtime|total_steps|max_steps|num_train_epochs|"
    r"bt|dt)$",
    re.IGNORECASE,
)
#: where a score was cut, which is no score
_CUT = re.compile(r"[_-]threshold$", re.IGNORECASE)
#: metrics of retrieval and embeddings, by which a name without a prefix is recognised as one of validation
_METRIC = re.compile(
    r"(?<![a-z])(r|p|recall|precision|hit|hits|hit_rate|acc|accuracy|top|ndcg|mrr|map|mean_average_precision)[@_-]?"
    r"(at_?)?\d+|"
    r"(?<![a-z])(mrr|map|ndcg|accuracy|acc|f1|auc|auroc|spearman|pearson|recall|precision|top1|top5)(?![a-z])|"
    r"(cosine|dot|euclidean|manhattan)[-_](ap|mcc)|median_rank|mean_rank|zeroshot",
    re.IGNORECASE,
)
#: the mean cosine of different rows, which says whether embeddings are one; of partners it would be something else
_MEAN_COSINE = re.compile(
    r"(mean|avg|average)(_pairwise)?_cos(ine)?(_sim(ilarity)?)?|pairwise_cos(ine)?(_sim(ilarity)?)?(_mean)?",
    re.IGNORECASE,
)
#: the standard deviation of embeddings, over rows and then averaged over dimensions, as SimSiam's users log it
_STD = re.compile(
    r"(z|h|emb(edding)?s?|feat(ure)?s?|repr(esentation)?s?|proj(ection)?s?|outputs?)(_mean)?_std(_mean|_avg)?"
    r"|std_(of_)?(z|emb(edding)?s?|feat(ure)?s?|repr(esentation)?s?|outputs?)",
    re.IGNORECASE,
)
_LOWER_LOSS = re.compile(r"(^|[/_ -])loss([/_](step|epoch))?$", re.IGNORECASE)
#: the split at the end of a name, as TensorBoard's tutorials have it ("Loss/train"), or before a capital ("TrainLoss")
_SPLIT_LAST = re.compile(rf"^(.+)[/_. -]({_TRAIN}|{_VALID})$", re.IGNORECASE)
_SPLIT_CAMEL = re.compile(rf"^((?i:{_TRAIN}|{_VALID}))(?=[A-Z][a-zA-Z])")


@dataclass
class Names:
    """Which foreign name is which field, and what was left.

    ``used`` maps the doctor's fields to names of the log; ``aside`` are names that say nothing about learning (times,
    memory); ``spare`` those that mean a field which is read from a different name; ``unknown`` are those that nothing
    is known of.
    """

    used: dict[str, str] = field(default_factory=dict)
    aside: list[str] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)
    spare: dict[str, str] = field(default_factory=dict)

    def lines(self) -> list[str]:
        """What a user is shown: what was taken for what, and what was not understood."""
        shown = [f"{field} ← {name}" for field, name in self.used.items() if field != name]
        same = [field for field, name in self.used.items() if field == name]
        lines = ["read as: " + ", ".join([*same, *shown])] if self.used else []
        if self.unknown:
            names = ", ".join(self.unknown[:12]) + (", …" if len(self.unknown) > 12 else "")
            lines.append(f"not understood: {names} (say what one is with --map FIELD=NAME)")
        if self.spare:
            listed = [f"{name} (also {field})" for name, field in self.spare.items()]
            lines.append(
                f"not read: {', '.join(listed[:8])}"
                + (", …" if len(listed) > 8 else "")
                + "; --map FIELD=NAME takes one instead"
            )
        if self.aside:
            lines.append(
                f"not about learning: {', '.join(self.aside[:8])}" + (", …" if len(self.aside) > 8 else "")
            )
        return lines


def map_names(
    names: Iterable[str], given: Mapping[str, str] | None = None, validation: bool = False
) -> Names:
    """What the names of a log mean.

    Args:
        names: those of its records.
        given: fields that the user names himself, ``{"loss": "train/contrast"}``; they go first.
        validation: names of metrics without a prefix are scores of validation, and a loss too.

    Raises:
        NearfarError: a given name that the log lacks, or a field that the doctor does not know.

    >>> map_names(["train/loss", "eval_loss", "eval_nDCG@10", "learning_rate", "train_runtime", "zeta"]).used
    {'loss': 'train/loss', 'val_loss': 'eval_loss', 'val/nDCG@10': 'eval_nDCG@10', 'lr': 'learning_rate'}
    """
    every = list(dict.fromkeys(map(str, names)))
    result = Names()
    for target, name in (given or {}).items():
        if name not in every:
            raise NearfarError(f"--map {target}={name}: the log has no '{name}'; {nearest_name(name, every)}")
        if not is_field(target) and target not in ("step", "epoch") and target not in CONTEXT:
            known = [
                "loss",
                "val_loss",
                "candidates",
                "lr",
                "gradient_norm",
                "temperature",
                "val/MRR",
                "step",
                "epoch",
            ]
            raise NearfarError(
                f"--map {target}={name}: the doctor knows no field '{target}'; {nearest_name(target, known)}"
            )
        result.used[target] = name
    taken = set(result.used.values())
    wanted: dict[str, list[str]] = {}
    for name in every:
        if name in taken:
            continue
        meant = _field(name, validation)
        if meant == "":
            result.aside.append(name)
        elif meant is None:
            result.unknown.append(name)
        elif meant in result.used:
            result.spare[name] = meant
        else:
            wanted.setdefault(meant, []).append(name)
    for target, candidates in wanted.items():
        best = min(candidates, key=lambda name: (_rank(name), every.index(name)))
        result.used[target] = best
        result.spare |= {name: target for name in candidates if name != best}
    result.used = _in_order(result.used, every)
    return result


def _field(name: str, validation: bool) -> str | None:
    """The doctor's field of a name; "" for what says nothing about learning, None for what is not known."""
    if is_field(name) and not _LOWER_LOSS.search(name):
        return name
    name = _split_first(name)
    plain = _key(name)
    of_validation = re.match(rf"^(?:{_VALID})[/_. -]+(.+)$", name, re.IGNORECASE)
    rest = of_validation.group(1) if of_validation else name
    if _CUT.search(rest) or (_ASIDE.search(rest) and not _METRIC.search(rest)):
        return ""
    if of_validation:
        if _key(rest) in ("step", "epoch"):
            return ""
        return "val_loss" if _LOWER_LOSS.search(rest) or _key(rest) == "loss" else f"val/{rest}"
    if re.fullmatch(rf"clip_{_VALID}_loss", plain):
        return "val_loss"
    of_training = re.sub(rf"^{_TRAIN}[/_. -]+", "", name, flags=re.IGNORECASE)
    of_training = re.sub(r"[/_](step|batch)$", "", of_training, flags=re.IGNORECASE)
    if re.fullmatch(
        r"(train(ing)?[/_])?(avg_|mean_)?loss[/_]epoch|train_loss_epoch|epoch_loss", name, re.IGNORECASE
    ):
        return "train_loss"
    by_name = _BY_NAME.get(_key(of_training)) or _BY_NAME.get(plain)
    if by_name == "loss" and validation:
        return "val_loss"
    if by_name is not None:
        return by_name
    if plain in OF_A_VIEW:
        return f"embeddings/{plain}"
    if _MEAN_COSINE.fullmatch(plain) or _MEAN_COSINE.fullmatch(_key(rest)):
        return "embeddings/mean_cosine"
    if _STD.fullmatch(_key(of_training)) or _STD.fullmatch(_key(rest)):
        return "embeddings/std"
    if re.match(r"^lr[-_/]", name, re.IGNORECASE):
        return "lr"
    if of_training == name and (validation or _METRIC.search(name)):
        return f"val/{name}"
    return None


def _split_first(name: str) -> str:
    """A name with its split in front, where it stands at the end or is one word with the rest.

    >>> _split_first("Loss/train"), _split_first("ValRecall@1"), _split_first("train_loss")
    ('train/Loss', 'Val_Recall@1', 'train_loss')
    """
    if re.match(rf"^(?:{_TRAIN}|{_VALID})[/_. -]", name, re.IGNORECASE):
        return name
    last = _SPLIT_LAST.match(name)
    if last and (_LOWER_LOSS.search(last.group(1)) or _METRIC.search(last.group(1))):
        return f"{last.group(2)}/{last.group(1)}"
    return _SPLIT_CAMEL.sub(r"\1_", name)


def _key(name: str) -> str:
    """A name in small letters, its separators as underscores.

    >>> _key("Train/Loss Step"), _key("grad_2.0_norm_total")
    ('train_loss_step', 'grad_2_0_norm_total')
    """
    return re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_")


def _rank(name: str) -> int:
    """Of two names for one field, the one that is of the total, of the step, and plain."""
    key = _key(name)
    return sum(word in key for word in ("contrast", "clip", "nce", "ent", "running", "avg", "epoch", "pg"))


def _in_order(used: Mapping[str, str], names: list[str]) -> dict[str, str]:
    return dict(sorted(used.items(), key=lambda pair: names.index(pair[1])))
