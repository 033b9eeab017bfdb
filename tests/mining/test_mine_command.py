"""The command `nearfar mine`: embeddings or a run in, tables that pairs read out."""

from __future__ import annotations

import csv
import itertools
import os
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from rich.console import Console
from typer.testing import CliRunner

from nearfar.cli import app
from nearfar.config.compose import compose_config
from nearfar.errors import NearfarError
from nearfar.launch import run_one
from nearfar.systems import check_config

NOUNS = ["river", "stone", "cloud", "forest", "harbour", "candle", "ladder", "mirror"]
PLACES = ["near the hill", "far from the town", "under the bridge", "above the sea", "behind the mill"]
N = len(NOUNS) * len(PLACES)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A table of questions and answers, and embeddings of both by two models."""
    path = tmp_path_factory.mktemp("mining")
    with (path / "data.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["id", "question", "answer", "topic"])
        for i, noun in enumerate(NOUNS):
            for j, place in enumerate(PLACES):
                asked = f"where is the {noun}" if j < 2 else f"what of the {noun} {place}"  # asked twice
                writer.writerow([f"n{i * len(PLACES) + j}", asked, f"the {noun} lies {place}", noun])
    rng = np.random.default_rng(0)
    topics = np.repeat(rng.normal(size=(len(NOUNS), 8)), len(PLACES), axis=0)
    for name, noise in (("vectors", 0.6), ("guide", 0.3)):
        sides = {
            view: (topics + noise * rng.normal(size=(N, 8))).astype(np.float32)
            for view in ("question", "answer")
        }
        table = {"id": [f"n{i}" for i in range(N)], "row": list(range(N))}
        table |= {view: [row.tolist() for row in rows] for view, rows in sides.items()}
        pyarrow.parquet.write_table(pyarrow.table(table), path / f"{name}.parquet")
    return path


def mine(*arguments: object) -> str:
    outcome = CliRunner().invoke(
        app,
        ["mine", *map(str, arguments), "--queries", "question", "--corpus", "answer"],
        catch_exceptions=False,
    )
    assert outcome.exit_code == 0, outcome.output
    return outcome.output


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.slow
def test_embeddings_with_their_table(folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "mined.csv"
    said = mine(
        *(
            folder / "vectors.parquet",
            "--data",
            folder / "data.csv",
            "-o",
            output,
            "--scores",
            "--label",
            "topic",
        ),
        *("--per-query", 2, "--margin", 0.05, "--mark", tmp_path / "mark.csv"),
    )
    table = rows(output)
    assert list(table[0]) == ["question", "answer", "negative_1", "negative_2", "margin_1", "margin_2"]
    assert "false negatives by label" in said
    assert "false negatives by text: 0.00%" in said
    assert "negatives.answer=[negative_1,negative_2] margins.answer=[margin_1,margin_2]" in said.replace(
        "\n", ""
    )
    given = {row["answer"]: row["question"] for row in rows(folder / "data.csv")}
    for row in table:
        assert given[row["answer"]] == row["question"]
        for name in ("negative_1", "negative_2"):
            assert given[row[name]] != row["question"]  # an answer of the same question is none
        assert float(row["margin_1"]) >= 0.05 - 1e-4
    marked = rows(tmp_path / "mark.csv")
    assert len(marked) == 50
    for i, row in enumerate(marked):
        row["false_negative"] = "yes" if i % 2 else "no"
    with (tmp_path / "mark.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, marked[0])
        writer.writeheader()
        writer.writerows(marked)
    said = mine(folder / "vectors.parquet", "-o", tmp_path / "ids.csv", "--marked", tmp_path / "mark.csv")
    assert "false negatives by hand: 50.00%" in said
    assert rows(tmp_path / "ids.csv")[0]["question"].startswith("n")  # ids, without the table


@pytest.mark.slow
def test_a_guide_lowers_the_share_of_false_negatives(folder: Path, tmp_path: Path) -> None:
    shares = []
    for more in ((), ("--guide", folder / "guide.parquet", "--guide-margin", 0.3)):
        said = mine(
            *(
                folder / "vectors.parquet",
                "--data",
                folder / "data.csv",
                "--label",
                "topic",
                "--form",
                "triplet",
            ),
            *("-o", tmp_path / "mined.jsonl", *more),
        )
        (line,) = [line for line in said.splitlines() if "by label" in line]
        shares.append(float(line.split(":")[1].split("%")[0]))
    assert shares[1] < shares[0]


@pytest.mark.slow
def test_what_is_refused(folder: Path, tmp_path: Path) -> None:
    vectors = folder / "vectors.parquet"
    for arguments, message in (
        ((vectors, "-o", tmp_path / "mined.png"), "a table is written as"),
        ((vectors, "--margin", 0.1, "--relative-margin", 0.1), "give one"),
        ((vectors, "--label", "topic"), "a column of --data"),
        ((vectors, "--form", "tuple", "-o", tmp_path / "m.csv"), "form"),
        ((tmp_path, "-o", tmp_path / "m.csv"), "name the table"),
    ):
        with pytest.raises(NearfarError, match=message):
            mine(*arguments)
    other = tmp_path / "other.csv"
    other.write_text("id,question,answer\nx,a,b\n")
    with pytest.raises(NearfarError, match="embedded rows are not in it"):
        mine(vectors, "--data", other, "-o", tmp_path / "m.csv")


@pytest.mark.slow
@pytest.mark.usefixtures("module_cache")
def test_a_run_mines_its_table_and_trains_on_what_it_mined(folder: Path, tmp_path: Path) -> None:
    small = [
        *(
            "text_encoder.dims=16",
            "text_encoder.min_df=1",
            "text_encoder.max_df=1.0",
            "embedding_dim=8",
            "epochs=1",
        ),
        *(
            "batch_size=8",
            "bootstrap=0",
            "trainer.accelerator=cpu",
            "trainer.threads=1",
            "report=false",
            "trainer.probe_rows=8",
        ),
        *("views=[question,answer]", f"runs_dir={tmp_path}", "experiment=pairs"),
    ]
    quiet = Console(file=open(os.devnull, "w"))  # noqa: SIM115
    overrides = [*small, f"data.train={folder / 'data.csv'}", "name=first"]
    run = run_one(check_config(compose_config(overrides)), overrides, False, quiet)
    assert run is not None
    output = tmp_path / "mined.csv"
    said = mine(
        run.path, "--data", folder / "data.csv", "-o", output, "--scores", "--per-query", 2, "--device", "cpu"
    )
    assert f"{N} queries" in said
    overrides = [
        *small, f"data.train={output}", "name=second", "negatives.answer=[negative_1,negative_2]",
        "margins.answer=[margin_1,margin_2]",
    ]  # fmt: skip
    again = run_one(check_config(compose_config(overrides)), overrides, False, quiet)
    assert again is not None
    assert again.read_json("metrics.json")["splits"]


# -- a corpus of its own, judgments, a cross-encoder ----------------------------------------------------------
@pytest.fixture(scope="module")
def collection(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve queries, forty documents, embeddings of both, and judgments: as BEIR's collections are."""
    path = tmp_path_factory.mktemp("collection")
    rng = np.random.default_rng(1)
    topics = rng.normal(size=(10, 8))
    sides = {
        "queries": ("question", [f"q{i}" for i in range(12)], topics[np.arange(12) % 10]),
        "documents": ("answer", [f"d{i}" for i in range(40)], topics[np.arange(40) % 10]),
    }
    for name, (view, ids, centres) in sides.items():
        vectors = (centres + 0.5 * rng.normal(size=centres.shape)).astype(np.float32)
        rows = pyarrow.table({"id": ids, view: [row.tolist() for row in vectors]})
        pyarrow.parquet.write_table(rows, path / f"{name}.parquet")
        with (path / f"{name}.csv").open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerows([["id", view], *([each, f"text of {each}"] for each in ids)])
    # of eleven queries the documents of their topic up to the thirtieth; one answer that has no vector
    lines = [f"q{i} 0 d{j} 1" for i in range(11) for j in range(30) if j % 10 == i % 10]
    (path / "qrels.txt").write_text("\n".join([*lines, "q0 0 d99 1", "q1 0 d5 0"]) + "\n")
    return path


