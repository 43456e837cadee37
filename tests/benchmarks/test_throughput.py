"""Every option of benchmarks/throughput.py runs, on the demo at its smallest."""

import json
import sys
from pathlib import Path

import pytest
from helpers.commands import REPO, SMALL, run_python

sys.path.insert(0, str(REPO / "benchmarks"))
import throughput

ONE_STEP = ("--batch", "1", "--guidance", "7.5", "--repeats", "1")
SHORT = ("lora.text_encoder=false", "model.resolution=64", "trainer.max_epochs=1", "sample.every_n_epochs=0")


def measured(words: tuple[str, ...], out: Path, without: tuple[str, ...] = ()) -> dict:
    """What `throughput.py WORDS` measures, in this process; `without` some of its options."""
    options = {name: more for name, more in throughput.OPTIONS.items() if name not in without}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(throughput, "OPTIONS", options)
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


@pytest.mark.slow
def test_options_in_pairs(tmp_path: Path) -> None:
    words = (
        *SHORT,
        "--what",
        "pairs",
        "--batch",
        "1",
        "--guidance",
        "1",
        "--repeats",
        "2",
        "--options",
        "all",
    )
    rows = measured(words, tmp_path / "out.json", without=("compile", "compile, channels_last"))["pairs"]
    assert [row["options"] for row in rows] == ["channels_last", "checkpoint every block", "bf16"]
    assert all(0 < row["low"] <= row["value"] <= row["high"] for row in rows)


@pytest.mark.slow
def test_making_batches_ahead_hides_them(tmp_path: Path) -> None:
    """At 512 px a step of 5 ms with them takes less than both in turn."""
    words = (
        "model=demo",
        "data=demo",
        "model.resolution=512",
        "--what",
        "loading",
        "--batch",
        "4",
        "--repeats",
        "60",
    )
    found = measured(words, tmp_path / "out.json")["loading"]
    assert found["device"] <= found["step"] < found["device"] + 0.7 * found["batch"]


@pytest.mark.slow
def test_memory_is_as_predicted(images: Path) -> None:
    """In a process of its own, as the kernel counts the peak of the process that starts one as its own."""
    words = [*SMALL, f"data.root={images}", "data.draw=null", "sample.every_n_epochs=0"]
    done = run_python(str(REPO / "benchmarks" / "memory.py"), *words)
    row = done.stdout.splitlines()[-1]
    predicted, measured = (int(cell) for cell in row.split("|")[2:4])
    assert predicted == pytest.approx(measured, rel=0.15), row
