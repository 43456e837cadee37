"""One more sampler, loss, optimiser or image-set layout: a toy one of each, registered from outside.

No file of ghibli/ or conf/ is edited here, and each toy goes the way of a user's setting.
"""

import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.commands import REPO
from helpers.image_folders import captions_of, read, write_image

import train
from ghibli.config import files
from ghibli.config.registry import (
    DISTRIBUTIONS,
    LOSSES,
    OPTIMIZERS,
    SAMPLERS,
    TERMS,
    WEIGHTINGS,
    LossEntry,
    OptimizerEntry,
    SamplerEntry,
    TermEntry,
    fp32_copies,
    sampler_label,
)
from ghibli.config.schema import Config
from ghibli.data.folder import recognised
from ghibli.data.layouts import LAYOUTS, Layout, ListedImage
from ghibli.diffusion.samplers import Cell, cells_of, draw_cells, make_scheduler, sample
from ghibli.inference.request import ImageRequest, RestyleOptions
from ghibli.models.base import BaseModel
from ghibli.prepare import memory
from ghibli.runs.folder import RunDir
from ghibli.runtime.errors import UserError
from ghibli.runtime.files import read_rows
from ghibli.runtime.registry import Registry, load_object
from ghibli.training.module import GhibliModule
from ghibli.training.optimizers import make_optimizer

EULER = SamplerEntry("Toy", "diffusers:EulerDiscreteScheduler")
SGD = OptimizerEntry("torch.optim:SGD", fp32_copies(1), takes_betas=False, settings={"momentum": 0.5})


@pytest.fixture
def register() -> Iterator[Callable[..., None]]:
    """Register a toy in a registry; take it out again after the test."""
    used: list[tuple[Registry, str]] = []

    def add(registry: Registry, entry: Any, name: str = "toy") -> None:
        registry.register(name, entry)
        used.append((registry, name))

    yield add
    for registry, name in used:
        registry.remove(name)
        assert name not in registry


# The registry itself


def test_entries_keep_their_order_and_a_name_is_given_once() -> None:
    registry: Registry[int] = Registry("what.ever")
    registry.register("one", 1)
    registry.register("two", 2)
    assert (list(registry), len(registry), "one" in registry, registry["two"]) == (["one", "two"], 2, True, 2)
    assert list(registry.items()) == [("one", 1), ("two", 2)]
    with pytest.raises(ValueError, match=r"what.ever: one is already registered"):
        registry.register("one", 3)
    assert registry["one"] == 1
    registry.remove("one")
    assert list(registry) == ["two"]


def test_an_unknown_name_is_told_with_key_and_choices() -> None:
    with pytest.raises(
        UserError,
        match=r"^sample.samplers=ddin is unknown: choose one of ddpm, ddim, .*, lcm; did you mean ddim\?",
    ):
        SAMPLERS["ddin"]
    with pytest.raises(
        UserError, match=r"^--sampler eulr is unknown: choose one of ddpm, .*; did you mean euler\?$"
    ):
        SAMPLERS.require("eulr", "--sampler")


def test_what_the_entries_name_can_be_imported() -> None:
    """But for optional packages, which tests/training/test_optimizers.py covers where they are installed."""
    for _, sampler in SAMPLERS.items():
        assert hasattr(load_object(sampler.scheduler), "set_timesteps")
    for _, loss in LOSSES.items():
        assert callable(load_object(loss.function))
    for _, weighting in WEIGHTINGS.items():
        assert load_object(weighting.function)(torch.tensor([2.0]), gamma=weighting.gamma).item() > 0
    for _, entry in DISTRIBUTIONS.items():
        lower, upper = (load_object(entry.cdf)(x, *entry.parameters) for x in (0.3, 0.6))
        assert 0 < lower < upper < 1
    for _, optimizer in OPTIMIZERS.items():
        if optimizer.extra is None:
            assert issubclass(load_object(optimizer.factory), torch.optim.Optimizer)


# A toy of each


