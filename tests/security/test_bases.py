"""A base, a CLIP model or a run folder from a stranger: nothing of it runs, and nothing is loaded unasked."""

import json
import shutil
import struct
from collections.abc import Callable
from fnmatch import fnmatch
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save, save_file
from transformers import AutoTokenizer, CLIPTextModel

from ghibli.adapters.model_card import model_card
from ghibli.config.files import CHECKSUM_LINE, from_yaml, read_settings, to_yaml
from ghibli.config.paths import DEMO
from ghibli.config.schema import Config
from ghibli.evaluation.features import load_clip
from ghibli.models.base import weights_hash
from ghibli.models.hub import CLIP_FILES, HUB_FILES
from ghibli.models.load import load
from ghibli.models.safetensors import check_float, check_whole
from ghibli.runs.folder import RunDir
from ghibli.runtime.errors import UserError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of the demo base that a test may turn into an attack."""
    place = tmp_path / "theirs"
    for part in ("tokenizer", "scheduler", "text_encoder", "vae", "unet", "clip"):
        shutil.copytree(DEMO / part, place / part)
    shutil.copy(DEMO / "model_index.json", place)
    return place


def edit_json(file: Path, **changes: object) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def refused(act: Callable[[], object]) -> str:
    with pytest.raises(UserError) as caught:
        act()
    assert "\n" not in str(caught.value)
    return str(caught.value)


# Code


def test_a_tokenizers_own_code_is_not_run(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """AutoTokenizer asks whether to run it; who types y has run it."""
    marker = folder / "ran"
    code = f"open({str(marker)!r}, 'w')\nfrom transformers import CLIPTokenizer\n"
    code += "class Own(CLIPTokenizer): pass\n"
    (folder / "tokenizer" / "own.py").write_text(code)
    settings_file = folder / "tokenizer" / "tokenizer_config.json"
    edit_json(settings_file, tokenizer_class="Own", auto_map={"AutoTokenizer": ["own.Own", None]})
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    monkeypatch.setenv("HF_MODULES_CACHE", str(folder / "modules"))
    assert weights_hash(load(str(folder))) == weights_hash(load("demo"))
    assert not marker.exists()
    AutoTokenizer.from_pretrained(folder / "tokenizer", trust_remote_code=True)
    assert marker.exists(), "the attack is a real one"


def test_only_the_files_that_are_needed_are_fetched() -> None:
    def fetched(name: str, options: dict[str, list[str]]) -> bool:
        allowed = any(fnmatch(name, pattern) for pattern in options["allow_patterns"])
        return allowed and not any(fnmatch(name, pattern) for pattern in options["ignore_patterns"])

    needed = [str(file.relative_to(DEMO)) for file in DEMO.glob("*/*.*") if file.parent.name in (
        "tokenizer", "scheduler", "text_encoder", "vae", "unet")]  # fmt: skip
    assert len(needed) >= 10 and all(fetched(name, HUB_FILES) for name in needed)
    for name in (
        "tokenizer/own.py", "unet/own.py", "text_encoder/adapter_config.json", "unet/model.bin", "own.py",
        "text_encoder/adapter_model.bin", "v1-5-pruned.safetensors", "v1-5-pruned.ckpt", "tokenizer/x.pkl",
        "safety_checker/model.safetensors", "feature_extractor/config.json", "unet/a.fp16.safetensors",
    ):  # fmt: skip
        assert not fetched(name, HUB_FILES), name
        assert not fetched(name, CLIP_FILES), name
    assert all(fetched(file.name, CLIP_FILES) for file in (DEMO / "clip").iterdir())


def test_a_pickled_clip_is_refused(folder: Path) -> None:
    clip = folder / "clip"
    torch.save(load_file(clip / "model.safetensors"), clip / "pytorch_model.bin")
    (clip / "model.safetensors").unlink()
    text = refused(lambda: load_clip(str(clip)))
    assert f"model.clip={clip}: no .safetensors file in clip/; only .safetensors files are read" in text
    assert "ghibli convert" in text


# What the libraries would load beside it


@pytest.mark.parametrize("part", ["text_encoder", "unet", "clip"])
def test_an_adapter_beside_the_weights_is_not_applied(folder: Path, part: str) -> None:
    """transformers adds one without a word, and takes the base's weights from where it says."""
    content = {"peft_type": "LORA", "base_model_name_or_path": "someone/else", "target_modules": ["q_proj"]}
    (folder / part / "adapter_config.json").write_text(json.dumps(content))
    what = (lambda: load_clip(str(folder / "clip"))) if part == "clip" else (lambda: load(str(folder)))
    assert f"{part}/adapter_config.json would add an adapter to the base unasked" in refused(what)


