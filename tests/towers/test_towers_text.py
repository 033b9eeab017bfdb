"""The text tower: every way to train an encoder, tiny random transformers, saving and loading, wrong options."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from nearfar.data.batch import Rows
from nearfar.errors import NearfarError
from nearfar.models.views import PassThrough
from nearfar.towers import build_tower, load_tower
from nearfar.towers.text import TextTower, length_groups

TEXTS = [
    "near the river",
    "far",
    "a hill far away from the sea and the town",
    "the sea",
    "a town near a hill",
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny BERT with random weights and a word tokenizer, as a folder."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("bert")
    words = ["[PAD]", "[UNK]", *sorted({word for text in TEXTS for word in text.split()})]
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", model_max_length=32
    ).save_pretrained(folder)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(words),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
    )
    BertModel(config).save_pretrained(folder)
    return str(folder)


def embedded(tower: TextTower, module: nn.Module, texts: list[str] = TEXTS) -> torch.Tensor:
    with torch.no_grad():
        rows: torch.Tensor = module.eval()(tower.read(texts).batch(torch.arange(len(texts))))
    return rows


@pytest.mark.slow
@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_a_trained_transformer_starts_from_what_the_frozen_one_computes(model: str, pooling: str) -> None:
    frozen = TextTower("transformer", "frozen", model=model, pooling=pooling)
    trained = TextTower("transformer", "full", model=model, pooling=pooling)
    expected = torch.from_numpy(frozen.reference(TEXTS))
    assert torch.equal(embedded(frozen, frozen.build()), expected)
    # Texts of similar length are computed together: padded differently, the same within rounding.
    assert torch.allclose(embedded(trained, trained.build()), expected, atol=1e-6)
    assert trained.lr == 2e-5
    assert all(p.requires_grad for p in trained.build().parameters())
    assert isinstance(frozen.build(), PassThrough)


@pytest.mark.slow
def test_rows_keep_their_order_whatever_their_length(model: str) -> None:
    tower = TextTower("transformer", "full", model=model)
    module = tower.build()
    together = embedded(tower, module, TEXTS * 9)
    alone = torch.cat([embedded(tower, module, [text]) for text in TEXTS])
    assert torch.allclose(together, alone.repeat(9, 1), atol=1e-6)


@pytest.mark.parametrize("seed", range(3))
def test_length_groups_cover_every_row_once_in_order(seed: int) -> None:
    lengths = sorted(np.random.default_rng(seed).integers(1, 60, size=100).tolist())
    groups = length_groups(lengths)
    assert [i for rows, _ in groups for i in range(rows.start, rows.stop)] == list(range(100))
    assert all(longest == max(lengths[rows]) for rows, longest in groups)
    assert all(rows.stop - rows.start >= 16 for rows, _ in groups[:-1])


@pytest.mark.slow
def test_adapters_start_as_the_pretrained_network_and_train_little(model: str) -> None:
    pytest.importorskip("peft")
    full = TextTower("transformer", "full", model=model).build()
    tower = TextTower("transformer", "lora", model=model, lora_rank=2)
    module = tower.build()
    reference = TextTower("transformer", "frozen", model=model).reference(TEXTS)
    assert torch.allclose(embedded(tower, module), torch.from_numpy(reference), atol=1e-6)
    trained = sum(p.numel() for p in module.parameters() if p.requires_grad)
    assert 0 < trained < 0.5 * sum(p.numel() for p in full.parameters())
    assert tower.lr == 2e-4
    assert "adapters of rank 2" in tower.description


@pytest.mark.slow
def test_gradient_checkpointing_changes_no_gradient(model: str) -> None:
    gradients = []
    for checkpointing in (False, True):
        tower = TextTower("transformer", "full", model=model, gradient_checkpointing=checkpointing)
        module = tower.build()
        for layer in module.modules():
            if isinstance(layer, nn.Dropout):
                layer.p = 0.0
        module.train()(tower.read(TEXTS).batch(torch.arange(5))).square().sum().backward()
        gradients.append([p.grad.clone() for p in module.parameters() if p.grad is not None])
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*gradients, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("train", ["head", "full"])
def test_a_saved_transformer_reads_new_texts_with_the_weights_of_the_run(
    model: str, train: str, tmp_path: Path
) -> None:
    tower = TextTower("transformer", train, model=model)  # type: ignore[arg-type]
    module = tower.build()
    expected = embedded(tower, module)
    tower.save(tmp_path)
    loaded = load_tower(tmp_path)
    assert isinstance(loaded, TextTower)
    again = loaded.build()
    again.load_state_dict(module.state_dict())
    assert torch.equal(embedded(loaded, again), expected)


def test_words_are_trained_from_nothing_and_saved_with_their_vocabulary(tmp_path: Path) -> None:
    tower = TextTower("words", dims=8, hidden=8, vectors=False).fit(TEXTS)
    assert tower.reference(TEXTS) is None
    assert tower.lr is None
    module = tower.build()
    expected = embedded(tower, module)
    assert expected.shape == (5, module.width)
    tower.save(tmp_path)
    loaded = load_tower(tmp_path)
    again = loaded.build()
    again.load_state_dict(module.state_dict())
    assert torch.equal(embedded(loaded, again), expected)  # type: ignore[arg-type]


def test_ngrams_are_frozen_rows(tmp_path: Path) -> None:
    tower = TextTower("ngram", dims=4, min_df=1, max_df=1.0).fit(TEXTS)
    rows = tower.read(TEXTS)
    assert isinstance(rows, Rows)
    assert tower.build().width == rows.values.shape[1]
    tower.save(tmp_path)
    assert np.array_equal(load_tower(tmp_path).read(TEXTS).values, rows.values)  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"encoder": "minlm"}, "did you mean 'minilm'"),
        ({"encoder": "ngram", "dim": 3}, "encoder=ngram has no option 'dim'; did you mean 'dims'"),
        (
            {"encoder": "ngram", "train": "full"},
            "train=full: encoder=ngram is trained by train=head or train=frozen",
        ),
        ({"encoder": "words", "train": "ful"}, "did you mean 'full'"),
        ({"encoder": "words", "lr": -1}, "lr=-1: a learning rate above 0"),
        ({"encoder": "transformer", "pooling": "max"}, "pooling='max' is unknown"),
        ({"encoder": "words", "hidden": 7}, "hidden=7: an even number is needed"),
    ],
)
def test_wrong_options_are_named(options: dict[str, object], message: str) -> None:
    with pytest.raises(NearfarError, match=message) as error:
        build_tower("text", "the tower of 'word'", **options)
    assert "text_encoder" not in str(error.value)


def test_weights_that_are_not_to_be_had_are_named(tmp_path: Path) -> None:
    tower = TextTower("transformer", "full", model=str(tmp_path / "none"))
    with pytest.raises(NearfarError, match="is not to be had"):
        tower.build()


def test_empty_texts_cannot_be_read() -> None:
    assert TextTower().check(["a", " ", 3]) == [None, "empty text", "empty text"]


@pytest.mark.slow
@pytest.mark.parametrize("train", ["frozen", "head", "full", "lora"])
def test_states_of_tokens_are_those_of_the_network(model: str, train: str, tmp_path: Path) -> None:
    """A system that attends to tokens reads tokens even where the network is frozen."""
    if train == "lora":
        pytest.importorskip("peft")
    from transformers import AutoModel, AutoTokenizer

    tower = TextTower("transformer", model=model, train=train, states=True, max_length=8)  # type: ignore[arg-type]
    module = tower.build()
    tokens = tower.read(TEXTS).batch(torch.arange(len(TEXTS)))
    module.train()
    frozen = train in ("frozen", "head")
    assert module.network.training != frozen  # type: ignore[union-attr]
    assert any(p.requires_grad for p in module.parameters()) != frozen
    module.eval()
    tokenizer, network = AutoTokenizer.from_pretrained(model), AutoModel.from_pretrained(model).eval()
    with torch.no_grad():
        states = module.states(tokens)  # type: ignore[operator]
        for i, text in enumerate(TEXTS):
            one = tokenizer([text], truncation=True, max_length=8, return_tensors="pt")
            alone = network(**one).last_hidden_state[0]
            torch.testing.assert_close(states[i, : len(alone)], alone, rtol=1e-4, atol=1e-5)
    assert "states of at most 8 tokens" in tower.description
    tower.save(tmp_path)
    loaded = load_tower(tmp_path)
    assert isinstance(loaded, TextTower)
    assert loaded.options == tower.options
    again = loaded.read(TEXTS).batch(torch.arange(len(TEXTS)))
    assert torch.equal(again["id"], tokens["id"])  # type: ignore[index]


def test_states_of_words_and_none_of_n_grams() -> None:
    tower = TextTower("words", states=True, dims=4, hidden=4, vectors=False).fit(TEXTS)
    module = tower.build().eval()
    tokens = tower.read(TEXTS).batch(torch.arange(len(TEXTS)))
    with torch.no_grad():
        states = module.states(tokens)  # type: ignore[operator]
        mask = tokens.mask[..., None]  # type: ignore[union-attr]
        torch.testing.assert_close((states * mask).sum(1) / mask.sum(1), module(tokens))
    with pytest.raises(
        NearfarError, match="encoder=ngram gives a vector for each text and has no states of tokens"
    ):
        TextTower("ngram", states=True)
