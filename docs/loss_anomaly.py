"""Make the figures and numbers of docs/loss-anomaly.md: `python docs/loss_anomaly.py [PART ...]`.

Parts: curves, checkpoints, epochs, power, schedule, diverged, guidance, guidance_images, error, curves50; all
by default. Runs and their samples are kept in outputs/loss-anomaly/ and made once.
"""

import json
import subprocess
import sys
from pathlib import Path
from textwrap import wrap

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
from scipy.stats import norm, studentized_range

from ghibli.adapters import apply
from ghibli.config.files import from_yaml
from ghibli.config.paths import resolve_path
from ghibli.data.folder import CaptionedImage
from ghibli.data.latents import Moments
from ghibli.data.validation_items import make_items
from ghibli.demo.scenes import canvas
from ghibli.demo.scenes.scene import EVALUATION_SEEDS, compose, draw
from ghibli.diffusion.samplers import Cell, sample
from ghibli.evaluation.distances import kernel_distance
from ghibli.evaluation.features import extract_in_batches, standardised, style_features
from ghibli.evaluation.gain import paired_gain
from ghibli.images.grid import to_image
from ghibli.models.load import load
from ghibli.runs.compose import register
from ghibli.runs.folder import RunDir
from ghibli.runtime.console import counted
from ghibli.runtime.files import read_rows, write_json
from ghibli.runtime.provenance import now, provenance
from ghibli.training.callbacks.checkpoints import load_weights
from ghibli.training.module import GhibliModule

HERE = Path(__file__).parent
FIGURES = HERE / "loss-anomaly"
WORK = Path("outputs/loss-anomaly")
QUIET = (
    "data=demo", "wandb.mode=disabled", "early_stopping.patience=null", "sample.every_n_epochs=0",
    f"cache_dir={WORK}/cache",
)  # fmt: skip
NEAR, DEMO = ("model=demo_near", *QUIET), ("model=demo", *QUIET)
GUIDED = [(w, d) for w in (1, 7.5) for d in (0, 0.1)]  # training guidance, caption dropout
SCALES = (1, 1.5, 2, 4, 7.5, 15, 30, 45, 60)
RUNS = {
    **{
        f"{name}-{epochs}": (*NEAR, f"experiment={name}", f"trainer.max_epochs={epochs}")
        for name in ("slides", "slides_asrun")
        for epochs in (10, 50)
    },
    "slides-3": (*NEAR, "experiment=slides", "trainer.max_epochs=3"),
    "full": (*DEMO, "experiment=full_finetune", "trainer.max_epochs=6"),
    "full-too-fast": (*DEMO, "experiment=full_finetune", "trainer.max_epochs=6", "optimizer.lr=0.03"),
    **{
        f"guidance-{w:g}-dropout-{d:g}": (
            *DEMO, f"loss.guidance={w:g}", f"loss.caption_dropout={d:g}", "trainer.max_epochs=6",
        )
        for w, d in GUIDED
    },
}  # fmt: skip
BLUE, ORANGE, GREY = "#1f6fb4", "#d9731a", "#777777"


def run_of(name: str) -> RunDir:
    """Return the finished run of this name; train or resume it first if necessary."""
    run = RunDir(WORK / name)
    if run.status.state != "finished":
        resume = [f"resume={run.path}"] if run.last_checkpoint.exists() else None
        words = resume or [*RUNS[name], f"hydra.run.dir={run.path}"]
        print("training", name, flush=True)
        subprocess.run([sys.executable, "train.py", *words], check=True)
    return run


def column(run: RunDir, name: str, first: int = 0) -> np.ndarray:
    """Return a column of probe.csv from epoch `first` on."""
    rows = read_rows(run.probe)
    return np.array([float(row[name]) for row in rows if int(row["epoch"]) >= first])


def model_of(run: RunDir, weights: Path | None = None) -> GhibliModule:
    """Return a run's model in eval mode, with its best weights, these weights, or none of them (`base`)."""
    config = from_yaml(run.config)
    base = load(config.model.path)
    if config.model.adapter is not None:
        apply.merge(base, resolve_path(config.model.adapter), config.model.adapter_scale)
    module = GhibliModule(config, base)
    if weights != Path("base"):
        load_weights(module, weights or run.best_checkpoint)
    return module.eval()


def save(figure: plt.Figure, name: str) -> None:
    FIGURES.mkdir(parents=True, exist_ok=True)
    figure.savefig(FIGURES / f"{name}.png", dpi=110)
    plt.close(figure)


