"""Image folders as people have them: every layout, odd images, broken files, each with its reason."""

import os
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.image_folders import RED, captions_of, read, write_image
from PIL import Image

from ghibli.data.folder import ImageFolder, read_folder, summarise
from ghibli.images.read import open_image, read_image
from ghibli.images.resize import preprocess
from ghibli.runtime.errors import UserError


def captioned(folder: Path, *names: str) -> None:
    """Images with a .txt beside each."""
    for name in names:
        write_image(folder / name)
        (folder / name).with_suffix(".txt").write_text(f"caption of {name}\n")


def names_of(folder: ImageFolder) -> list[str]:
    return [p.path.name for p in folder.images]


# Layouts and captions


def test_images_beside_a_caption_table(tmp_path: Path) -> None:
    for name in ("b.png", "a.jpg", "c d.webp", "\u00e4\u732b.JPG", "F.GIF"):
        write_image(tmp_path / "images" / name)
    lines = [
        "b.png|a sea",
        " a.jpg | a hill | at night ",
        "",
        "c d.webp|two  words",
        "\u00e4\u732b.JPG|a cat",
        "F.GIF|a fire",
    ]
    (tmp_path / "captions.txt").write_bytes(("\ufeff" + "\r\n".join(lines)).encode())
    folder = read(tmp_path)
    assert captions_of(folder) == {
        "F.GIF": "a fire, in ink",
        "a.jpg": "a hill | at night, in ink",
        "b.png": "a sea, in ink",
        "c d.webp": "two words, in ink",
        "\u00e4\u732b.JPG": "a cat, in ink",
    }
    assert names_of(folder) == sorted(captions_of(folder))
    assert folder.unusable == {}
    assert len({p.content_hash for p in folder.images}) == 5


def test_a_caption_table_without_an_images_folder(tmp_path: Path) -> None:
    write_image(tmp_path / "a.png")
    write_image(tmp_path / "b.png")
    (tmp_path / "captions.txt").write_text("a.png|one\nb.png|two\nb.png|three")
    assert captions_of(read(tmp_path)) == {"a.png": "one, in ink", "b.png": "three, in ink"}


def test_names_are_found_however_their_accents_are_spelled(tmp_path: Path) -> None:
    write_image(tmp_path / "e\u0301.png")  # e and a combining accent, as macOS writes it
    write_image(tmp_path / "b.png")
    (tmp_path / "captions.txt").write_text("\u00e9.png|one\nb.png|two", encoding="utf-8")
    assert set(captions_of(read(tmp_path)).values()) == {"one, in ink", "two, in ink"}


def test_images_with_a_text_beside_each(tmp_path: Path) -> None:
    captioned(tmp_path, "a.png", "B.JPEG")
    (tmp_path / "a.txt").write_bytes("\ufeffa sea\r\nat night\r\n".encode())
    write_image(tmp_path / "c.png")
    write_image(tmp_path / ".hidden.png")
    (tmp_path / "notes.md").write_text("no image")
    folder = read(tmp_path)
    assert captions_of(folder) == {"a.png": "a sea at night, in ink", "B.JPEG": "caption of B.JPEG, in ink"}
    assert folder.unusable == {"c.png": "it has no caption (data.caption=TEXT gives one)"}
    assert captions_of(read(tmp_path, caption="a scene"))["c.png"] == "a scene, in ink"


