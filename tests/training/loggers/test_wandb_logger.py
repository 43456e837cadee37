"""W&B: never asks, never waits long, tells no secret, and the offline file holds the whole run."""

import json
import os
import shlex
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path
from unittest.mock import MagicMock

import psutil
import pytest
import wandb
from helpers.commands import GRIDS, run_python
from helpers.dashboards import use_all
from helpers.wandb_files import environment, offline_records
from wandb.sdk.wandb_setup import _WandbSetup

from ghibli.config.hydra_errors import hydra_errors
from ghibli.runs.folder import RunDir
from ghibli.runtime.errors import UserError
from ghibli.training.loggers import choice, dashboard, wandb_logger

SECRET = "0123456789abcdef0123456789abcdef01234567"


@pytest.mark.slow
def test_unreachable_server_means_offline_after_ten_seconds(train_py: Callable, tmp_path: Path) -> None:
    start = time.monotonic()
    done = train_py(
        "wandb.mode=auto", "trainer.max_epochs=1", f"hydra.run.dir={tmp_path}", warm=True,
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
    words = (*GRIDS, "sample.samplers=[ddim]", "wandb.mode=auto", f"hydra.run.dir={tmp_path}")
    done = train_py(*words, warm=True, env=environment(HOME=str(tmp_path)))
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
    words = ("wandb.mode=online", f"hydra.run.dir={tmp_path}")
    done = train_py(*words, warm=True, env=environment(HOME=str(tmp_path)))
    assert done.returncode == 2
    assert done.stderr.startswith("error: wandb.mode=online")
    assert len(done.stderr.splitlines()) == 1


# The dashboard never stops a run

OFFLINE_RUN = """
import os, socket, sys
from pathlib import Path

import wandb
from PIL import Image
from wandb.sdk.wandb_setup import _WandbSetup

asked = []
def note(event, words):
    if event == "socket.getaddrinfo" or event == "socket.connect" and words[0].family != socket.AF_UNIX:
        asked.append((event, str(words[-1])))
sys.addaudithook(note)

from ghibli.config.schema import Config
from ghibli.runs.compose import compose_config
from ghibli.runs.folder import RunDir
from ghibli.training.loggers import choice, tables

run = RunDir(Path(sys.argv[1]))
(logger,) = choice.start(compose_config(["wandb.mode=auto"]), run, "name")
logger.log_metrics({"loss": 1.0}, step=1)
logger.log_image("samples", Image.new("RGB", (8, 8)), "caption", 1)
row = {"epoch": 0} | {f"probe/val_gain{end}": 0.0 for end in ("", "_low", "_high")}
logger.log_table(tables.gain_curve([row]), 1)
choice.close_all()
assert not logger.is_lost
assert not [name for name in os.environ if name.startswith("WANDB_")], os.environ
print(asked)
"""


def lone_listener() -> socket.socket:
    """Stands in for a proxy: whatever a process wants on the network, it asks here first."""
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    listener.listen()
    listener.setblocking(False)
    return listener


@pytest.mark.slow
def test_an_offline_run_asks_nothing_of_the_network_and_needs_no_home_folder(tmp_path: Path) -> None:
    """By audit hook for Python, and with a proxy for W&B's service, which is another program."""
    listener = lone_listener()
    proxy = f"http://127.0.0.1:{listener.getsockname()[1]}"
    run, plots = tmp_path / "run", str(tmp_path / "plots")
    places = {"HOME": "/proc/nowhere", "MPLCONFIGDIR": plots, "HTTP_PROXY": proxy, "HTTPS_PROXY": proxy}
    done = run_python("-c", OFFLINE_RUN, str(run), env=environment(**places, NO_PROXY="", no_proxy=""))
    assert (done.returncode, done.stdout.splitlines()[-1:]) == (0, ["[]"]), done.stderr
    with pytest.raises(BlockingIOError):
        listener.accept()
    listener.close()
    names = {path.name for path in run.rglob("*")}
    assert not names & {"requirements.txt", "wandb-metadata.json", "conda-environment.yaml", "diff.patch"}
    assert "github.com" not in json.dumps(offline_records(run))


def test_settings_in_a_run_folder_choose_no_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stranger's run would have the user's key sent to its own server."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    for place in ("wandb/settings", "wandb/config/settings", ".wandb/settings", ".config/wandb/settings"):
        (tmp_path / "run" / place).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "run" / place).write_text("[default]\nbase_url = http://127.0.0.1:9\n")
    ours = wandb.Settings().base_url
    wandb_logger.set_variables(RunDir(tmp_path / "run"))
    try:
        assert _WandbSetup(os.getpid()).settings.base_url == ours
        place = Path(os.environ["WANDB_CONFIG_DIR"])
        place.mkdir()
        (place / "settings").write_text("[default]\nbase_url = http://127.0.0.1:9\n")
        assert _WandbSetup(os.getpid()).settings.base_url == "http://127.0.0.1:9", "the attack is a real one"
    finally:
        wandb_logger.close()


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """No settings of W&B in the environment."""
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setattr(wandb_logger, "STOP_SECONDS", 2)
    return monkeypatch


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The warnings of the dashboards."""
    lines: list[str] = []
    monkeypatch.setattr(dashboard.log, "warning", lines.append)
    return lines


@pytest.mark.parametrize("how", ["killed", "hanging"])
def test_a_service_that_dies_in_mid_run_is_one_warning(
    how: str, alone: pytest.MonkeyPatch, make_config: Callable, tmp_path: Path, said: list[str]
) -> None:
    (logger,) = choice.start(make_config("wandb.mode=auto"), RunDir(tmp_path), "name")
    services = [one for one in psutil.Process().children() if one.name().startswith("wandb")]
    assert services
    for service in services:
        service.send_signal(signal.SIGKILL if how == "killed" else signal.SIGSTOP)
    if how == "killed":
        psutil.wait_procs(services)
    use_all(logger)
    choice.close_all()
    assert len(said) == 1 and said[0].endswith("going on without it; metrics.csv has all numbers")
    assert not [one for one in services if one.is_running() and one.status() != psutil.STATUS_ZOMBIE]


def test_a_service_that_does_not_start_is_one_warning(
    alone: pytest.MonkeyPatch, make_config: Callable, tmp_path: Path, said: list[str]
) -> None:
    broken = tmp_path / "wandb-core"
    broken.write_text("#!/bin/sh\nexit 3\n")
    broken.chmod(0o755)
    alone.setattr("wandb.sdk.lib.service.service_process.get_core_path", lambda: str(broken))
    assert choice.start(make_config("wandb.mode=auto"), RunDir(tmp_path / "run"), "name") == []
    choice.close_all()
    assert len(said) == 1 and said[0].startswith("W&B failed (")


def test_an_error_of_any_call_is_one_warning(
    alone: pytest.MonkeyPatch, make_config: Callable, tmp_path: Path, said: list[str]
) -> None:
    """A run of W&B all of whose parts raise, as none of wandb's own types of error does."""

    class Broken(MagicMock):
        offline, id = True, "abc"

        def _record(self, *words: object, **more: object) -> None:
            raise RuntimeError("no more")

        log = alert = finish = _record
        define_metric = MagicMock()

    alone.setattr("wandb.init", lambda **settings: Broken())
    (logger,) = choice.start(make_config("wandb.mode=offline"), RunDir(tmp_path), "name")
    use_all(logger)
    choice.close_all()
    assert len(said) == 1 and said[0].startswith("W&B failed (no more)")


