"""The text encoder that trains with its task: words, pieces, first vectors, network, and what is kept of it."""

from __future__ import annotations

import json
import math
import unicodedata

import numpy as np
import pytest
import torch
from torch import nn

from nearfar.errors import NearfarError
from nearfar.models.projection import Dropout
from nearfar.models.text.trainable import (
    BidirectionalLSTM,
    RecurrentTextEncoder,
    WordEmbedding,
    WordTextEncoder,
    word_windows,
)
from nearfar.models.text.words import (
    UNKNOWN,
    TokenBatch,
    WordVocabulary,
    context_vectors,
    spelling,
    split_words,
    word_pieces,
)

pytestmark = pytest.mark.slow  # real runs

TEXTS = [
    "Pin trâu, chụp ảnh đẹp",
    "Máy nóng, pin tụt nhanh quá!!!",
    "màn hình đẹp giá 7.990.000đ",
    "nhân viên nhiệt tình 👍",
    "pin kém, màn hình mờ",
]


def small(**options) -> WordTextEncoder:
    chosen = {"dims": 6, "hidden": 8, "cache": False, "dropout": 0.3} | options
    return WordTextEncoder(**chosen).fit(TEXTS)


def unit_normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# -- words ---------------------------------------------------------------------------------------------------------
def test_words_do_not_depend_on_unicode_form_case_repeats_or_place_of_the_tone():
    text = "Máy HÒA đẹp"
    for form in ("NFC", "NFD", "NFKC"):
        assert split_words(unicodedata.normalize(form, text)) == ["máy", "hòa", "đẹp"]
    assert [spelling(w) for w in split_words("hoà đẹpppp")] == [spelling(w) for w in split_words("hòa đẹp")]
    assert spelling("hòa") != spelling("hóa") != spelling("hoa")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("88% 5g 12:30 1000mah", ["00", "%", "0", "g", "0.0", "000", "mah"]),
        ("tệ....... quá!", ["tệ", "..", "quá", "!"]),
        ("good__bad", ["good", "__", "bad"]),
        ("😡😡😡👍", ["😡😡", "👍"]),
        ("zoom google xoong okkk", ["zoom", "google", "xoong", "ok"]),
        ("", []),
        ("  \n\t ", []),
    ],
)
def test_numbers_signs_and_repeats(text, words):
    assert split_words(text) == words


def test_at_most_so_many_words_are_read():
    assert split_words("a b c d", 2) == ["a", "b"]


def test_pieces_are_all_character_ngrams_of_both_forms():
    word, shortest, longest = "đẹp", 2, 4
    expected = ["~dep"]
    for form, mark in (("dep", "~"), (spelling("đẹp"), "")):
        whole = f"<{form}>"
        for n in range(shortest, longest + 1):
            for start in range(len(whole)):
                if start + n <= len(whole):
                    expected.append(mark + whole[start : start + n])
    assert word_pieces(word, shortest, longest) == expected
    assert not [p for p in word_pieces("dep") if not p.startswith("~")]  # nothing twice where no mark is


def test_vocabulary_counts_and_unknown_words():
    vocabulary = WordVocabulary.fit(["pin pin tốt", "pin tệ", "tốt"], min_count=2, min_piece_count=1)
    assert vocabulary.words == ["pin", spelling("tốt")]
    assert vocabulary.rows("Pin rất TỐT") == [2, UNKNOWN, 3]
    assert vocabulary.rows("") == [UNKNOWN]
    assert vocabulary.pieces_of("") == []
    shared = set(vocabulary.pieces_of(spelling("tot"))) & set(vocabulary.pieces_of(spelling("tốt")))
    assert len(shared) > 3
    rare = WordVocabulary.fit(["pin tốt"], min_piece_count=2)
    assert rare.pieces == []


def test_vocabulary_ignores_the_order_of_the_texts_and_survives_json():
    a, b = WordVocabulary.fit(TEXTS), WordVocabulary.fit(TEXTS[::-1])
    assert a.to_dict() == b.to_dict()
    again = WordVocabulary.from_dict(json.loads(json.dumps(a.to_dict())))
    assert [again.rows(t) for t in TEXTS] == [a.rows(t) for t in TEXTS]
    assert again.pieces_of("pin") == a.pieces_of("pin")