def test_a_toy_sampler_draws(
    register: Callable, model: BaseModel, make_config: Callable[..., Config]
) -> None:
    with pytest.raises(UserError, match=r"sample.samplers=toy is unknown"):
        make_config("sample.samplers=[toy]")
    register(SAMPLERS, EULER)
    config = make_config("sample.samplers=[toy,ddim]", "sample.guidance=[2]", "sample.num_inference_steps=3")
    cells = cells_of(config.sample, 1)
    assert cells == [Cell("toy", 2), Cell("ddim", 2)]
    assert (cells[0].label, cells[0].short_label) == ("Toy  guidance 2", "Toy 2")
    images = draw_cells(model, config.sample, cells, 64)
    assert images.shape == (2, 2, 3, 64, 64)
    assert images.isfinite().all()
    assert images[:, 0].std() > 0.01
    assert (images[:, 0] - images[:, 1]).abs().max() > 0.005
    assert ImageRequest(["a sea"], "toy", 1.0, 3, 0, (64, 64)).sampler == "toy"
    assert RestyleOptions(0.5, "toy", 1.0, 4, 0, "", 1.0, 64).sampler == "toy"


def test_the_loop_serves_a_sampler_that_scales_its_latents(register: Callable, model: BaseModel) -> None:
    """Euler on sigma is DDIM in other variables (Karras et al. 2022), but for the last step to abar = 1."""
    register(SAMPLERS, EULER)
    options = {"num_inference_steps": 50, "seeds": [3], "resolution": 64}
    toy, ddim, ddpm = (
        sample(model, ["a red train"], Cell(name, 1), **options) for name in ("toy", "ddim", "ddpm")
    )
    assert (toy - ddim).abs().mean() < 0.1 * (ddpm - ddim).abs().mean()
    scheduler = make_scheduler("toy", model)
    assert scheduler.config.beta_schedule == "scaled_linear"
    assert scheduler.config.prediction_type == model.prediction_type


def test_a_sampler_that_is_no_longer_registered_still_has_a_label() -> None:
    assert (sampler_label("ddim"), sampler_label("gone")) == ("DDIM", "GONE")


