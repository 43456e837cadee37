"""Memory of this process, resident and at its peak, and free disk space."""

import gc
import mmap
from pathlib import Path

import numpy as np
import pytest
import torch

from ghibli.runtime import resources

needs_proc = pytest.mark.skipif(resources.peak_memory() is None, reason="Linux only")


def test_resident_memory_grows_with_what_is_held() -> None:
    """By pages of its own, since an allocation may get memory that the process already holds."""
    before, size = resources.resident_memory(), 2**26
    with mmap.mmap(-1, size) as held:
        held.write(b"x" * size)  # every page; the text itself is freed again
        assert resources.resident_memory() - before > 0.9 * size


@needs_proc
@pytest.mark.skipif(torch.cuda.is_available(), reason="counts the GPU's memory there")
def test_the_peak_is_reset() -> None:
    held = np.ones(2**24)  # 128 MiB
    peak = resources.peak_memory()
    assert peak >= resources.resident_memory()
    del held
    gc.collect()
    resources.reset_peak_memory()
    assert resources.peak_memory() < peak - 2**26


def test_free_disk_of_a_folder_that_does_not_exist_yet(tmp_path: Path) -> None:
    assert resources.free_disk(tmp_path / "not" / "there") == pytest.approx(
        resources.free_disk(tmp_path), rel=0.1
    )
