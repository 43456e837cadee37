"""The run doctor: real runs, each broken in one way, and a healthy one."""

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers.commands import CACHE, CHECKPOINTS

import train
from ghibli.data import latents
from ghibli.demo.scenes.scene import FINETUNE_SEEDS, write_folder
from ghibli.evaluation import diagnosis
from ghibli.evaluation.diagnosis import Finding
from ghibli.evaluation.gain import Probe
from ghibli.images.resize import preprocess
from ghibli.runs.folder import RunDir
from ghibli.runtime.errors import UserError
from ghibli.training.callbacks.diagnosis import Doctor
from ghibli.training.callbacks.progress import worse_range_line
from ghibli.training.loggers.dashboard import DashboardLogger
from ghibli.training.loggers.wandb_logger import WandbDashboard
from ghibli.training.module import GhibliModule

QUIET = ("early_stopping.patience=null", "data.batch_size=4", "data.accumulate=1")
COARSE = "model.resolution=64"  # where no number is looked at


@pytest.fixture(scope="module")
def half_held_out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 images, to be split in half: enough held-out images for small standard errors."""
    root = tmp_path_factory.mktemp("doctor")
    write_folder(root, "drawn", 40, FINETUNE_SEEDS.start + 500)
    return root


@pytest.fixture
def findings(make_config: Callable, half_held_out: Path, tmp_path: Path) -> Callable[..., dict[str, str]]:
    """Trains in this process and returns the findings in status.json, name -> text."""

    def run(*overrides: str) -> dict[str, str]:
        words = (
            f"data.root={half_held_out}", "data.val_fraction=0.5", f"cache_dir={CACHE}",
            "model.resolution=128", *QUIET,
        )  # fmt: skip
        try:
            train.run(make_config(*words, *overrides), RunDir(tmp_path))
        finally:
            found = json.loads((tmp_path / "status.json").read_text()).get("findings", [])
        return {finding["name"]: finding["text"] for finding in found}

    return run


def probe_with(gains: list[float]) -> Probe:
    """A probe of 30 images with about these gains in four parts, whose losses fall like the demo's."""
    draws = torch.Generator().manual_seed(0)
    base = torch.tensor([72.0, 20.0, 7.1, 0.9]) * (0.5 + torch.rand(30, 4, generator=draws))
    ours = base * (1 - torch.tensor(gains) + 0.1 * torch.randn(30, 4, generator=draws))
    return Probe(val=ours, val_g1=ours, train=ours, base_val=base, base_train=base)


def test_a_part_of_the_timesteps_that_is_worse_is_told() -> None:
    """In the terminal's line and by the doctor; not where the part is no worse than chance."""
    healthy, worse = probe_with([0.5, 0.5, 0.3, 0.01]), probe_with([0.54, 0.5, 0.26, -0.84])
    assert diagnosis.worse_at_some_noise(healthy) is None
    assert worse_range_line(healthy, 1000) == ""
    text = diagnosis.worse_at_some_noise(worse).text
    assert text.startswith("in part 4 of 4 of the timesteps (1 = least noise) held-out images are 8")
    assert "has 0.8 % of the base's loss" in text
    line = worse_range_line(worse, 1000)
    assert re.fullmatch(
        r"  by timestep: 0-249 \+5\d %, 250-499 \+\d\d %, 500-749 \+\d\d %, 750-999 -8\d \+- \d %", line
    )
    assert len(line) <= 80
    assert diagnosis.worse_at_some_noise(probe_with([-0.5, -0.5, -0.3, -0.8])) is None  # other rules' matter


def bought(epochs: list[tuple[float, float]], groups: int = 7) -> list[Probe]:
    """Probes after epochs with these gains and prices, on 30 images and some groups, with some scatter."""
    draws = torch.Generator().manual_seed(0)
    base, base_price = torch.rand(30, 4, generator=draws) + 0.5, torch.rand(groups, 4, generator=draws) + 0.5
    found = []
    for gain, price in epochs:
        ours = base * (1 - gain * (1 + 0.05 * torch.randn(30, 4, generator=draws)))
        forgot = base_price * (1 + price * (1 + 0.05 * torch.randn(groups, 4, generator=draws)))
        found.append(Probe(ours, ours, ours, base, base, forgot, base_price))
    return found


