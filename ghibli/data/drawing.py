"""Draw images that are missing. Without torch, so that they can be drawn while that is imported."""

import logging
import multiprocessing
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ghibli.config.schema import DrawConfig
from ghibli.demo.scenes.scene import FINETUNE_SEEDS, PRETRAIN_SEEDS, damaged, write_folder
from ghibli.runtime.console import counted

SEEDS = {"drawn": FINETUNE_SEEDS, "photo": PRETRAIN_SEEDS}  # of the scenes that training uses, by look

logger = logging.getLogger(__name__)


def draw_missing(root: str, draw: DrawConfig | None, cache_dir: str, seeds: range | None = None) -> None:
    """Draw the images of a folder that is missing, or damaged in the cache.

    Args:
        draw: what to draw; None = nothing.
        seeds: of the scenes; None = those that training uses.
    """
    folder = Path(root)
    if draw is None:
        return
    if (folder / "captions.txt").exists():
        if not (folder.is_relative_to(cache_dir) and damaged(folder)):
            return
        logger.warning(f"the drawn images in {root} are damaged: drawing them again")
    first = (seeds or SEEDS[draw.look]).start
    with counted("drawing the demo images") as on_progress:
        write_folder(folder, draw.look, draw.count, first, on_progress=on_progress)


@contextmanager
def drawn_meanwhile(root: str, draw: DrawConfig | None) -> Iterator[None]:
    """Draw the images of a missing folder in another process while the block runs, such as slow imports.

    What that process cannot do is left to draw_missing, which says why.
    """
    if draw is None or (Path(root) / "captions.txt").exists():
        yield
        return
    process = multiprocessing.get_context("spawn").Process(
        target=draw_silently, args=(Path(root), draw), daemon=True
    )
    process.start()
    try:
        yield
    finally:
        process.join()


def draw_silently(folder: Path, draw: DrawConfig) -> None:
    """Draw a folder without a word, in a process of its own."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that trains
    with suppress(OSError):  # draw_missing meets it again, and says so
        write_folder(folder, draw.look, draw.count, SEEDS[draw.look].start)
