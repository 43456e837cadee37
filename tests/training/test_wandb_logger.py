"""W&B: never asks, never waits long, tells no secret, and the offline file holds the whole run."""

import json
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers.wandb_files import environment, offline_records

SECRET = "0123456789abcdef0123456789abcdef01234567"


@pytest.mark.slow
def test_unreachable_server_means_offline_after_ten_seconds(train_py: Callable, tmp_path: Path) -> None:
    start = time.monotonic()
    done = train_py(
        "wandb.mode=auto", "trainer.max_epochs=1", f"hydra.run.dir={tmp_path}",
        env=environment(WANDB_API_KEY=SECRET, WANDB_BASE_URL="http://127.0.0.1:9", OTHER_TOKEN=SECRET),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "W&B does not answer: logging offline" in done.stdout
    assert "wandb beta leet" in done.stdout
    assert time.monotonic() - start < 120
    for file in tmp_path.rglob("*"):
        assert not file.is_file() or SECRET.encode() not in file.read_bytes(), file


@pytest.mark.slow
def test_offline_run_holds_settings_curves_and_grids(train_py: Callable, tmp_path: Path) -> None:
    done = train_py("wandb.mode=auto", f"hydra.run.dir={tmp_path}", env=environment(HOME=str(tmp_path)))
    assert done.returncode == 0, done.stderr
    records = json.dumps(offline_records(tmp_path))
    for word in (
        "train/loss",
        "probe/val_gain",
        "probe/gain_by_timestep",
        "probe/gain_curve",
        "samples",
        "loss",
        "guidance",
        "git_commit",
        "best/val_gain",
    ):
        assert word in records
    media = list((tmp_path / "wandb").glob("offline-run-*/files/media/images/*.png"))
    assert len(media) == 2  # after epoch 1, and the end


@pytest.mark.slow
def test_online_without_a_login_is_refused(train_py: Callable, tmp_path: Path) -> None:
    done = train_py("wandb.mode=online", f"hydra.run.dir={tmp_path}", env=environment(HOME=str(tmp_path)))
    assert done.returncode == 2
    assert done.stderr.startswith("error: wandb.mode=online")
    assert len(done.stderr.splitlines()) == 1
