"""`ghibli slim` on a run, against its own probe, merged weights in a fresh base and planted layers."""

import csv
import json
import shutil
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers.report_material import page_of
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import train
from ghibli.adapters import lora
from ghibli.adapters.apply import add_to_weights, load_base
from ghibli.adapters.files import Adapter, read_adapter
from ghibli.adapters.names import named_layers
from ghibli.cli.main import app
from ghibli.config.files import to_yaml
from ghibli.config.paths import ADAPTER_FILE
from ghibli.config.schema import Config
from ghibli.data.datamodule import GhibliDataModule
from ghibli.demo.scenes.scene import EVALUATION_SEEDS, write_folder
from ghibli.evaluation.layer_map import read_map
from ghibli.evaluation.slimming import halves, lost_gain
from ghibli.inference import layer_scorer, slim
from ghibli.models.base import BaseModel
from ghibli.runs.folder import RunDir
from ghibli.runs.settings import finished_config
from ghibli.runtime.errors import UserError
from ghibli.training.module import GhibliModule

BLOCK = "attentions.1.transformer_blocks.0"
SETTINGS = (
    "trainer.max_epochs=4", "optimizer.lr=5e-3", "lora.rank=4", "lora.alpha=6", "data.val_fraction=0.5",
    "model.resolution=64", "lora.text_encoder=false", "sample.every_n_epochs=0",
    f"lora.targets=[{BLOCK}.attn1.to_v,{BLOCK}.attn2.to_v,{BLOCK}.attn1.to_out.0]",
)  # fmt: skip
PLANTED = (f"unet.up_blocks.3.{BLOCK}.attn2.to_v", f"unet.up_blocks.1.{BLOCK}.attn1.to_v")