def toy_loss(noise_pred: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return (noise_pred - target).abs().mean(dim=(1, 2, 3))


def test_a_toy_loss_trains_and_the_probe_stays_the_mse(
    register: Callable, make_config: Callable[..., Config], base: BaseModel
) -> None:
    with pytest.raises(UserError, match=r"loss.function=toy is unknown: choose one of mse"):
        make_config("loss.function=toy")
    register(LOSSES, LossEntry(f"{__name__}:toy_loss"))
    module = GhibliModule(make_config("loss.function=toy", "lora.rank=4", "lora.dropout=0"), base)
    generator = torch.Generator().manual_seed(2)
    latents, noise = torch.randn(2, 2, 4, 8, 8, generator=generator)
    batch = {
        "latents": latents, "noise": noise, "timesteps": torch.tensor([120, 870]),
        "input_ids": base.tokenize(["a red train", "a girl"]),
    }  # fmt: skip
    losses = module.losses(batch)
    torch.testing.assert_close(losses, toy_loss(*module.prediction(batch)))
    losses.mean().backward()
    assert sum(float(p.grad.abs().sum()) for p in module.trainable.values() if p.grad is not None) > 0
    scores = module.scores(batch, 1, module.base_alphas_cumprod)
    module.config.loss.function = "mse"
    torch.testing.assert_close(scores[0], module.losses(batch))
    assert not torch.allclose(scores[0], losses)


def documented_term() -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """The function of docs/extending.md's term, from the page."""
    page = (REPO / "docs" / "extending.md").read_text()
    block = page[page.index("       def slope(") :].split("\n\n")[0]
    names: dict[str, Any] = {"torch": torch}
    exec(textwrap.dedent(block), names)
    return names["slope"]


slope = documented_term()  # where the entry finds it


def test_the_term_of_the_page_is_added_and_has_a_column(
    register: Callable, make_config: Callable[..., Config], tmp_path: Path
) -> None:
    """In the first row, before any update, the loss is larger by the weighted term and by nothing else."""
    words = ("trainer.max_epochs=1", "data.batch_size=10", "data.accumulate=1", "lora.text_encoder=false")
    with pytest.raises(UserError, match=r"loss.terms=toy is unknown"):
        make_config("+loss.terms.toy=0.5")
    register(TERMS, TermEntry(f"{__name__}:slope"))
    with pytest.raises(UserError, match=r"loss.terms.toy=inf .*a finite number"):
        make_config("+loss.terms.toy=inf")
    register(TERMS, TermEntry(f"{__name__}:slope"), name="keep")
    with pytest.raises(UserError, match=r"loss.terms.keep: metrics.csv has a column train/keep of its own"):
        make_config("+loss.terms.keep=1")
    train.run(make_config(*words, "+loss.terms.toy=0.5"), RunDir(tmp_path / "with"))
    train.run(make_config(*words), RunDir(tmp_path / "without"))
    (first, second), (plain, _) = (read_rows(tmp_path / name / "metrics.csv") for name in ("with", "without"))
    assert "train/toy" not in plain and float(first["train/toy"]) > 0
    added = float(first["train/loss"]) - float(plain["train/loss"])
    assert added == pytest.approx(0.5 * float(first["train/toy"]), rel=1e-5)
    assert first["train/loss_normalised"] == plain["train/loss_normalised"]
    error = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    formula = [sum((e[..., 1:] - e[..., :-1]).pow(2).flatten()).item() / (4 * 8 * 7) for e in error]
    assert slope(error, torch.zeros_like(error)).tolist() == pytest.approx(formula, rel=1e-5)
    assert second["train/toy"] != first["train/toy"]


def test_a_toy_optimiser_steps_and_its_memory_is_known(
    register: Callable, make_config: Callable[..., Config], base: BaseModel, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=r"optimizer.name=toy is unknown: choose one of adamw, adamw8bit"):
        make_config("optimizer.name=toy")
    register(OPTIMIZERS, SGD)
    config = make_config("optimizer.name=toy", "lora.rank=4", "optimizer.lr=0.5")
    module = GhibliModule(config, base)
    optimizer = make_optimizer(config.optimizer, module.trainable, on_gpu=False)
    assert isinstance(optimizer, torch.optim.SGD)
    assert optimizer.param_groups[0]["momentum"] == 0.5
    parameter = next(iter(module.trainable.values()))
    before, parameter.grad = parameter.detach().clone(), torch.ones_like(parameter)
    optimizer.step()
    torch.testing.assert_close(parameter.detach(), before * (1 - 0.5 * config.optimizer.weight_decay) - 0.5)
    weights = sum(p.numel() for p in module.trainable.values())
    shapes = [tuple(p.shape) for p in module.trainable.values()]
    assert memory.optimizer_state_size(config.optimizer, shapes) == 4 * weights
    assert memory.estimate_disk(config, shapes, 1, 1).checkpoints == memory.CHECKPOINTS * 8 * weights
    (tmp_path / "config.yaml").write_text(files.to_yaml(config))
    assert files.from_yaml(tmp_path / "config.yaml") == config


def class_folders(root: Path) -> list[ListedImage]:
    """One folder for each caption."""
    paths = sorted((root / "classes").glob("*/*.png"))
    return [ListedImage(f"{path.parent.name}/{path.name}", path, path.parent.name) for path in paths]


def test_a_toy_layout_is_read(register: Callable, tmp_path: Path) -> None:
    for name in ("cat/a.png", "dog/a.png", "dog/b.png"):
        write_image(tmp_path / "classes" / name)
    with pytest.raises(
        UserError, match=r"no images found \(but 3 images in .*supported layouts: images/ beside captions.txt"
    ):
        read(tmp_path)
    register(LAYOUTS, Layout("classes/CAPTION/", lambda root: (root / "classes").is_dir(), class_folders))
    folder = read(tmp_path)
    assert [image.caption for image in folder.images] == ["cat, in ink", "dog, in ink", "dog, in ink"]
    assert recognised(tmp_path) == "images with toy"
    write_image(tmp_path / "c.png")
    (tmp_path / "captions.txt").write_text("c.png|a sea\n")
    assert captions_of(read(tmp_path))["c.png"] == "a sea, in ink"
    (empty := tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="classes/CAPTION/; docs/data.md shows them"):
        read(empty)


def test_a_term_of_an_empty_registry_says_how_one_is_added(make_config: Callable[..., Config]) -> None:
    with pytest.raises(UserError, match=r"^loss.terms=slope is unknown: there is none yet; docs/ext"):
        make_config("+loss.terms.slope=0.1")
