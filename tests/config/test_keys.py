"""Which keys change no result, and which ones name no trial's folder."""

from helpers.commands import REPO
from hydra import compose, initialize_config_dir

from ghibli.config.keys import affects_result, all_keys, keys_without_effect
from ghibli.config.schema import Command, Config
from ghibli.runs.compose import register

WITHOUT_EFFECT = {
    "name", "seeds", "resume", "cache_dir", "local", "logger", "wandb", "checkpoint", "evaluate",
    "model.clip", "data.workers", "data.reference", "data.reference_draw", "data.grid_epochs",
}  # fmt: skip
NOT_IN_FOLDER_NAMES = {
    "grid", "model", "data", "data.root", "data.draw", "name", "seeds", "resume", "cache_dir", "local.sd15",
    "local.sd15_config", "local.ghibli", "local.caption", "model.clip", "model.config", "data.reference",
    "data.reference_draw", "data.workers", "data.grid_epochs", "checkpoint.every_n_steps",
    "evaluate.samples", "evaluate.scan_samples", "evaluate.every_n_epochs", "evaluate.epoch_samples",
    "evaluate.scales", "evaluate.sampler_steps", "evaluate.batch_size", "evaluate.features",
    "evaluate.inception", "logger", "wandb.mode", "wandb.project", "wandb.group", "wandb.name",
    "sweep.report_only", "sweep.evaluate", "sweep.search", "sweep.halving", "sweep.race", "sweep.best",
    "sweep.repeats",
}  # fmt: skip


def test_keys_that_change_no_result() -> None:
    """Moving a key in or out changes the settings hash of every run."""
    assert set(keys_without_effect(Config)) == WITHOUT_EFFECT
    assert set(keys_without_effect(Command)) == WITHOUT_EFFECT | {"sweep"}
    assert not affects_result("wandb.project") and not affects_result("data.reference_draw.count")
    assert affects_result("wandbs") and affects_result("data.root") and affects_result("trainer.max_epochs")


def test_keys_that_name_no_folder() -> None:
    """A key that changes no result names no folder, else the same trial would be trained twice."""
    register()
    with initialize_config_dir(str(REPO / "conf"), version_base="1.3"):
        hydra = compose("train", return_hydra_config=True).hydra
    excluded = hydra.job.config.override_dirname.exclude_keys
    assert set(excluded) == NOT_IN_FOLDER_NAMES
    assert {key for key in all_keys(Command) if not affects_result(key)} <= set(excluded)
