"""Make the demo's ControlNet for canny edges: `python -m ghibli.demo.pretrain.control` (some ten minutes).

Zhang et al. 2023. The base stays as it is and gives the first weights. It learns from photograph-like scenes
of the pretraining seeds. It can be stopped and resumed; its state is in outputs/control/.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import ControlNetModel

from ghibli.config.paths import DEMO
from ghibli.demo.pretrain import architecture, stages
from ghibli.demo.pretrain.training_loop import Plan, train_stage
from ghibli.demo.scenes.scene import compose
from ghibli.images.edges import canny
from ghibli.models.base import BaseModel
from ghibli.models.load import load

FIRST, COUNT, BATCH = 600_000, 1000, 12  # seeds of scenes that nothing else is trained on
PLAN = Plan(steps=600, learning_rate=4e-3, warmup=20, muon=True, ema=0.98, save_every=50)


def make_control(base: BaseModel) -> ControlNetModel:
    """Make a ControlNet that changes nothing yet: the UNet's residual blocks, without their attention."""
    config = base.unet.config
    control = ControlNetModel(
        down_block_types=["DownBlock2D"] * 4, mid_block_type="UNetMidBlock2D",
        conditioning_embedding_out_channels=(8, 16, 32, 64),
        **{name: config[name] for name in (
            "in_channels", "block_out_channels", "layers_per_block", "norm_num_groups", "norm_eps",
            "cross_attention_dim", "attention_head_dim", "flip_sin_to_cos", "freq_shift",
        )},
    )  # fmt: skip
    weights = base.unet.state_dict()
    own = control.state_dict()
    control.load_state_dict({name: weights[name] for name in own if name in weights}, strict=False)
    return control


class ControlLoss:
    """Noise prediction loss of the frozen UNet under the ControlNet, one caption in two empty."""

    def __init__(self, base: BaseModel, control: ControlNetModel, work: Path):
        self.base, self.control = base, control
        pool = stages.draw_pool(COUNT, "photo", FIRST, work, grain=True)
        self.moments = stages.encode_pool(base.vae, pool, work / "moments.pt")
        self.edges = torch.stack([edges_of(image) for image in pool])
        self.alphas_cumprod = architecture.make_pndm_scheduler().alphas_cumprod
        with torch.no_grad():
            self.embeds = base.encode_captions([compose(FIRST + i).caption for i in range(COUNT)])
            self.empty = base.encode_captions([""])

    def __call__(self, step: int, generator: torch.Generator) -> torch.Tensor:
        index = stages.pick(COUNT, BATCH, generator)
        mean, std = self.moments[index].float().chunk(2, dim=1)
        latents = mean + std * torch.randn(mean.shape, generator=generator)
        latents = latents * self.base.vae.config.scaling_factor
        noise = torch.randn(latents.shape, generator=generator)
        spread = (torch.rand((), generator=generator) + torch.arange(BATCH) / BATCH) % 1
        timesteps = (spread * len(self.alphas_cumprod)).long()
        alpha = self.alphas_cumprod[timesteps].view(-1, 1, 1, 1)
        noisy_latents = alpha.sqrt() * latents + (1 - alpha).sqrt() * noise
        blank = torch.rand((BATCH, 1, 1), generator=generator) < 0.5  # the edges alone must do
        embeds = torch.where(blank, self.empty, self.embeds[index])
        down, mid = self.control(
            noisy_latents, timesteps, embeds, self.edges[index].float() / 255, return_dict=False
        )
        noise_pred = self.base.unet(
            noisy_latents, timesteps, embeds, return_dict=False,
            down_block_additional_residuals=down, mid_block_additional_residual=mid,
        )[0]  # fmt: skip
        return F.mse_loss(noise_pred, noise)


def edges_of(image: torch.Tensor) -> torch.Tensor:
    """Return the canny edges of a uint8 image (3, H, W), alike."""
    edges = canny(stages.to_images(stages.to_pixel_values(image[None]))[0])
    return torch.from_numpy(np.array(edges)).permute(2, 0, 1)


def main() -> None:
    """Train and write ghibli/demo/control/."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=Path("outputs/control"))
    parser.add_argument("--threads", type=int, default=0, help="of torch; 0 = its default")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    base = load(str(DEMO))
    torch.manual_seed(0)
    control = make_control(base)
    train_stage("control", control, ControlLoss(base, control, args.work), PLAN, args.work / "control.pt")
    architecture.save_part("control", control)


if __name__ == "__main__":
    main()
