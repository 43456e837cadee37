"""Losses and data of the three stages of pretraining, in order: CLIP, VAE, UNet."""

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from ghibli.demo.scenes.scene import compose, draw
from ghibli.images.grid import evenly, lay_out


def draw_images(count: int, look: str, first: int, grain: bool) -> torch.Tensor:
    """Draw `count` scenes from seed `first` on: uint8 (count, 3, 128, 128)."""
    images = [np.asarray(draw(compose(first + i), look, grain=grain)) for i in range(count)]
    return torch.from_numpy(np.stack(images).transpose(0, 3, 1, 2).copy())


def draw_pool(count: int, look: str, first: int, cache: Path, grain: bool) -> torch.Tensor:
    """Draw `count` scenes, or read them from the cache: uint8 (count, 3, 128, 128)."""
    file = cache / f"pool_{look}_{first}_{count}_{'grain' if grain else 'clean'}.npy"
    if not file.exists():
        cache.mkdir(parents=True, exist_ok=True)
        np.save(file, draw_images(count, look, first, grain).numpy())
        print(f"drew {count} {look} images", flush=True)
    return torch.from_numpy(np.load(file))


def to_pixel_values(images: torch.Tensor) -> torch.Tensor:
    """Convert uint8 images (B, 3, H, W) to float in -1 .. 1."""
    return images.float() / 127.5 - 1


def tokenize(tokenizer, captions: list[str]) -> torch.Tensor:
    """Tokenize captions to input_ids (B, 77)."""
    return tokenizer(
        captions, padding="max_length", max_length=77, truncation=True, return_tensors="pt"
    ).input_ids


def pick(count: int, batch: int, generator: torch.Generator) -> torch.Tensor:
    """Draw the indices of a batch, with replacement: unlike epochs, this needs no state to resume."""
    return torch.randint(count, (batch,), generator=generator)