def test_nothing_is_dropped_in_silence(tmp_path: Path) -> None:
    """Names without a file, files without a line, lines without a caption: all are listed."""
    for name in ("a.png", "b.png", "unlisted.png", "empty.png"):
        write_image(tmp_path / "images" / name)
    (tmp_path / "captions.txt").write_text("a.png|one\nb.png|two\ngone.png|three\nempty.png|\n../x.png|four")
    folder = read(tmp_path)
    assert names_of(folder) == ["a.png", "b.png"]
    assert list(folder.unusable) == ["../x.png", "empty.png", "gone.png", "unlisted.png"]
    assert folder.unusable["gone.png"] == "the file is missing"
    assert "no caption" in folder.unusable["empty.png"]
    assert "no caption" in folder.unusable["unlisted.png"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a.png|one\n\nb.png two\n", r"captions.txt line 3: expected `file\|caption`, found `b.png two`"),
        (b"a.png|one\n|two\n", r"captions.txt line 2: expected `file\|caption`, found `\|two`"),
        (b"a.png|one\nb.png|caf\xe9\n", "captions.txt line 2 is not UTF-8 text: save the file as UTF-8"),
        ("a.png|one".encode("utf-16"), "captions.txt line 1 is not UTF-8 text"),
    ],
)
def test_a_broken_caption_table_is_named_with_its_line(tmp_path: Path, content: bytes, message: str) -> None:
    captioned(tmp_path, "a.png", "b.png")
    (tmp_path / "captions.txt").write_bytes(content)
    with pytest.raises(UserError, match=message):
        read(tmp_path)


def test_a_text_beside_that_is_not_utf8_costs_one_image(tmp_path: Path) -> None:
    captioned(tmp_path, "a.png", "b.png", "c.png")
    (tmp_path / "b.txt").write_bytes(b"caf\xe9")
    folder = read(tmp_path)
    assert names_of(folder) == ["a.png", "c.png"]
    assert folder.unusable == {"b.png": "b.txt is not UTF-8 text: save it as UTF-8"}


def test_folders_that_hold_nothing(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"data.root=.*nowhere: no such folder"):
        read(tmp_path / "nowhere")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"data.root=.*file: that is a file, not a folder"):
        read(tmp_path / "file")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"no images found; supported layouts: images/"):
        read(tmp_path / "empty")


def test_too_few_usable_images_are_listed_by_name(tmp_path: Path) -> None:
    captioned(tmp_path, "a.png")
    with pytest.raises(UserError, match=r": 1 usable image, at least 2 are needed .*; $"):
        read(tmp_path)
    write_image(tmp_path / "b.png")
    with pytest.raises(UserError, match=r"1 usable image, .* 1 skipped: b.png \(it has no caption"):
        read(tmp_path)
    (tmp_path / "a.txt").unlink()
    with pytest.raises(UserError, match=r": no usable images, .* 2 skipped: a.png \(.*\), b.png \(.*\)$"):
        read(tmp_path)


def test_a_long_list_of_unusable_images_is_cut() -> None:
    words = summarise({f"{n}.png": "the file is missing" for n in range(7)})
    assert words.startswith("7 skipped: 0.png (the file is missing), 1.png")
    assert words.endswith("4.png (the file is missing) and 2 more, all in split.json")
    assert summarise({}) == ""


# Broken images


