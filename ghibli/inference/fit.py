"""Whether an image fits into memory, measured on the loaded model at a small size before it is drawn."""

import torch

from ghibli.models.base import TILE, WHOLE, BaseModel
from ghibli.models.cost import FRAGMENTS, measure_cost
from ghibli.runtime.errors import UserError
from ghibli.runtime.resources import free_memory

UNCHECKED = 2**20  # px of a batch that is drawn without a look at the memory


@torch.no_grad()
def require_memory(base: BaseModel, size: tuple[int, int], batch: int, guidance: float) -> None:
    """Raise a UserError if a batch of images of this size needs more memory than is free.

    Args:
        size: width and height in px.
        batch: images drawn together; guidance doubles them inside the UNet.
    """
    pixels = size[0] * size[1]
    if pixels * batch <= UNCHECKED:
        return
    device = next(base.unet.parameters()).device
    need, free = bytes_needed(base, pixels, batch * (1 if guidance == 1 else 2)), free_memory(device)
    if need > free:
        fewer = ", or fewer at once (--batch 1)" if batch > 1 else ""
        together = f"{batch} images of " if batch > 1 else ""
        raise UserError(
            f"not enough memory: {together}{size[0]}x{size[1]} px take about {need / 1e9:.1f} GB, and "
            f"{free / 1e9:.1f} GB are free: draw smaller ones (--size, --hires){fewer}"
        )


def bytes_needed(base: BaseModel, pixels: int, examples: int) -> float:
    """Return the bytes that denoising `examples` images of so many px, or decoding one, takes at its peak."""
    device, channels = next(base.unet.parameters()).device, base.unet.config.in_channels

    def latents(height: int, width: int) -> torch.Tensor:
        return torch.zeros(1, channels, height // base.vae_factor, width // base.vae_factor, device=device)

    def predict(height: int, width: int) -> torch.Tensor:
        embeds = torch.zeros(1, 77, base.unet.config.cross_attention_dim, device=device)
        timestep = torch.zeros(1, dtype=torch.long, device=device)
        return base.unet(latents(height, width), timestep, embeds, return_dict=False)[0]

    denoise, decode = measure_cost(predict, 64), measure_cost(lambda h, w: base.decode(latents(h, w)), 32)
    in_one_piece = pixels if pixels <= WHOLE else TILE**2
    return FRAGMENTS * max(
        examples * (denoise.example + denoise.pixel * pixels),
        decode.example + decode.pixel * in_one_piece + 4 * 3 * pixels * 3,
    )
