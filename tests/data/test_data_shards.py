"""WebDataset shards: what is read, and that nothing in them is run."""

from __future__ import annotations

import io
import json
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from nearfar.data.images import read_image
from nearfar.data.shards import shard_items
from nearfar.data.sources import read_items, split_sources
from nearfar.data.table_items import Wanted
from nearfar.errors import NearfarError


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setenv("NEARFAR_CACHE", str(tmp_path / "cache"))


def picture(value: int, kind: str = "PNG") -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (3, 2), (value, 0, 0)).save(stream, kind)
    return stream.getvalue()


def array(values) -> bytes:
    stream = io.BytesIO()
    np.save(stream, np.asarray(values))
    return stream.getvalue()


def shard(path: Path, members: dict[str, bytes | str], mode: str = "w") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode) as archive:
        for name, content in members.items():
            data = content.encode() if isinstance(content, str) else content
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def sample(key: str, value: int) -> dict[str, bytes | str]:
    about = json.dumps({"caption": f"number {value}", "size": value, "tags": ["a", "b"]})
    return {
        f"{key}.png": picture(value),
        f"{key}.txt": f" text {value}\n",
        f"{key}.cls": str(value),
        f"{key}.json": about,
    }


# -- what is read --------------------------------------------------------------------------------------------
def test_endings_and_keys_of_json_are_columns(tmp_path):
    items = read_items(shard(tmp_path / "a.tar", {**sample("dir/x", 1), **sample("dir/y", 2)}))
    assert items.ids == ["dir/x", "dir/y"]
    assert list(items.columns) == ["image", "text", "label", "caption", "size", "tags"]
    assert items["text"] == ["text 1", "text 2"]
    assert items["label"] == ["1", "2"]
    assert items["caption"] == ["number 1", "number 2"]
    assert items["size"] == ["1", "2"]
    assert items["tags"] == ["a; b", "a; b"]
    assert [read_image(path)[0, 0, 0] for path in items["image"]] == [1, 2]
    assert all(Path(path).parent.parent.parent == tmp_path / "cache" for path in items["image"])


def test_samples_and_endings_are_those_of_webdataset(tmp_path):
    wds = pytest.importorskip("webdataset")
    members: dict[str, bytes | str] = {
        "a/one.seg.png": picture(1),
        "a/one.JPG": picture(2, "JPEG"),
        "a/two.jpg": picture(3, "JPEG"),
        "b/two.txt": "far",
        "./c/three.txt": "next",
        "three": "no ending",
    }
    file = shard(tmp_path / "a.tar", members)
    theirs = list(wds.WebDataset(str(file), shardshuffle=False, empty_check=False))
    assert read_items(file).ids == [each["__key__"].removeprefix("./") for each in theirs]
    endings = [{name.lower() for name in each if not name.startswith("__")} for each in theirs]
    for ending in ("jpg", "seg.png", "txt"):
        present = read_items(file, [ending]).present(ending)
        assert present.tolist() == [ending in each for each in endings]


def test_columns_may_be_asked_for_by_ending_and_nothing_else_is_kept(tmp_path):
    file = shard(tmp_path / "a.tar", {**sample("x", 1), **sample("y", 2)})
    items = read_items(file, ["txt", "json.caption", "cls"])
    assert items.columns == {
        "txt": ["text 1", "text 2"],
        "json.caption": ["number 1", "number 2"],
        "cls": ["1", "2"],
    }
    assert not (tmp_path / "cache").exists()
    assert read_items(file, ["png"])["png"] == read_items(file, ["image"])["image"]


def test_pictures_of_several_formats_are_one_column_unless_samples_hold_several(tmp_path):
    file = shard(tmp_path / "a.tar", {"x.jpg": picture(1, "JPEG"), "y.webp": picture(2, "WEBP")})
    assert list(read_items(file).columns) == ["image"]
    file = shard(tmp_path / "b.tar", {"x.jpg": picture(1, "JPEG"), "x.png": picture(2), "y.png": picture(3)})
    items = read_items(file)
    assert list(items.columns) == ["jpg", "png"]
    assert items["jpg"][1] is None


