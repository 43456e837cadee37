"""The base model: the parts of Stable Diffusion 1.5 in one object, and hashes of their weights."""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from threading import Lock
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextModel, CLIPTokenizer

WHOLE = 1024 * 1024  # px of the largest image that the VAE takes in one piece
TILE = 512  # px, side of a tile of a larger one
TOKENIZER_LOCK = Lock()  # a fast tokenizer raises when two threads use it at once
COMPUTED_BY = {  # settings that change what a part's weights compute, but not their names and shapes
    "text_encoder": ("hidden_act", "layer_norm_eps", "num_attention_heads"),
    "vae": ("act_fn", "norm_num_groups", "scaling_factor", "shift_factor"),
    "unet": (
        "act_fn", "attention_head_dim", "num_attention_heads", "norm_eps", "norm_num_groups",
        "flip_sin_to_cos", "freq_shift", "center_input_sample", "mid_block_scale_factor",
    ),
}  # fmt: skip
CAPTIONS = ["", "A girl standing, in a Greenhouse! 42 naïve", "the  LAKE's 3rd boat-house; (rain) " * 20]


@dataclass
class BaseModel:
    """The five parts of a latent diffusion model: fp32, in eval mode, frozen."""

    tokenizer: CLIPTokenizer
    text_encoder: CLIPTextModel
    vae: AutoencoderKL
    unet: UNet2DConditionModel
    scheduler_config: dict[str, Any]  # the contents of the base's scheduler_config.json
    clip_skip: int = 1  # the text encoder's last layer that is used, counted from its end

    @property
    def vae_factor(self) -> int:
        """Pixels per latent along each side: 8 for SD 1.5."""
        return 2 ** (len(self.vae.config.block_out_channels) - 1)

    @property
    def prediction_type(self) -> str:
        """epsilon or v_prediction; epsilon where the scheduler config is silent, as in SD 1.5."""
        return self.scheduler_config.get("prediction_type", "epsilon")

    @property
    def family(self) -> str:
        """sd2 for the text width of Stable Diffusion 2, else sd1."""
        return "sd2" if self.unet.config.cross_attention_dim == 1024 else "sd1"

    @property
    def adaptable(self) -> dict[str, torch.nn.Module]:
        """The parts that an adapter may change, by their names in adapter files, the UNet first."""
        return {"unet": self.unet, "text_encoder": self.text_encoder}

    def tokenize(self, captions: list[str]) -> torch.Tensor:
        """Tokenize captions to input_ids (B, 77), int64, padded and truncated to the model's length."""
        with TOKENIZER_LOCK:
            return self.tokenizer(
                captions,
                padding="max_length",
                truncation=True,
                max_length=self.tokenizer.model_max_length,
                return_tensors="pt",
            ).input_ids

    def encode_prompts(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Encode input_ids (B, 77) as prompt_embeds (B, 77, D), the text encoder's last hidden state.

        With clip_skip 2, 3, ... it is the output of the last layer but one, but two, ..., with the final
        layer norm applied: what kohya's scripts, A1111 and ComfyUI (which counts -1, -2, ...) do.
        """
        if self.clip_skip == 1:
            return self.text_encoder(input_ids, return_dict=True).last_hidden_state
        states = self.text_encoder(input_ids, output_hidden_states=True, return_dict=True).hidden_states
        model = getattr(self.text_encoder, "text_model", self.text_encoder)  # transformers before 5.6
        return model.final_layer_norm(states[-self.clip_skip])

    def encode_captions(self, captions: list[str]) -> torch.Tensor:
        """Encode captions word for word as training does, cut to 77 tokens: prompt_embeds (B, 77, D)."""
        device = next(self.text_encoder.parameters()).device
        return self.encode_prompts(self.tokenize(captions).to(device))

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Decode scaled latents (B, 4, h, w) to images (B, 3, 8h, 8w), float32 in 0 .. 1, one at a time.

        Large ones are decoded in tiles.
        """
        sides = latents.shape[-1] * self.vae_factor, latents.shape[-2] * self.vae_factor
        with self.tiles(sides):
            images = [
                self.vae.decode(one[None].float() / self.vae.config.scaling_factor).sample for one in latents
            ]
        return (torch.cat(images) / 2 + 0.5).clamp(0, 1)

    @contextmanager
    def tiles(self, size: tuple[int, int]) -> Iterator[None]:
        """Let the VAE encode and decode an image of this size in tiles of TILE px if it is above WHOLE.

        Tiles overlap by a quarter and are blended (diffusers' tiled_decode): memory no longer grows with
        the size, and colours may differ a little, since the VAE normalises over each tile.

        Args:
            size: width and height in px.
        """
        if size[0] * size[1] <= WHOLE:
            yield
            return
        vae = self.vae
        before = vae.use_tiling, vae.tile_sample_min_size, vae.tile_latent_min_size
        vae.use_tiling, vae.tile_sample_min_size = True, TILE
        vae.tile_latent_min_size = TILE // self.vae_factor
        try:
            yield
        finally:
            vae.use_tiling, vae.tile_sample_min_size, vae.tile_latent_min_size = before

    def to(self, device: torch.device) -> "BaseModel":
        """Move text encoder, VAE and UNet to a device; return self."""
        for part in (self.text_encoder, self.vae, self.unet):
            part.to(device)
        return self


def results_key(weights: str, base: BaseModel) -> str:
    """Return what decides on a base's results, for cache keys: weights, tokenizer, settings and clip_skip."""
    return f"{weights} {configs_hash(base)} clip_skip {base.clip_skip}"


def weights_hash(base: BaseModel) -> str:
    """Hash every weight of the base and its noise schedule: sha256, hex."""
    total = hashlib.sha256(repr(sorted(base.scheduler_config.items())).encode())
    for part in (base.text_encoder, base.vae, base.unet):
        add_weights(total, part)
    return total.hexdigest()


def configs_hash(base: BaseModel) -> str:
    """Hash what weights_hash leaves out: the tokenizer, and settings that change what a part computes.

    Of the tokenizer, its vocabulary and the input_ids of some captions; so versions of the libraries, which
    store the same in other words, have the same hash. sha256, hex.
    """
    facts: list[Any] = [sorted(base.tokenizer.get_vocab().items()), base.tokenize(CAPTIONS).tolist()]
    for part, names in COMPUTED_BY.items():
        config = getattr(base, part).config
        facts += [(part, name, getattr(config, name, None)) for name in names]
    return hashlib.sha256(repr(facts).encode()).hexdigest()


def part_hash(part: torch.nn.Module) -> str:
    """Hash every weight of one part: sha256, hex."""
    total = hashlib.sha256()
    add_weights(total, part)
    return total.hexdigest()


def add_weights(total: Any, part: torch.nn.Module) -> None:
    """Add the names and weights of a part to a running sha256."""
    for name, tensor in sorted(part.state_dict().items()):
        total.update(name.encode())
        total.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
