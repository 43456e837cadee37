"""Adapters from elsewhere: described, refused, trained further and added up."""

import shlex
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers.commands import QUICK
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import train
from ghibli.adapters import describe
from ghibli.adapters.apply import load_adapters, set_weights
from ghibli.adapters.files import read_adapter
from ghibli.adapters.names import kohya_name
from ghibli.adapters.start import check_same_shape
from ghibli.cli.main import app
from ghibli.config.paths import ADAPTER_FILE, DEMO
from ghibli.inference.export import predict, probe_inputs
from ghibli.models.base import BaseModel
from ghibli.models.load import load
from ghibli.runs.folder import RunDir
from ghibli.runtime.errors import UserError


@pytest.mark.slow
def test_two_adapters_add_up_and_weight_0_is_the_base(run: RunDir) -> None:
    near = DEMO / "near"

    def layer_of(*weights: float) -> torch.Tensor:
        base = load("demo")
        load_adapters(
            base,
            [(read_adapter(file, base, "x"), w) for file, w in zip((run.path, near), weights, strict=True)],
        )
        layer = base.unet.get_submodule("mid_block.attentions.0.transformer_blocks.0.attn2.to_k")
        return layer(torch.ones(1, 64)).detach()

    zero, one, other = layer_of(0, 0), layer_of(1, 0), layer_of(0, 1)
    torch.testing.assert_close(layer_of(0.3, -2) - zero, 0.3 * (one - zero) - 2 * (other - zero))
    untouched = load("demo")
    loaded = load("demo")
    load_adapters(
        loaded, [(read_adapter(run.path, loaded, "x"), 1.0), (read_adapter(near, loaded, "x"), 1.0)]
    )
    inputs = probe_inputs(untouched)
    assert not torch.equal(predict(loaded, inputs), predict(untouched, inputs))
    set_weights(loaded, [0.0, 0.0])
    assert torch.equal(predict(loaded, inputs), predict(untouched, inputs))


@pytest.mark.slow
def test_training_starts_from_another_adapter(run: RunDir, make_config: Callable, tmp_path: Path) -> None:
    """The gain is still that over the base, and from a kohya file it starts where the other run ended."""
    file = run.adapter / "kohya.safetensors"
    later = RunDir(tmp_path / "later")
    train.run(make_config(*QUICK, "optimizer.lr=1e-30", f"lora.init={file}"), later)
    before, after = (load_file(r.adapter / ADAPTER_FILE) for r in (run, later))
    for key, value in before.items():  # alpha / rank is divided out of B and multiplied in again
        torch.testing.assert_close(after[key], value, rtol=3e-7, atol=0)
    assert later.status.read()["gain"] == pytest.approx(run.status.read()["gain"], abs=1e-6)
    assert later.status.read()["init_hash"] == read_adapter(file, load("demo"), "x").hash


def test_other_settings_than_the_files_are_named(run: RunDir, make_config: Callable, tmp_path: Path) -> None:
    config = make_config("lora.rank=8", "lora.alpha=6", f"lora.init={run.path}")
    with pytest.raises(
        UserError, match="lora.init=.*: lora.rank of this run differ from those of the file; `ghibli"
    ):
        train.run(config, RunDir(tmp_path / "other"))


def test_import_says_what_it_is_and_what_to_type(run: RunDir) -> None:
    file = run.adapter / "kohya.safetensors"
    done = CliRunner().invoke(app, ["import", str(file), "model=demo", "data=demo"])
    assert done.exit_code == 0, done.output
    assert "kohya, LoRA of 92 layers, rank 4, alpha 4" in done.output
    words = f"python train.py model=demo data=demo lora.init={file} lora.rank=4 lora.alpha=4"
    assert f"{words} lora.targets=attention lora.text_encoder=true" in done.output
    assert f"ghibli generate {file} model=demo data=demo --prompt TEXT" in done.output


