"""Fixtures: the demo base, the real configuration shrunk, and train.py in a process of its own."""

import atexit
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["WANDB_MODE"] = "offline"
os.environ.setdefault("OMP_NUM_THREADS", "1")  # two test processes side by side on two cores

from hydra import compose, initialize_config_dir

from ghibli import base_model, config, scenes
from ghibli.schema import Config

REPO = Path(__file__).parents[1]
CACHE = tempfile.mkdtemp(prefix="ghibli-tests-")  # scores of the base, shared by the runs of this process
atexit.register(shutil.rmtree, CACHE, ignore_errors=True)
SMALL = (
    "model=demo", "data=demo", "data.batch_size=2", "data.accumulate=2", "trainer.max_epochs=2",
    "sample.num_inference_steps=2", "sample.every_n_epochs=1", "checkpoint.every_n_steps=2",
    "trainer.log_every_n_steps=1", "validation.items_per_picture=2", "wandb.mode=disabled",
    f"cache_dir={CACHE}",
)  # fmt: skip


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 24 drawn pictures with captions, of which 2 are held out."""
    root = tmp_path_factory.mktemp("pictures")
    scenes.write_folder(root, "drawn", 24, scenes.FINETUNE_SEEDS.start)
    return root


@pytest.fixture
def base() -> base_model.BaseModel:
    """A fresh demo base; tests may attach adapters to it."""
    return base_model.load("demo")


@pytest.fixture(scope="session")
def make_config(pictures: Path) -> Callable[..., Config]:
    """Composes conf/train.yaml as `train.py` does, shrunk, with further overrides."""
    config.register()

    def make(*overrides: str) -> Config:
        with initialize_config_dir(str(REPO / "conf"), version_base="1.3"):
            words = [*SMALL, f"data.root={pictures}", "data.draw=null", *overrides]
            return config.to_config(compose("train", overrides=words))

    return make


@pytest.fixture
def train_py(pictures: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs train.py, shrunk, as a user would; `small=False` leaves the settings alone."""

    def run(*overrides: str, small: bool = True, **options: object) -> subprocess.CompletedProcess[str]:
        words = [*SMALL, f"data.root={pictures}", "data.draw=null"] if small else []
        return run_python(str(REPO / "train.py"), *words, *overrides, **options)

    return run


def run_python(*words: str, **options: object) -> subprocess.CompletedProcess[str]:
    """Runs this Python with the words from the repository's root and returns what it printed."""
    defaults = {"cwd": REPO, "capture_output": True, "text": True, "timeout": 300}
    return subprocess.run([sys.executable, *words], **(defaults | options))
