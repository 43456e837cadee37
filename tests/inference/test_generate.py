"""Generating with trained models: which sources, which requests, and the files that are written."""

import json
import math
import os
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf
from PIL import Image
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from ghibli.adapters.names import named_layers
from ghibli.cli import images
from ghibli.cli.main import app
from ghibli.config.paths import DEMO
from ghibli.images.grid import to_image
from ghibli.inference import generate
from ghibli.inference.generate import generate_images, write_images
from ghibli.inference.load import LoadedModel, load_model
from ghibli.inference.request import Axis, ImageRequest, grid_requests, parse_axis, parse_size, read_prompts
from ghibli.inference.sources import split_weight
from ghibli.models.base import BaseModel
from ghibli.runs.folder import RunDir
from ghibli.runtime.errors import UserError

REQUEST = ImageRequest(["a red train", "a lake", "a blue house"], "ddpm", 3.0, 2, 7, (64, 64), "fog", batch=3)


def write_adapter(file: Path, base: BaseModel, seed: int = 0) -> Path:
    """Write a LoRA of rank 2 on every attention layer of the UNet, random and visible in an image."""
    random = torch.Generator().manual_seed(seed)
    state = {}
    for name, layer in named_layers(base).items():
        if name.startswith("unet") and name.endswith((".to_q", ".to_k", ".to_v", ".to_out.0")):
            outside, inside = layer.weight.shape
            state[f"{name}.lora_A.weight"] = torch.randn(2, inside, generator=random) / inside**0.5
            state[f"{name}.lora_B.weight"] = torch.randn(outside, 2, generator=random) / 2
    save_file(state, file)
    return file


@pytest.fixture(scope="module")
def plain() -> LoadedModel:
    """The base alone, to be read."""
    return load_model([], ["model=demo"])


@pytest.fixture(scope="module")
def adapter(plain: LoadedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_adapter(tmp_path_factory.mktemp("adapter") / "look.safetensors", plain.base)


@pytest.fixture(scope="module")
def loaded(adapter: Path) -> LoadedModel:
    """The base with that adapter, whose scale each call sets."""
    return load_model([str(adapter)], ["model=demo"])


# Requests


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"sampler": "eulr"}, "--sampler eulr is unknown: choose one of ddpm, ddim, euler"),
        ({"prompts": ["a train", "  "]}, "an empty prompt: give --prompt TEXT"),
        ({"prompts": []}, "an empty prompt"),
        ({"prompts": ["( [] :1.3)"]}, "an empty prompt"),
        ({"steps": 0}, "--steps 0 is out of range: from 1 to 1000"),
        ({"seed": 10**20}, "--seed 100000000000000000000: must be from 0 to 4294967295"),
        ({"seed": -1}, "--seed -1: must be from 0 to 4294967295"),
        ({"steps": 1001}, "--steps 1001 is out of range: from 1 to 1000"),
        ({"sampler": "LCM", "steps": 51}, "--steps 51 is out of range: from 1 to 50 with lcm"),
        ({"seed": 2**32 - 2}, "--seed 4294967294: with 3 images, must be from 0 to 4294967293"),
        ({"scale": math.nan}, "--scale nan is not a finite number"),
        ({"scale": -math.inf}, "--scale -inf is not a finite number"),
        ({"guidance": math.nan}, "--guidance nan is out of range: 0 (no prompt), 1 (off) or more"),
        ({"guidance": math.inf}, "--guidance inf is out of range"),
        ({"guidance": -0.5}, "--guidance -0.5 is out of range"),
        ({"batch": 0}, "--batch 0 is out of range: at least 1"),
        ({"prompts": ["a lake", "(a lake:1.3"]}, "the prompt `(a lake:1.3` has a ( without its partner"),
        (
            {"negative": "fog]"},
            "the prompt `fog]` has a ] without its partner: weights are",
        ),
        ({"negative": "caf\udce9"}, "the prompt `caf?` is not UTF-8"),
        ({"size": (100, 64)}, "--size 100: must be a multiple of 8 from 64 to 2048, such as 96"),
        ({"size": (64, 4096)}, "--size 4096: must be a multiple of 8 from 64 to 2048, such as 2048"),
        ({"size": (32, 64)}, "--size 32: must be a multiple of 8 from 64 to 2048, such as 64"),
    ],
)
def test_a_request_that_cannot_be_met_is_one_line(change: dict[str, object], words: str) -> None:
    with pytest.raises(UserError) as caught:
        replace(REQUEST, **change)
    assert str(caught.value).startswith(words) and "\n" not in str(caught.value)