def test_an_epoch_that_costs_more_than_it_teaches_is_told(make_config: Callable) -> None:
    """By what the last epoch added alone, beyond its error, and not for a trifle."""
    config = make_config()
    text = diagnosis.forgets_faster(bought([(0, 0), (0.5, 0.1), (0.55, 0.2)]), config).text
    assert re.match(r"in epoch 2 the loss on held-out images fell by 0\.0[45]\d\d \+- 0\.00\d\d, and ", text)
    assert re.search(r"made for rose by 0\.(09|10)\d\d \+- 0", text)
    assert "trainer.max_epochs=1" in text and "loss.keep=" in text
    quiet = [
        bought([(0, 0), (0.5, 0.1)]),
        bought([(0, 0), (0.1, 0.3), (0.4, 0.4)]),  # the first epoch is told in its time
        bought([(0, 0), (0.5, 0.1), (0.5, 0.105)]),
        bought([(0, 0), (0.5, 0.1), (0.55, 0.2)], groups=2),
        [probe_with([0.5] * 4), probe_with([0.1] * 4)],  # without a price
    ]
    assert [diagnosis.forgets_faster(history, config) for history in quiet] == [None] * 5
    found = diagnosis.after_epoch(bought([(0, 0), (0.1, 0.3)]), config)
    assert [finding.name for finding in found] == ["forgets faster than it learns"]
    full = diagnosis.forgets_faster(bought([(0, 0), (0.1, 0.3)]), make_config("finetune=full"))
    assert "loss.keep" not in full.text


def test_a_guided_target_is_judged_where_it_predicts_the_noise(make_config: Callable) -> None:
    """Its conditional branch is meant to be far from the noise, (s - 1)^2 times what guidance moves."""
    config = make_config("loss.guidance_target=7.5")
    base = probe_with([0] * 4).base_val / 100  # of a base that knows the images
    start = Probe(val=1.1 * base, val_g1=base, train=1.1 * base, base_val=base, base_train=base)
    good = replace(start, val=0.5 * base, train=0.5 * base, val_g1=42 * base)
    assert [finding.name for finding in diagnosis.after_epoch([start, good], config)] == []
    zero = replace(start, val=torch.ones(30, 4), train=torch.ones(30, 4))  # what always predicting it scores
    assert "collapse" in [finding.name for finding in diagnosis.after_epoch([start, zero], config)]
    guided = make_config("loss.guidance=7.5")
    assert "collapse" not in [finding.name for finding in diagnosis.after_epoch([start, zero], guided)]


def test_the_scale_of_a_guided_target_is_told() -> None:
    text = diagnosis.guided_sampling_scale(1 / 3).text
    assert text.startswith("trained with loss.guidance_target=3, ") and "sample at about 2.5, a" in text
    assert "guess that follows from the loss" in text and "nearer to real images at larger scales" in text
    assert "guides twice" not in text and "`ghibli evaluate RUN` tries more" in text
    assert diagnosis.guided_sampling_scale(1) is None


def test_a_scale_that_was_not_measured_is_called_a_guess() -> None:
    """Only trainings at 1 and 7.5 were."""
    measured, guessed = (diagnosis.guided_sampling_scale(guidance).text for guidance in (7.5, 4))
    assert "sample at about 15, the last column of the grids (`ghibli evaluate RUN`" in measured
    assert "sample at about 11, the last column of the grids, a guess from trainings at 7.5 on the" in guessed


@pytest.mark.slow
def test_a_healthy_run_has_no_finding(findings: Callable, capsys: pytest.CaptureFixture) -> None:
    assert findings("trainer.max_epochs=4") == {}
    said = capsys.readouterr().out
    assert "doctor   nothing to report" in said
    line = r"epoch 4  better than the base by \d+\.\d % \+- \d\.\d % on held-out images \(train \d+\.\d %\)"
    assert re.search(line, said)


@pytest.mark.slow
def test_noise_schedule(findings: Callable, capsys: pytest.CaptureFixture) -> None:
    found = findings("experiment=slides_asrun", "trainer.max_epochs=1", "data.epochs=1", COARSE)
    seen = (
        "at timestep 500 the base expects noise with an amplitude of 0.851 and this training gives it 0.960"
    )
    assert seen in found["noise schedule"]
    assert "doctor: noise schedule: at timestep 500" in capsys.readouterr().out


@pytest.mark.slow
def test_learning_rate_too_low(findings: Callable) -> None:
    found = findings("trainer.max_epochs=3", "optimizer.lr=1e-8")
    assert set(found) == {"no learning"}
    assert "after 3 epochs" in found["no learning"] and "try optimizer.lr=3e-08" in found["no learning"]


@pytest.mark.slow
def test_an_adapter_without_effect(findings: Callable) -> None:
    found = findings("trainer.max_epochs=1", "optimizer.lr=1e-30", COARSE)
    assert set(found) == {"no effect"}


@pytest.mark.slow
def test_learning_rate_too_high(findings: Callable) -> None:
    found = findings("trainer.max_epochs=1", "optimizer.lr=0.027", "validation.items_per_image=8")
    assert set(found) == {"learning rate too high"}
    advice = "start again with a third of the learning rate, optimizer.lr=0.009"
    assert advice in found["learning rate too high"]


