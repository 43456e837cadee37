"""Captions from BLIP (Li et al. 2022, arXiv 2201.12086) for the images that have none."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from ghibli.config.paths import PICKLES, convert_command
from ghibli.data.folder import list_images, read_beside
from ghibli.data.layouts import supported_layouts
from ghibli.images.read import Unusable, check_image, read_image
from ghibli.models.base import resolve_path
from ghibli.models.hub import hub_answers
from ghibli.models.load import quiet
from ghibli.models.safetensors import check_whole
from ghibli.runtime.errors import UserError, first_line, require_folder
from ghibli.runtime.files import write_atomically

FILES = ["*.json", "*.txt", "*.safetensors"]
HOW = {
    "max_new_tokens": 30,
    "num_beams": 3,
    "no_repeat_ngram_size": 3,
    "do_sample": False,
}  # no `ze ze ze ze`
TABLE = "captions.txt"
MANUALLY = (
    "download its files into a folder, where pytorch_model.bin is enough for weights, then python -m ghibli "
    "convert FOLDER/pytorch_model.bin, and --model FOLDER"
)


@dataclass(frozen=True)
class Captioned:
    """What was done in a folder."""

    written: dict[str, str]  # image -> its new caption
    had_one: int  # images whose captions were left alone
    skipped: dict[str, str]  # image -> why it got none
    table: Path  # where the new ones are


class Blip:
    """The model with what prepares its images and reads its words."""

    def __init__(self, path: str, device: torch.device):
        """Loads it from a folder or the hub.

        Raises:
            UserError: no such model, no network, or weights that are not .safetensors.
        """
        from transformers import BlipForConditionalGeneration, BlipProcessor

        folder = resolve_path(path) if resolve_path(path).is_dir() else from_hub(path)
        check_weights(folder, path)
        try:
            with quiet("transformers"):
                self.processor = BlipProcessor.from_pretrained(folder)
                self.model, report = BlipForConditionalGeneration.from_pretrained(
                    folder, use_safetensors=True, output_loading_info=True, dtype=torch.float32
                )
        except Exception as error:  # transformers raises many types; each means the same to the user
            raise UserError(f"--model {path} cannot be loaded as BLIP: {first_line(error)}") from error
        if report["missing_keys"]:
            raise UserError(
                f"--model {path} is no BLIP for captions: it lacks {min(report['missing_keys'])} and others"
            )
        self.model.to(device).eval()
        self.device = device

    def __call__(self, images: list[Image.Image]) -> list[str]:
        """RGB images of any size -> a caption each; which others are in the batch changes none."""
        pixels = self.processor(images=images, return_tensors="pt").pixel_values.to(self.device)
        with torch.inference_mode():
            tokens = self.model.generate(pixel_values=pixels, **HOW)
        words = self.processor.batch_decode(tokens, skip_special_tokens=True)
        return [" ".join(caption.split()) for caption in words]


def from_hub(name: str) -> Path:
    """The model's files in the hub's cache.

    Raises:
        UserError: neither there nor to be had.
    """
    from huggingface_hub import snapshot_download

    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise UserError(f"--model {name}: no such folder, and no hub id (OWNER/NAME)")
    online = hub_answers()
    try:
        return Path(snapshot_download(name, allow_patterns=FILES, local_files_only=not online))
    except (OSError, ValueError) as error:
        hub = f"does not give it ({first_line(error)[:100]})" if online else "cannot be reached"
        raise UserError(f"--model {name} is not on this machine and the hub {hub}; {MANUALLY}") from error


def check_weights(folder: Path, path: str) -> None:
    """Raises a UserError unless whole .safetensors weights lie in the folder."""
    weights = sorted(folder.glob("*.safetensors"))
    for file in weights:
        check_whole(file, f"--model {path}")
    if weights:
        return
    pickled = [file for file in sorted(folder.glob("*")) if file.suffix in PICKLES]
    if pickled:
        raise UserError(
            f"--model {path} has its weights as a pickle, which can run code hidden in it: "
            f"{convert_command(pickled)}"
        )
    raise UserError(f"--model {path} has no .safetensors weights: {MANUALLY}")


def caption_folder(
    root: Path,
    make: Callable[[], Callable[[list[Image.Image]], list[str]]],
    *,
    batch_size: int,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> Captioned:
    """Writes a line of captions.txt for every image without a caption; what is there stays as it is.

    The file is written after every batch, so a run that was killed goes on where it stopped.

    Args:
        root: an image folder of any layout.
        make: loads what captions a batch of images; called only if there is anything to caption.
        batch_size: images captioned together.
        on_progress: called with (images done, images in all).

    Raises:
        UserError: no such folder, no images in it, a caption file that cannot be read.
    """
    require_folder("folder", root)
    root = root.expanduser()
    listed = list_images(root, "folder")
    if not listed:
        raise UserError(f"folder={root}: no images found; supported layouts: {supported_layouts()}")
    skipped: dict[str, str] = {}
    open_ones = [(name, path) for name, path, words in listed if wants_caption(name, path, words, skipped)]
    done = Captioned({}, len(listed) - len(open_ones) - len(skipped), skipped, root / TABLE)
    captioner = make() if open_ones else None
    for start in range(0, len(open_ones), batch_size):
        batch = open_ones[start : start + batch_size]
        images = {name: image for name, path in batch if (image := opened(name, path, skipped))}
        captions = dict(zip(images, captioner(list(images.values())), strict=True)) if images else {}
        skipped |= {name: "the model had no words for it" for name, words in captions.items() if not words}
        new = {name: words for name, words in captions.items() if words}
        add_lines(done.table, new)
        done.written.update(new)
        on_progress(start + len(batch), len(open_ones))
    return done


def wants_caption(name: str, path: Path, words: str | None, skipped: dict[str, str]) -> bool:
    """Has no caption file words for it? An image that cannot get any is noted in `skipped`."""
    try:
        if words or read_beside(path):
            return False
    except Unusable as reason:  # hand-made words that the user can save
        skipped[name] = str(reason)
        return False
    if any(mark in name for mark in "|\n\r\\") or name != name.strip():
        skipped[name] = f"{TABLE} cannot hold such a name: rename it"
        return False
    return True


def opened(name: str, path: Path, skipped: dict[str, str]) -> Image.Image | None:
    """The image as training sees it; None, noted in `skipped`, if it cannot be read."""
    try:
        check_image(path, min_side=1)
        return read_image(path)[0]
    except (Unusable, OSError) as reason:
        skipped[name] = str(reason)
        return None


def add_lines(table: Path, captions: dict[str, str]) -> None:
    """Adds lines to the file as it is now, which may have been edited in the meantime; atomically."""
    lines = "".join(f"{name}|{words}\n" for name, words in captions.items()).encode()
    if lines:
        before = table.read_bytes() if table.is_file() else b""
        gap = b"\n" if before and not before.endswith(b"\n") else b""
        write_atomically(table, lambda file: file.write(before + gap + lines))


def best_device() -> torch.device:
    """A GPU if there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def blip(path: str) -> Callable[[], Any]:
    """Loads BLIP when it is called."""
    return lambda: Blip(path, best_device())
