"""What fits on a card: the words to type, from one prediction; and sizes that are none."""

from collections.abc import Callable

import pytest

from ghibli.config.schema import Config
from ghibli.models.base import BaseModel
from ghibli.prepare import cards
from ghibli.prepare.cards import GB, card_size, choose, largest_batch, nothing_fits
from ghibli.prepare.rehearsal import CUDA_CONTEXT, RESERVED, Line, Prediction
from ghibli.runtime.errors import UserError


def prediction(weights: float = 2 * GB) -> Prediction:
    """1 GB for each example without checkpointing, a quarter with it; 3 GB to encode."""
    training = {0: Line(weights + GB, GB), 1: Line(weights + GB / 4, GB / 4)}
    return Prediction(weights, training, {"encoding the images": 3.0 * GB})


@pytest.mark.parametrize(
    ("text", "size"), [("8GB", 8), ("8", 8), ("7.5 GiB", 7.5), ("24gb", 24), (" 80G ", 80)]
)
def test_sizes_are_read(text: str, size: float) -> None:
    assert card_size(text) == size * GB


@pytest.mark.parametrize("text", ["big", "0", "-8GB", "8MB", "nan", "inf", "8,5", "", "RTX 3060"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(UserError, match="is no size of a card's memory: give it as 8GB"):
        card_size(text)


def test_a_phase_takes_its_tensors_and_what_cuda_takes() -> None:
    phases = prediction().phases(1, 5)
    assert phases == {
        "training": CUDA_CONTEXT + RESERVED * (2 + 5 / 4) * GB,
        "encoding the images": CUDA_CONTEXT + RESERVED * 3 * GB,
    }
    assert prediction().peak(0, 4) == CUDA_CONTEXT + RESERVED * 6 * GB


@pytest.mark.parametrize(
    ("size", "every", "batch"), [(3.5, 0, None), (4, 0, 1), (8, 0, 4), (8, 1, 16), (12, 1, 32), (80, 0, 32)]
)
def test_the_largest_batch_that_fits(
    make_config: Callable[..., Config], size: float, every: int, batch: int | None
) -> None:
    found = largest_batch(prediction(), make_config(), size * GB, every, None)
    assert (found and found.batch_size) == batch
    if found is not None:
        assert found.size <= cards.FREE * size * GB


def test_the_words_keep_the_examples_of_a_step(make_config: Callable[..., Config]) -> None:
    config = make_config("data.batch_size=4", "data.accumulate=4")
    found = largest_batch(prediction(), config, 8 * GB, 0, None)
    assert found is not None and found.words == "data.batch_size=4 data.accumulate=4"
    found = largest_batch(prediction(), config, 8 * GB, 1, 4)
    assert found is not None
    assert found.words == (
        "data.batch_size=16 data.accumulate=1 compute.checkpoint_every=1 model.frozen_bits=4"
    )


def test_4_bits_are_asked_for_only_where_nothing_else_fits(
    make_config: Callable[..., Config], base: BaseModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def predict(config: Config, *_: object) -> Prediction:
        found = prediction(2 * GB if config.model.frozen_bits is None else GB)
        return Prediction(found.weights, found.training, {"encoding the images": GB})

    monkeypatch.setattr(cards, "predict", predict)
    config = make_config()
    assert [choice.frozen_bits for choice in choose(config, base, "bf16-mixed", 8 * GB)] == [None, None]
    assert [choice.frozen_bits for choice in choose(config, base, "bf16-mixed", 2.5 * GB)] == [4]
    assert choose(config, base, "bf16-mixed", 1.5 * GB) == []
    text = nothing_fits(config, base, "bf16-mixed", 1.5 * GB)
    assert text.startswith(
        "no settings fit: one example with gradient checkpointing takes 2.8 GB at its peak"
    )
    assert f"training, of 1.5; lower model.resolution (it is {config.model.resolution})" in text
