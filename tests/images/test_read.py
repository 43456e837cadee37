"""Image files of every format and profile: what is read of them, against Pillow, lcms and colour formulas."""

import ast
import io
import os
import re
import stat
import struct
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from helpers.image_folders import RED, read, write_image
from PIL import Image, ImageCms, features

from ghibli.images import read as reading
from ghibli.images.jpeg import has_more_scans
from ghibli.images.read import Unusable, check_image, decode, image_endings, open_file, open_image, read_image
from ghibli.inference.photos import find_photos
from ghibli.prepare.download import write_image_bytes
from ghibli.runtime.errors import UserError

ROOT = Path(__file__).parents[2]


# Formats


def test_every_format_that_is_promised_is_read(tmp_path: Path) -> None:
    image = Image.new("RGB", (64, 48), RED)
    ways = {
        ".avif": "AVIF", ".jfif": "JPEG", ".jpe": "JPEG", ".apng": "PNG", ".jp2": "JPEG2000", ".ppm": "PPM",
        ".tga": "TGA", ".dib": "DIB", ".webp": "WEBP", ".heic": "HEIF",
    }  # fmt: skip
    if not features.check("avif"):
        del ways[".avif"]
    try:
        import pillow_heif

        pillow_heif.register_heif_opener()
    except ImportError:
        del ways[".heic"]
    for ending, name in ways.items():
        assert ending in image_endings()
        content = io.BytesIO()
        image.save(content, name)
        (tmp_path / f"a{ending}").write_bytes(content.getvalue())
        opened = open_image(tmp_path / f"a{ending}")
        assert opened.mode == "RGB" and opened.size == (64, 48)
        difference = np.abs(np.asarray(opened, dtype=int) - RED)
        assert difference.max() <= 8, ending
    assert len(read(tmp_path, caption="x").images) == len(ways)