@pytest.mark.slow
def test_collapse(findings: Callable) -> None:
    """At a rate so high that no processor's rounding keeps the loss below the bound."""
    found = findings("trainer.max_epochs=1", "optimizer.lr=0.1")
    assert set(found) == {"collapse"}
    assert "always predicting zero scores 1.0" in found["collapse"]
    assert "optimizer.lr=0.01" in found["collapse"]


@pytest.mark.slow
def test_overfitting(findings: Callable) -> None:
    """Six images, many epochs and a high learning rate, on a base that already knows the style."""
    few = ("model=demo_near", "data.val_fraction=0.85", "optimizer.lr=0.005", "optimizer.schedule=constant")
    found = findings(*few, "trainer.max_epochs=16")
    assert "the training images are memorised" in found["overfitting"]
    assert "a lower lora.rank" in found["overfitting"]


@pytest.mark.slow
def test_guided_training_wants_another_sampling_scale(findings: Callable) -> None:
    found = findings("trainer.max_epochs=1", "loss.guidance=4")
    assert set(found) == {"sampling scale"}
    assert "sample at about 11, the last column" in found["sampling scale"]


@pytest.mark.slow
def test_few_held_out_images_give_no_finding(findings: Callable) -> None:
    """One to four have no meaningful standard error; a run that learns is not blamed."""
    assert findings("data.val_fraction=0.01", "trainer.max_epochs=4") == {}


def test_findings_survive_a_stop(findings: Callable, tmp_path: Path, make_config: Callable) -> None:
    """Findings from before a checkpoint are restored with it, kept, and reported once."""
    doctor = Doctor(make_config(), RunDir(tmp_path))
    doctor.findings = [Finding("collapse", "the loss is 1")]
    later = Doctor(make_config(), RunDir(tmp_path))
    later.load_state_dict(doctor.state_dict())
    trainer = SimpleNamespace(is_global_zero=True, loggers=[])
    later.report(trainer, [Finding("collapse", "again"), Finding("overfitting", "new")])
    stored = json.loads((tmp_path / "status.json").read_text())["findings"]
    assert [(finding["name"], finding["text"]) for finding in stored] == [
        ("collapse", "the loss is 1"), ("overfitting", "new"),
    ]  # fmt: skip