# What the environment and the settings ask for


@pytest.mark.parametrize(
    ("name", "value", "mode", "expected"),
    [
        ("WANDB_MODE", "disabled", "auto", "disabled"), ("WANDB_MODE", "Disabled", "auto", "disabled"),
        ("WANDB_DISABLED", "true", "auto", "disabled"), ("WANDB_MODE", "offline", "auto", "offline"),
        ("WANDB_MODE", "dryrun", "auto", "offline"), ("WANDB_MODE", "online", "auto", "auto"),
        ("WANDB_MODE", "disabled", "offline", "offline"), ("WANDB_MODE", "offline", "disabled", "disabled"),
    ],
)  # fmt: skip
def test_auto_follows_the_environment(
    name: str, value: str, mode: str, expected: str, alone: pytest.MonkeyPatch
) -> None:
    alone.setenv(name, value)
    assert wandb_logger.chosen_mode(mode) == expected


@pytest.mark.parametrize("project", ["a/b", "x" * 129, "what?", ""])
def test_a_project_that_wandb_refuses_is_refused_at_once(project: str, make_config: Callable) -> None:
    wanted = r"^wandb.project=.* is out of range: 1 to 128 characters"
    with pytest.raises(UserError, match=wanted), hydra_errors():
        make_config(f"wandb.project='{project}'")


def test_a_resumed_run_keeps_its_id_and_all_its_parts_are_named(
    alone: pytest.MonkeyPatch, make_config: Callable, tmp_path: Path
) -> None:
    run, asked = RunDir(tmp_path / "a (1), $HOME"), []

    def init(**settings: object) -> MagicMock:
        asked.append(settings["id"])
        assert settings["settings"].host == wandb_logger.HOST
        (run.path / "wandb" / f"offline-run-2026010{len(asked)}_000000-abc").mkdir(parents=True)
        return MagicMock(offline=True, id="abc")

    alone.setattr("wandb.init", init)
    boards = [wandb_logger.open_dashboard(make_config("wandb.mode=offline"), run, "name") for _ in range(2)]
    wandb_logger.close()
    assert asked == [None, "abc"]
    leet, sync = boards[-1].how_to_look()
    words = shlex.split(sync.partition("(once")[0])
    parts = sorted((run.path / "wandb").glob("offline-run-*"))
    assert (Path(words[0]).name, words[1]) == ("wandb", "sync") and [
        Path(word).resolve() for word in words[2:]
    ] == parts
    assert len(parts) == 2 and Path(shlex.split(leet)[-1]).resolve() == parts[-1]
    (parts[0] / "run-abc.wandb.synced").touch()
    assert wandb_logger.offline_parts(run) == [os.path.relpath(parts[1])]
