"""A single-file checkpoint in the original layout: diffusers reads it, with configs from model.config."""

import re
import shutil
from pathlib import Path

import pytest
import torch
from helpers.original_layout import write_single_file
from safetensors.torch import load_file, save_file

from ghibli.config.paths import DEMO
from ghibli.models.base import BaseModel
from ghibli.models.load import load
from ghibli.runtime.errors import UserError


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("single") / "one.safetensors"
    write_single_file(load("demo"), file)
    return file


@pytest.fixture
def configs(tmp_path: Path) -> Path:
    """A folder with the configs and the tokenizer of the demo base but no weights."""
    place = tmp_path / "configs"
    shutil.copytree(DEMO, place, ignore=shutil.ignore_patterns("*.safetensors", "*.py", "__pycache__"))
    return place


def test_it_is_the_same_base_as_the_folder(single: Path, configs: Path, base: BaseModel) -> None:
    one = load(str(single), str(configs))
    assert not any("diffusion_pytorch_model" in key for key in load_file(single))
    for part in ("text_encoder", "vae", "unet"):
        mine, theirs = getattr(one, part).state_dict(), getattr(base, part).state_dict()
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(mine[key], theirs[key]) for key in mine), part
    assert torch.equal(one.tokenize(["a girl in a greenhouse"]), base.tokenize(["a girl in a greenhouse"]))
    keys = ("beta_start", "beta_end", "beta_schedule", "num_train_timesteps", "steps_offset", "clip_sample")
    assert {k: one.scheduler_config[k] for k in keys} == {k: base.scheduler_config[k] for k in keys}
    assert one.prediction_type == base.prediction_type
    assert not any(p.requires_grad or p.is_meta for p in one.unet.parameters())


def refused(file: Path, config: str | None) -> str:
    with pytest.raises(UserError) as caught:
        load(str(file), config)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_what_it_lacks_is_named(single: Path, configs: Path, tmp_path: Path) -> None:
    text = refused(single, None)
    assert "its configs and tokenizer are on the hub, out of reach now" in text
    assert "give a folder that has them, model.config=DIR" in text
    assert f"model.config={tmp_path / 'nowhere'} lacks model_index.json" in refused(
        single, str(tmp_path / "nowhere")
    )
    (configs / "vae" / "config.json").unlink()
    assert f"model.config={configs} lacks vae/config.json" in refused(single, str(configs))


@pytest.mark.parametrize(
    "part",
    [
        "first_stage_model.", "cond_stage_model.", "model.diffusion_model.out.2",
        "cond_stage_model.transformer.text_model.final_layer_norm.weight",  # one weight: diffusers only logs
    ],
)  # fmt: skip
def test_a_file_with_a_part_missing_is_refused(
    single: Path, configs: Path, tmp_path: Path, part: str
) -> None:
    file = tmp_path / "part.safetensors"
    save_file({key: w for key, w in load_file(single).items() if not key.startswith(part)}, file)
    assert re.match(rf"model.path={file} cannot be loaded .*\(", refused(file, str(configs)))


def test_the_missing_weight_is_named(single: Path, configs: Path, tmp_path: Path) -> None:
    file, lost = tmp_path / "part.safetensors", "final_layer_norm.weight"
    save_file({key: w for key, w in load_file(single).items() if not key.endswith(lost)}, file)
    assert f"it lacks text_encoder.{lost}" in refused(file, str(configs))


def test_weights_that_the_configs_do_not_describe_are_named(
    single: Path, configs: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """diffusers only logs them. What training leaves in a file is no part of the model."""
    more = {
        key: torch.ones(1)
        for key in ("model_ema.decay", "first_stage_model.loss.logvar", "first_stage_model.model_ema.decay")
    }
    save_file(load_file(single) | more, tmp_path / "whole.safetensors")
    load(str(tmp_path / "whole.safetensors"), str(configs))
    assert "holds weights" not in capsys.readouterr().out
    save_file(
        load_file(single) | {"first_stage_model.extra.weight": torch.ones(1)}, tmp_path / "v.safetensors"
    )
    load(str(tmp_path / "v.safetensors"), str(configs))
    said = " ".join(capsys.readouterr().out.split())
    assert "do not describe, and they are not used: first_stage_model.extra.weight" in said
    save_file(
        load_file(single) | {"model.diffusion_model.extra.weight": torch.ones(1)}, tmp_path / "u.safetensors"
    )
    text = refused(tmp_path / "u.safetensors", str(configs))
    assert "that its configs do not describe: model.diffusion_model.extra.weight; are these" in text


def test_configs_of_another_model_are_refused(single: Path, configs: Path) -> None:
    config = configs / "unet" / "config.json"
    config.write_text(config.read_text().replace('"cross_attention_dim": 64', '"cross_attention_dim": 96'))
    assert refused(single, str(configs)).startswith(f"model.path={single}")
