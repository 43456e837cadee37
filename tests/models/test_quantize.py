"""Frozen layers in 8 and 4 bits: bitsandbytes' own weights, near the full ones; runs, resume, export."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from faults.compare import different_parts, rows_of
from helpers.commands import CHECKPOINTS, run_python
from helpers.stand_in import StandIn, stop_at
from peft import prepare_model_for_kbit_training
from peft.tuners.lora import bnb as peft_bnb
from torch import nn
from transformers import BitsAndBytesConfig, CLIPTextModel

import train
from ghibli.adapters.lora import add_lora
from ghibli.config.paths import DEMO
from ghibli.config.schema import Config
from ghibli.inference import export
from ghibli.inference.load import load_model
from ghibli.models import quantize
from ghibli.models.load import load
from ghibli.models.performance import shrink_frozen
from ghibli.models.quantize import linear_4bit, linear_8bit, quantize_frozen, weight_bytes
from ghibli.runs.folder import RunDir
from ghibli.runs.settings import finished_config
from ghibli.runtime.errors import UserError
from ghibli.training.module import GhibliModule

bitsandbytes = pytest.importorskip("bitsandbytes", reason="extra of this project")

BITS = (8, 4)
ERROR = {8: 0.02, 4: 0.25}  # of the demo UNet's output, relative to its norm
SHORT = ("trainer.max_epochs=1", "lora.rank=4", "lora.dropout=0.1", *CHECKPOINTS)


def relative(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return ((found - wanted).norm() / wanted.norm()).item()


# Layers


def test_4_bit_weights_are_those_that_transformers_makes() -> None:
    base = load("demo")
    quantize_frozen(base, 4)
    theirs = CLIPTextModel.from_pretrained(
        DEMO / "text_encoder", dtype=torch.float32,
        quantization_config=BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True
        ),
    ).state_dict()  # fmt: skip
    ours = base.text_encoder.state_dict()
    assert ours.keys() == theirs.keys()
    assert any("nested_absmax" in name for name in ours)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_8_bit_weights_are_rounded_to_the_largest_of_their_row() -> None:
    layer = nn.Linear(96, 40)
    made = linear_8bit(layer)
    weight = layer.weight.detach().half().float()
    scale = weight.abs().amax(dim=1)
    assert torch.equal(made.state.SCB, scale)
    assert (made.weight.float() - weight * 127 / scale[:, None]).abs().max() <= 0.5 + 1e-4


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("make", [linear_8bit, linear_4bit])
def test_a_layer_multiplies_by_its_rounded_weights(make: Callable[..., Any], training: bool) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(128, 64)
    made = make(layer).train(training)
    if make is linear_4bit:
        weight = bitsandbytes.functional.dequantize_4bit(made.weight.data, made.weight.quant_state)
        error = 1e-6
    else:
        weight = made.state.CB.float() * made.state.SCB[:, None] / 127
        error = 1e-6 if training else 0.01  # evaluation rounds the inputs to 8 bits too
    inputs = torch.randn(3, 7, 128, requires_grad=training)
    wanted = nn.functional.linear(inputs, weight, layer.bias)
    assert relative(made(inputs), wanted) < error
    assert relative(made(inputs), layer(inputs)) > 1e-4  # and not by the full ones
    if training:
        made(inputs).square().sum().backward()
        gradient, inputs.grad = inputs.grad, None
        wanted.square().sum().backward()
        assert relative(gradient, inputs.grad) < 1e-3


def test_evaluating_a_4_bit_layer_leaves_its_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """On processors with AVX512-BF16 bitsandbytes would pack them anew, with scales in bf16."""
    monkeypatch.setattr(bitsandbytes.nn.modules, "has_avx512bf16", lambda: True)
    made = linear_4bit(nn.Linear(128, 64)).eval()
    before = {name: value.clone() for name, value in made.state_dict().items()}
    with torch.no_grad():
        made(torch.randn(2, 128))
    assert not getattr(made.weight.quant_state, "packing_format_for_cpu", False)
    assert all(torch.equal(before[name], value) for name, value in made.state_dict().items())


@pytest.mark.parametrize("bits", BITS)
def test_the_demo_predicts_nearly_the_same(bits: int) -> None:
    base = load("demo")
    inputs = export.probe_inputs(base)
    full, before = export.predict(base, inputs), weight_bytes(base.unet)
    quantize_frozen(base, bits)
    assert 1e-4 < relative(export.predict(base, inputs), full) < ERROR[bits]
    assert weight_bytes(base.unet) < before
    assert {type(m) for m in base.unet.modules() if isinstance(m, nn.Linear)} == {
        quantize.movable_linear_8bit() if bits == 8 else bitsandbytes.nn.Linear4bit
    }


@pytest.mark.parametrize("bits", BITS)
def test_kbit_preparation_would_change_nothing(bits: int, make_config: Callable[..., Config]) -> None:
    """PEFT's prepare_model_for_kbit_training, without checkpointing, which compute.checkpoint_every is."""
    base = load("demo")
    quantize_frozen(base, bits)
    for part in base.adaptable.values():
        before = {n: (p.dtype, p.requires_grad, p.data_ptr()) for n, p in part.named_parameters()}
        prepare_model_for_kbit_training(part, use_gradient_checkpointing=False)
        assert before == {n: (p.dtype, p.requires_grad, p.data_ptr()) for n, p in part.named_parameters()}
    add_lora(base, make_config("lora.rank=4").lora, 0)
    kind = {8: peft_bnb.Linear8bitLt, 4: peft_bnb.Linear4bit}[bits]
    assert sum(isinstance(m, kind) for m in base.unet.modules()) > 20
    assert sum(isinstance(m, kind) for m in base.text_encoder.modules()) > 3


