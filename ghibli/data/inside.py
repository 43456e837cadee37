"""Image sets are closed: no name and no link in one leads to a file elsewhere."""

import os
from pathlib import Path

from ghibli.images.read import Unusable


def require_inside(path: Path, top: Path) -> None:
    """Refuse a name or a link that leads out of an image set: somebody else may have made it.

    The hub's cache is no exception: there `snapshots/` links to `blobs/` beside it.

    Raises:
        Unusable: it does.
    """
    try:
        real, inside = Path(os.path.realpath(path)), [Path(os.path.realpath(top))]
    except (OSError, ValueError):
        raise Unusable("no file can have this name") from None
    if "snapshots" in inside[0].parts:
        repository = next(parent.parent for parent in inside[0].parents if parent.name == "snapshots")
        inside.append(repository / "blobs")
    if not any(real.is_relative_to(folder) for folder in inside):
        raise Unusable("it leads out of the folder: copy the file into it")