# -- first vectors -------------------------------------------------------------------------------------------------
def test_first_vectors_equal_the_plain_computation():
    """Loops and a dense SVD in float64; singular vectors have free signs, so inner products are compared."""
    texts = [*TEXTS, "pin trâu máy đẹp", "màn hình đẹp", "pin pin pin"]
    vocabulary = WordVocabulary.fit(texts, min_piece_count=2)
    words, pieces = len(vocabulary.words) + 2, len(vocabulary.pieces) + 1
    near = np.zeros((words, words))
    for text in texts:
        rows = vocabulary.rows(text)
        for i, left in enumerate(rows):
            for j, right in enumerate(rows):
                if i != j and abs(i - j) <= 5:
                    near[left, right] += 1 / abs(i - j)
    members = np.zeros((pieces, words))
    for word in vocabulary.words:
        for piece in vocabulary.pieces_of(word):
            members[piece, vocabulary.row(word)] = 1
    counts = np.concatenate([near, members @ near])
    share = near.sum(0) ** 0.75 / (near.sum(0) ** 0.75).sum()
    information = np.zeros_like(counts)
    for i in range(len(counts)):
        for j in range(words):
            if counts[i, j] > 0:
                n = counts[i].sum()
                information[i, j] = max(math.log(counts[i, j] / (n * share[j])), 0) * n / (n + 5)
    _, values, axes = np.linalg.svd(information[:words])
    dims = 4
    expected = information @ axes[:dims].T / np.sqrt(values[:dims])
    expected /= np.sqrt((expected[:words] ** 2).mean())
    w, p = context_vectors(vocabulary, texts, dims)
    found = np.concatenate([w, p]).astype(np.float64)
    np.testing.assert_allclose(
        found @ found.T, expected @ expected.T, atol=2e-3 * np.abs(expected @ expected.T).max()
    )
    assert not w[:2].any()
    assert not p[0].any()


def test_first_vectors_of_texts_without_neighbours_are_zero():
    vocabulary = WordVocabulary.fit(["pin", "tốt"], min_piece_count=1)
    words, pieces = context_vectors(vocabulary, ["pin", "tốt"], 5)
    assert words.shape == (4, 5)
    assert not words.any()
    assert not pieces.any()


def test_more_dimensions_than_words_leave_zeros():
    vocabulary = WordVocabulary.fit(["pin tốt", "pin tệ"])
    words, _ = context_vectors(vocabulary, ["pin tốt", "pin tệ"], 20)
    assert words.shape == (5, 20)
    assert np.isfinite(words).all()
    assert not words[:, 6:].any()


# -- network -------------------------------------------------------------------------------------------------------
def test_a_word_is_its_row_plus_its_pieces_and_an_unknown_word_its_pieces_alone():
    encoder = small()
    embedding = encoder.build().embedding.eval()
    batch = encoder.tokenize(["pin đẹpp maiii nóngg xyzxyz", "pin"]).batch([0, 1])
    found = embedding(batch)
    vocabulary = encoder.vocabulary
    for i, text in enumerate(["pin đẹpp maiii nóngg xyzxyz", "pin"]):
        for j, word in enumerate(vocabulary.tokens(text)):
            numbers = vocabulary.pieces_of(word)
            expected = torch.zeros(6, dtype=torch.float64)
            for number in numbers:
                expected += embedding.pieces.weight[number].double() / math.sqrt(len(numbers))
            if vocabulary.row(word) != UNKNOWN:
                expected += embedding.words.weight[vocabulary.row(word)].double()
            torch.testing.assert_close(found[i, j].double(), expected, atol=1e-5, rtol=1e-5)
    assert not found[1, 1:].any()
    assert {UNKNOWN} < set(batch["word"].flatten().tolist())


