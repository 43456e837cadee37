"""Prompts of any length, with weights, as embeddings for the UNet.

As A1111 does: the tokens are cut into chunks of 75, each is encoded with a start and an end of its own, and
the embeddings stand one behind the other. A token's embedding is multiplied by its weight; afterwards the
chunk is scaled so that its mean is what it was.
"""

from math import lcm
from typing import NamedTuple

import torch

from ghibli.models.base import TOKENIZER_LOCK, BaseModel
from ghibli.models.prompt_syntax import parse_prompt
from ghibli.runtime.errors import UserError


class Chunk(NamedTuple):
    """One input of the text encoder."""

    input_ids: list[int]  # 77, with start, end and padding
    weights: list[float]  # one a token; 1 for start, end and padding


def encode_weighted(base: BaseModel, prompts: list[str]) -> torch.Tensor:
    """Encode prompts with weights, none of them cut: prompt_embeds (B, 77 k, D) on the text encoder's device.

    A prompt of fewer chunks than its neighbours is repeated until it is as long: attention over keys that
    all occur equally often is that over the keys once, so no image depends on another one's prompt.

    Raises:
        UserError: as parse_prompt, or weights that the embeddings overflow with.
    """
    chunked = [chunks_of(base, prompt) for prompt in prompts]
    device = next(base.text_encoder.parameters()).device
    every = [chunk for chunks in chunked for chunk in chunks]
    embeds = base.encode_prompts(torch.tensor([chunk.input_ids for chunk in every], device=device))
    rows = [apply_weights(row, chunk.weights) for row, chunk in zip(embeds, every, strict=True)]
    found, start = [], 0
    for prompt, chunks in zip(prompts, chunked, strict=True):
        found.append(torch.cat(rows[start : start + len(chunks)]))
        if not found[-1].isfinite().all():
            raise UserError(f"the weights in the prompt `{prompt[:60]}` are too large: 0.5 to 1.5 are usual")
        start += len(chunks)
    length = lcm(*(len(one) for one in found))
    return torch.stack([one.repeat(length // len(one), 1) for one in found])


def same_length(
    prompt_embeds: torch.Tensor, negative_prompt_embeds: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Repeat embeddings (B, 77 k, D) and (B, 77 m, D) to one length, as encode_weighted does."""
    length = lcm(prompt_embeds.shape[1], negative_prompt_embeds.shape[1])
    first, second = (
        embeds.repeat(1, length // embeds.shape[1], 1) for embeds in (prompt_embeds, negative_prompt_embeds)
    )
    return first, second


def apply_weights(embeds: torch.Tensor, weights: list[float]) -> torch.Tensor:
    """Multiply the embeddings (77, D) of a chunk by its weights and restore their mean."""
    if all(weight == 1 for weight in weights):
        return embeds
    scaled = embeds * torch.tensor(weights, device=embeds.device, dtype=embeds.dtype)[:, None]
    return scaled * (embeds.mean() / scaled.mean())


def chunks_of(base: BaseModel, prompt: str) -> list[Chunk]:
    """Cut a prompt into chunks of the text encoder's length; an empty prompt is one chunk."""
    room = base.tokenizer.model_max_length - 2  # without start and end
    ids, weights = [], []
    for text, weight in parse_prompt(prompt):
        with TOKENIZER_LOCK:
            found = base.tokenizer(text, add_special_tokens=False, verbose=False).input_ids
        ids += found
        weights += [weight] * len(found)
    starts = range(0, max(len(ids), 1), room)
    return [padded(base, ids[start : start + room], weights[start : start + room]) for start in starts]


def padded(base: BaseModel, ids: list[int], weights: list[float]) -> Chunk:
    """Add start, end and padding, as the tokenizer does."""
    tokenizer = base.tokenizer
    rest = tokenizer.model_max_length - 2 - len(ids)
    return Chunk(
        [tokenizer.bos_token_id, *ids, tokenizer.eos_token_id, *[tokenizer.pad_token_id] * rest],
        [1.0, *weights, *[1.0] * (rest + 1)],
    )