@pytest.mark.parametrize(
    ("file", "changes", "named"),
    [
        ("scheduler/scheduler_config.json", {"num_train_timesteps": 1e11}, "num_train_timesteps=1e+11"),
        ("scheduler/scheduler_config.json", {"num_train_timesteps": -1}, "num_train_timesteps=-1"),
        ("scheduler/scheduler_config.json", {"num_train_timesteps": "many"}, "num_train_timesteps=many"),
        ("scheduler/scheduler_config.json", {"beta_end": float("nan")}, "beta_end=nan"),
        ("scheduler/scheduler_config.json", {"beta_start": 0.5}, "beta_start=0.5 is above beta_end"),
        ("scheduler/scheduler_config.json", {"trained_betas": [0.1] * 20_000}, "a list of 20000 entries"),
        ("unet/config.json", {"layers_per_block": 10**9}, "layers_per_block=1e+09"),
        ("unet/config.json", {"block_out_channels": [10**12, 64]}, "block_out_channels=1e+12"),
        ("unet/config.json", {"transformer_layers_per_block": [[1, 10**9]]}, "transformer_layers_per_block"),
        ("unet/config.json", {"some_new_key": float("inf")}, "some_new_key=inf"),
        ("vae/config.json", {"scaling_factor": 0}, "scaling_factor=0"),
        ("text_encoder/config.json", {"num_hidden_layers": 10**7}, "num_hidden_layers=1e+07"),
        ("text_encoder/config.json", {"vocab_size": 10**11}, "vocab_size=1e+11"),
        ("text_encoder/config.json", {"attn_implementation": "someone/kernel"}, "attn_implementation"),
        ("text_encoder/config.json", {"quantization_config": {"quant_method": "awq"}}, "quantization_config"),
    ],
)
def test_absurd_settings_are_named(folder: Path, file: str, changes: dict[str, object], named: str) -> None:
    edit_json(folder / file, **changes)
    text = refused(lambda: load(str(folder)))
    assert text.startswith(f"model.path={folder}: {file}") and named in text


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"size": {"height": 10**6, "width": 224}}, "height=1e+06"),
        ({"size": 10**6}, "size=1e+06"),
        ({"crop_size": {"height": 224, "width": 10**5}}, "width=1e+05"),
        ({"size": {"shortest_edge": 10**6}}, "shortest_edge=1e+06"),
    ],
)
def test_images_are_not_enlarged_to_terabytes(folder: Path, changes: dict[str, object], named: str) -> None:
    """The size that an image is brought to before CLIP or the safety checker sees it is the folder's."""
    edit_json(folder / "clip" / "preprocessor_config.json", **changes)
    text = refused(lambda: load_clip(str(folder / "clip")))
    assert text.startswith(f"model.clip={folder / 'clip'}: clip/preprocessor_config.json") and named in text


@pytest.mark.parametrize("content", ["[" * 100_000, "[]", "3", "{", '{"a": "' + "x" * 2**20 + '"}', "\udcff"])
def test_configs_that_are_none(folder: Path, content: str) -> None:
    (folder / "vae" / "config.json").write_bytes(content.encode("utf-8", "surrogateescape"))
    assert "vae/" in refused(lambda: load(str(folder)))