class ClipLoss:
    """Contrastive loss between images of both looks and their captions; equal captions are positives."""

    def __init__(self, clip, tokenizer, pools: list[torch.Tensor], batch: int):
        self.clip, self.pools, self.batch = clip, pools, batch
        captions = [compose(i).caption for i in range(len(pools[0]))]
        self.input_ids = tokenize(tokenizer, captions)

    def __call__(self, step: int, generator: torch.Generator) -> torch.Tensor:
        index = pick(len(self.input_ids), self.batch, generator)
        pool = self.pools[step % len(self.pools)]
        pixel_values = to_pixel_values(pool[index])
        pixel_values += 0.03 * torch.randn(pixel_values.shape, generator=generator)
        ids = self.input_ids[index]
        result = self.clip(input_ids=ids, pixel_values=pixel_values)
        same = (ids[:, None] == ids[None]).all(dim=2).float()
        target = same / same.sum(dim=1, keepdim=True)
        logits = result.logits_per_text
        return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def edges(images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Differences to the right and to the lower neighbour."""
    return (images[..., 1:] - images[..., :-1], images[..., 1:, :] - images[..., :-1, :])


def chroma(images: torch.Tensor) -> torch.Tensor:
    """Means of 8 x 8 px in an opponent colour space: (B, 3, H / 8, W / 8).

    Without this term brightness is learned first and the images stay grey for a long time.
    """
    red, green, blue = F.avg_pool2d(images, 8).unbind(dim=1)
    return torch.stack([red - green, blue - green, red + green + blue], dim=1)


class VaeLoss:
    """Reconstruction loss on both looks: L1, L2, edges, coarse colour and a very small KL term.

    Most steps see crops of 64 x 64 px, the last ones a third as many images at full size. One image in three
    is from the first pool, two from the second, whose ink lines are harder.
    """

    def __init__(self, vae, pools: list[torch.Tensor], batch: int, full_size_from: int):
        self.vae, self.pools, self.batch, self.full_size_from = vae, pools, batch, full_size_from

    def images(self, step: int, generator: torch.Generator) -> torch.Tensor:
        full_size = step >= self.full_size_from
        batch = max(3, self.batch // 3) if full_size else self.batch
        parts = []
        for pool, thirds in zip(self.pools, (1, 2), strict=True):
            chosen = pool[pick(len(pool), batch * thirds // 3, generator)]
            if not full_size:
                corners = 8 * torch.randint(9, (len(chosen), 2), generator=generator)
                chosen = torch.stack(
                    [
                        image[:, y : y + 64, x : x + 64]
                        for image, (y, x) in zip(chosen, corners.tolist(), strict=True)
                    ]
                )
            parts.append(chosen)
        return to_pixel_values(torch.cat(parts))

    def __call__(self, step: int, generator: torch.Generator) -> torch.Tensor:
        clean = self.images(step, generator)
        grain = 0.02 * torch.randn((len(clean), 1, *clean.shape[2:]), generator=generator)
        noisy = (clean + grain).contiguous(memory_format=torch.channels_last)
        posterior = self.vae.encode(noisy).latent_dist
        latents = posterior.sample(generator=generator)
        result = self.vae.decode(latents).sample
        edge = sum(F.l1_loss(a, b) for a, b in zip(edges(result), edges(clean), strict=True))
        pixel = F.l1_loss(result, clean) + 2 * F.mse_loss(result, clean)
        colour = F.l1_loss(chroma(result), chroma(clean))
        return pixel + edge + 2 * colour + 1e-6 * posterior.kl().mean()


class UnetLoss:
    """Noise prediction loss on cached latents; one caption in ten is empty.

    The text encoder is trained too: it starts from CLIP's, whose own training was short.
    """

    def __init__(
        self,
        unet,
        text_encoder,
        tokenizer,
        moments: torch.Tensor,
        scaling: float,
        alphas_cumprod: torch.Tensor,
        batch: int,
    ):
        self.unet, self.text_encoder, self.moments = unet, text_encoder, moments
        self.scaling, self.alphas_cumprod, self.batch = scaling, alphas_cumprod, batch
        captions = [compose(i).caption for i in range(len(moments))]
        self.input_ids = tokenize(tokenizer, captions)
        self.empty_ids = tokenize(tokenizer, [""])

    def __call__(self, step: int, generator: torch.Generator) -> torch.Tensor:
        index = pick(len(self.moments), self.batch, generator)
        mean, std = self.moments[index].float().chunk(2, dim=1)
        latents = mean + std * torch.randn(mean.shape, generator=generator)
        latents = latents * self.scaling
        noise = torch.randn(latents.shape, generator=generator)
        start = torch.rand((), generator=generator)  # stratified timesteps
        spread = (start + torch.arange(self.batch) / self.batch) % 1
        high = torch.arange(self.batch) % 5 < 2  # two in five in 650 .. 999, which decide the light
        spread = torch.where(high, 0.65 + 0.35 * spread, spread)
        timesteps = (spread * len(self.alphas_cumprod)).long()
        alpha = self.alphas_cumprod[timesteps].view(-1, 1, 1, 1)
        noisy_latents = alpha.sqrt() * latents + (1 - alpha).sqrt() * noise
        empty = torch.rand((self.batch, 1), generator=generator) < 0.1
        prompt_embeds = self.text_encoder(torch.where(empty, self.empty_ids, self.input_ids[index]))[0]
        noisy_latents = noisy_latents.contiguous(memory_format=torch.channels_last)
        noise_pred = self.unet(noisy_latents, timesteps, prompt_embeds, return_dict=False)[0]
        return F.mse_loss(noise_pred, noise)


@torch.no_grad()
def encode_pool(vae, pool: torch.Tensor, cache: Path) -> torch.Tensor:
    """Encode a pool of images, or read the cache: mean and std of the latents, (count, 8, 16, 16), fp16."""
    if cache.exists():
        return torch.load(cache, weights_only=True)
    parts = []
    for images in pool.split(32):
        posterior = vae.encode(to_pixel_values(images)).latent_dist
        parts.append(torch.cat([posterior.mean, posterior.std], dim=1).half())
    moments = torch.cat(parts)
    torch.save(moments, cache)
    return moments


def psnr(vae, images: torch.Tensor) -> float:
    """Mean PSNR in dB of the reconstructions of uint8 images (B, 3, H, W)."""
    values = []
    with torch.no_grad():
        for part in images.split(16):
            clean = to_pixel_values(part)
            result = vae.decode(vae.encode(clean).latent_dist.mean).sample.clamp(-1, 1)
            error = ((result - clean) / 2).square().mean(dim=(1, 2, 3))
            values.append(-10 * torch.log10(error))
    return torch.cat(values).mean().item()


@torch.no_grad()
def reconstruction_rows(vae, held_out: list[torch.Tensor]) -> list[list[Image.Image]]:
    """Return two rows for each set of uint8 images: eight originals and their reconstructions."""
    rows = []
    for images in held_out:
        clean = to_pixel_values(images[:8])
        result = vae.decode(vae.encode(clean).latent_dist.mean).sample
        rows += [to_images(clean), to_images(result)]
    return rows


def save_sheet(rows: list[list[Image.Image]], file: Path, gap: int = 2) -> None:
    """Save rows of images of the same size as one PNG."""
    width, height = rows[0][0].size
    lefts, tops = evenly(len(rows[0]), width + gap), evenly(len(rows), height + gap)
    size = len(lefts) * (width + gap), len(tops) * (height + gap)
    file.parent.mkdir(parents=True, exist_ok=True)
    lay_out(size, rows, lefts, tops).save(file, optimize=True)


def to_images(pixel_values: torch.Tensor) -> list[Image.Image]:
    """Convert (B, 3, H, W) in -1 .. 1 to 8-bit images."""
    array = ((pixel_values.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
    return [Image.fromarray(image) for image in array]