def of_collection(path: Path, *arguments: object) -> list[object]:
    sides = ["--documents", path / "documents.parquet", "--qrels", path / "qrels.txt"]
    tables = ["--data", path / "queries.csv", "--documents-data", path / "documents.csv"]
    return [path / "queries.parquet", *sides, *tables, *arguments]


@pytest.mark.slow
def test_a_corpus_of_its_own_with_judgments(collection: Path, tmp_path: Path) -> None:
    said = mine(
        *of_collection(collection, "-o", tmp_path / "mined.csv", "--form", "triplet", "--per-query", 4)
    )
    assert "11 of 12 queries have answers in the qrels" in said
    assert "1 answers have no vector" in said
    assert "1 queries have no answer and are left out" in said
    triplets = rows(tmp_path / "mined.csv")
    answers = {(f"text of q{i}", f"text of d{j}") for i in range(11) for j in range(30) if j % 10 == i % 10}
    assert {(row["question"], row["answer"]) for row in triplets} == answers
    assert not {(row["question"], row["negative"]) for row in triplets} & answers
    # every answer of a query stands with the same negatives
    assert len(triplets) == 4 * len(answers)


@pytest.mark.slow
def test_scores_of_a_cross_encoder(collection: Path, tmp_path: Path) -> None:
    pairs = tmp_path / "pairs.csv"
    said = mine(*of_collection(collection, "--candidates", pairs, "--rank-to", 8))
    assert f"--cross-encoder {pairs}" in said
    asked = rows(pairs)
    assert {"query_id", "doc_id", "query", "document"} == set(asked[0])
    assert asked[0]["document"] == f"text of {asked[0]['doc_id']}"
    scored = tmp_path / "scored.csv"
    with scored.open("w", newline="") as file:
        writer = csv.DictWriter(file, ["query_id", "doc_id", "score"])
        writer.writeheader()
        for pair in asked:
            # it takes every document of the topic for an answer, judged or not, and prefers large numbers
            q, d = int(pair["query_id"][1:]), int(pair["doc_id"][1:])
            score = 9.0 if q % 10 == d % 10 else d / 40
            writer.writerow({"query_id": pair["query_id"], "doc_id": pair["doc_id"], "score": score})
    options = ("--cross-encoder", scored, "--margin", 1, "--rank-to", 8, "--per-query", 2, "--scores")
    mine(*of_collection(collection, *options, "-o", tmp_path / "mined.csv"))
    for row in rows(tmp_path / "mined.csv"):
        q = int(row["question"].removeprefix("text of q"))
        numbers = [int(row[f"negative_{k}"].removeprefix("text of d")) for k in (1, 2)]
        assert all(d % 10 != q % 10 for d in numbers)
        assert numbers == sorted(numbers, reverse=True)
        assert float(row["margin_1"]) == pytest.approx(9.0 - numbers[0] / 40)
    # a score that is missing: of a candidate, left out and counted; of an answer, refused
    kept = [line for line in scored.read_text().splitlines() if not line.startswith("q3,d7,")]
    wanted = [line for line in kept if not line.startswith("q0,d0,")]
    (tmp_path / "part.csv").write_text("\n".join(kept[:1] + [x for x in kept[1:] if not x.endswith("0.025")]))
    assert "no score" in mine(
        *of_collection(collection, "--cross-encoder", tmp_path / "part.csv", "-o", tmp_path / "other.csv")
    )
    (tmp_path / "less.csv").write_text("\n".join(wanted))
    with pytest.raises(NearfarError, match="no score for 1 of 33 positives"):
        mine(*of_collection(collection, "--cross-encoder", tmp_path / "less.csv", "-o", tmp_path / "x.csv"))


