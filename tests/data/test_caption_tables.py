"""Caption tables as spreadsheets, scripts and people write them: each caption whole, or the line refused."""

import csv
import io
import json
import os
import tempfile
import time
from pathlib import Path

import pytest
from helpers.image_folders import read, write_image
from hypothesis import given, settings
from hypothesis import strategies as st

from ghibli.data.caption_tables import csv_rows
from ghibli.data.folder import list_images
from ghibli.data.layouts import LAYOUTS
from ghibli.inference.request import read_prompts
from ghibli.runtime.errors import UserError


def captions(
    folder: Path, table: str, content: str | bytes, names: str = "a.png b.png"
) -> dict[str, str | None]:
    for name in names.split():
        write_image(folder / name)
    (folder / table).write_bytes(content if isinstance(content, bytes) else content.encode())
    return {name: caption for name, _, caption in list_images(folder)}


@pytest.mark.parametrize(
    ("table", "content", "words"),
    [
        ("metadata.csv", "file_name,text\na.png,ok\nb.png,a girl, on a hill\n", "line 3 has 3 cells"),
        ("metadata.csv", "text,file_name\na girl, on a hill,a.png\n", "line 2 has 3 cells"),
        ("metadata.csv", "file_name,text,tags\na.png,a girl, on a hill\n", "line 2: is `on a hill` the rest"),
        ("metadata.csv", "text,tags,file_name\na girl, on a hill,a.png\n", "line 2: is `on a hill` the rest"),
        ("metadata.csv", "file_name,text,caption\na.png,a girl, on a hill\n", "the rest of the caption?"),
        ("metadata.csv", 'file_name,text\na.png,"open\nb.png,closed"\n', "line 2: a double quote is opened"),
        ("metadata.csv", 'file_name,text\na.png,x\nb.png,"open\n', "line 3 cannot be read: unexpected end"),
        ("metadata.csv", 'file_name,text\na.png,"a" b\n', "line 2 cannot be read"),
        ("metadata.csv", "file_name\ttext\na.png\ta\tb\n", "line 2 has 3 cells"),
        ("metadata.csv", "file_name,text,text\na.png,a,b\n", "line 2 has two values of text: remove one"),
        ("metadata.jsonl", '{"file_name": "a.png", "text": "a", "text": "b"}\n', "line 1 has two values"),
        ("metadata.jsonl", "[" * 100_000 + "\n", "line 1 is not a JSON object"),
        ("metadata.jsonl", '{"file_name": "a.png", "text": "\\ud800"}\n', "line 1 holds half of a"),
        ("metadata.jsonl", '{"file_name": "\\ud800.png", "text": "a"}\n', "line 1 holds half of a"),
        ("metadata.jsonl", '{"file_name": "a.png", "text": {"a": 1}}\n', "line 1: its text is not text"),
        ("metadata.jsonl", '[{"file_name": "a.png", "text": "a"}]\n', "line 1 is not a JSON object"),
        ("captions.txt", "a.png\tone\n", "line 1: expected `file"),
    ],
)  # fmt: skip
def test_what_would_lose_words_is_refused_with_its_line(
    tmp_path: Path, table: str, content: str, words: str
) -> None:
    with pytest.raises(UserError, match=words):
        captions(tmp_path, table, content)


BOM = b"\xef\xbb\xbf"


@pytest.mark.parametrize(
    ("table", "content"),
    [
        ("metadata.csv", b'file_name,text\na.png,"a girl, on a hill"\nb.png,plain\n'),
        ("metadata.csv", BOM + b'file_name,text\r\na.png,"a girl, on a hill"\r\nb.png,plain\r\n'),
        ("metadata.csv", b"file_name;text\na.png;a girl, on a hill\nb.png;plain\n"),
        ("metadata.csv", b"file_name\ttext\na.png\ta girl, on a hill\nb.png\tplain\n"),
        ("metadata.csv", b' File_Name , Text\n\na.png,"a girl, on a hill",,\nb.png , plain\n'),
        ("metadata.csv", b'file_name, text, w\na.png, "a girl, on a hill", 3\nb.png, plain, 4\n'),
        ("metadata.csv", b'file_name,text,w,h\na.png,"a girl, on a hill",3,\nb.png,plain, ,4\n'),
        ("metadata.csv", b'file_name,text,caption\na.png,,"a girl, on a hill"\nb.png,plain,other\n'),
        ("metadata.csv", b'file_name,text\na.png,"a girl,\n on a hill"\nb.png,plain\n'),
        ("metadata.csv", b'width,text,file_name\n3,"a girl, on a hill",a.png\n4,plain,./b.png\n'),
        ("metadata.jsonl", BOM + b'{"file_name": "a.png", "text": "a girl, on a hill"}\r\n\r\n'
         b'{"file_name": "b.png", "caption": "plain", "size": {"w": [1]}}'),
        ("captions.txt", BOM + b"a.png|a girl, on a hill\r\nb.png|plain"),
        ("captions.txt", b"a.png|a girl, on a hill\rb.png|plain\r"),
        ("captions.txt", b"./a.png |a girl,  on a hill\n\nb.png|plain\n"),
    ],
)  # fmt: skip
def test_what_other_programs_write_is_read_whole(tmp_path: Path, table: str, content: bytes) -> None:
    assert captions(tmp_path, table, content) == {"a.png": "a girl, on a hill", "b.png": "plain"}


