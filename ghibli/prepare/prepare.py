"""`ghibli prepare`: fetch base and images, check both, and save them as the defaults of train.py."""

import json
import logging
from pathlib import Path

from ghibli.config.paths import DEMO, check_base, resolve_path
from ghibli.data.folder import NO_CAPTION, ImageFolder, list_images, read_folder, recognised, summarise
from ghibli.data.split import first_by_content
from ghibli.evaluation.diagnosis import Finding
from ghibli.images.grid import contact_sheet
from ghibli.images.read import open_image
from ghibli.models.base import weights_hash
from ghibli.models.load import load
from ghibli.prepare import download, preflight
from ghibli.runtime.commands import command_here
from ghibli.runtime.console import counted, relative_path
from ghibli.runtime.errors import UserError
from ghibli.runtime.files import write_atomically, write_json, write_text

SHEET_IMAGES = 8  # on the contact sheet
MARK = "# Written by `ghibli prepare`"
LOCAL = """# @package _global_
{mark}: defaults of `python train.py` on this machine; model= and data= override them.
defaults:
  - override /model: {model}
  - override /data: ghibli
local:
"""

logger = logging.getLogger(__name__)


def prepare(
    base: str, config: str | None, data: str, caption: str | None, into: Path, local: Path
) -> list[Finding]:
    """Fetch base and images, check them as train.py would, and save them in `local`/default.yaml.

    Also writes prepared.json, the hash of the base, and images.png, some images with their captions.

    Args:
        base: hub id, diffusers folder, one .safetensors file, or `demo`.
        config: for one file, the folder with its configs and tokenizer.
        data: as for `download.fetch`.
        caption: for images that have none; None skips those images.
        into: where zip and parquet files are unpacked.
        local: conf/local.

    Returns:
        What `ghibli check` finds; if there is an error among it, default.yaml is left as it was.

    Raises:
        UserError: base or images are not available, or default.yaml was written by hand.
    """
    refuse_own_defaults(local / "default.yaml")
    with counted("unpacking the images") as on_progress:
        root = download.fetch(data, into, on_progress)
    folder = read_images(root, caption)
    examples = first_by_content(folder.images, SHEET_IMAGES)
    sheet = contact_sheet([(open_image(image.path), image.caption) for image in examples])
    write_atomically(local / "images.png", lambda file: sheet.save(file, "PNG"))
    logger.info(f"images {root}: {recognised(root)}; {usable_count(folder)}")
    logger.info(f"sheet    {relative_path(local / 'images.png')}: some of them with their captions")
    base_hash = download_and_hash(base, config)
    is_known = (local.parent / "model" / f"{base}.yaml").is_file()  # with what suits it in conf/model
    model = base if is_known else "sd15"
    settings = {"ghibli": str(root.resolve())} | ({} if is_known else {"sd15": absolute_path(base)})
    if config is not None:
        settings["sd15_config"] = absolute_path(config)
    if caption is not None:
        settings["caption"] = caption
    findings = preflight.check(as_overrides(model, settings))
    if not any(finding.level == "error" for finding in findings):
        write_json(local / preflight.PREPARED, {"base": absolute_path(base), "base_hash": base_hash})
        lines = [f"  {key}: {quote(value)}\n" for key, value in settings.items()]
        write_text(local / "default.yaml", LOCAL.format(mark=MARK, model=model) + "".join(lines))
    return findings


def refuse_own_defaults(file: Path) -> None:
    """Check that the defaults of this machine are not the user's own text, which would be replaced.

    Raises:
        UserError: they are.
    """
    if file.exists() and MARK not in file.read_text(encoding="utf-8", errors="replace"):
        raise UserError(
            f"{file} was not written by `ghibli prepare` and would be replaced: move it away first"
        )


def read_images(root: Path, caption: str | None) -> ImageFolder:
    """Read the images as train.py will.

    Raises:
        UserError: fewer than two are usable; if captions are missing, the message says how to add them.
    """
    try:
        with counted("checking the images") as on_progress:
            return read_folder(
                root, style="", default_caption=caption, min_side=32, key="--data", on_progress=on_progress
            )
    except UserError as error:
        if caption is None and list_images(root) and NO_CAPTION in str(error):
            raise UserError(
                f"{root} has images without captions: `{command_here('ghibli', 'caption', root)}` writes "
                "captions, or --caption "
                "TEXT gives all of them the same"
            ) from None
        raise


def usable_count(folder: ImageFolder) -> str:
    """Count the usable images in words, with the reasons why the others are not."""
    usable = f"{len(folder.images)} usable"
    return f"{usable}, {summarise(folder.unusable, elsewhere='')}" if folder.unusable else usable


def download_and_hash(base: str, config: str | None) -> str:
    """Load the base, downloading it if it is a hub id, and return the hash of its weights."""
    check_base(resolve_path(base), base)
    download.check_free_disk_for_base(base)
    return weights_hash(load(base, config))


def absolute_path(path: str) -> str:
    """Make an existing path absolute; leave a hub id and the name of an embedded base as they are."""
    place = resolve_path(path)
    is_embedded = place.is_relative_to(DEMO)
    return str(place.resolve()) if place.exists() and not is_embedded else path


def as_overrides(model: str, settings: dict[str, str]) -> list[str]:
    """Return the overrides of train.py that are equivalent to default.yaml."""
    paths = [f"local.{key}={quote(value)}" for key, value in settings.items()]
    return [f"model={model}", "data=ghibli", *paths]


def quote(text: str) -> str:
    """Quote a text so that both YAML and Hydra read it."""
    return json.dumps(text, ensure_ascii=False)
