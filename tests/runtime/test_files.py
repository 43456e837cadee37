"""Files that are written: under a free name, however long, and never over another."""

import os
import threading
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ghibli.runtime import files
from ghibli.runtime.errors import UserError
from ghibli.runtime.files import fitting, next_number, require_target, write_atomically, write_new

NAMES = st.text(
    st.characters(blacklist_characters="/\0", blacklist_categories=["Cs"]), min_size=1, max_size=300
)


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(NAMES, st.sampled_from([".png", "-2.png", "-123456.png"]))
def test_a_name_is_cut_in_bytes_between_characters(stem: str, ending: str) -> None:
    name = fitting(stem, ending)
    assert len(os.fsencode(name)) <= 255 and name.endswith(ending)
    assert stem.startswith(name.removesuffix(ending))
    assert name == stem + ending or len(os.fsencode(name)) > 255 - 4  # no more is cut than must be


def test_a_name_of_255_bytes_can_be_written(tmp_path: Path) -> None:
    for letter in ("a", "ä", "\N{HIRAGANA LETTER A}"):
        path = tmp_path / fitting(letter * 300, ".png")
        write_atomically(path, lambda file: file.write(b"1"))
        assert path.read_bytes() == b"1"
    assert len(list(tmp_path.iterdir())) == 3


def test_the_next_free_name_is_taken(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    written = [write_new(path, lambda file, text=text: file.write(text)) for text in (b"1", b"2", b"3")]
    assert [file.name for file in written] == ["a.png", "a-2.png", "a-3.png"]
    assert [file.read_bytes() for file in written] == [b"1", b"2", b"3"]
    (tmp_path / "b.png").symlink_to(tmp_path / "nowhere")  # taken, though there is nothing behind it
    assert write_new(tmp_path / "b.png", lambda file: file.write(b"4")).name == "b-2.png"


@pytest.mark.parametrize("links", [True, False])
def test_two_writers_never_share_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, links: bool) -> None:
    if not links:  # as on exFAT

        def link(*_: object) -> None:
            raise PermissionError(1, "Operation not permitted")

        monkeypatch.setattr(files.os, "link", link)
    threads = [
        threading.Thread(target=write_new, args=(tmp_path / "a.png", lambda f, i=i: f.write(b"%d" % i)))
        for i in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(file.read_bytes() for file in tmp_path.iterdir()) == [b"%d" % i for i in range(8)]


def test_a_failure_leaves_nothing_behind(tmp_path: Path) -> None:
    def fails(_: object) -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left") as caught:
        write_new(tmp_path / "a.png", fails)
    assert caught.value.filename == str(tmp_path / "a.png") and not list(tmp_path.iterdir())


def test_numbers_go_on_after_the_highest(tmp_path: Path) -> None:
    assert next_number(tmp_path / "nowhere", ".png") == 0
    for name in ("000.png", "007.PNG", "12.png", "0x9.png", "900.jpg", "\u0663\u0663\u0663.png"):
        (tmp_path / name).touch()
    assert next_number(tmp_path, ".png") == 8


def test_a_target_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    require_target(tmp_path / "new" / "folder", "--to", 1)
    assert not (tmp_path / "new").exists()
    with pytest.raises(UserError, match=r"^--to .*file/x: nothing can be written there"):
        require_target(tmp_path / "file" / "x", "--to", 1)
    with pytest.raises(UserError, match=r"MB are free on that disk and about 1000000000000 MB are needed"):
        require_target(tmp_path, "--to", 10**18)