def test_unusable_images_are_skipped_and_named(tmp_path: Path) -> None:
    write_image(tmp_path / "good.jpg", (300, 200))
    write_image(tmp_path / "good.png")
    write_image(tmp_path / "dot.png", (1, 1))
    write_image(tmp_path / "narrow.png", (31, 400))
    whole = write_image(tmp_path / "cut.jpg", (300, 200)).read_bytes()
    (tmp_path / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    noise = np.random.default_rng(0).integers(0, 256, (100, 100, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "cut.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "cut.png").read_bytes()[:9000])
    (tmp_path / "text.jpg").write_text("this is no image")
    (tmp_path / "void.jpg").write_bytes(b"")
    (tmp_path / "folder.jpg").mkdir()
    Image.fromarray(np.ones((40, 40), dtype=np.float32)).save(tmp_path / "float.tif")
    folder = read(tmp_path, caption="a scene")
    assert names_of(folder) == ["good.jpg", "good.png"]
    reasons = {
        "cut.jpg": "truncated",
        "cut.png": "truncated",
        "dot.png": "it is too small: 1x1 px, data.min_side=32",
        "float.tif": "floating-point",
        "folder.jpg": "that is a folder",
        "narrow.png": "it is too small: 31x400 px",
        "text.jpg": "it is not an image, despite its name",
        "void.jpg": "the file is empty",
    }
    assert list(folder.unusable) == sorted(reasons)
    for name, words in reasons.items():
        assert words in folder.unusable[name]
        assert str(tmp_path) not in folder.unusable[name]
    small = {"dot.png", "narrow.png"}
    assert read(tmp_path, caption="a scene", min_side=1).unusable.keys() == reasons.keys() - small


def test_a_damaged_exif_is_no_reason_to_skip(tmp_path: Path) -> None:
    exif = b"Exif\x00\x00MM\x00\x2a\x00\x00\xff\xff broken"
    Image.new("RGB", (64, 48), RED).save(tmp_path / "a.jpg", exif=exif)
    write_image(tmp_path / "b.png")
    assert names_of(read(tmp_path, caption="x")) == ["a.jpg", "b.png"]
    assert open_image(tmp_path / "a.jpg").size == (64, 48)


def test_an_image_that_breaks_between_check_and_use(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"\x89PNG")
    with pytest.raises(UserError, match=r"a.png was readable a moment ago"):
        open_image(tmp_path / "a.png")


# Odd but good images


def centre(path: Path) -> tuple[int, int, int]:
    opened = open_image(path)
    assert opened.mode == "RGB"
    return opened.getpixel((opened.width // 2, opened.height // 2))


def near(left: tuple[int, ...], right: tuple[int, ...]) -> bool:
    return max(abs(a - b) for a, b in zip(left, right, strict=True)) <= 4


def test_cmyk_jpeg_keeps_its_colours(tmp_path: Path) -> None:
    """Written as Photoshop does: inverted, and said so by the Adobe marker."""
    Image.new("RGB", (64, 48), RED).convert("CMYK").save(tmp_path / "a.jpg", quality=95)
    content = (tmp_path / "a.jpg").read_bytes()
    assert b"Adobe" in content
    with Image.open(tmp_path / "a.jpg") as file:
        assert file.mode == "CMYK"
    assert near(centre(tmp_path / "a.jpg"), RED)
    assert near(read_preview(tmp_path / "a.jpg"), RED)


def read_preview(path: Path) -> tuple[int, int, int]:
    """The middle pixel of the reduced decoding that only checks an image."""
    small = read_image(path, at_least=8)[0]
    return small.getpixel((small.width // 2, small.height // 2))


def test_palette_with_transparency_becomes_white(tmp_path: Path) -> None:
    image = Image.new("P", (64, 48), 1)
    image.putpalette([0, 0, 0, *RED])
    image.paste(0, (0, 0, 32, 48))
    image.save(tmp_path / "a.png", transparency=0)
    opened = open_image(tmp_path / "a.png")
    assert (opened.getpixel((10, 10)), opened.getpixel((50, 10))) == ((255, 255, 255), RED)


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_transparency_is_laid_on_white(tmp_path: Path, mode: str) -> None:
    image = Image.new("RGBA", (64, 48), (0, 0, 0, 51)).convert(mode)
    image.save(tmp_path / "a.png")
    assert near(centre(tmp_path / "a.png"), (204, 204, 204))


def test_sixteen_bit_grey_is_scaled_not_clipped(tmp_path: Path) -> None:
    ramp = np.linspace(0, 65535, 64 * 48).round().astype(np.uint16).reshape(48, 64)
    for name in ("a.png", "a.tif"):
        Image.fromarray(ramp).save(tmp_path / name)
        got = np.asarray(open_image(tmp_path / name))
        assert got.shape == (48, 64, 3)
        assert np.abs(got[..., 0] - ramp / 257).max() <= 0.5
        assert (got[..., 0] == got[..., 2]).all()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_turned_photo_is_turned(tmp_path: Path, orientation: int) -> None:
    """Every EXIF orientation: the image as a viewer shows it, equal to Pillow's own transposition."""
    upright = Image.new("RGB", (60, 40), "white")
    upright.paste((0, 0, 255), (0, 0, 30, 20))  # top left
    undo = {
        2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_90, 7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }  # fmt: skip
    stored = upright.transpose(undo[orientation]) if orientation > 1 else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save(tmp_path / "a.png", exif=exif)
    assert np.array_equal(np.asarray(open_image(tmp_path / "a.png")), np.asarray(upright))


def test_animated_gif_gives_its_first_frame(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (64, 48), colour) for colour in (RED, (0, 255, 0), (0, 0, 255))]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    assert near(centre(tmp_path / "a.gif"), RED)


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "CMYK"])
def test_other_modes_become_rgb(tmp_path: Path, mode: str) -> None:
    white = {"1": 1, "L": 255, "P": 0, "RGB": (255, 255, 255), "CMYK": (0, 0, 0, 0)}[mode]
    image = Image.new(mode, (64, 48), white)
    if mode == "P":
        image.putpalette([255, 255, 255])
    image.save(tmp_path / "a.tif")
    assert near(centre(tmp_path / "a.tif"), (255, 255, 255))


LARGE = """
import resource, sys
from pathlib import Path
from PIL import Image
from ghibli.data.folder import read_folder
from ghibli.images.read import open_image

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

root = Path(sys.argv[1])
before = peak()
folder = read_folder(root, style="", default_caption="x", min_side=32)
assert len(folder.images) == 3, folder.unusable
for one in folder.images:
    assert open_image(one.path).size == (10000, 6000)
print(peak() - before)
"""


def test_images_are_read_on_all_cores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each waits until another one is being read too."""
    for place in range(4):
        write_image(tmp_path / f"{place}.png")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1}, raising=False)
    both = threading.Barrier(2, timeout=20)
    options = {"style": "", "default_caption": "x", "min_side": 8}
    found = read_folder(tmp_path, **options, on_image=lambda *_: both.wait())
    assert len(found.images) == 4


@pytest.mark.slow
def test_sixty_megapixels_are_used_in_bounded_memory(tmp_path: Path) -> None:
    size = (10000, 6000)
    Image.new("RGB", size, RED).save(tmp_path / "a.jpg")
    Image.new("RGBA", size, (*RED, 128)).save(tmp_path / "b.png", compress_level=1)
    Image.new("I;16", size, 40000).save(tmp_path / "c.png", compress_level=1)
    # A process starts with the peak of the one it was forked from: that is to be the small shell.
    words = ["sh", "-c", '"$@"; exit $?', "sh", sys.executable, "-c", LARGE, str(tmp_path)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert float(done.stdout) < 800  # MiB over what the imports took


# What the model sees


def test_preprocess_range() -> None:
    for grey, value in ((0, -1.0), (255, 1.0), (51, -0.6)):
        values = preprocess(Image.new("RGB", (90, 60), (grey, grey, grey)), 64, "squash")
        assert values.shape == (3, 64, 64)
        assert values.dtype == torch.float32
        assert torch.allclose(values, torch.full_like(values, value), atol=1e-6)


def striped() -> Image.Image:
    """128 x 64: left quarter red, middle half green, right quarter blue."""
    image = Image.new("RGB", (128, 64), (0, 255, 0))
    image.paste((255, 0, 0), (0, 0, 32, 64))
    image.paste((0, 0, 255), (96, 0, 128, 64))
    return image


def test_squash_keeps_everything_and_center_crop_the_middle() -> None:
    squashed = preprocess(striped(), 64, "squash")
    row = squashed[:, 32].T  # (64, 3)
    assert row[2].tolist() == [1, -1, -1]
    assert row[32].tolist() == [-1, 1, -1]
    assert row[61].tolist() == [-1, -1, 1]
    cropped = preprocess(striped(), 64, "center_crop")
    assert torch.equal(cropped, torch.tensor([-1.0, 1.0, -1.0])[:, None, None].expand(3, 64, 64))
    upright = preprocess(striped().transpose(Image.Transpose.ROTATE_270), 64, "center_crop")
    assert torch.equal(upright, cropped)


def test_preprocess_keeps_rows_and_columns_apart() -> None:
    image = Image.new("RGB", (64, 64), "black")
    image.putpixel((10, 50), (255, 255, 255))  # x, y
    values = preprocess(image, 64, "squash")
    assert values[0, 50, 10] == 1
    assert (values == 1).sum() == 3