def test_sizes_as_people_write_them() -> None:
    assert parse_size("512") == (512, 512)
    assert parse_size("640x384") == parse_size("640X384") == (640, 384)
    for text in ("", "x", "9" * 5000, "640x", "1x2x3", "-64", "64.5", "²"):
        with pytest.raises(UserError, match="must be a number of px, or WIDTHxHEIGHT"):
            parse_size(text)


def test_prompts_of_a_file(tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_bytes("\ufeffa train\r\n\r\n  ein Fluß \n".encode())
    assert read_prompts(file) == ["a train", "ein Fluß"]
    file.write_bytes("one\u2028line\x0band\x85more\rtwo".encode())
    assert read_prompts(file) == ["one\u2028line\x0band\x85more", "two"]
    file.write_bytes("\ufeffa train\r\n\r\n  ein Fluß \n".encode())
    for damaged in (tmp_path / "nowhere.txt", tmp_path):
        with pytest.raises(UserError, match="cannot be read as UTF-8 text"):
            read_prompts(damaged)
    file.write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match="cannot be read as UTF-8 text"):
        read_prompts(file)


# The images


def test_an_image_does_not_depend_on_what_is_drawn_with_it(loaded: LoadedModel) -> None:
    together = generate_images(loaded, REQUEST)
    assert together.shape == (3, 3, 64, 64) and 0 <= together.min() < together.max() <= 1
    for batch in (1, 2):
        assert (generate_images(loaded, replace(REQUEST, batch=batch)) - together).abs().max() < 1e-4
    second = replace(REQUEST, prompts=REQUEST.prompts[1:2], seed=REQUEST.seed + 1)
    assert (generate_images(loaded, second)[0] - together[1]).abs().max() < 1e-4
    assert (together[0] - together[1]).abs().max() > 0.1


def test_scale_nought_is_the_base_to_the_bit(loaded: LoadedModel, plain: LoadedModel) -> None:
    base = generate_images(plain, REQUEST)
    assert torch.equal(generate_images(loaded, replace(REQUEST, scale=0.0)), base)
    assert (generate_images(loaded, REQUEST) - base).abs().max() > 0.1


def test_a_weight_is_that_much_of_the_adapter(loaded: LoadedModel, adapter: Path) -> None:
    half = generate_images(load_model([f"{adapter}:0.5"], ["model=demo"]), REQUEST)
    assert (half - generate_images(loaded, replace(REQUEST, scale=0.5))).abs().max() < 1e-5
    assert (half - generate_images(loaded, REQUEST)).abs().max() > 0.01


def test_size_and_negative_prompt(loaded: LoadedModel) -> None:
    wide = replace(REQUEST, prompts=["a train"], size=(96, 64))
    assert generate_images(loaded, wide).shape == (1, 3, 64, 96)
    small = replace(REQUEST, prompts=["a train"])
    assert not torch.allclose(
        generate_images(loaded, small), generate_images(loaded, replace(small, negative="")), atol=0.01
    )
    unguided = replace(small, guidance=1.0)  # without guidance there is nothing to steer away from
    assert torch.equal(
        generate_images(loaded, unguided), generate_images(loaded, replace(unguided, negative=""))
    )


