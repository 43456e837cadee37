"""Strangers' caption tables, images and archives: one line or a reason, nothing outside, bounded memory."""

import io
import json
import os
import resource
import struct
import tempfile
import warnings
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers.image_folders import write_image
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from ghibli.data.folder import enter_and_list, read_beside, read_folder
from ghibli.images.read import Unusable, check_image, read_image, without_warnings
from ghibli.prepare import download
from ghibli.runtime.errors import UserError

SOME = settings(
    max_examples=300,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
MANY = settings(SOME, max_examples=10_000)
MEMORY = 2**30  # bytes that decoding may add to the process


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    """A set of two images in a folder with a neighbour, `outside`, that is never touched."""
    with tempfile.TemporaryDirectory() as place:
        write_image(Path(place) / "set" / "images" / "a.png")
        write_image(Path(place) / "set" / "images" / "b.png")
        (Path(place) / "outside.txt").write_text("SECRET")
        yield Path(place) / "set"


# Caption tables

PIECES = st.sampled_from(
    [b"file_name,text\n", b"a.png", b"images/a.png", b"../outside.png", b"/etc/passwd", b",", b";", b"\t",
     b"|", b'"', b"\n", b"\r\n", b"\r", b"\xef\xbb\xbf", b"\xff", b"\0", b"{", b"}", b"[" * 50,
     b'{"file_name": "', b'", "text": "', b'"}\n', b"\\ud800", b"\xe2\x80\xa8", b"caption", b"1e999",
     b"NaN", b"null"]
)  # fmt: skip
CONTENT = st.one_of(
    st.lists(PIECES | st.binary(max_size=6), max_size=30).map(b"".join),
    st.lists(PIECES, max_size=30).map(lambda parts: b"file_name,text\n" + b"".join(parts)),
)
TABLES = st.sampled_from(["captions.txt", "metadata.jsonl", "metadata.csv"])


def table_of_anything(folder: Path, table: str, content: bytes) -> None:
    (folder / table).write_bytes(content)
    said = str(folder)
    try:
        listed = enter_and_list(folder)[1]
        assert {"a.png", "b.png"} <= {image.name for image in listed}
        for image in listed:
            assert image.caption is None or image.caption == " ".join(image.caption.split())
            os.fsencode(image.path)
        found = read_folder(folder, style="", default_caption="x", min_side=8)
        assert {image.path.name for image in found.images} <= {"a.png", "b.png"}
        json.dumps(found.unusable)
    except UserError as error:
        said = str(error)
    (folder / table).unlink()
    assert str(folder) in said


@SOME
@given(table=TABLES, content=CONTENT)
def test_a_table_of_anything_is_read_or_refused(folder: Path, table: str, content: bytes) -> None:
    table_of_anything(folder, table, content)


@pytest.mark.fuzz
@MANY
@given(table=TABLES, content=CONTENT)
def test_ten_thousand_tables(folder: Path, table: str, content: bytes) -> None:
    table_of_anything(folder, table, content)


@given(content=st.binary(max_size=50) | st.text(max_size=50).map(lambda text: text.encode(errors="replace")))
@SOME
def test_a_text_beside_an_image_is_a_caption_or_refused(folder: Path, content: bytes) -> None:
    beside = folder / "images" / "a.txt"
    beside.write_bytes(content)
    try:
        found = read_beside(folder / "images" / "a.png")
    except Unusable:
        found = None
    beside.unlink()
    try:
        expected = " ".join(content.removeprefix(b"\xef\xbb\xbf").decode().split())
    except UnicodeDecodeError:
        expected = None
    assert found == expected


# Images


def seeds() -> list[bytes]:
    """Small good images of the commonest formats, some with EXIF and profile."""
    exif = Image.Exif()
    exif[0x0112] = 6
    image = Image.effect_noise((24, 16), 90)
    found = []
    for name, mode, options in (
        ("PNG", "RGB", {"exif": exif}), ("PNG", "P", {}), ("PNG", "RGBA", {}), ("PNG", "I;16", {}),
        ("PNG", "1", {}),
        ("JPEG", "RGB", {"exif": exif}), ("JPEG", "L", {"progressive": True}), ("JPEG", "CMYK", {}),
        ("WEBP", "RGB", {}), ("GIF", "P", {}), ("TIFF", "RGB", {}), ("BMP", "RGB", {}), ("TGA", "RGB", {}),
        ("PPM", "RGB", {}), ("JPEG2000", "RGB", {}), ("QOI", "RGB", {}),
    ):  # fmt: skip
        content = io.BytesIO()
        image.convert(mode).save(content, name, **options)
        found.append(content.getvalue())
    return found


SEEDS = seeds()


def with_checksums(content: bytes) -> bytes:
    """Put the checksums of a PNG right, so that a changed chunk reaches its decoder."""
    if not content.startswith(b"\x89PNG\r\n\x1a\n"):
        return content
    out, at = content[:8], 8
    while at + 12 <= len(content):
        length = int.from_bytes(content[at : at + 4], "big")
        body = content[at + 4 : at + 8 + length]
        out += content[at : at + 4] + body + struct.pack(">I", zlib.crc32(body))
        at += 12 + length
    return out + content[at:]


@st.composite
def images(draw: st.DrawFn) -> bytes:
    """A good image with some bytes changed, cut off or inserted; or any bytes behind a magic number."""
    content = bytearray(draw(st.sampled_from(SEEDS)))
    for _ in range(draw(st.integers(1, 6))):
        at = draw(st.integers(0, len(content) - 1)) if content else 0
        kind = draw(st.sampled_from(["set", "set", "cut", "insert", "big"]))
        if kind == "set" and content:
            content[at] = draw(st.integers(0, 255))
        elif kind == "cut":
            del content[at : at + draw(st.integers(1, 40))]
        elif kind == "big":
            content[at : at + 4] = b"\x00\x01\xff\xff"
        else:
            content[at:at] = draw(st.binary(max_size=20))
    return with_checksums(bytes(content)) if draw(st.booleans()) else bytes(content)


def peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def decode_anything(place: Path, content: bytes) -> None:
    before, file = peak(), place / "fuzzed.jpg"
    file.write_bytes(content)
    why = "it is readable"
    try:
        with without_warnings():
            image, size = check_image(file, 8)
        assert image.mode == "RGB" and min(size) >= 8
        assert read_image(file)[0].size == size
    except Unusable as reason:
        why = str(reason)
    assert why
    assert peak() - before < MEMORY
    assert {path.name for path in place.iterdir()} == {"fuzzed.jpg"}


@pytest.fixture(scope="module")
def place() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)


