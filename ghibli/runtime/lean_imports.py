"""Import the training libraries without what they would load on the side and nobody uses here.

Lightning imports torchmetrics, and that imports scipy.signal and matplotlib's pyplot if they are installed,
for metrics and plots that are not used here. diffusers and transformers each list the files of every
installed package.
"""

import importlib
import importlib.metadata
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from unittest.mock import patch

from lightning_utilities.core import imports

UNUSED = ("scipy", "matplotlib")  # optional for torchmetrics


@contextmanager
def lean_imports() -> Iterator[None]:
    """List the installed packages once, and give torchmetrics none of UNUSED; around imports.

    What was imported before is left as it is. All other modules still find these packages.
    """
    listed = cache(importlib.metadata.packages_distributions)
    with patch.object(importlib.metadata, "packages_distributions", listed):
        import_torchmetrics()
        yield


def import_torchmetrics() -> None:
    """Import torchmetrics as if UNUSED were not installed."""
    is_available, check = imports.package_available, imports.RequirementCache._check_available

    def is_used(package: str) -> bool:
        return package not in UNUSED and is_available(package)

    def check_used(requirement: imports.RequirementCache) -> None:
        if (requirement.requirement or "").startswith(UNUSED):
            requirement.available, requirement.message = False, "not used"
        else:
            check(requirement)

    with (
        patch.object(imports, "package_available", is_used),
        patch.object(imports.RequirementCache, "_check_available", check_used),
    ):
        importlib.import_module("torchmetrics")
