"""The distance of sampled images in training: right, noticed by no weight, and whole after a resume."""

from collections.abc import Callable
from pathlib import Path

import pytest
from faults.compare import different_parts
from helpers.stand_in import StandIn, stop_at

import train
from ghibli.adapters.trained import starting_base, trained_base
from ghibli.config.schema import Config
from ghibli.data import sources
from ghibli.demo.scenes.scene import EVALUATION_SEEDS, write_folder
from ghibli.diffusion.samplers import Cell
from ghibli.evaluation import samples
from ghibli.evaluation.features import FeatureExtractor, ReferenceSet
from ghibli.runs.folder import RunDir
from ghibli.runs.settings import finished_config
from ghibli.runtime.files import read_rows

NAME = "evaluate/kernel_distance"


@pytest.fixture(scope="module")
def make(make_config: Callable[..., Config], tmp_path_factory: pytest.TempPathFactory) -> Callable:
    """Settings of two epochs that measure six images after each, or not."""
    reference = tmp_path_factory.mktemp("reference")
    write_folder(reference, "drawn", 12, EVALUATION_SEEDS.start)

    def settings(every_n_epochs: int) -> Config:
        return make_config(
            f"data.reference={reference}", "data.reference_draw=null", "sample.every_n_epochs=0",
            "lora.rank=4", "evaluate.epoch_samples=6", "evaluate.batch_size=4", "loss.guidance=7.5",
            f"evaluate.every_n_epochs={every_n_epochs}",
        )  # fmt: skip

    return settings


@pytest.fixture(scope="module")
def measured(make: Callable, tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    run = RunDir(tmp_path_factory.mktemp("measured"))
    train.run(make(1), run)
    return run


@pytest.mark.slow
def test_the_points_are_the_base_and_the_trained_model_measured_alone(measured: RunDir) -> None:
    config = finished_config(measured)
    images, training = sources.real_images(config)
    base = starting_base(config)
    ruler = samples.SampleCache(config, FeatureExtractor(config, base), [image.caption for image in images])
    reference = ReferenceSet(*(ruler.measure_real("", part)["features"] for part in (images, training)))
    rows = read_rows(measured.distances)
    assert [(row["step"], row["epoch"]) for row in rows] == [("0", "0"), ("5", "1"), ("10", "2")]
    assert measured.status.read()["best_epoch"] == 2
    own_scales = (rows[0], base, 7.5), (rows[2], trained_base(measured, config), 15)  # its own
    for row, model, scale in own_scales:
        wanted = reference.kernel(ruler.measure_model(model, Cell("ddim", scale), 6)["features"])
        assert float(row[NAME]) == pytest.approx(wanted.value, rel=1e-3)
        assert float(row[f"{NAME}_se"]) == pytest.approx(wanted.standard_error, rel=1e-3)


@pytest.mark.slow
def test_training_does_not_notice(measured: RunDir, make: Callable, tmp_path: Path) -> None:
    train.run(make(0), RunDir(tmp_path))
    assert different_parts(measured.path, tmp_path) == []
    assert not RunDir(tmp_path).distances.exists()


@pytest.mark.slow
def test_a_resumed_run_has_the_same_curve(measured: RunDir, make: Callable, tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    with pytest.MonkeyPatch.context() as patch:
        stop_at(patch, 18)
        with pytest.raises(StandIn):
            train.run(make(1), run)
    train.run(make(1), run)
    assert read_rows(run.distances) == read_rows(measured.distances)
