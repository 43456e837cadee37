"""The model card: text of strangers stays text, and it names only files that are there."""

import ast
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import diffusers
import pytest
import yaml
from helpers.commands import REPO

from ghibli.adapters.model_card import gain_sentence, model_card, public_name
from ghibli.inference.generate import a1111_parameters, model_metadata
from ghibli.inference.request import ImageRequest
from ghibli.runs.folder import RunDir

EVIL = "<img src=x onerror=alert(1)>"


def test_a_card_shows_text_as_text(make_config: Callable, tmp_path: Path) -> None:
    """Emoji in YAML, HTML in style and names, a path of this machine, a damaged evaluation.json."""
    secret = tmp_path / "home" / "jane" / "sd15"
    config = make_config(
        f"data.style=', 😀 👩‍🎨 {EVIL} `x`'", f"model.path={secret}", f"model.adapter={secret}/near"
    )
    copy = RunDir(tmp_path / EVIL.replace("/", ""))
    copy.path.mkdir()
    copy.status.update(gain="0.5", gain_se=0.1, step=EVIL, data_hash=EVIL)
    copy.evaluation.write_text(json.dumps({"weights": None, "models": {EVIL: [{"sampler": EVIL}]}}))
    card = model_card(copy, config, copy.path.name, ["`a`"], ["a"])
    assert "<img" not in card and "jane" not in card and "<lora:" not in card
    header = yaml.safe_load(card.split("---\n")[1])
    assert header["instance_prompt"] == f"😀 👩‍🎨 {EVIL} `x`" and "base_model" not in header
    assert "&lt;img" in card and "for sd15, with near merged" in card
    line = next(line for line in card.splitlines() if "from_pretrained" in line)
    prompt = next(line for line in card.splitlines() if "guidance_scale" in line)
    assert "sd15" in line and ast.literal_eval(prompt.strip()[9:].rpartition(", guidance")[0]).endswith("`x`")


@pytest.mark.parametrize(
    ("path", "shown"),
    [
        ("/home/jane/sd15", "sd15"), ("~/sd15", "sd15"), (r"C:\Users\jane\sd15", "sd15"),
        (r"\\server\jane\sd15", "sd15"), ("./jane/sd15", "sd15"), ("jane/sd15", "jane/sd15"),
    ],
)  # fmt: skip
def test_what_is_shared_names_no_folder(make_config: Callable, path: str, shown: str) -> None:
    """The last name alone, but of a hub id all; in the card and in the metadata of an image."""
    assert public_name(path) == shown
    config = make_config("model=demo")
    config.model.path, config.model.adapter = path, f"{path}/near"
    home = str(Path.home() / "runs" / "a")
    model = SimpleNamespace(config=config, names=[home, "outputs/b"], weights=[1.0, 1.0])
    request = ImageRequest(["x"], "ddim", 1, 2, 0, (64, 64))
    said = json.dumps(model_metadata(model)) + a1111_parameters(request, model)
    assert f'"base": {json.dumps(shown)}' in said and f"Model: {shown}" in said
    assert '"adapters": ["~/runs/a", "outputs/b"]' in said and '"merged": "near"' in said
    assert "Users" not in said and "home" not in said and "server" not in said


def test_the_card_of_a_demo_run_loads_as_printed(make_config: Callable, tmp_path: Path) -> None:
    """By diffusers itself, from the repository's root: the printed line of the base."""
    run = RunDir(tmp_path)
    card = model_card(run, make_config("model.resolution=64"), "it", [], [], "samples/adapter.png")
    line = next(line for line in card.splitlines() if "from_pretrained" in line)
    names: dict[str, object] = {"diffusers": diffusers}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(REPO)
        exec(line.strip(), names)
    assert isinstance(names["pipeline"], diffusers.StableDiffusionPipeline)
    assert "(samples/adapter.png)" in card and "![" in card
    assert "![" not in model_card(run, make_config(), "it", [], [])


@pytest.mark.parametrize(
    ("gain", "guidance", "said"),
    [
        (0.124, 1, "loss is 12.4 % +- 1.0 % (standard error) lower than the base's"),
        (-0.904, 1, "loss is 90.4 % +- 1.0 % (standard error) HIGHER than the base's"),
        (-0.904, 1, "It predicts the noise worse than the base: do not expect better images."),
        (-0.904, 1 / 7.5, "Trained with a guidance target of 7.5 it did not start at 0: judge its images."),
        (-0.904, 7.5, "Trained at guidance 7.5 it is no predictor of the noise: judge its images."),
    ],
)
def test_a_loss_above_the_bases_is_said_so(gain: float, guidance: float, said: str) -> None:
    text = gain_sentence({"gain": gain, "gain_se": 0.01, "best_epoch": 3}, guidance)
    assert said in text and "-90" not in text


def test_a_card_names_only_files_that_are_there(make_config: Callable, tmp_path: Path) -> None:
    run = RunDir(tmp_path / "run")
    run.path.mkdir()
    config = make_config("lora.variant=dora")
    names = ["pytorch_lora_weights.safetensors"]
    assert "A1111" not in model_card(run, config, "it", [], names)
    whole = model_card(
        run, config, "it", [], [*names, "it_kohya.safetensors", "merged", "it_merged.safetensors"]
    )
    for words in ("<lora:it_kohya:1>", "`merged/` is a complete", "`it_merged.safetensors` is the complete"):
        assert words in whole
