"""Adapters for other programs: verified after export, and no file of the user replaced."""

import gc
import json
import re
import shutil
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from helpers.commands import QUICK, run_python
from safetensors.torch import load_file

import train
from ghibli.adapters import apply
from ghibli.adapters.files import read_adapter
from ghibli.adapters.trained import trained_base
from ghibli.config.paths import ADAPTER_FILE, DEMO
from ghibli.config.schema import ModelConfig
from ghibli.inference import export, owned
from ghibli.inference.export import check_prediction
from ghibli.inference.generate import generate_images
from ghibli.inference.load import load_model
from ghibli.inference.request import ImageRequest
from ghibli.models.base import BaseModel, configs_hash
from ghibli.models.load import load
from ghibli.runs.folder import RunDir
from ghibli.runs.settings import finished_config
from ghibli.runtime.errors import UserError

# Files for others


PLAIN_DIFFUSERS = """
import sys
import numpy as np, torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
base, prompt, *files = sys.argv[1:]
pipeline = StableDiffusionPipeline.from_pretrained(base, safety_checker=None)
pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, clip_sample=False,
                                               set_alpha_to_one=False, steps_offset=1)
for number, file in enumerate(files):
    pipeline.load_lora_weights(file.rpartition("/")[0], weight_name=file.rpartition("/")[2])
    pipeline.unet.eval(); pipeline.text_encoder.eval()
    images = pipeline(prompt, height=64, width=64, num_inference_steps=4, guidance_scale=7.5,
                      output_type="np", generator=torch.Generator().manual_seed(3)).images
    np.save(f"{number}.npy", (images[0] * 255).round())
    pipeline.unload_lora_weights()
assert not [name for name in sys.modules if name.split(".")[0] == "ghibli"]
"""


@pytest.mark.slow
def test_a_process_that_knows_only_diffusers_draws_the_same(
    exported: tuple[Path, list], run: RunDir, tmp_path: Path
) -> None:
    prompt = "a red train by a lake, Studio Ghibli style"
    (tmp_path / "plain.py").write_text(PLAIN_DIFFUSERS)
    files = [
        str(exported[0] / name) for name in ("pytorch_lora_weights.safetensors", "run_kohya.safetensors")
    ]
    done = run_python(str(tmp_path / "plain.py"), str(DEMO), prompt, *files, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    loaded = load_model([str(run.path)], [])
    request = ImageRequest([prompt], "ddim", 7.5, 4, 3, (64, 64))
    ours, base = (
        (generate_images(loaded, replace(request, scale=scale))[0].permute(1, 2, 0).numpy() * 255).round()
        for scale in (1, 0)
    )
    for number in range(2):
        theirs = np.load(tmp_path / f"{number}.npy")
        assert (abs(ours - theirs) > 1).mean() <= 0.001
        assert (abs(base - theirs) > 1).mean() > 0.2


def test_every_file_is_verified(exported: tuple[Path, list[export.Check]]) -> None:
    folder, checks = exported
    assert [check.file.name for check in checks] == [
        "pytorch_lora_weights.safetensors", "run_kohya.safetensors", "merged", "run_merged.safetensors",
    ]  # fmt: skip
    assert all(check.from_live < 1e-5 < 1e-2 < check.from_base for check in checks)
    merged = StableDiffusionPipeline.from_pretrained(folder / "merged", safety_checker=None)
    assert type(merged.scheduler).__name__ == load("demo").scheduler_config["_class_name"]


def test_a_file_that_does_not_do_the_same_is_refused(tmp_path: Path) -> None:
    live, base = torch.ones(3), torch.zeros(3)
    assert check_prediction(tmp_path, live + 1e-6, live, base).from_base == pytest.approx(1, abs=1e-5)
    with pytest.raises(UserError, match="does not reproduce the trained model"):
        check_prediction(tmp_path, live + 0.01, live, base)
    with pytest.raises(UserError, match="changes nothing"):
        check_prediction(tmp_path, live, live, live)


def test_the_card_says_how_good_and_whose(exported: tuple[Path, list], run: RunDir) -> None:
    card = (exported[0] / "README.md").read_text()
    status = run.status.read()
    assert "`kohya.safetensors`" in (run.adapter / "README.md").read_text()
    assert f"{100 * status['gain']:.1f} % +- {100 * status['gain_se']:.1f} %" in card
    for words in ("Studio Ghibli's", "OpenRAIL-M", "rank 4, alpha 6", status["data_hash"][:12], "kohya"):
        assert words in card


def test_trigger_words_lie_beside_each_kohya_file(exported: tuple[Path, list], run: RunDir) -> None:
    for file in (exported[0] / "run_kohya.json", run.adapter / "kohya.json"):
        assert json.loads(file.read_text())["activation text"] == "Studio Ghibli style"


def test_the_runs_own_kohya_file(run: RunDir, base: BaseModel) -> None:
    """Written at the end of every run, without a date: the same run gives the same bytes."""
    ours = read_adapter(run.adapter / "kohya.safetensors", base, "x")
    theirs = read_adapter(run.adapter, base, "x")
    assert (ours.layout, theirs.layout) == ("kohya", "diffusers")
    assert (ours.ranks, ours.alphas) == (theirs.ranks, theirs.alphas) == ([4], [4.0])  # 6 / 4 is in B
    assert ours.metadata["ss_network_dim"] == "4" and ours.metadata["ss_network_alpha"] == "4"
    assert ours.metadata["modelspec.trigger_phrase"] == "Studio Ghibli style"
    assert ours.metadata["ss_dataset_hash"] == run.status.read()["data_hash"]
    assert "modelspec.date" not in ours.metadata
    for name, layer in theirs.layers.items():
        assert torch.equal(layer.up, ours.layers[name].up) and torch.equal(layer.down, ours.layers[name].down)


@pytest.mark.slow
def test_a_run_ends_well_with_an_alpha_that_no_float_is(
    make_config: Callable, few: tuple[str, ...], tmp_path: Path
) -> None:
    """The kohya file stores alpha as float32; rslora's is alpha times the root of the rank."""
    run = RunDir(tmp_path / "run")
    words = ("trainer.max_epochs=1", "lora.rank=2", "lora.alpha=0.1", "lora.variant=rslora")
    train.run(make_config(*few, *words), run)
    assert run.status.state == "finished" and (run.adapter / "kohya.safetensors").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["loha", "lokr", "oft"])