def known_numbers() -> dict[str, dict]:
    """Return the content of numbers.json."""
    file = FIGURES / "numbers.json"
    return json.loads(file.read_text()) if file.exists() else {}


def note(part: str, **numbers: object) -> None:
    """Add numbers to numbers.json, with date and commit, and print them."""
    about = {"date": now(), "commit": provenance()["git_commit"]}
    write_json(FIGURES / "numbers.json", known_numbers() | {part: about | numbers})
    print(part, json.dumps(numbers, indent=1), flush=True)


def curves(epochs: int = 10) -> None:
    """Plot the unpaired loss that the students saw, and the paired gain of the same runs."""
    figure, (above, below) = plt.subplots(2, 1, figsize=(9, 6.4), sharex=True, layout="constrained")
    numbers = {}
    for name, colour in (("slides_asrun", ORANGE), ("slides", BLUE)):
        run = run_of(f"{name}-{epochs}")
        losses, errors = column(run, "train/epoch_loss", 1), column(run, "train/epoch_loss_se", 1)
        above.plot(np.arange(1, len(losses) + 1), losses, color=colour, lw=1.2, marker=".", label=name)
        middle, error = losses.mean(), errors.mean()
        band = (middle - 1.96 * error, middle + 1.96 * error)
        above.axhspan(*band, color=colour, alpha=0.13, lw=0, label="its 95 % band if nothing is learned")
        gain, gain_error = column(run, "probe/val_gain"), column(run, "probe/val_gain_se")
        low, high = (100 * column(run, f"probe/val_gain_{end}") for end in ("low", "high"))
        below.plot(np.arange(len(gain)), 100 * gain, color=colour, lw=1.4, label=name)
        below.fill_between(
            np.arange(len(gain)), low, high, color=colour, alpha=0.2, lw=0, label="95 % interval"
        )
        numbers[name] = {
            "epoch loss, least and most": [round(losses.min(), 4), round(losses.max(), 4)],
            "its standard error": round(error, 4),
            "epochs outside the band": f"{((losses < band[0]) | (losses > band[1])).sum()} of {len(losses)}",
            "unpaired change, epoch 1 to 3": round(losses[2] - losses[0], 4),
            "its error": round(float(np.hypot(errors[2], errors[0])), 4),
            "paired gain after epochs 1, 2, 3, % +- %": [
                f"{100 * g:.2f} +- {100 * e:.2f}" for g, e in zip(gain[1:4], gain_error[1:4], strict=True)
            ],
            "paired gain at the end": f"{100 * gain[-1]:.2f} +- {100 * gain_error[-1]:.2f}",
        }
        numbers[name]["trend, in standard errors"] = round(trend(losses, errors), 2)
    below.axhline(0, color=GREY, lw=0.8)
    below.set(xlabel="epoch", ylabel="paired gain, held-out images (%)")
    above.set_ylabel("mean training loss of an epoch")
    for axis in (above, below):
        axis.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    save(figure, f"curves-{epochs}")
    note(f"curves-{epochs}", **numbers)


def trend(losses: np.ndarray, errors: np.ndarray) -> float:
    """Return the slope of a straight line through the losses of epochs, over its standard error."""
    at = np.arange(len(losses)) - (len(losses) - 1) / 2
    return float((at @ losses / (at @ at)) / np.sqrt((errors**2).mean() / (at @ at)))


def curves50() -> None:
    """Plot the same over 50 epochs."""
    curves(50)


@torch.no_grad()
def checkpoints(images: int = 108, items: int = 4) -> None:
    """Measure the paired gain over three epochs, and the unpaired loss of the last checkpoint and the base.

    Unpaired as in training: each model has images, timesteps and noise of its own, 432 of them.
    """
    run = run_of("slides-3")
    first, losses = EVALUATION_SEEDS.start + 20_000, {}
    for name, module in (("base", model_of(run, Path("base"))), ("checkpoint", model_of(run))):
        means = losses_of(module, probe_items(module, first, images, items)).mean(1)
        losses[name] = means.mean().item(), (means.std() / images**0.5).item()
        first += images
    (base, base_error), (ours, error) = losses["base"], losses["checkpoint"]
    gains = column(run, "probe/val_gain", 1), column(run, "probe/val_gain_se", 1)
    note(
        "checkpoints",
        paired=[f"{100 * gain:.2f} +- {100 * se:.2f} %" for gain, se in zip(*gains, strict=True)],
        unpaired={name: f"{loss:.4f} +- {se:.4f}" for name, (loss, se) in losses.items()},
        unpaired_change=f"{ours - base:+.4f} +- {np.hypot(error, base_error):.4f}",
    )


