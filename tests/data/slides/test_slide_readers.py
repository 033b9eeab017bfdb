"""Slides as the field's programs write them: h5ad by anndata, outputs of Space Ranger, Spatial Transcriptomics.

What is read is compared with what was written; what cannot be read right is refused by name, or counted.
"""

from __future__ import annotations

import gzip
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from nearfar.config.compose import compose_config, path_options, quote_paths
from nearfar.data.slides.shard_dataset import read_shards
from nearfar.data.slides.shards import ShardOptions, WriteResult, write_shards
from nearfar.errors import NearfarError
from nearfar.systems import check_config
from tissue_files import GENES, picture, plain_strings, slide_data, slide_of, write_h5ad, write_outs, write_st

pytestmark = pytest.mark.slow  # real runs

pd = pytest.importorskip("pandas")
ad = pytest.importorskip("anndata")
h5py = pytest.importorskip("h5py")

NAMES, PLACES, COUNTS = slide_of(4)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("NEARFAR_CACHE", str(tmp_path / "cache"))
    with plain_strings():
        yield


def shards_of(folder: Path, out: str = "out", **more: Any) -> WriteResult:
    chosen = {"patch": 32, "pixels": 16, "genes": None, "neighbors": 3, "values": "counts", **more}
    return write_shards(folder, folder.parent / out, ShardOptions(**chosen))


