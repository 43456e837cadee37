"""Stable Diffusion 1.5 at its real size (random weights): loads, trains, is killed, resumes, exports.

Minutes, 12 GB of free memory, 2.1 GB of disk; run with
`pytest -m slow -s tests/end_to_end/test_real_size.py`.
"""

import resource
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from helpers.commands import REPO, run_python
from helpers.sd15_random import PARAMETERS, SCHEDULER, published, write_sd15
from safetensors.torch import load_file

from ghibli.demo.scenes.scene import FINETUNE_SEEDS, write_folder
from ghibli.diffusion.samplers import make_scheduler
from ghibli.models.load import load

pytestmark = pytest.mark.slow
ADAPTER = Path("adapter") / "pytorch_lora_weights.safetensors"


@pytest.fixture(scope="module")
def sd15(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The base's folder, deleted afterwards."""
    folder = tmp_path_factory.mktemp("sd15")
    assert write_sd15(folder) == PARAMETERS
    yield folder
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def overrides(sd15: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Two optimiser steps on two images, one held out, at 64 px."""
    root, cache = tmp_path_factory.mktemp("three_images"), tmp_path_factory.mktemp("cache")
    write_folder(root, "drawn", 3, FINETUNE_SEEDS.start)
    return [
        "model=sd15", f"model.path={sd15}", "model.resolution=64", "data=ghibli", f"data.root={root}",
        "data.val_fraction=0.01", "data.accumulate=1", "lora.rank=16", "trainer.max_epochs=1",
        "checkpoint.every_n_steps=1", "validation.items_per_image=2", "validation.price_images=2",
        f"cache_dir={cache}",
        "sample.every_n_epochs=1", "sample.num_inference_steps=1", "sample.samplers=[ddim]",
        "sample.guidance=[7.5]", "sample.prompts=[A girl standing in a greenhouse]", "wandb.mode=disabled",
    ]  # fmt: skip


def timed(what: str, *words: str) -> subprocess.CompletedProcess[str]:
    """Runs Python with the words, prints wall time and the peak memory of all child processes so far."""
    start = time.monotonic()
    done = run_python(*words, timeout=1800)
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20  # KiB on Linux
    print(f"\n{what}: {time.monotonic() - start:.0f} s, peak {peak:.1f} GiB", flush=True)
    return done


@pytest.fixture(scope="module")
def undisturbed(overrides: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of a whole run."""
    folder = tmp_path_factory.mktemp("undisturbed")
    done = timed("whole run", str(REPO / "train.py"), *overrides, f"hydra.run.dir={folder}")
    assert done.returncode == 0, done.stderr
    return folder


def test_every_published_weight_arrives(sd15: Path) -> None:
    """Under its old name in the file, in fp32 in the model: no layer is left at a random start."""
    base = load(str(sd15))
    assert len(base.tokenizer) == base.text_encoder.config.vocab_size == 49408
    assert base.scheduler_config == SCHEDULER
    assert base.prediction_type == "epsilon"
    assert make_scheduler("ddim", base).config.beta_schedule == "scaled_linear"
    ids = base.tokenize(["A girl standing in a greenhouse", ""])
    assert ids.shape == (2, 77)
    assert ids[1].tolist() == [49406] + 76 * [49407]
    files = {"unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model", "text_encoder": "model"}
    for name, file in files.items():
        stored = load_file(sd15 / name / f"{file}.safetensors")
        for key, value in getattr(base, name).named_parameters():
            assert value.dtype == torch.float32
            assert torch.equal(value, stored[published(name, key)].float()), f"{name}.{key}"


def test_a_checkpoint_is_small_and_holds_no_frozen_weights(undisturbed: Path) -> None:
    """32 attentions of the UNet and 12 of the text encoder, 4 layers each, A and B."""
    file = undisturbed / "checkpoints" / "last.ckpt"
    content = torch.load(file, weights_only=True)
    print(f"\ncheckpoint: {file.stat().st_size / 1e6:.1f} MB")
    assert file.stat().st_size < 60e6
    assert content["global_step"] == 2
    names = set(content["state_dict"])
    assert len(names) == 2 * 4 * (32 + 12)
    assert all(".lora_" in name for name in names)
    assert all((value != 0).any() for value in content["state_dict"].values()), "every layer is trained"


def test_killed_and_resumed_equals_the_whole_run(
    undisturbed: Path, overrides: list[str], tmp_path: Path
) -> None:
    """SIGKILL in the second of two optimiser steps."""
    words = ["training_step", "2", *overrides, f"hydra.run.dir={tmp_path}"]
    killed = timed("killed run", str(REPO / "tests" / "helpers" / "killed.py"), *words)
    assert killed.returncode == -9, killed.stderr
    assert not (tmp_path / ADAPTER).exists()
    done = timed("resumed run", str(REPO / "train.py"), f"resume={tmp_path}")
    assert done.returncode == 0, done.stderr
    left, right = (
        torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)
        for folder in (undisturbed, tmp_path)
    )
    assert left["global_step"] == right["global_step"] == 2
    for name, value in left["state_dict"].items():
        assert torch.equal(value, right["state_dict"][name]), name
    for i, state in left["optimizer_states"][0]["state"].items():
        for key in ("exp_avg", "exp_avg_sq"):
            assert torch.equal(state[key], right["optimizer_states"][0]["state"][i][key]), (i, key)
    assert (undisturbed / ADAPTER).read_bytes() == (tmp_path / ADAPTER).read_bytes()
    grids = sorted(path.name for path in (undisturbed / "samples").iterdir())
    assert grids
    for name in grids:
        assert (undisturbed / "samples" / name).read_bytes() == (tmp_path / "samples" / name).read_bytes()


STOCK = """
import sys
import torch
from diffusers import StableDiffusionPipeline

options = {"torch_dtype": torch.float16, "safety_checker": None}
pipeline = StableDiffusionPipeline.from_pretrained(sys.argv[1], **options)
pipeline.load_lora_weights(sys.argv[2])
for part in (pipeline.unet, pipeline.text_encoder):
    layers = [m for m in part.modules() if hasattr(m, "lora_A")]
    scales = {s for m in layers for s in m.scaling.values()}
    print(len(layers), scales, all((w.weight != 0).any() for m in layers for w in m.lora_B.values()))
assert "ghibli" not in sys.modules
"""


def test_the_adapter_loads_in_a_stock_pipeline(sd15: Path, undisturbed: Path, tmp_path: Path) -> None:
    script = tmp_path / "stock.py"
    script.write_text(STOCK)
    done = timed("stock pipeline", str(script), str(sd15), str((undisturbed / ADAPTER).parent))
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n")[:2] == ["128 {1.0} True", "48 {1.0} True"]  # alpha / rank is in B
