"""Fonts for text on image sheets: one that has the letters, or else letters that the font has."""

import unicodedata
from functools import cache

from matplotlib.font_manager import findSystemFonts
from matplotlib.ft2font import FT2Font
from PIL import ImageFont

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont
SCRIPTS = ("HIRAGANA", "KATAKANA")  # whose letters Unicode names by their sound


def font_and_text(text: str, size: int) -> tuple[Font, str]:
    """Return a font of `size` px and the text as it can draw it.

    Pillow's own font where it has every character, else the system font that has the most of them; what that
    one lacks is spelled, as `spell` does.
    """
    text = "".join(" " if char.isspace() and char != "\n" else char for char in text)
    own = ImageFont.load_default(size=size)
    missing = frozenset(char for char in text if needs_glyph(char) and not draws(own, char))
    if not missing:
        return own, text
    path = best_system_font(frozenset(filter(needs_glyph, text)))
    if path is None:
        return own, "".join(spell(char) if char in missing else char for char in text)
    known = characters_of(path)
    lacking = {char for char in text if needs_glyph(char) and ord(char) not in known}
    return ImageFont.truetype(path, size), "".join(spell(c) if c in lacking else c for c in text)


def needs_glyph(char: str) -> bool:
    """Tell a visible character from spaces and line ends."""
    return not char.isspace()


def draws(font: Font, char: str) -> bool:
    """Tell whether a font has a glyph for a character: without one it draws a box, its glyph 0."""
    box = font.getmask("\U0010ffff")
    mask = font.getmask(char)
    return (mask.size, bytes(mask)) != (box.size, bytes(box))


@cache
def best_system_font(characters: frozenset[str]) -> str | None:
    """Return the font file of this machine that has the most of some characters; None if none adds any.

    Of equally good ones, a sans-serif of regular weight comes first.
    """
    codes = {ord(char) for char in characters}
    own = sum(draws(ImageFont.load_default(size=16), char) for char in characters)

    def rank(path: str) -> tuple[int, bool, bool, str]:
        name = path.lower()
        fancy = any(word in name for word in ("bold", "italic", "oblique", "light", "black", "thin"))
        return -len(codes & characters_of(path)), "mono" in name or "serif" in name, fancy, path

    paths = sorted(findSystemFonts(), key=rank)
    return paths[0] if paths and len(codes & characters_of(paths[0])) > own else None


@cache
def characters_of(path: str) -> frozenset[int]:
    """Return the code points that a font file has outlines for; none if it cannot be used here."""
    try:
        font = FT2Font(path)
        ImageFont.truetype(path, 16)  # refuses fonts of bitmaps, as those of emoji are
        return frozenset(font.get_charmap())
    except (OSError, RuntimeError, ValueError):
        return frozenset()


def spell(char: str) -> str:
    """Spell a character in ASCII: without its accent, a Japanese syllable by its sound, else by its number.

    `e` for an e with accents, `mo` for a syllable, `<U+732B>` for a Chinese character.
    """
    if unicodedata.category(char) in ("Mn", "Cf"):  # accents of their own, joiners
        return ""
    plain = unicodedata.normalize("NFKD", char).encode("ascii", "ignore").decode()
    if plain.isprintable() and plain:
        return plain
    words = unicodedata.name(unicodedata.normalize("NFKC", char)[:1], "").split()
    if words[:1] and words[0].split("-")[0] in SCRIPTS and words[-2:-1] and words[-2] in ("LETTER", "SMALL"):
        return words[-1].lower()
    return f"<U+{ord(char):04X}>"


def width_of(text: str) -> int:
    """Return the columns of a text, of which a Chinese or Japanese character takes two."""
    return sum(2 if unicodedata.east_asian_width(char) in "WF" else 1 for char in text)