def epochs() -> None:
    """Compute how many epochs of unpaired loss show a gain of 1 % (95 %, as many before as after)."""
    run = run_of("slides_asrun-10")
    loss, error = (column(run, f"train/epoch_loss{end}", 1).mean() for end in ("", "_se"))
    needed = (1.96 * 2**0.5 * error / (0.01 * loss)) ** 2
    paired = column(run_of("slides-10"), "probe/val_gain_se")[1]
    note(
        "epochs", loss=round(loss, 4), error_of_an_epoch=round(error, 5), epochs=round(needed, 1),
        paired_error_after_one_epoch=round(paired, 5),
    )  # fmt: skip


def power() -> None:
    """Compute what the reference study's nine losses, 0.121 to 0.132, could show, from part `epochs`."""
    known = known_numbers()["epochs"]
    spread = known["error_of_an_epoch"] * 432**0.5
    study = spread / 2250**0.5
    half, most = norm.ppf(0.975), norm.ppf(0.975) + norm.ppf(0.8)

    def count(level: float, error: float, loss: float) -> float:
        return round(2 * (level * error / (0.01 * loss)) ** 2, 1)

    note(
        "power", spread_of_an_example=round(spread, 3), error_of_the_studys_epoch=round(study, 5),
        asrun_half=count(half, known["error_of_an_epoch"], known["loss"]),
        asrun_80=count(most, known["error_of_an_epoch"], known["loss"]),
        study_half=count(half, study, 0.126), study_80=count(most, study, 0.126),
        chance_of_its_range=round(float(studentized_range.sf(0.011 / study, 9, np.inf)), 3),
        chance_at_half_the_error=round(float(studentized_range.sf(0.011 / 0.002, 9, np.inf)), 4),
    )  # fmt: skip


def probe_items(module: GhibliModule, first: int, count: int, items: int) -> list[dict]:
    """Return probe batches of freshly drawn scenes, one per image."""
    images, means, logvars = [], [], []
    for seed in range(first, first + count):
        scene = compose(seed)
        array = np.asarray(draw(scene, "drawn"), dtype=np.float32) / 127.5 - 1
        posterior = module.base.vae.encode(torch.from_numpy(array).permute(2, 0, 1)[None]).latent_dist
        means.append(posterior.mean)
        logvars.append(posterior.logvar)
        text = f"{scene.caption}, Studio Ghibli style"
        images.append(CaptionedImage(Path(str(seed)), text, f"{seed:064x}"))
    input_ids = module.base.tokenize([p.caption for p in images])
    return make_items(
        images, Moments(torch.cat(means), torch.cat(logvars)), input_ids, items_per_image=items,
        num_train_timesteps=module.num_train_timesteps,
        scaling_factor=module.base.vae.config.scaling_factor,
    )  # fmt: skip


@torch.no_grad()
def schedule() -> None:
    """Show what the wrong betas do: the base's loss by timestep, and images."""
    run = run_of("slides_asrun-10")
    module = model_of(run, Path("base"))
    batches = probe_items(module, EVALUATION_SEEDS.start, 48, 20)
    tables = {
        "the base's own schedule": module.base_alphas_cumprod,
        "linear 1e-4 .. 0.02": module.alphas_cumprod,
    }
    figure, axes = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    numbers = {}
    for (label, table), colour in zip(tables.items(), (BLUE, ORANGE), strict=True):
        losses = losses_of(module, batches, table).mean(0)
        axes[0].plot(np.arange(25, 1000, 50), losses, color=colour, marker=".", label=label)
        axes[1].plot((1 - table).sqrt(), color=colour, label=label)
        numbers[label] = {"mean loss of the base": round(losses.mean().item(), 4)}
    axes[0].set(xlabel="timestep", ylabel="loss of the untouched base", yscale="log")
    axes[1].set(xlabel="timestep", ylabel="amplitude of the noise, sqrt(1 - abar)", ylim=(0, 1.02))
    for axis in axes:
        axis.legend(frameon=False, loc="best", fontsize=8)
    save(figure, "schedule")
    own, linear = (list(numbers.values())[i]["mean loss of the base"] for i in (0, 1))
    numbers["the base at the wrong schedule is worse by a factor of"] = round(linear / own, 2)
    note("schedule", **numbers)
    models = {"base (demo_near)": module, "slides": model_of(run_of("slides-10"))}
    models["slides_asrun"] = model_of(run, run.last_checkpoint)
    images("schedule-images", models)


