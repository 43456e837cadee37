"""Text on sheets: drawn in a font that has its letters, or spelled; never boxes."""

from pathlib import Path

import numpy as np
import pytest
from fontTools.fontBuilder import FontBuilder
from fontTools.pens.ttGlyphPen import TTGlyphPen
from PIL import Image, ImageFont

from ghibli.images import fonts
from ghibli.images.fonts import best_system_font, font_and_text, spell
from ghibli.images.grid import CAPTION_SIZE, LETTERS, TILE, contact_sheet, shorten


@pytest.fixture(autouse=True)
def forget() -> None:
    """Look for fonts anew."""
    best_system_font.cache_clear()


def font_of(characters: str, path: Path) -> Path:
    """Write a font in which every character is a filled square, and the missing one nothing."""
    pen = TTGlyphPen(None)
    for place, point in enumerate(((100, 0), (100, 700), (800, 700), (800, 0))):
        (pen.lineTo if place else pen.moveTo)(point)
    pen.closePath()
    names = {ord(char): f"u{ord(char):04X}" for char in characters}
    builder = FontBuilder(1000, isTTF=True)
    builder.setupGlyphOrder([".notdef", *names.values()])
    builder.setupCharacterMap(names)
    builder.setupGlyf({".notdef": TTGlyphPen(None).glyph(), **dict.fromkeys(names.values(), pen.glyph())})
    builder.setupHorizontalMetrics(dict.fromkeys([".notdef", *names.values()], (1000, 0)))
    builder.setupHorizontalHeader(ascent=800, descent=-200)
    builder.setupNameTable({"familyName": "Test", "styleName": "Regular"})
    builder.setupOS2()
    builder.setupPost()
    builder.save(path)
    return path


def test_a_system_font_with_the_letters_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = font_of("ジブリの猫 abc", tmp_path / "japanese.ttf")
    poor = font_of("ジ", tmp_path / "a.ttf")
    monkeypatch.setattr(fonts, "findSystemFonts", lambda: [str(poor), str(tmp_path / "none.ttf"), str(path)])
    font, text = font_and_text("abc ジブリの猫", 20)
    assert (font.path, text) == (str(path), "abc ジブリの猫")
    font, text = font_and_text("ジブリの犬", 20)
    assert (font.path, text) == (str(path), "ジブリの<U+72AC>")


def test_without_such_a_font_the_letters_are_spelled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fonts, "findSystemFonts", lambda: [])
    own = ImageFont.load_default(size=16)
    for text in ("となりのトトロ", "森の中", "\U0001f3a8", "ếắ", "한국", "a\u2028b\x07\u200d"):
        drawn = font_and_text(text, 16)[1]
        assert all(fonts.draws(own, char) for char in drawn if char != " "), drawn
    assert font_and_text("となりの cat", 16)[1] == "tonarino cat"
    assert [spell(char) for char in "ジé猫ﾄ"] == ["zi", "e", "<U+732B>", "to"]


def test_a_caption_stays_below_its_tile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wide letters count twice."""
    path = font_of("長い", tmp_path / "a.ttf")
    monkeypatch.setattr(fonts, "findSystemFonts", lambda: [str(path)])
    lines = shorten("長い" * 60).split("\n")
    assert max(map(len, lines)) == LETTERS // 2
    font = ImageFont.truetype(path, CAPTION_SIZE)
    assert max(font.getlength(line) for line in lines[:-1]) <= TILE
    sheet = contact_sheet([(Image.new("RGB", (64, 64)), "長い")])
    below = np.asarray(sheet.convert("L"))[TILE + 12 :]
    assert below.min() == 0