@pytest.mark.slow
def test_weights_in_16_bits(findings: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    attach = GhibliModule.__init__

    def halved(module: GhibliModule, *arguments: object) -> None:
        attach(module, *arguments)
        for weight in module.trainable.values():
            weight.data = weight.data.bfloat16()

    monkeypatch.setattr(GhibliModule, "__init__", halved)
    found = findings("trainer.max_epochs=1", "trainer.precision=bf16-mixed", COARSE)
    assert "the trained weights are bfloat16" in found["weights in 16 bits"]


@pytest.mark.slow
def test_a_loss_that_is_not_finite_names_the_image(
    findings: Callable, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """One image's latents turn to NaN after two steps: no update is made, the checkpoint is intact."""
    step = GhibliModule.training_step
    names: list[str] = []

    def broken(module: GhibliModule, batch: dict, batch_idx: int) -> dict:
        if module.trainer.global_step == 2:
            batch["latents"][1] = torch.nan
            names.append(batch["name"][1])
        return step(module, batch, batch_idx)

    monkeypatch.setattr(GhibliModule, "training_step", broken)
    with pytest.raises(UserError, match="step 2: the loss is not finite for ") as caught:
        findings("trainer.max_epochs=1", COARSE, *CHECKPOINTS)
    for name in names:
        assert f"{name} at timestep " in str(caught.value)
    state = torch.load(tmp_path / "checkpoints" / "last.ckpt")["state_dict"]
    assert all(weight.isfinite().all() for weight in state.values())
    status = json.loads((tmp_path / "status.json").read_text())
    assert status["state"] == "failed"
    assert status["findings"][0]["text"] == status["reason"] == str(caught.value)


@pytest.mark.slow
def test_scores_that_are_not_finite_end_the_run_and_name_the_image(
    findings: Callable, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    scores = GhibliModule.scores

    def broken(module: GhibliModule, batch: dict, guidance: float, schedule: torch.Tensor) -> torch.Tensor:
        found = scores(module, batch, guidance, schedule)
        if module.probe.history and module.trainer.state.fn == "fit" and module.trainer.global_step > 0:
            found[0, 1] = torch.inf
        return found

    monkeypatch.setattr(GhibliModule, "scores", broken)
    with pytest.raises(UserError, match=r"after epoch 1 the probe's loss is not finite for scene_\d+.png at"):
        findings("trainer.max_epochs=1", COARSE)
    status = json.loads((tmp_path / "status.json").read_text())
    assert (status["state"], status["findings"][0]["name"]) == ("failed", "not finite")


@pytest.mark.slow
def test_a_base_with_scores_that_are_not_finite_is_refused(
    findings: Callable, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Before the first step, and without blaming the learning rate."""
    scores = GhibliModule.scores
    monkeypatch.setattr(GhibliModule, "scores", lambda *words: scores(*words) * torch.nan)
    with pytest.raises(UserError, match="the untouched base itself has a loss that is not finite"):
        findings("trainer.max_epochs=1", COARSE, f"cache_dir={tmp_path / 'cache'}")


def test_in_fp16_a_gradient_may_overflow_and_a_loss_may_not(make_config: Callable, tmp_path: Path) -> None:
    """Lightning's scaler needs a GPU, so the callback is called directly."""
    reduce = SimpleNamespace(reduce=lambda value, reduce_op: value)
    trainer = SimpleNamespace(
        precision="16-mixed", strategy=reduce, is_global_zero=True, loggers=[], global_step=3, world_size=1
    )
    gradient = SimpleNamespace(grad=torch.tensor([torch.inf]))

    def step(loss: float, beside: float = 0.1) -> None:
        doctor = Doctor(make_config(), RunDir(tmp_path))
        total = torch.tensor(loss + beside)
        doctor.note({"name": ["cat.png"], "timesteps": torch.tensor([812])}, torch.tensor([loss]), total)
        module = SimpleNamespace(trainable={"a": gradient}, trainer=trainer)
        doctor.on_before_optimizer_step(trainer, module, None)

    step(0.2)
    with pytest.raises(
        UserError, match=r"step 3: the loss is not finite for cat.png at timestep 812 \(nan\)"
    ):
        step(torch.nan)
    said = r"step 3: a weight or a term of the loss is not finite, with the losses of cat.png at timestep 812"
    with pytest.raises(UserError, match=said):
        step(0.2, torch.inf)


@pytest.mark.parametrize("reader", ["a logged step", "a checkpoint", "validation"])
def test_on_a_gpu_the_answer_is_read_later(
    make_config: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reader: str
) -> None:
    """The update that was not finite is named, not those after it, which it spoiled."""
    monkeypatch.setattr("ghibli.training.callbacks.diagnosis.is_awaited", lambda value: True)
    doctor = Doctor(make_config(), RunDir(tmp_path))
    trainer = SimpleNamespace(
        precision="32-true", is_global_zero=True, loggers=[], global_step=0, world_size=1,
        log_every_n_steps=4 if reader == "a logged step" else 100, accumulate_grad_batches=1,
    )  # fmt: skip

    def step(name: str, loss: float) -> None:
        module = SimpleNamespace(trainable={"a": SimpleNamespace(grad=torch.tensor([loss]))})
        batch = {"name": [name], "timesteps": torch.tensor([812])}
        doctor.note(batch, torch.tensor([loss]), torch.tensor(loss))
        doctor.on_before_optimizer_step(trainer, module, None)
        trainer.global_step += 1
        doctor.on_train_batch_end(trainer, module, None, None, 0)

    step("dog.png", 0.2)
    step("cat.png", torch.nan)
    step("fox.png", torch.nan)
    read = {
        "a logged step": lambda: step("owl.png", torch.nan),
        "a checkpoint": lambda: doctor.on_save_checkpoint(trainer, None, {}),
        "validation": lambda: doctor.on_validation_start(trainer, None),
    }[reader]
    with pytest.raises(
        UserError, match=r"step 1: the loss is not finite for cat.png at timestep 812 \(nan\); the checkp"
    ):
        read()


def test_a_finding_is_an_alert_on_the_dashboard(make_config: Callable, tmp_path: Path) -> None:
    alerts = []
    experiment = SimpleNamespace(alert=lambda **words: alerts.append(words))
    logger = DashboardLogger(WandbDashboard(RunDir(tmp_path), experiment))
    trainer = SimpleNamespace(is_global_zero=True, loggers=[logger], global_step=3)
    Doctor(make_config(), RunDir(tmp_path)).report(trainer, [Finding("collapse", "the loss is 1")])
    assert [(alert["title"], alert["text"]) for alert in alerts] == [("collapse", "the loss is 1")]


def test_latents_that_are_not_finite_name_the_image(
    findings: Callable, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    original = preprocess

    def broken(image: object, resolution: int, resize: str) -> torch.Tensor:
        monkeypatch.setattr(latents, "preprocess", original)
        return torch.full((3, resolution, resolution), torch.nan)

    monkeypatch.setattr(latents, "preprocess", broken)
    with pytest.raises(UserError, match=r"scene_\d+.png: its latents are not finite"):
        findings(f"cache_dir={tmp_path / 'cache'}")  # the shared one already has these latents