@SOME
@given(content=images())
def test_any_image_file_is_decoded_or_refused(place: Path, content: bytes) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        decode_anything(place, content)


@pytest.mark.fuzz
@MANY
@given(content=images())
def test_ten_thousand_image_files(place: Path, content: bytes) -> None:
    decode_anything(place, content)


def test_a_small_file_that_unpacks_to_gigapixels_is_refused(place: Path) -> None:
    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    chunk = (
        struct.pack(">I", 13)
        + b"IHDR"
        + header
        + bytes(4)
        + bytes(4)
        + b"IDAT"
        + bytes(4)
        + bytes(4)
        + b"IEND"
    )
    before = peak()
    (place / "fuzzed.jpg").write_bytes(with_checksums(b"\x89PNG\r\n\x1a\n" + chunk + bytes(4)))
    with pytest.raises(Unusable, match="megapixels"):
        read_image(place / "fuzzed.jpg")
    assert peak() - before < 2**26


# Archives


def no_progress(done: int, total: int) -> None:
    """Ignore progress."""


def fetched(file: Path, into: Path) -> str:
    """Unpack an archive that is refused; return the message. Nothing may be left of it."""
    with pytest.raises(UserError) as error:
        download.fetch(str(file), into, no_progress)
    assert not into.exists() or not [*into.iterdir()]
    return str(error.value)


def test_a_zip_that_grows_beyond_all_measure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for number in range(5):
            archive.writestr(f"{number}.bmp", bytes(2**20))
    monkeypatch.setattr(download, "LEAST_TOTAL", 2**22)
    monkeypatch.setattr(download, "MOST_GROWTH", 3)
    said = fetched(tmp_path / "a.zip", tmp_path / "data")
    assert "a.zip grows to more than 4 MiB, the larger of 4 MiB and 3 times its own size" in said
    monkeypatch.setattr(download, "LARGEST_FILE", 2**19)
    assert "a file in it has 1 MiB" in fetched(tmp_path / "a.zip", tmp_path / "data")


def parquet_of(file: Path, rows: list[dict[str, object]], **options: object) -> Path:
    pyarrow = pytest.importorskip("pyarrow", reason="extra of this project")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.Table.from_pylist(rows), file, **options)
    return file


def test_a_parquet_file_that_grows_beyond_all_measure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One image in a dictionary, and thousands of rows that name it."""
    content = SEEDS[0] + bytes(2**16)
    rows = [{"image": {"bytes": content, "path": None}, "text": "x"} for _ in range(400)]
    file = parquet_of(tmp_path / "a.parquet", rows, compression="zstd")
    assert file.stat().st_size < 2**16
    monkeypatch.setattr(download, "LEAST_TOTAL", 2**22)
    assert "grows to more than" in fetched(file, tmp_path / "data")


def test_captions_in_parquet_that_grow_beyond_all_measure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One caption of 64 KiB in a dictionary, and hundreds of rows that name it."""
    rows = [{"image": {"bytes": SEEDS[0], "path": None}, "text": "x" * 2**16} for _ in range(400)]
    file = parquet_of(tmp_path / "a.parquet", rows, compression="zstd")
    assert file.stat().st_size < 2**16
    monkeypatch.setattr(download, "LEAST_TOTAL", 2**22)
    assert "grows to more than" in fetched(file, tmp_path / "data")


