"""Images drawn in another process while the block runs."""

import subprocess
import sys
from pathlib import Path

import pytest
from helpers.commands import REPO

from ghibli.config.schema import DrawConfig
from ghibli.data import drawing
from ghibli.data.drawing import draw_missing, drawn_meanwhile
from ghibli.demo.scenes.scene import FINETUNE_SEEDS, write_folder

FEW = DrawConfig(look="drawn", count=3)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_the_same_images_as_without_another_process(tmp_path: Path) -> None:
    with drawn_meanwhile(str(tmp_path / "beside"), FEW):
        pass
    write_folder(tmp_path / "here", "drawn", 3, FINETUNE_SEEDS.start)
    assert contents(tmp_path / "beside") == contents(tmp_path / "here") != {}


def test_a_folder_that_is_there_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_folder(tmp_path, "drawn", 1, FINETUNE_SEEDS.start)
    before = contents(tmp_path)
    with drawn_meanwhile(str(tmp_path), FEW):
        pass
    assert contents(tmp_path) == before


def test_what_the_other_process_cannot_do_is_said_once(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """A file stands where the folder is wanted: silent beside, an error afterwards."""
    (tmp_path / "file").write_text("")
    root = str(tmp_path / "file" / "images")
    with drawn_meanwhile(root, FEW):
        pass
    assert capfd.readouterr() == ("", "")
    with pytest.raises(NotADirectoryError):
        draw_missing(root, FEW, str(tmp_path))


def test_the_block_s_own_error_passes_through(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), drawn_meanwhile(str(tmp_path / "images"), FEW):
        1 / 0  # noqa: B018
    assert (tmp_path / "images" / "captions.txt").exists()


def test_torch_is_not_imported() -> None:
    """Else it would be imported twice at once, and nothing gained."""
    words = f"import sys, {drawing.__name__}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", words], cwd=REPO).returncode == 0
