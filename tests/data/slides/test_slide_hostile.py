"""Shards from somebody else: damaged or forged files are named, in bounded time and memory, and lead nowhere outside.

Forged means that the hashes of the index fit: whoever changes a shard can change them too.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import signal
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from nearfar.data.mapped import mapped_arrays
from nearfar.data.slides.image import decode_jpeg, encode_jpeg
from nearfar.data.slides.shard_dataset import read_shards
from nearfar.data.slides.shard_index import ArrayReader, npy, read_index, read_splits, samples
from nearfar.data.slides.shards import ShardOptions, write_shards
from nearfar.errors import NearfarError
from tissue_files import picture, write_st

pytestmark = pytest.mark.slow  # real runs


@pytest.fixture(autouse=True)
def bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A cache of its own, and an end to a test that would hang."""
    monkeypatch.setenv("NEARFAR_CACHE", str(tmp_path / "cache"))

    def stop(*_: object) -> None:
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("written")
    write_st(folder / "in", {"A": 1})
    write_shards(folder / "in", folder / "s", ShardOptions(patch=32, pixels=16, genes=6, neighbors=3))
    return folder / "s"


@pytest.fixture
def shards(written: Path, tmp_path: Path) -> Path:
    shutil.copytree(written, tmp_path / "s")
    return tmp_path / "s"


def forge(shards: Path, name: str = "A-0000.tar", change: Callable[[bytes], bytes] | None = None) -> None:
    """Change a file and let the index state its new size and hash."""
    data = (shards / name).read_bytes() if change is None else change((shards / name).read_bytes())
    (shards / name).write_bytes(data)
    index = json.loads((shards / "index.json").read_text())
    for slide in index["slides"]:
        for file in [*slide["shards"], slide["table"]]:
            if file["name"] == name:
                file["bytes"], file["sha256"] = len(data), hashlib.sha256(data).hexdigest()
    (shards / "index.json").write_text(json.dumps(index))


def members(
    change: Callable[[tarfile.TarInfo, bytes], list[tuple[tarfile.TarInfo, bytes]]],
) -> Callable[[bytes], bytes]:
    """The archive with each member replaced by what ``change`` makes of it."""

    def changed(data: bytes) -> bytes:
        buffer = io.BytesIO()
        with tarfile.open(fileobj=io.BytesIO(data)) as old, tarfile.open(fileobj=buffer, mode="w") as new:
            for member in old.getmembers():
                content = old.extractfile(member).read()  # type: ignore[union-attr]
                for info, part in change(member, content):
                    new.addfile(info, io.BytesIO(part))
        return buffer.getvalue()

    return changed


def renamed(name: str) -> Callable[[bytes], bytes]:
    def change(member: tarfile.TarInfo, content: bytes) -> list[tuple[tarfile.TarInfo, bytes]]:
        if member.name == "A-000003.jpg":
            member.name = name
        return [(member, content)]

    return members(change)


def of_type(kind: bytes, link: str = "") -> Callable[[bytes], bytes]:
    def change(member: tarfile.TarInfo, content: bytes) -> list[tuple[tarfile.TarInfo, bytes]]:
        if member.name == "A-000003.jpg":
            member.type, member.linkname, member.size = kind, link, 0
            return [(member, b"")]
        return [(member, content)]

    return members(change)


def replaced(ending: str, content: bytes) -> Callable[[bytes], bytes]:
    def change(member: tarfile.TarInfo, old: bytes) -> list[tuple[tarfile.TarInfo, bytes]]:
        if member.name == f"A-000003.{ending}":
            member.size = len(content)
            return [(member, content)]
        return [(member, old)]

    return members(change)


def sized(field: bytes) -> Callable[[bytes], bytes]:
    """The field of a member's size, byte for byte."""

    def change(data: bytes) -> bytes:
        at = data.index(b"A-000003.npy")
        return data[: at + 124] + field.ljust(12, b"\0") + data[at + 136 :]

    return change


def twice(member: tarfile.TarInfo, content: bytes) -> list[tuple[tarfile.TarInfo, bytes]]:
    return [(member, content)] * (2 if member.name == "A-000003.npy" else 1)


def bomb(side: int) -> bytes:
    """A jpg of a few kilobytes whose head claims a square of ``side``."""
    data = bytearray(encode_jpeg(np.zeros((16, 16, 3), np.uint8), 90))
    at = data.index(b"\xff\xc0") + 5
    data[at : at + 4] = side.to_bytes(2, "big") * 2
    return bytes(data)


def pickled() -> bytes:
    """An .npy of objects, whose pickle would make a file."""

    class Evil:
        def __reduce__(self) -> Any:
            return os.mkdir, ("made-by-a-pickle",)

    buffer = io.BytesIO()
    np.save(buffer, np.array([Evil()] * 6, object), allow_pickle=True)
    return buffer.getvalue()