def test_a_parquet_file_in_a_zip_grows_by_the_zips_measure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each of the two may grow a hundredfold, both together too and no more."""
    content = SEEDS[0] + bytes(2**16)
    rows = [{"image": {"bytes": content, "path": None}, "text": "x"} for _ in range(400)]
    shard = parquet_of(tmp_path / "a.parquet", rows, compression="none", use_dictionary=True)
    packed = tmp_path / "b.zip"
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.write(shard, "a.parquet")
    grown = len(content) * len(rows)
    monkeypatch.setattr(download, "LEAST_TOTAL", 0)
    monkeypatch.setattr(download, "MOST_GROWTH", grown // shard.stat().st_size + 1)
    assert packed.stat().st_size * download.MOST_GROWTH < grown
    (tmp_path / "data").mkdir()
    with pytest.raises(UserError, match="b.zip grows to more than"):
        download.fetch(str(packed), tmp_path / "data", no_progress)
    assert [path.name[:2] for path in (tmp_path / "data").iterdir()] == ["b-"]
    monkeypatch.setattr(download, "LEAST_TOTAL", 2**28)
    assert download.fetch(str(packed), tmp_path / "data", no_progress).is_dir()


def test_rows_and_files_of_nothing_count_as_well(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A parquet file of 1 kB can hold millions of rows without an image; each would be a file."""
    rows = [{"image": {"bytes": SEEDS[0], "path": None}, "text": "x"}]
    rows += [{"image": {"bytes": None, "path": None}, "text": None}] * 2000
    file = parquet_of(tmp_path / "a.parquet", rows, compression="zstd")
    assert file.stat().st_size < 2**13
    monkeypatch.setattr(download, "LEAST_TOTAL", 2**22)
    assert "grows to more than 4 MiB" in fetched(file, tmp_path / "data")
    with zipfile.ZipFile(tmp_path / "b.zip", "w") as archive:
        for number in range(20):
            archive.writestr(f"{'a/' * 100}{number}.png", b"")
    monkeypatch.setattr(download, "MOST_GROWTH", 10)
    assert (tmp_path / "b.zip").stat().st_size < 2**14
    assert "grows to more than 4 MiB" in fetched(tmp_path / "b.zip", tmp_path / "data")


def test_captions_in_parquet_that_are_not_text(tmp_path: Path) -> None:
    rows = [{"image": {"bytes": SEEDS[0], "path": None}, "text": {"a": 1}}]
    file = parquet_of(tmp_path / "a.parquet", rows)
    assert "row 1: its caption is not text" in fetched(file, tmp_path / "data")


def damaged_archives() -> Iterator[tuple[str, bytes]]:
    """Zips that made zipfile raise one type or another."""
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", zipfile.ZIP_LZMA) as archive:
        archive.writestr("images/a.png", SEEDS[0] * 20)
    good = content.getvalue()
    yield "lzma", good[:60] + b"\xff" * 20 + good[80:]
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        archive.writestr("a.png", SEEDS[0])
        archive.writestr("a.png/b.png", SEEDS[0])
    yield "file and folder", content.getvalue()
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        archive.writestr("n" * 300 + ".png", SEEDS[0])
    yield "long name", content.getvalue()
    yield "offsets", good[:-6] + b"\xff\xff\xff\x7f" + good[-2:]


@pytest.mark.parametrize(("kind", "content"), [*damaged_archives()])
def test_an_odd_zip_is_one_line(tmp_path: Path, kind: str, content: bytes) -> None:
    (tmp_path / "a.zip").write_bytes(content)
    assert "a.zip is not a complete zip file" in fetched(tmp_path / "a.zip", tmp_path / "data")


@SOME
@given(data=st.data())
def test_any_zip_is_unpacked_or_refused(data: st.DataObject) -> None:
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", data.draw(st.sampled_from([0, 8, 12, 14]))) as archive:
        for name in ("images/a.png", "images/b.png", "captions.txt", "../c.png"):
            archive.writestr(name, SEEDS[0])
    changed = bytearray(content.getvalue())
    for _ in range(data.draw(st.integers(1, 5))):
        changed[data.draw(st.integers(0, len(changed) - 1))] = data.draw(st.integers(0, 255))
    with tempfile.TemporaryDirectory() as name:
        (Path(name) / "a.zip").write_bytes(changed)
        said = "a.zip"
        try:
            download.fetch(str(Path(name) / "a.zip"), Path(name) / "data", no_progress)
        except UserError as error:
            said = str(error)
        assert "a.zip" in said
        assert {path.name for path in Path(name).iterdir()} <= {"a.zip", "data"}


def test_what_a_zip_holds_beside_images_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        for name in ("a.png", "b.mp4", "c.MP4", "d.jxl", "../e.png", ".hidden", "f.txt"):
            archive.writestr(name, SEEDS[0])
    said: list[str] = []
    monkeypatch.setattr(download.logger, "warning", said.append)
    root = download.fetch(str(tmp_path / "a.zip"), tmp_path / "data", no_progress)
    assert said == [
        f"--data {tmp_path / 'a.zip'}; not unpacked: 1 .jxl, 2 .mp4, 1 whose names lead out of it"
    ]
    assert sorted(path.name for path in root.iterdir()) == ["a.png", "f.txt"]
