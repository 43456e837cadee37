"""The demo data: deterministic, with disjoint seeds and captions that match the images."""

import numpy as np
import pytest

from ghibli.demo.scenes import subjects
from ghibli.demo.scenes.canvas import LOOKS
from ghibli.demo.scenes.scene import (
    EVALUATION_SEEDS,
    FINETUNE_SEEDS,
    PLACES,
    PRETRAIN_SEEDS,
    SETTINGS,
    TIMES,
    compose,
    draw,
    write_folder,
)


@pytest.mark.parametrize("look", LOOKS)
def test_the_same_seed_gives_the_same_image_to_the_byte(look):
    first = draw(compose(77), look)
    again = draw(compose(77), look)
    other = draw(compose(78), look)
    assert first.mode == "RGB" and first.size == (128, 128)
    assert first.tobytes() == again.tobytes() != other.tobytes()


def test_seed_ranges_are_disjoint():
    ranges = sorted((PRETRAIN_SEEDS, FINETUNE_SEEDS, EVALUATION_SEEDS), key=lambda seeds: seeds.start)
    for left, right in zip(ranges, ranges[1:], strict=False):
        assert left.stop <= right.start
    assert FINETUNE_SEEDS.start == 1_000_000
    assert EVALUATION_SEEDS.start == 2_000_000


def test_captions_describe_the_scene():
    for seed in range(400):
        scene = compose(seed)
        words = scene.caption.split()
        assert scene.subject in words
        colours = {word for word in words if word in subjects.COLOURS}
        if "hill" in words:
            colours.discard("green")
        assert colours <= {scene.colour, scene.train_colour}
        if scene.subject != "boat":
            start = scene.caption.split(scene.subject, 1)[1]
            assert any(phrase.format("").strip().split()[-1] in start for phrase in PLACES[scene.setting])
        for time, phrases in TIMES.items():
            if time != scene.time:
                assert not any(phrase in scene.caption for phrase in phrases)


def test_every_subject_place_time_and_colour_occurs_often():
    world = [compose(seed) for seed in range(1500)]
    for kind, values in (("subject", SETTINGS), ("setting", PLACES), ("time", TIMES)):
        for value in values:
            assert sum(getattr(scene, kind) == value for scene in world) > 60


def test_the_two_looks_differ_and_grain_is_only_on_photographs():
    scene = compose(5)
    photo, drawn = (np.asarray(draw(scene, look), dtype=float) for look in LOOKS)
    saturation = [np.ptp(image, axis=2).mean() for image in (photo, drawn)]
    assert saturation[1] > 1.3 * saturation[0]
    clean = np.asarray(draw(scene, "photo", grain=False), dtype=float)
    assert 1.5 < (photo - clean).std() < 3.5
    plain = draw(scene, "drawn", grain=False)
    assert plain.tobytes() == draw(scene, "drawn").tobytes()


def test_an_unknown_look_is_named():
    with pytest.raises(ValueError, match="photo.*drawn.*'oil'"):
        draw(compose(0), "oil")


def test_a_folder_holds_images_and_captions(tmp_path):
    seen = []
    write_folder(
        tmp_path, "drawn", 3, 1_000_000, size=64, on_progress=lambda done, count: seen.append((done, count))
    )
    lines = (tmp_path / "captions.txt").read_text().splitlines()
    assert lines[0] == f"scene_1000000.png|{compose(1_000_000).caption}"
    assert seen == [(1, 3), (2, 3), (3, 3)] and len(lines) == 3
    assert len(list((tmp_path / "images").iterdir())) == 3
    assert not list(tmp_path.glob("*.partial"))