@pytest.mark.parametrize("line", ["", " ", " \t" * 60])
def test_a_caption_of_empty_lines_takes_no_time(tmp_path: Path, line: str) -> None:
    """Time by the square of its length: 10 kB took a second and 100 kB, in one cell, minutes."""
    caption = f"{line}\n" * (60_000 // (len(line) + 1))
    start = time.process_time()
    assert list(csv_rows(tmp_path, f'file_name,text\na.png,"{caption}"\n')) == [(2, "a.png", "")]
    assert time.process_time() - start < 1


def test_a_row_that_replaces_another_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = captions(tmp_path, "captions.txt", "a.png|one\nb.png|two\na.png|three\nb.png|two\n")
    assert found == {"a.png": "three", "b.png": "two"}
    said = " ".join(capsys.readouterr().out.split())
    assert "captions.txt: 1 rows replace the caption of an earlier row: a.png (line 3)" in said


def test_captions_of_a_second_table_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "metadata.csv").write_text("file_name,text\na.png,other\nb.png,two\n")
    assert captions(tmp_path, "captions.txt", "a.png|one\nb.png|two\n") == {"a.png": "one", "b.png": "two"}
    said = " ".join(capsys.readouterr().out.split())
    assert "1 caption of metadata.csv left unused, as another table has others for a.png" in said


def test_windows_paths_are_found(tmp_path: Path) -> None:
    write_image(tmp_path / "images" / "a.png")
    (tmp_path / "metadata.csv").write_text("file_name,text\nsub\\b.png,two\n.\\images\\a.png,one\n")
    write_image(tmp_path / "images" / "sub" / "b.png")
    found = {name: caption for name, _, caption in list_images(tmp_path)}
    assert found.get("a.png") == "one"


def test_prompts_and_captions_split_at_line_ends_only(tmp_path: Path) -> None:
    text = "a\u2028b\x85c\x0bd\x0ce\x1cf"
    (tmp_path / "prompts.txt").write_bytes(f"{text}\r\nsecond\rthird\n".encode())
    assert read_prompts(tmp_path / "prompts.txt") == [text, "second", "third"]
    found = captions(tmp_path, "captions.txt", f"a.png|{text}\nb.png|x\n")
    assert found["a.png"] == " ".join(text.split())


# Random Unicode

TEXT = st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=40)
NAMES = st.text(st.characters(codec="utf-8", exclude_characters="\0/|\n\r"), min_size=1, max_size=20)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(rows=st.dictionaries(NAMES, TEXT, min_size=2, max_size=4), layout=st.sampled_from([*LAYOUTS]))
def test_random_names_and_captions_survive(rows: dict[str, str], layout: str) -> None:
    """Names are the files' own, captions come back in one line, in every layout."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        expected: dict[str, str] = {}
        for place, (name, caption) in enumerate(rows.items()):
            file = f"{place}{name}.png"  # not hidden, and different whatever case and accents
            write_image(root / file)
            expected[file] = " ".join(caption.split())
            if layout == "image files":
                (root / file).with_suffix(".txt").write_bytes(caption.encode())
        if layout == "captions.txt":
            lines = [f"{name}|{caption}" for name, caption in expected.items()]
            (root / layout).write_bytes("\n".join(lines).encode())
        if layout == "metadata.jsonl":
            lines = [json.dumps({"file_name": name, "text": rows[key]}, ensure_ascii=len(name) % 2 == 0)
                     for name, key in zip(expected, rows, strict=True)]  # fmt: skip
            (root / layout).write_bytes("\n".join(lines).encode())
        if layout == "metadata.csv":
            text = io.StringIO(newline="")
            csv.writer(text).writerows([("file_name", "text"), *zip(expected, rows.values(), strict=True)])
            (root / layout).write_bytes(text.getvalue().encode())
        found = read(root, caption="none")
        assert {p.name: p.caption for p in found.images} == {
            name: f"{caption or 'none'}, in ink" for name, caption in expected.items()
        }
        assert found.unusable == {}


def test_names_that_are_not_utf8_are_read_and_written(tmp_path: Path) -> None:
    names = [os.fsdecode(raw) for raw in (b"caf\xe9.png", b"\xff\xfe.png", "\u732b.png".encode())]
    for name in names:
        write_image(tmp_path / "x.png", colour=(len(name), 9, 9)).rename(tmp_path / name)
    rows = [json.dumps({"file_name": name, "text": "x"}) for name in names]
    (tmp_path / "metadata.jsonl").write_text("\n".join(rows))
    assert {image.name for image in read(tmp_path).images} == set(names)