def images(name: str, models: dict[str, GhibliModule], scale: float = 7.5) -> None:
    """Save a row of six images for each model, from the same prompts and start noise."""
    captions = [compose(EVALUATION_SEEDS.start + i).caption for i in range(6)]
    prompts = [f"{caption}, Studio Ghibli style" for caption in captions]
    figure, axes = plt.subplots(len(models), 6, figsize=(10, 1 + 1.72 * len(models)), layout="constrained")
    for row, (label, module) in enumerate(models.items()):
        drawn = sample(
            module.base,
            prompts,
            Cell("ddim", scale),
            num_inference_steps=30,
            seeds=list(range(6)),
            resolution=128,
        )
        for col in range(6):
            axes[row, col].imshow(to_image(drawn[col]))
            axes[row, col].set(xticks=[], yticks=[])
        axes[row, 0].set_ylabel(label.replace(", ", ",\n"), fontsize=8)
    for axis, caption in zip(axes[0], captions, strict=True):
        axis.set_title("\n".join(wrap(caption, 22)), fontsize=7)
    figure.suptitle(
        f"DDIM, 30 steps, guidance {scale:g}; 128 px, enlarged; each prompt ends in Studio Ghibli style",
        fontsize=8,
    )
    save(figure, name)


def diverged() -> None:
    """Plot full fine-tuning with a learning rate that destroys the model, beside one that works."""
    figure, axis = plt.subplots(figsize=(7, 3.6), layout="constrained")
    numbers = {}
    for name, colour in (("full-too-fast", ORANGE), ("full", BLUE)):
        run = run_of(name)
        losses, probe = column(run, "train/epoch_loss", 1), column(run, "probe/val_loss")
        axis.plot(np.arange(1, len(losses) + 1), losses, color=colour, marker=".", label=f"{name}, training")
        axis.plot(np.arange(len(probe)), probe, color=colour, ls="--", label=f"{name}, held out")
        found = [finding["name"] for finding in run.status.read().get("findings", [])]
        numbers[name] = {"epoch losses": [round(v, 3) for v in losses], "doctor": found}
    axis.axhline(1, color=GREY, lw=0.8)
    axis.text(0, 1.02, "predicting nothing", color=GREY, fontsize=8, va="bottom")
    axis.set(xlabel="epoch", ylabel="loss")
    axis.legend(frameon=False)
    save(figure, "diverged")
    note("diverged", **numbers)
    models = {"full": model_of(run_of("full")), "full-too-fast": model_of(run_of("full-too-fast"))}
    images("diverged-images", models)


def scene(seed: int, look: str = "drawn") -> torch.Tensor:
    """Draw a scene as an image (3, 128, 128) in 0 .. 1."""
    array = np.array(draw(compose(seed), look), dtype=np.float32) / 255
    return torch.from_numpy(array).permute(2, 0, 1)


def guidance(count: int = 64) -> None:
    """Measure the style distance to drawn images over the sampling scale, for four trainings."""
    vae, first = load("demo").vae, EVALUATION_SEEDS.start
    drawn = torch.stack([scene(first + 1000 + i) for i in range(300)])
    own = extract_in_batches(lambda x: style_features(vae, x), drawn)
    reference = standardised(own, own)

    def distance(images: torch.Tensor) -> list[float]:
        rows = standardised(extract_in_batches(lambda x: style_features(vae, x), images), own)
        found = kernel_distance(rows, reference)
        return [round(found.value, 3), round(found.standard_error, 3)]

    measured = WORK / "guidance.json"  # so that it can be interrupted
    numbers = json.loads(measured.read_text()) if measured.exists() else {}
    for look in canvas.LOOKS:
        numbers.setdefault(look, distance(torch.stack([scene(first + i, look) for i in range(count)])))
    prompts = [f"{compose(first + i).caption}, Studio Ghibli style" for i in range(count)]
    for w, d in GUIDED:
        name = f"guidance-{w:g}-dropout-{d:g}"
        if name in numbers:
            continue
        module, numbers[name] = model_of(run_of(name)), {}
        with counted(f"sampling {name}") as on_progress:
            for done, scale in enumerate(SCALES):
                drawn = sample(
                    module.base, prompts, Cell("ddim", scale), num_inference_steps=20,
                    seeds=list(range(count)), resolution=128,
                )  # fmt: skip
                numbers[name][f"{scale:g}"] = distance(drawn)
                on_progress(done + 1, len(SCALES))
        write_json(measured, numbers)
    note("guidance", **numbers)
    plot_guidance(numbers)