@pytest.fixture
def ghostscript(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A `gs` in front of PATH that leaves a mark when it is started; returns the mark."""
    mark, program = tmp_path / "started", tmp_path / "bin" / "gs"
    program.parent.mkdir()
    program.write_text(f"#!/bin/sh\necho 10.0\ntouch {mark}\n")
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{program.parent}{os.pathsep}{os.environ['PATH']}")
    return mark


POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 64\n%%EndComments\nshowpage\n%%EOF\n"


def test_a_png_that_is_postscript_starts_nothing(tmp_path: Path, ghostscript: Path) -> None:
    file = tmp_path / "a.png"
    file.write_bytes(POSTSCRIPT)
    with pytest.raises(Unusable, match="it is not an image, despite its name"):
        read_image(file)
    assert not ghostscript.exists()
    with Image.open(file) as opened, suppress(OSError):  # the trap works
        opened.load()
    assert ghostscript.exists()


def test_no_other_module_opens_image_files() -> None:
    """`Image.open` without `formats` tries all that Pillow knows."""
    others = re.compile(r"^\s*(?:from|import) (?:cv2|imageio|skimage|torchvision\.io)\b|\bload_image\b", re.M)
    for path in [*(ROOT / "ghibli").rglob("*.py"), *ROOT.glob("*.py"), *(ROOT / "benchmarks").rglob("*.py")]:
        text, names = path.read_text(), {"PIL.Image"}  # what the module calls Pillow's
        assert not others.search(text), path
        nodes = list(ast.walk(ast.parse(text))) if "PIL" in text else []
        for node in nodes:
            if isinstance(node, ast.ImportFrom) and node.module in ("PIL", "PIL.Image"):
                names |= {name.asname or name.name for name in node.names}
        openers = {f"{name}.open" for name in names} | {"open"} & names
        for node in nodes:
            if isinstance(node, ast.Call) and ast.unparse(node.func) in openers:
                assert "formats" in [keyword.arg for keyword in node.keywords], path


@pytest.mark.parametrize("ending", [".png", ".jpg", ".tif", ".txt"])
def test_no_door_starts_it(tmp_path: Path, ghostscript: Path, ending: str) -> None:
    """PostScript alone or behind the header of a preview: as an image, as a row of parquet, as any file."""
    for before in (b"", b"\xc5\xd0\xd3\xc6" + (30).to_bytes(4, "little") + bytes([255, 0, 0, 0]) + bytes(18)):
        file = tmp_path / f"a{ending}"
        file.write_bytes(before + POSTSCRIPT)
        for door in (check_image, read_image, lambda path, _: open_image(path)):
            with pytest.raises((Unusable, UserError)):
                door(file, 8)
        with pytest.raises(OSError):
            open_file(file)
        assert write_image_bytes({"bytes": file.read_bytes()}, tmp_path, 1) == "000001.png"
    assert not ghostscript.exists()


def with_scans(count: int) -> bytes:
    """A progressive JPEG, its last scan `count` times more; a preview and a video with the same bytes."""
    content = io.BytesIO()
    exif = Image.Exif()
    exif[0x010E] = "\xff\xda" * 300
    Image.new("L", (640, 480), 128).save(content, "JPEG", progressive=True, exif=exif)
    whole, end = content.getvalue()[:-2], content.getvalue()[-2:]
    last = whole[whole.rindex(b"\xff\xda") :]
    return whole + last * count + end + b"\xff\xda\x00\x02" * 300


def test_a_jpeg_of_thousands_of_passes_is_refused(tmp_path: Path) -> None:
    """Each takes 100 bytes and goes through all pixels: at 64 megapixels 1 MB of them took four minutes."""
    (tmp_path / "usual.jpg").write_bytes(with_scans(100))
    assert read_image(tmp_path / "usual.jpg")[1] == (640, 480)
    (tmp_path / "many.jpg").write_bytes(with_scans(1000))
    with pytest.raises(Unusable, match="hundreds of passes"):
        read_image(tmp_path / "many.jpg")
    assert not has_more_scans(b"\xff\xd8" + b"\xff\xd8\xff\x01" * 1000 + b"\xff\xe0\x00\x00")


# Colour profiles


def primaries(red: tuple[float, float], green: tuple[float, float], blue: tuple[float, float]) -> np.ndarray:
    """The matrix from linear RGB of these chromaticities, white D65, to XYZ, in float64."""
    columns = np.array([[x / y, 1.0, (1 - x - y) / y] for x, y in (red, green, blue)]).T
    white = np.array([0.3127 / 0.3290, 1.0, (1 - 0.3127 - 0.3290) / 0.3290])
    return columns * np.linalg.solve(columns, white)


SRGB = primaries((0.64, 0.33), (0.30, 0.60), (0.15, 0.06))
ADOBE = primaries((0.64, 0.33), (0.21, 0.71), (0.15, 0.06))


def encoded(linear: np.ndarray) -> np.ndarray:
    """The sRGB curve: linear 0 .. 1 to levels 0 .. 255."""
    linear = linear.clip(0, 1)
    return 255 * np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)


def adobe_rgb() -> bytes:
    """An ICC profile of Adobe RGB (1998): a matrix, adapted to D50 by Bradford, and the gamma 563 / 256."""
    bradford = np.array([[0.8951, 0.2664, -0.1614], [-0.7502, 1.7135, 0.0367], [0.0389, -0.0685, 1.0296]])
    d65, d50 = SRGB.sum(axis=1), np.array([0.96422, 1.0, 0.82521])
    scale = np.diag((bradford @ d50) / (bradford @ d65))
    adapted = np.linalg.inv(bradford) @ scale @ bradford @ ADOBE
    return matrix_profile(adapted, 563 / 256)


def matrix_profile(matrix: np.ndarray, gamma: float) -> bytes:
    """Write a version 2 ICC profile of three primaries (columns of XYZ under D50) and one gamma."""

    def fixed(value: float) -> bytes:
        return round(value * 65536).to_bytes(4, "big", signed=True)

    def xyz(values: np.ndarray) -> bytes:
        return b"XYZ \0\0\0\0" + b"".join(fixed(value) for value in values)

    words = b"desc\0\0\0\0\0\0\0\x05test\0" + bytes(78)
    curve = b"curv\0\0\0\0\0\0\0\x01" + round(gamma * 256).to_bytes(2, "big") + b"\0\0"
    tags = {b"desc": words, b"cprt": b"text\0\0\0\0none\0", b"wtpt": xyz(np.array([0.9642, 1.0, 0.8249]))}
    tags |= {name: xyz(matrix[:, place]) for place, name in enumerate((b"rXYZ", b"gXYZ", b"bXYZ"))}
    tags |= {name: curve for name in (b"rTRC", b"gTRC", b"bTRC")}
    table, body, start = len(tags).to_bytes(4, "big"), b"", 128 + 4 + 12 * len(tags)
    for name, content in tags.items():
        table += name + (start + len(body)).to_bytes(4, "big") + len(content).to_bytes(4, "big")
        body += content + bytes(-len(content) % 4)
    white = fixed(0.9642) + fixed(1.0) + fixed(0.8249)
    head = (start + len(body)).to_bytes(4, "big") + b"none" + bytes([2, 32, 0, 0]) + b"mntrRGB XYZ "
    head += bytes(12) + b"acsp" + bytes(28) + white
    return head + bytes(128 - len(head)) + table + body


def srgb_of_adobe(colours: np.ndarray) -> np.ndarray:
    """The formula: levels (..., 3) in Adobe RGB to levels in sRGB, in float64."""
    linear = (colours.astype(np.float64) / 255) ** (563 / 256)
    return encoded(linear @ (np.linalg.inv(SRGB) @ ADOBE).T)


@pytest.fixture
def colours() -> np.ndarray:
    """512 colours: (1, 512, 3) uint8."""
    levels = np.linspace(20, 235, 8).round().astype(np.uint8)
    return np.stack(np.meshgrid(levels, levels, levels), axis=-1).reshape(1, -1, 3)


@pytest.mark.parametrize("ending", ["png", "tif", "webp"])
def test_adobe_rgb_becomes_srgb_by_the_formula(tmp_path: Path, colours: np.ndarray, ending: str) -> None:
    file = tmp_path / f"a.{ending}"
    Image.fromarray(colours).save(
        file, icc_profile=adobe_rgb(), **({"lossless": True} if ending == "webp" else {})
    )
    got = np.asarray(open_image(file), dtype=float)
    assert np.abs(got - srgb_of_adobe(colours)).max() <= 1.5
    assert np.abs(got - colours).max() > 18  # without the profile


def test_a_transparent_image_keeps_its_profile(tmp_path: Path, colours: np.ndarray) -> None:
    alpha = np.full((1, 512, 1), 128, dtype=np.uint8)
    Image.fromarray(np.concatenate([colours, alpha], axis=2)).save(
        tmp_path / "a.png", icc_profile=adobe_rgb()
    )
    half = np.asarray(open_image(tmp_path / "a.png"), dtype=float)
    opaque = srgb_of_adobe(colours)
    assert np.abs(half - (opaque * 128 + 255 * 127) / 255).max() <= 1.5
    assert np.abs(half - (colours.astype(float) * 128 + 255 * 127) / 255).max() > 9  # without the profile


def test_an_srgb_profile_changes_no_level(tmp_path: Path, colours: np.ndarray) -> None:
    """Most photos carry one; their latents stay what they were."""
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    Image.fromarray(colours).save(tmp_path / "a.png", icc_profile=profile)
    assert np.array_equal(np.asarray(open_image(tmp_path / "a.png")), colours)


@pytest.mark.parametrize("profile", [b"no profile", adobe_rgb()[:200], b"\0" * 128])
def test_a_damaged_profile_is_named_and_ignored(
    tmp_path: Path, colours: np.ndarray, profile: bytes, caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    said: list[str] = []
    monkeypatch.setattr(reading, "say_once", said.append)
    Image.fromarray(colours).save(tmp_path / "a.png", icc_profile=profile)
    assert np.array_equal(np.asarray(open_image(tmp_path / "a.png")), colours)
    assert said and "a.png: its colour profile cannot be used and is ignored" in said[0]


def test_a_profile_of_another_kind_is_named_and_ignored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr(reading, "say_once", said.append)
    Image.new("L", (64, 48), 100).save(tmp_path / "a.png", icc_profile=adobe_rgb())
    assert open_image(tmp_path / "a.png").getpixel((9, 9)) == (100, 100, 100)
    assert "it is for RGB images and this one is L" in said[0]


# What is not read is named


def test_other_files_are_counted_by_ending(tmp_path: Path) -> None:
    for name in ("a.png", "b.png", "sub/c.png", "sub/d.jpg", "old/e.png"):
        write_image(tmp_path / name)
    for name in ("a.mp4", "b.MP4", "c.cr3", "d", "notes.md", "a.txt", ".hidden.mp4", "e.jxl"):
        (tmp_path / name).write_text("x")
    folder = read(tmp_path, caption="x")
    assert folder.not_read == ("1 without an ending, 1 .cr3, 1 .jxl, 2 .mp4, 3 images in old/ (1), sub/ (2)")


def write_tiff(file: Path, directories: int) -> Path:
    """Write a TIFF of one red pixel, which so many directories name."""
    pixel, size = 8, 2 + 9 * 12 + 4
    entries = [(256, 3, 1), (257, 3, 1), (258, 3, 8), (259, 3, 1), (262, 3, 2), (273, 4, pixel), (277, 3, 3),
               (278, 3, 1), (279, 4, 3)]  # fmt: skip
    content = bytearray(struct.pack("<2sHI", b"II", 42, 12) + bytes([*RED, 0]))
    for number in range(directories):
        content += struct.pack("<H", len(entries))
        content += b"".join(struct.pack("<HHII", tag, kind, 1, value) for tag, kind, value in entries)
        content += struct.pack("<I", 12 + (number + 1) * size if number + 1 < directories else 0)
    file.write_bytes(content)
    return file


@pytest.mark.parametrize("directories", [1, 2, 3])
def test_a_tiff_gives_its_first_image(tmp_path: Path, directories: int) -> None:
    image, size = decode(write_tiff(tmp_path / "a.tif", directories))
    with Image.open(tmp_path / "a.tif") as theirs:
        assert theirs.n_frames == directories
        assert image.info["frames"] == min(theirs.n_frames, 2)
        assert size == theirs.size == (1, 1) and image.getpixel((0, 0)) == theirs.getpixel((0, 0)) == RED
    frames = [Image.new("L", (8 * n, 9), n) for n in range(1, 4)]
    frames[0].save(tmp_path / "b.tif", save_all=True, append_images=frames[1:], compression="tiff_lzw")
    image, size = decode(tmp_path / "b.tif")  # the others have another size
    assert size == image.size == (8, 9) and image.getpixel((0, 0)) == (1, 1, 1)


def test_a_tiff_of_many_images_is_read_at_once(tmp_path: Path) -> None:
    """Pillow looks up each directory among all before it."""
    file, start = write_tiff(tmp_path / "a.tif", 40_000), time.monotonic()
    assert decode(file)[0].info["frames"] == 2
    assert time.monotonic() - start < 5


def test_later_images_of_a_file_and_links_to_folders_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of an animation or a scan of several pages only the first is used; a link is not followed."""
    root, frames = tmp_path / "set", [Image.new("RGB", (64, 48), (40 * n, 9, 9)) for n in range(3)]
    for ending in ("gif", "png", "webp", "tif"):
        write_image(root / f"{ending}.{ending}").unlink()
        frames[0].save(root / f"{ending}.{ending}", save_all=True, append_images=frames[1:])
    write_image(root / "still.gif")
    frames[0].save(root / "phone.jpg", "MPO", save_all=True, append_images=frames[1:])  # its own small copy
    (tmp_path / "more").mkdir()
    (root / "more").symlink_to(tmp_path / "more")
    folder = read(root, caption="x")
    assert len(folder.images) == 6
    assert folder.not_read == (
        "1 link to folders (more/), later images of 4 files with several (gif.gif, png.png, tif.tif)"
    )
    found = find_photos([root], "a cat", "")
    assert len(found) == 6 and "1 link to folders (more/)" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("name", "named"),
    [
        ("captions.csv", "1 .csv"),  # kept for a table: their words would be unheard
        ("metadata.json", "1 .json"),
        ("meta_cap.json", "1 .json"),
        ("train.parquet", "1 .parquet"),
        ("caption.txt", "1 .txt (beside no image of that name)"),
        ("a.png.txt", "1 .txt (beside no image of that name)"),
        ("b.TXT", "1 .txt (beside no image of that name)"),
        ("a.txt", ""),
        ("b.caption", ""),
        ("README.md", ""),
        ("checksums.txt", ""),
    ],
)
def test_texts_that_are_not_read_are_named(tmp_path: Path, name: str, named: str) -> None:
    for image in ("a.png", "b.png"):
        write_image(tmp_path / image)
    (tmp_path / "captions.txt").write_text("a.png|one\n")
    (tmp_path / name).write_text("two")
    assert read(tmp_path, caption="x").not_read == named