@pytest.mark.slow
def test_judgments_and_scores_of_different_ids_are_refused(collection: Path, tmp_path: Path) -> None:
    (tmp_path / "qrels.txt").write_text("1 0 2 1\n")
    files = [collection / "queries.parquet", "--documents", collection / "documents.parquet"]
    with pytest.raises(NearfarError, match=r"no query has an answer in the qrels.*'q0'.*'1'"):
        mine(*files, "--qrels", tmp_path / "qrels.txt")
    with pytest.raises(NearfarError, match="--qrels which of them answer"):
        mine(*files)
    (tmp_path / "a.run").write_text("1 Q0 2 1 .5 x\n")
    with pytest.raises(NearfarError, match="none of which is one of these"):
        mine(*of_collection(collection, "--cross-encoder", tmp_path / "a.run"))
    with pytest.raises(NearfarError, match="write the pairs with --candidates"):
        mine(*of_collection(collection, "--guide", collection / "documents.parquet"))


@pytest.mark.slow
def test_judgments_beside_rows_that_answer_themselves(folder: Path, tmp_path: Path) -> None:
    """Further answers are no negatives, and each row keeps its own."""
    with (tmp_path / "qrels.tsv").open("w") as file:
        file.write("query_id\tdoc_id\trelevance\n")
        file.writelines(f"n{i}\tn{i + 1}\t1\n" for i in range(N - 1))
    output = tmp_path / "mined.csv"
    mine(
        *(folder / "vectors.parquet", "--data", folder / "data.csv", "-o", output),
        *("--qrels", tmp_path / "qrels.tsv", "--form", "triplet"),
    )
    answers = [row["answer"] for row in csv.DictReader((folder / "data.csv").open())]
    later = dict(itertools.pairwise(answers))
    written = rows(output)
    assert {row["answer"] for row in written} == set(answers)
    assert all(row["negative"] != later.get(row["answer"]) for row in written)


