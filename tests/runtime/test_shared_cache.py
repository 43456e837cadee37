"""Two processes that fill one cache folder at the same time."""

import multiprocessing
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image

from ghibli.data.folder import CaptionedImage, read_folder
from ghibli.demo.scenes.scene import FINETUNE_SEEDS, write_folder
from ghibli.runtime import cache
from ghibli.training.base_scores import cached_scores

FORK = multiprocessing.get_context("fork")  # a spawned process would import torch for seconds
SETTINGS = {"base": "abc", "guidance": 1}


def side_by_side(*works: Callable[[], None]) -> list[multiprocessing.Process]:
    """Start functions in processes of their own, all at the same moment."""
    barrier = FORK.Barrier(len(works))

    def begin(work: Callable[[], None]) -> None:
        barrier.wait()
        work()

    processes = [FORK.Process(target=begin, args=(work,)) for work in works]
    for process in processes:
        process.start()
    return processes


def test_two_processes_draw_the_same_images(tmp_path: Path) -> None:
    """At any moment only complete images are visible; the set is what one process draws."""
    options = {"look": "drawn", "count": 6, "first_seed": FINETUNE_SEEDS.start, "size": 256}
    write_folder(tmp_path / "alone", **options)
    root, seen = tmp_path / "shared", 0
    workers = side_by_side(*2 * [lambda: write_folder(root, **options)])
    while any(worker.is_alive() for worker in workers):
        for file in root.glob("images/*.png"):
            with Image.open(file) as image:
                image.load()  # raises if it is incomplete
            seen += 1
    assert [worker.exitcode for worker in workers] == [0, 0]
    assert seen > 0

    def contents(folder: Path) -> dict[str, bytes]:
        return {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file()}

    assert contents(root) == contents(tmp_path / "alone")
    assert len(read_folder(root, style="", default_caption=None, min_side=32).images) == 6


def test_drawing_resumes_after_a_kill(tmp_path: Path) -> None:
    """A half-drawn set has no captions.txt; its images, even an incomplete one, are drawn again."""
    options = {"look": "drawn", "count": 2, "first_seed": FINETUNE_SEEDS.start}
    write_folder(tmp_path / "whole", **options)
    name = f"images/scene_{FINETUNE_SEEDS.start}.png"
    (tmp_path / "half" / "images").mkdir(parents=True)
    (tmp_path / "half" / name).write_bytes((tmp_path / "whole" / name).read_bytes()[:500])
    write_folder(tmp_path / "half", **options)
    assert (tmp_path / "half" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_tensors_of_another_processor_are_recomputed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rounding depends on the processor, and machines may share a cache folder."""
    made = []

    def make() -> dict[str, torch.Tensor]:
        made.append(torch.ones(1))
        return {"tensor": made[-1]}

    for processor in ("one", "one", "another"):
        monkeypatch.setattr(cache, "processor_name", lambda name=processor: name)
        cache.cached(tmp_path, {"key": 1}, make)
    assert len(made) == 2


def test_two_processes_add_to_the_scores(tmp_path: Path) -> None:
    """Each process scores its own images one by one; in the end all scores are known and correct."""
    images = [CaptionedImage(Path(f"{n}.png"), "a cat", f"{n:064x}") for n in range(60)]

    def score(own: list[CaptionedImage]) -> None:
        for image in own:
            number = int(image.content_hash, 16)
            cached_scores(tmp_path, SETTINGS, [image], lambda rows, n=number: torch.tensor([[n / 7, n]]))

    workers = side_by_side(lambda: score(images[::2]), lambda: score(images[1::2]))
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0, 0]

    def unknown(rows: list[int]) -> torch.Tensor:
        raise AssertionError(f"the scores of images {rows} were lost")

    scores = cached_scores(tmp_path, SETTINGS, images, unknown)
    assert torch.equal(scores, torch.tensor([[n / 7, n] for n in range(60)]))
