"""Speed and memory: channels-last layout, compilation, gradient checkpointing, 16-bit frozen weights.

None of these changes the gradients beyond rounding.
"""

from collections.abc import Callable
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from ghibli.config.schema import ComputeConfig
from ghibli.models.base import BaseModel
from ghibli.models.quantize import compute_in

KEPT_PROMPTS = 2**30  # bytes of prompt embeddings kept on the device, at most
PROMPTS_AT_ONCE = 8  # batch size, always full, so that an embedding never depends on the other prompts


def arrange(base: BaseModel, options: ComputeConfig) -> None:
    """Apply compute.channels_last and compute.checkpoint_every to the UNet, in place."""
    if options.channels_last:
        base.unet.to(memory_format=torch.channels_last)
    if options.checkpoint_every:
        recompute(base, options.checkpoint_every)


def recompute(base: BaseModel, every: int) -> None:
    """Turn on gradient checkpointing (Chen et al. 2016) in every n-th block of the UNet.

    Such a block keeps only its input and is computed again in the backward pass, dropout included:
    a third more compute for a fraction of the memory.
    """
    base.unet.enable_gradient_checkpointing()
    blocks = [module for module in base.unet.modules() if getattr(module, "gradient_checkpointing", False)]
    for index, block in enumerate(blocks):
        block.gradient_checkpointing = index % every == 0
    if any(parameter.requires_grad for parameter in base.text_encoder.parameters()):
        base.text_encoder.activation_checkpointing_enable({"use_reentrant": False})


def compiled(predict: Callable[..., torch.Tensor], options: ComputeConfig) -> Callable[..., torch.Tensor]:
    """Wrap a function in torch.compile if compute.compile is set: one compilation per batch shape."""
    return torch.compile(predict, dynamic=False) if options.compile else predict


def shrink_frozen(base: BaseModel, precision: str) -> None:
    """Store frozen linear and convolution weights in 16 bits for mixed-precision training; norms stay fp32.

    Weights in 8 or 4 bits (model.frozen_bits) stay as they are, and are multiplied in the 16 bits.

    Autocast rounds them in every step anyway: the same result in half the memory. PEFT's casts of the
    input to the adapter's fp32 are turned off too, since autocast undoes them at once; all they kept
    exact was dropout's factor 1 / (1 - p).

    Args:
        precision: Lightning's precision flag, such as 32-true or bf16-mixed.
    """
    dtype = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}.get(precision)
    if dtype is None:
        return
    compute_in(base, dtype)
    for part in (base.unet, base.text_encoder):
        for module in part.modules():
            if isinstance(module, BaseTunerLayer):
                module.cast_input_dtype_enabled = False
            if isinstance(module, nn.Linear | nn.Conv2d):
                for parameter in module.parameters(recurse=False):
                    if not parameter.requires_grad and parameter.is_floating_point():
                        parameter.data = parameter.data.to(dtype)


class PromptEmbeds:
    """Table of the embeddings of all captions of a run, for a frozen text encoder.

    Args:
        input_ids: (N, L), int64, of all captions including the empty one; duplicates are dropped.
        on_progress: called with (captions encoded, captions in all).
    """

    def __init__(self, base: BaseModel, input_ids: torch.Tensor, on_progress: Callable[[int, int], None]):
        self.input_ids = torch.unique(input_ids.cpu(), dim=0).to(input_ids.device)
        rows = len(self.input_ids)
        found = []
        for start in range(0, rows, PROMPTS_AT_ONCE):
            chunk = self.input_ids[start : start + PROMPTS_AT_ONCE]
            padding = chunk[:1].expand(PROMPTS_AT_ONCE - len(chunk), -1)
            found.append(base.encode_prompts(torch.cat([chunk, padding]))[: len(chunk)])
            on_progress(min(start + PROMPTS_AT_ONCE, rows), rows)
        self.embeds = torch.cat(found)

    def __call__(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Look up input_ids (B, L), all of them in the table: prompt_embeds (B, L, D); no GPU sync."""
        same = (input_ids[:, None] == self.input_ids[None]).all(dim=2)  # (B, N)
        return self.embeds[same.to(torch.uint8).argmax(dim=1)]


def prompts_fit(base: BaseModel, input_ids: torch.Tensor) -> bool:
    """Tell whether the embeddings of input_ids (N, L) fit into KEPT_PROMPTS bytes as fp32."""
    width = base.text_encoder.config.hidden_size
    return torch.unique(input_ids, dim=0).numel() * width * 4 <= KEPT_PROMPTS


def is_frozen(part: Any) -> bool:
    """Tell whether no parameter of a module is trained."""
    return not any(parameter.requires_grad for parameter in part.parameters())
