"""Image features for the distances, the fit of image and caption, and the reference set.

`style`: mean and standard deviation over the image of every channel in every block of the base's own VAE
encoder: colours, edges, textures. It is available wherever a base is and sensitive to style; a CLIP image
tower, trained to recognise the same caption in every style, hardly is.
`inception`: the network of FID. Only with these features is a Frechet distance called FID.
`layout`: where what is, which a mean over the image cannot see: the latents, pooled to a coarse grid. It is
measured beside whichever of the two is chosen.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3, FeatureExtractorInceptionV3
from transformers import CLIPImageProcessor, CLIPModel

from ghibli.config.schema import Config
from ghibli.evaluation.distances import frechet_distance, kernel_difference, kernel_distance
from ghibli.evaluation.statistics import Estimate
from ghibli.models.base import BaseModel, part_hash, weights_hash
from ghibli.models.configs import check_config
from ghibli.models.hub import CLIP_FILES
from ghibli.models.load import load_part, part_folder
from ghibli.runtime.errors import UserError, first_line
from ghibli.runtime.home import expanded

BATCH = 16  # images that pass a feature network together, at most
BATCH_PIXELS = BATCH * 256 * 256  # of those images together, at most
LAYOUT_GRID = 8  # cells of a side, each with the mean of its latents
UNIT_IMAGES = 200  # training images, at most, in whose deviations style features are measured


def distance_names(kind: str | None) -> tuple[str, str]:
    """Return the names of the kernel distance and the Frechet distance with these features."""
    return ("KID", "FID") if kind == "inception" else ("style distance", "Frechet")


def extract_in_batches(
    extract: Callable[[torch.Tensor], torch.Tensor],
    images: torch.Tensor,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> torch.Tensor:
    """Extract features (N, D), float64 on the CPU, from images (N, 3, H, W) in 0 .. 1.

    Args:
        extract: images (B, 3, H, W) in 0 .. 1 -> features (B, D).
        on_progress: called with (images done, images in total).
    """
    rows, size = [], max(1, min(BATCH, BATCH_PIXELS // images.shape[-2:].numel()))
    with torch.no_grad():
        for start in range(0, len(images), size):
            rows.append(extract(images[start : start + size]).double().cpu())
            on_progress(min(start + size, len(images)), len(images))
    return torch.cat(rows)


def style_features(vae: AutoencoderKL, images: torch.Tensor) -> torch.Tensor:
    """Compute mean and deviation of the VAE encoder's channels over the image, block by block: (B, D).

    The deviation is the standard deviation. The blocks are the first convolution and all down blocks but
    the last: D is 320 for the demo, 2048 for SD 1.5.

    Args:
        images: (B, 3, H, W) in 0 .. 1.
    """
    blocks = [vae.encoder.conv_in(images.to(vae.device) * 2 - 1)]
    for block in vae.encoder.down_blocks[:-1]:
        blocks.append(block(blocks[-1]))
    return torch.cat([part for b in blocks for part in (b.mean((2, 3)), b.std((2, 3)))], dim=1)


def layout_features(vae: AutoencoderKL, images: torch.Tensor) -> torch.Tensor:
    """Compute the mean latents of images (B, 3, H, W) in 0 .. 1, pooled to LAYOUT_GRID squared: (B, D)."""
    latents = vae.encode(images.to(vae.device) * 2 - 1).latent_dist.mean
    return torch.nn.functional.adaptive_avg_pool2d(latents, LAYOUT_GRID).flatten(1)


def standardised(features: torch.Tensor, units: torch.Tensor) -> torch.Tensor:
    """Standardise each column of features (N, D) by the mean and deviation of others, (U, D)."""
    return (features - units.mean(0)) / units.std(0).clamp(min=1e-6)


def load_inception(weights: str | None) -> FeatureExtractorInceptionV3:
    """Load the network of FID, (B, 3, H, W) uint8 -> (B, 2048), from a file or torch-fidelity's download.

    Raises:
        UserError: the file is missing or holds other weights, or it cannot be downloaded.
    """
    file = expanded(weights) if weights else downloaded_inception()
    if not file.is_file():
        raise UserError(f"evaluate.inception={weights}: no such file")
    try:
        content = torch.load(file, weights_only=True, map_location="cpu")  # the library's loader unpickles
        if not isinstance(content, dict):
            raise TypeError
        return FeatureExtractorInceptionV3("inception", ["2048"], str(file)).eval()
    except Exception as error:  # torch raises many types; each means the same to the user
        raise UserError(f"evaluate.inception={file} does not hold the FID network's weights") from error


def downloaded_inception() -> Path:
    """Return the path of torch-fidelity's weights, downloaded once into torch's cache.

    Raises:
        UserError: they are not there and cannot be downloaded.
    """
    file = Path(torch.hub.get_dir()) / "checkpoints" / Path(URL_INCEPTION_V3).name
    try:
        if not file.is_file():
            file.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(URL_INCEPTION_V3, str(file))
    except OSError as error:
        raise UserError(
            f"the Inception weights of FID are not on this machine and cannot be downloaded ({error}): get "
            f"{file.name} from torch-fidelity's releases and give its path with evaluate.inception=FILE, "
            "or use evaluate.features=style"
        ) from error
    return file


def inception_features(network: FeatureExtractorInceptionV3, images: torch.Tensor) -> torch.Tensor:
    """Compute pooled features (B, 2048) of images (B, 3, H, W) in 0 .. 1, first rounded to 8 bits."""
    levels = (images * 255).round().to(torch.uint8)
    return network(levels.to(next(network.parameters()).device))[0]


def clip_similarity(clip: CLIPModel, pixel_values: torch.Tensor, input_ids: torch.Tensor) -> torch.Tensor:
    """Compute 100 x the cosine between each image and its caption, (B,): the CLIP score (Hessel et al. 2021).

    Args:
        pixel_values: (B, 3, S, S), preprocessed for this CLIP.
        input_ids: (B, L) int64.
    """
    output = clip(pixel_values=pixel_values, input_ids=input_ids)
    return 100 * (output.image_embeds * output.text_embeds).sum(1)


class FeatureExtractor:
    """The configured feature network and CLIP, loaded once.

    Args:
        base: an untouched base; its VAE gives the style features, its tokenizer CLIP's input_ids.

    Raises:
        UserError: weights that are not on this machine.
    """

    def __init__(self, config: Config, base: BaseModel):
        self.base, self.kind = base, config.evaluate.features
        self.clip = load_clip(config.model.clip)
        self.hashes: dict[str, str | None]  # of every network that measures
        self.hashes = {"features": self.kind, "vae": weights_hash(base)}
        self.hashes["clip"] = None if self.clip is None else part_hash(self.clip[0])
        if self.kind == "inception":
            network = load_inception(config.evaluate.inception).to(base.vae.device)
            self.hashes["inception"] = part_hash(network)
            self._extract: Callable = lambda batch: inception_features(network, batch)
        else:
            self._extract = lambda batch: style_features(base.vae, batch)

    def measure(self, images: torch.Tensor, captions: list[str]) -> dict[str, torch.Tensor]:
        """Measure images (N, 3, H, W) in 0 .. 1.

        Returns:
            `features` (N, D), `layout` (N, D') and, with a CLIP, `caption_fit` (N,).
        """
        measured = {
            "features": extract_in_batches(self._extract, images),
            "layout": extract_in_batches(lambda batch: layout_features(self.base.vae, batch), images),
        }
        if self.clip is not None:
            measured["caption_fit"] = self._caption_fit(*self.clip, images, captions)
        return measured

    @torch.no_grad()
    def _caption_fit(
        self, clip: CLIPModel, processor: CLIPImageProcessor, images: torch.Tensor, captions: list[str]
    ) -> torch.Tensor:
        scores, device = [], self.base.vae.device
        clip.to(device)
        for start in range(0, len(images), BATCH):
            part = slice(start, start + BATCH)
            levels = (images[part] * 255).round().to(torch.uint8)
            pixel_values = processor(images=list(levels), return_tensors="pt")["pixel_values"]
            input_ids = self.base.tokenize(captions[part])
            scores.append(clip_similarity(clip, pixel_values.to(device), input_ids.to(device)).cpu())
        return torch.cat(scores)


def load_clip(name: str | None) -> tuple[CLIPModel, CLIPImageProcessor] | None:
    """Load the CLIP model of `model.clip`, a folder or hub name, and its image processor; None without one.

    Raises:
        UserError: it cannot be loaded.
    """
    if name is None:
        return None
    folder = part_folder(name, f"model.clip={name}", CLIP_FILES, ", or model.clip=null")
    clip = load_part(CLIPModel, folder, f"model.clip={name}", dtype=torch.float32)
    check_config(folder / "preprocessor_config.json", f"model.clip={name}")
    try:
        return clip.eval(), CLIPImageProcessor.from_pretrained(folder)
    except Exception as error:  # transformers raises many types; all mean the same to the user
        raise UserError(f"model.clip={name} cannot be loaded: {first_line(error)}") from error


@dataclass(frozen=True)
class ReferenceSet:
    """The features of the real images to compare with, and how features are scaled for the distances.

    Style features are measured in deviations of training images, of which there are many: the few reference
    images would give units in which they themselves are extreme, and all distances too large.
    """

    own: torch.Tensor  # (M, D) raw features
    units: torch.Tensor | None  # (U, D) of training images; None for Inception's, which FID and KID take raw

    def scaled(self, rows: torch.Tensor) -> torch.Tensor:
        """Scale features (N, D) for the distances."""
        return rows if self.units is None else standardised(rows, self.units)

    def captions_of(self, count: int) -> torch.Tensor:
        """Return which reference image's caption each of `count` samples is drawn from, (count,) int64."""
        return torch.arange(count) % len(self.own)

    def kernel(self, rows: torch.Tensor, *, drawn: bool = True) -> Estimate:
        """Estimate the kernel distance of features (N, D) to the reference.

        Args:
            drawn: the images were drawn from the reference's captions, in their order; False = other ones.
        """
        groups = self.captions_of(len(rows)) if drawn else None
        return kernel_distance(self.scaled(rows), self.scaled(self.own), groups)

    def difference(self, rows: torch.Tensor, others: torch.Tensor) -> Estimate:
        """Estimate one model's kernel distance minus another's, paired; features (N, D) of drawn images."""
        groups = self.captions_of(len(rows))
        return kernel_difference(self.scaled(rows), self.scaled(others), self.scaled(self.own), groups)

    def frechet(self, rows: torch.Tensor) -> float:
        """Compute the Frechet distance of features (N, D) to the reference."""
        return frechet_distance(self.scaled(rows), self.scaled(self.own))
