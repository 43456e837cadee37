"""conf/ composes, its defaults are the reference study's, and every user error gets one quick line."""

import inspect
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import fields, is_dataclass, replace
from functools import cache
from itertools import product
from pathlib import Path

import pytest
from helpers.commands import REPO, run_python
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

import train
from ghibli.config import files, keys
from ghibli.config.schema import Command, Config
from ghibli.data.validation_items import images_in_a_pass
from ghibli.runs import identity, launch
from ghibli.runs.compose import LONGEST_NAME, folder_name, register, to_config
from ghibli.runs.folder import RunDir
from ghibli.runtime.files import write_with_checksum
from ghibli.training.callbacks import resume_check

CONF = REPO / "conf"
DEMO = ("model=demo", "data=demo")


def names_in(group: str) -> list[str]:
    return sorted(path.stem for path in (CONF / group).glob("*.yaml"))


@cache
def composed(*overrides: str, conf: Path = CONF) -> Config:
    """Return the settings that `train.py` would train with; tests only read them."""
    register()
    with initialize_config_dir(str(conf), version_base="1.3"):
        return to_config(compose("train", overrides=list(overrides)))


# conf/ as it stands


@pytest.mark.parametrize(("model", "data"), list(product(names_in("model"), names_in("data"))))
def test_every_model_with_every_data_set(model: str, data: str) -> None:
    settings = composed(f"model={model}", f"data={data}", "data.root=images")
    assert settings.optimizer.lr == settings.model.lr
    assert settings.trainer["accumulate_grad_batches"] == settings.data.accumulate


@pytest.mark.parametrize("experiment", names_in("experiment"))
def test_every_experiment(experiment: str) -> None:
    """On both bases, with the sizes of that base's own configuration."""
    real = ("model=sd15", "data=ghibli", "data.root=images")
    for words in (DEMO, real):
        plain, own = composed(*words), composed(*words, f"experiment={experiment}")
        assert own.model == plain.model
        assert own.data == replace(plain.data, resize=own.data.resize)  # the reference study squashed
        assert own.trainer["max_epochs"] == plain.data.epochs
        tenth = 0.1 if experiment == "full_finetune" else 1
        assert own.optimizer.lr == pytest.approx(tenth * plain.model.lr)


def test_the_defaults_are_those_of_the_reference_study() -> None:
    settings = composed("model=sd15", "data=ghibli", "data.root=images")
    lora, optimizer = settings.lora, settings.optimizer
    assert (lora.rank, lora.alpha, lora.dropout) == (32, 64, 0.1)
    assert (optimizer.name, optimizer.lr, optimizer.weight_decay) == ("adamw", 1e-4, 0.01)
    assert optimizer.schedule == "cosine_epochs"
    assert (settings.trainer["max_epochs"], settings.early_stopping.patience) == (10, 3)
    assert (settings.loss.guidance, settings.loss.caption_dropout) == (1, 0.1)
    assert settings.loss.noise_schedule == "base"
    assert (settings.data.batch_size, settings.data.accumulate, settings.data.val_fraction) == (1, 4, 0.1)
    assert (settings.model.resolution, settings.data.resize) == (512, "bucket")
    slides = composed("model=sd15", "data=ghibli", "data.root=images", "experiment=slides")
    assert slides.data.resize == "squash"
    assert settings.sample.prompts == [
        "A panda on the top of the train, Studio Ghibli style",
        "A girl standing in a greenhouse, Studio Ghibli style",
    ]
    assert (settings.finetune, settings.seed, settings.resume) == ("lora", 0, None)
    demo = composed(*DEMO)
    assert (demo.lora, demo.loss, demo.sample) == (lora, settings.loss, settings.sample)
    own = {"accumulate_grad_batches": demo.data.accumulate, "max_epochs": demo.data.epochs}
    assert demo.trainer == settings.trainer | own


