"""How the model computes, and nothing of what: memory layout, compilation, recomputation, dtype.

Each of these leaves the gradients as they are, but for rounding.
"""

from collections.abc import Callable
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from ghibli.config.schema import ComputeConfig
from ghibli.models.base import BaseModel

KEPT_PROMPTS = 2**30  # bytes of prompt embeddings that are kept on the device at most
PROMPTS_AT_ONCE = 8  # encoded together; always so many, so an embedding never depends on the others


def arrange(base: BaseModel, options: ComputeConfig) -> None:
    """Lays out the UNet's convolutions and says which blocks are computed again in the backward pass."""
    if options.channels_last:
        base.unet.to(memory_format=torch.channels_last)
    if options.checkpoint_every:
        recompute(base, options.checkpoint_every)


def recompute(base: BaseModel, every: int) -> None:
    """Gradient checkpointing (Chen et al. 2016): every n-th block keeps its input alone.

    A third more computing for a fraction of the memory. Dropout draws the same again.
    """
    base.unet.enable_gradient_checkpointing()
    blocks = [module for module in base.unet.modules() if getattr(module, "gradient_checkpointing", False)]
    for place, block in enumerate(blocks):
        block.gradient_checkpointing = place % every == 0
    if any(parameter.requires_grad for parameter in base.text_encoder.parameters()):
        base.text_encoder.gradient_checkpointing_enable({"use_reentrant": False})


def compiled(predict: Callable[..., torch.Tensor], options: ComputeConfig) -> Callable[..., torch.Tensor]:
    """The same function, through torch.compile if asked: once for each shape of a batch."""
    return torch.compile(predict, dynamic=False) if options.compile else predict


def shrink_frozen(base: BaseModel, precision: str) -> None:
    """In 16-bit training, keeps the frozen matrices and kernels in 16 bits; norms stay in fp32.

    Autocast rounds them so in every step anyway: the same result from half the memory. PEFT's own
    casts of the input to the adapter's fp32 go too, since autocast would undo them at once; what they
    kept exact was dropout's factor 1 / (1 - p).

    Args:
        precision: Lightning's, such as 32-true or bf16-mixed.
    """
    dtype = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}.get(precision)
    if dtype is None:
        return
    for part in (base.unet, base.text_encoder):
        for module in part.modules():
            if isinstance(module, BaseTunerLayer):
                module.cast_input_dtype_enabled = False
            if isinstance(module, nn.Linear | nn.Conv2d):
                for parameter in module.parameters(recurse=False):
                    if not parameter.requires_grad:
                        parameter.data = parameter.data.to(dtype)


class PromptEmbeds:
    """The embeddings of all captions of a run, from a text encoder that is not trained.

    Args:
        input_ids: (N, L); each row once is enough, the first row being the empty caption's.
    """

    def __init__(self, base: BaseModel, input_ids: torch.Tensor, on_progress: Callable[[int, int], None]):
        self.input_ids = torch.unique(input_ids, dim=0)
        rows = len(self.input_ids)
        found = []
        for start in range(0, rows, PROMPTS_AT_ONCE):
            chunk = self.input_ids[start : start + PROMPTS_AT_ONCE]
            padding = chunk[:1].expand(PROMPTS_AT_ONCE - len(chunk), -1)
            found.append(base.encode_prompts(torch.cat([chunk, padding]))[: len(chunk)])
            on_progress(min(start + PROMPTS_AT_ONCE, rows), rows)
        self.embeds = torch.cat(found)

    def __call__(self, input_ids: torch.Tensor) -> torch.Tensor:
        """input_ids (B, L), all of them known -> prompt_embeds (B, L, D), without leaving the device."""
        same = (input_ids[:, None] == self.input_ids[None]).all(dim=2)  # (B, N)
        return self.embeds[same.to(torch.uint8).argmax(dim=1)]


def prompts_fit(base: BaseModel, input_ids: torch.Tensor) -> bool:
    """Whether the embeddings of all these captions are few enough to be kept."""
    width = base.text_encoder.config.hidden_size
    return torch.unique(input_ids, dim=0).numel() * width * 4 <= KEPT_PROMPTS


def is_frozen(part: Any) -> bool:
    """Whether nothing in it is trained."""
    return not any(parameter.requires_grad for parameter in part.parameters())