# -- from a folder of neighbours -----------------------------------------------------------------------------
@pytest.fixture(scope="module")
def near(folder: Path) -> Path:
    path = folder / "near"
    outcome = CliRunner().invoke(
        app, ["neighbors", f"{folder / 'vectors.parquet'}", "--view", "answer", "-o", f"{path}", "--k", "5"]
    )
    assert outcome.exit_code == 0, outcome.output
    return path


@pytest.mark.slow
@pytest.mark.parametrize("judged", [False, True])
def test_a_folder_of_neighbours_gives_what_its_embeddings_give(
    folder: Path, near: Path, tmp_path: Path, judged: bool
) -> None:
    """Row by row, where the same question twice shares its answers; and by judgments, of which some name nothing."""
    more: list[object] = ["--data", folder / "data.csv", "--per-query", 2, "--rank-to", 12, "--scores"]
    memory: list[object] = []
    if judged:
        ids = [(f"n{i}", f"n{j}") for i in range(0, N, 2) for j in (i, i + 1)]
        qrels = {"query_id": [q for q, _ in ids] + ["n1"], "doc_id": [d for _, d in ids] + ["none"]}
        table = pyarrow.table(qrels | {"relevance": [2] * len(ids) + [1]})
        pyarrow.parquet.write_table(table, tmp_path / "qrels.parquet")
        more += ["--qrels", tmp_path / "qrels.parquet", "--documents-data", folder / "data.csv"]
        memory = ["--documents", folder / "vectors.parquet"]
    more += ["--label", "topic"]
    said, output = [], []
    for name, how in (("memory", memory), ("disk", ["--documents", near])):
        output.append(tmp_path / f"{name}.parquet")
        said.append(mine(folder / "vectors.parquet", *how, *more, "-o", output[-1]))
    a, b = (pyarrow.parquet.read_table(path).to_pydict() for path in output)
    assert list(a) == list(b)
    for name, column in a.items():
        wanted = pytest.approx(column, abs=2e-3) if name.startswith("margin") else column
        assert b[name] == wanted
    for begin in ("false negatives by label: ", "false negatives by text: ", "left out: "):
        told = [[line for line in each.splitlines() if line.startswith(begin)] for each in said]
        assert len(told[0]) == 1
        assert told[0] == told[1]
    if judged:
        assert all("1 answers have no vector" in each for each in said)
        assert "20 queries have no answer and are left out" in said[1]


@pytest.fixture(scope="module")
def shuffled(folder: Path) -> Path:
    """Neighbours of the same documents in reverse order."""
    table = pyarrow.parquet.read_table(folder / "vectors.parquet")
    pyarrow.parquet.write_table(table.take(list(range(N))[::-1]), folder / "shuffled.parquet")
    path = folder / "shuffled"
    arguments = [f"{folder / 'shuffled.parquet'}", "--view", "answer", "-o", f"{path}", "--k", "5"]
    outcome = CliRunner().invoke(app, ["neighbors", *arguments])
    assert outcome.exit_code == 0, outcome.output
    return path


@pytest.mark.slow
def test_rows_in_different_orders_answer_by_id(
    folder: Path, near: Path, shuffled: Path, tmp_path: Path
) -> None:
    more = ["--data", folder / "data.csv", "--per-query", 2, "--form", "triplet"]
    written = []
    for at, documents in enumerate((near, shuffled)):
        output = tmp_path / f"{at}.parquet"
        mine(folder / "vectors.parquet", "--documents", documents, *more, "-o", output)
        written.append(pyarrow.parquet.read_table(output).to_pylist())
    assert written[0] == written[1]
    ids = [f"x{i}" for i in range(N)]
    table = pyarrow.parquet.read_table(folder / "vectors.parquet").set_column(0, "id", [ids])
    pyarrow.parquet.write_table(table, tmp_path / "other.parquet")
    with pytest.raises(NearfarError, match=r"40 of 40 queries have ids that no document has.*'x0'.*--qrels"):
        mine(tmp_path / "other.parquet", "--documents", shuffled, "-o", tmp_path / "m.parquet")


