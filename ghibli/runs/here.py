"""A stored run on this machine: what its settings may not choose here, whoever wrote them."""

from dataclasses import replace
from pathlib import Path

from ghibli.config.schema import Config


def on_this_machine(config: Config, cache_dir: str, keep_root: bool = False) -> Config:
    """Return the settings of a stored run with this machine's cache, and its drawn images in that cache.

    A run may come from elsewhere, and must not choose where this machine writes. Drawn images depend on
    nothing but data.draw, so wherever they are, they are the same.

    Args:
        cache_dir: where this machine caches.
        keep_root: the command names data.root itself.
    """
    data, cache = config.data, Path(cache_dir)
    if data.draw is not None and not keep_root:
        is_cached = Path(data.root_folder).is_relative_to(config.cache_dir)
        if is_cached or not (Path(data.root_folder) / "captions.txt").is_file():
            data = replace(data, root=str(cache / f"scenes-{data.draw.look}-{data.draw.count}"))
    if data.reference is not None and data.reference_draw is not None:
        is_cached = Path(data.reference).is_relative_to(config.cache_dir)
        if is_cached or not Path(data.reference).is_dir():
            data = replace(data, reference=str(cache / f"scenes-reference-{data.reference_draw.count}"))
    return replace(config, cache_dir=cache_dir, data=data)
