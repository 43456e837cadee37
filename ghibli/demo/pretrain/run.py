"""Train the demo base from nothing: `python -m ghibli.demo.pretrain` (about an hour and a half).

Stops and resumes at any time; the state lies in outputs/pretrain/. Each finished part is
written into this folder at once.
"""

import argparse
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline
from transformers import CLIPModel, CLIPTokenizer

from ghibli.demo.pretrain import architecture, stages
from ghibli.demo.pretrain.tokenizer import write_tokenizer
from ghibli.demo.pretrain.training_loop import Plan, train

IMAGES = 8000  # scenes of the UNet; CLIP and VAE see the first half in both looks
PLANS = {
    "clip": Plan(steps=600, learning_rate=1e-3, warmup=100, ema=0.99, save_every=200),
    "vae": Plan(steps=5600, learning_rate=4e-3, warmup=30, muon=True, look_every=400),
    "unet": Plan(steps=3800, learning_rate=4e-3, warmup=50, muon=True, look_every=500),
}
LOOK_PROMPTS = (
    "a panda on the top of a red train at sunset",
    "a girl in a blue dress in a greenhouse",
    "a boat with a yellow sail on a lake at noon",
    "a house with a red roof by a lake at night",
    "an orange cat in a meadow in the morning",
    "a green tree in a town at sunset",
    "a white train in a meadow at noon",
    "a girl in a pink dress on top of a blue train",
)


def fresh(make, *args):
    """A part with the random weights that seed 0 gives."""
    torch.manual_seed(0)
    return make(*args)


def train_clip(tokenizer, work: Path):
    """The image and text tower; writes clip/ and text_encoder/."""
    clip = fresh(architecture.make_clip, tokenizer)
    pools = [stages.draw_pool(IMAGES // 2, look, 0, work, grain=False) for look in ("photo", "drawn")]
    loss = stages.ClipLoss(clip, tokenizer, pools, batch=64)
    train("clip", clip, loss, PLANS["clip"], work / "clip.pt")
    architecture.save_part("clip", clip)
    architecture.save_part("text_encoder", architecture.make_text_encoder(clip))


def clean_pools(work: Path):
    """What the VAE learns from, and what its progress is measured on."""
    looks = ("photo", "drawn")
    pools = [stages.draw_pool(IMAGES // 2, look, 0, work, grain=False) for look in looks]
    held_out = [stages.draw_pool(32, look, 900_000, work, grain=False) for look in looks]
    return pools, held_out


def vae_look(vae, held_out, work: Path):
    """A function that prints the PSNR and saves originals above reconstructions."""

    def look(step: int):
        photo, drawn = (stages.psnr(vae, images) for images in held_out)
        print(f"vae step {step}: PSNR photo {photo:.2f} dB, drawn {drawn:.2f} dB", flush=True)
        rows = []
        for images in held_out:
            clean = stages.to_pixel_values(images[:8])
            with torch.no_grad():
                result = vae.decode(vae.encode(clean).latent_dist.mean).sample
            rows += [stages.to_images(clean), stages.to_images(result)]
        stages.sheet(rows, work / f"vae_{step:05d}.png")

    return look


def train_vae(work: Path):
    """The autoencoder; writes vae/ with a scaling factor that gives latents unit spread."""
    vae = fresh(architecture.make_vae).to(memory_format=torch.channels_last)
    pools, held_out = clean_pools(work)
    plan = PLANS["vae"]
    loss = stages.VaeLoss(vae, pools, batch=6, whole_from=plan.steps - 120)
    train("vae", vae, loss, plan, work / "vae.pt", look=vae_look(vae, held_out, work))
    moments = stages.encode_pool(vae, pools[0][:1000], work / "moments_for_scale.pt").float()
    spread = (moments[:, :4].var() + moments[:, 4:].square().mean()).sqrt().item()
    vae.register_to_config(scaling_factor=round(1 / spread, 5))
    print(f"vae: latents spread {spread:.4f}", flush=True)
    architecture.save_part("vae", vae)


def sample(folder: Path, prompts, guidance_scale: float, seed: int = 7, **parts):
    """DDIM images (30 steps) of the pipeline in a folder, with these parts in place."""
    pipeline = StableDiffusionPipeline.from_pretrained(folder, **parts)
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    generators = [torch.Generator().manual_seed(seed + i) for i in range(len(prompts))]
    with torch.no_grad():
        return pipeline(
            list(prompts), num_inference_steps=30, guidance_scale=guidance_scale, generator=generators
        ).images


def train_unet(tokenizer, work: Path):
    """The noise predictor on photograph-like images only; writes unet/ and text_encoder/."""
    folder = architecture.FOLDER
    vae = AutoencoderKL.from_pretrained(folder / "vae")
    text_encoder = architecture.make_text_encoder(CLIPModel.from_pretrained(folder / "clip"))
    pool = stages.draw_pool(IMAGES, "photo", 0, work, grain=True)
    moments = stages.encode_pool(vae, pool, work / "moments.pt")
    unet = fresh(architecture.make_unet).to(memory_format=torch.channels_last)
    both = torch.nn.ModuleDict({"unet": unet, "text_encoder": text_encoder})
    loss = stages.UnetLoss(
        unet,
        text_encoder,
        tokenizer,
        moments,
        vae.config.scaling_factor,
        architecture.make_scheduler().alphas_cumprod,
        batch=20,
    )

    def look(step: int):
        rows = [sample(folder, LOOK_PROMPTS, guidance, **both) for guidance in (4.0, 7.5)]
        stages.sheet(rows, work / f"unet_{step:05d}.png")
        write()

    def write():
        for name, part in both.items():
            architecture.save_part(name, part)

    train("unet", both, loss, PLANS["unet"], work / "unet.pt", look=look)
    write()


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=Path("outputs/pretrain"))
    parser.add_argument("--stages", default="clip,vae,unet", help="which, comma separated")
    parser.add_argument("--threads", type=int, default=0, help="0: as many as torch likes")
    settings = parser.parse_args()
    if settings.threads:
        torch.set_num_threads(settings.threads)
    tokenizer_folder = architecture.FOLDER / "tokenizer"
    write_tokenizer(tokenizer_folder)
    architecture.write_scheduler_and_index()
    tokenizer = CLIPTokenizer.from_pretrained(tokenizer_folder)
    for stage in settings.stages.split(","):
        if stage == "vae":
            train_vae(settings.work)
        else:
            {"clip": train_clip, "unet": train_unet}[stage](tokenizer, settings.work)


if __name__ == "__main__":
    main()
