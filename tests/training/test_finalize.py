"""The last lines of a run: commands with its name, and a gain below 0 that explains itself."""

from collections.abc import Callable
from pathlib import Path

import pytest
import scipy.stats

from ghibli.config.schema import Config
from ghibli.evaluation.gain import Gain
from ghibli.training.finalize import closing_lines, gain_of


@pytest.mark.parametrize(
    ("words", "gain", "said", "unsaid"),
    [
        ((), 0.12, "ghibli generate 'a run' --prompt 'a red train'", "below 0"),
        ((), -0.02, "lower optimizer.lr", "ghibli generate"),
        (("loss.guidance=7.5",), -0.904, "it started at -4300 %, not at 0", "lower optimizer.lr"),
        (("finetune=none",), 0.0, "next     python train.py", "ghibli report"),
    ],
)
def test_the_last_lines(
    make_config: Callable[..., Config], words: tuple[str, ...], gain: float, said: str, unsaid: str
) -> None:
    config = make_config(*words)
    text = "\n".join(closing_lines(config, Path("a run").absolute(), Gain(gain, 0.01), -43.0))
    assert said in text and unsaid not in text
    assert config.finetune == "none" or "next     ghibli report 'a run'" in text


def test_the_gain_has_the_interval_of_its_held_out_images() -> None:
    """Student's of images - 1 degrees of freedom, by scipy; the normal one for rows without their number."""
    row = {"probe/val_gain": 0.2, "probe/val_gain_se": 0.05, "probe/val_images": 4}
    low, high = scipy.stats.t.interval(0.95, 3, loc=0.2, scale=0.05)
    assert (gain_of(row).low, gain_of(row).high) == pytest.approx((low, high), rel=1e-12)
    del row["probe/val_images"]
    low, high = scipy.stats.norm.interval(0.95, loc=0.2, scale=0.05)
    assert (gain_of(row).low, gain_of(row).high) == pytest.approx((low, high), rel=1e-12)