@pytest.mark.parametrize("bits", BITS)
def test_16_bit_training_leaves_rounded_weights_alone(bits: int) -> None:
    base = load("demo")
    quantize_frozen(base, bits)
    before = {name: p.data.clone() for name, p in base.unet.named_parameters() if p.dtype != torch.float32}
    shrink_frozen(base, "bf16-mixed")
    after = dict(base.unet.named_parameters())
    assert before and all(torch.equal(after[name], value) for name, value in before.items())
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        latents, timesteps, ids = export.probe_inputs(base)
        found = base.unet(latents, timesteps, base.encode_prompts(ids)).sample
    assert found.isfinite().all()


# Runs


@pytest.fixture(scope="module", params=BITS)
def run(
    request: pytest.FixtureRequest,
    make_config: Callable[..., Config],
    tmp_path_factory: pytest.TempPathFactory,
) -> RunDir:
    """A finished run on the demo in 8 or 4 bits."""
    found = RunDir(tmp_path_factory.mktemp(f"bits{request.param}") / "run")
    train.run(make_config(*SHORT, f"model.frozen_bits={request.param}", "optimizer.lr=5e-3"), found)
    return found


@pytest.mark.slow
def test_it_learns_and_exports_onto_the_full_base(run: RunDir) -> None:
    config = finished_config(run)
    assert run.status.read()["gain"] > 0
    checks = export.export(run, config, run.path / "export", merge=True)
    assert len(checks) == 4
    assert all(check.from_live < 1e-4 < check.from_base for check in checks)
    card = (run.path / "export" / "README.md").read_text()
    assert f"trained on a base in {config.model.frozen_bits} bits" in card
    merged = load(str(run.path / "export" / "merged"))
    assert {p.dtype for p in merged.unet.parameters()} == {torch.float32}


@pytest.mark.slow
def test_stopped_and_resumed_equals_undisturbed(
    run: RunDir, make_config: Callable[..., Config], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bits = finished_config(run).model.frozen_bits
    config = make_config(*SHORT, f"model.frozen_bits={bits}", "optimizer.lr=5e-3")
    again = RunDir(tmp_path / "run")
    with monkeypatch.context() as patch:
        stop_at(patch, 7)
        with pytest.raises(StandIn):
            train.run(config, again)
    assert again.last_checkpoint.exists() and not again.adapter.exists()
    train.run(config, again, resumes=True)
    assert not different_parts(run.path, again.path)


@pytest.mark.slow
def test_loaded_with_an_adapter_of_the_full_base_it_is_on_the_full_one(
    run: RunDir, make_config: Callable[..., Config], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    other = RunDir(tmp_path / "full")
    train.run(make_config(*SHORT), other)
    monitor = logging.getLogger("ghibli")
    monitor.addHandler(caplog.handler)
    loaded = load_model([str(run.path), f"{other.path}:0.5"], [])
    monitor.removeHandler(caplog.handler)
    assert {p.dtype for p in loaded.base.unet.parameters()} == {torch.float32}
    bits = finished_config(run).model.frozen_bits
    assert f"{run.path} in {bits}, {other.path} in full" in caplog.text


@pytest.mark.slow
def test_the_base_is_scored_as_it_trains(make_config: Callable[..., Config], tmp_path: Path) -> None:
    """Its reference scores are its own: near those of the full base, not the same, and cached apart."""
    losses = {}
    for bits in ("null", *BITS):
        found = RunDir(tmp_path / str(bits))
        train.run(make_config("finetune=none", f"model.frozen_bits={bits}"), found)
        losses[bits] = float(rows_of(found.path / "probe.csv")[0]["probe/val_loss"])
    assert losses[8] == pytest.approx(losses["null"], rel=0.02) and losses[8] != losses["null"]
    assert losses[4] == pytest.approx(losses["null"], rel=0.5) and losses[4] != losses[8]


@pytest.mark.parametrize("variant", ["dora", "rslora"])
def test_other_variants_train_too(variant: str, make_config: Callable[..., Config]) -> None:
    module = GhibliModule(make_config("model.frozen_bits=4", f"lora.variant={variant}"), load("demo")).train()
    latents, timesteps, ids = export.probe_inputs(module.base)
    module.unet(latents, timesteps, module.base.encode_prompts(ids)).sample.square().sum().backward()
    assert sum(bool(p.grad is not None and p.grad.abs().sum() > 0) for p in module.trainable.values()) > 20


# Bad input


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("model.frozen_bits=3",), "model.frozen_bits=3 is out of range: null, 8 or 4"),
        (("model.frozen_bits=4", "finetune=full"), "model.frozen_bits=4 is for weights that are not trained"),
        (("model.frozen_bits=8", "lora.variant=lokr"), "model.frozen_bits=8: PEFT has no lora.variant=lokr"),
    ],
)
def test_what_cannot_be_is_refused(
    make_config: Callable[..., Config], words: tuple[str, ...], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        make_config(*words)


def test_a_machine_without_its_operations_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError("no kernel 'quantize_4bit' for this device")

    monkeypatch.setattr(bitsandbytes.functional, "quantize_4bit", fail)
    with pytest.raises(UserError, match=r"bitsandbytes cannot compute with such layers \(no kernel"):
        quantize_frozen(load("demo"), 4)


@pytest.mark.slow
def test_no_command_prints_what_bitsandbytes_says_when_imported() -> None:
    """On a CPU it warns of a kernel that is not there whenever PEFT is imported."""
    code = "import ghibli.cli.main, ghibli.adapters.lora, bitsandbytes"
    done = run_python("-c", code)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
