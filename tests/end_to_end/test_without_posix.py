"""A demo run where Python lacks what Windows lacks; Windows itself was not tried."""

import json
from pathlib import Path

import pytest
from helpers.commands import QUICK, REPO, SMALL, run_python

HIDE = """
import os, runpy, signal, sys
import diffusers, filelock, lightning, peft, psutil, torch, transformers, wandb
for name in ("fcntl", "grp", "pwd", "resource", "termios"):
    sys.modules[name] = None
for name in ("SIGALRM", "SIGHUP", "SIGQUIT", "SIGUSR2"):
    delattr(signal, name)
for name in ("O_NOFOLLOW", "fork", "geteuid", "getloadavg", "getuid", "mkfifo", "sched_getaffinity", "uname"):
    delattr(os, name)
sys.argv = ["train.py", *sys.argv[1:]]
runpy.run_path("train.py", run_name="__main__")
"""


@pytest.mark.slow
def test_a_run_trains_to_its_end(tmp_path: Path, images: Path) -> None:
    """SIGUSR1, SIGKILL and O_NONBLOCK stay: Lightning and filelock ask for them on this system."""
    words = [*SMALL, *QUICK, f"data.root={images}", "data.draw=null", f"hydra.run.dir={tmp_path / 'run'}"]
    done = run_python("-c", HIDE, *words, cwd=REPO)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "run" / "status.json").read_text())["state"] == "finished"
