"""Slides to shards to tissues: against explicit loops, WebDataset and tarfile; deterministic, restartable, honest about
what was left out."""

from __future__ import annotations

import hashlib
import io
import json
import math
import os
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from nearfar.cli import app
from nearfar.data.batch import ItemDataset, Pixels, Rows
from nearfar.data.mapped import mapped_arrays
from nearfar.data.slides import image, shard_dataset
from nearfar.data.slides.folder import write_tissue
from nearfar.data.slides.image import decode_jpeg, encode_jpeg
from nearfar.data.slides.shard_dataset import read_shards
from nearfar.data.slides.shard_index import ShardWriter, read_index, read_splits, samples
from nearfar.data.slides.shards import ShardOptions, write_shards
from nearfar.data.slides.slide import find_slides
from nearfar.data.slides.splits import draw_splits, patients_of
from nearfar.data.slides.tissue import (
    GeneSums,
    Tissue,
    common_genes,
    items_of,
    joined,
    neighbor_scale,
    normalized,
    spatial_neighbors,
    variable_genes,
)
from nearfar.errors import NearfarError
from tissue_files import GENES, picture, slide_of, write_h5ad, write_st, write_tiled_tiff

pytestmark = pytest.mark.slow  # real runs

SLIDES = {"A1": 1, "A2": 2, "B.1": 3}
SMALL: dict[str, Any] = {"patch": 32, "pixels": 16, "genes": 6, "neighbors": 3}


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NEARFAR_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_st(tmp_path_factory.mktemp("st"), SLIDES, spoiled=True)


