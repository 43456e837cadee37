"""compute=NAME: presets for a card, which change memory and speed and not what is learned; name=NAME."""

from collections.abc import Callable
from pathlib import Path

import pytest
from helpers.commands import REPO, run_python
from hydra import compose, initialize_config_dir

from ghibli.config.schema import Config
from ghibli.prepare.cards import FREE, GB
from ghibli.runs import launch
from ghibli.runs.compose import compose_config, register, run_dir_for
from ghibli.runs.folder import RunDir
from ghibli.runtime.errors import UserError

CARDS = {"gpu_6gb": 6, "gpu_8gb": 8, "gpu_12gb": 12, "gpu_24gb": 24, "t4": 15}
PRESETS = sorted(file.stem for file in (REPO / "conf" / "compute").glob("*.yaml"))


def sd15(*words: str) -> Config:
    return compose_config(["model=sd15", "data=ghibli", "data.root=x", *words])


def test_every_preset_is_named_where_it_is_chosen() -> None:
    lines = (REPO / "conf" / "train.yaml").read_text().splitlines()
    (line,) = [line for line in lines if "- compute: null" in line]
    assert sorted(line.rpartition(": ")[2].split(" | ")) == PRESETS
    assert sorted([*CARDS, "cpu"]) == PRESETS


@pytest.fixture(scope="module")
def plain() -> Config:
    return sd15()


@pytest.mark.parametrize("preset", PRESETS)
def test_a_step_sees_as_many_images_as_without(plain: Config, preset: str) -> None:
    """So that what is learned changes by rounding only; no key that matters to it is another."""
    chosen = sd15(f"compute={preset}")
    assert chosen.data.batch_size * chosen.data.accumulate == plain.data.batch_size * plain.data.accumulate
    for section in ("lora", "loss", "optimizer", "model", "validation", "sample", "early_stopping"):
        assert getattr(chosen, section) == getattr(plain, section)


def test_what_is_typed_beside_a_preset_counts() -> None:
    config = sd15("compute=gpu_8gb", "compute.checkpoint_every=2", "data.batch_size=1")
    assert (config.compute.checkpoint_every, config.data.batch_size, config.data.accumulate) == (2, 1, 1)


@pytest.mark.slow
@pytest.mark.parametrize("guidance", [1, 7.5])
def test_training_fits_on_its_card(guidance: float) -> None:
    """By the rehearsal of `ghibli check --card`, for Stable Diffusion 1.5 at 512 px."""
    from ghibli.models.sd15 import sd15_shapes
    from ghibli.prepare.rehearsal import predict

    words = f"loss.guidance={guidance}"
    found = predict(sd15(words), sd15_shapes(), "16-mixed")
    for preset, size in CARDS.items():
        config = sd15(words, f"compute={preset}")
        phases = found.phases(config.compute.checkpoint_every, config.data.batch_size)
        assert phases["training"] <= FREE * size * GB, preset
        assert preset == "gpu_6gb" or max(phases.values()) <= FREE * size * GB, preset


# Names


@pytest.mark.parametrize("name", ["a/b", "..", ".a", "-x", "latest", "null", "a b", "a+2", "x" * 101, ""])
def test_a_name_that_is_none(name: str) -> None:
    with pytest.raises(UserError, match="name"):
        run_dir_for(None, name)


@pytest.mark.parametrize("name", ["a/b", "null", ""])
def test_a_command_line_with_such_a_name(name: str) -> None:
    with pytest.raises(UserError, match="name"):
        compose_config([f"name='{name}'"])


def test_a_named_run_has_its_folder_and_dashboard_name(make_config: Callable[..., Config]) -> None:
    assert run_dir_for(None, "panda-2.1") == "outputs/train/panda-2.1"
    assert make_config("name=panda").wandb.name == "panda"
    assert make_config("name=panda", "wandb.name=other").wandb.name == "other"
    assert make_config().wandb.name is None


def test_a_sweep_of_this_name_names_its_folder_and_not_its_trials(make_config: Callable[..., Config]) -> None:
    config = make_config("name=ranks")
    study = Path("outputs/sweeps/ranks")
    launch.set_wandb_names(config, RunDir(study / "lora.rank=4"), study)
    assert (config.wandb.group, config.wandb.name) == ("ranks", "lora.rank=4")
    register()
    with initialize_config_dir(str(REPO / "conf"), version_base="1.3"):
        for words, folder in ((["name=ranks"], "ranks"), ([], "slides")):
            cfg = compose("sweep", overrides=words, return_hydra_config=True)
            cfg.hydra.runtime.choices["grid"] = "slides"
            assert cfg.hydra.sweep.dir == f"outputs/sweeps/{folder}"


@pytest.mark.slow
def test_a_name_that_is_taken_by_another_run_is_refused(tmp_path: Path, images: Path) -> None:
    """The same command finds its run again; another one names what differs."""
    words = [
        str(REPO / "train.py"), "name=mine", "finetune=none", f"data.root={images}", "data.draw=null",
        "sample.every_n_epochs=0", "wandb.mode=disabled", "model.resolution=64", "data.batch_size=2",
    ]  # fmt: skip
    first, again, other = (
        run_python(*words, *more, cwd=tmp_path) for more in ([], [], ["validation.items_per_image=2"])
    )
    assert first.returncode == 0, first.stderr
    assert "outputs/train/mine is finished: its objective was" in again.stdout
    assert other.returncode == 2
    assert "outputs/train/mine already holds a run with other settings" in other.stderr
    assert [path.name for path in (tmp_path / "outputs" / "train").iterdir()] == ["mine"]
