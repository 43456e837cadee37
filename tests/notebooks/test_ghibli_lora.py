"""The notebook: it is its Python file; on the demo from top to bottom, with a kernel killed in mid-run."""

import base64
import json
import shutil
import threading
import time
import zipfile
from io import BytesIO
from pathlib import Path

import numpy as np
import psutil
import pytest
from faults.compare import different_parts, image, rows_of
from helpers.commands import REPO, run_python
from PIL import Image
from safetensors.torch import load_file
from typer.testing import CliRunner

from ghibli.cli.main import app
from ghibli.demo.scenes.scene import FINETUNE_SEEDS, write_folder
from ghibli.runs.compose import compose_config

jupytext = pytest.importorskip("jupytext")
nbclient = pytest.importorskip("nbclient")
pytest.importorskip("ipykernel")

FOLDER = REPO / "notebooks"
SHRUNK = [
    "model.resolution=64", "data.draw.count=48", "data.batch_size=1", "data.accumulate=2",
    "trainer.max_epochs=2", "checkpoint.every_n_steps=3", "sample.num_inference_steps=2",
    "validation.items_per_image=2", "threads=1",
]  # fmt: skip


def source_and_kind(notebook: dict) -> list[tuple[str, str]]:
    return [(cell["cell_type"], cell["source"]) for cell in notebook["cells"]]


def test_the_notebook_is_its_python_file() -> None:
    """By jupytext, which made it: `make notebook` writes it again. It holds no results."""
    made = jupytext.read(FOLDER / "ghibli_lora.py")
    stored = jupytext.read(FOLDER / "ghibli_lora.ipynb")
    assert source_and_kind(stored) == source_and_kind(made), "make notebook"
    assert not [cell for cell in stored["cells"] if cell.get("outputs") or cell.get("execution_count")]


def notebook_for(folder: Path) -> dict:
    """The notebook with its cell of parameters filled in, as a user would."""
    notebook = jupytext.read(FOLDER / "ghibli_lora.ipynb")
    (cell,) = [one for one in notebook["cells"] if "parameters" in one["metadata"].get("tags", [])]
    cell["source"] += f"\nFOLDER = {str(folder)!r}\nDEMO = True\nEXTRA = {SHRUNK!r}\n"
    return notebook


@pytest.mark.slow
def test_the_kaggle_set_is_prepared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its layout has no captions; the demo stands in for Stable Diffusion 1.5."""
    write_folder(tmp_path / "ten", "drawn", 10, FINETUNE_SEEDS.start)
    shutil.copytree(tmp_path / "ten" / "images", tmp_path / "kaggle" / "dataset" / "trainB_ghibli")
    shutil.copytree(REPO / "conf", tmp_path / "conf", ignore=shutil.ignore_patterns("local"))
    monkeypatch.chdir(tmp_path)
    cells = {cell["source"] for cell in jupytext.read(FOLDER / "ghibli_lora.ipynb")["cells"]}
    (parameters,) = [cell for cell in cells if cell.startswith("REPOSITORY")]
    (cell,) = [cell for cell in cells if cell.startswith("if DEMO:")]
    done: list[tuple] = []
    scope = {"do": lambda *words: done.append(words), "CACHE": "cache", "Path": Path}
    exec(f"{parameters}\nDEMO = False\n{cell}", scope)
    ((_, program, *words),) = done
    assert program == "ghibli"
    words = [str(tmp_path / "kaggle") if word == "kaggle" else word for word in words]
    result = CliRunner().invoke(app, [*words, "--base", "demo"])
    assert result.exit_code == 0, result.output
    assert "dataset/trainB_ghibli/ without captions; 10 usable" in result.output
    assert compose_config(scope["SETTINGS"]).compute.checkpoint_every == 0


def execute(notebook: dict) -> None:
    nbclient.NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(FOLDER)}}).execute()


def kill_when(file: Path, done: threading.Event) -> None:
    """Kill every process below this one as soon as the file is there, like a machine that is switched off."""
    while not (file.exists() or done.is_set()):
        time.sleep(0.02)
    for process in psutil.Process().children(recursive=True):
        words = process.cmdline()
        if "ipykernel_launcher" in words or any(str(file.parents[1]) in word for word in words):
            process.kill()


@pytest.mark.slow
def test_it_runs_from_top_to_bottom_after_its_kernel_was_killed(tmp_path: Path) -> None:
    kept, plain = tmp_path / "kept", tmp_path / "plain"
    run, done = kept / "run", threading.Event()
    killer = threading.Thread(target=kill_when, args=[run / "checkpoints" / "last.ckpt", done])
    killer.start()
    try:
        with pytest.raises(nbclient.exceptions.DeadKernelError):
            execute(notebook_for(kept))
    finally:
        done.set()
        killer.join()
    assert json.loads((run / "status.json").read_text())["state"] == "running"  # nobody noted its end

    notebook = notebook_for(kept)
    execute(notebook)
    reference = run_python(
        "train.py", "model=demo", "data=demo", *SHRUNK, "logger=none", f"cache_dir={tmp_path / 'cache'}",
        f"hydra.run.dir={plain}",
    )  # fmt: skip
    assert reference.returncode == 0, reference.stderr
    assert different_parts(plain, run) == []
    assert len(json.loads((run / "status.json").read_text())["starts"]) == 2

    shown = [output for cell in notebook["cells"] for output in cell.get("outputs", [])]
    texts = "".join(output.get("text", "") for output in shown)
    assert "resuming from step" in texts
    images = [output["data"]["image/png"] for output in shown if "image/png" in output.get("data", {})]
    grid = np.asarray(Image.open(BytesIO(base64.b64decode(images[-1]))).convert("RGB"))
    assert len(images) == 2 and np.array_equal(grid, image(run / "samples" / "adapter.png"))
    (table,) = [output["data"]["text/html"] for output in shown if "text/html" in output.get("data", {})]
    assert all(f"{float(row['probe/val_gain']):.6f}" in table for row in rows_of(run / "probe.csv"))
    with zipfile.ZipFile(kept / "adapter.zip") as packed:
        packed.extractall(tmp_path / "unpacked")
    name = "pytorch_lora_weights.safetensors"
    ours, trained = load_file(tmp_path / "unpacked" / name), load_file(run / "adapter" / name)
    assert ours.keys() == trained.keys() and all(bool((ours[key] == trained[key]).all()) for key in trained)
    assert np.array_equal(image(tmp_path / "unpacked" / "grid.png"), grid)
