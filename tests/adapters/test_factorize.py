"""Adapters resized, added and extracted, against the singular values of the whole matrices in float64."""

import json
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from helpers.adapter_files import adapter_state
from safetensors import safe_open
from safetensors.torch import save_file
from typer.testing import CliRunner

from ghibli.adapters import factorize, kohya
from ghibli.adapters.apply import add_to_weights
from ghibli.adapters.factorize import combine, extract, resize
from ghibli.adapters.files import Adapter, read_adapter
from ghibli.adapters.layers import Full, LoRA
from ghibli.adapters.names import named_layers
from ghibli.adapters.request import Size
from ghibli.cli.main import app
from ghibli.config.paths import DEMO
from ghibli.models.base import BaseModel, weights_hash
from ghibli.models.load import load
from ghibli.models.save import save_folder
from ghibli.runs.folder import RunDir
from ghibli.runtime.errors import UserError

NAMES = ("unet.down_blocks.0.resnets.0.conv1", "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k",
         "text_encoder.encoder.layers.0.self_attn.q_proj")  # fmt: skip


def random_adapter(base: BaseModel, seed: int, rank: int = 6, names: tuple[str, ...] = NAMES) -> Adapter:
    """An adapter with a 3 x 3 convolution, a linear layer and one of the text encoder, alpha unlike rank."""
    generator, layers = torch.Generator().manual_seed(seed), {}
    for name in names:
        shape = named_layers(base)[name].weight.shape
        down = torch.randn(rank, *shape[1:], generator=generator) * torch.logspace(0, -2, rank).reshape(
            -1, *(1,) * (len(shape) - 1)
        )
        up = torch.randn(shape[0], rank, *(1,) * (len(shape) - 2), generator=generator)
        layers[name] = LoRA(down=down, up=up, alpha=2.5)
    return Adapter(
        Path(f"random{seed}"), "kohya", layers, {"ss_sd_model_name": "it", "lora_adapter_metadata": "{"}
    )


def matrix(adapter_layers: dict, base: BaseModel, name: str) -> torch.Tensor:
    """The update itself, multiplied out in float64."""
    return adapter_layers[name].delta(named_layers(base)[name].weight.double()).flatten(1)


@pytest.mark.parametrize("kind", ["factors", "whole"])
def test_a_smaller_rank_is_the_nearest_of_that_rank(base: BaseModel, kind: str) -> None:
    """Eckart-Young: the distance is the norm of the singular values left out; and kept says the rest."""
    adapter = random_adapter(base, 1)
    if kind == "whole":
        layers = {
            name: Full(
                diff=matrix(adapter.layers, base, name).float().reshape(named_layers(base)[name].weight.shape)
            )
            for name in NAMES
        }
        adapter = Adapter(Path("x"), "kohya", layers, {})
    found, kept, whole = resize(adapter, base, Size(rank=2)), 0.0, 0.0
    for name in NAMES:
        exact = matrix(adapter.layers, base, name)
        values = torch.linalg.svdvals(exact)
        distance = (matrix(found.layers, base, name) - exact).norm()
        assert found.layers[name].rank == 2
        assert float(distance) == pytest.approx(float(values[2:].norm()), rel=1e-5)
        kept, whole = kept + float(values[:2].square().sum()), whole + float(values.square().sum())
    assert found.kept == pytest.approx(kept / whole, rel=1e-9) and 0.5 < found.kept < 0.9999


@pytest.mark.parametrize("keep", [0.5, 0.95, 1.0])
def test_a_share_takes_the_smallest_rank_that_has_it(base: BaseModel, keep: float) -> None:
    adapter = random_adapter(base, 2)
    found = resize(adapter, base, Size(keep=keep))
    for name in NAMES:
        energy = torch.linalg.svdvals(matrix(adapter.layers, base, name)).square()
        shares = energy.cumsum(0) / energy.sum()
        assert found.layers[name].rank == int((shares < keep - 1e-11).sum()) + 1
    assert found.kept >= keep - 1e-9


def test_a_larger_rank_changes_nothing(base: BaseModel) -> None:
    adapter = random_adapter(base, 3)
    found = resize(adapter, base, Size(rank=64))
    for name in NAMES:
        assert found.layers[name].rank <= 6
        torch.testing.assert_close(matrix(found.layers, base, name), matrix(adapter.layers, base, name))
    assert found.kept == pytest.approx(1)


