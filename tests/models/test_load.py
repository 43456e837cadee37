"""Bases that cannot be used are refused in one line that names the reason; the others load completely."""

import gc
import json
import os
import shutil
import subprocess
import sys
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from huggingface_hub import constants
from safetensors.torch import load_file, save_file

from ghibli.config.paths import DEMO
from ghibli.config.schema import Config
from ghibli.models.base import BaseModel, configs_hash, results_key, weights_hash
from ghibli.models.hub import hub_answers
from ghibli.models.load import load
from ghibli.runtime.errors import UserError
from ghibli.training.module import GhibliModule

WEIGHTS = {
    "text_encoder": "model.safetensors",
    "vae": "diffusion_pytorch_model.safetensors",
    "unet": "diffusion_pytorch_model.safetensors",
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of the demo base that a test may damage."""
    place = tmp_path / "mine"
    for part in ("tokenizer", "scheduler", *WEIGHTS):
        shutil.copytree(DEMO / part, place / part)
    shutil.copy(DEMO / "model_index.json", place)
    return place


def refused(path: Path | str) -> str:
    """Return the one-line reason why a base is refused."""
    with pytest.raises(UserError) as caught:
        load(str(path))
    text = str(caught.value)
    assert text.startswith(f"model.path={path}")
    assert "\n" not in text
    return text


def edit_json(file: Path, **changes: object) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def edit_weights(file: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
    save_file(change(load_file(file)), file, metadata={"format": "pt"})


# What loads


@pytest.fixture
def no_collection() -> Iterator[None]:
    """No garbage collection of Python's own accord."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def test_a_base_that_nobody_uses_any_more_is_freed_before_the_next(
    make_config: Callable[..., Config], no_collection: None
) -> None:
    """What trains it refers to itself, so it would lie in memory beside the next."""
    base = load("demo")
    GhibliModule(make_config("lora.rank=4"), base, base_hash="tested")
    before = weakref.ref(base.unet)
    del base
    assert before() is not None
    load("demo")
    assert before() is None


def test_a_folder_loads_whole_and_frozen(folder: Path, capfd: pytest.CaptureFixture) -> None:
    base = load(str(folder))
    assert base.prediction_type == "epsilon"
    for part in (base.text_encoder, base.vae, base.unet):
        assert not part.training
        assert {p.dtype for p in part.parameters()} == {torch.float32}
        assert not any(p.requires_grad for p in part.parameters())
    for name, file in WEIGHTS.items():
        stored, loaded = load_file(folder / name / file), getattr(base, name).state_dict()
        assert stored.keys() == loaded.keys()
        assert all(torch.equal(stored[key].float(), loaded[key]) for key in stored)
    assert tuple(capfd.readouterr()) == ("", "")


def test_half_precision_files_are_loaded_as_fp32(folder: Path, base: BaseModel) -> None:
    for name, file in WEIGHTS.items():
        edit_weights(folder / name / file, lambda weights: {k: v.half() for k, v in weights.items()})
    half = load(str(folder))
    for name in WEIGHTS:
        for key, value in getattr(half, name).state_dict().items():
            assert value.dtype == torch.float32
            torch.testing.assert_close(value, getattr(base, name).state_dict()[key], atol=1e-4, rtol=1e-3)


