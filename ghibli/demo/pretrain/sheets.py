"""Make the images of docs/demo.md and print its numbers: `python -m ghibli.demo.pretrain.sheets`."""

import argparse
from pathlib import Path

from diffusers import AutoencoderKL

from ghibli.demo.pretrain import stages
from ghibli.demo.pretrain.run import PLANS, draw_samples
from ghibli.demo.scenes import canvas
from ghibli.demo.scenes.scene import EVALUATION_SEEDS, compose, draw
from ghibli.models.base import DEMO

PROMPTS = (
    "a panda on the top of a red train at sunset",
    "a girl in a blue dress in a greenhouse in the morning",
    "a boat with a yellow sail on a lake at noon",
    "a house with a red roof by a lake at night",
    "an orange cat sitting in a meadow in the morning",
    "a pink tree in a town at noon",
    "a white train in a meadow at sunset",
    "a girl in a red dress on a green hill at noon",
    "a black cat on the top of a yellow train at noon",
    "a panda sitting in a greenhouse",
    "a house with a blue roof in a meadow in the evening",
    "a boat with a red sail on the water at night",
    "a green tree by a lake at sunset",
    "a blue train in a town at night",
    "a girl in a white dress standing by a lake at night",
    "a yellow tree in the grass in the morning",
)


def scene_sheet(file: Path, first: int, count: int = 24, columns: int = 8) -> None:
    """Draw scenes in both looks, the photo above the drawn one."""
    pairs = [[draw(compose(first + i), look) for look in canvas.LOOKS] for i in range(count)]
    rows = []
    for start in range(0, count, columns):
        rows += [list(row) for row in zip(*pairs[start : start + columns], strict=True)]
    stages.save_sheet(rows, file)


def sample_sheet(file: Path, folder: Path) -> None:
    """Sample 16 prompts in two blocks of eight columns; rows are guidance 1, 4 and 7.5."""
    rows = [draw_samples(folder, PROMPTS, guidance) for guidance in (1.0, 4.0, 7.5)]
    stages.save_sheet([row[:8] for row in rows] + [row[8:] for row in rows], file)


def main():
    """Write the sheets and print PSNR, plans and sizes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=DEMO)
    parser.add_argument("--out", type=Path, default=Path("docs/demo"))
    args = parser.parse_args()
    first = EVALUATION_SEEDS.start
    vae = AutoencoderKL.from_pretrained(args.folder / "vae").eval()
    held_out = {look: stages.draw_images(64, look, first, grain=False) for look in canvas.LOOKS}
    for look, images in held_out.items():
        print(f"VAE PSNR, 64 held-out {look} scenes: {stages.psnr(vae, images):.2f} dB")
    scene_sheet(args.out / "scenes.png", first)
    rows = stages.reconstruction_rows(vae, list(held_out.values()))
    stages.save_sheet(rows, args.out / "reconstructions.png")
    sample_sheet(args.out / "samples.png", args.folder)
    for stage, plan in PLANS.items():
        print(f"{stage}: {plan.steps} steps, learning rate {plan.learning_rate}")
    total = 0
    for part in ("clip", "text_encoder", "tokenizer", "vae", "unet", "scheduler"):
        size = sum(file.stat().st_size for file in (args.folder / part).rglob("*"))
        total += size
        print(f"{part}: {size / 1e6:.2f} MB")
    print(f"together: {total / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
