"""The default guidance scale of what is loaded."""

import json
from collections.abc import Callable
from pathlib import Path
from unittest.mock import Mock

import pytest

from ghibli.config.files import to_yaml
from ghibli.config.schema import Config
from ghibli.inference.load import LoadedModel
from ghibli.runs.folder import RunDir

SCAN = {"1": [9.0, 0.5], "4": [0.7, 0.2], "7.5": [0.9, 0.2], "15": [2.0, 0.3]}


@pytest.fixture
def default(make_config: Callable[..., Config], tmp_path: Path) -> Callable[..., float]:
    """The default scale of a run with these settings and this content of its evaluation.json."""

    def of(words: list[str], evaluation: object = None) -> float:
        config, run = make_config(*words), RunDir(tmp_path)
        run.config.write_text(to_yaml(config))
        if evaluation is not None:
            (tmp_path / "evaluation.json").write_text(json.dumps(evaluation))
        return LoadedModel(Mock(), config, [1.0], [str(tmp_path)]).guidance

    return of


def test_the_scale_of_a_guided_training_is_that_of_its_scan(default: Callable[..., float]) -> None:
    assert default(["loss.guidance=7.5"]) == 15
    assert default(["loss.guidance=7.5"], {"scan": {"run": SCAN}}) == 4
    assert default(["loss.guidance_target=7.5"], {"scan": {"run": SCAN}}) == 4


def test_an_ordinary_training_keeps_the_usual_scale(default: Callable[..., float]) -> None:
    assert default([], {"scan": {"run": SCAN}}) == 7.5


@pytest.mark.parametrize("scan", [{}, {"run": {}}, {"run": {"x": [1]}}, {"run": {"nan": [1]}}, {"run": 3}, 5])
def test_a_damaged_scan_is_none(default: Callable[..., float], scan: object) -> None:
    assert default(["loss.guidance=7.5"], {"scan": scan}) == 15


def test_a_guided_target_is_sampled_at_1(default: Callable[..., float]) -> None:
    assert default(["loss.guidance_target=7.5"]) == 1


def test_without_a_run_it_is_the_usual_one(make_config: Callable[..., Config], tmp_path: Path) -> None:
    assert LoadedModel(Mock(), make_config("loss.guidance=7.5"), [], [str(tmp_path / "no")]).guidance == 7.5
