"""The demo base's tokenizer: a small byte-pair vocabulary in CLIPTokenizer's file format."""

import itertools
import json
from collections import Counter
from pathlib import Path

from transformers import CLIPTokenizer

from ghibli.demo.scenes import subjects
from ghibli.demo.scenes.scene import ON_WATER, PLACES, SETTINGS, TIMES

START, END = "<|startoftext|>", "<|endoftext|>"
# Words that a user may type and no caption of the demo contains.
STYLE_WORDS = """
studio ghibli style painting drawing photo photograph picture image anime hand drawn painted
watercolour landscape beautiful soft warm light colourful clean lines sky clouds flowers hill
street small big with and of at from near under over behind boy dog bird flower mountain forest
river sea garden school castle grey dark bright happy summer winter spring autumn rain snow two
three walking running sleeping looking day evening dress sail roof hat window
"""


def caption_words() -> list[str]:
    """Return every word that a caption of the demo can contain, sorted."""
    phrases = [
        *subjects.COLOURS,
        *SETTINGS,
        *ON_WATER,
        "standing",
        "sitting",
        "a an the in with dress roof sail",
    ]
    for options in (*TIMES.values(), *PLACES.values()):
        phrases += [option.replace("{}", "") for option in options]
    return sorted({word for phrase in phrases for word in phrase.split()})


def byte_symbols() -> list[str]:
    """Return the 256 printable stand-ins for bytes that GPT-2 and CLIP use, in CLIP's order."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) for byte in printable] + [chr(256 + i) for i in range(len(others))]


def learn_merges(words: list[str]) -> list[tuple[str, str]]:
    """Learn byte-pair merges, most frequent pair first, until every word is one token."""
    pieces = [[*word[:-1], word[-1] + "</w>"] for word in words]
    merges = []
    while any(len(word) > 1 for word in pieces):
        pairs = Counter(pair for word in pieces for pair in itertools.pairwise(word))
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        pieces = [merge_pair(word, best) for word in pieces]
    return merges


def merge_pair(word: list[str], pair: tuple[str, str]) -> list[str]:
    """Join every occurrence of a pair, left to right."""
    joined, index = [], 0
    while index < len(word):
        if tuple(word[index : index + 2]) == pair:
            joined.append(word[index] + word[index + 1])
            index += 2
        else:
            joined.append(word[index])
            index += 1
    return joined


def write_tokenizer(folder: Path) -> CLIPTokenizer:
    """Learn the vocabulary and save a CLIPTokenizer (77 tokens, padded with the end token)."""
    folder.mkdir(parents=True, exist_ok=True)
    merges = learn_merges(sorted({*caption_words(), *STYLE_WORDS.split()}))
    symbols = byte_symbols()
    vocabulary = [
        *symbols,
        *(symbol + "</w>" for symbol in symbols),
        *dict.fromkeys("".join(pair) for pair in merges),
        START,
        END,
    ]
    vocab_file, merges_file = folder / "vocab.json", folder / "merges.txt"
    vocab_file.write_text(json.dumps({piece: i for i, piece in enumerate(vocabulary)}))
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    merges_file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    tokenizer = CLIPTokenizer(
        vocab=str(vocab_file),
        merges=str(merges_file),
        model_max_length=77,
        unk_token=END,
        bos_token=START,
        eos_token=END,
        pad_token=END,
    )
    tokenizer.save_pretrained(folder)
    return tokenizer
