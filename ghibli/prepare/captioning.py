"""Captions by BLIP (Li et al. 2022, arXiv 2201.12086) for images that have none."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from PIL import Image
from transformers import BlipForConditionalGeneration, BlipProcessor

from ghibli.config.paths import PICKLES, convert_command, resolve_path
from ghibli.data.folder import enter_and_list, read_beside
from ghibli.data.inside import require_inside
from ghibli.data.layouts import supported_layouts
from ghibli.images.read import Unusable, check_image, read_image, without_warnings
from ghibli.models.configs import check_config
from ghibli.models.hub import hub_answers
from ghibli.models.load import quiet
from ghibli.models.safetensors import check_whole
from ghibli.runtime.errors import UserError, first_line, require_folder
from ghibli.runtime.files import write_atomically
from ghibli.runtime.home import expanded

Captioner = Callable[[list[Image.Image]], list[str]]  # RGB images -> a caption each

PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")  # older and newer transformers'
MODEL_FILES = ["*.json", "*.txt", "*.safetensors"]
GENERATION = {
    "max_new_tokens": 30,
    "num_beams": 3,
    "no_repeat_ngram_size": 3,  # otherwise BLIP stutters: `ze ze ze ze`
    "do_sample": False,
}
TABLE = "captions.txt"
MANUALLY = (
    "download its files into a folder (of the weights, pytorch_model.bin is enough), run ghibli convert "
    "FOLDER/pytorch_model.bin, and give --model FOLDER"
)


@dataclass(frozen=True)
class CaptioningResult:
    """Outcome of captioning a folder."""

    written: dict[str, str]  # image -> its new caption
    already_captioned: int  # images whose captions were left alone
    skipped: dict[str, str]  # image -> why it got no caption
    table: Path  # file with the new captions


class Blip:
    """A BLIP captioning model with its processor, in fp32."""

    def __init__(self, path: str, device: torch.device):
        """Load the model from a folder or the hub.

        Raises:
            UserError: no such model, no network, or weights that are not .safetensors.
        """
        folder = resolve_path(path) if resolve_path(path).is_dir() else download_model(path)
        check_weights(folder, path)
        check_config(folder / "config.json", f"--model {path}")
        for name in PROCESSOR_FILES:
            if (folder / name).exists():
                check_config(folder / name, f"--model {path}")
        try:
            # Silenced: the report on keys, which is asked for instead and checked below.
            with quiet("transformers"):
                self.processor = BlipProcessor.from_pretrained(folder, trust_remote_code=False)
                self.model, report = BlipForConditionalGeneration.from_pretrained(
                    folder, use_safetensors=True, output_loading_info=True, dtype=torch.float32
                )
        except Exception as error:  # transformers raises many types; each means the same to the user
            raise UserError(f"--model {path} cannot be loaded as BLIP: {first_line(error)}") from error
        if report["missing_keys"]:
            raise UserError(
                f"--model {path} is not a BLIP captioning model: it lacks {min(report['missing_keys'])} "
                "and others"
            )
        self.model.to(device).eval()
        self.device = device

    def __call__(self, images: list[Image.Image]) -> list[str]:
        """Caption RGB images of any size. A caption does not depend on the other images of the batch."""
        pixel_values = self.processor(images=images, return_tensors="pt").pixel_values.to(self.device)
        with torch.inference_mode():
            tokens = self.model.generate(pixel_values=pixel_values, **GENERATION)
        captions = self.processor.batch_decode(tokens, skip_special_tokens=True)
        return [" ".join(caption.split()) for caption in captions]


def download_model(hub_id: str) -> Path:
    """Return the folder of a model's files in the hub cache; download what is missing.

    Raises:
        UserError: not a hub id, or neither cached nor available from the hub.
    """
    if hub_id.count("/") != 1 or hub_id.startswith((".", "/", "~")):
        raise UserError(f"--model {hub_id}: no such folder, and not a hub id (OWNER/NAME)")
    online = hub_answers()
    try:
        return Path(snapshot_download(hub_id, allow_patterns=MODEL_FILES, local_files_only=not online))
    except (OSError, ValueError) as error:
        hub = f"does not provide it ({first_line(error)[:100]})" if online else "cannot be reached"
        raise UserError(f"--model {hub_id} is not on this machine and the hub {hub}; {MANUALLY}") from error


def check_weights(folder: Path, path: str) -> None:
    """Require complete .safetensors weights in the folder.

    Raises:
        UserError: there are none, or a file is damaged; the message names `path`, as the user gave it.
    """
    weights = sorted(folder.glob("*.safetensors"))
    for file in weights:
        check_whole(file, f"--model {path}")
    if weights:
        return
    pickled = [file for file in sorted(folder.glob("*")) if file.suffix in PICKLES]
    if pickled:
        raise UserError(
            f"--model {path} stores its weights as a pickle, which can run code hidden in it: "
            f"{convert_command(pickled)}"
        )
    raise UserError(f"--model {path} has no .safetensors weights: {MANUALLY}")


def caption_folder(
    root: Path,
    load_captioner: Callable[[], Captioner],
    *,
    batch_size: int,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> CaptioningResult:
    """Add a line to captions.txt for every image without a caption; leave existing captions as they are.

    The file is written after every batch, so captioning resumes where it was killed.

    Args:
        root: an image folder of any layout.
        load_captioner: called only if there is an image to caption.
        batch_size: images captioned together.
        on_progress: called with (images done, images in total).

    Raises:
        UserError: no such folder, no images in it, or a caption file that cannot be read.
    """
    require_folder("folder", root)
    root, listed = enter_and_list(expanded(root), "folder")
    if not listed:
        raise UserError(f"folder={root}: no images found; supported layouts: {supported_layouts()}")
    skipped: dict[str, str] = {}
    uncaptioned = [
        (name, path) for name, path, text in listed if needs_caption(name, path, text, skipped, root)
    ]
    result = CaptioningResult({}, len(listed) - len(uncaptioned) - len(skipped), skipped, root / TABLE)
    if not uncaptioned:
        return result
    captioner = load_captioner()
    for start in range(0, len(uncaptioned), batch_size):
        batch = uncaptioned[start : start + batch_size]
        images = {name: image for name, path in batch if (image := read_or_skip(name, path, skipped))}
        captions = dict(zip(images, captioner(list(images.values())), strict=True)) if images else {}
        new = {name: text for name, text in captions.items() if text}
        skipped |= {name: "the model returned an empty caption" for name in captions if name not in new}
        append_captions(result.table, new)
        result.written.update(new)
        on_progress(start + len(batch), len(uncaptioned))
    return result


def needs_caption(name: str, path: Path, caption: str | None, skipped: dict[str, str], root: Path) -> bool:
    """Return whether no caption file has text for the image; note in `skipped` one that cannot get any."""
    try:
        require_inside(path, root)
        if caption or read_beside(path, root):
            return False
    except Unusable as reason:  # a caption written by hand that the user can still repair
        skipped[name] = str(reason)
        return False
    if any(mark in name for mark in "|\n\r\\") or name != name.strip() or not is_text(name):
        skipped[name] = f"{TABLE} cannot hold this file name: rename the image"
        return False
    return True


def is_text(name: str) -> bool:
    """Tell whether a file name can be written as UTF-8; Python lists other bytes as lone surrogates."""
    try:
        return bool(name.encode())
    except UnicodeEncodeError:
        return False


def read_or_skip(name: str, path: Path, skipped: dict[str, str]) -> Image.Image | None:
    """Read an image as training does; return None and note it in `skipped` if it cannot be read."""
    try:
        with without_warnings():
            check_image(path, min_side=1)
        return read_image(path)[0]
    except (Unusable, OSError) as reason:
        skipped[name] = str(reason)
        return None


def append_captions(table: Path, captions: dict[str, str]) -> None:
    """Append lines to the table atomically; it is read again, as it may have been edited meanwhile."""
    lines = "".join(f"{name}|{caption}\n" for name, caption in captions.items()).encode()
    if lines:
        before = table.read_bytes() if table.is_file() else b""
        newline = b"\n" if before and not before.endswith(b"\n") else b""
        write_atomically(table, lambda file: file.write(before + newline + lines))


def blip_loader(path: str) -> Callable[[], Captioner]:
    """Return a function that loads BLIP from a folder or hub id, on a GPU if there is one."""
    return lambda: Blip(path, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
