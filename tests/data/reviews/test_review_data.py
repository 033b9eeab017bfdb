"""Readers of aspect files: every layout, every kind of damage counted, no text in two splits."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nearfar.data.reviews.aspect_data import AspectData, load_embedded, load_files
from nearfar.data.reviews.labels import code_words, parse_field, polarities_advice, polarity_code
from nearfar.data.reviews.readers import read_records
from nearfar.data.reviews.records import repeats, text_key
from nearfar.errors import NearfarError
from nearfar.models.aspects import linear_answers
from tiny_aspects import reviews, split_folder, write_columns, write_field


def written(path: Path, text: str) -> Path:
    path.write_bytes(text.encode("utf-8"))
    return path


def loaded(folder: Path, **options: Any) -> AspectData:
    names = {"train": "Train", "val": "Dev", "test": "Test"}
    files = {split: folder / f"{name}.csv" for split, name in names.items()}
    return load_files({s: f if f.exists() else None for s, f in files.items()}, **options)


def test_both_layouts_give_the_same_codes(tmp_path: Path) -> None:
    records = reviews(60)
    aspects = sorted({a for labels in records.labels for a in labels})
    by_field = read_records(write_field(tmp_path / "a.csv", records, range(60)))
    by_column = read_records(write_columns(tmp_path / "b.csv", records, range(60), aspects))
    assert by_field.texts == by_column.texts == records.texts
    np.testing.assert_array_equal(by_field.codes(aspects), records.codes(aspects))
    np.testing.assert_array_equal(by_column.codes(aspects), records.codes(aspects))
    assert (by_field.layout, by_column.layout) == ("label field", "one column per aspect")


def test_a_quoted_text_holds_line_breaks_commas_and_quotes(tmp_path: Path) -> None:
    path = written(
        tmp_path / "a.csv",
        '\ufeffindex,comment,label\r\n0,"Pin ""trâu"",\r\nmáy\nok",{BATTERY#Positive};{OTHERS};\r\n1,ok,\r\n',
    )
    records = read_records(path)
    assert records.texts[0].split() == ["Pin", '"trâu",', "máy", "ok"]
    assert records.labels == [{"BATTERY": 3, "OTHERS": 2}, {}]
    assert not records.rejections
    assert not records.unread


def test_what_cannot_be_read_is_counted_and_the_rest_stays(tmp_path: Path) -> None:
    path = written(
        tmp_path / "a.csv",
        "comment,label\n"
        "good,{CAMERA#Positive};{PRICE#so-so};\n"
        ",{CAMERA#Positive};\n"
        "torn,{CAMERA#Negative}};rubbish\n"
        "both,{CAMERA#Positive};{CAMERA#Negative};\n"
        'broken,"{CAMERA#Positive}\n'
        "a,b,c\n"
        "fine,{ CAMERA # neutral };\n",
    )
    records = read_records(path)
    assert records.texts == ["good", "torn", "both", "fine"]
    assert [r.get("CAMERA") for r in records.labels] == [3, 1, -1, 2]
    assert records.labels[0]["PRICE"] == -1
    assert records.rejections.counts == {"broken quoting": 1, "wrong number of fields": 1, "empty text": 1}
    assert records.unread.counts["label that cannot be read"] == 4
    first = records.unread.first["label that cannot be read"][0]
    assert (first.row, first.value) == (2, "PRICE#so-so")


def test_columns_that_are_no_aspects_are_told_apart(tmp_path: Path) -> None:
    path = written(
        tmp_path / "a.csv",
        "stars,data,Battery,Camera,shop\n5,good,Positive,,A\n1,bad,Mixed,Negative,B\n3,so,neg,,A\n",
    )
    records = read_records(path)
    assert [set(labels) for labels in records.labels] == [{"Battery"}, {"Battery", "Camera"}, {"Battery"}]
    assert [labels["Battery"] for labels in records.labels] == [3, -1, 1]
    assert records.unread.counts == {"column that is no aspect": 2, "polarity that is none": 1}
    named = read_records(path, aspects=["camera"])
    assert [set(labels) for labels in named.labels] == [set(), {"Camera"}, set()]


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        ("a,b\n1,2\n", {}, "no column for text"),
        ("comment,n\ngood,5\n", {}, "no column of polarities"),
        ("comment,label\ngood,positive\nbad,negative\n", {}, "hold no label of the form"),
        ("comment,Camera\ngood,Positive\n", {"aspects": ["Camra"]}, "did you mean 'Camera'"),
        ("comment,Camera\n,Positive\n", {}, "none of its 1 rows"),
        ("comment,label\ngood,{A#Positive};\n", {"text_column": "coment"}, "did you mean 'comment'"),
        ("", {}, "empty"),
    ],
)
def test_bad_files_are_named(tmp_path: Path, text: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(NearfarError, match=message):
        read_records(written(tmp_path / "a.csv", text), **options)


@pytest.mark.slow
def test_official_splits_and_where_thresholds_come_from(tmp_path: Path) -> None:
    data = loaded(split_folder(tmp_path / "all"))
    assert (len(data.train), len(data.val or ()), len(data.test or ())) == (180, 60, 60)
    assert (data.reported, data.threshold_split, data.tune) == ("test", "val", None)
    without = loaded(split_folder(tmp_path / "two", test=False))
    assert (without.reported, without.threshold_split) == ("val", "tune")
    assert without.tune is not None
    assert len(without.train) + len(without.tune) == 180
    assert "no test file: results are on val" in without.summary()
    none = loaded(split_folder(tmp_path / "two", test=False), tune_fraction=0.0)
    assert (none.threshold_split, len(none.train)) == (None, 180)
    assert "no thresholds are chosen" in none.summary()
    only = load_files({"train": tmp_path / "two" / "Train.csv"}, tune_fraction=0.0)
    assert len(only.val or ()) == 18
    again = load_files({"train": tmp_path / "two" / "Train.csv"}, tune_fraction=0.0)
    assert again.val is not None
    assert only.val is not None
    assert again.val.ids == only.val.ids


def test_no_text_crosses_splits(tmp_path: Path) -> None:
    folder = split_folder(tmp_path, n=100)
    train, dev, test = ((folder / f"{n}.csv").read_text() for n in ("Train", "Dev", "Test"))
    body = test.split("\n", 1)[1].strip().splitlines()
    # The same text in a different letter case and form; the official test rows stay.
    written(folder / "Dev.csv", dev + body[0].upper().replace("{", "{") + "\n")
    written(folder / "Train.csv", train + body[1] + "\n" + train.splitlines()[1] + "\n")
    data = loaded(folder)
    assert data.test is not None
    assert len(data.test) == 20
    keys = {name: {text_key(t) for t in split.texts("text")} for name, split in data.splits.items()}
    assert not keys["train"] & keys["val"] | keys["train"] & keys["test"] | keys["val"] & keys["test"]
    assert data.left_out == {
        "train, its text also stands in val or test": 1,
        "train, the same text and labels again": 1,
        "val, its text also stands in test": 1,
    }
    assert data.layout()["leaks"] == {}


@pytest.mark.slow
def test_unknown_aspects_are_listed_with_the_nearest(tmp_path: Path) -> None:
    folder = split_folder(tmp_path, n=100)
    dev = (folder / "Dev.csv").read_text().replace("{CAMERA#", "{CAMRA#", 1)
    written(folder / "Dev.csv", dev)
    data = loaded(folder)
    assert "CAMRA" not in data.scheme.aspects
    (source,) = (s for s in data.sources if s["path"].endswith("Dev.csv"))
    (listed,) = source["unread_labels"]["first"]["aspect that is not one of train's (val)"]
    assert listed["value"] == "CAMRA"
    assert "CAMERA" in listed["detail"]
    assert "labels not read" in data.summary() or "label not read" in data.summary()
    with pytest.raises(NearfarError, match="min_mentions"):
        loaded(folder, min_mentions=10_000)


def table(path: Path, header: str, *rows: str, repeat: int = 8) -> Path:
    """``{i}`` in a row is the number of its repetition."""
    lines = [row.replace("{i}", str(i)) for i in range(repeat) for row in rows]
    return written(path, "\n".join([header, *lines]) + "\n")


def as_labels(data: AspectData) -> set[tuple[str, str, int]]:
    """(text, aspect, code) of every label in all splits."""
    return {
        (text, data.scheme.aspects[a], int(codes[a]))
        for split in data.splits.values()
        for text, codes in zip(split.texts("text"), split.array("codes"), strict=True)
        for a in np.flatnonzero(codes)
    }


EXPECTED = {(f"t {i}", aspect, code) for i in range(8) for aspect, code in (("bar", 1), ("food", 3))}


@pytest.mark.parametrize(
    ("name", "header", "rows", "options"),
    [
        ("a.csv", "id,text,aspect,polarity", ["{i},t {i},food,positive", "{i},t {i},bar,negative"], {}),
        (
            "a.csv",
            "Sentence,Aspect Term,polarity,from,to",
            ["t {i},food,positive,1,2", "t {i},bar,neg,3,4"],
            {},
        ),
        ("a.tsv", "review\tcategory\tlabel", ["t {i}\tfood\tpos", "t {i}\tbar\tneg"], {}),
        (
            "a.csv",
            "text;subject;verdict",
            ["t {i};food;1", "t {i};bar;-1.0"],
            {
                "aspect_column": "subject",
                "polarity_column": "verdict",
                "polarities": {1: "positive", -1: "negative"},
            },
        ),
        ("a.csv", "text,food,bar", ["t {i},1,2"], {"polarities": {1: "positive", 2: "negative", 0: "none"}}),
        ("a.csv", "text,label", ['t {i},"{food, positive}, {bar, negative}"'], {}),
        ("a.csv", "text,aspects", ["t {i},\"[('food', 'positive'), ('bar', 'negative')]\""], {}),
        ("a.csv", "text,labels", ["t {i},food#positive;bar#negative"], {}),
        ("a.txt", "#0", ["t {i}", "{food, positive}, {bar, negative}", "", "#{i}"], {}),
        ("a.raw", "", ["t {i}$T$", "food", "positive", "t {i}$T$", "bar", "negative"], {}),
    ],
)
def test_every_layout_gives_the_same_labels(
    tmp_path: Path, name: str, header: str, rows: list[str], options: dict[str, Any]
) -> None:
    data = load_files({"train": table(tmp_path / name, header, *rows)}, tune_fraction=0.0, **options)
    labels = as_labels(data)
    if name == "a.raw":  # the term stands in the text, which is a different one for each term
        labels = {(text.removesuffix(aspect), aspect, code) for text, aspect, code in labels}
    assert labels == EXPECTED


def test_rows_that_contradict_each_other_are_counted(tmp_path: Path) -> None:
    rows = [
        "t {i},food,positive",
        "t {i},Food,negative",
        "t {i},bar,positive",
        "t {i},bar,positive",
        "t {i},x,",
    ]
    records = read_records(table(tmp_path / "a.csv", "text,aspect,polarity", *rows))
    assert len(records) == 8
    assert records.n_rows == 40
    assert records.labels[0] == {"food": -1, "bar": 3, "x": -1}
    assert records.unread.counts == {
        "contradicting labels of one text and aspect": 8,
        "polarity that is none": 8,
    }
    assert "40 rows became 8 reviews with 24 labels; 8 repeat a label" in records.notes[0]


@pytest.mark.parametrize(
    "words", [("positive", "conflict"), ("conflict", "positive"), ("conflict", "negative")]
)
def test_a_label_lost_to_one_that_is_not_read_is_counted(tmp_path: Path, words: tuple[str, str]) -> None:
    rows = [f"t {{i}},food,{word}" for word in words] + ["t {i},bar,positive", "t {i},x,negative"]
    records = read_records(table(tmp_path / "a.csv", "text,aspect,polarity", *rows))
    assert records.labels[0]["food"] == -1
    n = len(records)
    assert records.unread.counts == {
        "contradicting labels of one text and aspect": n,
        "polarity that is none": n,
    }


@pytest.mark.parametrize("polarities", [None, {"0": 0, "1": 3}])
@pytest.mark.parametrize(
    "names", ["food_positive,food_negative", "Food Pos,Food Neg", "A#B.positive,A#B.neutral"]
)
def test_a_column_for_each_polarity_is_refused(
    tmp_path: Path, names: str, polarities: dict[str, int] | None
) -> None:
    path = table(tmp_path / "a.csv", f"text,{names}", "t {i},1,0", "u {i},0,1", "w {i},0,0")
    with pytest.raises(NearfarError, match="one aspect by their names"):
        read_records(path, polarities=polarities)


@pytest.mark.parametrize(
    ("header", "rows", "options"),
    [
        ("text,FOOD,SERVICE", ["t {i},1,0", "u {i},2,3"], {}),
        ("text,FOOD,SERVICE", ["t {i},1,0", "u {i},2,3"], {"aspects": ["FOOD", "SERVICE"]}),
        ("text,FOOD,SERVICE", ["t {i},positive,0", "u {i},negative,1"], {"aspects": ["FOOD", "SERVICE"]}),
        ("text,aspect,polarity", ["t {i},food,1", "t {i},bar,-1", "t {i},x,0"], {}),
        ("text,aspect,sentiment", ["t {i},food,good", "t {i},bar,so so"], {}),
        ("text,label", ["t {i},{FOOD#gut};{BAR#mies}"], {}),
    ],
)
def test_values_that_mean_nothing_are_an_error_whose_option_works(
    tmp_path: Path, header: str, rows: list[str], options: dict[str, Any]
) -> None:
    from hydra.core.override_parser.overrides_parser import OverridesParser

    path = table(tmp_path / "a.csv", header, *rows)
    with pytest.raises(NearfarError, match=r"data\.polarities=") as error:
        load_files({"train": path}, **options)
    printed = re.search(r"'(data\.polarities=\{.*?\})'", str(error.value))
    assert printed is not None
    mapping = OverridesParser.create().parse_override(printed[1]).value()
    assert isinstance(mapping, dict)
    data = load_files({"train": path}, polarities=mapping, min_mentions=1, **options)
    assert all(not source["unread_labels"]["total"] for source in data.sources)
    assert len(data.scheme.pairs) >= 1


def test_texts_that_repeat_beside_one_column_of_polarities_are_asked_about(tmp_path: Path) -> None:
    rows = ["t {i},food,positive", "t {i},bar,negative"]
    path = table(tmp_path / "a.csv", "text,subject,verdict", *rows)
    with pytest.raises(NearfarError, match=r"'data.aspect_column=subject' 'data.polarity_column=verdict'"):
        read_records(path)
    data = load_files({"train": path}, aspect_column="subject", polarity_column="verdict", tune_fraction=0.0)
    assert as_labels(data) == EXPECTED


SENTENCE = (
    '<sentence id="{i}"><text>t {i}</text><aspectTerms><aspectTerm term="food" polarity="conflict"/></aspectTerms>'
    '<aspectCategories><aspectCategory category="food" polarity="positive"/><aspectCategory category="bar" '
    'polarity="negative"/></aspectCategories></sentence>'
)
OPINIONS = (
    '<Review rid="{i}"><sentences><sentence id="{i}:0"><text>t {i}</text><Opinions>'
    '<Opinion target="NULL" category="food" polarity="positive"/>'
    '<Opinion target="x" category="bar" polarity="negative"/></Opinions></sentence>'
    '<sentence id="{i}:1" OutOfScope="TRUE"><text>u {i}</text></sentence></sentences></Review>'
)
WHOLE = (
    '<Review rid="{i}"><sentences><sentence id="{i}:0"><text>t</text></sentence><sentence id="{i}:1"><text>{i}</text>'
    '</sentence></sentences><Opinions><Opinion category="food" polarity="positive"/>'
    '<Opinion category="bar" polarity="negative"/></Opinions></Review>'
)


@pytest.mark.parametrize(
    ("root", "body"), [("sentences", SENTENCE), ("Reviews", OPINIONS), ("Reviews", WHOLE)]
)
def test_xml_of_semeval_and_mams(tmp_path: Path, root: str, body: str) -> None:
    pytest.importorskip("defusedxml")
    path = table(tmp_path / "a.xml", f"<{root}>", body)
    written(path, path.read_text() + f"</{root}>")
    data = load_files({"train": path}, tune_fraction=0.0)
    assert as_labels(data) == EXPECTED
    if body is SENTENCE:
        assert "8 labels by term not used: data.aspect_column=term" in data.summary()
        with pytest.raises(NearfarError, match="conflict"):
            load_files({"train": path}, aspect_column="term")
    if body is OPINIONS:
        assert data.sources[0]["rejections"]["by_reason"] == {"out of scope": 8}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            '<!DOCTYPE x [<!ENTITY a "b">]><sentences><sentence><text>&a;</text></sentence></sentences>',
            "entities",
        ),
        ('<!DOCTYPE x [<!ENTITY a SYSTEM "file:///etc/passwd">]><x>&a;</x>', "entities"),
        ("<sentences><sentence>", "cannot be read as XML"),
        ("<html/>", "its root is <html>"),
    ],
)
def test_xml_that_is_hostile_or_something_else(tmp_path: Path, text: str, message: str) -> None:
    pytest.importorskip("defusedxml")
    with pytest.raises(NearfarError, match=message):
        read_records(written(tmp_path / "a.xml", text))


def test_encodings(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(("comment,label\n" + "Säure,{A#Positive}\n" * 3).encode("cp1252"))
    with pytest.raises(NearfarError, match=r"data\.encoding=cp1252"):
        read_records(path)
    assert read_records(path, encoding="cp1252").texts[0] == "Säure"


def test_labels_that_train_lacks_are_told(tmp_path: Path) -> None:
    train = table(tmp_path / "a.csv", "text,FOOD,BAR", "t {i},positive,", "v {i},,", repeat=20)
    test = table(tmp_path / "b.csv", "text,FOOD,BAR", "u {i},negative,", "w {i},positive,neutral", repeat=3)
    data = load_files({"train": train, "test": test}, aspects=["FOOD", "BAR"])
    assert "train never mentions BAR" in data.summary()
    assert "test has 6 labels of 2 aspect-polarity pairs that train never has" in data.summary()
    assert "FOOD negative 3, BAR neutral 3" in data.summary()


def test_no_training_on_no_labels_and_no_traceback_of_the_baseline(tmp_path: Path) -> None:
    empty = table(tmp_path / "a.csv", "text,FOOD", "t {i},", repeat=20)
    with pytest.raises(NearfarError, match="there is no label to learn from"):
        load_files({"train": empty}, aspects=["FOOD"])
    rare = table(tmp_path / "b.csv", "text,label", "t {i},{A{i}#Positive};{B#Negative}", repeat=3)
    with pytest.raises(NearfarError, match=r"the commonest, 'B', comes 3 times. data.min_mentions=3"):
        load_files({"train": rare})
    assert load_files({"train": rare}, min_mentions=3, tune_fraction=0.0).scheme.aspects == ("B",)
    codes = np.array([[-1, 3], [-1, 0], [-1, 3]])
    answers = linear_answers(["a", "!", "b"], codes, {"val": ["c", "?"]}, cache=False)
    assert answers["val"].tolist() == [[0, 3], [0, 3]]


def test_placeholders_are_no_reviews(tmp_path: Path) -> None:
    records = read_records(
        table(tmp_path / "a.csv", "text,FOOD", "t,positive", "N/A,positive", "nan,negative", repeat=1)
    )
    assert (records.texts, records.rejections.counts) == (["t"], {"empty text": 2})


def test_what_a_mapping_of_polarities_may_be() -> None:
    assert code_words({1: "positive", "-1": "Negative", "so so": "neutral", 0: None}) == {
        "1": 3, "-1": 1, "so so": 2, "0": 0,
    }  # fmt: skip
    with pytest.raises(NearfarError, match="1 means 'pos'; known: positive"):
        code_words({1: "pos"})
    assert "{0: none, 1: positive, 2: negative, 3: neutral}" in polarities_advice(["3", "0", "1", "2.0"])
    assert "{x: neutral, 5: positive}" in polarities_advice(["x"], {"5": 3})
    assert parse_field(
        json.dumps([{"category": "a", "sentiment": "neg"}, {"aspect": "b", "polarity": None}])
    ) == (
        {"a": 1},
        [],
    )
    assert parse_field("[" * 50_000)[0] == {}


def test_labels() -> None:
    assert [polarity_code(w) for w in (" POS ", "Tích  cực", "none", "5")] == [3, 3, 0, -1]
    assert parse_field("") == ({}, [])
    assert parse_field("{A#Positive};{A#Positive};") == ({"A": 3}, [])
    assert parse_field("{#Positive};") == ({}, ["#Positive"])


@pytest.mark.slow
def test_the_embedded_set_is_the_same_each_time_and_splits_share_nothing() -> None:
    a, b = load_embedded(300, seed=1), load_embedded(300, seed=1)
    texts = [data.train.texts("text") for data in (a, b, load_embedded(300, seed=2))]
    assert texts[0] == texts[1] != texts[2]
    assert [len(split) for split in a.splits.values()] == [240, 30, 30]
    assert a.layout()["leaks"] == {}
    assert len(a.scheme.pairs) == 21


def test_oversampling_repeats_rare_labels_alone() -> None:
    codes = np.zeros((1000, 2), dtype=np.int64)
    codes[:500, 0], codes[:10, 1] = 3, 1
    copies = repeats(codes, np.array([[0, 3], [1, 1]]), frequency=0.16, most=10)
    assert copies[:10].tolist() == [4] * 10
    assert (copies[10:] == 1).all()
    assert repeats(codes, np.array([[1, 1]]), frequency=0.16, most=2).max() == 2


@pytest.mark.slow
@pytest.mark.data
@pytest.mark.skipif("NEARFAR_DATA" not in os.environ, reason="NEARFAR_DATA is not set")
@pytest.mark.parametrize(
    ("name", "files", "rows", "pairs"),
    [
        ("visfd", ("Train.csv", "Dev.csv"), (7782, 1112), 31),
        ("phone_aspects", ("train.csv", "validation.csv"), (7283, 913), 31),
    ],
)
def test_real_files(name: str, files: tuple[str, str], rows: tuple[int, int], pairs: int) -> None:
    folder = Path(os.environ["NEARFAR_DATA"]) / name
    data = load_files({"train": folder / files[0], "val": folder / files[1]}, tune_fraction=0.0)
    assert (len(data.train), len(data.val or ())) == rows
    assert len(data.scheme.aspects) == 11
    assert len(data.scheme.pairs) == pairs
    assert data.layout()["leaks"] == {}
