"""Style, Inception and CLIP features: on real changes of an image, and against torch-fidelity."""

import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch_fidelity import calculate_metrics, feature_extractor_inceptionv3
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

from ghibli.demo.scenes.scene import EVALUATION_SEEDS, compose, draw
from ghibli.evaluation import distances, features, statistics
from ghibli.evaluation.features import FeatureExtractor
from ghibli.models.base import BaseModel, part_hash
from ghibli.runtime.errors import UserError


def drawn(count: int, first: int = EVALUATION_SEEDS.start, look: str = "drawn") -> torch.Tensor:
    """(count, 3, 128, 128) in 0 .. 1."""
    images = [np.array(draw(compose(first + i), look)) for i in range(count)]
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 255


def style_of(base: BaseModel, images: torch.Tensor) -> torch.Tensor:
    return features.extract_in_batches(lambda batch: features.style_features(base.vae, batch), images)


def test_same_set_is_zero_and_two_halves_of_one_set_are_near_it(base: BaseModel) -> None:
    rows = style_of(base, drawn(80))
    rows = features.standardised(rows, rows)
    assert distances.frechet_distance(rows, rows) == pytest.approx(0, abs=1e-6)
    halves = distances.kernel_distance(rows[:40], rows[40:])
    assert halves.low < 0 < halves.high
    assert distances.precision_recall(rows, rows) == (1.0, 1.0)


def test_few_reference_images_leave_the_distance_unbiased() -> None:
    """Real against real is 0 on average in the units of the training images, at 5 reference images too.

    In the reference's own units, which are chance, it is far above 0: means over 200 repeats of 30 images.
    """
    draws = torch.Generator().manual_seed(0)
    shape = torch.randn(12, 12, generator=draws, dtype=torch.float64)

    def rows(count: int) -> torch.Tensor:
        return torch.randn(count, 12, generator=draws, dtype=torch.float64) @ shape

    training, values = rows(200), []
    for _ in range(200):
        own, others = rows(5), rows(30)
        sets = [features.ReferenceSet(own, units) for units in (training, own)]
        values.append([one.kernel(others, drawn=False).value for one in sets])
    found = torch.tensor(values)
    mean, error = found.mean(0), found.std(0) / 200**0.5
    assert abs(mean[0]) < 3 * error[0]
    assert mean[1] > 3 * error[1] and mean[1] > 10 * abs(mean[0])


@pytest.mark.slow
def test_the_layout_is_seen_by_one_measure_and_not_by_the_other(base: BaseModel) -> None:
    """Upside down or with their quarters shuffled, images keep their style, and their layout is far off."""
    images, first = drawn(40), EVALUATION_SEEDS.start
    quarters = torch.cat([images[..., 64:, :], images[..., :64, :]], dim=2)
    quarters = torch.cat([quarters[..., 64:], quarters[..., :64]], dim=3)
    sets = {"real": images, "upside down": images.flip(-2), "quarters": quarters}
    others = [drawn(40, first + 1000), drawn(40, first + 2000)]  # the reference, and what gives the units
    far = {}
    for measure in (features.style_features, features.layout_features):

        def rows(part: torch.Tensor, measure: Callable = measure) -> torch.Tensor:
            return features.extract_in_batches(lambda batch: measure(base.vae, batch), part)

        reference = features.ReferenceSet(*map(rows, others))
        for name, part in sets.items():
            found = reference.kernel(rows(part), drawn=False)
            far[measure.__name__, name] = found.value / found.standard_error
    assert all(abs(far["style_features", name]) < 4 for name in sets), far
    assert abs(far["layout_features", "real"]) < 3, far
    assert far["layout_features", "upside down"] > 6 and far["layout_features", "quarters"] > 4, far


