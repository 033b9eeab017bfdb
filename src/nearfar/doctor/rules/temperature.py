"""The scale, 1 / temperature: where it stands, where it goes, and whether numbers can follow."""

from __future__ import annotations

import math

from nearfar.doctor.rule import Evidence, Remedy, Rule, TooLittle
from nearfar.doctor.rules._remedies import fixed
from nearfar.doctor.series import Series, mean
from nearfar.doctor.signals import Signals

__all__ = ["RULES"]

#: share of the last quarter's steps at the clamp from which the scale is held there
AT_CLAMP = 0.5
#: how close to the clamp is at it: a learned ln(100) is a rounding away from 100
CLOSE = 1e-4
#: the clamp of a scale that learned its way up to it, where the log names none
USUAL_CLAMP = 100.0
#: factor since the start, and change of its logarithm in the last quarter, from which a scale has not settled
FACTOR, STILL_MOVING = 2.0, 0.15
#: fewer values are no course
LEAST = 8
#: logits beyond which half precision is coarse: numbers from 64 on lie .5 apart in bf16; exp(11.1) is fp16's last
HALF = 64.0
#: in float32: at temperatures below 1/500 one negative takes the whole gradient, and logits are 3e-5 apart
SINGLE = 500.0


def _scale(signals: Signals) -> Series:
    """The scale over the run, or what a log of the temperature says of it."""
    scale = signals.series("scale").finite()
    scale = scale.part(scale.numbers > 0)
    if scale:
        return scale
    temperature = signals.series("temperature").finite()
    temperature = temperature.part(temperature.numbers > 0)
    return temperature.having(1 / temperature.numbers, "scale")


def _clamped(signals: Signals) -> tuple[float, Series, float | None] | None:
    """The share of the last steps at the clamp, those steps, and the clamp; None where none is known or none learns."""
    if signals.context.get("learn_temperature") is False:
        return None
    limit = signals.number("scale_max")
    flags = signals.series("at_clamp").finite().tail()
    if flags:
        return mean([float(v >= 0.5) for v in flags.values]), flags, limit
    whole = _scale(signals)
    scale = whole.tail()
    if limit is None and whole and min(whole.values) < USUAL_CLAMP * (1 - CLOSE):
        limit = USUAL_CLAMP if max(whole.values) <= USUAL_CLAMP * (1 + CLOSE) else None
    if limit is None or not scale:
        return None
    return mean([float(v >= limit * (1 - CLOSE)) for v in scale.values]), scale, limit


def _at_clamp(signals: Signals) -> Evidence | None:
    clamped = _clamped(signals)
    if clamped is None:
        return None
    share, where, limit = clamped
    if share < AT_CLAMP:
        return None
    at = f" of {limit:g}" if limit is not None else ""
    scale = _scale(signals).tail().mean()
    return Evidence(
        f"The scale stands at its clamp{at} in {share:.0%} of the logged steps in {where.where_text()}.",
        {"share_at_clamp": share} | ({"scale": scale} if math.isfinite(scale) else {}),
    )


def _drift(signals: Signals) -> Evidence | None:
    scale = _scale(signals)
    clamped = _clamped(signals)
    if clamped is not None and clamped[0] >= AT_CLAMP:
        return None
    if len(scale) < LEAST:
        raise TooLittle(f"only {len(scale)} logged values of the scale; {LEAST} are needed")
    logs = [math.log(value) for value in scale.values]
    # Means of short ends: single values may scatter.
    ends = max(1, len(logs) // 20)
    quarter = logs[-max(4, math.ceil(len(logs) / 4)) :]
    total = mean(logs[-ends:]) - mean(logs[:ends])
    late = mean(quarter[-ends:]) - mean(quarter[:ends])
    if abs(total) < math.log(FACTOR) or abs(late) < STILL_MOVING or total * late < 0:
        return None
    return Evidence(
        f"The scale went from {scale.values[0]:.1f} to {scale.values[-1]:.1f} in {scale.where_text()}, by a "
        f"factor of {math.exp(late):.2f} in the last quarter alone.",
        {"first": scale.values[0], "last": scale.values[-1], "last_quarter": math.exp(late)},
    )


def _risk(signals: Signals) -> Evidence | None:
    half = _half(signals)
    limit = HALF if half else SINGLE
    largest = signals.series("largest_logit").finite() or _scale(signals)
    if largest:
        late = largest.tail()
        value, where = max(late.values), f" in {late.where_text()}"
    else:
        temperature = signals.number("temperature")
        if not temperature:
            return None
        value, where = 1 / temperature, ""
    if value <= limit:
        return None
    bits = signals.text("precision") or "32 bits"
    return Evidence(
        f"Logits reach {value:.0f}{where} in {bits}; up to {limit:.0f} they are told apart.",
        {"largest_logit": value, "limit": limit},
    )


def _half(signals: Signals) -> bool:
    words = (signals.text("precision") or "").lower()
    return "16" in words or "half" in words


def _risk_remedy(signals: Signals) -> Remedy:
    if _half(signals):
        return Remedy(
            "trainer.precision=32-true", "Score in 32 bits, or clamp the scale.", ("temperature=0.07",)
        )
    return Remedy("temperature=0.07", "Raise the temperature, or clamp its scale.")


RULES = (
    Rule(
        "temperature-at-clamp", "warning", "The learned scale is held at its clamp.",
        (("at_clamp",), ("scale", "scale_max"), ("scale",), ("temperature",)), _at_clamp,
        looks_at="`at_clamp`, or `scale` (1 / `temperature`) beside `scale_max`, last quarter",
        threshold=f"{AT_CLAMP:.0%} of the steps or more",
        cause="The loss asks for ever sharper logits: training pairs are nearly told apart, or the scale "
        "learns too fast.",
        remedy=fixed("learn_temperature=false", "Fix the temperature, or give the scale a learning rate of its own."),
        source="CLIP (Radford et al. 2021) clamps at 100 against instability; there the temperature no longer learns",
    ),
    Rule(
        "temperature-drift", "warning", "The learned scale does not settle.", (("scale",), ("temperature",)), _drift,
        looks_at="ln `scale` (−ln `temperature`) over the run",
        threshold=f"a factor of {FACTOR:g} since the start, and {STILL_MOVING:g} of ln in "
        "the last quarter, in the same direction",
        cause="The scale follows the ease of the batches rather than the embeddings, or its learning rate is too high.",
        remedy=fixed("learn_temperature=false", "Fix the temperature, clamp the scale, or lower its learning rate."),
        source="Wang and Liu 2021: the temperature sets how much the hardest negatives weigh",
    ),
    Rule(
        "numerical-risk", "warning", "Logits are larger than this precision tells apart.",
        (("largest_logit",), ("scale",), ("temperature",)), _risk,
        looks_at="`largest_logit` (or `scale`, 1 / `temperature`) beside `precision`", threshold=f"{HALF:g} in "
        f"16 bits, {SINGLE:g} in 32",
        cause="The temperature is very low, or has collapsed while it learned.",
        remedy=_risk_remedy, source="IEEE 754: bf16 has 8 significant bits, so that numbers beyond 64 lie .5 apart",
    ),
)  # fmt: skip