def save(data: Any, path: Path, image: bool = True, **more: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    data.write_h5ad(path, **more)
    if image:
        Image.fromarray(picture(4)).save(path.with_suffix(".png"))
    return path


def check_read(folder: Path, slide: str = "V", kept: list[int] | None = None, out: str = "out") -> None:
    """All spots (or those of ``kept``) with the places and counts that `slide_of` (4) gives."""
    tissue = read_shards(folder.parent / out)
    rows = list(range(len(NAMES))) if kept is None else kept
    assert list(tissue.ids) == [f"{slide}/{NAMES[row]}" for row in rows]
    np.testing.assert_array_equal(tissue.positions, PLACES[rows])
    np.testing.assert_array_equal(tissue.totals, COUNTS[rows].sum(1))  # type: ignore[index]
    raw = np.expm1(tissue.expression) * tissue.totals[:, None] / 1e4  # type: ignore[index]
    order = [tissue.genes.index(gene) for gene in GENES]
    np.testing.assert_allclose(raw[:, order], COUNTS[rows], atol=1e-3)


# -- h5ad ----------------------------------------------------------------------------------------------------


def nullable_index(data: Any) -> None:
    data.obs.index = pd.Index(pd.array(list(data.obs_names), dtype="string[python]"))
    data.var.index = pd.Index(pd.array(list(data.var_names), dtype="string[python]"))


def categorical_columns(data: Any) -> None:
    data.obs["in_tissue"] = pd.Categorical(["1"] * len(data))
    data.obs["kind"] = pd.Categorical(["tumour"] * len(data))


def nullable_columns(data: Any) -> None:
    data.obs["in_tissue"] = pd.array([True] * len(data), dtype="boolean")
    data.obs["score"] = pd.array([1, None] * (len(data) // 2), dtype="Int64")


def scalars_in_spatial(data: Any) -> None:
    data.uns["spatial"] = {
        "is_single": np.True_,
        "title": "a slide",
        "lib": {"scalefactors": {}, "note": "x"},
    }


def places_as_frame(data: Any) -> None:
    frame = pd.DataFrame({"y": PLACES[:, 1], "x": PLACES[:, 0]}, index=data.obs_names)
    data.obsm["spatial"] = frame


def places_of_three(data: Any) -> None:
    data.obsm["spatial"] = np.column_stack([PLACES, np.zeros(len(PLACES))])


def whole_floats(data: Any) -> None:
    data.X = data.X.astype(np.float64)


@pytest.mark.parametrize("change", [
    nullable_index, categorical_columns, nullable_columns, scalars_in_spatial, places_as_frame, places_of_three,
    whole_floats,
])  # fmt: skip
@pytest.mark.parametrize("kind", ["csr_matrix", "csc_matrix", "dense"])
def test_what_anndata_writes_is_read(tmp_path: Path, change: Callable[[Any], None], kind: str) -> None:
    data = slide_data(4, kind)
    change(data)
    with ad.settings.override(allow_write_nullable_strings=True):
        save(data, tmp_path / "in" / "V.h5ad")
    written = shards_of(tmp_path / "in")
    assert not len(written.rejections)
    check_read(tmp_path / "in")


def test_attributes_that_a_writer_left_out_are_filled_in(tmp_path: Path) -> None:
    """As in files by h5py alone, or by other languages: encodings without a version, frames without an order."""
    data = slide_data(4)
    data.obs["library_id"] = pd.Categorical(["lib"] * len(data))
    path = save(data, tmp_path / "in" / "V.h5ad")
    with h5py.File(path, "a") as file:
        for name in ("obs", "var", "obs/library_id", "X"):
            del file[name].attrs["encoding-version"]
        for name in ("obs", "var"):
            del file[name].attrs["column-order"]
        del file["var"].attrs["encoding-type"]
        del file.attrs["encoding-type"], file.attrs["encoding-version"]
    before = path.read_bytes()
    shards_of(tmp_path / "in")
    check_read(tmp_path / "in")
    assert path.read_bytes() == before


def test_files_of_anndata_before_07_are_read(tmp_path: Path) -> None:
    """Frames as arrays of records, places in one of obsm, the sparse matrix in the layout of h5sparse."""
    (tmp_path / "in").mkdir()
    data = slide_data(4)
    with h5py.File(tmp_path / "in" / "V.h5ad", "w") as file:
        group = file.create_group("X")
        group.attrs["h5sparse_format"], group.attrs["h5sparse_shape"] = "csr", data.shape
        for part in ("data", "indices", "indptr"):
            group[part] = getattr(data.X, part)
        inside = np.ones(len(NAMES), np.int64)
        file["obs"] = np.array(list(zip(NAMES, inside, strict=True)), [("index", "S10"), ("in_tissue", "i8")])
        file["var"] = np.array([(gene,) for gene in GENES], [("index", "S10")])
        file["obsm"] = np.array([(place,) for place in PLACES.tolist()], [("spatial", "f8", (2,))])
    Image.fromarray(picture(4)).save(tmp_path / "in" / "V.png")
    shards_of(tmp_path / "in")
    check_read(tmp_path / "in")


def test_spots_that_cannot_be_used_are_counted_once(tmp_path: Path) -> None:
    data = slide_data(4)
    data.obs["in_tissue"] = pd.array([1] * 16 + [0, 0, None, 1], dtype="Int64")
    names = list(NAMES)
    names[1] = names[0]
    data.obs_names = names
    places = PLACES.copy()
    places[2] = np.nan
    places[3] = [1.0, 1.0]
    data.obsm["spatial"] = places
    save(data, tmp_path / "in" / "V.h5ad")
    written = shards_of(tmp_path / "in")
    assert written.rejections.counts == {
        "no place": 1,
        "spot named twice": 1,
        "not selected": 3,
        "no picture": 1,
    }
    check_read(tmp_path / "in", kept=[0, *range(4, 16), 19])
    assert "in_tissue is empty" in (tmp_path / "out" / "rejected.tsv").read_text()


def test_text_of_in_tissue_is_not_taken_for_true(tmp_path: Path) -> None:
    data = slide_data(4)
    data.obs["in_tissue"] = ["0"] * 5 + ["1"] * 15
    save(data, tmp_path / "in" / "V.h5ad")
    assert shards_of(tmp_path / "in").rejections.counts == {"not selected": 5}
    data.obs["in_tissue"] = "perhaps"
    save(data, tmp_path / "in" / "V.h5ad")
    with pytest.raises(NearfarError, match=r"obs\['in_tissue'\] holds 'perhaps'"):
        shards_of(tmp_path / "in")


def test_a_gene_that_stands_twice_is_added(tmp_path: Path) -> None:
    data = slide_data(4)
    data.var_names = ["G00", "G00", *GENES[2:]]
    save(data, tmp_path / "in" / "V.h5ad")
    shards_of(tmp_path / "in")
    tissue = read_shards(tmp_path / "out")
    raw = np.expm1(tissue.expression) * tissue.totals[:, None] / 1e4  # type: ignore[index]
    np.testing.assert_allclose(raw[:, tissue.genes.index("G00")], COUNTS[:, :2].sum(1), atol=1e-3)


@pytest.mark.parametrize(("change", "message"), [
    (lambda d: setattr(d, "X", d.X / 3), "X .*is no whole number.*layers"),
    (lambda d: setattr(d, "X", -d.X), "is below 0"),
    (lambda d: setattr(d, "X", d.X * np.float32("nan")), "is no number"),
    (lambda d: setattr(d, "X", np.where(d.X > 3, np.float32("inf"), d.X)), "is no number"),
    (lambda d: setattr(d, "X", None), "X is missing"),
    (lambda d: d.obsm.pop("spatial"), "no 'obsm/spatial'.*in obsm: nothing"),
    (lambda d: d.obsm.update(spatial=PLACES[:, :1]), r"\(20, 1\); \(spots, 2\) is needed"),
    (lambda d: d.obsm.update(spatial=np.hstack([PLACES] * 2)), r"\(20, 4\); \(spots, 2\) is needed"),
    (lambda d: d.obsm.update(spatial=pd.DataFrame({"a": PLACES[:, 0]}, index=d.obs_names)), "call two of them x and y"),
])  # fmt: skip
def test_h5ad_that_cannot_be_read_right_is_refused(tmp_path: Path, change: Any, message: str) -> None:
    data = slide_data(4, "dense")
    change(data)
    save(data, tmp_path / "in" / "V.h5ad")
    with pytest.raises(NearfarError, match=message) as caught:
        shards_of(tmp_path / "in")
    assert "V.h5ad" in str(caught.value)


def test_files_that_are_no_whole_h5ad_are_named(tmp_path: Path) -> None:
    whole = save(slide_data(4), tmp_path / "in" / "V.h5ad").read_bytes()
    for content in (b"", whole[: len(whole) // 2], b"<html>not found</html>"):
        (tmp_path / "in" / "V.h5ad").write_bytes(content)
        with pytest.raises(NearfarError, match=r"V\.h5ad cannot be read as HDF5.*complete"):
            shards_of(tmp_path / "in")
    with h5py.File(tmp_path / "in" / "V.h5ad", "w") as file:
        file["matrix/data"] = [1, 2]
    with pytest.raises(NearfarError, match=r"no 'obs', so it is no AnnData file; it holds matrix"):
        shards_of(tmp_path / "in")
    (tmp_path / "in" / "V.h5ad").write_bytes(gzip.compress(whole))
    with pytest.raises(NearfarError, match="packed: unpack it with gunzip"):
        shards_of(tmp_path / "in")
    (tmp_path / "in" / "V.h5ad").rename(tmp_path / "in" / "W.h5ad.gz")
    with pytest.raises(NearfarError, match=r"W is packed \(\.h5ad\.gz\): unpack it first"):
        shards_of(tmp_path / "in")
    (tmp_path / "in" / "W.h5ad.gz").unlink()
    save(slide_data(4)[:0], tmp_path / "in" / "V.h5ad")
    with pytest.raises(NearfarError, match="their files hold no spots"):
        shards_of(tmp_path / "in")


@pytest.mark.parametrize("spoil", range(6))
def test_forged_h5ad_is_refused(tmp_path: Path, spoil: int) -> None:
    """Indices outside of the matrix, other files' values, claims of size: no crash and nothing read elsewhere."""
    path = save(slide_data(4), tmp_path / "in" / "V.h5ad")
    (tmp_path / "secret").write_bytes(b"\1" * 4096)
    with h5py.File(tmp_path / "other.h5", "w") as other:
        other["spatial"] = PLACES
    with h5py.File(path, "a") as file:
        if spoil == 0:
            file["X/indices"][3] = 2**31 - 1
        elif spoil == 1:
            file["X/indptr"][4] = 10**6
        elif spoil == 2:
            del file["obsm/spatial"]
            file["obsm/spatial"] = h5py.ExternalLink(str(tmp_path / "other.h5"), "spatial")
        elif spoil == 3:
            del file["X"]
            file.create_dataset(
                "X", COUNTS.shape, "u1", external=[(str(tmp_path / "secret"), 0, COUNTS.size)]
            )
        elif spoil == 4:
            del file["X"]
            file.create_dataset("X", (10**7, 10**6), "f4", chunks=(100, 100))
        else:
            del file["obs/in_tissue"]
            file["obs"].create_dataset("in_tissue", (10**9,), "i8", chunks=(1000,))
    with pytest.raises(NearfarError, match=r"V\.h5ad"):
        shards_of(tmp_path / "in")


def test_patches_of_hest_that_are_forged_are_refused(tmp_path: Path) -> None:
    save(slide_data(4), tmp_path / "in" / "st" / "H.h5ad", image=False)
    (tmp_path / "in" / "patches").mkdir()
    path = tmp_path / "in" / "patches" / "H.h5"

    def refused(message: str, make: Callable[[Any], None]) -> None:
        path.unlink(missing_ok=True)
        with h5py.File(path, "w") as file:
            make(file)
        with pytest.raises(NearfarError, match=message) as caught:
            shards_of(tmp_path / "in")
        assert "H.h5" in str(caught.value)

    names = np.array(NAMES, "S8")
    with h5py.File(tmp_path / "other.h5", "w") as other:
        other["img"] = np.zeros((20, 32, 32, 3), np.uint8)
    refused("lies in a different file", lambda file: file.update(barcode=names) or file.update(
        img=h5py.ExternalLink(str(tmp_path / "other.h5"), "img")
    ))  # fmt: skip
    refused("no array but a group", lambda file: file.create_group("img") and file.update(barcode=names))
    refused("claims", lambda file: file.update(barcode=names) or file.create_dataset(
        "img", (10**6, 500, 500, 3), "u1", chunks=(1, 500, 500, 3)
    ))  # fmt: skip
    refused("3 patches and 20 barcodes", lambda file: file.update(
        barcode=names, img=np.zeros((3, 32, 32, 3), np.uint8)
    ))  # fmt: skip
    path.write_bytes(b"<html>")
    with pytest.raises(NearfarError, match=r"H\.h5 cannot be read as HDF5"):
        shards_of(tmp_path / "in")


# -- several sections in one file ----------------------------------------------------------------------------


def two_sections(
    column: str = "library_id", uns: bool = True, values: tuple[str, str] = ("one", "two")
) -> Any:
    """Sections of slides 4 and 5, their spots in turns."""
    parts = [slide_data(seed) for seed in (4, 5)]
    data = ad.concat(parts, label=column, keys=list(values), index_unique="-")
    if uns:
        data.uns["spatial"] = {
            name: {"scalefactors": {"spot_diameter_fullres": size}}
            for name, size in zip(values, (55.0, 110.0), strict=True)
        }
    order = np.arange(40).reshape(2, 20).T.ravel()
    return data[order].copy()


@pytest.mark.parametrize(("column", "uns"), [
    ("library_id", True), ("anything", True), ("sample", False), ("batch", False), ("library_id", False),
])  # fmt: skip
def test_libraries_of_one_file_are_slides_of_their_own(tmp_path: Path, column: str, uns: bool) -> None:
    save(two_sections(column, uns), tmp_path / "in" / "all.h5ad", image=False)
    Image.fromarray(picture(4)).save(tmp_path / "in" / "all-one.png")
    Image.fromarray(picture(5)).save(tmp_path / "in" / "two.png")
    written = shards_of(tmp_path / "in")
    assert [slide.name for slide in written.index.slides] == ["all-one", "all-two"]
    assert [slide.pixel_size for slide in written.index.slides] == ([1.0, 0.5] if uns else [None, None])
    tissue = read_shards(tmp_path / "out")
    for number, seed in enumerate((4, 5)):
        rows = tissue.rows_of(number)
        names, places, counts = slide_of(seed)
        word = ("one", "two")[number]
        assert [tissue.ids[row] for row in rows] == [f"all-{word}/{name}-{word}" for name in names]
        np.testing.assert_array_equal(tissue.positions[rows], places)
        np.testing.assert_array_equal(tissue.totals[rows], counts.sum(1))  # type: ignore[index]
        assert set(tissue.neighbors[rows].ravel().tolist()) <= set(rows.tolist())
        # Patches are of the own picture, as those of the section in a file of its own.
        alone = tmp_path / f"alone{seed}" / "in"
        save(slide_data(seed), alone / "S.h5ad", image=False)
        Image.fromarray(picture(seed)).save(alone / "S.png")
        shards_of(alone)
        np.testing.assert_array_equal(tissue.patches[rows], read_shards(alone.parent / "out").patches)


def test_libraries_that_cannot_be_told_apart_are_refused(tmp_path: Path) -> None:
    path = save(two_sections(), tmp_path / "in" / "all.h5ad")
    with pytest.raises(
        NearfarError, match=r"2 sections by obs\['library_id'\] \(one, two\).*all-one\.png"
    ) as caught:
        shards_of(tmp_path / "in")
    assert "all.png cannot be the picture of all" in str(caught.value)
    data = two_sections()
    data.obs["own"] = data.obs["library_id"].to_numpy()[::-1]
    save(data, path)
    with pytest.raises(NearfarError, match=r"\['library_id'\] and obs\['own'\] both name libraries"):
        shards_of(tmp_path / "in")
    data = two_sections()
    del data.obs["library_id"]
    save(data, path)
    with pytest.raises(NearfarError, match=r"2 libraries \(one, two\), and no column of obs says"):
        shards_of(tmp_path / "in")
    # The advice works: without a word of libraries it is one slide.
    del data.uns["spatial"]
    save(data, path)
    assert [slide.name for slide in shards_of(tmp_path / "in").index.slides] == ["all"]


def test_sections_that_no_column_names_are_noticed(tmp_path: Path) -> None:
    data = two_sections(uns=False)
    del data.obs["library_id"]
    data.obs["array_row"], data.obs["array_col"] = np.arange(40) // 2, np.arange(40) // 2 % 7
    path = save(data, tmp_path / "in" / "all.h5ad")
    with pytest.raises(NearfarError, match="same places of the array"):
        shards_of(tmp_path / "in")
    data.obs["array_row"] = 0  # filled in, and the same for all
    save(data, path)
    assert [slide.spots for slide in shards_of(tmp_path / "in").index.slides] == [40]
    data.obsm["spatial"] = np.column_stack([data.obsm["spatial"], np.arange(40) % 2])
    save(data, path)
    with pytest.raises(NearfarError, match="places at several depths"):
        shards_of(tmp_path / "in")


def test_one_section_of_a_file_that_still_names_two_is_one_slide(tmp_path: Path) -> None:
    data = two_sections()
    data = data[data.obs["library_id"] == "two"].copy()
    save(data, tmp_path / "in" / "all.h5ad")
    written = shards_of(tmp_path / "in")
    assert [(slide.name, slide.pixel_size) for slide in written.index.slides] == [("all", 0.5)]


def test_spots_without_a_library_are_counted_once(tmp_path: Path) -> None:
    data = two_sections()
    data.obs.loc[data.obs_names[:3], "library_id"] = np.nan
    save(data, tmp_path / "in" / "all.h5ad", image=False)
    for name in ("one", "two"):
        Image.fromarray(picture(4)).save(tmp_path / "in" / f"{name}.png")
    written = shards_of(tmp_path / "in")
    assert written.rejections.counts == {"no section": 3}
    assert sum(slide.spots for slide in written.index.slides) == 37


def test_a_picture_that_is_not_the_one_of_the_places_is_refused(tmp_path: Path) -> None:
    data = slide_data(4)
    small = np.zeros((26, 30, 3), np.uint8)  # of the full picture of 300 × 260
    data.uns["spatial"] = {"lib": {"images": {"hires": small}, "scalefactors": {"tissue_hires_scalef": 0.1}}}
    path = save(data, tmp_path / "in" / "V.h5ad")
    shards_of(tmp_path / "in")
    check_read(tmp_path / "in")
    Image.fromarray(picture(4, 150, 130)).save(path.with_suffix(".png"))
    with pytest.raises(NearfarError, match=r"150 × 130 pixels, and .*in a picture of 300 × 260"):
        shards_of(tmp_path / "in")


# -- Space Ranger --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("positions", "matrix"), [
    ("tissue_positions_list.csv", "h5v2"), ("tissue_positions_list.csv", "genes"), ("tissue_positions.csv", "h5"),
    ("tissue_positions.csv", "folder"), ("tissue_positions.parquet", "h5"),
])  # fmt: skip
@pytest.mark.parametrize("where", ["in", "in/outs", "in/V", "in/V/outs"])
def test_outputs_of_space_ranger_are_read(tmp_path: Path, positions: str, matrix: str, where: str) -> None:
    (tmp_path / "in").mkdir()
    write_outs(tmp_path / where, 4, positions, matrix)
    name = "V" if "V" in where else "in"
    Image.fromarray(picture(4)).save(tmp_path / "in" / f"{name}.png")
    written = shards_of(tmp_path / "in", patch=32)
    kept = [row for row, spot in enumerate(NAMES) if spot != "3x2"]
    check_read(tmp_path / "in", name, kept)
    assert written.rejections.counts == {"not selected": 1}
    assert written.index.slides[0].pixel_size == 2.0
    # The same slide as an h5ad beside the same picture gives the same patches.
    write_h5ad(tmp_path / "h" / "in" / f"{name}.h5ad", 4, outside=("3x2",))
    Image.fromarray(picture(4)).save(tmp_path / "h" / "in" / f"{name}.png")
    shards_of(tmp_path / "h" / "in")
    first, second = read_shards(tmp_path / "out"), read_shards(tmp_path / "h" / "out")
    np.testing.assert_array_equal(first.patches, second.patches)


def test_without_the_full_picture_the_small_one_is_taken_and_said_so(tmp_path: Path) -> None:
    write_outs(tmp_path / "in" / "A" / "outs", 4, scale=0.5)
    write_outs(tmp_path / "in" / "B" / "outs", 5, scale=0.5, prefix="B_")
    written = shards_of(tmp_path / "in", patch=16)
    assert [slide.name for slide in written.index.slides] == ["A", "B"]
    assert (
        "slide A: patches are cut from the small picture tissue_hires_image.png: a spot has 14"
        in written.summary()
    )
    assert written.index.slides[0].pixel_size == 4.0
    tissue = read_shards(tmp_path / "out", ["A"])
    kept = [row for row, spot in enumerate(NAMES) if spot != "3x2"]
    np.testing.assert_allclose(tissue.positions, PLACES[kept] / 2)


@pytest.mark.parametrize(("change", "message"), [
    (lambda o: (o / "spatial" / "tissue_positions.csv").unlink(), "has none of tissue_positions.parquet"),
    (lambda o: (o / "spatial" / "tissue_positions.csv").write_text(""), "tissue_positions.csv cannot be read"),
    (lambda o: (o / "spatial" / "tissue_positions.csv").write_text("a,b\n1,2\n"), "has 2 columns"),
    (lambda o: (o / "spatial" / "scalefactors_json.json").write_text("[" * 10**5), "scalefactors_json.json cannot be"),
    (lambda o: (o / "spatial" / "scalefactors_json.json").write_text("[1]"), "no scale factors by name"),
    (lambda o: (o / "spatial" / "scalefactors_json.json").write_text('{"tissue_hires_scalef": "x"}'), "'x'; a number"),
    (lambda o: (o / "spatial" / "scalefactors_json.json").unlink(), "without tissue_hires_scalef"),
    (lambda o: os.truncate(o / "filtered_feature_bc_matrix.h5", 3000), "cannot be read as counts of Space Ranger"),
    (lambda o: h5_change(o, lambda m: m["data"].write_direct(-m["data"][:])), "holds no counts .*below 0"),
    (lambda o: h5_change(o, lambda m: m["indices"].write_direct(m["indices"][:] + 900)), "matrix.h5 is damaged"),
    (lambda o: h5_change(o, lambda m: m["shape"].write_direct(np.array([3, 20], "i4"))), r"is \[3, 20\], with 12"),
])  # fmt: skip
def test_damaged_outputs_are_named(tmp_path: Path, change: Any, message: str) -> None:
    write_outs(tmp_path / "in" / "V", 4)
    change(tmp_path / "in" / "V")
    with pytest.raises(NearfarError, match=message):
        shards_of(tmp_path / "in", patch=16)


def h5_change(outs: Path, change: Callable[[Any], None]) -> None:
    with h5py.File(outs / "filtered_feature_bc_matrix.h5", "a") as file:
        change(file["matrix"])


def test_normalised_matrix_market_is_refused_and_antibodies_are_left_out(tmp_path: Path) -> None:
    outs = write_outs(tmp_path / "in" / "V", 4, matrix="folder")
    folder = outs / "filtered_feature_bc_matrix"
    rows = gzip.decompress((folder / "features.tsv.gz").read_bytes()).decode().splitlines()
    rows[0] = rows[0].replace("Gene Expression", "Antibody Capture")
    (folder / "features.tsv.gz").write_bytes(gzip.compress("\n".join(rows).encode()))
    assert shards_of(tmp_path / "in", patch=16).index.genes == GENES[1:]
    text = gzip.decompress((folder / "matrix.mtx.gz").read_bytes()).decode()
    lines = text.replace("integer", "real").splitlines()
    lines[-1] += ".5"
    (folder / "matrix.mtx.gz").write_bytes(gzip.compress("\n".join(lines).encode()))
    with pytest.raises(NearfarError, match=r"holds no counts .*no whole number"):
        shards_of(tmp_path / "in", patch=16)


def test_bins_of_several_sizes_are_refused_and_the_advice_works(tmp_path: Path) -> None:
    bins = tmp_path / "in" / "S1" / "outs" / "binned_outputs"
    for size in ("008", "016"):
        write_outs(bins / f"square_{size}um", 4, "tissue_positions.parquet")
    with pytest.raises(
        NearfarError, match=r"the same section in bins of 2 sizes .*name one as the source"
    ) as caught:
        shards_of(tmp_path / "in", patch=16)
    advised = str(caught.value).split("such as ")[1].split(". Of several")[0]
    assert Path(advised) == bins / "square_016um"
    written = write_shards(
        advised, tmp_path / "out", ShardOptions(patch=16, pixels=16, genes=None, neighbors=3)
    )
    assert [slide.name for slide in written.index.slides] == ["S1"]
    (tmp_path / "links").mkdir()
    (tmp_path / "links" / "S1").symlink_to(advised)
    assert [slide.name for slide in shards_of(tmp_path / "links", "two", patch=16).index.slides] == ["S1"]


def test_nothing_of_a_folder_is_passed_over(tmp_path: Path) -> None:
    write_outs(tmp_path / "in" / "A" / "outs", 4)
    write_outs(tmp_path / "in" / "B" / "outs", 5)
    (tmp_path / "in" / "B" / "outs" / "filtered_feature_bc_matrix.h5").unlink()
    with pytest.raises(NearfarError, match="outs has spatial/, but no filtered_feature_bc_matrix"):
        shards_of(tmp_path / "in", patch=16)
    shutil.rmtree(tmp_path / "in" / "B")
    write_h5ad(tmp_path / "in" / "C.h5ad", 4)
    with pytest.raises(NearfarError, match=r"outputs of Space Ranger and C\.h5ad: which"):
        shards_of(tmp_path / "in", patch=16)
    (tmp_path / "in" / "C.h5ad").unlink()
    for name in ("scan.png", "other.png"):  # two pictures of other names: which is it?
        Image.fromarray(picture(4)).save(tmp_path / "in" / "A" / name)
    with pytest.raises(NearfarError, match=r"which of other\.png, scan\.png is the full picture\? Call it A"):
        shards_of(tmp_path / "in", patch=16)
    (tmp_path / "in" / "A" / "other.png").unlink()
    shards_of(tmp_path / "in")
    assert read_shards(tmp_path / "out").positions[0].tolist() == PLACES[1].tolist()  # of the full picture


# -- Spatial Transcriptomics ---------------------------------------------------------------------------------


def edit(path: Path, change: Callable[[list[str]], list[str]]) -> None:
    packed = path.suffix == ".gz"
    data = gzip.decompress(path.read_bytes()) if packed else path.read_bytes()
    content = ("\n".join(change(data.decode().splitlines())) + "\n").encode()
    path.write_bytes(gzip.compress(content) if packed else content)


def test_a_row_that_cannot_be_read_is_counted_once_with_its_own_reason(tmp_path: Path) -> None:
    write_st(tmp_path / "in", {"A": 1})
    counts = tmp_path / "in" / "counts" / "A.tsv.gz"
    edit(counts, lambda rows: [rows[0], *(row.rsplit("\t", 1)[0] for row in rows[1:6]), *rows[6:]])
    written = shards_of(tmp_path / "in")
    assert written.rejections.counts == {"unreadable counts": 5}
    assert written.index.slides[0].spots == 15
    edit(counts, lambda rows: [rows[0], *(row.rsplit("\t", 1)[0] for row in rows[1:])])
    with pytest.raises(NearfarError, match="20 rows rejected: unreadable counts 20"):
        shards_of(tmp_path / "in")


def test_tables_of_counts_that_hold_none_are_refused(tmp_path: Path) -> None:
    write_st(tmp_path / "in", {"A": 1})
    edit(tmp_path / "in" / "counts" / "A.tsv.gz", lambda rows: [rows[0], *(f"{row}.5" for row in rows[1:])])
    with pytest.raises(
        NearfarError, match=r"A\.tsv\.gz, line 2: .*\.5 of G11 is no count.*as they were measured"
    ):
        shards_of(tmp_path / "in")


def test_tables_as_r_writes_them_are_read(tmp_path: Path) -> None:
    write_st(tmp_path / "in", {"A": 1})
    write_st(tmp_path / "usual" / "in", {"A": 1})
    edit(tmp_path / "in" / "counts" / "A.tsv.gz", lambda rows: [rows[0].lstrip("\t"), *rows[1:]])
    edit(
        tmp_path / "in" / "spots" / "A.tsv",
        lambda rows: [
            rows[0],
            *(row[:-1] + ("FALSE" if at < 2 else "TRUE") for at, row in enumerate(rows[1:])),
        ],
    )
    written, _ = shards_of(tmp_path / "in"), shards_of(tmp_path / "usual" / "in")
    assert written.rejections.counts == {"not selected": 2}
    first, second = read_shards(tmp_path / "out"), read_shards(tmp_path / "usual" / "out")
    assert first.genes == second.genes
    np.testing.assert_array_equal(first.expression, second.expression[2:])


def test_places_that_cannot_be_used_say_why(tmp_path: Path) -> None:
    write_st(tmp_path / "in", {"A": 1})

    def change(rows: list[str]) -> list[str]:
        first = rows[1].split("\t")
        second = rows[2].split("\t")
        first[4], second[4] = "nan", "77"
        return [rows[0], "\t".join(first), *rows[2:], "\t".join(second)]

    edit(tmp_path / "in" / "spots" / "A.tsv", change)
    assert shards_of(tmp_path / "in").rejections.counts == {"no place": 2}
    listed = (tmp_path / "out" / "rejected.tsv").read_text()
    assert "line 2, is not finite" in listed
    assert "has two places of the spot" in listed


# -- pictures ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("damage", ["cut", "empty", "html", "cut png"])
def test_a_damaged_picture_is_counted_when_slides_are_read(tmp_path: Path, damage: str) -> None:
    """One of two slides: the other one is written, and nothing waits for training to fail."""
    write_st(tmp_path / "in", {"A": 1, "B": 2})
    path = tmp_path / "in" / "images" / "B.jpg"
    if damage == "cut png":
        path.unlink()
        path = path.with_suffix(".png")
        Image.fromarray(picture(2)).save(path)
    content = path.read_bytes()
    path.write_bytes({"empty": b"", "html": b"<html>404</html>"}.get(damage, content[: len(content) // 2]))
    written = shards_of(tmp_path / "in")
    assert (written.dropped, written.rejections.counts) == (["B"], {"no picture": 20})
    listed = (tmp_path / "out" / "rejected.tsv").read_text()
    assert path.name in listed
    assert str(tmp_path) not in listed  # the same bytes on any machine
    assert read_shards(tmp_path / "out").slide_names == ["A"]


# -- names that are also files -------------------------------------------------------------------------------


def test_a_slide_called_like_a_folder_stays_a_slide(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("B", "shards", "train.csv", "800"):
        (tmp_path / name).mkdir()
    config = compose_config(["experiment=medium_spatial", "data.val=B", "data.hold_out=C", "data.dir=shards"])
    assert path_options(check_config(config)) == {"data.dir": Path("shards")}
    assert quote_paths(["data.train=800", "data.dir=shards"]) == ["data.train=800", "data.dir='shards'"]
    config = compose_config(["experiment=molecules", "data.train=train.csv", "data.val=B"])
    assert path_options(check_config(config)) == {"data.train": Path("train.csv"), "data.val": Path("B")}
    config = compose_config(["experiment=molecules", "text_encoder=transformer", "text_encoder.model=B"])
    assert path_options(check_config(config)) == {
        "text_encoder.model": Path("B")
    }  # as transformers itself takes it
