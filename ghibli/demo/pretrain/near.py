"""Make the adapter of model=demo_near: `python -m ghibli.demo.pretrain.near` (about ten minutes).

It is trained on drawn scenes from the pretraining seeds, so that the images of fine-tuning and evaluation
stay unseen. With it merged into the base, fine-tuning has little left to gain.
"""

import subprocess
import sys
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save

from ghibli.config.paths import ADAPTER_FILE, DEMO
from ghibli.demo.scenes.scene import write_folder
from ghibli.models.safetensors import with_sorted_metadata
from ghibli.runtime.console import counted
from ghibli.runtime.files import write_atomically

FIRST, COUNT = 500_000, 1500  # seeds of scenes that the UNet has seen in neither look
OVERRIDES = (
    "model=demo", "data=demo", "data.draw=null", "trainer.max_epochs=10", "lora.dropout=0",
    "optimizer.lr=1e-3", "optimizer.schedule=cosine", "sample.every_n_epochs=0", "wandb.mode=disabled",
)  # fmt: skip


def convert_to_fp16(source: Path, target: Path) -> None:
    """Write an adapter file with fp16 weights; enough to be merged."""
    with safe_open(source, framework="pt") as file:
        weights = {name: file.get_tensor(name).half() for name in file.keys()}  # noqa: SIM118
        content = with_sorted_metadata(save(weights, metadata=file.metadata()))
    write_atomically(target, lambda opened: opened.write(content))


def main() -> None:
    """Draw the scenes, train the adapter and store it in the demo base."""
    work = Path("outputs/near")
    images, run = work / "images", work / "run"
    if not (images / "captions.txt").exists():
        with counted("drawing") as on_progress:
            write_folder(images, "drawn", COUNT, FIRST, on_progress=on_progress)
    paths = [f"data.root={images}", f"cache_dir={work}", f"hydra.run.dir={run}"]
    subprocess.run([sys.executable, "train.py", *OVERRIDES, *paths], check=True)
    convert_to_fp16(run / "adapter" / ADAPTER_FILE, DEMO / "near" / ADAPTER_FILE)


if __name__ == "__main__":
    main()