def test_adding_is_exact_and_as_peft_adds(tmp_path: Path, base: BaseModel) -> None:
    """PEFT's add_weighted_adapter, `cat`, on a stock pipeline; one has a layer that the other lacks."""
    one, other = random_adapter(base, 4), random_adapter(base, 5, rank=3, names=NAMES[1:])
    found = combine([(one, 0.7), (other, -0.5)], base, None)
    for name in NAMES:
        expected = 0.7 * matrix(one.layers, base, name)
        if name in other.layers:
            expected = expected - 0.5 * matrix(other.layers, base, name)
        torch.testing.assert_close(matrix(found.layers, base, name), expected, rtol=1e-5, atol=1e-6)
    assert [found.layers[name].rank for name in NAMES] == [6, 9, 9]
    pipeline = StableDiffusionPipeline.from_pretrained(DEMO, safety_checker=None)
    linear = {label: Adapter(Path("x"), "kohya", {NAMES[1]: adapter.layers[NAMES[1]]}, {})
              for label, adapter in (("one", one), ("other", other))}  # fmt: skip
    for label, adapter in linear.items():
        kohya.write_kohya(adapter, tmp_path / f"{label}.safetensors", {})
        pipeline.load_lora_weights(tmp_path, weight_name=f"{label}.safetensors", adapter_name=label)
    layer = pipeline.unet.get_submodule(NAMES[1].removeprefix("unet."))
    theirs = 0.7 * layer.get_delta_weight("one") - 0.5 * layer.get_delta_weight("other")
    torch.testing.assert_close(matrix(found.layers, base, NAMES[1]).float(), theirs, rtol=1e-4, atol=1e-5)


def test_adding_at_a_rank_is_the_nearest_to_the_sum(base: BaseModel) -> None:
    one, other = random_adapter(base, 6), random_adapter(base, 7)
    exact = combine([(one, 1.0), (other, 0.3)], base, None)
    small = combine([(one, 1.0), (other, 0.3)], base, Size(rank=4))
    for name in NAMES:
        whole = matrix(exact.layers, base, name)
        distance = (matrix(small.layers, base, name) - whole).norm()
        assert float(distance) == pytest.approx(float(torch.linalg.svdvals(whole)[4:].norm()), rel=1e-4)


def test_what_is_no_plain_lora_is_added_as_its_difference(base: BaseModel) -> None:
    adapter = random_adapter(base, 8)
    layer = adapter.layers[NAMES[1]]
    size = named_layers(base)[NAMES[1]].weight.shape[0]
    dora = LoRA(down=layer.down, up=layer.up, alpha=layer.alpha, magnitude=torch.rand(size, 1) + 0.5)
    mixed = Adapter(Path("x"), "kohya", {NAMES[1]: dora}, {})
    found = combine([(adapter, 0.4), (mixed, 2.0)], base, None)
    expected = 0.4 * matrix(adapter.layers, base, NAMES[1]) + 2 * matrix(mixed.layers, base, NAMES[1])
    assert isinstance(found.layers[NAMES[1]], Full)
    torch.testing.assert_close(matrix(found.layers, base, NAMES[1]), expected, rtol=1e-5, atol=1e-6)
    with pytest.raises(UserError, match="x: its weight nan is not a finite number"):
        combine([(mixed, float("nan"))], base, None)


def test_extraction_finds_what_was_added(base: BaseModel) -> None:
    """Planted updates of rank 6, and a norm and a bias, which no LoRA can hold."""
    tuned, planted = load("demo"), random_adapter(base, 9)
    add_to_weights(tuned, planted, 1.0)
    tuned.unet.conv_norm_out.weight.data += 0.1
    tuned.unet.conv_in.bias.data += 0.1
    found, left_out = extract(tuned, base, Size(rank=6))
    assert left_out == ["unet.conv_in.bias", "unet.conv_norm_out.weight"]
    assert set(found.layers) == set(NAMES) and found.kept == pytest.approx(1, abs=1e-6)
    for name in NAMES:
        expected = matrix(planted.layers, base, name)
        difference = (matrix(found.layers, base, name) - expected).norm() / expected.norm()
        assert difference < 1e-5
    with pytest.raises(UserError, match="there is nothing to extract"):
        extract(load("demo"), base, Size(rank=4))


def typed(*words: object) -> str:
    done = CliRunner().invoke(app, [str(word) for word in words])
    if isinstance(done.exception, UserError):
        assert "\n" not in str(done.exception)
        return f"error: {done.exception}"
    assert done.exit_code == 0, done.output
    return done.output


