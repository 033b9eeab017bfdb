"""The image tower: what it reads, trains and keeps, against the encoders by themselves; wrong options and pictures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from nearfar.data.batch import Pixels, Rows
from nearfar.errors import NearfarError
from nearfar.models.image import build_image_encoder
from nearfar.models.image.colors import color_statistics
from nearfar.models.image.networks import EFFICIENTNET_WEIGHTS
from nearfar.towers import build_tower, guess_tower, load_tower
from nearfar.towers.image import ImageTower

RNG = np.random.default_rng(0)
PICTURES = RNG.integers(256, size=(150, 32, 32, 3), dtype=np.uint8)

pytestmark = pytest.mark.usefixtures("module_cache")
needs_weights = pytest.mark.skipif(EFFICIENTNET_WEIGHTS.path() is None, reason="no packaged weights")


def rows(tower: ImageTower, values: Any) -> torch.Tensor:
    read = tower.read(values)
    assert isinstance(read, Rows)
    return read.values


NEAR = {"rtol": 1e-4, "atol": 1e-4}  # convolutions sum in an order that depends on the layout in memory


def embedded(encoder: Any, pictures: np.ndarray) -> torch.Tensor:
    with torch.no_grad():
        return encoder.eval()(torch.from_numpy(np.ascontiguousarray(pictures.transpose(0, 3, 1, 2))))


@pytest.fixture(scope="module")
def vit(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A vision transformer of one layer, saved as the hub keeps models, with colours of its own."""
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("hub") / "tiny-vit"
    config = transformers.ViTConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=16,
        image_size=32,
        patch_size=16,
    )
    torch.manual_seed(0)
    transformers.ViTModel(config).save_pretrained(folder)
    colours = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.5, 0.6, 0.7]}
    (folder / "preprocessor_config.json").write_text(json.dumps(colours))
    return str(folder)


@pytest.mark.slow
def test_frozen_features_are_those_of_the_encoder_in_any_chunk() -> None:
    tower = ImageTower("small", train="frozen", seed=3).fit(PICTURES)
    expected = embedded(build_image_encoder("small", seed=3, frozen=True), PICTURES)
    torch.testing.assert_close(rows(tower, PICTURES), expected, **NEAR)
    torch.testing.assert_close(rows(tower, PICTURES[140:]), expected[140:], **NEAR)
    module = tower.build()
    assert module.width == 256
    out = module(rows(tower, PICTURES))
    spread = expected.std(0, correction=0)
    wanted = (expected - expected.mean(0)) / torch.where(spread < 1e-6, 1.0, spread)
    torch.testing.assert_close(out, wanted, rtol=1e-3, atol=1e-3)
    plain = ImageTower("small", train="frozen", seed=3, standardize=False).fit(PICTURES)
    torch.testing.assert_close(plain.build()(rows(plain, PICTURES)), expected, **NEAR)
    other = ImageTower("small", train="frozen", seed=4).fit(PICTURES)
    assert not torch.allclose(rows(other, PICTURES), expected)


@pytest.mark.slow
def test_features_are_computed_once_for_their_content(monkeypatch: pytest.MonkeyPatch) -> None:
    first = rows(ImageTower("small", train="head", seed=8).fit(PICTURES), PICTURES)
    monkeypatch.setattr("nearfar.towers.image._embedded", None)
    again = ImageTower("small", train="head", seed=8).fit(PICTURES.copy())
    torch.testing.assert_close(rows(again, PICTURES), first)
    with pytest.raises(TypeError):
        ImageTower("small", train="head", seed=8).fit(PICTURES[:20])


