"""lora.init: which files can be trained further, with which printed settings, and from where they start."""

import shlex
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers.adapter_files import ALPHA, RANK, adapter_state
from safetensors.torch import save_file

from ghibli.adapters import lora
from ghibli.adapters.describe import describe_adapter, training_command
from ghibli.adapters.files import Adapter, read_adapter
from ghibli.adapters.names import named_layers
from ghibli.adapters.start import check_same_shape, start_from
from ghibli.models.base import BaseModel
from ghibli.runtime.errors import UserError

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
OF_TEXT = ("q_proj", "k_proj", "v_proj", "out_proj")
TEXT_LAYERS = (*OF_TEXT, "fc1", "fc2")


def adapter_of(model: BaseModel, kinds: dict[str, str], folder: Path) -> Adapter:
    save_file(adapter_state(model, kinds), folder / "it.safetensors")
    return read_adapter(folder / "it.safetensors", model, "adapter")


def layers_ending(model: BaseModel, *endings: str) -> list[str]:
    return [name for name in named_layers(model) if lora.ends_in(name, list(endings))]


def half_of(model: BaseModel) -> list[str]:
    """sd-scripts' block weights leave layers of one kind out, here every to_q of the upper blocks."""
    return [name for name in layers_ending(model, *ATTENTION) if not ("up_blocks" in name and "to_q" in name)]


FILES: dict[str, tuple[Callable[[BaseModel], list[str]], str, str]] = {  # layers, kind, what is printed
    "sd-scripts' default": (
        lambda m: layers_ending(m, *ATTENTION, *TEXT_LAYERS), "lora",
        "lora.targets=attention lora.text_encoder=true lora.text_encoder_targets=attention+mlp",
    ),
    "UNet alone": (
        lambda m: layers_ending(m, *ATTENTION), "lora", "lora.targets=attention lora.text_encoder=false",
    ),
    "text encoder alone": (
        lambda m: layers_ending(m, *OF_TEXT), "lora",
        "lora.targets=none lora.text_encoder=true lora.text_encoder_targets=attention",
    ),
    "DoRA": (
        lambda m: layers_ending(m, *ATTENTION, *OF_TEXT), "dora_out",
        "lora.text_encoder=true lora.variant=dora lora.text_encoder_targets=attention",
    ),
    "convolutions": (lambda m: layers_ending(m, "to_q", "conv1"), "lora", "'lora.targets=[conv1,to_q]'"),
    "some blocks": (half_of, "lora", "'lora.targets=[to_k,to_out.0,down_blocks.0.attentions.0."),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("what", FILES)
@torch.no_grad()
def test_the_printed_settings_train_exactly_the_file(
    what: str, model: BaseModel, base: BaseModel, make_config: Callable, tmp_path: Path
) -> None:
    """Fresh layers with these settings take all of it, at another alpha too, and are then W'."""
    layers_of, kind, printed = FILES[what]
    adapter = adapter_of(model, dict.fromkeys(layers_of(model), kind), tmp_path)
    command = training_command(adapter, model, [])
    assert printed in command and f"lora.rank={RANK} lora.alpha={ALPHA:g}" in command
    for words in ([], ["lora.alpha=8"]):
        options = make_config(*shlex.split(command)[2:], *words).lora
        check_same_shape(adapter, options, model)
    lora.add_lora(base, options, 0)
    start_from(adapter, lora.trainable(base), options)
    for part, module in base.adaptable.items():
        for path, layer in module.named_modules():
            if hasattr(layer, "get_delta_weight"):
                weight = layer.get_base_layer().weight.clone()
                wanted = weight + adapter.layers[f"{part}.{path.removeprefix('text_model.')}"].delta(weight)
                layer.merge()
                torch.testing.assert_close(layer.get_base_layer().weight, wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("kinds", "why"),
    [
        (("oft",), "it holds OFT layers"),
        (("full",), "it holds full difference layers"),
        (("tucker",), "it holds LoCon layers"),
        (("lora", "lokr"), "its layers are of several kinds: "),
        (("dora_in",), "its DoRA magnitudes are one an input"),
        (("lora", "dora_out"), "its layers are of several kinds: "),
    ],
)
def test_what_cannot_be_trained_is_said_and_refused(
    kinds: tuple[str, ...], why: str, model: BaseModel, make_config: Callable, tmp_path: Path
) -> None:
    names = layers_ending(model, *(["conv1"] if kinds == ("tucker",) else ATTENTION))
    adapter = adapter_of(model, {name: kinds[n % len(kinds)] for n, name in enumerate(names)}, tmp_path)
    assert training_command(adapter, model, []).startswith(f"not possible: {why}")
    with pytest.raises(UserError, match=f"lora.init=.* cannot be trained further: {why}"):
        check_same_shape(adapter, make_config("lora.init=it.safetensors").lora, model)


def test_layers_that_a_run_would_leave_untrained_are_named(
    model: BaseModel, make_config: Callable, tmp_path: Path
) -> None:
    adapter = adapter_of(model, dict.fromkeys(half_of(model), "lora"), tmp_path)
    options = make_config(f"lora.rank={RANK}", "lora.init=x", "lora.text_encoder=false").lora
    with pytest.raises(
        UserError, match="lora.init=x: lora.targets of this run differ from those of the file"
    ):
        check_same_shape(adapter, options, model)


def test_a_path_with_spaces_is_printed_quoted(model: BaseModel, tmp_path: Path) -> None:
    folder = tmp_path / "my files (1)"
    folder.mkdir()
    adapter = adapter_of(model, dict.fromkeys(layers_ending(model, *ATTENTION), "lora"), folder)
    *_, train, generate = describe_adapter(adapter, model, ["model=demo"])
    assert shlex.split(train)[3:5] == ["model=demo", f"lora.init={adapter.file}"]
    assert shlex.split(generate)[1:] == [
        "ghibli",
        "generate",
        str(adapter.file),
        "model=demo",
        "--prompt",
        "TEXT",
    ]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["lora.targets=none", "lora.text_encoder=false"], "lora.targets"),
        (["lora.text_encoder_targets=everything"], "lora.text_encoder_targets"),
        (["lora.text_encoder_targets=[]"], "lora.text_encoder_targets"),
        (["lora.alpha=inf"], "lora.alpha"),
        (["model.adapter_scale=nan"], "model.adapter_scale"),
    ],
)
def test_settings_that_no_adapter_can_have(words: list[str], message: str, make_config: Callable) -> None:
    with pytest.raises(UserError, match=message):
        make_config(*words)


def test_an_unknown_layer_of_the_text_encoder_is_named(base: BaseModel, make_config: Callable) -> None:
    options = make_config("lora.text_encoder_targets=[fc1,fc9]").lora
    with pytest.raises(
        UserError, match=r"lora.text_encoder_targets: no layer is called fc9; there are fc1, fc2"
    ):
        lora.add_lora(base, options, 0)
