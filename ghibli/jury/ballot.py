"""A ballot: pairs of images that models drew of one prompt, on one page that needs no network."""

import base64
import hashlib
import io
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from PIL import Image

from ghibli.images.grid import to_image
from ghibli.inference.generate import generate_images
from ghibli.inference.load import load_model
from ghibli.inference.request import ImageRequest
from ghibli.runs.folder import RunDir
from ghibli.runtime.errors import UserError
from ghibli.runtime.files import write_json, write_text

SAME_EVERY = 8  # one pair in so many shows one model twice, from two noises
LOSSLESS = 256  # px; larger images are compressed, all alike
QUALITY = 92  # of WebP


@dataclass(frozen=True)
class Drawing:
    """One image: a model's, of an item, which is a prompt and a start noise."""

    model: int
    item: int


@dataclass(frozen=True)
class Pair:
    """Two images of one prompt: by two models from the same noise, or by one model from two noises."""

    a: Drawing
    b: Drawing


def plan(models: int, prompts: int, items: int, most: int) -> list[Pair]:
    """Plan the pairs of a ballot, in a fixed random order.

    Item i is prompt i modulo `prompts`. Every two models meet equally often, plus or minus one; among these
    pairs are some of one model alone, which tell whether people choose a side.

    Args:
        most: pairs in all.
    """
    draws, meeting = np.random.default_rng(0), list(combinations(range(models), 2))
    alone = min(most // SAME_EVERY, max(items - prompts, 0))  # item k and item k + prompts have one prompt
    found = [
        Pair(Drawing(meeting[k][0], item), Drawing(meeting[k][1], item))
        for item in range(items)
        for k in draws.permutation(len(meeting))
    ][: max(most - alone, 1)]
    found += [Pair(Drawing(k % models, k), Drawing(k % models, k + prompts)) for k in range(alone)]
    return [found[at] for at in draws.permutation(len(found))]


def items_needed(models: int, prompts: int, most: int) -> int:
    """Return how many items make a ballot of so many pairs."""
    return max(-(-most // math.comb(models, 2)), prompts + most // SAME_EVERY)


def items_of(prompts: Sequence[str], items: int) -> list[str]:
    """Return the prompt of every item."""
    return [prompts[item % len(prompts)] for item in range(items)]


def draw(
    sources: Sequence[str],
    overrides: list[str],
    request: ImageRequest,
    *,
    guidance: float | None,
    size: tuple[int, int] | None,
) -> list[torch.Tensor]:
    """Draw every item by every model: for each (items, 3, H, W), float32 in 0 .. 1.

    Args:
        sources: a run or an adapter file for each model.
        overrides: of train.py, which choose the base of adapter files.
        request: with a prompt for each item.
        guidance: of all; None = what suits each model.
        size: of all, in px; None = that of the first model's training.

    Raises:
        UserError: a model that cannot be loaded, or an image that is not finite.
    """
    found = []
    for number, source in enumerate(sources, start=1):
        is_run = source == "latest" or RunDir(Path(source)).config.is_file()
        model = load_model([source], [] if is_run else overrides)
        size = size or (model.config.model.resolution,) * 2
        own = model.guidance if guidance is None else guidance
        asked = replace(request, size=size, guidance=own)
        found.append(generate_images(model, asked, f"model {number} of {len(sources)}"))
    return found


def write(
    folder: Path, names: Sequence[str], prompts: list[str], pairs: list[Pair], drawn: list[torch.Tensor]
) -> Path:
    """Write the page and, beside it, the key that says which model drew what; return the page's file.

    Both are named after the ballot, a hash of all that is shown, so the same ballot replaces itself only.
    The names stay out of the hash, from which they could be guessed.

    Args:
        names: of the models, which only the key has.
        prompts: of the items.
        drawn: as `draw` returns it.

    Raises:
        UserError: there is a key of the same images under other names, by which votes may be counted.
    """
    shown = list(dict.fromkeys(drawing for pair in pairs for drawing in (pair.a, pair.b)))
    order = np.random.default_rng(len(shown)).permutation(len(shown))  # a number tells no model
    number = {shown[place]: at for at, place in enumerate(order)}
    uris = [as_uri(to_image(drawn[shown[place].model][shown[place].item])) for place in order]
    listed = [{"a": number[pair.a], "b": number[pair.b], "prompt": prompts[pair.a.item]} for pair in pairs]
    content = json.dumps([uris, listed], ensure_ascii=False)
    ballot = hashlib.sha256(content.encode()).hexdigest()[:8]
    page = folder / f"ballot-{ballot}.html"
    data: dict[str, Any] = {"ballot": ballot, "images": uris, "pairs": listed}
    key = {
        "ballot": ballot, "models": list(names),
        "pairs": [{"models": [p.a.model, p.b.model], "items": [p.a.item, p.b.item]} for p in pairs],
    }  # fmt: skip
    file = page.with_suffix(".key.json")
    if file.exists() and json.loads(file.read_text(encoding="utf-8")) != key:
        raise UserError(f"{file} is of the same images under other names: move it away, or give another --to")
    folder.mkdir(parents=True, exist_ok=True)
    write_text(page, environment().get_template("page.html.jinja").render(data=data, count=len(pairs)))
    write_json(file, key)
    return page


def as_uri(image: Image.Image) -> str:
    """Embed an image as WebP, without loss up to LOSSLESS px."""
    content = io.BytesIO()
    image.save(content, "WEBP", lossless=max(image.size) <= LOSSLESS, quality=QUALITY)
    return f"data:image/webp;base64,{base64.b64encode(content.getvalue()).decode()}"


def environment() -> Environment:
    """Create the Jinja environment of the page, which escapes all text."""
    return Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined
    )