def test_every_other_kind_is_exported(
    variant: str, make_config: Callable, few: tuple[str, ...], tmp_path: Path
) -> None:
    """Both files are the trained model, with convolutions for all but oft."""
    run = RunDir(tmp_path / variant)
    targets = "lora.targets=attention" if variant == "oft" else "lora.targets=[to_k,conv1]"
    train.run(make_config(*QUICK, *few, f"lora.variant={variant}", targets, "optimizer.lr=5e-2"), run)
    assert (run.adapter / "kohya.safetensors").exists() == (variant != "oft")
    checks = export.export(run, finished_config(run), tmp_path / "out", merge=False)
    assert [check.file.name for check in checks] == [ADAPTER_FILE, f"{variant}_kohya.safetensors"]
    assert all(check.from_live < 1e-5 < 1e-3 < check.from_base for check in checks)


@pytest.mark.slow
def test_a_dora_is_written_for_everyone(
    make_config: Callable, few: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """As whole differences; the run's closing lines and its card name no kohya file, for there is none."""
    run = RunDir(tmp_path / "dora")
    train.run(make_config(*QUICK, *few, "lora.variant=dora"), run)
    said, card = " ".join(capsys.readouterr().out.split()), (run.adapter / "README.md").read_text()
    assert re.search(r"`ghibli export [^`]*dora` writes a file for ComfyUI and A1111", said)
    assert "ComfyUI" not in card and "kohya.safetensors" not in said + card
    assert not (run.adapter / "kohya.safetensors").exists()
    checks = export.export(run, finished_config(run), tmp_path / "out", merge=False)
    assert [check.file.name for check in checks] == [ADAPTER_FILE, "dora_kohya.safetensors"]
    assert all(check.from_live < 1e-5 for check in checks)
    assert all(key.endswith(".diff") for key in load_file(tmp_path / "out" / "dora_kohya.safetensors"))


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_a_checkpoint_that_predicts_v_is_said_to(
    prediction_type: str, base: BaseModel, make_config: Callable, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """ComfyUI and A1111 take any with Stable Diffusion 1's layers for one that predicts noise."""
    base.scheduler_config = base.scheduler_config | {"prediction_type": prediction_type}
    monkeypatch.setattr(export, "trained_base", lambda *_: base)
    files, notes = export.write_merged(RunDir(tmp_path), make_config(), tmp_path, "it_merged.safetensors")
    assert [file.exists() for file in files] == [True, True]
    said = "it_merged.safetensors predicts v, which ComfyUI and A1111 cannot tell"
    assert [note.startswith(said) for note in notes] == [True] * (prediction_type == "v_prediction")


# What is there already


def content_of(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@pytest.mark.parametrize(
    "name", ["README.md", "evaluation.png", "samples/adapter.png", "run_kohya.json", "merged/thesis.txt",
             "merged/unet/config.json", "run_merged.safetensors", ".README.md -> README.md"]
)  # fmt: skip
def test_a_file_of_the_user_is_kept(
    run: RunDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Refused before anything is loaded or written."""
    monkeypatch.setattr(apply, "load_base", lambda *_: pytest.fail("a model was loaded"))
    target, _, link = name.partition(" -> ")
    (tmp_path / target).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / target).write_text("mine")
    if link:
        (tmp_path / link).symlink_to(tmp_path / target)
    before = content_of(tmp_path)
    with pytest.raises(
        UserError, match=f"{re.escape(str(tmp_path / (link or target)))} was not written by"
    ) as it:
        export.export(run, finished_config(run), tmp_path, merge=True)
    assert "\n" not in str(it.value) and content_of(tmp_path) == before


def test_our_own_files_are_replaced_until_they_are_edited(
    exported: tuple[Path, list], run: RunDir, tmp_path: Path
) -> None:
    """In a copy of the folder as well; what else lies there stays."""
    folder = shutil.copytree(exported[0], tmp_path / "copy")
    (folder / "notes.txt").write_text("mine")
    before = content_of(folder)
    export.export(run, finished_config(run), folder, merge=False)
    after = content_of(folder)
    changed = {name for name in before if after[name] != before[name]}
    assert changed == {"README.md", owned.RECORD} and after.keys() == before.keys()
    (folder / "merged" / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match=r"merged/notes.txt was not written by an export"):
        export.export(run, finished_config(run), folder, merge=True)
    card = folder / "README.md"
    card.write_text(card.read_text() + "My own words.")
    with pytest.raises(UserError, match=r"README.md was not written by an export, or was changed since"):
        export.export(run, finished_config(run), folder, merge=False)
    (folder / owned.RECORD).unlink()  # as an older version left it: nobody can tell what was edited since
    kept = content_of(folder)
    with pytest.raises(UserError, match=r"README.md was not written by an export, or was changed since"):
        export.export(run, finished_config(run), folder, merge=False)
    assert content_of(folder) == kept


@pytest.mark.slow
def test_a_refusal_leaves_nothing_behind(
    run: RunDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export, "TOLERANCE", 0)
    folder = tmp_path / "new" / "export"
    with pytest.raises(
        UserError, match="does not reproduce the trained model.*; nothing was written"
    ) as caught:
        export.export(run, finished_config(run), folder, merge=False)
    assert owned.STAGING not in str(caught.value)
    assert not folder.exists()
    folder.mkdir(parents=True)
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="does not reproduce"):
        export.export(run, finished_config(run), folder, merge=False)
    assert content_of(folder) == {"notes.txt": b"mine"}


def test_a_run_given_as_a_dot_is_named_by_its_folder(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(run.path)
    checks = export.export(RunDir(Path(".")), finished_config(run), Path("dot"), merge=False)
    assert [str(check.file) for check in checks] == [
        "dot/pytorch_lora_weights.safetensors", "dot/run_kohya.safetensors",
    ]  # fmt: skip
    assert "\n# run\n" in Path("dot/README.md").read_text()


# The base


def test_a_base_that_was_replaced_is_noticed(run: RunDir, tmp_path: Path) -> None:
    """By content, wherever a run's base is loaded for use; a run that noted none says so."""
    copy = RunDir(shutil.copytree(run.path, tmp_path / "copy", ignore=shutil.ignore_patterns("export")))
    copy.status.update(base_hash="0" * 64)
    config = finished_config(copy)
    sentence = r"the base model.path=demo is not the one it was trained from \(base_hash \w{12}, was 0{12}\)"
    for use in (
        lambda: export.export(copy, config, tmp_path / "out", merge=False),
        lambda: trained_base(copy, config),
        lambda: load_model([str(copy.path)], []),
    ):
        with pytest.raises(UserError, match=sentence):
            use()
    assert not (tmp_path / "out").exists()


def test_another_tokenizer_or_config_is_noticed(run: RunDir, tmp_path: Path) -> None:
    """The weights are the same; runs of before noted none."""
    copy = RunDir(shutil.copytree(run.path, tmp_path / "copy", ignore=shutil.ignore_patterns("export")))
    assert copy.status.read()["configs_hash"] == configs_hash(load("demo"))
    copy.status.update(configs_hash="0" * 64)
    with pytest.raises(UserError, match="another tokenizer, or another setting in a part's config.json"):
        load_model([str(copy.path)], [])
    copy.status.update(configs_hash=None)
    load_model([str(copy.path)], [])


# Memory


@pytest.mark.slow
def test_one_model_at_a_time(run: RunDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of Stable Diffusion 1.5 takes 4 GB: the earlier ones are gone when the next is loaded."""
    load, seen = apply.load_base, []

    def watched(model: ModelConfig) -> BaseModel:
        gc.collect()  # as models.load does
        assert not any(unet() for unet in seen)
        loaded = load(model)
        seen.append(weakref.ref(loaded.unet))
        return loaded

    monkeypatch.setattr(apply, "load_base", watched)
    export.export(run, finished_config(run), tmp_path / "out", merge=True)
    assert len(seen) == 5  # untouched, live, merged, and one for each file
