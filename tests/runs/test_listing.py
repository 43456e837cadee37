"""`ghibli list`: what a row says, what fits beside each other, and that a status is read once."""

from pathlib import Path

import pytest

from ghibli.runs import listing, status
from ghibli.runs.find import OUTPUTS, folders_with
from ghibli.runs.folder import RunDir
from ghibli.runs.listing import ListedRun, chosen, listed
from ghibli.runtime.errors import UserError

TRIAL = "lora.rank=8,loss.guidance=7.5,loss.caption_dropout=0.1,optimizer.lr=0.0005,seed="


@pytest.fixture
def outputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Seven runs of two bases, named as a sweep names them; one more failed."""
    monkeypatch.chdir(tmp_path)
    for number in range(7):
        run = RunDir(Path("outputs/sweeps/2026-01-02_03-04-05") / f"{TRIAL}{number}")
        run.status.update(
            state="finished", started=f"2026-01-02T03:0{number}:05+00:00", settings="LoRA rank 8, guided",
            epoch=6, gain=0.1 + 0.01 * ((5 * number) % 7), gain_se=0.0123, base_hash="ab"[number % 2] * 64,
            base="demo", images="film", data_hash="c" * 64,
        )  # fmt: skip
    RunDir(Path("outputs/train/bad")).status.update(
        state="failed", started="2026-01-03T00:00:00+00:00", settings="LoRA rank 8", reason="no usable image",
        base_hash="a" * 64,
    )  # fmt: skip
    return tmp_path / "outputs"


def rows() -> list[ListedRun]:
    found = listed(map(RunDir, folders_with("status.json", OUTPUTS)))
    return chosen(found, [], "started", None)


@pytest.mark.parametrize("width", [80, 100, 120])
def test_a_row_fits_and_its_gain_and_date_are_whole(outputs: Path, width: int) -> None:
    laid_out = listing.lines(rows(), width)
    assert all(len(line) <= width for line in laid_out)
    assert laid_out[-1] == "  failed: no usable image"
    for row, line in zip(rows(), laid_out[1:-1], strict=True):
        assert row.gain_text in line and row.cells[1] in line and row.state in line
        assert row.run.path.name.rpartition(",")[2] in line  # where names of trials differ


def test_a_pipe_gets_everything(outputs: Path) -> None:
    lines = listing.lines(rows(), None)
    assert all(str(row.run.path) in line for row, line in zip(rows(), lines[1:-1], strict=True))
    assert "LoRA rank 8" in lines[-2] and lines[-1] == "  failed: no usable image"


def test_trials_are_told_apart_by_what_differs(tmp_path: Path) -> None:
    """Settings that all trials of a study share are left out of their names, and so are sections."""
    names = [f"data.root=x,lora.targets=[to_q,to_k],lora.rank={rank},seed=1" for rank in (4, 8)]
    found = [ListedRun(RunDir(Path("outputs/s") / name), {}, "finished") for name in names]
    assert listing.short_names(found) == ["outputs/s/rank=4", "outputs/s/rank=8"]
    assert listing.short_names(found[:1]) == [str(found[0].run.path)]
    plain = [ListedRun(RunDir(Path("outputs/train") / name), {}, "finished") for name in ("a", "b")]
    assert listing.short_names(plain) == ["outputs/train/a", "outputs/train/b"]


def test_words_are_looked_for_in_base_images_and_reason(outputs: Path) -> None:
    assert len(chosen(rows(), ["film"], "started", None)) == 7
    assert len(chosen(rows(), ["usable"], "started", None)) == 1


def test_sort_filter_and_last(outputs: Path) -> None:
    best = chosen(rows(), ["finished", "seed="], "gain", None)
    assert [row.gain for row in best] == sorted(row.gain or 0 for row in best) and len(best) == 7
    assert chosen(rows(), [], "gain", 2) == best[-2:]
    assert [row.run.path.name for row in chosen(rows(), ["failed"], "started", None)] == ["bad"]
    names = [str(row.run.path) for row in chosen(rows(), [], "name", None)]
    assert names == sorted(names)
    with pytest.raises(UserError, match="--sort gian is unknown.*did you mean gain"):
        chosen(rows(), [], "gian", None)


def test_gains_over_different_bases_stand_apart(outputs: Path) -> None:
    groups = {label: len(own) for label, own in listing.by_base(rows()).items()}
    assert groups == {
        "base demo (bbbbbbb), images film (ccccccc)": 3,
        "base demo (aaaaaaa), images film (ccccccc)": 5,  # with the newest run, which failed
    }


def test_gains_over_different_images_stand_apart(outputs: Path) -> None:
    RunDir(Path("outputs/train/other")).status.update(
        state="finished", started="2026-01-04", base="demo", base_hash="a" * 64, images="film", gain=0.9,
        data_hash="d" * 64,
    )  # fmt: skip
    RunDir(Path("outputs/train/early")).status.update(
        state="failed", started="2026-01-05", base="sd15", images="film", reason="no such base"
    )
    labels = list(listing.by_base(rows()))
    assert labels[-2:] == ["base demo (aaaaaaa), images film (ddddddd)", "base sd15, images film"]


def test_a_link_to_another_disk_is_followed_once(outputs: Path, tmp_path: Path) -> None:
    elsewhere = RunDir(tmp_path / "disk" / "run")
    elsewhere.status.update(state="finished")
    for name in ("one", "two"):
        (outputs / name).symlink_to(elsewhere.path.parent)
    assert len(rows()) == 9


def test_five_hundred_runs_are_read_once_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for number in range(500):
        folder = Path("outputs") / f"{number:03}"
        folder.mkdir(parents=True)
        (folder / "status.json").write_text(f'{{"state": "finished", "started": "{number:04}"}}')
    reads: list[Path] = []
    read = status.read_json
    monkeypatch.setattr(status, "read_json", lambda path: reads.append(path) or read(path))
    assert len(listing.lines(rows(), 80)) == 501
    assert len(reads) == 500