def test_the_printed_settings_take_the_file(run: RunDir, base: BaseModel, make_config: Callable) -> None:
    """Also for rsLoRA, whose alpha is not a round number, and for DoRA; not for layers of several ranks."""
    adapter = read_adapter(run.adapter, base, "import")
    layer = next(iter(adapter.layers.values()))
    odd = {name: replace(each, alpha=3 * 7**0.5) for name, each in adapter.layers.items()}
    dora = {
        name: replace(each, magnitude=torch.ones(each.up.shape[0], 1))
        for name, each in adapter.layers.items()
    }
    for layers in (adapter.layers, odd, dora):
        changed = replace(adapter, layers=layers)
        words = shlex.split(describe.training_command(changed, base, []))[2:]
        check_same_shape(changed, make_config(*words).lora, base)
    half = replace(layer, up=layer.up[:, :2], down=layer.down[:2])
    mixed = replace(adapter, layers={**adapter.layers, next(iter(adapter.layers)): half})
    assert describe.training_command(mixed, base, []) == "not possible: its layers differ in rank: 2, 4"


def test_files_that_are_not_adapters_of_this_base(run: RunDir, base: BaseModel, tmp_path: Path) -> None:
    def refused(state: dict[str, torch.Tensor] | bytes, name: str = "it.safetensors") -> str:
        file = tmp_path / name
        file.write_bytes(state) if isinstance(state, bytes) else save_file(state, file)
        with pytest.raises(UserError) as caught:
            read_adapter(file, base, "adapter")
        assert "\n" not in str(caught.value)
        return str(caught.value)

    whole = (run.adapter / "kohya.safetensors").read_bytes()
    assert "cut off or damaged" in refused(whole[:-100])
    assert "is a pickle under another name" in refused(b"PK\x03\x04....")
    assert "only .safetensors files are read" in refused(b"PK", "it.ckpt")
    assert "adapter for SDXL" in refused({"lora_te2_x.lora_down.weight": torch.zeros(4, 4)})
    assert "is not a LoRA of this base: it has `something`" in refused({"something": torch.zeros(4)})
    name = kohya_name("unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k")
    wide = {f"{name}.lora_down.weight": torch.zeros(4, 768), f"{name}.lora_up.weight": torch.zeros(1280, 4)}
    text = refused(wide)
    assert f"`{name}.lora_up.weight` of (1280, 4) cannot be: a layer of the shape (128, 64) needs" in text
    assert "(128, rank); it was made for another base" in text
    with pytest.raises(UserError, match="no such file or run"):
        read_adapter(tmp_path / "nowhere", base, "adapter")


def test_damaged_metadata(run: RunDir, base: BaseModel, tmp_path: Path) -> None:
    file = tmp_path / "metadata.safetensors"
    save_file(load_file(run.adapter / ADAPTER_FILE), file, {"lora_adapter_metadata": "{"})
    with pytest.raises(UserError, match="cannot be read as a LoRA"):
        read_adapter(file, base, "import")


def test_latest_is_taken_where_a_run_is(run: RunDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`import`, `resize` and `extract`; what they print and write is that of the run's own path."""
    (tmp_path / "outputs").mkdir()
    (tmp_path / "outputs" / "it").symlink_to(run.path)
    monkeypatch.chdir(tmp_path)
    said = [CliRunner().invoke(app, ["import", name]).output for name in ("latest", "outputs/it")]
    assert said[0] == said[1] and "targets" in said[0]
    for command in (["resize", "{}", "--rank", "2"], ["extract", "{}", "demo", "--rank", "2"]):
        files = [tmp_path / f"{command[0]}{at}.safetensors" for at in range(2)]
        for name, file in zip(("latest", "outputs/it"), files, strict=True):
            done = CliRunner().invoke(app, [word.format(name) for word in command] + ["--to", str(file)])
            assert done.exit_code == 0, done.output
        one, other = (load_file(file) for file in files)
        assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)
