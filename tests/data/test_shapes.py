"""One function chooses an image's shape: planned batches, latents, checks and samples agree on every file."""

import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from ghibli.data.datamodule import GhibliDataModule
from ghibli.data.latents import encode
from ghibli.images.read import check_image, open_image, without_warnings
from ghibli.images.resize import preprocess, size_for
from ghibli.models.base import BaseModel
from ghibli.runs.folder import RunDir
from ghibli.runtime.errors import UserError

SWAPPING = (5, 6, 7, 8)  # EXIF orientations that lay an image on its side


XMP = (
    '<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
    '<rdf:Description xmlns:tiff="http://ns.adobe.com/tiff/1.0/" tiff:Orientation="{}"/></rdf:RDF>'
    "</x:xmpmeta>"
)


def write(path: Path, size: tuple[int, int], orientation: int, xmp: bool = False) -> None:
    """Write an image turned by its EXIF or, as some programs do, by its XMP alone."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    note = {"xmp": XMP.format(orientation).encode()} if xmp else {"exif": exif}
    Image.new("RGB", size, (90, 120, 40)).save(path, **note)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    size=st.tuples(st.integers(33, 1600), st.integers(33, 1600)),
    orientation=st.integers(1, 8),
    ending=st.sampled_from(["jpg", "jpg", "png", "webp", "tif", "xmp.jpg", "xmp.webp"]),
    resolution=st.sampled_from([64, 256, 512]),
    resize=st.sampled_from(["bucket", "bucket", "squash", "center_crop"]),
)
def test_the_planned_shape_is_the_tensor_s(
    size: tuple[int, int], orientation: int, ending: str, resolution: int, resize: str
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"a.{ending}"
        write(path, size, orientation, ending.startswith("xmp"))
        with without_warnings():
            whole = check_image(path, min_side=32)[1]
        opened = open_image(path)
        assert whole == opened.size == (size[::-1] if orientation in SWAPPING else size)
        planned = size_for(whole, resolution, resize)
        assert planned == size_for(opened.size, resolution, resize)
        assert tuple(preprocess(opened, resolution, resize).shape) == (3, planned[1], planned[0])


UNEQUAL = (409, 280)  # px: the JPEG decoder's half has another nearest shape
ODD = [UNEQUAL, (280, 409), (613, 502), (1037, 847)]


@pytest.mark.slow
def test_batches_and_cached_latents_have_the_planned_shapes(
    tmp_path: Path, make_config: Callable, base: BaseModel
) -> None:
    for place, size in enumerate(ODD * 4):
        exif = Image.Exif()
        exif[0x0112] = 1 + place % 8
        noise = np.random.default_rng(place).integers(0, 256, (5, 5, 3), dtype=np.uint8)
        image = Image.fromarray(noise).resize(size)
        image.save(tmp_path / f"{place:02d}.jpg", exif=exif)
    config = make_config(
        f"data.root={tmp_path}", "data.caption=x", "data.resize=bucket", "model.resolution=512"
    )
    data = GhibliDataModule(config, base, RunDir(tmp_path / "run"), 1000)
    data.read()
    paths = [image.path for image in data.train_images]
    assert [preprocess(open_image(path), 512, "bucket").shape[1:] for path in paths] == [
        (height, width) for width, height in data.shapes
    ]
    some = encode(base, paths[:3], resolution=512, resize="bucket")
    for (width, height), mean in zip(data.shapes, some.mean, strict=False):
        assert tuple(mean.shape[1:]) == (height // base.vae_factor, width // base.vae_factor)


def test_a_batch_that_no_shape_fills_names_the_shapes(
    tmp_path: Path, make_config: Callable, base: BaseModel
) -> None:
    for place in range(12):
        size = (100, 160) if place % 2 else (160, 100)
        noise = np.random.default_rng(place).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
        Image.fromarray(noise).save(tmp_path / f"{place}.png")
    words = f"data.root={tmp_path}", "data.caption=x", "data.resize=bucket", "data.batch_size=8"
    data = GhibliDataModule(make_config(*words), base, RunDir(tmp_path / "run"), 1000)
    data.read()
    with pytest.raises(
        UserError, match=r"a batch holds images of one shape, and the \d+ training images are"
    ) as e:
        data.steps_per_epoch(1, 1)
    for width, height in set(data.shapes):
        assert f"of {width}x{height} px" in str(e.value)
    assert "is more than" not in str(e.value) and "data.resize=center_crop" in str(e.value)
    with pytest.raises(UserError, match="is more than the"):
        data.steps_per_epoch(5, 1)
