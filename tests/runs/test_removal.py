"""`ghibli rm`: what a run wrote goes, and nothing else."""

import json
import os
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

from ghibli.runs.folder import RunDir
from ghibli.runs.removal import plan_removal, remove
from ghibli.runtime.errors import UserError


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    """A finished run with files in folders of its own and of Hydra."""
    run = RunDir(tmp_path / "outputs" / "run")
    run.status.update(state="finished")
    for name in ("checkpoints/last.ckpt", "samples/a.png", ".hydra/hydra.yaml", "wandb/run/a/b.txt", ".lock"):
        (run.path / name).parent.mkdir(parents=True, exist_ok=True)
        (run.path / name).write_bytes(b"12345")
    return run


def test_nothing_is_deleted_before_it_is_asked_for(run: RunDir) -> None:
    plan = plan_removal(run)
    assert plan.summary(done=False).startswith(f"would delete {run.path}: 6 files")
    assert len(plan.files) == 6 and all(file.exists() for file in plan.files)


def test_a_run_goes_as_a_whole(run: RunDir) -> None:
    remove(plan_removal(run))
    assert not run.path.exists() and run.path.parent.is_dir()


def test_a_file_that_no_run_writes_stays(run: RunDir) -> None:
    note = run.path / "my notes.txt"
    note.write_text("mine")
    plan = plan_removal(run)
    remove(plan)
    assert "what no run writes stays: my notes.txt" in plan.summary(done=True)
    assert list(run.path.iterdir()) == [note] and note.read_text() == "mine"


@pytest.mark.parametrize("stored", [{"listed": ""}, {"listed": "0" * 64}, {}, [], None])
def test_a_list_of_images_that_was_edited_stays(run: RunDir, stored: Any) -> None:
    """Another run may be trained with it; one that is as `ghibli influence` wrote it goes."""
    run.exclude_list.write_text("a.png\n")
    run.influence.write_text("{" if stored is None else json.dumps(stored))
    plan = plan_removal(run)
    assert "what no run writes stays: influence_exclude.txt" in plan.summary(done=False)
    run.influence.write_text(json.dumps({"listed": sha256(b"a.png\n").hexdigest()}))
    assert plan_removal(run).others == []
    remove(plan)
    assert list(run.path.iterdir()) == [run.exclude_list] and run.exclude_list.read_text() == "a.png\n"


def test_what_a_link_leads_to_stays(run: RunDir, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "mine.png").write_bytes(b"1")
    (run.path / "samples" / "link").symlink_to(elsewhere)
    with pytest.raises(UserError, match="is a link to"):
        remove(plan_removal(run))
    assert (elsewhere / "mine.png").exists()


def test_a_link_goes_and_what_it_names_beside_it_stays(run: RunDir) -> None:
    (run.path / "mine").mkdir()
    (run.path / "mine" / "kept.txt").write_text("mine")
    (run.path / "unet").symlink_to("mine")
    remove(plan_removal(run))
    assert [path.name for path in run.path.rglob("*")] == ["mine", "kept.txt"]


def test_what_changes_between_the_list_and_the_deletion_is_one_line(run: RunDir) -> None:
    """A file that another program writes meanwhile stays, and the rest can be deleted by the same command."""
    plan = plan_removal(run)
    (run.path / "samples" / "new.png").write_bytes(b"new")
    with pytest.raises(
        UserError, match=r"samples cannot be deleted \(Directory not empty\): what is left of"
    ):
        remove(plan)
    assert (run.path / "samples" / "new.png").read_bytes() == b"new"
    remove(plan_removal(run))
    assert not run.path.exists()
    remove(plan)  # deleted by another command in the meantime
    assert not run.path.exists()


def test_what_is_no_run_or_runs_is_refused(run: RunDir, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"is no run: it has no status\.json"):
        plan_removal(RunDir(tmp_path))
    with pytest.raises(UserError, match="no such folder"):
        plan_removal(RunDir(tmp_path / "none"))
    run.status.update(state="running", process=os.getpid())
    with run.lock(), pytest.raises(UserError, match="is running: stop it first"):
        plan_removal(run)
