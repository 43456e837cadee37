"""`ghibli generate`: PNG files from prompts, reproducible from the settings stored in each."""

import json
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, replace
from pathlib import Path

import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from ghibli.adapters.model_card import public_name
from ghibli.config.registry import sampler_label
from ghibli.diffusion.samplers import Cell, sample
from ghibli.images.grid import compose_grid, to_image
from ghibli.inference.fit import require_memory
from ghibli.inference.img2img import redraw
from ghibli.inference.load import LoadedModel
from ghibli.inference.request import Axis, ImageRequest, grid_requests
from ghibli.models.base import BaseModel
from ghibli.models.prompt_embeds import encode_weighted
from ghibli.runtime.console import counted
from ghibli.runtime.errors import UserError
from ghibli.runtime.files import next_number, write_new
from ghibli.runtime.home import without_home

Count = Callable[[str], AbstractContextManager[Callable[[int, int], None]]]  # as console.counted
SCALES = [0.0, 0.2, 0.4, 0.6, 0.8, 1.0, 1.2]  # of the adapters, for --interpolate
OUT_OF_MEMORY = ("out of memory", "not enough memory", "can't allocate memory", "alloc_cpu")


def generate_images(
    model: LoadedModel, request: ImageRequest, label: str = "generating", count: Count = counted
) -> torch.Tensor:
    """Generate images (N, 3, height, width), float32 in 0 .. 1, one for each prompt.

    Args, Raises: as generate_batches.
    """
    return torch.cat(list(generate_batches(model, request, label, count)))


