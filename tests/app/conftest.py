"""A folder with a finished run, the page served in it, and a browser."""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers.browsers import new_browser
from helpers.commands import GRIDS
from helpers.page_requests import RUN

import train
from ghibli.runs.folder import RunDir

QUICK = (*GRIDS, "sample.samplers=[ddim]", "sample.guidance=[7.5]", "model.resolution=64",
         "trainer.max_epochs=1", "optimizer.lr=5e-3", "lora.rank=4")  # fmt: skip


@pytest.fixture(scope="session")
def trained(make_config: Callable, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run's folder."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    train.run(make_config(*QUICK), RunDir(folder))
    return folder


@pytest.fixture(scope="module")
def outside(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder in which the page is served, with a finished run below outputs/."""
    folder = tmp_path_factory.mktemp("app")
    shutil.copytree(trained, folder / RUN)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        yield folder


@pytest.fixture(scope="module")
def app_session(outside: Path) -> Any:
    """A page's session, which keeps the model that it has loaded."""
    session = pytest.importorskip("ghibli.app.session")
    return session.AppSession(["model=demo", "data=demo"])


@pytest.fixture(scope="module")
def address(outside: Path) -> Iterator[str]:
    """The address of the page, while it is served."""
    served = pytest.importorskip("ghibli.app.page")
    page, address = served.serve(["model=demo", "data=demo"], "127.0.0.1", None)
    yield address
    page.close()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    driver = new_browser(width=1280, height=1000)
    yield driver
    driver.quit()