@pytest.mark.slow
def test_judgments_as_pandas_writes_them(folder: Path, near: Path, tmp_path: Path) -> None:
    """Grades as texts, numbers with gaps as floats, ids of queries that repeat, and labels of two types."""
    table = pyarrow.parquet.read_table(folder / "vectors.parquet")
    numbers = [i // 2 for i in range(N)]  # every id twice
    pyarrow.parquet.write_table(table.set_column(0, "id", [numbers]), tmp_path / "q.parquet")
    judged = {
        "query_id": [*map(float, range(N // 2)), None, 1.0],
        "doc_id": [f"n{2 * i}" for i in range(N // 2)] + ["n1", "n1"],
        "relevance": ["1"] * (N // 2) + ["1", "much"],
    }
    pyarrow.parquet.write_table(pyarrow.table(judged), tmp_path / "qrels.parquet")
    output = tmp_path / "m.parquet"
    own = {
        "id": range(N // 2),
        "question": [f"Q{i}" for i in range(N // 2)],
        "answer": [i % 5 for i in range(20)],
    }
    theirs = {"id": [f"n{i}" for i in range(N)], "answer": [None, *(i // 2 % 5 + 0.0 for i in range(1, N))]}
    for name, columns in (("own", own), ("theirs", theirs)):
        listed = {key: list(values) for key, values in columns.items()}
        pyarrow.parquet.write_table(pyarrow.table(listed), tmp_path / f"{name}.parquet")
    said = mine(
        *(tmp_path / "q.parquet", "--documents", near, "--qrels", tmp_path / "qrels.parquet", "-o", output),
        *("--data", tmp_path / "own.parquet", "--documents-data", tmp_path / "theirs.parquet"),
        *("--label", "answer", "--form", "triplet"),  # the label is the corpus column, too
    )
    assert "2 rows rejected: no id 1 (first: row 21), grade is no number 1" in " ".join(said.split())
    written = pyarrow.parquet.read_table(output).to_pylist()
    assert {row["question"] for row in written} == {f"Q{i}" for i in range(N // 2)}
    assert len(written) == 3 * N  # both rows of every id
    wrong = [
        row["negative"] == str(int(row["question"][1:]) % 5) for row in written if row["negative"] is not None
    ]
    assert f"false negatives by label: {np.mean(wrong):.2%}" in said


@pytest.mark.slow
def test_queries_and_documents_in_columns_of_one_name(collection: Path, tmp_path: Path) -> None:
    """As BEIR has them: both are called text, and the table keeps both."""
    for name, view in (("queries", "question"), ("documents", "answer")):
        table = pyarrow.parquet.read_table(collection / f"{name}.parquet").rename_columns(["id", "text"])
        pyarrow.parquet.write_table(table, tmp_path / f"{name}.parquet")
        text = (collection / f"{name}.csv").read_text().replace(view, "text", 1)
        (tmp_path / f"{name}.csv").write_text(text)
    given = ["mine", tmp_path / "queries.parquet", "--queries", "text", "--corpus", "text"]
    given += ["--documents", tmp_path / "documents.parquet", "--qrels", collection / "qrels.txt"]
    given += ["--data", tmp_path / "queries.csv", "--documents-data", tmp_path / "documents.csv"]
    outcome = CliRunner().invoke(app, [*map(str, given), "-o", str(tmp_path / "mined.csv")])
    assert outcome.exit_code == 0, outcome.output
    assert "views=[text,text_document] negatives.text_document=[negative_1," in outcome.output.replace(
        "\n", ""
    )
    written = rows(tmp_path / "mined.csv")
    assert list(written[0])[:3] == ["text", "text_document", "negative_1"]
    assert written[0]["text"] == "text of q0"
    assert written[0]["text_document"].startswith("text of d")
    named = ["label" if each == "text" else str(each) for each in given]
    with pytest.raises(NearfarError, match="'label' is a column that form=labeled-pair adds"):
        CliRunner().invoke(app, [*named, "--form", "labeled-pair"], catch_exceptions=False)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["-o", "mined.csv"], r"name it \.parquet"),
        (["--mark", "m.csv"], "--mark: with a folder"),
        (["--documents", "."], "no finished neighbours"),
    ],
)
def test_what_a_folder_of_neighbours_cannot(
    folder: Path, near: Path, tmp_path: Path, more: list[str], message: str
) -> None:
    given = [
        "mine",
        f"{folder / 'vectors.parquet'}",
        "--documents",
        f"{near}",
        "-o",
        f"{tmp_path / 'm.parquet'}",
    ]
    with pytest.raises(NearfarError, match=message):
        CliRunner().invoke(
            app, [*given, "--queries", "question", "--corpus", "answer", *more], catch_exceptions=False
        )