@pytest.mark.slow
def test_a_different_split_computes_only_pictures_that_are_new(monkeypatch: pytest.MonkeyPatch) -> None:
    pictures = RNG.integers(256, size=(1500, 4, 4, 3), dtype=np.uint8)
    computed: list[int] = []

    def counted(part: np.ndarray) -> np.ndarray:
        computed.append(len(part))
        return color_statistics(part)

    monkeypatch.setattr("nearfar.towers.image.color_statistics", counted)
    whole = rows(ImageTower("colors").fit(pictures), pictures)
    assert sum(computed) == 1500
    fold = np.r_[0:200, 700:1500]
    computed.clear()
    features = rows(ImageTower("colors").fit(pictures[fold]), pictures[fold])
    assert 0 < sum(computed) < 700
    torch.testing.assert_close(features, whole[fold])


@pytest.mark.slow
def test_colors_have_no_network() -> None:
    tower = ImageTower("colors").fit(PICTURES)
    np.testing.assert_array_equal(rows(tower, PICTURES).numpy(), color_statistics(PICTURES))
    reference = tower.reference(PICTURES)
    assert reference is not None
    np.testing.assert_allclose(reference.mean(0), 0, atol=1e-4)
    np.testing.assert_allclose(reference, tower.build()(rows(tower, PICTURES)), rtol=1e-3, atol=1e-4)
    assert reference.dtype == np.float32


def test_a_trained_network_reads_pixels() -> None:
    tower = ImageTower("small", features=64)
    assert tower.train == "full"
    read = tower.fit(PICTURES).read(PICTURES)
    assert isinstance(read, Pixels)
    assert read.pictures is PICTURES  # nothing is copied
    batch = read.batch(torch.tensor([3, 1]))
    torch.manual_seed(0)
    module = tower.build()
    torch.manual_seed(0)
    same = build_image_encoder("small", features=64)
    torch.testing.assert_close(module(batch), same(batch))
    assert module.width == 64
    assert all(p.requires_grad for p in module.parameters())
    assert tower.build() is not module
    assert tower.reference(PICTURES) is None
    assert tower.lr is None


def test_sizes(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    Image.fromarray(PICTURES[0]).save(path)
    grey = PICTURES[:2, :28, :28, 0]

    def shape(values: Any, **options: Any) -> tuple[int, ...]:
        tower = ImageTower("small", **options).fit(values)
        return tuple(tower.read(values).batch(torch.tensor([0])).shape[2:])

    assert shape([path]) == (96, 96)
    assert shape([str(path)], size=40) == (40, 40)
    assert shape(grey) == (32, 32)
    assert shape(grey, size=48) == (48, 48)
    assert shape(RNG.integers(256, size=(2, 40, 50, 3), dtype=np.uint8)) == (40, 50)
    tiny = PICTURES[:3, :8, :8]
    np.testing.assert_array_equal(rows(ImageTower("colors").fit(tiny), tiny), color_statistics(tiny))
    trained = ImageTower("small").fit(grey)
    assert trained.read([path]).batch(torch.tensor([0])).shape == (1, 3, 32, 32)  # as in training
    with pytest.raises(NearfarError, match="size=own is for one array"):
        ImageTower("small", size="own").fit([path])


@pytest.mark.slow
@needs_weights
def test_packaged_weights_are_frozen_below_a_head_or_trained() -> None:
    pictures = PICTURES[:5]
    tower = ImageTower().fit(pictures)
    assert (tower.train, tower.frozen, tower.lr) == ("head", True, None)
    grown = np.stack(
        [np.asarray(Image.fromarray(p).resize((96, 96), Image.Resampling.BILINEAR)) for p in pictures]
    )
    expected = embedded(build_image_encoder("efficientnet"), grown)
    torch.testing.assert_close(rows(tower, pictures), expected, **NEAR)
    assert "ImageNet weights, efficientnet-lite0" in tower.description
    assert "96 × 96 pixels" in tower.description
    own = ImageTower(size="own").fit(pictures)
    torch.testing.assert_close(
        rows(own, pictures), embedded(build_image_encoder("efficientnet"), pictures), **NEAR
    )
    full = ImageTower(train="full", size="own").fit(pictures)
    module = full.build()
    torch.testing.assert_close(embedded(module, pictures), rows(own, pictures), **NEAR)
    assert full.lr == 1e-4
    reference = full.reference(pictures)
    assert reference is not None
    np.testing.assert_allclose(reference, own.reference(pictures), rtol=1e-3, atol=1e-3)


@pytest.mark.slow
def test_transformers_frozen_full_and_adapters(vit: str) -> None:
    pictures = PICTURES[:6]
    expected = embedded(build_image_encoder("transformers", vit), pictures)
    tower = ImageTower("transformers", model=vit, size=32, standardize=False).fit(pictures)
    torch.testing.assert_close(rows(tower, pictures), expected, **NEAR)
    for train, rate in (("full", 2e-5), ("lora", 2e-4)):
        tower = ImageTower("transformers", model=vit, size=32, train=train, lora_rank=2).fit(pictures)
        if train == "lora":
            pytest.importorskip("peft")
        module = tower.build()
        assert tower.lr == rate
        torch.testing.assert_close(embedded(module, pictures), expected)  # adapters start at 0
        trained = [name for name, p in module.named_parameters() if p.requires_grad]
        assert trained
        assert all("lora_" in name for name in trained) == (train == "lora")
        field = tower.read(pictures).batch(torch.arange(6))
        module.train()(field).square().sum().backward()
        assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in module.parameters())