def test_a_folder_of_nothing_that_is_read_says_what_it_holds(tmp_path: Path) -> None:
    (tmp_path / "a.jxl").write_text("x")
    (tmp_path / "deep" / "er").mkdir(parents=True)
    write_image(tmp_path / "deep" / "er" / "a.png")
    with pytest.raises(UserError, match=r"no images found \(but 1 .jxl, 1 image in deep/er/ \(1\)\)"):
        read(tmp_path)


def test_heic_without_its_extra_is_named_with_the_way_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    endings = reading.image_endings() - set(reading.HEIF_ENDINGS)
    monkeypatch.setattr(reading, "image_endings", lambda: endings)
    write_image(tmp_path / "a.png")
    write_image(tmp_path / "b.png")
    (tmp_path / "c.HEIC").write_text("x")
    assert read(tmp_path, caption="x").not_read == "1 .heic (python -m pip install -e '.[heif]' reads them)"
    (tmp_path / "d.mp4").write_text("x")
    assert len(find_photos([tmp_path], "a cat", "")) == 2
    said = " ".join(capsys.readouterr().out.split())
    assert "not read: 1 .heic (python -m pip install -e '.[heif]' reads them), 1 .mp4" in said
    with pytest.raises(
        UserError, match=r"c.HEIC is not an image: python -m pip install -e '.\[heif\]' reads them"
    ):
        find_photos([tmp_path / "c.HEIC"], "a cat", "")


def test_every_layer_reads_the_same_colours(tmp_path: Path, colours: np.ndarray) -> None:
    """The reduced decoding of the check, training and restyling see one image."""
    image = Image.fromarray(np.broadcast_to(colours[:, 300:301], (64, 96, 3)).copy())
    image.save(tmp_path / "a.jpg", quality=98, icc_profile=adobe_rgb())
    whole, small = read_image(tmp_path / "a.jpg")[0], read_image(tmp_path / "a.jpg", at_least=8)[0]
    assert small.size < whole.size
    assert np.abs(np.asarray(whole)[5, 5].astype(int) - np.asarray(small)[2, 2]).max() <= 2
    assert np.abs(np.asarray(whole)[5, 5].astype(int) - np.asarray(image)[5, 5]).max() > 3