def test_clip_skip_is_used_named_and_stored(
    adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """An adapter that was trained at another one than the base is drawn at is named."""
    file = tmp_path / "look.safetensors"
    save_file(load_file(adapter), file, {"ss_clip_skip": "2"})
    words = "look.safetensors was trained at clip skip 2, and this draws at 1: model.clip_skip=2 changes that"
    first = load_model([str(file)], ["model=demo"])
    assert words in " ".join(capsys.readouterr().out.split())
    second = load_model([str(file)], ["model=demo", "model.clip_skip=2"])
    assert "clip skip" not in capsys.readouterr().out
    request = replace(REQUEST, prompts=["a red train"])
    images = [generate_images(model, request) for model in (first, second)]
    assert (images[0] - images[1]).abs().max() > 0.02
    for model, images_of, expected in ((first, images[0], False), (second, images[1], True)):
        with Image.open(write_images(images_of, request, model, tmp_path / str(expected))[0]) as opened:
            assert opened.text["parameters"].endswith("Clip skip: 2") is expected
            assert json.loads(opened.text["ghibli"]).get("clip_skip") == (2 if expected else None)


def test_weights_and_words_beyond_75_tokens_are_drawn(loaded: LoadedModel) -> None:
    """And neither depends on the batch: the short prompt's image stays the same beside a long one."""
    plain = replace(REQUEST, prompts=["a red train"], guidance=3.0)
    long = "a red train " + "by a lake " * 40
    found = {
        prompt: generate_images(loaded, replace(plain, prompts=[prompt]))[0]
        for prompt in ("a red train", "a (red:1.6) train", long, long + "and a (blue:1.2) house")
    }
    drawn = list(found.values())
    assert all((a - b).abs().max() > 2e-3 for i, a in enumerate(drawn) for b in drawn[:i])
    together = generate_images(loaded, replace(plain, prompts=["a red train", long, "a lake"], batch=3))
    assert (together[0] - found["a red train"]).abs().max() < 1e-4
    beyond = replace(plain, negative="fog, " * 60)
    negative = generate_images(loaded, replace(beyond, negative=beyond.negative + "blue house"))
    assert (generate_images(loaded, beyond) - negative).abs().max() > 1e-3


def test_a_grid_has_the_image_of_every_pair(loaded: LoadedModel) -> None:
    request = replace(REQUEST, prompts=["a red train"])
    axes = [parse_axis("guidance = 1, 3"), parse_axis("sampler=ddim,Euler a")]
    assert axes[0] == Axis("guidance", [1.0, 3.0])
    sheet = np.asarray(generate.settings_grid(loaded, request, axes))
    for guidance in (1.0, 3.0):
        for sampler in ("ddim", "euler_a"):
            cell = replace(request, guidance=guidance, sampler=sampler)
            assert shows(sheet, generate_images(loaded, cell)[0])


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["colour=1"], "--grid colour=1: choose one of sampler, guidance, steps"),
        (["steps=many"], "--grid steps=many: give values of steps"),
        (["steps="], "--grid steps=: give values of steps"),
        (["steps=1,2", "steps=3"], "--grid: give one setting or two different ones"),
        (["seed=" + ",".join(map(str, range(101)))], "--grid: at most 100 images"),
        (["steps=0"], "--steps 0 is out of range: from 1 to 1000"),
        (["sampler=eulr"], "--sampler eulr is unknown"),
    ],
)
def test_a_grid_that_cannot_be_drawn_is_one_line(words: list[str], expected: str) -> None:
    with pytest.raises(UserError) as caught:
        grid_requests(REQUEST, [parse_axis(word) for word in words])
    assert str(caught.value).startswith(expected)


def test_an_image_carries_what_makes_it_again(loaded: LoadedModel, adapter: Path, tmp_path: Path) -> None:
    images = generate_images(loaded, REQUEST)
    files = write_images(images, REQUEST, loaded, tmp_path / "out")
    assert [file.name for file in files] == ["000.png", "001.png", "002.png"]
    with Image.open(files[1]) as opened:
        notes, drawn = opened.text, np.asarray(opened)
    note = json.loads(notes["ghibli"])
    assert (note.pop("adapters"), note.pop("weights"), note.pop("base")) == ([str(adapter)], [1.0], "demo")
    again = generate_images(loaded, ImageRequest(**note | {"size": tuple(note["size"])}))[0]
    assert np.abs(again.permute(1, 2, 0).numpy() * 255 - drawn).max() < 1
    assert notes["parameters"].splitlines() == [
        "a lake",
        "Negative prompt: fog",
        "Steps: 2, Sampler: DDPM, CFG scale: 3, Seed: 8, Size: 64x64, Model: demo",
    ]