@pytest.mark.slow
def test_gradient_checkpointing_gives_the_same_gradient(vit: str) -> None:
    pictures = PICTURES[:6]
    gradients = []
    for checkpointing in (False, True):
        tower = ImageTower(
            "transformers", model=vit, size=32, train="full", gradient_checkpointing=checkpointing
        )
        module = tower.build().train()
        module(tower.read(pictures).batch(torch.arange(6))).square().sum().backward()
        gradients.append([p.grad for p in module.parameters() if p.grad is not None])
        assert ("checkpointing" in tower.description) == checkpointing
    assert gradients[0]
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.slow
@pytest.mark.parametrize("train", ["frozen", "full", "lora"])
def test_saved_and_loaded(train: Any, vit: str, tmp_path: Path) -> None:
    if train == "lora":
        pytest.importorskip("peft")
    pictures = PICTURES[:6]
    tower = ImageTower("transformers", model=vit, size=40, train=train).fit(pictures)
    module = tower.build().eval()
    with torch.no_grad():  # something that no fresh module has
        for tensor in module.state_dict().values():
            if tensor.is_floating_point():
                tensor.add_(0.01)
    tower.save(tmp_path / "tower")
    loaded = load_tower(tmp_path / "tower")
    assert loaded.options == tower.options
    fresh = loaded.build().eval()
    fresh.load_state_dict(module.state_dict())
    field = [each.read(pictures).batch(torch.arange(6)) for each in (tower, loaded)]
    torch.testing.assert_close(fresh(field[1]), module(field[0]))
    # a frozen network describes itself by what it read; one that trains is built from its configuration alone
    assert loaded.description == tower.description
    if train == "full":
        (tmp_path / "tower" / "model" / "config.json").unlink()
        with pytest.raises(NearfarError, match=r"config\.json"):
            load_tower(tmp_path / "tower")