def generate_batches(
    model: LoadedModel, request: ImageRequest, label: str = "generating", count: Count = counted
) -> Iterator[torch.Tensor]:
    """Yield the images of one batch after another, (B, 3, height, width), float32 in 0 .. 1.

    Args:
        label: of the progress bar.
        count: opens the progress bar, which counts denoising steps.

    Raises:
        UserError: out of memory, or an image that is not finite.
    """
    base = model.at(request.scale)
    cell, done = Cell(request.sampler, request.guidance), 0
    with count(label) as on_progress, enough_memory():
        total = -(-len(request.prompts) // request.batch) * request.steps
        if request.hires > 1:
            total += len(request.prompts) * int(request.steps * request.hires_strength)
        require_memory(base, request.size, min(request.batch, len(request.prompts)), request.guidance)
        require_memory(base, request.final_size, 1, request.guidance)

        def on_step() -> None:
            nonlocal done
            done += 1
            on_progress(done, total)

        for start in range(0, len(request.prompts), request.batch):
            batch = request.prompts[start : start + request.batch]
            images = sample(
                base, batch, cell, num_inference_steps=request.steps,
                seeds=[request.seed + start + i for i in range(len(batch))],
                resolution=request.size, negative_prompt=request.negative, encode=encode_weighted,
                on_step=on_step,
            )  # fmt: skip
            yield images if request.hires == 1 else enlarged(base, images, request, start, on_step)


def enlarged(
    base: BaseModel, images: torch.Tensor, request: ImageRequest, start: int, on_step: Callable[[], None]
) -> torch.Tensor:
    """Redraw images (B, 3, h, w) at request.final_size, each with its own prompt and seed.

    Args:
        start: number of the first of them among the request's prompts.
    """
    larger = []
    for number, image in enumerate(images, start=start):
        options = replace(request.hires_options, seed=request.seed + number)
        prompt = request.prompts[number]
        enlarged = to_image(image).resize(request.final_size, Image.Resampling.LANCZOS)
        larger.append(redraw(base, enlarged, prompt, options, on_step))
    return torch.stack(larger)


@contextmanager
def enough_memory() -> Iterator[None]:
    """Turn torch's out-of-memory errors into a UserError."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not isinstance(error, MemoryError) and not any(
            text in str(error).lower() for text in OUT_OF_MEMORY
        ):
            raise
        raise UserError(
            "not enough memory: use fewer images at once or smaller ones (--batch, --size)"
        ) from error


def write_images(
    images: torch.Tensor, request: ImageRequest, model: LoadedModel, folder: Path, done: int = 0
) -> list[Path]:
    """Write 000.png, 001.png, ..., each with the settings that reproduce it, as JSON and as A1111 does.

    Where the folder holds such files, the next free numbers are used.

    Args:
        images: (N, 3, H, W), of the request's prompts from number `done` on.
    """
    files, number = [], next_number(folder, ".png")
    for i, image in enumerate(images):
        alone = replace(request, prompts=[request.prompts[done + i]], seed=request.seed + done + i)
        metadata = note(asdict(alone) | model_metadata(model))
        metadata.add_text("parameters", a1111_parameters(alone, model))
        files.append(write_png(folder / f"{number + i:03d}.png", to_image(image), metadata))
    return files


def note(settings: dict[str, object]) -> PngInfo:
    """Make the metadata of a PNG file: the settings as JSON, under `ghibli`."""
    metadata = PngInfo()
    metadata.add_text("ghibli", json.dumps(settings, ensure_ascii=False, allow_nan=False))
    return metadata


def model_metadata(model: LoadedModel) -> dict[str, object]:
    """Describe base and adapters for an image's metadata, without the home folder: images are shared."""
    base, merged = model.config.model, {}
    if base.adapter is not None:
        merged = {"merged": public_name(base.adapter), "merged_scale": base.adapter_scale}
    skipped = {"clip_skip": base.clip_skip} if base.clip_skip > 1 else {}
    names = [without_home(name) for name in model.names]
    return {"base": public_name(base.path), **merged, **skipped, "adapters": names, "weights": model.weights}


def a1111_parameters(request: ImageRequest, model: LoadedModel) -> str:
    """Format the settings of one image as A1111 stores them in its images and reads them back."""
    negative = f"Negative prompt: {request.negative}\n" if request.negative else ""
    width, height = request.size
    hires = ""
    if request.hires > 1:
        hires = f", Denoising strength: {request.hires_strength:g}, Hires upscale: {request.hires:g}"
        hires += ", Hires upscaler: Lanczos"
    skip = model.config.model.clip_skip
    skipped = f", Clip skip: {skip}" if skip > 1 else ""
    return (
        f"{request.prompts[0]}\n{negative}Steps: {request.steps}, Sampler: {sampler_label(request.sampler)}, "
        f"CFG scale: {request.guidance:g}, Seed: {request.seed}, Size: {width}x{height}, "
        f"Model: {public_name(model.config.model.path)}{hires}{skipped}"
    )


def write_png(file: Path, image: Image.Image, metadata: PngInfo | None = None) -> Path:
    """Write a PNG file, under the next free name where this one is taken; return the file."""
    return write_new(file, lambda opened: image.save(opened, "PNG", pnginfo=metadata))


def base_comparison_sheet(model: LoadedModel, request: ImageRequest, images: torch.Tensor) -> Image.Image:
    """Compose a sheet with the base above the given images (N, 3, H, W), from the same noise."""
    base = generate_images(model, replace(request, scale=0.0), "generating with the base")
    rows = [("base", base[:, None]), ("adapter", images[:, None])]
    cell = Cell(request.sampler, request.guidance)
    return compose_grid(rows, request.prompts, [cell.label], f"seed {request.seed}")


def settings_grid(
    model: LoadedModel, request: ImageRequest, axes: list[Axis], count: Count = counted
) -> Image.Image:
    """Compose a sheet with a column for each value of the first axis and a row for each of the second.

    Raises:
        UserError: as grid_requests and generate_images.
    """
    requests, number = grid_requests(request, axes), 0
    total, rows = len(requests) * len(requests[0]), []
    for across in requests:
        images = []
        for cell in across:
            number += 1
            images.append(generate_images(model, cell, f"image {number} of {total}", count))
        label = f"{axes[1].name} {getattr(across[0], axes[1].name)}" if len(axes) > 1 else ""
        rows.append((label, torch.stack(images, dim=1)))
    labels = [f"{axes[0].name} {getattr(cell, axes[0].name)}" for cell in requests[0]]
    title = f"seed {request.seed}, {sampler_label(request.sampler)} guidance {request.guidance:g}"
    return compose_grid(rows, request.prompts, labels, title)


def adapter_scale_sheet(model: LoadedModel, request: ImageRequest) -> Image.Image:
    """Compose a sheet with a row for each prompt and a column for each of SCALES."""
    columns = [
        generate_images(model, replace(request, scale=scale), f"generating at adapter scale {scale:g}")
        for scale in SCALES
    ]
    title = (
        f"adapter scale, seed {request.seed}, {sampler_label(request.sampler)} guidance {request.guidance:g}"
    )
    labels = [f"{scale:g}" for scale in SCALES]
    return compose_grid([("", torch.stack(columns, dim=1))], request.prompts, labels, title)