@pytest.mark.parametrize(("change", "message"), [
    (renamed("../../evil.jpg"), "not called SAMPLE.ENDING"),
    (renamed("/etc/evil.jpg"), "not called SAMPLE.ENDING"),
    (renamed("sub/A-000003.jpg"), "not called SAMPLE.ENDING"),
    (renamed(".."), "not called SAMPLE.ENDING"),
    (renamed("A-000003.npy"), "A-000003.npy twice"),
    (renamed("A-000000.jpg"), "A-000000.jpg twice"),
    (renamed("d" * 60 + "/" + "x" * 90 + ".jpg"), "at byte"),
    (members(twice), "A-000003.npy twice"),
    (of_type(tarfile.SYMTYPE, "/etc/passwd"), "no plain member"),
    (of_type(tarfile.LNKTYPE, "A-000000.jpg"), "no plain member"),
    (of_type(tarfile.CHRTYPE), "no plain member"),
    (of_type(tarfile.FIFOTYPE), "no plain member"),
    (of_type(tarfile.DIRTYPE), "no plain member"),
    (of_type(tarfile.GNUTYPE_SPARSE), "no plain member"),
    (sized(b"-0000001000"), "states a size of '-0000001000'"),
    (sized(b"-1"), "states a size of '-1'"),
    (sized(b"\xff" * 12), "states a size"),
    (sized(b"\x80" + b"\0" * 10 + b"\x09"), "states a size"),
    (sized(b"0x10"), "states a size"),
    (sized(b"1_0"), "states a size"),
    (sized(b""), "states a size"),
    (sized(b"77777777777"), "cut off in A-000003.npy"),
    (lambda data: data[: len(data) // 2 // 512 * 512 + 700], "cut off|samples of 16"),
    (lambda data: b"\0" * len(data), "holds 0 samples and not 20"),
    (lambda data: b"<html>" * (len(data) // 6), "no plain member"),
    (replaced("npy", pickled()), "sample A-000003 cannot be read"),
    (replaced("npy", npy(np.zeros(1, np.float32))), r"an array \(1,\) where \(6,\) is needed"),
    (replaced("npy", npy(np.full(6, np.nan, np.float32))), "what is no number"),
    (replaced("npy", npy(np.array(["a"] * 6))), "numbers are needed"),
    (replaced("npy", npy(np.zeros(6, np.float32))[:-8]), "sample A-000003 cannot be read"),
    (replaced("npy", b"\x93NUMPY\x01\x00\x10\x00" + b"(" * 16), "sample A-000003 cannot be read"),
    (replaced("npy", b""), "sample A-000003 cannot be read"),
    (replaced("jpg", b""), "sample A-000003 cannot be read"),
    (replaced("jpg", b"<html>no</html>"), "sample A-000003 cannot be read"),
    (replaced("jpg", bomb(65_500)), "a patch of 65500 × 65500 pixels"),
    (replaced("jpg", encode_jpeg(np.zeros((32, 32, 3), np.uint8), 90)), "a patch of 32 × 32 pixels"),
])  # fmt: skip
def test_forged_archives_are_named(shards: Path, change: Callable[[bytes], bytes], message: str) -> None:
    forge(shards, change=change)
    before = set(Path.cwd().iterdir())
    with pytest.raises(NearfarError, match=message) as caught:
        read_shards(shards)
    assert "A-0000.tar" in str(caught.value)
    assert set(Path.cwd().iterdir()) == before
    assert not list((shards.parent / "cache").rglob(".writing-*"))


def test_a_picture_of_a_format_that_calls_programs_is_no_patch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "simplejpeg", None)
    buffer = io.BytesIO()
    Image.fromarray(picture(1, 16, 16)).save(buffer, "eps")
    with pytest.raises((ValueError, OSError)):
        decode_jpeg(buffer.getvalue(), np.empty((16, 16, 3), np.uint8))
    with pytest.raises(ValueError, match="decompression bomb"):
        decode_jpeg(bomb(65_500))
    monkeypatch.undo()
    with pytest.raises(ValueError, match="65500 × 65500"):
        decode_jpeg(bomb(65_500))


@pytest.mark.parametrize(("change", "message"), [
    (lambda i: i["slides"][0]["shards"][0].update(name="../outside.tar"), "no name of a file of the folder"),
    (lambda i: i["slides"][0]["shards"][0].update(name="/etc/passwd"), "no name of a file of the folder"),
    (lambda i: i["slides"][0]["table"].update(name="slides/../../x.npz"), "no name of a file of the folder"),
    (lambda i: i["slides"][0]["shards"][0].update(name=7), "without name"),
    (lambda i: i["slides"][0]["shards"][0].update(samples=-20), "0 or more"),
    (lambda i: i["slides"][0]["shards"][0].update(bytes=True), "0 or more"),
    (lambda i: i["slides"][0].update(spots=10**12), "as many samples as spots"),
    (lambda i: i["slides"][0].update(name=["A"]), "text is needed"),
    (lambda i: i.update(slides=i["slides"] * 2), "stands twice"),
    (lambda i: i.update(slides={"a": 1}), "is damaged"),
    (lambda i: i.update(slides=[3]), "is damaged"),
    (lambda i: i.update(genes="G00"), "no list of names"),
    (lambda i: i.update(genes=["G00"] * 6), "stands twice"),
    (lambda i: i.update(genes=[{}] * 6), "no list of names"),
    (lambda i: i["patch"].update(pixels=-16), "side of -16"),
    (lambda i: i["patch"].update(pixels=10**9), "side of 1000000000"),
    (lambda i: i["patch"].update(pixels=16_000), "cannot have"),
    (lambda i: i["patch"].update(pixels="16"), "side of '16'"),
    (lambda i: i.update(patch=[]), "is damaged"),
    (lambda i: i["neighbors"].update(k=10**9), "neighbours"),
    (lambda i: i["neighbors"].update(k=2), "neighbors is int64"),
    (lambda i: i["expression"].update(values="pickle"), "values are 'pickle'"),
    (lambda i: i["expression"].update(target_sum=float("nan")), "target_sum is nan"),
])  # fmt: skip
def test_forged_indices_are_named(
    shards: Path, change: Callable[[dict[str, Any]], Any], message: str
) -> None:
    index = json.loads((shards / "index.json").read_text())
    change(index)
    (shards / "index.json").write_text(json.dumps(index))
    with pytest.raises(NearfarError, match=message):
        read_shards(shards)


@pytest.mark.parametrize("content", [b"[" * 200_000, b"\xff\xfe", b"null", b"[]", b'"x"', b"", b"{}"])
def test_an_index_that_is_no_index_is_named(shards: Path, content: bytes) -> None:
    (shards / "index.json").write_bytes(content)
    with pytest.raises(NearfarError, match=r"index\.json"):
        read_index(shards)
    # What the writer finds half written or spoiled in such a way it writes again.
    (shards / "slides" / "A.json").write_bytes(content)
    (shards / "slides" / "A.genes.npz").write_bytes(content)
    again = write_shards(
        write_st(shards.parent / "in", {"A": 1}),
        shards,
        ShardOptions(patch=32, pixels=16, genes=6, neighbors=3),
    )
    assert again.written == ["A"]
    assert len(read_shards(shards)) == 20


def test_a_name_too_long_for_a_tar_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(NearfarError, match="a name of 90 letters, and 80 fit into a tar file"):
        write_shards(write_st(tmp_path / "in", {"a" * 90: 1}), tmp_path / "out", ShardOptions(patch=32))


def test_links_out_of_the_folder_are_not_followed(shards: Path, tmp_path: Path) -> None:
    (shards / "A-0000.tar").rename(tmp_path / "outside.tar")
    (shards / "A-0000.tar").symlink_to(tmp_path / "outside.tar")
    with pytest.raises(NearfarError, match=r"A-0000\.tar is a link out of the folder"):
        read_shards(shards)
    (shards / "A-0000.tar").unlink()
    (tmp_path / "outside.tar").rename(shards / "data")
    (shards / "A-0000.tar").symlink_to("data")  # within it
    assert len(read_shards(shards)) == 20
    (shards / "slides").rename(tmp_path / "slides")
    (shards / "slides").symlink_to(tmp_path / "slides")
    with pytest.raises(NearfarError, match="is a link out of the folder"):
        read_shards(shards)
    with pytest.raises(NearfarError, match="slides is a link out of the folder"):
        write_shards(write_st(tmp_path / "in", {"A": 1}), shards, ShardOptions(patch=32, pixels=16, genes=6))
    (shards / "slides").unlink()
    (tmp_path / "slides").rename(shards / "slides")
    (shards / "train_samples.txt").unlink()
    (shards / "train_samples.txt").symlink_to("/etc/hostname")
    with pytest.raises(NearfarError, match=r"train_samples\.txt is a link out of the folder"):
        read_splits(shards)
    (shards / "train_samples.txt").unlink()
    os.mkfifo(shards / "train_samples.txt")
    with pytest.raises(NearfarError, match=r"train_samples\.txt is no file"):
        read_splits(shards)


def table_with(**changed: Any) -> Callable[[bytes], bytes]:
    def change(data: bytes) -> bytes:
        with np.load(io.BytesIO(data)) as arrays:
            arrays = {name: arrays[name] for name in arrays.files}
        for name, value in changed.items():
            arrays[name] = value(arrays[name])
        stream = io.BytesIO()
        np.savez(stream, **arrays)
        return stream.getvalue()

    return change


def packed_bomb(data: bytes) -> bytes:
    stream = io.BytesIO()
    np.savez_compressed(stream, ids=np.zeros(10**8, np.uint8))
    return stream.getvalue()


@pytest.mark.parametrize(("change", "message"), [
    (table_with(neighbors=lambda a: a + 10**6), "no spot of the slide"),
    (table_with(neighbors=lambda a: a - 5), "no spot of the slide"),
    (table_with(neighbors=lambda a: a[:, :1]), "is needed"),
    (table_with(positions=lambda a: a * np.nan), "no number"),
    (table_with(ids=lambda a: a[:-1]), "is needed"),
    (table_with(ids=lambda a: a.astype(object)), "cannot be read"),
    (table_with(totals=lambda a: a.astype(str)), "is needed"),
    (packed_bomb, "larger than the file"),
    (lambda data: data[:-50], "cannot be read"),
    (lambda data: b"PK\3\4" + data[:20], "cannot be read"),
    (lambda data: b"", "cannot be read"),
])  # fmt: skip
def test_forged_tables_of_spots_are_named(
    shards: Path, change: Callable[[bytes], bytes], message: str
) -> None:
    forge(shards, "slides/A.spots.npz", change)
    with pytest.raises(NearfarError, match=message) as caught:
        read_shards(shards)
    assert "A.spots.npz" in str(caught.value)


def test_random_bytes_never_get_through(written: Path) -> None:
    """500 archives with bytes changed, heads above all: samples as they were, or a message; never anything else."""
    rng = np.random.default_rng(0)
    data = (written / "A-0000.tar").read_bytes()
    for _ in range(500):
        changed = bytearray(data)
        for _ in range(int(rng.integers(1, 6))):
            at = int(
                rng.integers(len(data))
                if rng.random() < 0.3
                else 512 * rng.integers(len(data) // 512) + rng.integers(160)
            )
            changed[at] = int(rng.integers(256))
        read = ArrayReader((6,))
        try:
            for _, parts in samples(memoryview(changed), "x.tar"):
                read(parts["npy"])
                decode_jpeg(parts["jpg"], np.empty((16, 16, 3), np.uint8))
        except (NearfarError, ValueError, KeyError, OSError, TypeError, IndexError):
            pass  # `read_shards` turns these into messages that name the file


@pytest.mark.parametrize("damage", ["file", "link", "pipe", "claim", "objects", "text", "folder"])
def test_damaged_entries_of_the_cache_are_made_anew(tmp_path: Path, damage: str) -> None:
    def fill(arrays: dict[str, np.ndarray]) -> None:
        arrays["x"][:] = [1, 2]

    layout = {"x": ((2,), np.int16)}
    mapped_arrays("t", "k", layout, fill)
    (file,) = (tmp_path / "cache" / "t").rglob("x.npy")
    place = file.parent
    secret = tmp_path / "secret.npy"
    np.save(secret, np.array([7, 7], np.int16))
    if damage == "file":
        shutil.rmtree(place)
        place.write_text("x")
    elif damage == "folder":
        file.unlink()
        file.mkdir()
    elif damage == "link":
        file.unlink()
        file.symlink_to(secret)
    elif damage == "pipe":
        file.unlink()
        os.mkfifo(file)
    elif damage == "claim":
        with open(file, "wb") as stream:
            np.lib.format.write_array_header_1_0(
                stream, {"descr": "<i2", "fortran_order": False, "shape": (10**15,)}
            )
    elif damage == "objects":
        file.write_bytes(pickled())
    else:
        file.write_bytes(b"\x93NUMPY\x01\x00\x06\x00((((((")
    with pytest.warns(UserWarning, match="made anew"):
        arrays = mapped_arrays("t", "k", layout, fill)
    assert arrays["x"].tolist() == [1, 2]
    assert mapped_arrays("t", "k", layout, fill)["x"].tolist() == [1, 2]
    assert np.load(secret).tolist() == [7, 7]


def test_arrays_that_fit_nowhere_are_a_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("NEARFAR_CACHE", str(tmp_path / "file"))
    with (
        pytest.warns(UserWarning, match="held in memory"),
        pytest.raises(NearfarError, match=r"GB are needed.*NEARFAR_CACHE"),
    ):
        mapped_arrays("t", "k", {"x": ((2**62,), np.uint8)}, lambda _: None)