def test_the_probe_is_cheap() -> None:
    """Counted in UNet passes; a training example takes three: forward, and backward twice that.

    What fills up a pass counts too. In time the demo's share is smaller: docs/understanding.md.
    Includes the images scored at each checkpoint; tests/training/test_base_scores.py counts a real epoch.
    """

    def share(settings: Config, training: int, held_out: int) -> float:
        data = settings.data
        steps = training // (data.batch_size * settings.trainer["accumulate_grad_batches"])
        saves = steps // settings.checkpoint.every_n_steps + 1  # and at the end of the epoch
        probed = 2 * min(settings.validation.max_images, held_out)
        items = settings.validation.items_per_image
        groups, together = (
            -(-settings.validation.price_images // items),
            images_in_a_pass(settings.model.resolution, items),
        )
        scored = -(-(probed + groups) // together) * together + resume_check.IMAGES * saves
        return scored * items / (3 * training)

    assert share(composed("model=sd15", "data=ghibli", "data.root=images"), 2250, 250) <= 0.12
    assert share(composed(*DEMO), 500 - 54, 54) <= 0.36  # what its own images split into


def test_experiment_slides_asrun_repeats_the_errors_only() -> None:
    asrun, plain = composed(*DEMO, "experiment=slides_asrun"), composed(*DEMO)
    assert (asrun.loss.noise_schedule, asrun.loss.timesteps, asrun.loss.caption_dropout) == (
        "linear", "independent", 0,
    )  # fmt: skip
    assert (asrun.early_stopping.watch, asrun.early_stopping.patience) == ("train_loss", 3)
    assert (asrun.lora, asrun.optimizer, asrun.model, asrun.data) == (
        plain.lora, plain.optimizer, plain.model, plain.data,
    )  # fmt: skip


def test_a_trials_folder_name_fits_any_file_system() -> None:
    assert folder_name("lora.rank=4,loss.guidance=7.5") == "lora.rank=4,loss.guidance=7.5"
    assert folder_name("model.path=a/b") == "model.path=a_b"
    assert folder_name("") == "defaults"
    long = [folder_name("lora.rank=4," * 40 + last) for last in ("a", "b")]
    assert all(len(name) == LONGEST_NAME for name in long) and long[0] != long[1]
    for letter in ("ジ", "ä", "\U0001f600", "\udce9"):  # of 3, 2 and 4 bytes, and a byte that is not UTF-8
        name = folder_name(f"data.root={letter * 200}")
        assert len(os.fsencode(name)) <= LONGEST_NAME


def test_experiment_slides_changes_nothing() -> None:
    assert composed(*DEMO, "experiment=slides") == composed(*DEMO)


def test_yaml_and_back(tmp_path: Path) -> None:
    settings = composed(*DEMO, "lora.rank=8", "loss.snr_gamma=5", "+trainer.max_steps=7")
    (tmp_path / "config.yaml").write_text(files.to_yaml(settings))
    assert files.from_yaml(tmp_path / "config.yaml") == settings


def commented_fields(section: type) -> Iterator[tuple[str, bool]]:
    """Yield (full key, whether its line in the dataclass has a comment) for a section and those inside it."""
    for field in fields(section):
        if is_dataclass(field.type):
            assert field.type.__doc__
            yield from ((f"{field.name}.{key}", said) for key, said in commented_fields(field.type))
        else:
            line = re.search(rf"^    {field.name}: .*", inspect.getsource(section), re.M)
            yield field.name, "  # " in line[0]


def commented_lines(path: Path) -> dict[str, bool]:
    """Return full key -> whether its line in a YAML file has a comment."""
    found: dict[str, bool] = {}
    above: list[str] = []
    for line in path.read_text().splitlines():
        match = re.match(r"( *)([a-z_0-9]+):", line)
        if match:
            above = [*above[: len(match[1]) // 2], match[2]]
            found[".".join(above)] = " # " in line
    return found


def test_every_key_is_explained() -> None:
    said = {key for key, is_said in commented_fields(Config) if is_said}
    screen = commented_lines(CONF / "train.yaml")
    said |= {key for key, is_said in screen.items() if is_said}
    for group in ("model", "data"):
        for name in names_in(group):
            lines = commented_lines(CONF / group / f"{name}.yaml")
            said |= {f"{group}.{key}" for key, is_said in lines.items() if is_said}
    known = {*keys.all_keys(Config), *(key for key in screen if key.startswith("trainer."))}
    assert sorted(known - said) == []


# conf/local/default.yaml


@pytest.fixture
def local_conf(tmp_path: Path) -> Callable[[str], Path]:
    """Make a copy of conf/ whose local/default.yaml holds the given text."""

    def make(text: str) -> Path:
        conf = tmp_path / "conf"
        shutil.copytree(CONF, conf, ignore=shutil.ignore_patterns("local"))
        (conf / "local").mkdir()
        (conf / "local" / "default.yaml").write_text(text)
        return conf

    return make


CHOOSING = """# @package _global_
defaults:
  - override /model: sd15
  - override /data: ghibli
local:
  sd15: models/sd15
  ghibli: images/ghibli
"""


def test_the_local_file_sets_paths(local_conf: Callable) -> None:
    conf = local_conf("sd15: models/sd15\nghibli: images/ghibli\n")
    assert composed(conf=conf).model.path == "demo"
    settings = composed("model=sd15", "data=ghibli", conf=conf)
    assert (settings.model.path, settings.data.root) == ("models/sd15", "images/ghibli")


def test_the_local_file_may_choose_and_the_command_line_wins(local_conf: Callable) -> None:
    conf = local_conf(CHOOSING)
    settings = composed(conf=conf)
    assert (settings.model.path, settings.data.root) == ("models/sd15", "images/ghibli")
    assert (settings.optimizer.lr, settings.data.accumulate) == (1e-4, 4)
    demo = OmegaConf.to_container(OmegaConf.structured(composed(*DEMO, conf=conf)))
    plain = OmegaConf.to_container(OmegaConf.structured(composed(*DEMO)))
    assert demo.pop("local") != plain.pop("local")
    assert demo == plain
    assert composed("data.root=other", conf=conf).data.root == "other"


# User errors


ONE_PROCESS = """
import contextlib, io, json, sys, time, warnings
sys.path.insert(0, sys.argv[1])
warnings.simplefilter("error")
import train
from ghibli.runs.launch import hydra_entry

answers = []
for words in json.load(sys.stdin):
    sys.argv[1:] = words
    said, start = io.StringIO(), time.process_time()
    try:
        with contextlib.redirect_stderr(said):
            hydra_entry(train.Path(train.__file__).parent / "conf", "train", train.main)
        code = 0
    except SystemExit as leave:
        code = leave.code
    answers.append((code, said.getvalue(), time.process_time() - start))
print(json.dumps([answers, "torch" in sys.modules]))
"""

ERRORS = {
    # unknown keys
    "lora.rnak=3": "unknown key lora.rnak; did you mean rank? (known in lora: rank, alpha,",
    "+lora.rnak=3": "unknown key lora.rnak; did you mean rank?",
    "rank=3": "unknown key rank; did you mean lora.rank?",
    "lr=3": "unknown key lr; did you mean model.lr or optimizer.lr?",
    "+data.draw.colour=3": "unknown key data.draw.colour (known in data.draw: look, count)",
    "trainer.nonsense=3": "trainer.nonsense is not a flag of lightning.Trainer",
    "~trainer.max_epochs": "trainer.max_epochs is missing: conf/train.yaml has its default",
    "+trainer.max_epoch=3": "trainer.max_epoch is not a flag of lightning.Trainer; did you mean max_epochs?",
    "trainer.max_steps=3": "trainer.max_steps has no default here: add it with a plus, +trainer.max_steps=",
    "+trainer.max_epochs=3": "trainer.max_epochs has a value already: drop the plus",
    "+trainer.callbacks=[]": "trainer.callbacks cannot be set: train.py sets it itself",
    "+trainer.enable_progress_bar=true": "trainer.enable_progress_bar cannot be set: train.py sets it itself",
    "+trainer.fast_dev_run=true": "trainer.fast_dev_run cannot be set: every run is validated on all",
    "+trainer.limit_val_batches=0": "trainer.limit_val_batches cannot be set: every run is validated",
    "+trainer.limit_train_batches=3": "trainer.limit_train_batches cannot be set: a resumed run",
    # unknown names
    "model=sd16": "model=sd16 is unknown: choose one of demo, demo_near, sd15; did you mean sd15?",
    "data=gibli": "data=gibli is unknown: choose one of demo, ghibli; did you mean ghibli?",
    "experiment=slide": "experiment=slide is unknown: choose one of",
    "+experiment=slides": "experiment is given more than once: give it once, experiment=NAME without a",
    "experiment=null": "model, data, grid and experiment take a name, such as model=sd15; leave one out",
    "--config-name=nope": "Cannot find primary config 'nope'",
    "finetune=lorra": "finetune=lorra is unknown: choose one of lora, full, none; did you mean lora?",
    "optimizer.schedule=linear": "optimizer.schedule=linear is unknown: choose one of cosine_epochs,",
    "data.draw.look=paint": "data.draw.look=paint is unknown: choose one of drawn, photo",
    "sample.samplers=[heun]": "sample.samplers=heun is unknown: choose one of ddpm, ddim",
    # types
    "lora.rank=1.5": "lora.rank=1.5: expected a whole number",
    "++lora.rank=two": "lora.rank=two: expected a whole number",
    "lora.rank=null": "lora.rank=null: expected a value, not null",
    "loss.terms=5": "loss.terms=5: expected entries, each with a plus: +KEY.NAME=VALUE",
    "lora.text_encoder=maybe": "lora.text_encoder=maybe: expected true or false",
    "data.val_fraction=10%": "data.val_fraction=10%: expected a number",
    "sample.prompts=panda": "sample.prompts=panda: expected a list, [VALUE,VALUE]",
    "lora=3": "lora=3: expected a section; set its keys instead (rank, alpha, dropout,",
    # ranges
    "lora.rank=0": "lora.rank=0 is out of range: a whole number from 1 to 1024",
    "lora.dropout=1": "lora.dropout=1 is out of range: from 0 to less than 1",
    "lora.alpha=inf": "lora.alpha=inf is out of range",
    "loss.guidance=-1": "loss.guidance=-1 is out of range: 1 (off) or more; 7.5 is the reference study's",
    "optimizer.lr=nan": "optimizer.lr=nan is out of range: more than 0 and at most 1",
    "optimizer.betas=[0.9]": "optimizer.betas=[0.9] is out of range: two numbers",
    "model.resolution=100": "model.resolution=100 is out of range: a multiple of 64",
    "trainer.max_epochs=0": "trainer.max_epochs=0 is out of range: a whole number from 1",
    "trainer.gradient_clip_val=-1": "trainer.gradient_clip_val=-1 is out of range: more than 0, or null",
    "trainer.accelerator=mps": "trainer.accelerator=mps is untested and not supported: use gpu",
    "trainer.precision=bf16-true": "trainer.precision=bf16-true would hold the LoRA weights in 16 bits",
    "trainer.precision=16": "trainer.precision=16 is unknown: choose one of auto, auto-16, 32-true,",
    "seed=-1": "seed=-1 is out of range",
    # two at once
    "lora.rnk=3 optimizer.lrr=3": "targets, variant, init); and: unknown key optimizer.lrr; did you mean lr?",
    "lora.rank=0 optimizer.lr=-3": "a whole number from 1 to 1024; and: optimizer.lr=-3 is out of range",
    # syntax
    "lora.rank=[": "cannot parse `lora.rank=[`: expected KEY=VALUE without spaces around =",
    "lora.rank": "cannot parse `lora.rank`: expected KEY=VALUE",
    "=3": "cannot parse `=3`: expected KEY=VALUE",
    "data.style=, in ink": "cannot parse `data.style=, in ink`: ",
    "lora.rank=16,32": "lora.rank=16,32 is ambiguous: write a list as KEY=[a,b]; a grid of runs needs -m",
    "cache_dir=${nowhere}": "cache_dir depends on a key that is not set",
    # paths
    "data=ghibli": "data.root is not set: give an image folder, data.root=DIR, or use data=demo",
    "data.root=nowhere": "data.root=nowhere: data=demo would draw its own images there; for yours",
    "data.draw=null data.root=nowhere": "data.root=nowhere: no such folder",
    "data.draw=null data.root=file": "data.root=file: that is a file, not a folder",
    "model.path=./nowhere": "model.path=./nowhere: no such folder or file, and not a hub id (OWNER/NAME)",
    "model.path=./mine": "is not a diffusers folder of Stable Diffusion 1.5: it has no tokenizer/*.json,",
    "model.path=./model.ckpt": "model.path=./model.ckpt: only .safetensors files are read, because loading",
    "model.path=runwayml/stable-diffusion-v1-5": "gone from the hub: use stable-diffusion-v1-5/",
    "hydra.run.dir=file/x": "cannot make the run folder file/x (Not a directory): choose another, hydra.run",
    "hydra.run.dir=file": "cannot make the run folder file (File exists): choose another",
    "hydra.run.dir=/proc/x": "cannot make the run folder /proc/x (",
    "hydra.run.dir=old": "old already holds a run, and its status.json does not say which one: resume it",
    "hydra.run.dir=done lora.rank=3": "done already holds a run with other settings: lora.rank is 32 there,",
    "hydra.run.dir=done": "done already holds this run, made by other code (commit abc), so its result may",
    # resume
    "resume=nowhere": "resume=nowhere: no such folder (`ghibli list` shows the runs)",
    "resume=latest": "resume=latest: no run with a checkpoint below outputs/",
    "resume=mine": "resume=mine: this folder has no checkpoints/last.ckpt to resume from",
    "resume=cut": "resume=cut: cut/checkpoints/last.ckpt is damaged or cut off",
    "resume=edited": "edited/config.yaml is not a run's configuration of this version: unknown key sed; did",
    "resume=old lora.rank=3 seed=1": "1 requested; lora.rank is 32 in this run, 3 requested; only",
    "resume=old lora.rank=32 seed=1": "resume=old: seed is 0 in this run, 1 requested; only trainer.max",
    "resume=old model=demo data=ghibli": "resume=old: data is demo in this run, ghibli requested; only",
    "resume=old experiment=slides": "resume=old: experiment is null in this run, slides requested; only",
    "resume=old trainer.max_epochs=3": "resume=old: trainer.max_epochs is 6 in this run, 3 requested; only",
    "resume=old data.epochs=3": "resume=old: data.epochs is 6 in this run, 3 requested; trainer.max_epochs",
    "resume=old trainer.max_epochs=9 seed=1": "resume=old: seed is 0 in this run, 1 requested; only",
    "resume=old trainer.max_epochs=many": "trainer.max_epochs=many is out of range: a whole number from 1",
    "resume=old +trainer.max_steps=9": "trainer.max_steps is not set in this run, 9 requested; only",
    "resume=old +trainer.bogus=9": "trainer.bogus is not a flag of lightning.Trainer",
    "resume=old ~trainer.devices": "a resumed run keeps its own settings: drop ~trainer.devices",
    "resume=old hydra.run.dir=new": "a resumed run continues in its own folder: drop hydra.run.dir=new",
    "resume=moved model=demo": "data.root=gone: no such folder",
    "-m resume=old": "resume continues one run at a time: drop -m",
}  # fmt: skip


def make_run(folder: Path, settings: Config) -> None:
    """Make a run folder with all that `resume` reads before anything is loaded."""
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "config.yaml").write_text(files.to_yaml(settings))
    write_with_checksum(folder / "checkpoints" / "last.ckpt", lambda file: file.write(b"weights"))
    (folder / ".hydra").mkdir()
    choices = {"hydra": {"runtime": {"choices": {"model": "demo", "data": "demo"}}}}
    OmegaConf.save(OmegaConf.create(choices), folder / ".hydra" / "hydra.yaml")


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[int, str, float]]:
    """Make every error in one process: exit code, stderr, CPU seconds. No folder, no torch."""
    here = tmp_path_factory.mktemp("user")
    (here / "file").write_text("")
    (here / "model.ckpt").write_text("")
    (here / "mine" / "unet").mkdir(parents=True)
    for name in ("old", "cut", "edited", "done"):
        make_run(here / name, composed(*DEMO))
    marks = {"settings_hash": identity.settings_hash(composed(*DEMO)), "code_hash": "", "git_commit": "abc"}
    RunDir(here / "done").status.update(state="finished", **marks)
    make_run(here / "moved", composed(*DEMO, "data.draw=null", "data.root=gone"))
    whole = (here / "cut" / "checkpoints" / "last.ckpt").read_bytes()
    (here / "cut" / "checkpoints" / "last.ckpt").write_bytes(whole[:-30])
    with open(here / "edited" / "config.yaml", "a") as file:
        file.write("sed: 3\n")
    before = sorted(here.rglob("*"))
    commands = [[*DEMO, command] for command in ERRORS]
    for index, command in enumerate(ERRORS):
        if not command.startswith("data.style"):
            words = command.split()
            is_group = {word.split("=")[0] for word in words} & {"model", "data", "resume"}
            commands[index] = words if is_group or "-m" in words else [*DEMO, *words]
    words = [sys.executable, "-c", ONE_PROCESS, str(REPO)]
    done = subprocess.run(
        words, cwd=here, input=json.dumps(commands), capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    said, has_torch = json.loads(done.stdout)
    assert not has_torch
    assert sorted(here.rglob("*")) == before
    return dict(zip(ERRORS, said, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("command", ERRORS)
def test_an_error_is_explained_in_one_line(answers: dict, command: str) -> None:
    code, said, seconds = answers[command]
    assert code == 2
    assert said.startswith("error: ")
    assert said.count("\n") == 1
    assert ERRORS[command] in said
    assert seconds < 4  # of processor time on a slow machine; importing torch would take longer


def test_the_real_command_answers_before_torch_is_imported(tmp_path: Path) -> None:
    done = run_python("-X", "importtime", str(REPO / "train.py"), *DEMO, "lora.rank=0", cwd=tmp_path)
    imports = [line.rsplit("|", 1)[-1].strip() for line in done.stderr.splitlines() if "import time" in line]
    said = [line for line in done.stderr.splitlines() if "import time" not in line]
    assert done.returncode == 2
    assert said == ["error: lora.rank=0 is out of range: a whole number from 1 to 1024"]
    assert done.stdout == ""
    assert "ghibli.config.schema" in imports
    assert not {"torch", "lightning", "diffusers", "numpy"} & set(imports)
    assert not list(tmp_path.iterdir())


# --help and --cfg


@pytest.fixture
def printed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> Callable[..., str]:
    """Return what train.py prints on stdout for these arguments; it must not train."""

    def run(*words: str) -> str:
        monkeypatch.setattr(sys, "argv", ["train.py", *words])
        with pytest.raises(SystemExit) if "--help" in words else nullcontext():
            launch.hydra_entry(CONF, "train", train.main)
        captured = capsys.readouterr()
        assert captured.err == ""
        return captured.out

    return run


def test_help_names_commands_that_compose(printed: Callable[..., str]) -> None:
    text = printed("--help")
    for words in (
        "python train.py resume=latest",
        "python train.py -m",
        "--cfg job",
        "model: demo, demo_near, sd15",
    ):
        assert words in text
    assert "Hydra" not in text
    assert max(map(len, text.splitlines())) <= 110
    commands = re.findall(r"^python train.py (\S.*?)(?:   |$)", text, re.M)
    assert len(commands) >= 6
    for command in commands:  # each one is a command that composes
        words = [word.replace("DIR", "images") for word in command.split() if "=" in word]
        if "-m" not in command and "data=ghibli" not in command and not command.startswith("resume"):
            composed(*words)


def test_cfg_job_prints_settings_that_compose_again(printed: Callable[..., str]) -> None:
    text = printed("--cfg", "job", *DEMO, "lora.rank=8")
    content = OmegaConf.create(text)
    assert content.lora.rank == 8
    assert content.lora.alpha == 16
    assert list(content) == [field.name for field in fields(Command)]


@pytest.mark.parametrize(
    ("words", "alpha"),
    [
        (("lora.rank=8",), 16),
        (("lora.rank=64",), 128),
        (("lora.rank=8", "lora.variant=rslora"), 16),
        (("lora.rank=64", "lora.variant=rslora"), 16),
        (("lora.rank=64", "lora.variant=rslora", "lora.alpha=5"), 5),
    ],
)
def test_the_default_alpha_follows_rank_but_for_rslora(words: tuple[str, ...], alpha: float) -> None:
    assert composed(*DEMO, *words).lora.alpha == alpha


def test_multirun_may_stand_between_the_words(tmp_path: Path) -> None:
    done = run_python(str(REPO / "train.py"), "lora.rank=4,8", "-m", "lora.dropout=0,7", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch(
        r"error: trial lora.rank=4, lora.dropout=7: lora.dropout=7.* is out of range.*\n", done.stderr
    )
