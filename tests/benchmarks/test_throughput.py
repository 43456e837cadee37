"""Every option of benchmarks/throughput.py runs, on the demo at its smallest."""

import json
import sys
from pathlib import Path

import pytest
from helpers.commands import REPO, SMALL

sys.path.insert(0, str(REPO / "benchmarks"))
import throughput

ONE_STEP = ("--batch", "1", "--guidance", "7.5", "--repeats", "1")
SHORT = ("lora.text_encoder=false", "model.resolution=64", "trainer.max_epochs=1", "sample.every_n_epochs=0")


def measured(words: tuple[str, ...], out: Path) -> dict:
    """What `throughput.py WORDS` measures, in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["throughput.py", *words, "--json", str(out)])
        patch.chdir(REPO)
        throughput.main()
    return json.loads(out.read_text())


@pytest.mark.slow
@pytest.mark.parametrize("option", ["as it is", "channels_last", "checkpoint every block", "bf16"])
def test_each_option_trains(option: str, tmp_path: Path) -> None:
    words = (*SHORT, "--what", "training", *ONE_STEP, "--options", option)
    (row,) = measured(words, tmp_path / "out.json")["training"]
    assert row["images_per_second"] > 0 and row["of_matmul_rate"] > 0
    assert row["precision"] == ("bfloat16" if option == "bf16" else "float32")


@pytest.mark.slow
@pytest.mark.parametrize("option", ["compile", "compile, channels_last"])
def test_compiling_too(option: str, tmp_path: Path) -> None:
    words = (*SHORT, "--what", "training", *ONE_STEP, "--options", option)
    assert measured(words, tmp_path / "out.json")["training"][0]["images_per_second"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_encoding_and_sampling(precision: str, tmp_path: Path) -> None:
    words = (*SHORT, f"trainer.precision={precision}", "--what", "encoding", "sampling", "--batch", "1")
    found = measured(words, tmp_path / "out.json")
    assert found["encoding"]["image"] > 0 and found["sampling"]["images_per_second"] > 0


@pytest.mark.slow
def test_the_overhead(images: Path, tmp_path: Path) -> None:
    words = (*SMALL, *SHORT, f"data.root={images}", "data.draw=null", "--what", "overhead")
    assert measured(words, tmp_path / "out.json")["overhead"]["ratio"] > 0.5
