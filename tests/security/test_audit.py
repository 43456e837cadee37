"""Train, resume, evaluate, report, app: where they connect, listen and write, by Python's audit hook."""

import importlib.util
import json
import os
import tempfile
from pathlib import Path

import pytest
from helpers.commands import REPO, SMALL, run_python

LOOPBACK = ("'127.0.0.1'", "('127.0.0.1'", "('::1'", "'localhost'", "'::1'")
INDUCTOR = (f"{tempfile.gettempdir()}/torchinductor_", "/tmp/torchinductor_")  # torch's temporary folder
DEVICES = ("/dev/null", "/dev/shm", "/dev/tty", "/proc/self/clear_refs")


def is_within(path: str, folders: tuple[Path, ...]) -> bool:
    return any(Path(path).is_relative_to(folder) for folder in folders)


@pytest.fixture
def audited(tmp_path: Path, images: Path):
    """Runs commands with a home, a temporary folder and a cache of their own; returns (said, events)."""
    for name in ("home", "tmp", "work"):
        (tmp_path / name).mkdir()

    def run(*commands: list[str]) -> list[tuple[str, str]]:
        log = tmp_path / "events.jsonl"
        environment = os.environ | {
            "HOME": str(tmp_path / "home"), "TMPDIR": str(tmp_path / "tmp"), "PYTHONPATH": str(REPO),
            "PYTHONDONTWRITEBYTECODE": "1", "WANDB_MODE": "offline", "GRADIO_TEMP_DIR": "",
        }  # fmt: skip
        words = [json.dumps(command) for command in commands]
        script = str(REPO / "tests" / "helpers" / "audited.py")
        done = run_python(script, str(log), *words, cwd=tmp_path / "work", env=environment, timeout=1200)
        assert done.returncode == 0, done.stderr
        return [tuple(json.loads(line)) for line in log.read_text().splitlines()]

    return run


@pytest.mark.slow
def test_commands_stay_in_their_folders_and_connect_to_nobody(audited, tmp_path: Path, images: Path) -> None:
    run, cache = tmp_path / "work" / "outputs" / "run", tmp_path / "cache"
    small = [word for word in SMALL if not word.startswith(("cache_dir", "wandb", "trainer.max_epochs"))]
    training = [
        *small,
        "trainer.max_epochs=1",
        f"data.root={images}",
        "data.draw=null",
        "data.val_fraction=0.2",
    ]
    few = [
        "evaluate.samples=3",
        "evaluate.scan_samples=3",
        "evaluate.scales=[]",
        "sample.num_inference_steps=1",
    ]
    events = audited(
        ["train.py", *training, "wandb.mode=disabled", f"cache_dir={cache}", f"hydra.run.dir={run}"],
        ["train.py", f"resume={run}", "trainer.max_epochs=2", f"cache_dir={cache}"],
        ["ghibli", "evaluate", str(run), f"cache_dir={cache}", "data.reference=null", *few],
        ["ghibli", "report", str(run)],
        ["ghibli", "list"],
        ["ghibli", "app", "outputs/run"],
    )
    connected = [target for event, target in events if event.startswith("socket.")]
    assert [target for target in connected if not target.startswith(LOOPBACK)] == []
    home = tmp_path / "home"
    own = (run, cache, tmp_path / "tmp", home / ".cache" / "matplotlib", home / ".config" / "matplotlib")
    made = {("os.mkdir", str(home / name)) for name in (".cache", ".config")}  # for Matplotlib's fonts
    made.add(("os.mkdir", str(run.parent)))
    seed = importlib.util.find_spec("gradio").submodule_search_locations[0]  # written at the first start
    made.add(("open", f"{seed}/hash_seed.txt"))
    changed = {(event, path) for event, path in events if not event.startswith("socket.")}
    outside = {(event, path) for event, path in changed if not is_within(path, own)}
    assert {(e, p) for e, p in outside if not p.startswith((*DEVICES, *INDUCTOR))} - made == set()
    for path in (run / "status.json", run / "evaluation.json", run / "report.html"):  # the hook sees writes
        assert ("os.rename", str(path)) in changed
    assert any(event == "open" and is_within(path, (cache,)) for event, path in changed)
    pages = {path for _, path in changed if path.startswith(f"{tmp_path / 'tmp'}/ghibli-page-")}
    assert any(path.endswith(".png") for path in pages)
    assert not list((tmp_path / "tmp").glob("ghibli-page-*"))
    assert not (tmp_path / "tmp" / "gradio").exists()  # which all users of a machine would share
