"""Frozen linear layers in 8 or 4 bits, by bitsandbytes: what model.frozen_bits asks for.

    8   LLM.int8() (Dettmers et al. 2022): a scale for each output row; inputs are rounded to 8 bits too,
        but for training on a CPU. Without its decomposition of outliers: every layer would wait for the GPU.
    4   QLoRA (Dettmers et al. 2023): NormalFloat with a scale for each 64 weights, double quantisation.

These are the layers that `BitsAndBytesConfig` makes in transformers and diffusers. They are made here from
the weights that were loaded and checked, on the CPU, so that a base in any layout, with any adapter merged,
has the same 8- or 4-bit weights on every device. diffusers' own loader needs a GPU.

PEFT's prepare_model_for_kbit_training would change nothing more: every weight is frozen already and every
norm in fp32, and gradient checkpointing is compute.checkpoint_every.
"""

from functools import cache
from typing import Any

import torch
from torch import nn

from ghibli.models.base import BaseModel
from ghibli.runtime.commands import install_command
from ghibli.runtime.errors import UserError, first_line


def quantize_frozen(base: BaseModel, bits: int) -> None:
    """Put the weights of all linear layers of UNet and text encoder into 8 or 4 bits, in place, on the CPU.

    Convolutions, norms, embeddings and biases keep their precision. PEFT chooses its layers by theirs, so
    adapters are added afterwards.

    Raises:
        UserError: bitsandbytes is not installed, or cannot compute with such layers here.
    """
    try:
        make = {8: linear_8bit, 4: linear_4bit}[bits]
        check_backend(make)
        for part in base.adaptable.values():
            linear = {path: layer for path, layer in part.named_modules() if type(layer) is nn.Linear}
            for path, layer in linear.items():
                part.set_submodule(path, make(layer))
            setattr(part, f"is_loaded_in_{bits}bit", True)  # by which PEFT knows
    except ImportError as error:
        raise UserError(
            f"model.frozen_bits={bits}: bitsandbytes cannot be imported ({first_line(error)}): "
            f"{install_command('bitsandbytes')}, or leave it out"
        ) from error


def check_backend(make: Any) -> None:
    """Run one small layer forward and backward.

    Raises:
        UserError: bitsandbytes has no code for it on this machine.
    """
    try:
        layer = make(nn.Linear(64, 64))
        layer(torch.ones(1, 64, requires_grad=True)).sum().backward()
    except ImportError:
        raise
    except Exception as error:  # missing libraries and operations raise many types
        raise UserError(
            f"model.frozen_bits: this machine's bitsandbytes cannot compute with such layers "
            f"({first_line(error)}): leave it out"
        ) from error


def linear_4bit(layer: nn.Linear) -> nn.Module:
    """Return bitsandbytes' NF4 layer with the weights of a linear layer; frozen."""
    from bitsandbytes.nn import Linear4bit, Params4bit

    made = Linear4bit(
        layer.in_features, layer.out_features, layer.bias is not None, compute_dtype=torch.float32,
        compress_statistics=True, quant_type="nf4", device="meta",
    )  # fmt: skip
    made.support_avx512bf16_for_cpu = False  # else evaluation would round the scales to bf16, for good
    made.weight = Params4bit(
        layer.weight.detach(), requires_grad=False, quant_type="nf4", compress_statistics=True, module=made
    )
    made.bias = layer.bias
    return made.to("cpu").train(layer.training)


def linear_8bit(layer: nn.Linear) -> nn.Module:
    """Return bitsandbytes' int8 layer with the weights of a linear layer; frozen."""
    from bitsandbytes.nn import Int8Params

    made = movable_linear_8bit()(
        layer.in_features, layer.out_features, layer.bias is not None, has_fp16_weights=False,
        threshold=0.0, device="meta",
    )  # fmt: skip
    made.weight = Int8Params(layer.weight.detach(), requires_grad=False, has_fp16_weights=False)
    made.bias = layer.bias
    made = made.to("cpu").train(layer.training)
    made.init_8bit_state()
    return made


@cache
def movable_linear_8bit() -> Any:
    """Return bitsandbytes' Linear8bitLt, made movable: its scales follow the weights to another device."""
    from bitsandbytes.nn import Linear8bitLt

    class MovableLinear8bit(Linear8bitLt):
        def _apply(self, fn: Any, recurse: bool = True) -> Any:
            super()._apply(fn, recurse)
            if self.state.CB is not None and self.state.SCB is not None:
                self.state.CB = self.weight.data
                self.state.SCB = self.state.SCB.to(self.weight.device)
            return self

    return MovableLinear8bit


def compute_in(base: BaseModel, dtype: torch.dtype) -> None:
    """Let 4-bit layers multiply in this dtype, that of autocast; 8-bit layers go by their inputs."""
    for part in base.adaptable.values():
        layers: list[Any] = [module for module in part.modules() if hasattr(module, "quant_state")]
        for layer in layers:
            layer.compute_dtype = dtype


def weight_bytes(part: nn.Module) -> int:
    """Return the bytes of a module's weights, with the scales and tables of those in 8 or 4 bits."""
    total = sum(parameter.nbytes for parameter in part.parameters())
    modules: Any = part.modules()
    for module in modules:
        if getattr(module, "quant_state", None) is not None:
            packed = module.quant_state.as_dict(packed=True).values()
            total += sum(value.nbytes for value in packed if isinstance(value, torch.Tensor))
        if getattr(getattr(module, "state", None), "SCB", None) is not None:
            total += module.state.SCB.nbytes
    return total