@pytest.mark.slow
def test_distances_grow_with_noise_blur_and_the_other_look(base: BaseModel) -> None:
    images, reference = drawn(24), style_of(base, drawn(40, EVALUATION_SEEDS.start + 100))
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    blurred = [images]
    for size in (5, 9):
        blurred.append(torch.nn.functional.avg_pool2d(images, size, 1, size // 2, count_include_pad=False))
    noisy = [images] + [(images + s * noise).clamp(0, 1) for s in (0.15, 0.3)]
    looks = [images, (images + drawn(24, look="photo")) / 2, drawn(24, look="photo")]
    reference = features.standardised(own := reference, reference)
    for steps in (blurred, noisy, looks):
        rows = [features.standardised(style_of(base, step), own) for step in steps]
        values = [distances.kernel_distance(row, reference).value for row in rows]
        assert values == sorted(values) and values[-1] > 10 * abs(values[0])
        frechet = [distances.frechet_distance(row, reference) for row in rows]
        assert frechet == sorted(frechet)


def test_features_do_not_depend_on_the_batch(base: BaseModel) -> None:
    images = drawn(features.BATCH + 3)
    together, alone = style_of(base, images), style_of(base, images[-1:])
    assert torch.allclose(together[-1:], alone, rtol=1e-4, atol=1e-5)
    assert together.shape == (len(images), 2 * (16 + 16 + 32 + 96))


@pytest.fixture(scope="module")
def inception_file(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A file with the FID network's layers and random weights, as tests have no internet access."""
    torch.manual_seed(0)
    network = FeatureExtractorInceptionV3.__new__(FeatureExtractorInceptionV3)

    def no_download(*_: object, **__: object) -> None:
        raise ConnectionError

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(feature_extractor_inceptionv3, "load_state_dict_from_url", no_download)
        with pytest.raises(ConnectionError):  # all layers are made before it asks for weights
            network.__init__("inception", ["2048"])
    file = tmp_path_factory.mktemp("inception") / "random.pth"
    torch.save(network.state_dict(), file)
    return str(file)


def test_a_missing_or_wrong_inception_file_is_one_line(tmp_path) -> None:
    with pytest.raises(UserError, match=r"evaluate\.inception=.*no such file"):
        features.load_inception(str(tmp_path / "gone.pth"))
    wrong = tmp_path / "wrong.pth"
    torch.save({"fc.weight": torch.zeros(3)}, wrong)
    with pytest.raises(UserError, match="does not hold the FID network's weights"):
        features.load_inception(str(wrong))


@pytest.mark.parametrize("content", [b"", b"no weights", b"PK\x03\x04", pickle.dumps(["no", "weights"])])
def test_a_file_without_weights_is_one_line(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "odd.pth").write_bytes(content)
    with pytest.raises(UserError, match="does not hold the FID network's weights"):
        features.load_inception(str(tmp_path / "odd.pth"))


def test_code_in_a_file_of_weights_is_not_run(tmp_path: Path) -> None:
    class Hidden:
        def __reduce__(self) -> tuple:
            return Path.touch, (tmp_path / "it ran",)

    torch.save({"fc.weight": Hidden()}, tmp_path / "evil.pth")
    with pytest.raises(UserError, match="does not hold the FID network's weights"):
        features.load_inception(str(tmp_path / "evil.pth"))
    assert not (tmp_path / "it ran").exists()


def levels_of(images: torch.Tensor) -> torch.Tensor:
    return (images * 255).round().to(torch.uint8)


def by_hand(images: torch.Tensor) -> torch.Tensor:
    """The input of the FID network's first layer for 128 px images: (N, 3, 299, 299) float64.

    8 bits, bilinear to 299 px as in TensorFlow 1 (corner pixels at 0), (x - 128) / 128.
    """
    levels = levels_of(images).double().numpy()
    at = np.arange(299) * 128 / 299
    low, share = at.astype(int), at - at.astype(int)
    high = np.minimum(low + 1, 127)
    rows = levels[:, :, low] * (1 - share)[:, None] + levels[:, :, high] * share[:, None]
    resized = rows[..., low] * (1 - share) + rows[..., high] * share
    return (torch.from_numpy(resized) - 128) / 128


def features_by_hand(network: FeatureExtractorInceptionV3, images: torch.Tensor) -> torch.Tensor:
    """The network's features of images that were preprocessed by hand."""
    wanted = by_hand(images).float()
    handle = network.Conv2d_1a_3x3.register_forward_pre_hook(lambda *_: (wanted,))
    with torch.no_grad():
        rows = network(levels_of(images))[0].double()
    handle.remove()
    return rows


@pytest.mark.slow
def test_fid_is_torch_fidelitys_and_that_of_preprocessing_by_hand(inception_file: str) -> None:
    """The code path of the real weights, and our own float64 sum over features computed by hand."""

    class Levels(torch.utils.data.Dataset):
        def __init__(self, images: torch.Tensor):
            self.levels = levels_of(images)

        def __len__(self) -> int:
            return len(self.levels)

        def __getitem__(self, index: int) -> torch.Tensor:
            return self.levels[index]

    sets = drawn(8), drawn(8, look="photo")
    network = features.load_inception(inception_file)
    rows = [features.extract_in_batches(lambda b: features.inception_features(network, b), s) for s in sets]
    wanted = calculate_metrics(
        input1=Levels(sets[0]), input2=Levels(sets[1]), fid=True, cuda=False, verbose=False,
        feature_extractor_weights_path=inception_file, cache=False,
    )["frechet_inception_distance"]  # fmt: skip
    assert distances.frechet_distance(*rows) == pytest.approx(wanted, rel=1e-3)
    made = [features_by_hand(network, images) for images in sets]
    assert distances.frechet_distance(*made) == pytest.approx(wanted, rel=1e-3)


def test_inception_preprocessing_is_the_one_by_hand(inception_file: str) -> None:
    network, images = features.load_inception(inception_file), drawn(2)
    seen = []
    handle = network.Conv2d_1a_3x3.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    features.inception_features(network, images)
    handle.remove()
    assert torch.allclose(seen[0].double(), by_hand(images), atol=1e-4)


def test_caption_fit_falls_when_captions_are_shuffled(base: BaseModel, make_config: Callable) -> None:
    """And the networks that measure are identified by their weights, not by their path."""
    extractor = FeatureExtractor(make_config(), base)
    captions = [compose(EVALUATION_SEEDS.start + i).caption for i in range(24)]
    right, wrong = (
        statistics.mean_of(extractor.measure(drawn(24), words)["caption_fit"])
        for words in (captions, captions[7:] + captions[:7])
    )
    assert wrong.high < right.low
    assert extractor.hashes["clip"] == part_hash(extractor.clip[0])
