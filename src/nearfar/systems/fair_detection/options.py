"""The options of the fair-detection system: their ranges, and the schedules they describe."""

from __future__ import annotations

from typing import Any

from nearfar.errors import NearfarError
from nearfar.losses import AdaptiveScoreContrastiveLoss
from nearfar.schedules import Linear, Piecewise, Schedule
from nearfar.systems.detector.options import check_data
from nearfar.systems.detector.scenes import check_scenes
from nearfar.training.options import Choice, Number, Rule, Switch, Text, check_learning_options

__all__ = ["CONTROLS", "check_options", "data_of", "epsilon_schedule", "term_weights"]

#: what is trained: everything; nothing (clean pictures, or noise); or the generator by one of the losses alone
CONTROLS = ("full", "none", "random", "detection", "wasserstein", "contrastive")
TERMS = ("contrastive", "wasserstein", "detection")

_WEIGHT = Number(0.0)
_BOUND = Number(0.0, 1.0)
OPTIONS: dict[str, Rule] = {
    "lr_g": Number(0.0),
    "max_norm": Number(0.0),
    "control": Choice(CONTROLS),
    "detector": Text(optional=True, number=True),
    "lower_group": Text(optional=True, number=True),
    "epsilon": _BOUND,
    "epsilon_final": _BOUND,
    "epsilon_min": _BOUND,
    "warmup_epochs": Number(0, whole=True),
    "hold_epochs": Number(0, whole=True),
    "cooldown_epochs": Number(0, whole=True),
    "generator.channels": Number(8, 1024, whole=True),
    "generator.levels": Number(1, 6, whole=True),
    "head_norm": Choice(("batch", "layer")),
    "head_hidden": Number(1, whole=True),
    "head_dim": Number(1, whole=True),
    "temperature": Number(1e-4),
    "top_k_percent": Number(0.0, 1.0),
    "bottom_k_percent": Number(0.0, 1.0),
    "min_samples": Number(1, whole=True),
    "threshold": Number(0.0, 1.0, optional=True),
    "middle": Choice(("ignore", "negatives")),
    "detach_positives": Switch(),
    "bidirectional": Switch(),
    "lambda_contrastive": _WEIGHT,
    "contrastive_warmup_epochs": Number(0, whole=True),
    "lambda_wass": _WEIGHT,
    "wasserstein_form": Choice(("exact", "interpolated")),
    "score_queue": Number(0, whole=True),
    "rescale_gradient": Switch(),
    "beta": _WEIGHT,
    "beta_final": _WEIGHT,
    "pictures": Number(0, 100, whole=True),
}


def check_options(config: Any) -> None:
    """Raise ``NearfarError`` for the first option that is of the wrong type, out of range, or without effect."""
    check_learning_options(config, OPTIONS)
    AdaptiveScoreContrastiveLoss(
        config.temperature,
        config.top_k_percent,
        config.bottom_k_percent,
        config.min_samples,
        threshold=config.threshold,
    )
    if config.batch_size < 2 * config.min_samples and "contrastive" in _active(config):
        raise NearfarError(
            f"batch_size={config.batch_size} has no room for min_samples={config.min_samples} anchors and as many "
            f"positives: no batch would have a contrastive loss. Take at least batch_size={2 * config.min_samples}."
        )
    if config.control not in ("none", "random") and not any(_largest(config, term) for term in TERMS):
        raise NearfarError(
            f"control={config.control}: every loss that it keeps has weight 0, so that nothing would be trained "
            "(lambda_contrastive, lambda_wass, beta)."
        )
    data = data_of(config)
    check_data(data)
    if data.kind == "scenes":
        check_scenes(data)
    elif data.group_key is None:
        raise NearfarError(
            "data.group_key=null: the system compares two groups; name the attribute that holds them, such as "
            "data.group_key=gender."
        )


def data_of(config: Any) -> Any:
    """The data that is really used: files in ``data.dir`` or by name, or without them generated scenes."""
    data = config.data
    named = any(data.get(name) is not None for name in ("dir", "train", "val", "test"))
    return data if named or data.kind != "coco" or "scenes" not in data else data.scenes


def epsilon_schedule(config: Any) -> Schedule:
    """The bound of the perturbation by epoch: up to ``epsilon_final``, held there, down to ``epsilon_min``.

    >>> from types import SimpleNamespace as Options
    >>> lengths = {"warmup_epochs": 8, "hold_epochs": 6, "cooldown_epochs": 16}
    >>> rule = epsilon_schedule(Options(epsilon=0.05, epsilon_final=0.1, epsilon_min=0.09, **lengths))
    >>> [round(rule(epoch), 4) for epoch in (0, 4, 8, 13, 22, 30, 40)]
    [0.05, 0.075, 0.1, 0.1, 0.095, 0.09, 0.09]
    """
    points = [(0.0, config.epsilon if config.warmup_epochs else config.epsilon_final)]
    for length, value in (
        (config.warmup_epochs, config.epsilon_final),
        (config.hold_epochs, config.epsilon_final),
        (config.cooldown_epochs, config.epsilon_min),
    ):
        if length:
            points.append((points[-1][0] + length, value))
    return Piecewise(points)


def term_weights(config: Any) -> dict[str, Any]:
    """The weight of each loss over the run, as ``Objective`` takes them; what ``control`` leaves out has weight 0.

    The contrastive weight reaches its full size in epoch ``contrastive_warmup_epochs``, in equal steps.
    """
    n, full = config.contrastive_warmup_epochs, float(config.lambda_contrastive)
    rising: Any = Piecewise([(0, full / n), (n - 1, full)]) if n > 1 else full
    weights = {
        "contrastive": rising,
        "wasserstein": float(config.lambda_wass),
        "detection": Linear(float(config.beta), float(config.beta_final)),
    }
    return {name: weight if name in _active(config) else 0.0 for name, weight in weights.items()}


def _active(config: Any) -> tuple[str, ...]:
    """The losses that take part."""
    if config.control in ("none", "random"):
        return ()
    return TERMS if config.control == "full" else (config.control,)


def _largest(config: Any, term: str) -> float:
    """The largest weight of a loss in the run."""
    if term not in _active(config):
        return 0.0
    names = {
        "contrastive": ("lambda_contrastive",),
        "wasserstein": ("lambda_wass",),
        "detection": ("beta", "beta_final"),
    }
    return max(float(config[name]) for name in names[term])
