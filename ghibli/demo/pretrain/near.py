"""Make the adapter of model=demo_near: `python -m ghibli.demo.near` (about ten minutes).

It is trained on drawn scenes from the seeds of pretraining, so that the images of fine-tuning and
of evaluation stay unseen. Merged into the base, it leaves a fine-tuning little to gain.
"""

import subprocess
import sys
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save

from ghibli.demo.pretrain.architecture import FOLDER
from ghibli.demo.scenes.scene import write_folder
from ghibli.models.safetensors import ADAPTER_FILE, with_sorted_metadata
from ghibli.runtime.console import counted
from ghibli.runtime.files import write_atomically

FIRST, COUNT = 500_000, 1500  # seeds of scenes that the UNet has not seen in any look
SETTINGS = (
    "model=demo", "data=demo", "data.draw=null", "trainer.max_epochs=10", "lora.dropout=0",
    "optimizer.lr=1e-3", "optimizer.schedule=cosine", "sample.every_n_epochs=0", "wandb.mode=disabled",
)  # fmt: skip


def halve(source: Path, target: Path) -> None:
    """Writes an adapter file again with its weights in 16 bits; they are merged, not trained further."""
    with safe_open(source, framework="pt") as file:
        weights = {name: file.get_tensor(name).half() for name in file.keys()}  # noqa: SIM118
        content = with_sorted_metadata(save(weights, metadata=file.metadata()))
    write_atomically(target, lambda opened: opened.write(content))


def main() -> None:
    work = Path("outputs/near")
    images, run = work / "images", work / "run"
    if not (images / "captions.txt").exists():
        with counted("drawing") as on_progress:
            write_folder(images, "drawn", COUNT, FIRST, on_progress=on_progress)
    words = [f"data.root={images}", f"cache_dir={work}", f"hydra.run.dir={run}"]
    subprocess.run([sys.executable, "train.py", *SETTINGS, *words], check=True)
    halve(run / "adapter" / ADAPTER_FILE, FOLDER / "near" / ADAPTER_FILE)


if __name__ == "__main__":
    main()
