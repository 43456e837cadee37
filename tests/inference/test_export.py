"""Adapters for other programs, verified after export; and adapters from elsewhere, trained further."""

import ast
import gc
import json
import re
import shlex
import shutil
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from helpers.commands import run_python
from helpers.sd15_random import TEXT_ENCODER, UNET, VAE, published
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModel
from typer.testing import CliRunner

import train
from ghibli.adapters import apply, describe, files, kohya
from ghibli.adapters.apply import load_adapters, set_weights
from ghibli.adapters.files import read_adapter
from ghibli.adapters.layers import LoRA
from ghibli.adapters.model_card import model_card
from ghibli.adapters.names import kohya_name, named_layers
from ghibli.adapters.sidecar import clean_name, write_sidecar
from ghibli.adapters.start import check_same_shape
from ghibli.adapters.trained import trained_base
from ghibli.cli.main import app
from ghibli.config.schema import ModelConfig
from ghibli.inference import export, owned
from ghibli.inference.export import check_prediction, predict, probe_inputs
from ghibli.inference.generate import generate_images
from ghibli.inference.load import load_model
from ghibli.inference.request import ImageRequest
from ghibli.models.base import DEMO, BaseModel
from ghibli.models.load import load
from ghibli.models.original import original_weights
from ghibli.models.safetensors import ADAPTER_FILE
from ghibli.runs.folder import RunDir
from ghibli.runs.settings import finished_config
from ghibli.runtime.errors import UserError

QUICK = ("trainer.max_epochs=1", "optimizer.lr=5e-3", "lora.rank=4", "lora.alpha=6")


