"""`ghibli generate`: prompts -> PNG files that carry their settings, always from the same start noise."""

import json
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from ghibli.config.registry import SAMPLERS, sampler_label
from ghibli.diffusion.samplers import Cell, sample
from ghibli.images.grid import compose_grid, to_image
from ghibli.inference.load import LoadedModel
from ghibli.models.base import BaseModel
from ghibli.runtime.console import counted
from ghibli.runtime.errors import UserError
from ghibli.runtime.files import write_atomically

LARGEST = 2048  # px, the longer side
Count = Callable[[str], AbstractContextManager[Callable[[int, int], None]]]  # as progress.counted
STRIP = [0.0, 0.2, 0.4, 0.6, 0.8, 1.0, 1.2]  # adapter scales of --interpolate
NO_ROOM = ("out of memory", "not enough memory", "can't allocate memory", "alloc_cpu")


@dataclass(frozen=True)
class Request:
    """How to draw; image i has the start noise of seed + i, whatever else is drawn with it."""

    prompts: list[str]
    sampler: str  # a name in SAMPLERS
    guidance: float  # 1 = off
    steps: int
    seed: int
    size: tuple[int, int]  # width, height in px
    negative: str = ""
    batch: int = 4  # images drawn together
    scale: float = 1.0  # of all adapters

    def __post_init__(self) -> None:
        SAMPLERS.require(self.sampler, "--sampler")
        if not self.prompts or not all(prompt.strip() for prompt in self.prompts):
            raise UserError("an empty prompt: say what to draw, --prompt TEXT")
        if not 1 <= self.steps <= 1000:
            raise UserError(f"--steps {self.steps}: from 1 to 1000")
        check_seed(self.seed)
        for side in self.size:
            if side % 8 or not 64 <= side <= LARGEST:
                near = min(max(64, round(side / 8) * 8), LARGEST)
                raise UserError(f"--size {side}: a multiple of 8 from 64 to {LARGEST}, such as {near}")


def check_seed(seed: int) -> None:
    """Raises a UserError for a seed that torch does not take."""
    if not 0 <= seed < 2**32:
        raise UserError(f"--seed {seed}: from 0 to {2**32 - 1}")


def size_of(text: str) -> tuple[int, int]:
    """`512` or `640x384` -> (width, height).

    Raises:
        UserError: neither.
    """
    sides = text.lower().split("x")
    if len(sides) > 2 or not all(side.isascii() and side.isdigit() for side in sides):
        raise UserError(f"--size {text}: a number of px, or WIDTHxHEIGHT")
    return int(sides[0]), int(sides[-1])


def lines_of(file: Path) -> list[str]:
    """The prompts of a text file, one a line; empty lines are left out.

    Raises:
        UserError: no such file, or not UTF-8.
    """
    try:
        lines = file.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--prompts {file} cannot be read as UTF-8 text: {error}") from error
    return [line.strip() for line in lines if line.strip()]


def lost_words(prompts: list[str], base: BaseModel) -> list[str]:
    """For each prompt that is longer than the text encoder reads, a sentence with the words it loses."""
    limit, said = base.tokenizer.model_max_length, []
    for prompt in prompts:
        ids = base.tokenizer(prompt, verbose=False).input_ids
        if len(ids) > limit:
            lost = base.tokenizer.decode(ids[limit - 1 : -1]).strip()
            said.append(f"`{prompt[:40]} ...` is too long, the text encoder never sees `{lost[:100]}`")
    return said


def draw(
    loaded: LoadedModel, request: Request, label: str = "drawing", count: Count = counted
) -> torch.Tensor:
    """Images (N, 3, height, width), float32 in 0 .. 1, one for each prompt.

    Args:
        label: what is being done, in words.
        count: shows it with the denoising steps done and in all.

    Raises:
        UserError: no memory for it.
    """
    base = loaded.at(request.scale)
    cell, found, done = Cell(request.sampler, request.guidance), [], 0
    with count(label) as on_progress, enough_memory():
        total = -(-len(request.prompts) // request.batch) * request.steps
        for start in range(0, len(request.prompts), request.batch):
            part = request.prompts[start : start + request.batch]

            def on_step() -> None:
                nonlocal done
                done += 1
                on_progress(done, total)

            found.append(sample(
                base, part, cell, num_inference_steps=request.steps,
                seeds=[request.seed + start + i for i in range(len(part))],
                resolution=request.size, negative_prompt=request.negative, on_step=on_step,
            ))  # fmt: skip
    return torch.cat(found)


@contextmanager
def enough_memory() -> Iterator[None]:
    """Turns what torch raises without memory into one line."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not isinstance(error, MemoryError) and not any(words in str(error).lower() for words in NO_ROOM):
            raise
        raise UserError("not enough memory: draw fewer at once or smaller (--batch, --size)") from error


def write_images(images: torch.Tensor, request: Request, loaded: LoadedModel, folder: Path) -> list[Path]:
    """000.png, 001.png, ... each with the settings that make it, as JSON and as A1111 writes them."""
    files = []
    for number, image in enumerate(images):
        alone = replace(request, prompts=[request.prompts[number]], seed=request.seed + number)
        note = PngInfo()
        note.add_text("ghibli", json.dumps(asdict(alone) | model_note(loaded), ensure_ascii=False))
        note.add_text("parameters", parameters(alone, loaded))
        file = folder / f"{number:03d}.png"
        write_png(file, to_image(image), note)
        files.append(file)
    return files


def model_note(loaded: LoadedModel) -> dict[str, object]:
    """Base and adapters, for an image's note."""
    model = loaded.config.model
    merged = {} if model.adapter is None else {"merged": model.adapter, "merged_scale": model.adapter_scale}
    return {"base": model.path, **merged, "adapters": loaded.names, "weights": loaded.weights}


def parameters(request: Request, loaded: LoadedModel) -> str:
    """The text that A1111 puts into its images and reads from them."""
    negative = f"Negative prompt: {request.negative}\n" if request.negative else ""
    width, height = request.size
    return (
        f"{request.prompts[0]}\n{negative}Steps: {request.steps}, Sampler: {sampler_label(request.sampler)}, "
        f"CFG scale: {request.guidance:g}, Seed: {request.seed}, Size: {width}x{height}, "
        f"Model: {loaded.config.model.path}"
    )


def write_png(file: Path, image: Image.Image, note: PngInfo | None = None) -> None:
    """Atomically."""
    write_atomically(file, lambda opened: image.save(opened, "PNG", pnginfo=note))


def beside_base(loaded: LoadedModel, request: Request, images: torch.Tensor) -> Image.Image:
    """A sheet: for each prompt the base above, what was drawn below, from the same start noise."""
    base = draw(loaded, replace(request, scale=0.0), "drawing what the base makes of it")
    rows = [("base", base[:, None]), ("adapter", images[:, None])]
    cell = Cell(request.sampler, request.guidance)
    return compose_grid(rows, request.prompts, [cell.label], f"seed {request.seed}")


def strip(loaded: LoadedModel, request: Request) -> Image.Image:
    """A sheet: for each prompt a row, the adapter's scale growing from 0 (the base) to 1.2."""
    columns = [
        draw(loaded, replace(request, scale=scale), f"drawing at adapter scale {scale:g}") for scale in STRIP
    ]
    sampler = sampler_label(request.sampler)
    title = f"adapter scale, seed {request.seed}, {sampler} guidance {request.guidance:g}"
    labels = [f"{scale:g}" for scale in STRIP]
    return compose_grid([("", torch.stack(columns, dim=1))], request.prompts, labels, title)