def test_a_key_of_json_that_is_also_a_file(tmp_path):
    items = read_items(shard(tmp_path / "a.tar", {"x.txt": "a", "x.json": '{"text": "b"}'}))
    assert items.columns == {"text": ["a"], "json.text": ["b"]}


def test_arrays(tmp_path):
    members = {f"{i}.npy": array([i, i + 0.5]) for i in range(20)}
    members["20.npy"] = array([1.0, 2.0, 3.0])
    members["21.npy"] = b"no array"
    members["22.npy"] = array([1.0]).replace(b"(1,)", b"(1,V")
    items = read_items(shard(tmp_path / "a.tar", members))
    np.testing.assert_array_equal(items["npy"], [[i, i + 0.5] for i in range(20)])
    assert items.rejections.counts == {"not 2 numbers": 1, "array that cannot be read": 2}
    assert len(items.ids) == 20


def test_missing_files_of_a_sample_are_none(tmp_path):
    items = read_items(shard(tmp_path / "a.tar", {"x.txt": "a", "y.cls": "1", "z.txt": "nan"}))
    assert items["text"] == ["a", None, None]
    assert items["label"] == [None, "1", None]


def test_several_shards_patterns_and_shared_keys(tmp_path):
    for number in range(3):
        shard(tmp_path / f"s-{number:02d}.tar", {"x.txt": f"{number}"})
    for source in (tmp_path, str(tmp_path / "s-*.tar"), str(tmp_path / "s-{00..02}.tar")):
        items = read_items(source)
        assert items["text"] == ["0", "1", "2"]
        assert items.ids == ["s-00/x", "s-01/x", "s-02/x"]
    with pytest.raises(NearfarError, match=r"no file .*s-03\.tar"):
        read_items(str(tmp_path / "s-{00..03}.tar"))


def test_packed_shards(tmp_path):
    items = read_items(shard(tmp_path / "a.tar.gz", sample("x", 1), "w:gz"))
    assert items["text"] == ["text 1"]


def test_splits_of_shards(tmp_path):
    for name in ("train-000.tar", "train-001.tar", "val.tar", "test-0.tar"):
        shard(tmp_path / name, {f"{name[:9]}.txt": name})
    sources = split_sources(tmp_path)
    assert {split: len(files) for split, files in sources.items()} == {"train": 2, "val": 1, "test": 1}
    assert read_items(sources["train"])["text"] == ["train-000.tar", "train-001.tar"]
    folders = tmp_path / "folders"
    shard(folders / "train" / "0.tar", {"a.txt": "x"})
    shard(folders / "val" / "0.tar", {"b.txt": "y"})
    assert read_items(split_sources(folders)["val"])["text"] == ["y"]


# -- what is not ---------------------------------------------------------------------------------------------
class Bomb:
    def __reduce__(self):
        return (Path.touch, (Path("/tmp/nearfar-was-run"),))


def test_pickles_are_refused_and_counted(tmp_path):
    data = pickle.dumps(Bomb())
    file = shard(
        tmp_path / "a.tar", {"x.txt": "a", "x.pyd": data, "x.pickle": data, "y.txt": "b", "y.pyd": data}
    )
    items = read_items(file)
    assert list(items.columns) == ["text"]
    assert items.notes["refused: pickles, which run code"] == {"pyd": 2, "pickle": 1}
    with pytest.raises(NearfarError, match="'pyd' holds pickles"):
        read_items(file, ["pyd"])
    hidden = io.BytesIO()
    np.save(hidden, np.array([Bomb()], dtype=object))
    with pytest.raises(
        NearfarError, match="none of its 1 rows is usable; 1 row rejected: array that cannot be read"
    ):
        read_items(shard(tmp_path / "b.tar", {"x.npy": hidden.getvalue()}))
    assert not Path("/tmp/nearfar-was-run").exists()


