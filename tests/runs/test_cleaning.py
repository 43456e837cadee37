"""`ghibli clean`: what is oldest goes from the cache, after a dry run, and nothing that no run has cached."""

import os
from pathlib import Path

import pytest
from typer.testing import CliRunner

from ghibli.cli.main import app
from ghibli.runs.cleaning import DAY, entries, parse_size
from ghibli.runs.folder import RunDir
from ghibli.runtime.errors import UserError

SIZES = {  # entry -> bytes; a day older each
    "latents/a.pt": 4000, "scenes-drawn-9": 3000, "base_scores/b.pt": 2000, "evaluation/c.pt": 1000,
}  # fmt: skip


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Four entries, unused for 4, 3, 2 and 1 days, beside files of the user."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "outputs" / "cache"
    for days, (name, size) in zip((4, 3, 2, 1), SIZES.items(), strict=True):
        file = folder / name if name.endswith(".pt") else folder / name / "images" / "0.png"
        file.parent.mkdir(parents=True)
        file.write_bytes(bytes(size))
        when = os.stat(tmp_path).st_mtime - days * DAY
        os.utime(file, (when, when))
    (folder / "latents" / "mine.txt").write_text("mine")
    (folder / "mine").mkdir()
    return folder


def clean(*words: str) -> str:
    done = CliRunner().invoke(app, ["clean", "outputs/cache", *words], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.output


def left(cache: Path) -> list[str]:
    return [str(one.path.relative_to(cache)) for one in entries(cache)]


def test_the_longest_unused_comes_first_with_its_size(cache: Path) -> None:
    assert {str(one.path.relative_to(cache)): one.size for one in entries(cache)} == SIZES
    assert left(cache) == list(SIZES)


@pytest.mark.parametrize(
    ("words", "gone"),
    [
        (("--older", "2.5"), 2),
        (("--keep", "3KB"), 2),  # 10 KB in all: 4 and 3 go
        (("--keep", "5.9KB"), 2),
        (("--keep", "6KB"), 1),
        (("--older", "3.5", "--keep", "3KB"), 2),
        (("--older", "9"), 0),
        (("--keep", "1GB"), 0),
        (("--older", "0"), 4),
    ],
)
def test_age_and_size(cache: Path, words: tuple[str, ...], gone: int) -> None:
    size = sum(list(SIZES.values())[:gone]) / 1e6
    assert f"would delete {gone} of 4 entries of outputs/cache, {size:.1f} MB" in clean(*words)
    assert len(left(cache)) == 4  # a dry run
    assert f"\ndeleted {gone} of 4" in "\n" + clean(*words, "--really")
    assert left(cache) == list(SIZES)[gone:]
    assert (cache / "latents" / "mine.txt").exists() and (cache / "mine").is_dir()


def test_without_a_limit_it_only_lists(cache: Path) -> None:
    out = clean("--really")
    assert "drawn images      1       0.0 MB   longest unused: 3 days" in out
    assert "choose with --older DAYS or --keep SIZE" in out and len(left(cache)) == 4


def test_a_link_is_not_followed(cache: Path, tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "a.png").write_bytes(b"1")
    (cache / "scenes-link").symlink_to(mine)
    clean("--older", "0", "--really")
    assert (mine / "a.png").exists()


def test_not_beside_a_run(cache: Path) -> None:
    run = RunDir(Path("outputs/train/a"))
    run.status.update(state="running", process=os.getpid())
    with run.lock(), pytest.raises(UserError, match="outputs/train/a is running and may need the cache"):
        clean("--older", "0", "--really")
    assert len(left(cache)) == 4


@pytest.mark.parametrize("text", ["2", "big", "-1GB", "2 PB", ""])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(UserError, match="is no size: give it as 2GB or 500MB"):
        parse_size(text)
