"""Fixtures: the demo base, the real configuration shrunk, and train.py in a process of its own."""

import atexit
import copy
import gc
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Generator, Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
from helpers.commands import CACHE, REPO, SMALL, run_python
from transformers import CLIPTokenizer

import ghibli.runtime.console  # noqa: F401  # silences bitsandbytes before it is imported

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["WANDB_MODE"] = "offline"
os.environ["TRACKIO_DIR"] = f"{CACHE}/trackio"  # never the store in the home folder
os.environ.setdefault("OMP_NUM_THREADS", "1")  # two test processes side by side on two cores
os.environ["PATH"] = os.pathsep.join(
    [os.path.dirname(sys.executable), os.environ["PATH"]]
)  # as once activated

from hydra import compose, initialize_config_dir

from ghibli.config.paths import DEMO
from ghibli.config.schema import Config
from ghibli.demo.scenes.scene import FINETUNE_SEEDS, write_folder
from ghibli.models.base import BaseModel
from ghibli.models.load import load, load_folder
from ghibli.runs.compose import register, to_config
from ghibli.runtime import console  # noqa: F401  prints what the package logs, whatever a test imports

atexit.register(shutil.rmtree, CACHE, ignore_errors=True)


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the options of tests/gpu."""
    parser.addoption("--device", default="cuda", choices=["cuda", "cpu"], help="of tests/gpu")
    parser.addoption("--tiny", action="store_true", help="tests/gpu on the demo, in minutes on a CPU")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the files that take longest, so that no worker idles at the end beside a long one."""
    folders = ("end_to_end", "training", "sweeps", "app", "inference", "evaluation")

    def place(item: pytest.Item) -> int:
        return next((at for at, name in enumerate(folders) if name in item.path.parts), len(folders))

    items.sort(key=place)


def pytest_collection_finish() -> None:
    """Exempt what the libraries hold from garbage collection: each load of a base would search it all."""
    gc.freeze()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Escape what a test printed of names that are not UTF-8, which the two test processes could not tell."""
    report = yield
    report.sections = [
        (name, text.encode(errors="backslashreplace").decode()) for name, text in report.sections
    ]
    return report


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 24 drawn images with captions, of which 2 are held out."""
    root = tmp_path_factory.mktemp("images")
    write_folder(root, "drawn", 24, FINETUNE_SEEDS.start)
    return root


demo_parts = cache(partial(load_folder, DEMO, "demo"))


@pytest.fixture(scope="module", autouse=True)
def demo_is_read_once(request: pytest.FixtureRequest) -> Iterator[None]:
    """Let each load of the demo copy what the first one has read; not where reading is what is tested."""
    if request.path.parent.name in ("models", "rehearsal"):
        yield
        return
    parts = demo_parts()

    def copied(folder: Path, path: str) -> tuple[Any, ...]:
        if folder != DEMO:
            return load_folder(folder, path)
        return CLIPTokenizer.from_pretrained(DEMO / "tokenizer"), *copy.deepcopy(parts[1:])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ghibli.models.load.load_folder", copied)
        yield


@pytest.fixture(scope="module")
def model() -> BaseModel:
    """The demo base, shared by tests that leave it as it is."""
    return load("demo")


@pytest.fixture
def base() -> BaseModel:
    """A fresh demo base; tests may attach adapters to it."""
    return load("demo")


@pytest.fixture(scope="session")
def make_config(images: Path) -> Callable[..., Config]:
    """Composes conf/train.yaml as `train.py` does, shrunk, with further overrides."""
    register()

    @cache
    def composed(*overrides: str) -> Config:
        with initialize_config_dir(str(REPO / "conf"), version_base="1.3"):
            words = [*SMALL, f"data.root={images}", "data.draw=null", *overrides]
            return to_config(compose("train", overrides=words))

    def make(*overrides: str) -> Config:
        return copy.deepcopy(composed(*overrides))

    return make


@pytest.fixture
def train_py(images: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs train.py, shrunk, as a user would; `small=False` leaves the settings alone."""

    def run(*overrides: str, small: bool = True, **options: object) -> subprocess.CompletedProcess[str]:
        words = [*SMALL, f"data.root={images}", "data.draw=null"] if small else []
        return run_python(str(REPO / "train.py"), *words, *overrides, **options)

    return run
