"""`ghibli prepare`: gets base and images, looks at both, and remembers where they are."""

import json
from pathlib import Path
from typing import Any

from ghibli.config.paths import check_base
from ghibli.data.folder import NO_CAPTION, ImageFolder, list_images, read_folder, recognised, summarise
from ghibli.data.split import first_by_content
from ghibli.evaluation.diagnosis import Finding
from ghibli.images.grid import contact_sheet
from ghibli.images.read import open_image
from ghibli.models.base import DEMO, resolve_path, weights_hash
from ghibli.models.load import load
from ghibli.prepare import download, preflight
from ghibli.runtime.console import console, counted, relative_path
from ghibli.runtime.errors import UserError
from ghibli.runtime.files import write_atomically, write_json, write_text

DEFAULT_BASE = "stable-diffusion-v1-5/stable-diffusion-v1-5"
SHOWN = 8  # images on the contact sheet
LOCAL = """# @package _global_
# Written by `ghibli prepare`: what `python train.py` takes on this machine; model= and data= choose others.
defaults:
  - override /model: sd15
  - override /data: ghibli
local:
"""


def prepare(
    base: str, config: str | None, data: str, caption: str | None, into: Path, local: Path
) -> list[Finding]:
    """Gets base and images, checks them as train.py would, and notes them in `local`/default.yaml.

    Beside it come prepared.json, the hash of the base, and images.png, some images with captions.

    Args:
        base: hub id, diffusers folder, one .safetensors file, or `demo`.
        config: for one file, the folder with its configs and tokenizer.
        data: what downloads.fetch takes.
        caption: of the images that have none; without it they are skipped.
        into: where zip and parquet files are unpacked to.
        local: conf/local.

    Returns:
        What `ghibli check` finds; with an error among it default.yaml is left as it was.

    Raises:
        UserError: base or images cannot be got.
    """
    with counted("unpacking the images") as on_progress:
        root = download.fetch(data, into, on_progress)
    folder = read(root, caption)
    sheet = contact_sheet([(open_image(p.path), p.caption) for p in first_by_content(folder.images, SHOWN)])
    write_atomically(local / "images.png", lambda file: sheet.save(file, "PNG"))
    console.print(f"images {root}: {recognised(root)}; {counts(folder)}")
    console.print(f"sheet    {relative_path(local / 'images.png')}: some of them with their captions")
    found_hash = base_hash(base, config)
    places = {"sd15": whole(base), "sd15_config": config and whole(config), "ghibli": str(root.resolve()),
              "caption": caption}  # fmt: skip
    findings = preflight.check(words(places))
    if not any(finding.level == "error" for finding in findings):
        write_json(local / preflight.PREPARED, {"base": places["sd15"], "base_hash": found_hash})
        lines = [f"  {key}: {quoted(value)}\n" for key, value in places.items() if value is not None]
        write_text(local / "default.yaml", LOCAL + "".join(lines))
    return findings


def read(root: Path, caption: str | None) -> ImageFolder:
    """The images as train.py will read them.

    Raises:
        UserError: fewer than two usable ones; if for want of captions, it says what gives them.
    """
    try:
        with counted("looking at the images") as on_progress:
            return read_folder(
                root, style="", default_caption=caption, min_side=32, key="--data", on_progress=on_progress
            )
    except UserError as mistake:
        if caption is None and list_images(root) and NO_CAPTION in str(mistake):
            raise UserError(
                f"{root} has images without captions: ghibli caption {root} writes some, or --caption TEXT "
                "gives all of them the same"
            ) from None
        raise


def counts(folder: ImageFolder) -> str:
    """How many can be used, and why the others cannot."""
    usable = f"{len(folder.images)} usable"
    return f"{usable}, {summarise(folder.unusable, elsewhere='')}" if folder.unusable else usable


def base_hash(base: str, config: str | None) -> str:
    """Downloads the base if it is a hub id, loads it, and returns the hash of its weights."""
    check_base(resolve_path(base), base)
    download.check_room_for_base(base)
    loaded = load(base, config)
    return weights_hash(loaded)


def whole(path: str) -> str:
    """A path that means the same from every folder; a hub id or a name of ours as it is."""
    place = resolve_path(path)
    is_ours = place.is_relative_to(DEMO)
    return str(place.resolve()) if place.exists() and not is_ours else path


def words(places: dict[str, Any]) -> list[str]:
    """The overrides of train.py that say the same as default.yaml will."""
    return ["model=sd15", "data=ghibli"] + [
        f"local.{key}={quoted(value)}" for key, value in places.items() if value is not None
    ]


def quoted(text: str) -> str:
    """A text as both YAML and Hydra read it."""
    return json.dumps(text, ensure_ascii=False)
