"""Train the demo base from scratch: `python -m ghibli.demo.pretrain` (about an hour and a half).

It can be stopped and resumed at any time; its state is in outputs/pretrain/. Each part is written to
ghibli/demo/ as soon as it is finished.
"""

import argparse
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline
from transformers import CLIPModel, CLIPTokenizer

from ghibli.config.paths import DEMO
from ghibli.demo.pretrain import architecture, stages
from ghibli.demo.pretrain.tokenizer import write_tokenizer
from ghibli.demo.pretrain.training_loop import Plan, train_stage

SCENES = 8000  # for the UNet; CLIP and VAE see the first half in both looks
PLANS = {
    "clip": Plan(steps=600, learning_rate=1e-3, warmup=100, ema=0.99, save_every=200),
    "vae": Plan(steps=5600, learning_rate=4e-3, warmup=30, muon=True, preview_every=400),
    "unet": Plan(steps=3800, learning_rate=4e-3, warmup=50, muon=True, preview_every=500),
}
PREVIEW_PROMPTS = (
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
    """Make a part with random weights from seed 0."""
    torch.manual_seed(0)
    return make(*args)


def train_clip(tokenizer, work: Path):
    """Train image and text tower; write clip/ and text_encoder/."""
    clip = fresh(architecture.make_clip, tokenizer)
    pools = [stages.draw_pool(SCENES // 2, look, 0, work, grain=False) for look in ("photo", "drawn")]
    loss = stages.ClipLoss(clip, tokenizer, pools, batch=64)
    train_stage("clip", clip, loss, PLANS["clip"], work / "clip.pt")
    architecture.save_part("clip", clip)
    architecture.save_part("text_encoder", architecture.make_text_encoder(clip))


def clean_pools(work: Path):
    """Draw the VAE's training images and the held-out ones that measure its progress."""
    looks = ("photo", "drawn")
    pools = [stages.draw_pool(SCENES // 2, look, 0, work, grain=False) for look in looks]
    held_out = [stages.draw_pool(32, look, 900_000, work, grain=False) for look in looks]
    return pools, held_out


def vae_preview(vae, held_out: list[torch.Tensor], work: Path):
    """Return a function that prints the PSNR and saves originals above reconstructions."""

    def preview(step: int):
        photo, drawn = (stages.psnr(vae, images) for images in held_out)
        print(f"vae step {step}: PSNR photo {photo:.2f} dB, drawn {drawn:.2f} dB", flush=True)
        stages.save_sheet(stages.reconstruction_rows(vae, held_out), work / f"vae_{step:05d}.png")

    return preview


def train_vae(work: Path):
    """Train the autoencoder; write vae/ with the scaling factor that gives its latents unit variance."""
    vae = fresh(architecture.make_vae).to(memory_format=torch.channels_last)
    pools, held_out = clean_pools(work)
    plan = PLANS["vae"]
    loss = stages.VaeLoss(vae, pools, batch=6, full_size_from=plan.steps - 120)
    train_stage("vae", vae, loss, plan, work / "vae.pt", preview=vae_preview(vae, held_out, work))
    moments = stages.encode_pool(vae, pools[0][:1000], work / "moments_for_scale.pt").float()
    spread = (moments[:, :4].var() + moments[:, 4:].square().mean()).sqrt().item()
    vae.register_to_config(scaling_factor=round(1 / spread, 5))
    print(f"vae: standard deviation of the latents {spread:.4f}", flush=True)
    architecture.save_part("vae", vae)


def draw_samples(folder: Path, prompts, guidance_scale: float, seed: int = 7, **parts):
    """Sample images (DDIM, 30 steps) from the pipeline in a folder, with `parts` in place of its own."""
    pipeline = StableDiffusionPipeline.from_pretrained(folder, **parts)
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    generators = [torch.Generator().manual_seed(seed + i) for i in range(len(prompts))]
    with torch.no_grad():
        return pipeline(
            list(prompts), num_inference_steps=30, guidance_scale=guidance_scale, generator=generators
        ).images


def train_unet(tokenizer, work: Path):
    """Train the UNet, on photo-like images only; write unet/ and text_encoder/."""
    vae = AutoencoderKL.from_pretrained(DEMO / "vae")
    text_encoder = architecture.make_text_encoder(CLIPModel.from_pretrained(DEMO / "clip"))
    pool = stages.draw_pool(SCENES, "photo", 0, work, grain=True)
    moments = stages.encode_pool(vae, pool, work / "moments.pt")
    unet = fresh(architecture.make_unet).to(memory_format=torch.channels_last)
    both = torch.nn.ModuleDict({"unet": unet, "text_encoder": text_encoder})
    loss = stages.UnetLoss(
        unet,
        text_encoder,
        tokenizer,
        moments,
        vae.config.scaling_factor,
        architecture.make_pndm_scheduler().alphas_cumprod,
        batch=20,
    )

    def preview(step: int):
        rows = [draw_samples(DEMO, PREVIEW_PROMPTS, guidance, **both) for guidance in (4.0, 7.5)]
        stages.save_sheet(rows, work / f"unet_{step:05d}.png")
        write()

    def write():
        for name, part in both.items():
            architecture.save_part(name, part)

    train_stage("unet", both, loss, PLANS["unet"], work / "unet.pt", preview=preview)
    write()


def main():
    """Run the stages that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=Path("outputs/pretrain"))
    parser.add_argument("--stages", default="clip,vae,unet", help="stages to run, comma separated")
    parser.add_argument("--threads", type=int, default=0, help="of torch; 0 = its default")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    tokenizer_folder = DEMO / "tokenizer"
    write_tokenizer(tokenizer_folder)
    architecture.write_scheduler_and_index()
    tokenizer = CLIPTokenizer.from_pretrained(tokenizer_folder)
    for stage in args.stages.split(","):
        if stage == "vae":
            train_vae(args.work)
        else:
            {"clip": train_clip, "unet": train_unet}[stage](tokenizer, args.work)


if __name__ == "__main__":
    main()