def test_the_older_spelling_of_weight_names(folder: Path, base: BaseModel) -> None:
    """As in the published SD 1.5: prefix `text_model.`, position_ids, the VAE's `query` for `to_q`."""
    older = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}

    def text_names(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        positions = {"text_model.embeddings.position_ids": torch.arange(77)[None]}
        return {f"text_model.{k.removeprefix('text_model.')}": v for k, v in weights.items()} | positions

    def vae_names(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        for new, old in older.items():
            weights = {
                k.replace(f".{new}.", f".{old}.") if "attentions" in k else k: v for k, v in weights.items()
            }
        return weights

    edit_weights(folder / "text_encoder" / WEIGHTS["text_encoder"], text_names)
    edit_weights(folder / "vae" / WEIGHTS["vae"], vae_names)
    assert "query" in " ".join(load_file(folder / "vae" / WEIGHTS["vae"]))
    assert weights_hash(load(str(folder))) == weights_hash(base)


def test_a_schedule_without_prediction_type_means_epsilon(folder: Path) -> None:
    """SD 1.5's own scheduler_config.json does not name it."""
    file = folder / "scheduler" / "scheduler_config.json"
    content = json.loads(file.read_text())
    content.pop("prediction_type", None)
    file.write_text(json.dumps(content))
    assert load(str(folder)).prediction_type == "epsilon"


def test_the_hash_knows_every_weight_and_the_schedule(base: BaseModel) -> None:
    hashes = {weights_hash(base), weights_hash(load("demo"))}
    assert len(hashes) == 1
    for part in (base.text_encoder, base.vae, base.unet):
        last = list(part.parameters())[-1]
        last.data.view(-1)[-1] += 1e-3
        hashes.add(weights_hash(base))
    base.scheduler_config = base.scheduler_config | {"beta_end": 0.013}
    hashes.add(weights_hash(base))
    assert len(hashes) == 5


def test_the_other_hash_knows_tokenizer_and_settings(folder: Path, base: BaseModel) -> None:
    """Of a base with the same weights: each change is seen, what only names a library's version is not."""

    keys: set[str] = set()  # of the caches, which follow

    def hash_after(file: str, **changes: object) -> str:
        before = (folder / file).read_text()
        (folder / file).write_text(json.dumps(json.loads(before) | changes))
        changed = load(str(folder))
        (folder / file).write_text(before)
        assert weights_hash(changed) == weights_hash(base)
        keys.add(results_key("same", changed))
        return configs_hash(changed)

    ours = configs_hash(base)
    assert configs_hash(load(str(folder))) == ours
    assert hash_after("unet/config.json", _diffusers_version="0.30.0") == ours
    assert hash_after("text_encoder/config.json", transformers_version="4.40.0") == ours
    seen = {
        ours,
        hash_after("text_encoder/config.json", hidden_act="gelu"),
        hash_after("unet/config.json", norm_eps=1e-3),
        hash_after("vae/config.json", scaling_factor=0.18215),
    }
    vocabulary = json.loads((folder / "tokenizer" / "vocab.json").read_text())
    one, other = sorted(vocabulary)[300:302]
    swapped = vocabulary | {one: vocabulary[other], other: vocabulary[one]}
    (folder / "tokenizer" / "vocab.json").write_text(json.dumps(swapped))
    (folder / "tokenizer" / "tokenizer.json").unlink()
    seen.add(configs_hash(load(str(folder))))
    keys.add(results_key("same", load(str(folder))))
    assert len(seen) == len(keys) == 5


def test_configs_for_a_folder_are_not_used_and_named(capsys: pytest.CaptureFixture) -> None:
    load("demo", "/no/such/folder")
    said = " ".join(capsys.readouterr().out.split())
    assert "model.config=/no/such/folder is not used: model.path=demo is no single file" in said


# What is refused


def test_a_folder_that_is_no_base(tmp_path: Path) -> None:
    (tmp_path / "unet").mkdir()
    assert "is not a diffusers folder of Stable Diffusion 1.5: it has no tokenizer/" in refused(tmp_path)


@pytest.mark.parametrize("part", ["tokenizer", "scheduler", *WEIGHTS])
def test_a_missing_part_is_named(folder: Path, part: str) -> None:
    shutil.rmtree(folder / part)
    text = refused(folder)
    assert f"it has no {part}/" in text
    others = {"tokenizer", "scheduler", *WEIGHTS} - {part}
    assert not any(f"{other}/" in text.split("it has no")[1] for other in others)


def test_an_empty_tokenizer_folder(folder: Path) -> None:
    for file in (folder / "tokenizer").iterdir():
        file.unlink()
    assert "it has no tokenizer/*.json" in refused(folder)


def test_a_tokenizer_that_knows_only_its_special_tokens(folder: Path) -> None:
    """Without its vocabulary transformers makes a tokenizer of two tokens, without a warning."""
    for file in (folder / "tokenizer").iterdir():
        if file.name != "tokenizer_config.json":
            file.unlink()
    text = refused(folder)
    assert "tokenizer" in text
    vocabulary = {"<|startoftext|>": 0, "<|endoftext|>": 1}
    (folder / "tokenizer" / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "tokenizer" / "merges.txt").write_text("#version: 0.2\n")
    text = refused(folder)
    assert "the tokenizer knows 2 tokens, the text encoder" in text
    assert "missing or belong to another model" in text


def test_pickled_weights_are_refused_with_the_reason(folder: Path, tmp_path: Path) -> None:
    file = folder / "unet" / WEIGHTS["unet"]
    file.rename(file.with_suffix(".bin"))
    text = refused(folder)
    assert "it has no unet/*.safetensors" in text
    assert "can run code" in text
    for name in ("model.ckpt", "model.bin", "model.pt"):
        (tmp_path / name).write_bytes(b"")
        assert "only .safetensors files are read, because loading" in refused(tmp_path / name)


@pytest.mark.parametrize("part", WEIGHTS)
def test_a_file_that_was_cut_off(folder: Path, part: str) -> None:
    file = folder / part / WEIGHTS[part]
    whole = file.read_bytes()
    for length in (0, 1000, len(whole) - 1):
        file.write_bytes(whole[:length])
        text = refused(folder)
        assert f"{part}/{file.name} is cut off or damaged; download it again" in text


def test_a_git_lfs_pointer(folder: Path) -> None:
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3438167540\n"
    (folder / "unet" / WEIGHTS["unet"]).write_text(pointer)
    assert "git lfs pull" in refused(folder)


@pytest.mark.parametrize("part", WEIGHTS)
def test_a_missing_weight_is_not_made_up(folder: Path, part: str, capfd: pytest.CaptureFixture) -> None:
    file = folder / part / WEIGHTS[part]
    name = sorted(load_file(file))[-1]
    edit_weights(file, lambda weights: {k: v for k, v in weights.items() if k != name})
    text = refused(folder)
    assert f"{part}/ lacks weights that its config.json asks for" in text
    assert name in text
    assert tuple(capfd.readouterr()) == ("", "")


@pytest.mark.parametrize("part", WEIGHTS)
def test_a_weight_that_the_config_does_not_describe_is_named(folder: Path, part: str) -> None:
    """The libraries would drop it: with the config.json of a smaller model, half of the weights are lost."""
    file = folder / part / WEIGHTS[part]
    edit_weights(file, lambda weights: weights | {"one_more_layer.weight": torch.zeros(3)})
    text = refused(folder)
    assert f"{part}/ holds weights that its config.json does not describe: " in text
    assert "one_more_layer.weight" in text


def test_what_published_text_encoders_hold_besides_is_no_reason(folder: Path, base: BaseModel) -> None:
    more = {"text_projection.weight": torch.zeros(3, 3), "logit_scale": torch.zeros(1)}
    edit_weights(folder / "text_encoder" / WEIGHTS["text_encoder"], lambda weights: weights | more)
    assert weights_hash(load(str(folder))) == weights_hash(base)


@pytest.mark.parametrize("part", WEIGHTS)
def test_a_weight_of_another_shape_is_named(folder: Path, part: str, capfd: pytest.CaptureFixture) -> None:
    file = folder / part / WEIGHTS[part]
    name = next(key for key, value in sorted(load_file(file).items()) if value.ndim == 1)
    edit_weights(file, lambda weights: weights | {name: torch.zeros(len(weights[name]) + 1)})
    text = refused(folder)
    assert f"{part}/" in text
    assert name in text
    assert tuple(capfd.readouterr()) == ("", "")


def test_a_config_that_is_no_json(folder: Path) -> None:
    (folder / "unet" / "config.json").write_text("{")
    assert "unet/ cannot be loaded" in refused(folder)


def replace_unet(folder: Path, **changes: object) -> None:
    """Replace the UNet by a fresh one of another architecture, with matching weights and config."""
    settings = json.loads((folder / "unet" / "config.json").read_text()) | changes
    UNet2DConditionModel.from_config(settings).save_pretrained(folder / "unet")


def test_an_inpainting_unet(folder: Path) -> None:
    replace_unet(folder, in_channels=9)
    assert "its UNet takes 9 channels, its VAE makes 4: an inpainting or depth model" in refused(folder)


def test_a_unet_for_another_text_encoder(folder: Path) -> None:
    width = json.loads((folder / "text_encoder" / "config.json").read_text())["hidden_size"]
    replace_unet(folder, cross_attention_dim=2 * width)
    text = refused(folder)
    assert f"expects text embeddings of width {2 * width}, its text encoder makes {width}: SDXL" in text


def test_a_schedule_that_predicts_images(folder: Path) -> None:
    edit_json(folder / "scheduler" / "scheduler_config.json", prediction_type="sample")
    assert "predicts sample, which is not supported" in refused(folder)


def test_a_single_file_that_is_no_base(tmp_path: Path) -> None:
    file = tmp_path / "lora.safetensors"
    file.write_bytes(b"123")
    assert "is cut off or damaged" in refused(file)
    save_file({"lora.down": torch.zeros(4, 4)}, file)
    text = refused(file)
    assert "cannot be loaded as Stable Diffusion 1.5 in one file" in text
    assert "give a folder that has them, model.config=DIR, or a diffusers folder, model.path=DIR" in text


def test_configs_for_a_single_file(tmp_path: Path) -> None:
    """A LoRA is not a base, whatever the configs; a folder without them is named."""
    file = tmp_path / "lora.safetensors"
    save_file({"lora.down": torch.zeros(4, 4)}, file)
    with pytest.raises(UserError, match="a diffusers folder has everything"):
        load(str(file), "demo")
    with pytest.raises(UserError, match=r"model.config=.* lacks model_index.json, scheduler/"):
        load(str(file), str(tmp_path))


def test_names_of_the_hub() -> None:
    text = refused("runwayml/stable-diffusion-v1-5")
    assert text.endswith("is gone from the hub: use stable-diffusion-v1-5/stable-diffusion-v1-5")
    assert "no such folder or file, and not a hub id (OWNER/NAME)" in refused("nowhere")
    assert "no such folder or file" in refused("./nowhere/at-all")
    assert "no such folder or file" in refused("~/nowhere/at-all")
    assert "the hub cannot be reached" in refused("nobody/nothing")


UNREACHABLE = """
import time
from ghibli.models.load import load
from ghibli.runtime.errors import one_line_errors

start = time.monotonic()
try:
    one_line_errors(lambda: load("nobody/nothing"))
finally:
    print(time.monotonic() - start)
"""


@pytest.mark.slow
def test_a_hub_that_cannot_be_reached_costs_seconds(tmp_path: Path) -> None:
    """Without HF_HUB_OFFLINE, at a host that does not resolve: the libraries would retry for minutes."""
    hidden = ("HF_HUB_OFFLINE", "HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy")
    environment = {name: value for name, value in os.environ.items() if name not in hidden}
    environment |= {"HF_HOME": str(tmp_path), "HF_ENDPOINT": "https://hub.invalid"}
    words = [sys.executable, "-c", UNREACHABLE]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=100)
    assert done.returncode == 2
    assert done.stderr.endswith(  # bitsandbytes may say before that it is slow here
        "error: model.path=nobody/nothing: no such folder here, not downloaded yet, and the hub cannot be "
        "reached: give a folder, model.path=DIR, or use model=demo\n"
    )
    assert float(done.stdout) < 20


@pytest.mark.parametrize("proxy", [None, "http://127.0.0.1:9"])
def test_nobody_answers(monkeypatch: pytest.MonkeyPatch, proxy: str | None) -> None:
    """Neither the hub itself nor a proxy."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "https://127.0.0.1:9")
    monkeypatch.setattr("urllib.request.getproxies", lambda: {"https": proxy} if proxy else {})
    assert not hub_answers()
    assert "the hub cannot be reached" in refused("nobody/nothing")