def test_lstm_equals_packed_sequences():
    dims, units = 5, 3
    ours = BidirectionalLSTM(dims, units)
    theirs = nn.LSTM(dims, units, batch_first=True, bidirectional=True)
    state = dict(ours.forward_half.state_dict())
    state |= {f"{name}_reverse": value for name, value in ours.backward_half.state_dict().items()}
    theirs.load_state_dict(state)
    lengths = torch.tensor([4, 1, 7])
    mask = torch.arange(7) < lengths[:, None]
    x = unit_normal(3, 7, dims)
    packed = nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
    expected = nn.utils.rnn.pad_packed_sequence(theirs(packed)[0], batch_first=True)[0]
    torch.testing.assert_close(ours(x, mask), expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("width", [1, 2, 3, 5])
def test_windows_make_a_convolution(width):
    layer = nn.Linear(width * 4, 3)
    convolution = nn.Conv1d(4, 3, width)
    with torch.no_grad():
        convolution.weight.copy_(layer.weight.view(3, width, 4).transpose(1, 2))
        convolution.bias.copy_(layer.bias)
    x = unit_normal(2, 6, 4)
    padded = nn.functional.pad(x.transpose(1, 2), (width // 2, (width - 1) // 2))
    torch.testing.assert_close(layer(word_windows(x, width)), convolution(padded).transpose(1, 2))


@pytest.mark.parametrize("options", [{}, {"widths": ()}, {"layers": 2, "widths": (2,)}, {"pieces": None}])
def test_results_do_not_depend_on_padding_or_neighbours(options):
    encoder = small(**options)
    network = encoder.build().eval()
    table = encoder.tokenize(["pin tốt", TEXTS[1], "qqq"])
    together, mean = network(table.batch([0, 1, 2]))
    assert together.shape == (3, int(table.lengths.max()), network.width)
    for i in range(3):
        alone, pooled = network(table.batch([i]))
        length = int(table.lengths[i])
        torch.testing.assert_close(together[i, :length], alone[0], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(mean[i], together[i, :length].mean(0), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(mean[i], pooled[0], atol=1e-5, rtol=1e-5)
        assert not together[i, length:].any()


def test_a_step_trains_words_and_pieces_but_not_the_blank_rows():
    encoder = small(word_dropout=0.0)
    network = encoder.build()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    network(encoder.tokenize(["pin tốt máyyy", "mai"]).batch([0, 1]))[0].square().sum().backward()
    torch.optim.SGD(network.parameters(), 1.0).step()
    words, pieces = network.embedding.words.weight, network.embedding.pieces.weight
    assert not words[:2].any()
    assert not pieces[0].any()
    assert not torch.equal(words, before["embedding.words.weight"])
    assert not torch.equal(pieces, before["embedding.pieces.weight"])


def test_the_network_learns_the_order_of_words():
    """ "pin tốt" against "tốt pin": the same words, so that nothing but order tells them apart."""
    encoder = WordTextEncoder(dims=8, hidden=8, cache=False, dropout=0.0, word_dropout=0.0)
    texts = ["pin tốt", "tốt pin"] * 4
    table = encoder.fit(texts).tokenize(texts)
    torch.manual_seed(0)
    network, head = encoder.build(), nn.Linear(16, 1)
    optimizer = torch.optim.Adam([*network.parameters(), *head.parameters()], 0.02)
    answer = torch.tensor([1.0, 0.0] * 4)
    for _ in range(60):
        loss = nn.functional.binary_cross_entropy_with_logits(
            head(network(table.batch(range(8)))[1])[:, 0], answer
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert float(loss.detach()) < 0.05


def test_equal_seeds_build_and_draw_equally():
    encoder = small()
    batch = encoder.tokenize(TEXTS).batch(range(5))
    results = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        results.append(encoder.build().train()(batch)[0])
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])


def test_first_vectors_begin_the_embedding():
    encoder = small()
    words, pieces = context_vectors(encoder.vocabulary, TEXTS, 6)
    torch.manual_seed(0)
    one = encoder.build().embedding
    torch.manual_seed(1)
    other = encoder.build().embedding
    torch.testing.assert_close(one.words.weight.detach(), torch.from_numpy(words) * 0.7)
    torch.testing.assert_close(one.pieces.weight.detach(), torch.from_numpy(pieces) * 0.7)
    assert torch.equal(one.words.weight, other.words.weight)
    plain = small(vectors=False).build().embedding
    assert not torch.equal(plain.words.weight, one.words.weight)


def test_words_without_vectors_of_their_own_are_as_often_as_asked():
    embedding = WordEmbedding([[], [], *([1] for _ in range(2000))], 1, 1, dropout=0.0, word_dropout=0.25)
    with torch.no_grad():
        embedding.words.weight[2:] = 1.0
        embedding.pieces.weight[1] = 10.0
    batch = TokenBatch({"word": torch.arange(2, 2002)[None]}, torch.ones(1, 2000, dtype=torch.bool))
    torch.manual_seed(0)
    values = embedding(batch).flatten()
    whole, pieces_alone, none = ((values == v).float().mean() for v in (11.0, 10.0, 0.0))
    assert float(whole + pieces_alone + none) == 1.0
    assert abs(float(none) - 0.25) < 0.03
    assert abs(float(pieces_alone) - 0.75 * 0.25) < 0.03
    assert (embedding.eval()(batch) == 11.0).all()


# -- dropout -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("p", [0.1, 0.4, 0.9])
def test_dropout_zeroes_its_share_keeps_the_mean_and_is_the_gradient(p):
    torch.manual_seed(0)
    x = torch.ones(200_003, requires_grad=True)
    y = Dropout(p)(x)
    assert abs(float((y == 0).float().mean()) - p) < 0.005
    assert abs(float(y.detach().mean()) - 1) < 0.03
    y.sum().backward()
    assert torch.equal(x.grad, y.detach())


def test_dropout_has_no_pattern_and_leaves_evaluation_alone():
    torch.manual_seed(0)
    mask = (Dropout(0.5)(torch.ones(8000, 8)) == 0).double()
    correlation = torch.corrcoef(mask.T)
    assert float((correlation - torch.eye(8)).abs().max()) < 0.06
    assert float((mask.mean(0) - 0.5).abs().max()) < 0.03  # every place in the 64 bits
    x = unit_normal(5)
    assert torch.equal(Dropout(0.5).eval()(x), x)
    assert torch.equal(Dropout(0.0)(x), x)
    assert Dropout(0.5)(torch.zeros(0, 3)).shape == (0, 3)
    assert Dropout(0.5)(x.bfloat16()).dtype == torch.bfloat16
    with pytest.raises(NearfarError, match="from 0 to below 1"):
        Dropout(1.0)


# -- what is kept ----------------------------------------------------------------------------------------------------
def test_a_saved_encoder_reads_new_texts_alike(tmp_path):
    encoder = small()
    network = encoder.build().eval()
    encoder.save(tmp_path)
    again = WordTextEncoder.load(tmp_path)
    restored = again.build().eval()
    restored.load_state_dict(network.state_dict())
    new = ["pin mới tốt 👍", "???", ""]
    for name in ("word", "pieces"):
        assert torch.equal(encoder.tokenize(new).features[name], again.tokenize(new).features[name])
    batch = again.tokenize(new).batch(range(3))
    torch.testing.assert_close(restored(batch)[0], network(batch)[0])
    assert again.description == encoder.description
    assert again.options == encoder.options


def test_first_vectors_come_from_the_cache_the_second_time(tmp_path, monkeypatch):
    monkeypatch.setenv("NEARFAR_CACHE", str(tmp_path))
    first = small(cache=True).build().embedding.words.weight
    monkeypatch.setattr("nearfar.models.text.trainable.context_vectors", None)
    assert torch.equal(small(cache=True).build().embedding.words.weight, first)


def test_what_cannot_be_loaded_is_named(tmp_path):
    encoder = small()
    with pytest.raises(NearfarError, match="holds no saved text encoder"):
        WordTextEncoder.load(tmp_path)
    encoder.save(tmp_path)
    (tmp_path / "vocabulary.json").write_text('{"words": 3}')
    with pytest.raises(NearfarError, match="is damaged"):
        WordTextEncoder.load(tmp_path)
    (tmp_path / "vocabulary.json").unlink()
    with pytest.raises(NearfarError, match="holds no vocabulary"):
        WordTextEncoder.load(tmp_path)


def test_errors_name_the_option():
    for options, words in [
        ({"dims": 0}, "dims=0"),
        ({"hidden": 7}, "hidden=7: an even number"),
        ({"hidden": 2}, "hidden=2"),
        ({"widths": (0,)}, "widths=0"),
        ({"widths": "3"}, "widths="),
        ({"pieces": (3, 2)}, "pieces="),
        ({"pieces": (2,)}, "pieces="),
        ({"dropout": 1.0}, "dropout=1.0"),
        ({"word_dropout": -0.1}, "word_dropout=-0.1"),
        ({"max_length": 0}, "max_length=0"),
    ]:
        with pytest.raises(NearfarError) as caught:
            WordTextEncoder(**options)
        assert words in str(caught.value)
    with pytest.raises(NearfarError, match="was not fitted"):
        WordTextEncoder().tokenize(["pin"])
    with pytest.raises(NearfarError, match="not a single word"):
        WordTextEncoder(cache=False).fit(["", " "])


def test_network_of_the_plain_parts():
    """The module takes any embedding; its width says what comes out."""

    class Ones(nn.Module):
        def forward(self, tokens):
            return torch.ones(*tokens.mask.shape, 3) * tokens.mask[..., None]

    network = RecurrentTextEncoder(Ones(), 3, hidden=4, widths=(1, 2, 3, 4))
    states, pooled = network(TokenBatch({}, torch.ones(2, 5, dtype=torch.bool)))
    assert states.shape == (2, 5, network.width)
    assert pooled.shape == (2, network.width)