@pytest.mark.slow
def test_a_loaded_tower_refuses_other_weights(vit: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    folder = tmp_path / "vit"
    transformers.ViTModel.from_pretrained(vit).save_pretrained(folder)
    tower = ImageTower("transformers", model=str(folder), size=32).fit(PICTURES[:4])
    tower.save(tmp_path / "tower")
    network = transformers.ViTModel.from_pretrained(folder)
    with torch.no_grad():
        next(network.parameters()).add_(1)
    network.save_pretrained(folder)
    with pytest.raises(NearfarError, match="other weights than those"):
        load_tower(tmp_path / "tower").read(PICTURES[:4])


@pytest.mark.slow
def test_clip_and_small_are_loaded_from_their_configuration(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    part = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    clip = transformers.CLIPConfig(
        text_config=part, vision_config={**part, "image_size": 32, "patch_size": 16}, projection_dim=8
    )
    transformers.CLIPModel(clip).save_pretrained(tmp_path / "clip")
    for i, tower in enumerate(
        (
            ImageTower("transformers", model=str(tmp_path / "clip"), size=32, train="full"),
            ImageTower("small", features=32),
        )
    ):
        tower.fit(PICTURES[:4]).save(tmp_path / str(i))
        module, loaded = tower.build(), load_tower(tmp_path / str(i))
        fresh = loaded.build()
        fresh.load_state_dict(module.state_dict())
        torch.testing.assert_close(embedded(fresh, PICTURES[:4]), embedded(module, PICTURES[:4]))


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    Image.new("RGB", (40, 40), (200, 10, 10)).save(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes(b"")
    paths = [str(tmp_path / "a.png"), str(tmp_path / "b.png")]
    tower = build_tower(guess_tower(paths), encoder="colors")
    reasons = tower.check(paths)
    assert reasons[0] is None
    assert "0 bytes" in (reasons[1] or "")
    with pytest.raises(NearfarError, match=r"b\.png is empty"):
        tower.fit(paths)
    assert len(tower.fit(paths[:1]).read([])) == 0
    with pytest.raises(NearfarError, match="was not fitted"):
        ImageTower("colors").build()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"encoder": "efficentnet"}, "did you mean 'efficientnet'"),
        ({"featurs": 3, "encoder": "small"}, "did you mean 'features'"),
        ({"features": 3, "encoder": "mobilenet"}, "has no option 'features'"),
        ({"features": 3, "encoder": "colors"}, "no network and has no features"),
        ({"encoder": "colors", "pretrained": True}, "no network and has no pretrained"),
        ({"encoder": "colors", "train": "full"}, "train=head or train=frozen"),
        ({"encoder": "small", "pretrained": True}, "no trained weights"),
        ({"encoder": "small", "model": "a/b"}, "needs encoder=transformers"),
        ({"train": "lora"}, "encoder=efficientnet is trained by"),
        ({"train": "ful"}, "did you mean 'full'"),
        ({"size": 16}, "at least 32"),
        ({"size": "whole"}, "'own' for arrays"),
        ({"size": True}, "at least 32"),
        ({"lr": -1}, "learning rate above 0"),
        ({"lora_rank": 0}, "lora_rank=0"),
        ({"seed": -1}, "seed=-1"),
        ({"device": "abacus"}, "no such device"),
        ({"standardize": 1}, "true or false"),
        ({"pretrained": "yes"}, "true, false or null"),
        ({"gradient_checkpointing": True}, "is for a trained encoder=transformers"),
    ],
)
def test_wrong_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(NearfarError, match=message):
        build_tower("image", **options)


@pytest.mark.slow
def test_weights_that_are_not_to_be_had_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import importlib.util

    known = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if "mobilenet" in name else known(name, *a)
    )
    with pytest.raises(NearfarError, match=r"encoder=mobilenet takes .* pip install .* pretrained=false"):
        ImageTower("mobilenet").fit(PICTURES[:2])
    ImageTower("mobilenet", pretrained=False, train="frozen").fit(PICTURES[:2])
    with pytest.raises(NearfarError, match=r"not to be had.*encoder=efficientnet.*model=FOLDER"):
        ImageTower("transformers", model=str(tmp_path / "none")).fit(PICTURES[:2])


@pytest.mark.slow
def test_lora_without_linear_layers(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("peft")
    config = transformers.ResNetConfig(
        depths=[1, 1, 1, 1], hidden_sizes=[8, 8, 8, 8], embedding_size=8, layer_type="basic"
    )
    transformers.ResNetModel(config).save_pretrained(tmp_path)
    with pytest.raises(NearfarError, match="no linear layer"):
        ImageTower("transformers", model=str(tmp_path), train="lora", size=64).build()