def test_a_note_is_json() -> None:
    """Which knows no NaN: whoever reads the image in another program could not parse it."""
    for value in (math.nan, math.inf):
        with pytest.raises(ValueError, match="not JSON compliant"):
            generate.note({"scale": value})


def test_sheets_leave_the_adapter_as_it_was(loaded: LoadedModel) -> None:
    """Their columns equal the images generated alone; afterwards the adapter is at its scale again."""
    request = replace(REQUEST, prompts=["a red train"])
    drawn = generate_images(loaded, request)
    sheet = np.asarray(generate.base_comparison_sheet(loaded, request, drawn))
    assert torch.equal(generate_images(loaded, request), drawn)
    strip = np.asarray(generate.adapter_scale_sheet(loaded, request))
    assert torch.equal(generate_images(loaded, request), drawn)
    tiles = [generate_images(loaded, replace(request, scale=scale))[0] for scale in (0.0, 1.0)]
    for tile in tiles:
        assert all(shows(page, tile) for page in (sheet, strip))


def shows(page: np.ndarray, image: torch.Tensor) -> bool:
    """Tell whether a sheet shows the image somewhere at twice its size."""
    height, width = (2 * side for side in image.shape[1:])
    tile = np.asarray(to_image(image).resize((width, height), Image.Resampling.LANCZOS), int)
    corners = np.argwhere((page[: 1 - height, : 1 - width] == tile[0, 0]).all(-1))
    return any((page[y : y + height, x : x + width] == tile).all() for y, x in corners)


def test_no_memory_is_one_line(loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(reason: Exception) -> None:
        def sample(*args: object, **options: object) -> None:
            raise reason

        monkeypatch.setattr(generate, "sample", sample)
        generate_images(loaded, REQUEST)

    for reason in (
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:117] data. DefaultCPUAllocator: can't allocate memory"),
        MemoryError(),
    ):
        with pytest.raises(UserError, match="not enough memory: use fewer images at once or smaller ones"):
            fails(reason)
    with pytest.raises(RuntimeError, match="shapes"):
        fails(RuntimeError("shapes do not match"))


def test_torchs_own_message_is_recognised() -> None:
    with pytest.raises(UserError, match="not enough memory"), generate.enough_memory():
        torch.empty(2**55, dtype=torch.uint8)


# Sources


def test_names_with_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert split_weight("a/b.safetensors") == ("a/b.safetensors", 1.0)
    assert split_weight("a/b.safetensors:-0.7") == ("a/b.safetensors", -0.7)
    assert split_weight("C:/look") == ("C:/look", 1.0)
    (tmp_path / "seed:3").mkdir()
    assert split_weight("seed:3") == ("seed:3", 1.0)
    with pytest.raises(UserError, match="no finished run below outputs/ yet"):
        split_weight("latest:0.5")
    for name, made in (
        ("a trained one", "adapter"),
        ("b that only measured", "samples"),
    ):
        (tmp_path / "outputs" / name / made).mkdir(parents=True)
        RunDir(tmp_path / "outputs" / name).status.update(state="finished", started=name[0])
    assert split_weight("latest:0.5") == ("outputs/a trained one", 0.5)


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("C:\\runs\\look:0.7", ("C:\\runs\\look", 0.7)),
        ("C:\\runs\\look", ("C:\\runs\\look", 1.0)),
        ("10:30:0.5", ("10:30", 0.5)),
        ("run:+.5", ("run", 0.5)),
        ("run:1e-1", ("run", 0.1)),
        ("run:", ("run:", 1.0)),
        (":0.5", (":0.5", 1.0)),
        ("run:1_0", ("run:1_0", 1.0)),
        ("run:\u0663", ("run:\u0663", 1.0)),
    ],
)
def test_weights_as_people_write_them(source: str, expected: tuple[str, float]) -> None:
    assert split_weight(source) == expected


@pytest.mark.parametrize("weight", ["nan", "inf", "-inf", "Infinity", "1e999"])
def test_a_weight_is_finite(weight: str) -> None:
    with pytest.raises(UserError, match=rf"^run:{weight}: the weight .* finite number, such as run:0.7$"):
        split_weight(f"run:{weight}")