def test_other_files_are_counted_and_refused_by_name(tmp_path):
    file = shard(tmp_path / "a.tar", {"x.txt": "a", "x.mp4": b"film"})
    assert read_items(file).notes["files that are not read"] == {"mp4": 1}
    with pytest.raises(NearfarError, match=r"files that end in \.mp4 are not read"):
        read_items(file, ["mp4"])
    with pytest.raises(NearfarError, match=r"no column 'textt'. Its columns are 'text'; did you mean 'text'"):
        read_items(file, ["textt"])


def test_nothing_is_written_under_a_name_of_the_shard(tmp_path):
    link = tarfile.TarInfo("y.txt")
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
    file = shard(tmp_path / "a.tar", {"../../evil.png": picture(1), "/x.txt": "a"})
    with tarfile.open(file, "a") as archive:
        archive.addfile(link)
    items = read_items(file)
    assert items["text"] == [None, "a"]
    assert len(list((tmp_path / "cache").rglob("*.png"))) == 0
    assert sum(path.is_file() for path in (tmp_path / "cache").rglob("*")) == 1


@pytest.mark.parametrize("cut", [100, 700, 1500])
def test_a_shard_that_is_cut_off(tmp_path, cut):
    file = shard(tmp_path / "a.tar", {"x.txt": "a" * 600, "y.txt": "b" * 600})
    whole = file.read_bytes()
    file.write_bytes(whole[:cut])
    with pytest.raises(NearfarError, match=r"a\.tar is damaged after [012] samples .*: copy it again"):
        read_items(file)


def test_a_damaged_head_is_not_the_end(tmp_path):
    file = shard(tmp_path / "a.tar", {"x.txt": "a", "y.txt": "b", "z.txt": "c"})
    data = bytearray(file.read_bytes())
    data[1024:1034] = b"\xff" * 10  # the head of the second file
    file.write_bytes(data)
    with pytest.raises(NearfarError, match="damaged after 1 samples"):
        read_items(file)


@pytest.mark.parametrize("content", [b"", b"hello", b"\x1f\x8b broken"])
def test_what_is_no_tar(tmp_path, content):
    (tmp_path / "a.tar").write_bytes(content)
    with pytest.raises(NearfarError, match=r"a\.tar is (empty|damaged after 0 samples)"):
        read_items(tmp_path / "a.tar")
    (tmp_path / "b.tgz").write_bytes(b"\x1f\x8b broken")
    with pytest.raises(NearfarError, match="damaged after 0 samples"):
        read_items(tmp_path / "b.tgz")


def test_shards_without_samples(tmp_path):
    with pytest.raises(NearfarError, match="holds no sample"):
        read_items(shard(tmp_path / "a.tar", {}))


def test_text_and_json_that_cannot_be_read_cost_their_sample(tmp_path):
    members = {f"{i}.txt": "a" for i in range(5)} | {"5.txt": b"\xff\xfe\xfa"} | {"6.json": "{"}
    items = read_items(shard(tmp_path / "a.tar", members), ["text"])
    assert items.ids == ["0", "1", "2", "3", "4", "6"]
    assert items.rejections.counts == {"text that is not UTF-8": 1}
    file = shard(tmp_path / "b.tar", {"0.json": '{"t": "a"}', "1.json": "{"})
    items = shard_items([file], "b", Wanted(["t"]))
    assert items["t"] == ["a"]
    assert items.rejections.counts == {"no JSON": 1}


@pytest.mark.slow
def test_json_whose_keys_are_no_columns(tmp_path):
    file = shard(tmp_path / "a.tar", {f"{i}.json": json.dumps({f"k{i}": 1}) for i in range(1001)})
    with pytest.raises(NearfarError, match=r"has 1,001 keys.*name those that are wanted"):
        read_items(file)
    assert read_items(file, ["k7"]).present("k7").sum() == 1


def test_a_file_that_is_too_large(tmp_path, monkeypatch):
    monkeypatch.setattr("nearfar.data.shards._MOST_BYTES", 10)
    with pytest.raises(NearfarError, match=r"x\.txt has 11 bytes"):
        read_items(shard(tmp_path / "a.tar", {"x.txt": "a" * 11}))
