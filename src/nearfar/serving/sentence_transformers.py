"""A text tower as a folder that ``SentenceTransformer(folder)`` of the library sentence-transformers loads."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from nearfar.data.files import Json
from nearfar.data.items import Column
from nearfar.errors import NearfarError
from nearfar.models.hub import merge_adapters, no_progress_bar
from nearfar.models.projection import Dropout
from nearfar.models.views import PassThrough, ViewModel
from nearfar.serving.trained import Trained
from nearfar.towers.text import PooledTransformer, TextTower

__all__ = ["text_view", "write_sentence_transformer"]

_PACKAGE = "sentence_transformers.models"  # where every version of the library has its modules
_ACTIVATIONS = {nn.GELU: "GELU", nn.ReLU: "ReLU", nn.SiLU: "SiLU", nn.Tanh: "Tanh"}


@dataclass(frozen=True)
class _Layer:
    """A module of the folder: its class, its configuration, its weights."""

    kind: str
    config: Json
    weights: dict[str, Tensor]


def text_view(trained: Trained, tower: str | None = None) -> str:
    """The view whose tower is exported: the one that is named, or the only text.

    ``NearfarError`` with the reason where no view, or not the named one, can be such a folder.
    """
    towers = trained.system.towers
    if tower is None:
        texts = [view for view in trained.views if isinstance(towers[view], TextTower)]
        distinct = {id(towers[view]): view for view in reversed(texts)}
        if not distinct:
            kinds = ", ".join(f"{view} ({each.kind})" for view, each in towers.items()) or "none"
            raise NearfarError(
                f"{trained.path}: sentence-transformers embeds texts, and this run has no view of texts (views: "
                f"{kinds}). Take --format safetensors, onnx or torch."
            )
        if len(distinct) > 1:
            raise NearfarError(
                f"{trained.path} has several views of texts ({', '.join(reversed(distinct.values()))}): say which, "
                "with --tower NAME."
            )
        tower = next(iter(distinct.values()))
    view = trained.view_of((), tower)
    chosen = towers[view]
    if type(chosen) is not TextTower:
        raise NearfarError(
            f"'{view}' is read as {chosen.kind}, and sentence-transformers embeds texts alone."
        )
    if chosen.encoder_kind not in ("minilm", "transformer"):
        what = {"ngram": "TF-IDF of character n-grams", "words": "a network over words of its own vocabulary"}
        raise NearfarError(
            f"'{view}' is {what[chosen.encoder_kind]}, which sentence-transformers cannot express: take --format "
            "safetensors, or train with text_encoder=minilm or a transformer."
        )
    if not isinstance(trained.model, ViewModel):
        raise NearfarError(
            f"'{view}': this model attends to the tokens of a text for each aspect, which sentence-transformers cannot "
            "express: take --format onnx, torch or safetensors."
        )
    return view


def write_sentence_transformer(trained: Trained, view: str, folder: Path) -> None:
    """Write tokenizer, network (adapters merged), pooling, head and normalisation of a text view into ``folder``.

    The head's linear maps become `Dense` modules; batch normalisation is folded into the map before it.

    ``NearfarError`` names a layer of the head that the library does not have.
    """
    from safetensors.torch import save_file

    tower, model = trained.system.towers[view], trained.model
    assert isinstance(tower, TextTower)
    assert isinstance(model, ViewModel)
    part = merge_adapters(model.only(view)).cpu().eval()
    assert isinstance(part, ViewModel)
    module, encoder = part.tower(view), tower.transformer
    tokenizer, network = tower.parts()
    unit = False
    if isinstance(module, PooledTransformer):
        network = module.network
    else:
        if not isinstance(module, PassThrough):
            raise NearfarError(
                f"'{view}': {type(module).__name__} above a text encoder cannot be exported so."
            )
        unit = bool(encoder.normalize)
    width = int(network.config.hidden_size)
    layers = [_Layer("Pooling", _pooling(width, encoder.pooling), {})]
    layers += [_Layer("Normalize", {}, {})] if unit else []
    layers += list(_head_layers(next(iter(part.heads.values())), view))
    layers.append(_Layer("Normalize", {}, {}))

    folder.mkdir(parents=True, exist_ok=True)
    modules = [{"idx": 0, "name": "0", "path": "", "type": f"{_PACKAGE}.Transformer"}]
    for number, layer in enumerate(layers, 1):
        path = f"{number}_{layer.kind}"
        modules.append({"idx": number, "name": str(number), "path": path, "type": f"{_PACKAGE}.{layer.kind}"})
        (folder / path).mkdir(exist_ok=True)
        if layer.config:
            _write_json(folder / path / "config.json", layer.config)
        if layer.weights:
            save_file(layer.weights, folder / path / "model.safetensors", metadata={"format": "pt"})
    with no_progress_bar():
        network.save_pretrained(str(folder))
        tokenizer.save_pretrained(str(folder))
    _write_json(folder / "modules.json", modules)
    _write_json(
        folder / "sentence_bert_config.json",
        {"max_seq_length": int(encoder.max_length), "do_lower_case": False},
    )
    _write_json(
        folder / "config_sentence_transformers.json",
        {"prompts": {}, "default_prompt_name": None, "similarity_fn_name": "cosine"},
    )


def _pooling(width: int, pooling: str) -> Json:
    return {
        "word_embedding_dimension": width,
        "pooling_mode_cls_token": pooling == "cls",
        "pooling_mode_mean_tokens": pooling == "mean",
        "pooling_mode_max_tokens": False,
        "pooling_mode_mean_sqrt_len_tokens": False,
        "pooling_mode_weightedmean_tokens": False,
        "pooling_mode_lasttoken": False,
        "include_prompt": True,
    }


def _dense(
    weight: Tensor, bias: Tensor | None, activation: str = "torch.nn.modules.linear.Identity"
) -> _Layer:
    config = {
        "in_features": weight.shape[1],
        "out_features": weight.shape[0],
        "bias": bias is not None,
        "activation_function": activation,
    }
    weights = {"linear.weight": weight.detach().clone().contiguous()}
    if bias is not None:
        weights["linear.bias"] = bias.detach().clone()
    return _Layer("Dense", config, weights)


def _head_layers(head: nn.Module, view: str) -> Iterator[_Layer]:
    """The layers of a head in the order in which they are computed, dropout left out."""
    pending: _Layer | None = None  # a linear map that may still take up what follows
    width = 0
    for layer in _leaves(head):
        match layer:
            case nn.Identity() | nn.Dropout() | Dropout() | PassThrough():
                continue
            case nn.Linear():
                if pending is not None:
                    yield pending
                pending, width = _dense(layer.weight, layer.bias), layer.out_features
            case nn.BatchNorm1d() if pending is not None:
                pending = _folded(pending, layer)
            case nn.LayerNorm() if layer.elementwise_affine and layer.eps == nn.LayerNorm(1).eps:
                if pending is not None:
                    yield pending
                pending, width = None, int(layer.normalized_shape[0])
                own = {f"norm.{name}": value.detach().clone() for name, value in layer.named_parameters()}
                yield _Layer("LayerNorm", {"dimension": width}, own)
            case nn.GELU() | nn.ReLU() | nn.SiLU() | nn.Tanh() if (
                getattr(layer, "approximate", "none") == "none"
            ):
                # one that follows no linear map is a map by the identity before it, which changes no number
                before = pending or _dense(torch.eye(width), None)
                name = f"torch.nn.modules.activation.{_ACTIVATIONS[type(layer)]}"
                yield _Layer("Dense", before.config | {"activation_function": name}, before.weights)
                pending = None
            case _:
                raise NearfarError(
                    f"'{view}': the head has a layer {type(layer).__name__}, which sentence-transformers cannot "
                    "express: take --format safetensors, onnx or torch."
                )
    if pending is not None:
        yield pending


def _leaves(module: nn.Module) -> Iterator[nn.Module]:
    children = list(module.children())
    if not children:
        yield module
    for child in children:
        yield from _leaves(child)


def _folded(dense: _Layer, norm: nn.BatchNorm1d) -> _Layer:
    """A linear map and the batch normalisation behind it as one linear map, by its running statistics."""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    weight, bias = dense.weights["linear.weight"].double(), dense.weights.get("linear.bias")
    scale = (norm.running_var.double() + norm.eps).rsqrt()
    shift = -norm.running_mean.double() * scale
    if norm.affine:
        scale, shift = scale * norm.weight.double(), shift * norm.weight.double() + norm.bias.double()
    if bias is not None:
        shift = shift + bias.double() * scale
    return _dense((weight * scale[:, None]).float(), shift.float())


def compare(trained: Trained, view: str, folder: Path, values: Column) -> float | None:
    """The largest difference of any number from what the model gives of these texts; None where the library that would
    load the folder is not installed."""
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError:
        return None
    texts = [str(value) for value in values]
    model = SentenceTransformer(str(folder), device="cpu", trust_remote_code=False)
    vectors = model.encode(texts, show_progress_bar=False, convert_to_numpy=True)
    return float(np.abs(vectors - trained.embed(texts, view)).max())


def _write_json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