def test_an_adapter_that_is_named_twice(adapter: Path, tmp_path: Path) -> None:
    """By one name or by two: they would add up unseen."""
    (tmp_path / "link.safetensors").symlink_to(adapter)
    for other in (adapter, tmp_path / "link.safetensors"):
        with pytest.raises(UserError, match=r"named twice: name it once, with its weight, .*:1.2$"):
            load_model([f"{adapter}:0.5", f"{other}:0.7"], ["model=demo"])


@pytest.fixture
def make_run(make_config: Callable, tmp_path: Path) -> Callable[..., str]:
    """Make a run folder with the state finished and nothing but its settings."""

    def make(name: str, *words: str) -> str:
        run = RunDir(tmp_path / name)
        run.path.mkdir()
        OmegaConf.save(OmegaConf.structured(make_config(*words)), run.config)
        run.status.update(state="finished")
        return str(run.path)

    return make


def test_sources_that_cannot_be_combined(make_run: Callable[..., str], tmp_path: Path) -> None:
    plain, idle = make_run("plain"), make_run("idle", "finetune=none")
    whole = make_run("whole", "finetune=full")
    other = make_run("other", f"model.path={DEMO}")

    def refused(*names: str) -> str:
        with pytest.raises(UserError) as caught:
            load_model(list(names), [])
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert "only measured the base: name no run" in refused(idle)
    assert "trained all weights: it cannot be combined" in refused(whole, plain)
    assert "these runs have different bases" in refused(plain, other)
    assert "nowhere" in refused(str(tmp_path / "nowhere"))


# The command


def command(*words: str) -> tuple[int, list[str]]:
    result = CliRunner().invoke(app, ["generate", *words])
    reason = [f"{result.exception}"] if isinstance(result.exception, UserError) else []
    return result.exit_code, result.output.splitlines() + reason


def test_the_command(adapter: Path, tmp_path: Path) -> None:
    """A long prompt works, none of it is lost; sheets are written if asked for."""
    out = tmp_path / "out"
    words = ("--steps", "1", "--size", "64", "--base", "--interpolate", "--to", str(out))
    code, said = command(str(adapter), "-p", "train " * 160, *words)
    assert code == 0, said
    assert "too long" not in " ".join(said)
    assert sorted(file.name for file in out.iterdir()) == ["000.png", "adapter_scales.png", "beside_base.png"]
    with Image.open(out / "000.png") as opened:
        assert opened.size == (64, 64) and json.loads(opened.text["ghibli"])["guidance"] == 7.5


QUICK = ("--steps", "1", "--size", "64", "model=demo")


def test_a_second_call_leaves_the_images_of_the_first(adapter: Path, tmp_path: Path) -> None:
    """Numbers go on after the highest one; sheets and other files there stay too."""
    out, words = tmp_path / "out", (str(adapter), "-p", "a lake", "-p", "a sea", "--base")
    out.mkdir()
    (out / "beside_base.png").write_bytes(b"mine")
    (out / "notes.png").write_bytes(b"mine")
    for _ in range(2):
        code, said = command(*words, "--to", str(out), *QUICK)
        assert code == 0, said
    assert sorted(file.name for file in out.iterdir()) == [
        "000.png", "001.png", "002.png", "003.png",
        "beside_base-2.png", "beside_base-3.png", "beside_base.png", "notes.png",
    ]  # fmt: skip
    assert (out / "beside_base.png").read_bytes() == b"mine"
    with Image.open(out / "003.png") as opened:
        assert json.loads(opened.text["ghibli"])["prompts"] == ["a sea"]


def test_ctrl_c_keeps_what_is_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    plain, calls = generate.sample, []

    def sample(*args: object, **options: object) -> torch.Tensor:
        calls.append(options["seeds"])
        if len(calls) == 3:
            raise KeyboardInterrupt
        return plain(*args, **options)

    monkeypatch.setattr(generate, "sample", sample)
    prompts = [word for letter in "abcde" for word in ("-p", letter)]
    result = CliRunner().invoke(app, ["generate", *prompts, "--batch", "2", "--to", str(tmp_path), *QUICK])
    assert result.exit_code != 0
    assert [file.name for file in sorted(tmp_path.iterdir())] == ["000.png", "001.png", "002.png", "003.png"]
    assert "4 of 5 images are done and kept as " in result.output
    with Image.open(tmp_path / "003.png") as opened:
        note = json.loads(opened.text["ghibli"])
    assert (note["prompts"], note["seed"]) == (["d"], 3)


