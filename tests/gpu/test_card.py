"""A card, measured: run `pytest -m gpu tests/gpu` where there is one; it writes benchmarks/RESULTS.md's part.

`pytest -m gpu tests/gpu --device cpu --tiny` runs the same on the demo on a CPU, and writes nothing there.
What only a card can show is asserted only there: rates, and the memory against its prediction.
"""

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from faults.compare import different_parts
from helpers.commands import REPO
from helpers.sd15_random import write_sd15
from helpers.stand_in import StandIn, stop_at

import train
from ghibli.config.schema import Config
from ghibli.models.load import load
from ghibli.models.sd15 import sd15_shapes
from ghibli.prepare.rehearsal import Prediction, predict
from ghibli.runs.compose import compose_config
from ghibli.runs.folder import RunDir
from ghibli.runtime.files import write_text
from ghibli.runtime.resources import device_name

sys.path.insert(0, str(REPO / "benchmarks"))
import steps

pytestmark = pytest.mark.gpu

RESULTS = REPO / "benchmarks" / "RESULTS.md"
BEGIN, END = "<!-- of tests/gpu: begin -->", "<!-- of tests/gpu: end -->"
PLAIN, GUIDED = 140, 70  # images a second that an H100 should train
FIRST_CARD = 6e9  # bytes in which one guided example should train
HEADER = "| batch | guidance | options | images/s | peak GiB | predicted GiB |\n|---|---|---|---|---|---|"


@dataclass
class Card:
    """What is measured, where, and the rows so far."""

    device: torch.device
    is_tiny: bool
    words: list[str]  # base and size
    batches: tuple[int, ...]
    rows: list[str] = field(default_factory=list)
    predictions: dict[str, Prediction] = field(default_factory=dict)

    @property
    def is_real(self) -> bool:
        """Whether the numbers are a card's."""
        return self.device.type == "cuda" and not self.is_tiny

    @property
    def precision(self) -> str:
        return "32-true" if self.device.type == "cpu" else "bf16-mixed"

    def predicted(self, words: list[str], batch: int, every: int = 0) -> float:
        """The bytes of tensors that a training step should take."""
        key = " ".join(words)
        if key not in self.predictions:
            like = load("demo") if self.is_tiny else sd15_shapes()
            config = compose_config([*self.words, *words])
            self.predictions[key] = predict(config, like, self.precision)
        return self.predictions[key].training[every].at(batch)


@pytest.fixture(scope="module")
def card(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Card]:
    """The card, or what stands in for it; its rows are written when all tests are done."""
    device, is_tiny = torch.device(request.config.getoption("device")), request.config.getoption("tiny")
    if device.type == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device: `--device cpu --tiny` runs the same on a CPU")
    folder = tmp_path_factory.mktemp("card")
    if is_tiny:
        words, batches = ["model=demo", "model.resolution=64"], (1, 2)
    else:
        write_sd15(folder / "base")
        words = ["model=sd15", f"model.path={folder / 'base'}", "model.resolution=512"]
        batches = (1, 4, 8, 16, 32)
    words += ["lora.rank=32", "lora.dropout=0", "lora.text_encoder=false"]
    found = Card(device, is_tiny, words, batches)
    yield found
    target = RESULTS if found.is_real else folder / "RESULTS.md"
    if not found.is_real:
        write_text(target, RESULTS.read_text())
    write_part(target, found)
    assert HEADER in target.read_text()


def write_part(file: Path, card: Card) -> None:
    """Replace what stands between the two marks of a file by the measured rows."""
    before, _, rest = file.read_text().partition(BEGIN)
    after = rest.partition(END)[2]
    title = f"{device_name(card.device)}, torch {torch.__version__}"
    part = "\n".join([BEGIN, "", title, "", HEADER, *card.rows, "", END])
    write_text(file, before + part + after)


# Speed and memory of a step


def measure(card: Card, batch: int, options: str, *words: str) -> dict[str, float]:
    """Time training steps; note a row with the predicted memory."""
    overrides = [*card.words, *words, f"trainer.precision={card.precision}"]
    dtype = steps.dtype_of(overrides) or torch.float32
    rate = steps.matmul_rate(dtype, card.device)
    found = steps.time_training(overrides, batch, 1 if card.is_tiny else 5, rate)
    every = int("compute.checkpoint_every=1" in words)
    found["predicted"] = card.predicted(list(words), batch, every)
    guidance = compose_config(overrides).loss.guidance
    card.rows.append(
        f"| {batch} | {guidance:g} | {options} | {found['images_per_second']:.1f} | {found['peak_gib']:.2f} "
        f"| {found['predicted'] / 2**30:.2f} |"
    )
    if card.is_real:
        assert found["predicted"] / 2**30 == pytest.approx(found["peak_gib"], rel=0.1)
    assert found["images_per_second"] > 0
    return found


@pytest.mark.parametrize("guidance", ["1", "7.5"])
def test_steps_of_every_batch(card: Card, guidance: str) -> None:
    found = {batch: measure(card, batch, "", f"loss.guidance={guidance}") for batch in card.batches}
    best = max(row["images_per_second"] for row in found.values())
    if card.is_real and "H100" in device_name(card.device):
        assert best >= (PLAIN if guidance == "1" else GUIDED)
    if card.is_real and guidance == "7.5":
        assert found[1]["peak_gib"] * 2**30 < FIRST_CARD


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("checkpoint every block", ["compute.checkpoint_every=1"]),
        ("channels_last", ["compute.channels_last=true"]),
        ("compile", ["compute.compile=true"]),
        ("frozen_bits=4", ["model.frozen_bits=4"]),
    ],
)
def test_steps_of_every_option(card: Card, options: str, words: list[str]) -> None:
    if options == "compile" and card.device.type == "cpu":
        pytest.skip("compiles for minutes; tests/benchmarks compiles on a CPU")
    measure(card, 2 if card.is_tiny else 4, options, "loss.guidance=7.5", *words)


# Runs


@pytest.fixture
def config(make_config: Callable[..., Config], card: Card) -> Callable[..., Config]:
    """Settings of a short run on this card."""

    def make(*words: str) -> Config:
        short = ["trainer.max_epochs=1", "sample.every_n_epochs=0", "lora.rank=4"]
        where = f"trainer.accelerator={'cpu' if card.device.type == 'cpu' else 'cuda'}"
        return make_config(*card.words, *short, where, *words)

    return make


def test_resumed_equals_undisturbed(
    config: Callable[..., Config], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = config("lora.dropout=0.1")
    whole, again = RunDir(tmp_path / "whole"), RunDir(tmp_path / "again")
    train.run(settings, whole)
    with monkeypatch.context() as patch:
        stop_at(patch, 7)
        with pytest.raises(StandIn):
            train.run(settings, again)
    train.run(settings, again, resumes=True)
    assert not different_parts(whole.path, again.path)
    repeated = RunDir(tmp_path / "repeated")
    train.run(settings, repeated)
    assert not different_parts(whole.path, repeated.path)  # the same seed twice


def test_the_scaler_of_fp16(config: Callable[..., Config], card: Card, tmp_path: Path) -> None:
    """bf16 on a CPU, which has no fp16 training."""
    precision = "bf16-mixed" if card.device.type == "cpu" else "16-mixed"
    run = RunDir(tmp_path / "run")
    train.run(config(f"trainer.precision={precision}", "optimizer.lr=1e-3"), run)
    state = torch.load(run.last_checkpoint)["state_dict"]
    assert all(weight.isfinite().all() and weight.dtype == torch.float32 for weight in state.values())
    assert any(bool(weight.abs().max() > 0) for name, weight in state.items() if "lora_B" in name)
