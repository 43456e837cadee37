"""Make the images of docs/demo.md and print its numbers: `python -m ghibli.demo.pretrain.sheets`."""

import argparse
from pathlib import Path

from diffusers import AutoencoderKL
from PIL import Image

from ghibli.config.paths import DEMO
from ghibli.demo.pretrain import stages
from ghibli.demo.pretrain.run import PLANS, draw_samples
from ghibli.demo.scenes import canvas
from ghibli.demo.scenes.scene import EVALUATION_SEEDS, compose, draw
from ghibli.images.grid import Block, captioned_blocks, in_rows

COLUMNS = 8  # of a sheet

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


def save(blocks: list[Block], file: Path) -> None:
    """Save a sheet as PNG."""
    file.parent.mkdir(parents=True, exist_ok=True)
    captioned_blocks(blocks).save(file, optimize=True)


def scene_sheet(file: Path, first: int, count: int = 24) -> None:
    """Draw scenes in both looks, the photo above the drawn one."""
    blocks = []
    for scenes in in_rows([compose(first + i) for i in range(count)], COLUMNS):
        rows = [(look, [draw(scene, look) for scene in scenes]) for look in canvas.LOOKS]
        blocks.append(Block([scene.caption for scene in scenes], rows))
    save(blocks, file)


def reconstruction_sheet(file: Path, first: int, rows: list[list[Image.Image]]) -> None:
    """Draw originals above what the VAE makes of them, in both looks."""
    captions = [compose(first + i).caption for i in range(COLUMNS)]
    labels = ("original", "decoded")
    blocks = [
        Block(captions, [(f"{look}, {label}", row) for label, row in zip(labels, pair, strict=True)])
        for look, pair in zip(canvas.LOOKS, in_rows(rows, 2), strict=True)
    ]
    save(blocks, file)


def sample_sheet(file: Path, folder: Path) -> None:
    """Sample 16 prompts in two blocks of eight columns; rows are guidance 1, 4 and 7.5."""
    drawn = {guidance: draw_samples(folder, PROMPTS, guidance) for guidance in (1.0, 4.0, 7.5)}
    blocks = []
    for start in range(0, len(PROMPTS), COLUMNS):
        part = slice(start, start + COLUMNS)
        rows = [(f"guidance {guidance:g}", images[part]) for guidance, images in drawn.items()]
        blocks.append(Block(PROMPTS[part], rows))
    save(blocks, file)


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
    reconstruction_sheet(args.out / "reconstructions.png", first, rows)
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
