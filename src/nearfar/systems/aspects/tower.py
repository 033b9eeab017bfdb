"""The text tower of the aspect model."""

from __future__ import annotations

import inspect

from nearfar.errors import NearfarError, nearest_name
from nearfar.models.text.trainable import WordTextEncoder
from nearfar.towers import build_tower
from nearfar.towers.text import TextTower

__all__ = ["ENCODERS", "text_tower"]

#: by ``text_encoder=`` the encoder of the text tower that it means
ENCODERS = {"words": "words", "pretrained": "transformer", "minilm": "minilm"}
#: options of pretrained encoders
_PRETRAINED = ("max_length", "lr", "freeze", "train", "lora_rank", "gradient_checkpointing")


def text_tower(kind: str = "words", *, run_lr: float | None = None, **options: object) -> TextTower:
    """The tower that reads reviews as tokens: the encoder ``kind`` with its options (docs/systems/aspects.md).

    ``freeze`` keeps pretrained weights as they are; ``lr=None`` trains them at ``run_lr``, the run's learning rate.

    >>> text_tower("words", dims=16, hidden=16).description
    '16-d words and pieces, bidirectional LSTM of 16 states, convolutions over 1 and 3 words (not fitted yet); all ...'
    >>> text_tower("words", dim=16)
    Traceback (most recent call last):
    nearfar.errors.NearfarError: text_encoder=words has no option 'dim'; did you mean 'dims'?
    """
    if kind not in ENCODERS:
        raise NearfarError(
            f"text_encoder={kind}: no encoder of that kind is trained with the aspects; {nearest_name(kind, ENCODERS)}"
        )
    known = list(inspect.signature(WordTextEncoder).parameters) if kind == "words" else list(_PRETRAINED)
    known += ["model", "revision"] if kind == "pretrained" else []
    for option in options:
        if option not in known:
            raise NearfarError(f"text_encoder={kind} has no option {option!r}; {nearest_name(option, known)}")
    if kind == "pretrained":
        options.setdefault("model", "vinai/phobert-base-v2")
    if kind != "words":
        freeze, train = options.pop("freeze", False), options.pop("train", None)
        if not isinstance(freeze, bool):
            raise NearfarError(f"text_encoder.freeze={freeze}: true or false is needed.")
        if freeze and train not in (None, "head"):
            raise NearfarError(
                f"text_encoder.freeze=true and text_encoder.train={train}: leave one of them out."
            )
        options["train"] = train or ("head" if freeze else "full")
        if "lr" in options and options["lr"] is None:
            options["lr"] = run_lr
    tower = build_tower("text", "text_encoder", encoder=ENCODERS[kind], states=True, **options)
    assert isinstance(tower, TextTower)
    return tower