def test_a_text_encoder_of_gigabytes_is_not_made(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers would make what config.json asks for, 16 GB, and compare it with the file afterwards."""
    edit_json(folder / "text_encoder" / "config.json", vocab_size=1_000_000, hidden_size=4096)
    monkeypatch.setattr(CLIPTextModel, "from_pretrained", lambda *_, **__: pytest.fail("it is made"))
    text = refused(lambda: load(str(folder)))
    assert "text_encoder/ cannot be loaded: config.json asks for 4" in text


def test_weights_that_are_not_finite_or_no_floats(folder: Path) -> None:
    file = folder / "vae" / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    name = sorted(weights)[7]
    broken = weights[name].clone()
    broken.view(-1)[-1] = float("nan")
    save_file(weights | {name: broken}, file, {"format": "pt"})
    assert f"vae/ holds values that are not finite, in {name}" in refused(lambda: load(str(folder)))
    save_file(weights | {name: torch.zeros(weights[name].shape, dtype=torch.int8)}, file, {"format": "pt"})
    assert f"stores {name} as I8: a quantized model" in refused(lambda: load(str(folder)))


# Headers that lie

WHOLE = save({"a.weight": torch.zeros(2, 3), "b.bias": torch.ones(4)}, {"format": "pt"})
HEADER = json.loads(WHOLE[8 : 8 + struct.unpack("<Q", WHOLE[:8])[0]])
NUMBERS = st.sampled_from([0, 1, 24, 40, -1, 2**31, 2**63, 2**64 - 1, 2**70, 1.5, "x", None, [], {}])
ENTRY = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "F16", "I8", "I64", "F4", "nonsense", 3, None]),
        "shape": st.lists(NUMBERS, max_size=4),
        "data_offsets": st.lists(NUMBERS, max_size=3),
    }
)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(
    entries=st.dictionaries(st.text(max_size=4), ENTRY | NUMBERS, max_size=3),
    metadata=st.none() | st.dictionaries(st.text(max_size=3), NUMBERS, max_size=2),
    length=st.none() | st.integers(0, 2**64 - 1),
)
def test_a_header_that_lies_is_one_line(
    tmp_path_factory: pytest.TempPathFactory, entries: dict, metadata: dict | None, length: int | None
) -> None:
    header = json.dumps(HEADER | entries | ({} if metadata is None else {"__metadata__": metadata})).encode()
    file = tmp_path_factory.getbasetemp() / "lies.safetensors"
    file.write_bytes(struct.pack("<Q", len(header) if length is None else length) + header + bytes(40))
    text = ""
    try:
        check_whole(file, "model.path=x")
        check_float(file, "model.path=x")
    except UserError as error:
        text = str(error)
    assert "\n" not in text


# Settings of a run folder


def test_the_environment_reaches_no_card(
    make_config: Callable[..., Config], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stranger's config.yaml asks for a key of this machine, in every text that it holds."""
    monkeypatch.setenv("WANDB_API_KEY", "canary-77ab")
    lines = to_yaml(make_config("data.style=', in ink'")).partition(CHECKSUM_LINE)[0].splitlines()
    ask = "'${oc.env:WANDB_API_KEY}'"
    texts = ("  style:", "  path:", "  group:", "  root:")
    run = RunDir(tmp_path / "theirs")
    run.path.mkdir()
    changed = [f"{line.split(':')[0]}: {ask}" if line.startswith(texts) else line for line in lines]
    run.config.write_text("\n".join(changed))
    assert changed != lines
    config = from_yaml(run.config)
    assert config.data.style == config.model.path == "${oc.env:WANDB_API_KEY}"
    card = model_card(run, config, "theirs", [], [])
    for text in (card, repr(config), to_yaml(config), repr(read_settings(run.config))):
        assert "canary" not in text and "oc.env" in text