@pytest.fixture(scope="module")
def run(make_config: Callable, tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    """A finished run of a few steps."""
    found = RunDir(tmp_path_factory.mktemp("exported") / "run")
    train.run(make_config(*QUICK), found)
    return found


@pytest.fixture(scope="module")
def exported(run: RunDir) -> tuple[Path, list[export.Check]]:
    folder = run.path / "export"
    return folder, export.export(run, finished_config(run), folder, merge=True)


# Files for others


PLAIN_DIFFUSERS = """
import sys
import numpy as np, torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
base, file, prompt, out = sys.argv[1:]
pipeline = StableDiffusionPipeline.from_pretrained(base, safety_checker=None)
pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, clip_sample=False,
                                               set_alpha_to_one=False, steps_offset=1)
pipeline.load_lora_weights(file.rpartition("/")[0], weight_name=file.rpartition("/")[2])
pipeline.unet.eval(); pipeline.text_encoder.eval()
images = pipeline(prompt, height=128, width=128, num_inference_steps=4, guidance_scale=7.5,
                    output_type="np",
                    generator=torch.Generator().manual_seed(3)).images
assert not [name for name in sys.modules if name.split(".")[0] == "ghibli"]
np.save(out, (images[0] * 255).round())
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", ["pytorch_lora_weights.safetensors", "run_kohya.safetensors"])
def test_a_process_that_knows_only_diffusers_draws_the_same(
    exported: tuple[Path, list], run: RunDir, tmp_path: Path, name: str
) -> None:
    prompt = "a red train by a lake, Studio Ghibli style"
    words = (str(DEMO), str(exported[0] / name), prompt, str(tmp_path / "it.npy"))
    done = run_python("-c", PLAIN_DIFFUSERS, *words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    theirs = np.load(tmp_path / "it.npy")
    loaded = load_model([str(run.path)], [])
    request = ImageRequest([prompt], "ddim", 7.5, 4, 3, (128, 128))
    ours = (generate_images(loaded, request)[0].permute(1, 2, 0).numpy() * 255).round()
    assert (abs(ours - theirs) > 1).mean() <= 0.001
    base = (generate_images(loaded, ImageRequest([prompt], "ddim", 7.5, 4, 3, (128, 128), scale=0))[0]) * 255
    assert (abs(base.permute(1, 2, 0).numpy() - theirs) > 1).mean() > 0.2


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
def test_a_run_ends_well_with_an_alpha_that_no_float_is(make_config: Callable, tmp_path: Path) -> None:
    """The kohya file stores alpha as float32; rslora's is alpha times the root of the rank."""
    run = RunDir(tmp_path / "run")
    train.run(
        make_config("trainer.max_epochs=1", "lora.rank=2", "lora.alpha=0.1", "lora.variant=rslora"), run
    )
    assert run.status.state == "finished" and (run.adapter / "kohya.safetensors").is_file()


def sd_scripts_names() -> dict[str, tuple[int, int]]:
    """Attention layers as sd-scripts names them for Stable Diffusion 1.5 -> (in, out)."""
    places = {f"down_blocks_{b}_attentions_{a}": 320 * 2**b for b in range(3) for a in range(2)}
    places |= {f"up_blocks_{b}_attentions_{a}": 1280 // 2 ** (b - 1) for b in (1, 2, 3) for a in range(3)}
    places |= {"mid_block_attentions_0": 1280}
    names = {}
    for place, width in places.items():
        block = f"lora_unet_{place}_transformer_blocks_0"
        for attention, context in (("attn1", width), ("attn2", 768)):
            for layer in ("to_q", "to_k", "to_v", "to_out_0"):
                inside = context if layer in ("to_k", "to_v") else width
                names[f"{block}_{attention}_{layer}"] = (inside, width)
    for layer in range(12):
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            names[f"lora_te_text_model_encoder_layers_{layer}_self_attn_{name}"] = (768, 768)
    return names


def test_names_and_shapes_are_those_of_sd_scripts_at_real_size() -> None:
    with torch.device("meta"):
        unet = UNet2DConditionModel(**UNET)
        text_encoder = CLIPTextModel(CLIPTextConfig(**TEXT_ENCODER))
    whole = BaseModel(None, text_encoder, None, unet, {})
    endings = (".to_q", ".to_k", ".to_v", ".to_out.0", "q_proj", "k_proj", "v_proj", "out_proj")
    layers = {
        name: LoRA(torch.zeros(8, module.in_features), torch.zeros(module.out_features, 8), 16)
        for name, module in named_layers(whole).items()
        if name.endswith(endings)
    }
    state = kohya.to_kohya(files.Adapter(Path("x"), "diffusers", layers, {}))
    expected = {}
    for name, (inside, outside) in sd_scripts_names().items():
        expected |= {
            f"{name}.lora_down.weight": (8, inside),
            f"{name}.lora_up.weight": (outside, 8),
            f"{name}.alpha": (),
        }
    assert {key: tuple(value.shape) for key, value in state.items()} == expected


# The complete model


def test_the_complete_model_has_the_published_layout(exported: tuple[Path, list], base: BaseModel) -> None:
    """Older transformers read nothing else: prefix `text_model.`, and a tokenizer of two plain files."""
    merged, text = exported[0] / "merged", base.text_encoder.state_dict()
    stored = load_file(merged / "text_encoder" / "model.safetensors")
    assert stored.keys() == {published("text_encoder", key) for key in text}
    assert json.loads((merged / "tokenizer" / "vocab.json").read_text()) == json.loads(
        (DEMO / "tokenizer" / "vocab.json").read_text()
    )
    rows = [(place / "tokenizer" / "merges.txt").read_text().split("\n") for place in (merged, DEMO)]
    assert [row for row in rows[0] if row] == [row for row in rows[1] if row]
    captions = ["A girl standing, in a Greenhouse! 42 naïve", ""]
    assert torch.equal(load(str(merged)).tokenize(captions), base.tokenize(captions))
    texts = [file.read_text() for file in exported[0].glob("**/*.json")]
    assert not any("_name_or_path" in text or str(exported[0]) in text for text in texts)
    assert len({file.stat().st_mode for file in exported[0].glob("**/*.*") if file.is_file()}) == 1


def test_one_file_is_read_by_diffusers_as_the_same_model(exported: tuple[Path, list]) -> None:
    folder, file = exported[0] / "merged", exported[0] / "run_merged.safetensors"
    one = StableDiffusionPipeline.from_single_file(
        str(file), config=str(folder), local_files_only=True, safety_checker=None
    )
    whole = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
    for part in ("unet", "vae", "text_encoder"):
        mine, theirs = (getattr(pipeline, part).state_dict() for pipeline in (one, whole))
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(mine[key], theirs[key]) for key in mine), part


ORIGINAL = {  # of v1-5-pruned-emaonly.safetensors, which holds 1131 weights
    "model.diffusion_model.time_embed.2.weight": (1280, 1280),
    "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn1.to_out.0.weight": (320, 320),
    "model.diffusion_model.input_blocks.3.0.op.weight": (320, 320, 3, 3),
    "model.diffusion_model.input_blocks.4.0.skip_connection.weight": (640, 320, 1, 1),
    "model.diffusion_model.input_blocks.11.0.emb_layers.1.weight": (1280, 1280),
    "model.diffusion_model.middle_block.1.proj_in.weight": (1280, 1280, 1, 1),
    "model.diffusion_model.output_blocks.2.1.conv.weight": (1280, 1280, 3, 3),
    "model.diffusion_model.output_blocks.5.2.conv.weight": (1280, 1280, 3, 3),
    "model.diffusion_model.output_blocks.11.0.in_layers.2.weight": (320, 640, 3, 3),
    "model.diffusion_model.out.2.weight": (4, 320, 3, 3),
    "first_stage_model.encoder.down.1.block.0.nin_shortcut.weight": (256, 128, 1, 1),
    "first_stage_model.encoder.down.2.downsample.conv.weight": (512, 512, 3, 3),
    "first_stage_model.encoder.mid.attn_1.proj_out.weight": (512, 512, 1, 1),
    "first_stage_model.decoder.up.0.block.0.nin_shortcut.weight": (128, 256, 1, 1),
    "first_stage_model.decoder.up.3.upsample.conv.weight": (512, 512, 3, 3),
    "first_stage_model.quant_conv.weight": (8, 8, 1, 1),
    "cond_stage_model.transformer.text_model.embeddings.position_ids": (1, 77),
    "cond_stage_model.transformer.text_model.embeddings.token_embedding.weight": (49408, 768),
    "cond_stage_model.transformer.text_model.encoder.layers.11.mlp.fc2.weight": (768, 3072),
}


def test_the_single_files_names_at_real_size() -> None:
    with torch.device("meta"):
        unet, vae = UNet2DConditionModel(**UNET), AutoencoderKL(**VAE)
        text_encoder = CLIPTextModel(CLIPTextConfig(**TEXT_ENCODER))
    weights = original_weights(BaseModel(None, text_encoder, vae, unet, {}))
    assert len(weights) == 1131
    assert {key: tuple(weights[key].shape) for key in ORIGINAL} == ORIGINAL


@pytest.mark.slow
def test_a_dora_is_written_for_everyone(
    make_config: Callable, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """As whole differences; the run's closing lines and its card name no kohya file, for there is none."""
    run = RunDir(tmp_path / "dora")
    train.run(make_config(*QUICK, "lora.variant=dora"), run)
    said, card = " ".join(capsys.readouterr().out.split()), (run.adapter / "README.md").read_text()
    assert re.search(r"`ghibli export [^`]*dora` writes a file for ComfyUI and A1111", said)
    assert "ComfyUI" not in card and "kohya.safetensors" not in said + card
    assert not (run.adapter / "kohya.safetensors").exists()
    checks = export.export(run, finished_config(run), tmp_path / "out", merge=False)
    assert [check.file.name for check in checks] == [ADAPTER_FILE, "dora_kohya.safetensors"]
    assert all(check.from_live < 1e-5 for check in checks)
    assert all(key.endswith(".diff") for key in load_file(tmp_path / "out" / "dora_kohya.safetensors"))


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


# What other programs show


def base_of(width: int, prediction_type: str) -> BaseModel:
    unet = SimpleNamespace(config=SimpleNamespace(cross_attention_dim=width))
    return BaseModel(None, None, None, unet, {"prediction_type": prediction_type})


@pytest.mark.parametrize(
    ("width", "prediction_type", "expected"),
    [  # as sd-scripts' get_model_version_str_for_sd1_sd2 and library/sai_model_spec.py write them
        (768, "epsilon", ("sd_v1", "False", "stable-diffusion-v1/lora", "epsilon", "SD1")),
        (768, "v_prediction", ("sd_v1_v", "False", "stable-diffusion-v1/lora", "v", "SD1")),
        (1024, "epsilon", ("sd_v2", "True", "stable-diffusion-v2-512/lora", "epsilon", "SD2")),
        (1024, "v_prediction", ("sd_v2_v", "True", "stable-diffusion-v2-768-v/lora", "v", "SD2")),
    ],
)
def test_metadata_are_those_of_the_base(
    make_config: Callable, tmp_path: Path, width: int, prediction_type: str, expected: tuple[str, ...]
) -> None:
    base, config = base_of(width, prediction_type), make_config("data.style=', in ink'")
    layers = {"unet.x": LoRA(down=torch.zeros(4, 8), up=torch.zeros(8, 4), alpha=2)}
    adapter = files.Adapter(Path("x"), "diffusers", layers, {})
    found = kohya.metadata_of(adapter, base, config, {}, "lora.rank=4, <a>: b")
    write_sidecar(tmp_path / "it.safetensors", config, base)
    sidecar = json.loads((tmp_path / "it.json").read_text())
    keys = ("ss_base_model_version", "ss_v2", "modelspec.architecture", "modelspec.prediction_type")
    assert (*(found[key] for key in keys), sidecar["sd version"]) == expected
    assert found["ss_output_name"] == "lora.rank_4_a_b"
    assert found["modelspec.title"].startswith("in ink: LoRA rank")
    assert sidecar["activation text"] == found["modelspec.trigger_phrase"] == "in ink"
    assert "ss_clip_skip" not in found and sidecar["notes"] == ""
    config = make_config("model.clip_skip=2")
    assert kohya.metadata_of(adapter, base, config, {}, "it")["ss_clip_skip"] == "2"
    write_sidecar(tmp_path / "two.safetensors", config, base)
    assert json.loads((tmp_path / "two.json").read_text())["notes"] == "clip skip 2"


def test_layers_that_differ_are_dynamic(make_config: Callable) -> None:
    layers = {f"unet.{n}": LoRA(down=torch.zeros(n, 8), up=torch.zeros(8, n), alpha=n / 2) for n in (2, 4)}
    adapter = files.Adapter(Path("x"), "diffusers", layers, {})
    found = kohya.metadata_of(adapter, base_of(768, "epsilon"), make_config(), {}, "x")
    assert (found["ss_network_dim"], found["ss_network_alpha"]) == ("Dynamic", "Dynamic")


def test_what_a1111_writes_beside_a_file_stays(make_config: Callable, tmp_path: Path) -> None:
    (tmp_path / "it.json").write_text('{"notes": "mine"}')
    write_sidecar(tmp_path / "it.safetensors", make_config(), base_of(768, "epsilon"))
    assert json.loads((tmp_path / "it.json").read_text()) == {"notes": "mine"}


def test_names_for_other_programs() -> None:
    """A1111 splits `<lora:NAME:1>` at colons and reads an = as an option."""
    for text in ("lora.rank=8,lr=1e-4", "a:b>c", "  ", "...", "naïve ジブリ", "x" * 300, "../../etc/passwd"):
        name = clean_name(text)
        assert re.fullmatch(r"[\w+-][\w.+-]{0,99}", name), name
    assert clean_name("lora.rank=8,lr=1e-4") == "lora.rank_8_lr_1e-4"


EVIL = "<img src=x onerror=alert(1)>"


def test_a_card_shows_text_as_text(run: RunDir, make_config: Callable, tmp_path: Path) -> None:
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


def test_a_card_names_only_files_that_are_there(run: RunDir, make_config: Callable) -> None:
    config = make_config("lora.variant=dora")
    names = ["pytorch_lora_weights.safetensors"]
    assert "A1111" not in model_card(run, config, "it", [], names)
    whole = model_card(
        run, config, "it", [], [*names, "it_kohya.safetensors", "merged", "it_merged.safetensors"]
    )
    for words in ("<lora:it_kohya:1>", "`merged/` is a complete", "`it_merged.safetensors` is the complete"):
        assert words in whole


# Several, and none


def test_two_adapters_add_up_and_weight_0_is_the_base(run: RunDir) -> None:
    near = DEMO / "near"

    def layer_of(*weights: float) -> torch.Tensor:
        base = load("demo")
        load_adapters(
            base,
            [(read_adapter(file, base, "x"), w) for file, w in zip((run.path, near), weights, strict=True)],
        )
        layer = base.unet.get_submodule("mid_block.attentions.0.transformer_blocks.0.attn2.to_k")
        return layer(torch.ones(1, 64)).detach()

    zero, one, other = layer_of(0, 0), layer_of(1, 0), layer_of(0, 1)
    torch.testing.assert_close(layer_of(0.3, -2) - zero, 0.3 * (one - zero) - 2 * (other - zero))
    untouched = load("demo")
    loaded = load("demo")
    load_adapters(
        loaded, [(read_adapter(run.path, loaded, "x"), 1.0), (read_adapter(near, loaded, "x"), 1.0)]
    )
    inputs = probe_inputs(untouched)
    assert not torch.equal(predict(loaded, inputs), predict(untouched, inputs))
    set_weights(loaded, [0.0, 0.0])
    assert torch.equal(predict(loaded, inputs), predict(untouched, inputs))


# From elsewhere


@pytest.mark.slow
def test_training_starts_from_another_adapter(run: RunDir, make_config: Callable, tmp_path: Path) -> None:
    """The gain is still that over the base, and from a kohya file it starts where the other run ended."""
    file = run.adapter / "kohya.safetensors"
    later = RunDir(tmp_path / "later")
    train.run(make_config(*QUICK, "optimizer.lr=1e-30", f"lora.init={file}"), later)
    before, after = (load_file(r.adapter / ADAPTER_FILE) for r in (run, later))
    for key, value in before.items():  # alpha / rank is divided out of B and multiplied in again
        torch.testing.assert_close(after[key], value, rtol=3e-7, atol=0)
    assert later.status.read()["gain"] == pytest.approx(run.status.read()["gain"], abs=1e-6)
    assert later.status.read()["init_hash"] == read_adapter(file, load("demo"), "x").hash


def test_other_settings_than_the_files_are_named(run: RunDir, make_config: Callable, tmp_path: Path) -> None:
    config = make_config("lora.rank=8", "lora.alpha=6", f"lora.init={run.path}")
    with pytest.raises(
        UserError, match="lora.init=.*: lora.rank of this run differ from those of the file; `ghibli"
    ):
        train.run(config, RunDir(tmp_path / "other"))


def test_import_says_what_it_is_and_what_to_type(run: RunDir) -> None:
    file = run.adapter / "kohya.safetensors"
    done = CliRunner().invoke(app, ["import", str(file), "model=demo", "data=demo"])
    assert done.exit_code == 0, done.output
    assert "kohya, LoRA of 92 layers, rank 4, alpha 4" in done.output
    words = f"python train.py model=demo data=demo lora.init={file} lora.rank=4 lora.alpha=4"
    assert f"{words} lora.targets=attention lora.text_encoder=true" in done.output
    assert f"ghibli generate {file} model=demo data=demo --prompt TEXT" in done.output


def test_the_printed_settings_take_the_file(run: RunDir, base: BaseModel, make_config: Callable) -> None:
    """Also for rsLoRA, whose alpha is not a round number, and for DoRA; not for layers of several ranks."""
    adapter = read_adapter(run.adapter, base, "import")
    layer = next(iter(adapter.layers.values()))
    odd = {name: replace(each, alpha=3 * 7**0.5) for name, each in adapter.layers.items()}
    dora = {
        name: replace(each, magnitude=torch.ones(each.up.shape[0], 1))
        for name, each in adapter.layers.items()
    }
    for layers in (adapter.layers, odd, dora):
        changed = replace(adapter, layers=layers)
        words = shlex.split(describe.training_command(changed, base, []))[2:]
        check_same_shape(changed, make_config(*words).lora, base)
    half = replace(layer, up=layer.up[:, :2], down=layer.down[:2])
    mixed = replace(adapter, layers={**adapter.layers, next(iter(adapter.layers)): half})
    assert describe.training_command(mixed, base, []) == "not possible: its layers differ in rank: 2, 4"


def test_files_that_are_not_adapters_of_this_base(run: RunDir, base: BaseModel, tmp_path: Path) -> None:
    def refused(state: dict[str, torch.Tensor] | bytes, name: str = "it.safetensors") -> str:
        file = tmp_path / name
        file.write_bytes(state) if isinstance(state, bytes) else save_file(state, file)
        with pytest.raises(UserError) as caught:
            read_adapter(file, base, "adapter")
        assert "\n" not in str(caught.value)
        return str(caught.value)

    whole = (run.adapter / "kohya.safetensors").read_bytes()
    assert "cut off or damaged" in refused(whole[:-100])
    assert "is a pickle under another name" in refused(b"PK\x03\x04....")
    assert "only .safetensors files are read" in refused(b"PK", "it.ckpt")
    assert "adapter for SDXL" in refused({"lora_te2_x.lora_down.weight": torch.zeros(4, 4)})
    assert "is not a LoRA of this base: it has `something`" in refused({"something": torch.zeros(4)})
    name = kohya_name("unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k")
    wide = {f"{name}.lora_down.weight": torch.zeros(4, 768), f"{name}.lora_up.weight": torch.zeros(1280, 4)}
    text = refused(wide)
    assert f"`{name}.lora_up.weight` of (1280, 4) cannot be: a layer of the shape (128, 64) needs" in text
    assert "(128, rank); it was made for another base" in text
    with pytest.raises(UserError, match="no such file or run"):
        read_adapter(tmp_path / "nowhere", base, "adapter")


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


def test_damaged_metadata(run: RunDir, base: BaseModel, tmp_path: Path) -> None:
    file = tmp_path / "metadata.safetensors"
    save_file(load_file(run.adapter / ADAPTER_FILE), file, {"lora_adapter_metadata": "{"})
    with pytest.raises(UserError, match="cannot be read as a LoRA"):
        read_adapter(file, base, "import")


# The hub


def test_push_lists_the_files_and_sends_nothing(exported: tuple[Path, list], run: RunDir) -> None:
    done = CliRunner().invoke(app, ["push", str(run.path), "me/mine"])
    assert done.exit_code == 0, done.output
    assert "run_kohya.safetensors" in done.output and "README.md" in done.output
    assert "nothing was sent" in done.output and "merged" not in done.output


def test_push_sends_just_that(
    exported: tuple[Path, list], run: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    from ghibli.inference import push

    asked = {}

    class Api:
        endpoint = "https://hub"

        def create_repo(self, name: str, **options: object) -> None:
            asked["repo"] = (name, options)

        def upload_folder(self, **options: object) -> None:
            asked["upload"] = options

    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    with pytest.raises(UserError, match="hf auth login"):
        push.push(exported[0], "me/mine", private=True)
    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "hf_secret")
    monkeypatch.setattr(push, "hub_answers", lambda: True)
    done = CliRunner().invoke(app, ["push", str(run.path), "me/mine", "--really"])
    assert "sent to https://hub/me/mine" in done.output and "hf_secret" not in done.output
    assert asked["repo"] == ("me/mine", {"private": True, "exist_ok": True})
    assert set(asked["upload"]["allow_patterns"]) == {name for name, _ in push.files_to_push(exported[0])}
    assert json.dumps(asked["upload"]["allow_patterns"]).count("merged") == 0
    link = shutil.copytree(exported[0], run.path / "link", ignore=lambda *_: ["merged"])
    (link / "passwd.md").symlink_to("/etc/passwd")
    with pytest.raises(UserError, match=r"passwd.md is a link: only files of an export are sent"):
        push.files_to_push(link)
    (run.path / "whole").symlink_to(exported[0])
    with pytest.raises(UserError, match=r"whole is a link"):
        push.files_to_push(run.path / "whole")
    empty = shutil.copytree(exported[0], run.path / "empty", ignore=lambda *_: ["README.md", "merged"])
    with pytest.raises(UserError, match="holds nothing to send"):
        push.files_to_push(empty)