@pytest.fixture(scope="module")
def trained(make_config: Callable[..., Config], tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    """A finished run of a few steps."""
    found = RunDir(tmp_path_factory.mktemp("slim") / "run")
    train.run(make_config(*SETTINGS), found)
    return found


@pytest.fixture(scope="module")
def slimmed(trained: RunDir, tmp_path_factory: pytest.TempPathFactory) -> tuple[RunDir, slim.Slimmed]:
    """The run with B of two layers set to zero, after `ghibli slim` at 20 %."""
    run = RunDir(tmp_path_factory.mktemp("planted") / "run")
    shutil.copytree(trained.path, run.path)
    tensors = load_file(run.adapter / ADAPTER_FILE)
    for name in PLANTED:
        tensors[f"{name}.lora_B.weight"].zero_()
    save_file(tensors, run.adapter / ADAPTER_FILE, {"format": "pt"})
    return run, slim.slim(run, finished_config(run), 0.2, run.path / "slim")


def score(run: RunDir, adapter: Adapter | None, root: Path | None = None) -> tuple[torch.Tensor, list[str]]:
    """Losses (P, K) on held-out images, or on another folder's, with the adapter merged into the weights."""
    config = finished_config(run)
    base = load_base(config.model)
    module = GhibliModule(replace(config, finetune="none"), base).eval()
    if root is not None:
        data = replace(config.data, root=str(root), draw=None, val_fraction=0.9)
        config = replace(config, data=data, validation=replace(config.validation, max_images=1000))
    data = GhibliDataModule(config, base, run, module.num_train_timesteps)
    batches = data.held_out_items(torch.device("cpu"))
    if adapter is not None:
        add_to_weights(base, adapter, 1.0)
    guidance = 1.0 if adapter is None else config.loss.guidance
    with torch.no_grad():
        rows = [module.scores(batch, guidance, module.base_alphas_cumprod)[0] for batch in batches]
    return torch.stack(rows), [image.content_hash for image in data.val_images]


@pytest.mark.slow
def test_the_gain_is_that_of_the_training(trained: RunDir) -> None:
    """The scorer scores the whole adapter as the probe did in training."""
    config = replace(finished_config(trained), seeds=3)  # as the first run of several has it
    scorer = slim_scorer(trained, config)
    losses, _ = slim.measure_whole(scorer[0], scorer[1], trained)
    gain = slim.paired_gain(losses.full, losses.base)
    status = trained.status.read()
    assert gain.value == pytest.approx(status["gain"], rel=1e-3)
    assert gain.standard_error == pytest.approx(status["gain_se"], rel=1e-3)


def slim_scorer(run: RunDir, config: Config) -> tuple[slim.LayerScorer, Adapter]:
    base = load_base(config.model)
    adapter = read_adapter(run.adapter, base, "it")
    return slim.make_scorer(run, config, base, adapter), adapter


@pytest.mark.slow
def test_what_is_put_is_merged_and_taken_out_again_bit_for_bit(trained: RunDir) -> None:
    """Against add_to_weights; whole differences are written from the base afterwards."""
    config = finished_config(trained)
    scorer, adapter = slim_scorer(trained, config)
    base, by_hand = scorer.module.base, load_base(config.model)
    before = {name: layer.weight.clone() for name, layer in named_layers(base).items()}
    some = dict(list(adapter.layers.items())[::2])
    for layers in (adapter.layers, some, {}):
        scorer.put(layers)
        add_to_weights(by_hand, replace(adapter, layers=layers), 1.0)
        wanted = named_layers(by_hand)
        for name, layer in named_layers(base).items():
            assert torch.equal(layer.weight, wanted[name].weight)
            wanted[name].weight.data.copy_(before[name])


@pytest.mark.slow
def test_images_at_once_score_as_one_by_one(trained: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    scorer, adapter = slim_scorer(trained, finished_config(trained))
    scorer.put(adapter.layers)
    for guidance in (1.0, 3.0):
        together = scorer.losses(range(len(scorer.batches)), guidance=guidance)
        with monkeypatch.context() as patch:
            patch.setattr(layer_scorer, "AT_ONCE", 1)
            alone = scorer.losses(range(len(scorer.batches)), guidance=guidance)
        torch.testing.assert_close(together, alone, rtol=1e-5, atol=0)


@pytest.mark.slow
def test_planted_zero_layers_are_found(slimmed: tuple[RunDir, slim.Slimmed]) -> None:
    run, result = slimmed
    found = {row.name: row for row in result.map.layers}
    for name in PLANTED:
        assert (found[name].lost.value, found[name].lost.standard_error, found[name].kept_rank) == (0, 0, 0)
    others = [row for name, row in found.items() if name not in PLANTED]
    assert any(row.lost.value > 0.01 for row in others) and any(row.kept_rank for row in others)
    assert all(abs(row.lost.value) > 1e-9 for row in others)
    content = load_file(run.path / "slim" / ADAPTER_FILE)
    assert content and not any(key.startswith(PLANTED) for key in content)


@pytest.mark.slow
def test_a_layer_is_left_out_as_from_merged_weights(slimmed: tuple[RunDir, slim.Slimmed]) -> None:
    run, result = slimmed
    adapter = read_adapter(run.adapter, load_base(finished_config(run).model), "it")
    largest = max(result.map.layers, key=lambda row: row.lost.value)
    block = next(row for row in result.map.blocks if row.layers > 1)
    (base, _), (full, _) = score(run, None), score(run, adapter)
    for row, inside in ((largest, {largest.name}), (block, {
        each.name for each in result.map.layers if each.block == block.name
    })):  # fmt: skip
        rest = {name: layer for name, layer in adapter.layers.items() if name not in inside}
        expected = lost_gain(score(run, replace(adapter, layers=rest))[0], full, base)
        assert row.lost.value == pytest.approx(expected.value, rel=1e-3)
        assert row.lost.standard_error == pytest.approx(expected.standard_error, rel=1e-2)


@pytest.mark.slow
@pytest.mark.parametrize("name", [ADAPTER_FILE, "run_slim_kohya.safetensors"])
def test_the_file_loses_what_is_said_on_the_half_that_checks(
    slimmed: tuple[RunDir, slim.Slimmed], name: str
) -> None:
    run, result = slimmed
    base_model = load_base(finished_config(run).model)
    (base, hashes), (full, _) = score(run, None), score(run, read_adapter(run.adapter, base_model, "it"))
    file = run.path / "slim" / name
    losses, _ = score(run, read_adapter(file, base_model, "it"))
    _, check = halves(hashes)
    expected = lost_gain(losses[check], full[check], base[check])
    assert result.map.checked is not None and result.map.checked.images == len(check) >= 5
    assert result.map.checked.value == pytest.approx(expected.value, rel=1e-3, abs=1e-6)
    assert expected.bound <= 0.2 and f"{100 * expected.bound:.2f} %" in result.summary
    whole = (run.adapter / ADAPTER_FILE).stat().st_size
    assert file.stat().st_size < whole and file in result.files


@pytest.mark.slow
def test_the_map_is_in_json_csv_and_report(slimmed: tuple[RunDir, slim.Slimmed]) -> None:
    run, result = slimmed
    assert read_map(run.layer_map) == result.map
    with open(run.path / "slim.csv", encoding="utf-8") as opened:
        rows = list(csv.DictReader(opened))
    assert [row["name"] for row in rows if row["level"] == "layer"] == [row.name for row in result.map.layers]
    assert [float(row["lost"]) for row in rows if row["level"] == "block"] == [
        row.lost.value for row in result.map.blocks
    ]
    page = page_of(run.path, out=run.path.parent / "page.html")
    assert "Gain lost without each block" in page.text and all(
        row.name in page.text and str(row.lost).replace(" +- ", " ± ") in page.text
        for row in result.map.layers
        if row.lost.value >= 0
    )
    assert f"{len(result.map.layers)} layers" in page.text
    assert json.loads(run.layer_map.read_text())["made_by"] == "ghibli slim"


@pytest.mark.slow
def test_an_old_or_damaged_map_is_named_on_the_page(
    slimmed: tuple[RunDir, slim.Slimmed], tmp_path: Path
) -> None:
    run = RunDir(tmp_path / "run")
    shutil.copytree(slimmed[0].path, run.path)
    content = json.loads(run.layer_map.read_text())
    run.layer_map.write_text(json.dumps(content | {"weights": "0" * 64}))
    assert "slim.json is older than the run" in page_of(run.path).text
    for damage in ("{", "[]", json.dumps(content | {"limit": "1"}), json.dumps(content | {"made_by": "me"})):
        run.layer_map.write_text(damage)
        assert "slim.json is damaged" in page_of(run.path).text


@pytest.mark.slow
def test_a_second_time_replaces_its_own_files_only(
    slimmed: tuple[RunDir, slim.Slimmed], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And all of it is refused before anything is loaded."""
    monkeypatch.setattr(slim, "run_base", lambda *_: pytest.fail("a model was loaded"))
    run = RunDir(tmp_path / "run")
    shutil.copytree(slimmed[0].path, run.path)
    config = finished_config(run)
    for name in (f"slim/{ADAPTER_FILE}", "slim/README.md", "slim.json", "slim.csv"):
        kept = (run.path / name).read_bytes()
        (run.path / name).write_bytes(b"mine")
        with pytest.raises(UserError, match=f"{name}.*would be replaced"):
            slim.slim(run, config, 0.2, run.path / "slim")
        assert (run.path / name).read_bytes() == b"mine"
        (run.path / name).write_bytes(kept)
    with pytest.raises(pytest.fail.Exception, match="a model was loaded"):
        slim.slim(run, config, 0.2, run.path / "slim")


@pytest.mark.slow
def test_no_adapter_without_a_bound_that_holds(
    slimmed: tuple[RunDir, slim.Slimmed], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A choice that is too small is not tried again one larger: that would choose on the half that checks."""

    def too_small(total: int, holds: Callable[[int], bool]) -> int:
        holds(1)
        return 1

    monkeypatch.setattr(slim, "smallest", too_small)
    run = RunDir(tmp_path / "run")
    shutil.copytree(slimmed[0].path, run.path)
    shutil.rmtree(run.path / "slim")
    result = slim.slim(run, finished_config(run), 0.01, run.path / "slim")
    assert not (run.path / "slim").exists() and result.files == []
    checked = read_map(run.layer_map).checked
    assert checked is not None and checked.bound > 0.01
    assert all(row.kept_rank is None for row in read_map(run.layer_map).layers)
    for words in (str(checked), f"{100 * checked.bound:.2f} %", "--lose 2%", "data.val_fraction=0.5"):
        assert words in result.summary and "\n" not in result.summary
    assert "No smaller adapter was written" in page_of(run.path).text


@pytest.mark.parametrize("variant", ["dora", "lokr"])
def test_both_files_of_a_kind_that_kohyas_layout_holds_otherwise(
    variant: str, make_config: Callable[..., Config], model: BaseModel, tmp_path: Path
) -> None:
    """Magnitudes one an output are whole differences there, and a LoKr's core is multiplied out."""
    config = make_config(f"lora.variant={variant}", "lora.rank=4", "lora.targets=[conv1]")
    plain, base = model, deepcopy(model)
    lora.add_lora(base, config.lora, 0)
    for parameter in lora.trainable(base).values():
        parameter.data += 0.1
    adapter = read_adapter(lora.save_adapter(base, tmp_path / "whole"), plain, "it")
    layers = dict(list(adapter.layers.items())[::2])
    choice = slim.Choice(layers, lost_gain(*torch.rand(3, 2, 2)), lost_gain(*torch.rand(3, 2, 2)), 0.1)
    (tmp_path / "slim").mkdir()
    files, notes = slim.prepare(
        RunDir(tmp_path), config, adapter, choice, plain, tmp_path / "slim" / "it_kohya.safetensors"
    )
    assert [file.name for file in files] == [ADAPTER_FILE, "it_kohya.safetensors"] and not notes
    for file in files:
        found = read_adapter(file, plain, "it").layers
        assert found.keys() == layers.keys()
        for name, layer in layers.items():
            weight = named_layers(plain)[name].weight.detach().double()
            torch.testing.assert_close(found[name].delta(weight), layer.delta(weight), rtol=0, atol=1e-6)


# What is refused at once


def command(*words: str) -> str:
    """Run `ghibli slim WORDS`, which fails, and return its one line."""
    done = CliRunner().invoke(app, ["slim", *words])
    assert isinstance(done.exception, UserError), done.output
    return str(done.exception)


def test_what_cannot_be_slimmed(make_config: Callable[..., Config], tmp_path: Path) -> None:
    for settings, state, expected in (
        ("finetune=full", "finished", "trained all weights"),
        ("finetune=none", "finished", "only measured the base"),
        ("finetune=lora", "interrupted", "is interrupted, not finished"),
    ):
        run = RunDir(tmp_path / f"{settings}-{state}")
        run.path.mkdir()
        run.config.write_text(to_yaml(make_config(settings)))
        run.status.update(state=state)
        assert expected in command(str(run.path))
        assert "--lose 1000% is out of range" in command(str(run.path), "--lose", "1000%")
    assert "holds no run" in command(str(tmp_path))


@pytest.fixture
def copied(trained: RunDir, tmp_path: Path) -> Iterator[RunDir]:
    run = RunDir(tmp_path / "run")
    shutil.copytree(trained.path, run.path)
    yield run
    assert not run.layer_map.exists() and not (run.path / "slim").exists()


def test_other_images_than_in_training_are_refused(copied: RunDir) -> None:
    copied.status.update(data_hash="0" * 64)
    with pytest.raises(UserError, match="not the images that this run was trained on"):
        slim.slim(copied, finished_config(copied), 0.2, copied.path / "slim")


def test_images_of_the_training_never_count_as_held_out(copied: RunDir) -> None:
    content = json.loads(copied.split.read_text())
    content["train"] |= content["val"]
    copied.split.write_text(json.dumps(content))
    with pytest.raises(UserError, match="it was trained with"):
        slim.slim(copied, finished_config(copied), 0.2, copied.path / "slim")


def test_too_few_held_out_images_are_refused(copied: RunDir) -> None:
    config = finished_config(copied)
    few = replace(config, validation=replace(config.validation, max_images=9))
    with pytest.raises(UserError, match="9 held-out images are too few, as 5 have to choose and 5 others"):
        slim.slim(copied, few, 0.2, copied.path / "slim")


def test_without_a_gain_there_is_nothing_to_keep(copied: RunDir) -> None:
    tensors = load_file(copied.adapter / ADAPTER_FILE)
    for key, tensor in tensors.items():
        if "lora_B" in key:
            tensor.zero_()
    save_file(tensors, copied.adapter / ADAPTER_FILE, {"format": "pt"})
    with pytest.raises(UserError, match="its gain is 0.0 % .*train longer, or hold out more images"):
        slim.slim(copied, finished_config(copied), 0.2, copied.path / "slim")


@pytest.mark.slow
def test_half_the_bytes_at_one_percent_and_fresh_images_agree(
    make_config: Callable[..., Config], tmp_path: Path
) -> None:
    """The demo's layers and rank, on fewer and smaller images; 60 scenes that no run has seen."""
    run, cache = RunDir(tmp_path / "run"), tmp_path / "cache"
    config = make_config("trainer.max_epochs=4", "data.batch_size=12", "data.accumulate=1",
                         "model.resolution=64", "optimizer.lr=1e-3", "sample.every_n_epochs=0",
                         "validation.max_images=40")  # fmt: skip
    draw = replace(config.data, root=str(cache / "scenes"), val_fraction=0.2)
    write_folder(cache / "scenes", "drawn", 200, 1_000_000)
    train.run(replace(config, data=draw), run)
    result = slim.slim(run, finished_config(run), 0.01, run.path / "slim")
    file = run.path / "slim" / ADAPTER_FILE
    assert result.files and file.stat().st_size <= (run.adapter / ADAPTER_FILE).stat().st_size / 2
    write_folder(tmp_path / "fresh", "drawn", 60, EVALUATION_SEEDS.start + 500_000)
    base_model = load_base(config.model)
    base, full, losses = (
        score(run, adapter, tmp_path / "fresh")[0]
        for adapter in (
            None,
            read_adapter(run.adapter, base_model, "it"),
            read_adapter(file, base_model, "it"),
        )
    )
    assert len(base) >= 50 and lost_gain(losses, full, base).bound <= 0.01