@pytest.fixture(scope="module")
def shards(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shards") / "s"
    write_shards(source, folder, ShardOptions(**SMALL, test=("B.1",)))
    return folder


def options(**changed: Any) -> ShardOptions:
    return ShardOptions(**{**SMALL, **changed})


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


# -- neighbours ----------------------------------------------------------------------------------------------


def neighbors_by_loops(places: np.ndarray, k: int) -> tuple[list[list[int]], list[list[float]]]:
    n = len(places)
    near, distances = [], []
    for i in range(n):
        others = sorted(
            (round(math.dist(places[i], places[j]), 6), j, math.dist(places[i], places[j]))
            for j in range(n)
            if j != i
        )[:k]
        near.append([j for _, j, _ in others])
        distances.append([d for _, _, d in others])
    flat = sorted(d for row in distances for d in row)
    sigma = (flat[(len(flat) - 1) // 2] + flat[len(flat) // 2]) / 2
    alpha = []
    for row in distances:
        weights = [math.exp(-d * d / (2 * sigma * sigma)) for d in row]
        alpha.append([w / sum(weights) for w in weights])
    return near, alpha


@pytest.mark.parametrize("places", [
    np.random.default_rng(0).uniform(0, 900, (40, 2)),
    np.stack(np.meshgrid(np.arange(6.0), np.arange(5.0)), -1).reshape(-1, 2),  # equal distances everywhere
    np.array([[0.1 * x, 0.3 * y] for x in range(5) for y in range(5)]),  # equal on paper, not in the last bits
])  # fmt: skip
@pytest.mark.parametrize("k", [1, 6])
def test_neighbors_are_those_of_explicit_loops(places: np.ndarray, k: int) -> None:
    index, alpha = spatial_neighbors(places, k)
    near, weights = neighbors_by_loops(places, k)
    assert index.tolist() == near
    np.testing.assert_allclose(alpha, weights, rtol=1e-5)
    np.testing.assert_allclose(alpha.sum(1), 1, rtol=1e-6)


def test_neighbors_of_odd_slides_are_finite() -> None:
    for places, k in (
        (np.zeros((0, 2)), 3),
        (np.zeros((1, 2)), 3),
        (np.zeros((4, 2)), 2),  # all in one place
        (np.array([[0.0, 0], [1, 0], [2, 0], [1e7, 0]]), 2),  # one far from all others
    ):
        index, alpha = spatial_neighbors(places, k)
        assert index.shape == alpha.shape == (len(places), k)
        exists = index >= 0
        assert np.isfinite(alpha).all()
        assert (alpha[~exists] == 0).all()
        np.testing.assert_allclose(alpha.sum(1), exists.any(1), rtol=1e-6)
        assert all(row not in near for row, near in enumerate(index.tolist()))
    assert neighbor_scale(np.zeros((1, 2))) == 0
    with pytest.raises(NearfarError, match="finite"):
        spatial_neighbors([[np.nan, 0]], 1)


# -- tissues -------------------------------------------------------------------------------------------------


def tissue_of(seed: int, slides: list[int]) -> Tissue:
    rng = np.random.default_rng(seed)
    parts = []
    for number, n in enumerate(slides):
        places = rng.uniform(0, 10, (n, 2))
        near, alpha = spatial_neighbors(places, 3)
        parts.append(
            Tissue(
                [f"{seed}-{number}-{spot}" for spot in range(n)], np.zeros(n, np.int64), [f"s{seed}{number}"], places,
                near, alpha, rng.random((n, 4)).astype(np.float32), GENES[:4],
                rng.integers(0, 255, (n, 8, 8, 3), np.uint8),
            )
        )  # fmt: skip
    return joined(parts)


@pytest.mark.parametrize("chosen", [[0], [1], [2], [0, 1], [1, 2], [0, 2], [0, 1, 2]])
def test_selected_slides_keep_spots_and_neighbors(chosen: list[int]) -> None:
    tissue = tissue_of(0, [5, 2, 7])
    part = tissue.select([tissue.slide_names[at] for at in reversed(chosen)])
    expected = [row for row in range(len(tissue)) if tissue.slides[row] in chosen]
    assert list(part.ids) == [tissue.ids[row] for row in expected]
    assert [part.slide_names[at] for at in part.slides] == [
        tissue.slide_names[at] for at in tissue.slides[expected]
    ]
    np.testing.assert_array_equal(part.patches, tissue.patches[expected])
    np.testing.assert_array_equal(part.expression, tissue.expression[expected])
    for new, old in enumerate(expected):
        before = [tissue.ids[at] if at >= 0 else None for at in tissue.neighbors[old].tolist()]
        assert [part.ids[at] if at >= 0 else None for at in part.neighbors[new].tolist()] == before
    assert part.content != tissue.content
    assert part.content == tissue.select(part.slide_names).content


def test_tissues_that_do_not_fit_are_refused() -> None:
    tissue = tissue_of(0, [3, 3])
    with pytest.raises(NearfarError, match="did you mean 's01'"):
        tissue.select(["s011"])
    with pytest.raises(NearfarError, match="no slide"):
        tissue.select([])
    with pytest.raises(NearfarError, match="slide s00"):
        joined([tissue, tissue])
    with pytest.raises(NearfarError, match="2 rows for 6"):
        Tissue(tissue.ids, tissue.slides, tissue.slide_names, tissue.positions[:2], tissue.neighbors, tissue.alpha,
               tissue.expression, tissue.genes, tissue.patches)  # fmt: skip


# -- genes ---------------------------------------------------------------------------------------------------


def test_normalisation_and_variable_genes_by_loops() -> None:
    rng = np.random.default_rng(1)
    slides = {name: rng.poisson(rng.gamma(1, 5, 9), (n, 9)) for name, n in (("S", 7), ("T", 12))}
    genes = [f"g{at}" for at in range(9)]
    expected = np.zeros(9)
    sums = {}
    for name, counts in slides.items():
        totals = counts.sum(1) + 3.0  # counts of genes that are not kept
        values = normalized(counts, totals, 500.0)
        by_loop = [
            [math.log(1 + c / t * 500) for c in row] for row, t in zip(counts.tolist(), totals, strict=True)
        ]
        np.testing.assert_allclose(values, by_loop, rtol=1e-5)
        expected += len(counts) * np.var(by_loop, axis=0)
        order = rng.permutation(9)  # a slide may list genes in its own order
        sums[name] = GeneSums.of(values[:, order], [genes[at] for at in order])
    for count in (1, 4, 9):
        assert variable_genes(sums, count) == sorted(genes[at] for at in np.argsort(-expected)[:count])
    with pytest.raises(NearfarError, match="10 genes"):
        variable_genes(sums, 10)


def test_genes_named_in_two_ways_are_noticed() -> None:
    with pytest.raises(NearfarError, match="C shares least"):
        common_genes({"A": ["TP53", "KRT8"], "B": ["KRT8"], "C": ["ENSG00000141510"]})


def test_genes_are_chosen_on_training_slides_alone(tmp_path: Path) -> None:
    """Changing the test slide changes no gene; changing a training slide does."""
    chosen = []
    for seeds in ({"A": 1, "B": 2, "T": 3}, {"A": 1, "B": 2, "T": 77}, {"A": 1, "B": 78, "T": 3}):
        folder = write_st(tmp_path / f"in{len(chosen)}", seeds)
        written = write_shards(folder, tmp_path / f"out{len(chosen)}", options(genes=3, test=("T",)))
        chosen.append(written.index.genes)
    assert chosen[0] == chosen[1] != chosen[2]


# -- writing -------------------------------------------------------------------------------------------------


def test_samples_are_what_the_files_say(source: Path, shards: Path) -> None:
    """Read by tarfile and Pillow; expression, neighbours and patch by hand."""
    index = read_index(shards)
    assert [slide.name for slide in index.slides] == ["A1", "A2", "B.1"]
    for slide in index.slides:
        names, places, counts = slide_of(SLIDES[slide.name])
        near, alpha = neighbors_by_loops(places, 3)
        samples_of: dict[str, dict[str, bytes]] = {}
        for shard in slide.shards:
            assert hashlib.sha256((shards / shard.name).read_bytes()).hexdigest() == shard.sha256
            with tarfile.open(shards / shard.name) as tar:
                for member in tar:
                    assert (member.mtime, member.uid, member.uname) == (0, 0, "")
                    key, _, ending = member.name.partition(".")
                    samples_of.setdefault(key, {})[ending] = tar.extractfile(member).read()  # type: ignore[union-attr]
        assert len(samples_of) == len(names) == slide.spots == 20
        whole = np.asarray(Image.open(source / "images" / f"{slide.name}.jpg").convert("RGB"))
        for row, sample in enumerate(samples_of.values()):
            facts = json.loads(sample["json"])
            assert facts["id"] == names[row]
            assert (facts["slide"], facts["x"], facts["y"]) == (slide.name, *places[row])
            assert facts["neighbors"] == [names[at] for at in near[row]]
            np.testing.assert_allclose(facts["alpha"], alpha[row], rtol=1e-5)
            total = counts[row].sum()
            wanted = [math.log(1 + counts[row, GENES.index(g)] / total * 1e4) for g in index.genes]
            values = np.load(io.BytesIO(sample["npy"]))
            assert values.dtype == np.float32
            np.testing.assert_allclose(values, wanted, rtol=1e-5)
            left, top = round(places[row, 0] - 16), round(places[row, 1] - 16)
            square = whole[top : top + 32, left : left + 32].reshape(16, 2, 16, 2, 3).mean((1, 3))
            seen = np.asarray(Image.open(io.BytesIO(sample["jpg"])).convert("RGB"), np.float64)
            assert abs(seen - square).mean() < 4


def test_unusable_spots_are_counted_and_listed(source: Path, shards: Path) -> None:
    reasons = {
        "unreadable counts": 2,
        "spot named twice": 1,
        "no place": 1,
        "not selected": 1,
        "fewer than 10 counts": 1,
        "no picture": 1,
        "no counts": 1,
    }
    index = read_index(shards)
    assert all(
        slide.rejected == reasons | {"no counts": slide.rejected["no counts"]} for slide in index.slides
    )
    lines = (shards / "rejected.tsv").read_text().splitlines()
    listed = [line.split("\t")[:3] for line in lines[1:] if line.startswith("A1\t")]
    for spot, reason in {
        "30x1": "fewer than 10 counts",
        "31x1": "no picture",
        "32x1": "not selected",
        "33x1": "no place",
        "34x1": "unreadable counts",
        "35x1": "unreadable counts",
        "36x1": "no counts",
        "3x2": "spot named twice",
    }.items():
        assert ["A1", spot, reason] in listed
    assert len(listed) == sum(index.slides[0].rejected.values())


def test_webdataset_reads_the_same(shards: Path) -> None:
    wds = pytest.importorskip("webdataset")
    tissue = read_shards(shards, ["A2"])
    files = [str(shards / shard.name) for shard in read_index(shards).entry("A2").shards]
    rows = list(wds.WebDataset(files, shardshuffle=False).decode("rgb8"))
    assert [f"A2/{row['json']['id']}" for row in rows] == list(tissue.ids)
    np.testing.assert_array_equal([row["npy"] for row in rows], tissue.expression)
    # libjpeg versions may round differently
    assert np.abs(np.array([row["jpg"] for row in rows], int) - tissue.patches).max() <= 2


def test_the_same_input_gives_the_same_bytes(source: Path, shards: Path, tmp_path: Path) -> None:
    write_shards(source, tmp_path / "again", options(test=("B.1",)))
    assert bytes_of(tmp_path / "again") == bytes_of(shards)


def test_a_second_call_keeps_what_is_finished(source: Path, shards: Path, tmp_path: Path) -> None:
    folder = tmp_path / "s"
    shutil.copytree(shards, folder)
    again = write_shards(source, folder, options(test=("B.1",)))
    assert (again.written, again.kept) == ([], ["A1", "A2", "B.1"])
    # A shard that lost bytes is written again; other options write all of them, and leave no old shard.
    os.truncate(folder / "A2-0000.tar", 1000)
    with pytest.raises(NearfarError, match=r"A2-0000\.tar has 1000 bytes"):
        read_index(folder)
    assert write_shards(source, folder, options(test=("B.1",))).written == ["A2"]
    assert bytes_of(folder) == bytes_of(shards)
    cut = write_shards(source, folder, options(test=("B.1",), spots_per_shard=7))
    assert cut.written == ["A1", "A2", "B.1"]
    assert [shard.samples for shard in cut.index.slides[0].shards] == [7, 7, 6]
    whole = write_shards(source, folder, options(test=("B.1",)))
    assert whole.written == ["A1", "A2", "B.1"]
    assert bytes_of(folder) == bytes_of(shards)


@pytest.mark.parametrize("stop", [1, 25, 59])
def test_a_killed_run_goes_on(source: Path, shards: Path, tmp_path: Path, stop: int) -> None:
    class Killed(BaseException):
        pass

    def watch(stage: str, done: int, total: int) -> None:
        if stage == "shards" and done >= stop:
            raise Killed

    folder = tmp_path / "s"
    with pytest.raises(Killed):
        write_shards(source, folder, options(test=("B.1",)), watch)
    (folder / ".A1-0000.tar.xyz.tmp").write_bytes(
        b"half"
    )  # what a process leaves that had no time to clean up
    with pytest.raises(NearfarError, match="not finished"):
        read_index(folder)
    done = write_shards(source, folder, options(test=("B.1",)))
    assert done.kept == ["A1", "A2", "B.1"][: stop // 20]
    assert bytes_of(folder) == bytes_of(shards)


def test_one_picture_is_open_at_a_time(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counted = []
    read = image.read_large

    def reading(path: Path) -> np.ndarray:
        counted.append(path.name)
        assert not any(whole.pixels.size for whole in alive)
        return read(path)

    class Seen(image._Whole):
        open_now = 0

        def patch(self, *arguments: Any) -> np.ndarray:
            assert sum(whole.pixels.size > 0 for whole in alive) == 1
            return super().patch(*arguments)

        def __init__(self, pixels: np.ndarray) -> None:
            super().__init__(pixels)
            alive.append(self)

    alive: list[Seen] = []
    monkeypatch.setattr(image, "read_large", reading)
    monkeypatch.setattr(image, "_Whole", Seen)
    write_shards(source, tmp_path / "s", options())
    assert counted == ["A1.jpg", "A2.jpg", "B.1.jpg"]
    assert not any(whole.pixels.size for whole in alive)


def test_a_folder_of_other_slides_is_not_mixed(source: Path, shards: Path, tmp_path: Path) -> None:
    folder = tmp_path / "s"
    shutil.copytree(shards, folder)
    other = write_st(tmp_path / "other", {"Z9": 5})
    with pytest.raises(NearfarError, match=r"shards of other slides \(A1, A2, B_1"):
        write_shards(other, folder, options())
    clash = write_st(tmp_path / "clash", {"B.1": 5, "B_1": 6})
    with pytest.raises(NearfarError, match="share files"):
        write_shards(clash, tmp_path / "t", options())


def test_a_slide_without_picture_is_left_out(tmp_path: Path) -> None:
    folder = write_st(tmp_path / "in", {"A": 1, "B": 2})
    write_shards(folder, tmp_path / "out", options())
    (folder / "images" / "B.jpg").unlink()
    written = write_shards(folder, tmp_path / "out", options())
    assert (written.dropped, written.splits["train"]) == (["B"], ["A"])
    assert written.rejections.counts["no picture"] == 20
    assert [path.name for path in (tmp_path / "out").glob("*.tar")] == ["A-0000.tar"]
    assert read_shards(tmp_path / "out").slide_names == ["A"]
    (folder / "images" / "A.jpg").unlink()
    with pytest.raises(NearfarError, match="of 2 slides none"):
        write_shards(folder, tmp_path / "none", options())


# -- splits --------------------------------------------------------------------------------------------------


def test_splits_are_listed_and_checked(source: Path, shards: Path, tmp_path: Path) -> None:
    assert (shards / "train_samples.txt").read_text() == "A1\nA2\n"
    assert (shards / "val_samples.txt").read_text() == ""
    assert read_splits(shards) == {"train": ["A1", "A2"], "test": ["B.1"]}
    folder = tmp_path / "s"
    shutil.copytree(shards, folder)
    (folder / "test_samples.txt").write_text("A1\n")
    with pytest.raises(NearfarError, match="train and test share 1 slide"):
        read_splits(folder)
    (folder / "test_samples.txt").write_text("B1\n")
    with pytest.raises(NearfarError, match=r"did you mean 'B\.1'"):
        read_splits(folder)
    # The source's own files are followed, unless options say otherwise.
    own = tmp_path / "own"
    shutil.copytree(source, own)
    (own / "train_samples.txt").write_text("A1\n")
    (own / "val_samples.txt").write_text("A2\n")
    assert write_shards(own, tmp_path / "o", options()).splits == {"train": ["A1"], "val": ["A2"], "test": []}
    with pytest.raises(NearfarError, match="train and val share 1 patient"):
        write_shards(own, tmp_path / "o", options(split_by="patient", patients="^[A-Z]"))
    (own / "val_samples.txt").write_text("A1\n")
    with pytest.raises(NearfarError, match="Split leak: train and val share 1 slide"):
        write_shards(own, tmp_path / "o", options())
    assert write_shards(own, tmp_path / "o", options(test=("A1",))).splits["test"] == ["A1"]


def test_division_by_slide_and_patient() -> None:
    slides = [f"{who}{number}" for who in "ABCDEFGH" for number in (1, 2, 3)]
    patients = {name: name[0] for name in slides}
    with pytest.raises(NearfarError, match="share 1 patient"):
        draw_splits(slides, patients, test=["A1"], by="patient")
    for seed in range(5):
        splits = draw_splits(slides, patients, val_fraction=0.25, test_fraction=0.25, by="patient", seed=seed)
        who = {split: {patients[name] for name in names} for split, names in splits.items()}
        assert [len(who[split]) for split in ("train", "val", "test")] == [4, 2, 2]
        assert not who["train"] & who["val"] | who["val"] & who["test"] | who["train"] & who["test"]
        assert sorted(name for names in splits.values() for name in names) == slides
        assert splits == draw_splits(
            slides, patients, val_fraction=0.25, test_fraction=0.25, by="patient", seed=seed
        )
    with pytest.raises(NearfarError, match="none is left to train on"):
        draw_splits(["A1"], {"A1": "A"}, test=["A1"])
    with pytest.raises(NearfarError, match="give one of the two"):
        draw_splits(slides, patients, test=["A1"], test_fraction=0.5)


def test_patients_from_a_table_a_rule_or_the_files(tmp_path: Path) -> None:
    table = tmp_path / "meta.csv"
    table.write_text("id,patient\nA1,anna\nB2,bert\n")
    assert patients_of({"A1": None, "B2": "x"}, str(table)) == {"A1": "anna", "B2": "bert"}
    assert patients_of({"A1": None, "B2": "x"}, None) == {"A1": "A1", "B2": "x"}
    with pytest.raises(NearfarError, match="no patient of slide C3"):
        patients_of({"C3": None}, str(table))
    with pytest.raises(NearfarError, match="regular expression"):
        patients_of({"C3": None}, "[")
    with pytest.raises(NearfarError, match="nothing in the name of slide C3"):
        patients_of({"C3": None}, "^X")


# -- reading -------------------------------------------------------------------------------------------------


def test_reading_gives_what_was_written(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    tissue = read_shards(shards, ["B.1", "A1"], progress=seen.append)
    assert seen == [20, 20]
    assert tissue.slide_names == ["A1", "B.1"]
    for slide in (0, 1):
        names, places, counts = slide_of(SLIDES[tissue.slide_names[slide]])
        rows = tissue.rows_of(slide)
        assert [tissue.ids[row] for row in rows] == [f"{tissue.slide_names[slide]}/{name}" for name in names]
        near, alpha = neighbors_by_loops(places, 3)
        assert (tissue.neighbors[rows] - rows[0]).tolist() == near
        np.testing.assert_allclose(tissue.alpha[rows], alpha, rtol=1e-5)
        np.testing.assert_array_equal(tissue.totals[rows], counts.sum(1))  # type: ignore[index]
    # From the second time on nothing is decoded.
    monkeypatch.setattr(shard_dataset, "_decode", None)
    again = read_shards(shards, ["A1", "B.1"])
    assert again.content == tissue.content
    assert isinstance(again.patches, np.memmap)
    np.testing.assert_array_equal(again.patches, tissue.patches)
    np.testing.assert_array_equal(again.expression, tissue.expression)
    fewer = read_shards(shards, ["A1", "B.1"], neighbors=2)
    assert fewer.neighbors.tolist() == [row[:2] for row in tissue.neighbors.tolist()]
    assert fewer.content != tissue.content
    items = items_of(again, "shards")
    assert isinstance(items["image"], np.memmap)
    data = ItemDataset({"image": Pixels(items.array("image")), "gene": Rows(items.array("gene"))})
    batch = data.__getitems__([3, 30, 4])
    np.testing.assert_array_equal(
        batch.tensor("image").numpy().transpose(0, 2, 3, 1), tissue.patches[[3, 30, 4]]
    )
    np.testing.assert_array_equal(batch.tensor("gene").numpy(), tissue.expression[[3, 30, 4]])
    assert items["slide"] == [name.split("/")[0] for name in again.ids]


def test_counts_are_normalised_by_readers_that_leave_slides_out(source: Path, tmp_path: Path) -> None:
    """Shards of counts, read for one fold, are the shards that were written for that fold."""
    write_shards(source, tmp_path / "counts", options(genes=None, values="counts"))
    assert len(read_index(tmp_path / "counts").genes) == len(GENES)
    with open(tmp_path / "counts" / "A1-0000.tar", "rb") as stream:
        _, parts = next(samples(memoryview(stream.read()), "A1"))
    assert np.load(io.BytesIO(parts["npy"])).dtype == np.uint16
    for held_out in ("A1", "B.1"):
        fold = tmp_path / held_out
        written = write_shards(source, fold, options(test=(held_out,)))
        train = written.splits["train"]
        ready, chosen = read_shards(fold), read_shards(tmp_path / "counts", genes=6, genes_of=train)
        assert chosen.genes == ready.genes
        np.testing.assert_allclose(chosen.expression, ready.expression, rtol=1e-6)
    named = read_shards(tmp_path / "counts", genes=["G03", "G01"])
    all_of_them = read_shards(tmp_path / "counts")
    np.testing.assert_array_equal(named.expression, all_of_them.expression[:, [3, 1]])
    with pytest.raises(NearfarError, match="genes_of"):
        read_shards(tmp_path / "counts", genes=6)
    with pytest.raises(NearfarError, match="no gene 'ERBB2'"):
        read_shards(tmp_path / "counts", genes=["ERBB2"])


def spoil(change: Callable[[Path], None]) -> Callable[[Path, Path], Path]:
    def spoiled(shards: Path, folder: Path) -> Path:
        shutil.copytree(shards, folder)
        change(folder)
        return folder

    return spoiled


def flip(name: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        data = bytearray((folder / name).read_bytes())
        data[len(data) // 2] ^= 1
        (folder / name).write_bytes(data)

    return change


@pytest.mark.parametrize(("change", "message"), [
    (flip("A2-0000.tar"), "A2-0000.tar is not what was written"),
    (flip("slides/A2.spots.npz"), "A2.spots.npz is not what was written"),
    (lambda f: (f / "A1-0000.tar").unlink(), "A1-0000.tar is missing"),
    (lambda f: (f / "index.json").write_text("{"), "index.json is damaged"),
    (lambda f: (f / "index.json").write_text('{"format": "shards_v9"}'), "this version reads shards_v1"),
    (lambda f: (f / "index.json").unlink(), "not finished"),
    (lambda f: shutil.rmtree(f), "no shards were written"),
])  # fmt: skip
def test_damaged_shards_are_named(shards: Path, tmp_path: Path, change: Any, message: str) -> None:
    with pytest.raises(NearfarError, match=message):
        read_shards(spoil(change)(shards, tmp_path / "s"))


def test_a_tissue_in_memory_becomes_shards(tmp_path: Path) -> None:
    tissue = tissue_of(3, [6, 5])
    smooth = np.stack([picture(at, 16, 16) for at in range(11)])
    tissue = Tissue(**{**vars(tissue), "patches": smooth, "content": ""})
    index = write_tissue(tissue, tmp_path / "s", {"train": ["s30"], "test": ["s31"]}, quality=98)
    back = read_shards(tmp_path / "s")
    for name in ("neighbors", "alpha", "expression", "positions", "slides"):
        np.testing.assert_array_equal(getattr(back, name), getattr(tissue, name))
    assert list(back.ids) == [
        f"{('s30', 's31')[i]}/{n}" for i, n in zip(tissue.slides, tissue.ids, strict=True)
    ]
    assert np.abs(back.patches.astype(int) - smooth).mean() < 3
    assert read_splits(tmp_path / "s") == {"train": ["s30"], "test": ["s31"]}
    before = bytes_of(tmp_path / "s")
    assert (
        write_tissue(tissue, tmp_path / "s", {"train": ["s30"], "test": ["s31"]}, quality=98).content
        == index.content
    )
    assert bytes_of(tmp_path / "s") == before
    chosen = read_shards(tmp_path / "s", genes=2, genes_of=["s30"])
    spread = tissue.expression[:6].astype(float).var(0)
    assert chosen.genes == sorted(GENES[at] for at in np.argsort(-spread)[:2])


# -- other layouts -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("more", [
    {"kind": "csr_matrix"}, {"kind": "csc_matrix"}, {"kind": "dense"},
    {"normalised": True, "layer": True}, {"normalised": True, "raw": True},
])  # fmt: skip
def test_h5ad_counts_are_found(tmp_path: Path, more: dict[str, Any]) -> None:
    pytest.importorskip("h5py")
    write_h5ad(tmp_path / "in" / "V1.h5ad", 4, outside=("4x2",), **more)
    Image.fromarray(picture(4)).save(tmp_path / "in" / "V1.png")
    names, places, counts = slide_of(4)
    written = write_shards(tmp_path / "in", tmp_path / "out", options(genes=None, values="counts"))
    assert written.rejections.counts == {"not selected": 1}
    tissue = read_shards(tmp_path / "out")
    kept = [row for row, name in enumerate(names) if name != "4x2"]
    assert list(tissue.ids) == [f"V1/{names[row]}" for row in kept]
    np.testing.assert_array_equal(tissue.positions, places[kept])
    wanted = normalized(counts[kept], counts[kept].sum(1), 1e4)
    np.testing.assert_allclose(tissue.expression, wanted, rtol=1e-6)


def test_h5ad_without_counts_or_places_says_so(tmp_path: Path) -> None:
    h5py = pytest.importorskip("h5py")
    write_h5ad(tmp_path / "a" / "V.h5ad", 4, normalised=True)
    with pytest.raises(NearfarError, match="normalised"):
        write_shards(tmp_path / "a", tmp_path / "out", options())
    write_h5ad(tmp_path / "b" / "V.h5ad", 4)
    with h5py.File(tmp_path / "b" / "V.h5ad", "a") as file:
        del file["obsm/spatial"]
    with pytest.raises(NearfarError, match="no 'obsm/spatial'"):
        write_shards(tmp_path / "b", tmp_path / "out", options())
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "V.h5ad").write_bytes(b"nothing")
    with pytest.raises(NearfarError, match="HDF5"):
        write_shards(tmp_path / "c", tmp_path / "out", options())
    with pytest.raises(NearfarError, match="none of the layouts"):
        find_slides(tmp_path)
    with pytest.raises(NearfarError, match="no such folder"):
        find_slides(tmp_path / "nowhere")


def test_hest_patches_are_read_by_barcode(tmp_path: Path) -> None:
    h5py = pytest.importorskip("h5py")
    write_h5ad(tmp_path / "in" / "st" / "H1.h5ad", 4)
    names, _, _ = slide_of(4)
    (tmp_path / "in" / "patches").mkdir()
    (tmp_path / "in" / "metadata").mkdir()
    (tmp_path / "in" / "metadata" / "H1.json").write_text('{"patient": "P3", "dataset_title": "Breast"}')
    rows = np.random.default_rng(0).permutation(len(names))[:-2]  # in another order, and two are missing
    pixels = np.stack([picture(50 + at, 40, 40) for at in rows])
    with h5py.File(tmp_path / "in" / "patches" / "H1.h5", "w") as file:
        file["img"] = pixels
        file.create_dataset("barcode", data=[[names[at].encode()] for at in rows], dtype="S10")
    written = write_shards(tmp_path / "in", tmp_path / "out", options(patch=40, pixels=20, genes=None))
    assert written.rejections.counts == {"no picture": 2}
    tissue = read_shards(tmp_path / "out")
    assert tissue.patients == ["Breast: P3"]
    for row, spot in enumerate(tissue.ids):
        at = rows.tolist().index(names.index(spot.split("/")[1]))
        wanted = pixels[at].reshape(20, 2, 20, 2, 3).mean((1, 3))
        assert np.abs(tissue.patches[row] - wanted).mean() < 4
    # 10 micrometres at half a micrometre a pixel are the 20 pixels in the middle.
    write_shards(tmp_path / "in", tmp_path / "um", options(patch_um=10.0, pixels=20, genes=None, quality=98))
    middle = read_shards(tmp_path / "um").patches[0].astype(int)
    at = rows.tolist().index(names.index(tissue.ids[0].split("/")[1]))
    assert np.abs(middle - pixels[at][10:30, 10:30]).mean() < 3
    with pytest.raises(NearfarError, match="from which 64 cannot be cut"):
        write_shards(tmp_path / "in", tmp_path / "big", options(patch=64))


def test_micrometres_need_a_pixel_size(source: Path, tmp_path: Path) -> None:
    pytest.importorskip("h5py")
    write_h5ad(tmp_path / "in" / "V.h5ad", 4)
    Image.fromarray(picture(4)).save(tmp_path / "in" / "V.png")
    with pytest.raises(NearfarError, match="how large a pixel is"):
        write_shards(tmp_path / "in", tmp_path / "out", options(patch_um=30.0))
    write_h5ad(tmp_path / "in" / "V.h5ad", 4, diameter=55.0)  # of 55 micrometres: 1 a pixel
    written = write_shards(tmp_path / "in", tmp_path / "out", options(patch_um=30.0))
    assert (written.index.slides[0].pixel_size, written.index.slides[0].side) == (1.0, 30)
    # Spots 48 pixels apart at least, which is 200 micrometres in the Spatial Transcriptomics array.
    written = write_shards(source, tmp_path / "st", options(patch_um=100.0))
    assert written.index.slides[0].side == 24
    with pytest.raises(NearfarError, match="fewer than pixels=16"):
        write_shards(source, tmp_path / "st", options(patch_um=50.0))


def test_scans_are_read_by_regions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("openslide")
    pytest.importorskip("h5py")
    for name in ("tiled", "whole"):
        write_h5ad(tmp_path / name / "st" / "V.h5ad", 4)
        (tmp_path / name / "wsis").mkdir()
    write_tiled_tiff(tmp_path / "tiled" / "wsis" / "V.tif", picture(4))
    Image.fromarray(picture(4)).save(tmp_path / "whole" / "wsis" / "V.png")
    write_shards(tmp_path / "whole", tmp_path / "b", options())
    monkeypatch.setattr(image, "read_large", None)  # nothing is read whole
    write_shards(tmp_path / "tiled", tmp_path / "a", options())
    assert (tmp_path / "a" / "V-0000.tar").read_bytes() == (tmp_path / "b" / "V-0000.tar").read_bytes()


# -- parts ---------------------------------------------------------------------------------------------------


def test_our_tar_reader_agrees_with_tarfile_and_refuses_others() -> None:
    buffer = io.BytesIO()
    writer = ShardWriter(buffer)
    rng = np.random.default_rng(0)
    wanted = {
        f"s-{at:06d}": {"a": rng.bytes(n), "b.c": rng.bytes(3)}
        for at, n in enumerate((0, 1, 511, 512, 513, 2000))
    }
    for key, parts in wanted.items():
        writer.add(key, parts)
    writer.close()
    data = buffer.getvalue()
    read = {
        key: {name: bytes(part) for name, part in parts.items()}
        for key, parts in samples(memoryview(data), "x")
    }
    assert read == wanted
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        assert {m.name for m in tar} == {f"{key}.{name}" for key, parts in wanted.items() for name in parts}
    with pytest.raises(NearfarError, match=r"cut off in s-000005\.a"):
        list(samples(memoryview(data[: data.index(b"s-000005.a") + 600]), "x"))
    with pytest.raises(NearfarError, match="no plain member"):
        list(samples(memoryview(b"x" * 1024), "x"))


def test_jpg_survives_without_simplejpeg(monkeypatch: pytest.MonkeyPatch) -> None:
    pixels = picture(1, 32, 32)
    data = encode_jpeg(pixels, 95)
    into = np.empty((32, 32, 3), np.uint8)
    decode_jpeg(data, into)
    monkeypatch.setitem(__import__("sys").modules, "simplejpeg", None)
    plain = decode_jpeg(data)
    assert np.abs(plain.astype(int) - into).max() <= 2
    assert np.abs(decode_jpeg(encode_jpeg(pixels, 95)).astype(int) - pixels).mean() < 3
    with pytest.raises(ValueError, match="32 × 32"):
        decode_jpeg(data, np.empty((16, 16, 3), np.uint8))


def test_mapped_arrays_are_made_anew_when_damaged_and_work_without_a_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = []

    def fill(arrays: dict[str, np.ndarray]) -> None:
        made.append(1)
        arrays["x"][:] = np.arange(6).reshape(2, 3)

    layout = {"x": ((2, 3), np.float32), "empty": ((0, 3), np.uint8)}
    for _ in range(2):
        arrays = mapped_arrays("t", "k", layout, fill)
        np.testing.assert_array_equal(arrays["x"], np.arange(6).reshape(2, 3))
    assert len(made) == 1
    arrays["x"][0, 0] = 9  # in memory alone
    assert mapped_arrays("t", "k", layout, fill)["x"][0, 0] == 0
    (file,) = (tmp_path / "cache" / "t").rglob("x.npy")
    os.truncate(file, file.stat().st_size - 4)
    with pytest.warns(UserWarning, match="made anew"):
        np.testing.assert_array_equal(mapped_arrays("t", "k", layout, fill)["x"], np.arange(6).reshape(2, 3))
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("NEARFAR_CACHE", str(tmp_path / "file"))
    with pytest.warns(UserWarning, match="held in memory"):
        assert mapped_arrays("t", "k", layout, fill)["x"][1, 2] == 5
    monkeypatch.setenv("NEARFAR_CACHE", str(tmp_path / "cache"))
    with pytest.raises(ZeroDivisionError):
        mapped_arrays("t", "other", {"x": ((1,), np.int8)}, lambda _: 1 // 0)  # type: ignore[arg-type, return-value]
    assert not list((tmp_path / "cache").rglob(".writing-*"))


@pytest.mark.parametrize(("changed", "message"), [
    ({"patch": 0}, "patch=0"), ({"pixels": 64}, "adds no detail"), ({"quality": 0}, "quality"),
    ({"genes": 0}, "genes=0"),
    ({"values": "raw"}, "counts"), ({"split_by": "organ"}, "patient"), ({"patch_um": -1.0}, "micrometres"),
    ({"pixels": 4}, "8 pixels"), ({"target_sum": 0.0}, "target_sum"), ({"neighbors": 0}, "neighbors"),
])  # fmt: skip
def test_options_out_of_range_are_refused(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(NearfarError, match=message):
        options(**changed)


def test_the_verb_writes_and_names_mistakes(source: Path, tmp_path: Path) -> None:
    small = ["--patch", "32", "--pixels", "16", "--genes", "6", "--neighbors", "3"]
    run = CliRunner().invoke(
        app, ["data", "shards", str(source), str(tmp_path / "s"), *small, "--test", "B.1"]
    )
    assert run.exit_code == 0, run.output
    assert "60 spots of 3 slide(s)" in run.output
    assert "rejected.tsv" in run.output
    listed = tmp_path / "genes.txt"
    listed.write_text("G05\nG02\n")
    run = CliRunner().invoke(
        app,
        [
            "data",
            "shards",
            str(source),
            str(tmp_path / "g"),
            *small,
            "--genes",
            str(listed),
            "--val-fraction",
            "0.3",
        ],
    )
    assert run.exit_code == 0, run.output
    assert read_index(tmp_path / "g").genes == ["G05", "G02"]
    assert len(read_splits(tmp_path / "g")["val"]) == 1
    listed.write_text("G05\nERBB2\n")
    with pytest.raises(NearfarError, match="1 of 2 genes are not in every slide, first ERBB2"):
        write_shards(source, tmp_path / "h", options(genes=listed))


@pytest.mark.data
@pytest.mark.skipif("NEARFAR_DATA" not in os.environ, reason="needs NEARFAR_DATA")
def test_a_real_section_becomes_shards(tmp_path: Path) -> None:
    """One of six: a picture of 92 million pixels, 178 spots with 15,772 genes, two of them all but empty."""
    real = Path(os.environ["NEARFAR_DATA"]) / "her2st"
    for name, file in (("images", "C6.jpg"), ("counts", "C6.tsv.gz"), ("spots", "C6.tsv")):
        (tmp_path / "in" / name).mkdir(parents=True)
        (tmp_path / "in" / name / file).symlink_to(real / name / file)
    written = write_shards(tmp_path / "in", tmp_path / "out", ShardOptions(pixels=64, genes=500))
    assert written.rejections.counts == {"no counts": 1, "fewer than 10 counts": 2}
    tissue = read_shards(tmp_path / "out")
    assert tissue.patches.shape == (176, 64, 64, 3)
    assert {"ERBB2", "GNAS", "SCGB2A2"} & set(tissue.genes)
    # Neighbours in the array are neighbours on the slide.
    places = np.array([[int(part) for part in spot.split("/")[1].split("x")] for spot in tissue.ids])
    apart = np.abs(places[tissue.neighbors] - places[:, None]).max(2)
    assert (apart <= 2).mean() > 0.95
    assert 0.7 < written.index.slides[0].pixel_size < 0.75  # type: ignore[operator]