def test_the_target_is_checked_before_a_model_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ghibli.inference.load.load_base", lambda *_: pytest.fail("loaded"))
    (tmp_path / "file").write_text("x")
    code, said = command("-p", "a lake", "--to", str(tmp_path / "file" / "out"), *QUICK)
    assert code and said[-1].startswith(f"--to {tmp_path / 'file' / 'out'}: nothing can be written there")
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=10_000))
    code, said = command("-p", "a lake", "--to", str(tmp_path / "out"), *QUICK)
    assert code and "0 MB are free on that disk and about 0 MB are needed" in said[-1]
    code, said = command("-p", "a lake", "-p", "a sea", "--seed", str(2**32 - 1), *QUICK)
    assert code and "with 2 images, must be from 0 to 4294967294" in said[-1]
    assert not (tmp_path / "out").exists()


def test_an_image_that_is_not_finite_is_not_written(adapter: Path, tmp_path: Path) -> None:
    """An adapter at 1e38 overflows; its prompt and seed are named."""
    code, said = command(
        f"{adapter}:1e38", "-p", "a lake", "--seed", "5", "--to", str(tmp_path / "o"), *QUICK
    )
    assert code and said[-1].startswith("`a lake` with seed 5, DDIM  guidance 7.5: the image has values")
    assert not (tmp_path / "o").exists()


@settings(max_examples=40, deadline=None, derandomize=True, database=None)
@given(
    st.text(st.characters(blacklist_characters="/\0", blacklist_categories=["Cs"]), min_size=1, max_size=40)
)
def test_printed_names_pasted_into_bash_are_the_files(name: str) -> None:
    assume(name not in (".", ".."))
    files = [Path(name) / "000.png", Path(name) / "004.png"]
    line = images.span(files)
    assert line.isprintable()
    words = subprocess.run(["bash", "-c", f"printf '%s\\0' {line}"], capture_output=True, check=True).stdout
    assert words.split(b"\0")[:-1] == [os.fsencode(files[0]), b"...", b"004.png"]


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        ([], "no prompt: give --prompt TEXT or --prompts FILE"),
        (["-p", "a lake", "--scale", "nan"], "--scale nan is not a finite number"),
        (["-p", "a lake", "--guidance", "inf"], "--guidance inf is out of range"),
        (["-p", "a lake", "run:nan"], "run:nan: the weight must be a finite number, such as run:0.7"),
        (["-p", ""], "an empty prompt: give --prompt TEXT"),
        (
            ["-p", "a lake", "--size", "100"],
            "--size 100: must be a multiple of 8 from 64 to 2048, such as 96",
        ),
        (["-p", "a lake", "modle=demo"], "modle"),
        (["-p", "a lake", "--interpolate"], "--interpolate varies the scale of an adapter"),
        (["-p", "a lake", "--base"], "--base draws the base above what was trained"),
        (["-p", "a lake", "--scale", "0.5"], "--scale 0.5 is a factor on adapters, and none is loaded"),
        (["-p", "a lake", "--grid", "scale=0,0.5"], "--scale 0.5 is a factor on adapters, and none is"),
        (["-p", "a lake", "--hires-strength", "0.3"], "--hires-strength is that of a second pass"),
        (["-p", "a lake", "--grid", "hires_strength=0.3,0.5"], "--grid hires_strength is that of a second"),
        (["-p", "a lake", "model=demo", "lora.rank=8"], "lora.rank=8 changes nothing here: only model.*"),
        (["-p", "a lake", "model=demo", "data.caption=x"], "data.caption=x changes nothing here"),
    ],
)
def test_errors_of_the_command(words: list[str], reason: str) -> None:
    code, said = command(*words, *(["model=demo"] if not any("=" in word for word in words) else []))
    assert code and reason in said[-1]