@pytest.mark.slow
def test_the_commands(tmp_path: Path, base: BaseModel) -> None:
    """Each file is read back as what was computed, and no file is replaced."""
    one, other, demo = (
        tmp_path / "one.safetensors",
        tmp_path / "other.safetensors",
        ("model=demo", "data=demo"),
    )
    kohya.write_kohya(random_adapter(base, 1), one, {"ss_sd_model_name": "it"})
    kohya.write_kohya(random_adapter(base, 2), other, {})
    assert "one_rank2.safetensors: 3 layers, rank 2, " in typed("resize", one, *demo, "--rank", 2)
    assert "exists already" in typed("resize", one, *demo, "--rank", 2)
    assert "one_keep0.9.safetensors: 3 layers, rank" in typed("resize", one, *demo, "--keep", 0.9)
    long = tmp_path / f"{'ä' * 120}.safetensors"
    long.write_bytes(one.read_bytes())
    assert "_rank2.safetensors: 3 layers, rank 2, " in typed("resize", long, *demo, "--rank", 2)
    both = tmp_path / "both.safetensors"
    assert "3 layers, rank 12, 100 %" in typed("merge", f"{one}:0.7", f"{other}:-0.5", *demo, "--to", both)
    tuned = load("demo")
    add_to_weights(tuned, random_adapter(base, 1), 1.0)
    save_folder(tuned, tmp_path / "tuned")
    drawn = tmp_path / "drawn.safetensors"
    words = ("extract", tmp_path / "tuned", "demo", "--to", drawn, "--keep", 0.999)
    assert "drawn.safetensors: 3 layers" in typed(*words)
    unet_only = (tmp_path / "tuned" / "unet", "demo", "--to", tmp_path / "unet.safetensors", "--rank", 8)
    assert "unet.safetensors: 2 layers" in typed("extract", *unet_only)
    expected = combine(
        [(read_adapter(one, base, "x"), 0.7), (read_adapter(other, base, "x"), -0.5)], base, None
    )
    for name, layer in read_adapter(both, base, "x").layers.items():
        assert torch.equal(layer.down, expected.layers[name].down)
    with safe_open(both, framework="pt") as opened:
        metadata = opened.metadata()
    assert metadata["ss_network_dim"] == "12" and metadata["ss_sd_model_name"] == "it"
    assert metadata["modelspec.merged_from"] == "one:0.7, other:-0.5"


def test_the_base_of_a_run_is_the_one_that_it_was_trained_from(base: BaseModel, tmp_path: Path) -> None:
    """By content: what DoRA changes depends on W. A plain LoRA is two factors, whatever the base."""
    demo, name = ("model=demo", "data=demo"), NAMES[1]
    for kind, refused in (("dora_out", True), ("lora", False)):
        run = RunDir(tmp_path / kind)
        run.adapter.mkdir(parents=True)
        run.config.touch()
        run.status.update(base_hash="0" * 64)
        save_file(adapter_state(base, {name: kind}), run.adapter / "pytorch_lora_weights.safetensors")
        file = run.path / "it.safetensors"
        said = [
            typed("resize", run.path, *demo, "--rank", 2, "--to", file),
            typed("merge", run.path, *demo, "--to", run.path / "sum.safetensors"),
        ]
        sentence = "the base model.path=demo is not the one it was trained from (base_hash"
        assert all((sentence in text) is refused for text in said), said
        assert file.exists() is not refused
        run.status.update(base_hash=weights_hash(base))
        said = typed("merge", run.path, *demo, "--to", run.path / "ok.safetensors")
        assert f"1 layer, {'whole differences' if refused else 'rank 3'}, 100 %" in said


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ((), "give one of --rank N and --keep SHARE"),
        (("--rank", "4", "--keep", "0.5"), "give one of --rank N and --keep SHARE"),
        (("--rank", "0"), "--rank 0 must be at least 1"),
        (("--keep", "1.5"), "--keep 1.5 must be above 0 and at most 1"),
        (("--keep", "nan"), "--keep nan must be above 0"),
        (("--rank", "4", "--to", "it.bin"), "--to it.bin: the name must end in .safetensors"),
    ],
)
def test_what_makes_no_sense_is_said_at_once(tmp_path: Path, words: tuple[str, ...], sentence: str) -> None:
    file = tmp_path / "it.safetensors"
    save_file({"x": torch.zeros(1)}, file)
    assert sentence in typed("resize", file, *words)


def test_a_file_keeps_its_dtype_and_training_metadata(base: BaseModel) -> None:
    adapter = random_adapter(base, 1)
    layers = {n: LoRA(down=a.down.half(), up=a.up.half(), alpha=a.alpha) for n, a in adapter.layers.items()}
    found = resize(Adapter(adapter.file, "kohya", layers, adapter.metadata), base, Size(rank=3))
    assert {layer.down.dtype for layer in found.layers.values()} == {torch.float16}
    metadata = factorize.metadata_after([adapter], found, "it")
    assert "lora_adapter_metadata" not in metadata and metadata["ss_sd_model_name"] == "it"
    assert json.dumps(metadata)