def guidance_images() -> None:
    """Draw the same prompts by an ordinary and a guided training, at four scales."""
    models = {f"trained with {w:g}": model_of(run_of(f"guidance-{w:g}-dropout-0.1")) for w in (1, 7.5)}
    for scale in (1, 7.5, 15, 56):
        images(f"guidance-images-{scale:g}", models, scale)


def plot_guidance(numbers: dict[str, dict[str, list[float]]]) -> None:
    """Plot the distance over the sampling scale, and over the scale divided by the training guidance."""
    figure, axes = plt.subplots(1, 2, figsize=(10, 4), sharey=True, layout="constrained")
    for w, d in GUIDED:
        found = numbers[f"guidance-{w:g}-dropout-{d:g}"]
        scales = np.array([float(scale) for scale in found])
        values, errors = np.array(list(found.values())).T
        style = {"color": BLUE if w == 1 else ORANGE, "ls": "-" if d else "--", "marker": "."}
        label = f"trained with guidance {w:g}, caption dropout {d:g}"
        for axis, x in zip(axes, (scales, scales / w), strict=True):
            axis.errorbar(x, values, 1.96 * errors, label=label, lw=1.3, elinewidth=0.8, **style)
    axes[0].set(ylabel="style distance to drawn images, +- 95 %", xlabel="sampling scale s")
    axes[1].set(xlabel="s / training guidance")
    for axis in axes:
        axis.axhline(numbers["photo"][0], color=GREY, lw=0.8, ls=":")
        axis.set(xscale="log", yscale="log")
        axis.grid(alpha=0.2)
    axes[0].set_xticks((1, 2, 4, 7.5, 15, 30, 60), ["1", "2", "4", "7.5", "15", "30", "60"])
    axes[1].set_xticks((0.13, 0.5, 1, 2, 7.5, 30), ["0.13", "0.5", "1", "2", "7.5", "30"])
    for axis in axes:
        axis.minorticks_off()
        axis.set_yticks((0.5, 1, 2, 5, 10, 20), ["0.5", "1", "2", "5", "10", "20"])
    axes[0].text(4.5, numbers["photo"][0] * 1.06, "photograph-like images", color=GREY, fontsize=8)
    figure.legend(*axes[1].get_legend_handles_labels(), loc="outside upper center", ncols=2, frameon=False)
    save(figure, "guidance")


def losses_of(
    module: GhibliModule, batches: list[dict], schedule: torch.Tensor | None = None
) -> torch.Tensor:
    """Return the losses (P, K) at guidance 1, with the base's own schedule or this one."""
    alphas_cumprod = module.base_alphas_cumprod if schedule is None else schedule
    return torch.stack([module.scores(batch, 1, alphas_cumprod)[0] for batch in batches])


@torch.no_grad()
def error(redraws: int = 100, images: int = 30) -> None:
    """Check the standard error: redraw images and items; compare spread and reported error."""
    run = run_of("slides-10")
    ours, base = model_of(run), model_of(run, Path("base"))
    gains = []
    with counted("redrawing") as on_progress:
        for redraw in range(redraws):
            first = EVALUATION_SEEDS.start + 10_000 + redraw * images
            batches = probe_items(base, first, images, 4)
            gains.append(paired_gain(losses_of(ours, batches), losses_of(base, batches)))
            on_progress(redraw + 1, redraws)
    values = np.array([gain.value for gain in gains])
    errors = np.array([gain.standard_error for gain in gains])
    note(
        "error", redraws=redraws, images=images, mean_gain=round(values.mean(), 5),
        spread=round(values.std(ddof=1), 5), mean_reported_error=round(errors.mean(), 5),
        ratio=round(errors.mean() / values.std(ddof=1), 3),
    )  # fmt: skip


def main() -> None:
    register()
    every = (
        curves,
        checkpoints,
        epochs,
        power,
        schedule,
        diverged,
        guidance,
        guidance_images,
        error,
        curves50,
    )
    parts = {part.__name__: part for part in every}
    for name in sys.argv[1:] or parts:
        parts[name]()


if __name__ == "__main__":
    main()
