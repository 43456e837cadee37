"""Do the claims of these docs again, each in pairs: `python docs/experiments.py [PART ...] [KEY=VALUE ...]`.

Runs, images and measurements are kept in outputs/experiments/ and made once, so that a part which was stopped
goes on where it was; the runs of one seed come before those of the next. KEY=VALUE goes to every run, such as
threads=1. Numbers go to docs/experiments/numbers.json, with date and commit.
"""

import argparse
import json
import runpy
import time
from collections.abc import Callable
from functools import cache
from itertools import combinations, product
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import scipy.stats
import torch

from ghibli.adapters.trained import starting_base, trained_base
from ghibli.config.schema import Config
from ghibli.data.sources import real_images
from ghibli.demo.scenes.scene import EVALUATION_SEEDS, FINETUNE_SEEDS, compose, draw
from ghibli.diffusion.process import add_noise, predict_branches
from ghibli.diffusion.samplers import Cell, make_scheduler, sample
from ghibli.evaluation.copies import TrainingThumbnails, copies_among, crops_of, thumbnails_of
from ghibli.evaluation.distances import (
    frechet_distance,
    kernel_difference,
    kernel_distance,
)
from ghibli.evaluation.features import FeatureExtractor, standardised
from ghibli.evaluation.gain import Gain, Probe, best_epoch, paired_gain
from ghibli.evaluation.samples import read_unit_image
from ghibli.evaluation.scores import best_probe
from ghibli.evaluation.statistics import Estimate
from ghibli.images.grid import to_image
from ghibli.models.base import BaseModel
from ghibli.models.load import load
from ghibli.runs.compose import compose_config
from ghibli.runs.folder import RunDir
from ghibli.runs.settings import finished_config
from ghibli.runtime.cache import cached
from ghibli.runtime.console import counted
from ghibli.runtime.files import write_json
from ghibli.runtime.provenance import now, provenance
from ghibli.sweeps.race import Runner, history_of, replay

ROOT = Path(__file__).resolve().parents[1]
train_run = runpy.run_path(str(ROOT / "train.py"))["run"]  # as `python train.py`, in this process
FIGURES, WORK = ROOT / "docs" / "experiments", Path("outputs/experiments")
NUMBERS = FIGURES / "numbers.json"
QUIET = (
    "data=demo", "wandb.mode=disabled", "early_stopping.patience=null", "sample.every_n_epochs=0",
    f"cache_dir={WORK}/cache",
)  # fmt: skip
STYLE, SIDE, STEPS = ", Studio Ghibli style", 128, 20
DRAWN = 500  # images of data=demo
REFERENCE, UNITS = 300, 200  # real images to compare with, and those that give the units
RACED = ("dropout", "guidance", "mistakes", "ranks", "rates")  # trials of one held-out set and one loss
PROMPTS, REAL = EVALUATION_SEEDS.start + 60_000, EVALUATION_SEEDS.start + 70_000  # their first scenes
Settings = dict[str, tuple[str, ...]]  # name of a run -> its words, beside those of its part

MISTAKES = {
    "linear betas": ("loss.noise_schedule=linear",),
    "timesteps drawn one by one": ("loss.timesteps=independent",),
    "no dropped captions": ("loss.caption_dropout=0",),
}
GUIDED = ("loss.guidance=7.5",)
UNCONDITIONAL = {
    "as shipped": (),
    "shared dropout": ("loss.share_dropout=true",),
    "detached": ("loss.unconditional=detached",),
    "of the base": ("loss.unconditional=base",),
}
LOSSES: Settings = {
    "mse (default)": (),
    "huber": ("loss.function=huber",),
    "l1": ("loss.function=l1",),
    "min_snr": ("loss.weighting=min_snr",),
    "soft_min_snr": ("loss.weighting=soft_min_snr",),
    "debiased": ("loss.weighting=debiased",),
    "p2": ("loss.weighting=p2",),
    "timesteps 250 to 999": ("loss.timestep_range=[250,999]",),
    "logit-normal timesteps": ("loss.timestep_distribution=logit_normal",),
}
OPTIMIZERS: Settings = {
    "AdamW, 5e-4 (default)": (),
    "AdamW, 1e-3": ("optimizer.lr=1e-3",),
    "AdamW, 2e-3": ("optimizer.lr=2e-3",),
    "LoRA+, 5e-4": ("optimizer.lora_plus=16",),
    "Muon, 5e-3": ("optimizer.name=muon", "optimizer.lr=5e-3"),
    "Muon, 2e-2": ("optimizer.name=muon", "optimizer.lr=2e-2"),
    "Prodigy": ("optimizer.name=prodigy", "optimizer.lr=1"),
    "schedule-free AdamW, 2e-3": (
        "optimizer.name=adamw_schedulefree", "optimizer.schedule=constant", "optimizer.lr=2e-3",
    ),
    "EMA of 5 steps": ("optimizer.ema_decay=0.8",),
}  # fmt: skip
RATES = (1, 2, 4, 8)  # times the smallest rate of a kind of training
KINDS = {
    "all weights": (("finetune=full",), 5e-5),
    "LoRA": ((), 2.5e-4),
    "LoRA, UNet alone": (("lora.text_encoder=false",), 2.5e-4),
}


# Runs


class Lab:
    """The runs of this command and what was measured of them.

    Args:
        words: for every run.
        seeds: how many seeds each setting is trained with.
        samples: images of a cell.
    """

    def __init__(self, words: list[str], seeds: int, samples: int):
        self.words, self.seeds, self.samples = tuple(words), seeds, samples
        self.before = json.loads(NUMBERS.read_text()) if NUMBERS.exists() else {}

    def run(self, part: str, name: str, words: tuple[str, ...], seed: int) -> RunDir:
        """Train a run, or what is left of it, and return it; one of other settings or code is refused."""
        run = RunDir(WORK / part / f"{name.replace(' ', '_').replace('/', '_')}+seed={seed}")
        print(f"{part}: {name}, seed {seed}", flush=True)
        train_run(compose_config([*QUIET, *words, *self.words, f"seed={seed}"]), run)
        return run

    def probes(self, part: str, settings: Settings, common: tuple[str, ...]) -> dict[str, list[Probe]]:
        """Train every setting with every seed and return the scores of their best epochs."""
        found: dict[str, list[Probe]] = {name: [] for name in settings}
        for seed, (name, words) in product(range(self.seeds), settings.items()):
            probe = best_probe(self.run(part, name, (*common, *words), seed))
            assert probe is not None, f"{part}, {name}, seed {seed} has finished"
            found[name].append(probe)
        return found


def change(probes: list[Probe], others: list[Probe]) -> Gain:
    """Return the gain of `probes` minus that of `others`, mean over seeds, its error over images alone."""
    base = others[0].base_val.double()
    differences = [one.val.double() - two.val.double() for one, two in zip(probes, others, strict=True)]
    return paired_gain(base + torch.stack(differences).mean(0), base)


def over_pairs(values: list[float]) -> Estimate:
    """Return the mean of what each pair of runs says, with its error over pairs, Student's t."""
    error = np.std(values, ddof=1) / len(values) ** 0.5 if len(values) > 1 else float("nan")
    return Estimate(float(np.mean(values)), float(error), freedom=len(values) - 1)


def points(probes: list[Probe], others: list[Probe]) -> dict[str, Any]:
    """Return the difference in points of gain with both errors, and each pair's."""
    pairs = [100 * change([a], [b]).value for a, b in zip(probes, others, strict=True)]
    of_pairs, of_images = over_pairs(pairs), change(probes, others)
    return {
        "points": round(of_pairs.value, 2),
        "error over pairs": rounded(of_pairs.standard_error),
        "95 % over pairs": [rounded(of_pairs.low), rounded(of_pairs.high)],
        "error over images": rounded(100 * of_images.standard_error),
        "pairs": [round(value, 2) for value in pairs],
    }


def rounded(value: float, digits: int = 2) -> float | None:
    """Round for JSON; None for NaN."""
    return None if np.isnan(value) else round(value, digits)


def gains(probes: list[Probe]) -> list[str]:
    """Format the gain of each seed's run: `50.3 % +- 0.9 %`."""
    return [probe.val_gain.signed_size for probe in probes]


def note(part: str, lab: Lab, began: float, **numbers: Any) -> None:
    """Add a part's numbers to numbers.json, with date, commit and minutes of this call, and print them."""
    FIGURES.mkdir(exist_ok=True)
    known = json.loads(NUMBERS.read_text()) if NUMBERS.exists() else {}
    old = lab.before.get(part, {}).get("minutes of each call", [])
    about = {
        "date": now(), "commit": provenance()["git_commit"], "words": list(lab.words), "seeds": lab.seeds,
        "samples": lab.samples,
        "minutes of each call": [*old, round((time.monotonic() - began) / 60, 1)],
    }  # fmt: skip
    write_json(NUMBERS, known | {part: about | numbers})
    print(part, json.dumps(numbers, indent=1), flush=True)


# Images


def scenes(first: int, count: int) -> torch.Tensor:
    """Draw scenes, (count, 3, SIDE, SIDE) in 0 .. 1."""
    arrays = [np.asarray(draw(compose(first + i), "drawn")) for i in range(count)]
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2) / 255


def prompts(count: int) -> list[str]:
    """Return captions of scenes that no run has seen."""
    return [f"{compose(PROMPTS + i).caption}{STYLE}" for i in range(count)]


@cache
def extractor() -> FeatureExtractor:
    """Return what measures images: the demo base's VAE and the demo's CLIP."""
    config = compose_config(["data=demo", "model=demo"])
    return FeatureExtractor(config, starting_base(config))


@cache
def real(first: int, count: int, kind: str = "features") -> torch.Tensor:
    """Return features (count, D) of drawn scenes."""

    def make() -> dict[str, torch.Tensor]:
        return extractor().measure(scenes(first, count), [compose(first + i).caption for i in range(count)])

    return cached(WORK / "measured", {"version": 1, "real": first, "count": count}, make)[kind]


def scaled(rows: torch.Tensor) -> torch.Tensor:
    """Return style features in deviations of training images."""
    return standardised(rows, real(FINETUNE_SEEDS.start, UNITS))


def measured(run: RunDir, scale: float, count: int) -> dict[str, torch.Tensor]:
    """Return features and caption fit of images that a run draws by DDIM, from the same noise as all runs."""

    def make() -> dict[str, torch.Tensor]:
        images = sampled(trained_base(run, finished_config(run)), run.path.name, scale, prompts(count))
        return extractor().measure(images, prompts(count))

    weights = run.status.read()["settings_hash"], run.status.read()["code_hash"]
    return cached(WORK / "measured", {"version": 1, "run": weights, "scale": scale, "count": count}, make)


def distance(run: RunDir, scale: float, count: int) -> Estimate:
    """Return the style distance of a run's images to drawn ones."""
    rows = measured(run, scale, count)["features"]
    return kernel_distance(scaled(rows), scaled(real(REAL, REFERENCE)))


def apart(run: RunDir, other: RunDir, scale: float, count: int) -> Estimate:
    """Return a run's style distance minus another's, same prompts and start noise."""
    ours, theirs = (measured(one, scale, count)["features"] for one in (run, other))
    return kernel_difference(scaled(ours), scaled(theirs), scaled(real(REAL, REFERENCE)))


def pair(found: Estimate) -> list[float | None]:
    """Return a value with its standard error, for JSON."""
    return [rounded(found.value, 3), rounded(found.standard_error, 3)]


# Parts


def mistakes(lab: Lab) -> None:
    """The reference study's mistakes, one at a time, on the base that has little left to learn."""
    began = time.monotonic()
    common = ("model=demo_near", "experiment=slides", "trainer.max_epochs=3")
    every = tuple(word for words in MISTAKES.values() for word in words)
    found = lab.probes("mistakes", {"as meant": (), **MISTAKES, "all three": every}, common)
    note(
        "mistakes", lab, began, gain={name: gains(probes) for name, probes in found.items()},
        minus_as_meant={
            name: points(probes, found["as meant"]) for name, probes in found.items() if name != "as meant"
        },
    )  # fmt: skip


def dropout(lab: Lab) -> None:
    """Dropout of the adapter with and without guidance in the loss, and with one mask for both branches."""
    began = time.monotonic()
    common = ("model=demo", "lora.rank=16", "optimizer.lr=1e-3", "trainer.max_epochs=2")
    none, some = ("lora.dropout=0",), ("lora.dropout=0.1",)
    settings = {
        "1, none": none, "1, 0.1": some,
        "7.5, none": (*GUIDED, *none), "7.5, 0.1": (*GUIDED, *some),
        "7.5, 0.1 shared": (*GUIDED, *some, "loss.share_dropout=true"),
    }  # fmt: skip
    found = lab.probes("dropout", settings, common)
    compared = [("1, 0.1", "1, none"), ("7.5, 0.1", "7.5, none"), ("7.5, 0.1 shared", "7.5, none"),
                ("7.5, 0.1 shared", "7.5, 0.1")]  # fmt: skip
    note(
        "dropout", lab, began, gain={name: gains(probes) for name, probes in found.items()},
        differences={f"{a} minus {b}": points(found[a], found[b]) for a, b in compared},
    )  # fmt: skip


def losses(lab: Lab) -> None:
    """Losses, weightings and timesteps: gain, and style distance at 7.5, against the default."""
    against_default(lab, "losses", LOSSES)


def optimizers(lab: Lab) -> None:
    """Optimisers at several rates, and EMA: gain, and style distance at 7.5, against the default."""
    against_default(lab, "optimizers", OPTIMIZERS)


def against_default(lab: Lab, part: str, settings: Settings) -> None:
    """Compare settings with the first of them, in pairs of seeds."""
    began, scale = time.monotonic(), 7.5
    common = ("model=demo", "trainer.max_epochs=2")
    found = lab.probes(part, settings, common)
    first = next(iter(settings))
    table = {}
    for name, words in settings.items():
        runs, others = (
            [lab.run(part, label, (*common, *own), seed) for seed in range(lab.seeds)]
            for label, own in ((name, words), (first, settings[first]))
        )
        row: dict[str, Any] = {"gain": gains(found[name])}
        row["balanced gain"] = [probe.balanced_gain.signed_size for probe in found[name]]
        row["style distance"] = [pair(distance(run, scale, lab.samples)) for run in runs]
        row["caption fit"] = [
            round(measured(run, scale, lab.samples)["caption_fit"].mean().item(), 1) for run in runs
        ]
        if name != first:
            row["gain minus default's"] = points(found[name], found[first])
            row["distance minus default's"] = [
                pair(apart(run, other, scale, lab.samples)) for run, other in zip(runs, others, strict=True)
            ]
        table[name] = row
    note(part, lab, began, guidance=scale, table=table)


def guidance_of(base: BaseModel, count: int = 48) -> torch.Tensor:
    """Return cond - uncond of scenes at timesteps from 0 to the last, (count, C, H, W)."""
    latents, noise, timesteps = noisy_scenes(base, count)
    noisy = add_noise(latents, noise, timesteps, make_scheduler("ddpm", base).alphas_cumprod)
    empty = base.encode_captions([""]).expand(count, -1, -1)

    def unet(*inputs: torch.Tensor) -> torch.Tensor:
        return base.unet(*inputs, return_dict=False)[0]

    uncond, cond = predict_branches(unet, noisy, timesteps, base.encode_captions(prompts(count)), empty)
    assert uncond is not None, "it was given a prompt"
    return cond - uncond


def noisy_scenes(base: BaseModel, count: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return (latents, noise, timesteps) of scenes of the prompts, the same for every model."""
    scaling = base.vae.config.scaling_factor
    means = [base.vae.encode(part * 2 - 1).latent_dist.mean for part in scenes(PROMPTS, count).split(20)]
    latents = torch.cat(means) * scaling
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(0))
    return latents, noise, torch.arange(count) * 1000 // count


@torch.no_grad()
def guidance(lab: Lab) -> None:
    """Guided trainings: what became of cond - uncond, and the scale at which their images are best."""
    began, scales, common = time.monotonic(), (1, 2, 4, 7.5, 15, 30), ("model=demo", "trainer.max_epochs=3")
    settings: Settings = {"1, as shipped": ()}
    for w, (kind, words) in product((2, 4, 7.5, 15), UNCONDITIONAL.items()):
        settings[f"{w:g}, {kind}"] = (f"loss.guidance={w:g}", *words)
    settings["target 7.5"] = ("loss.guidance_target=7.5",)
    rows: dict[str, Any] = {}
    for seed, (name, words) in product(range(lab.seeds), settings.items()):
        run = lab.run("guidance", name, (*common, *words), seed)
        ordinary = lab.run("guidance", "1, as shipped", common, seed)
        ours, usual = (guidance_of(trained_base(one, finished_config(one))) for one in (run, ordinary))
        history = history_of(run)
        rho = (ours * usual).sum() / usual.square().sum()
        row = {
            "projection": rounded(rho.item(), 3),
            "cosine": rounded((rho * usual.norm() / ours.norm()).item(), 3),
            "gain": gains([history[best_epoch(history)]])[0],
            "distance by scale": {f"{s:g}": pair(distance(run, s, lab.samples)) for s in scales},
        }
        rows.setdefault(name, []).append(row)
        note("guidance", lab, began, runs=rows)


def rates(lab: Lab) -> None:
    """LoRA against all weights, each at the best of four rates; Holm over the comparisons."""
    began, common, scale = time.monotonic(), ("model=demo", "trainer.max_epochs=3"), 7.5
    runs: dict[str, dict[str, list[RunDir]]] = {}
    for seed, (kind, (words, least)), factor in product(range(lab.seeds), KINDS.items(), RATES):
        rate = f"{least * factor:g}"
        run = lab.run("rates", f"{kind} {rate}", (*common, *words, f"optimizer.lr={rate}"), seed)
        runs.setdefault(kind, {}).setdefault(rate, []).append(run)
    distances = {
        kind: {rate: [distance(run, scale, lab.samples).value for run in found] for rate, found in of.items()}
        for kind, of in runs.items()
    }
    compared: dict[str, Estimate] = {}
    for one, other in combinations(KINDS, 2):
        values = []
        for seed in range(lab.seeds):  # the rates are chosen by the other seeds
            a, b = (runs[kind][best_rate(distances[kind], seed)][seed] for kind in (one, other))
            values.append(apart(a, b, scale, lab.samples).value)
        compared[f"{one} minus {other}"] = over_pairs(values)
    chances = [
        2 * float(scipy.stats.t.sf(abs(e.value / e.standard_error), e.freedom)) for e in compared.values()
    ]
    note(
        "rates", lab, began,
        distances={
            kind: {rate: [round(value, 2) for value in found] for rate, found in of.items()}
            for kind, of in distances.items()
        },
        chosen={
            kind: [best_rate(of, seed) for seed in range(lab.seeds)] for kind, of in distances.items()
        },
        compared={
            name: {"distance": pair(estimate), "p by Holm": rounded(p, 4)}
            for (name, estimate), p in zip(compared.items(), holm(chances), strict=True)
        },
    )  # fmt: skip


def best_rate(distances: dict[str, list[float]], seed: int) -> str:
    """Return the rate with the least mean distance over all seeds but one, or over the only one."""

    def mean(rate: str) -> float:
        values = distances[rate]
        return float(np.mean(values[:seed] + values[seed + 1 :] or values))

    return min(distances, key=mean)


def holm(chances: list[float]) -> list[float]:
    """Return p-values corrected for their number (Holm 1979)."""
    found, least = [0.0] * len(chances), 0.0
    for at, index in enumerate(np.argsort(chances)):
        least = max(least, min(1.0, (len(chances) - at) * chances[index]))
        found[index] = least
    return found


def ranks(lab: Lab) -> None:
    """Rank by rate with a fixed alpha, LoRA and rsLoRA, on the base that has little left to learn."""
    began, common = time.monotonic(), ("model=demo_near", "trainer.max_epochs=3", "lora.alpha=16")
    settings: Settings = {
        f"{variant}, rank {rank}, {rate}": (
            f"lora.variant={variant}", f"lora.rank={rank}", f"optimizer.lr={rate}",
        )
        for variant, rank, rate in product(("lora", "rslora"), (1, 2, 4, 8, 16), ("2e-4", "5e-4", "1e-3"))
    }  # fmt: skip
    found = lab.probes("ranks", settings, common)
    differences = {}
    for name, probes in found.items():
        variant, rank, rate = name.split(", ")
        others = {f"minus rank 1, {rate}": found[f"{variant}, rank 1, {rate}"]} if rank != "rank 1" else {}
        if variant == "rslora":
            others[f"minus lora, {rank}"] = found[f"lora, {rank}, {rate}"]
        differences |= {f"{name}, {other}": points(probes, own) for other, own in others.items()}
    note(
        "ranks", lab, began,
        gain={name: gains(probes) for name, probes in found.items()}, differences=differences,
    )  # fmt: skip


def sizes(lab: Lab) -> None:
    """How many images a LoRA needs, with as many examples for all: gain, images of new captions, copies."""
    began, scale, rows = time.monotonic(), 7.5, {}
    sets: Settings = {
        f"{count} images": (
            "model=demo", f"trainer.max_epochs={1200 // count}", f"data.val_fraction={1 - count / DRAWN:g}",
        )
        for count in (25, 50, 100, 200, 400)
    }  # fmt: skip
    for seed, (name, words) in product(range(lab.seeds), sets.items()):
        run = lab.run("sizes", name, words, seed)
        history = history_of(run)
        best, last = history[best_epoch(history)], history[-1]
        row = {
            "best epoch": f"{best_epoch(history)} of {len(history) - 1}",
            "gain": gains([best])[0], "gain of the last epoch": gains([last])[0],
            "training minus held out": [points_apart(one) for one in (best, last)],
            "distance": pair(distance(run, scale, lab.samples)), "copies": copies(run, scale, lab.samples),
        }  # fmt: skip
        rows.setdefault(name, []).append(row)
        note("sizes", lab, began, sets=rows)


def points_apart(probe: Probe) -> float:
    """Return the gain on training images minus that on held-out ones, in points."""
    return round(100 * (probe.train_gain.value - probe.val_gain.value), 1)


def copies(run: RunDir, scale: float, count: int) -> dict[str, Any]:
    """Draw the captions that a run was trained on, and count the images that are copies of its images."""
    config = finished_config(run)
    _, training = real_images(config, run)
    texts = [training[i % len(training)].caption for i in range(count)]
    images = sampled(trained_base(run, config), run.path.name, scale, texts)
    files = [read_unit_image(image.path, config) for image in training]
    originals = TrainingThumbnails(
        thumbnails_of(torch.stack(files)), torch.stack([crops_of(one) for one in files])
    )
    unseen = originals.distances(thumbnails_of(scenes(REAL, REFERENCE)))
    found = copies_among(originals.distances(thumbnails_of(images)), unseen)
    return {name: found[name] for name in ("below", "samples", "expected")} | {"p": rounded(found["p"], 4)}


@torch.no_grad()
def noise(lab: Lab) -> None:
    """The reference study's FID: decode the *predicted noise* as if it were a latent, and measure that."""
    began, common, count = time.monotonic(), ("model=demo", "trainer.max_epochs=3"), 2 * lab.samples
    runs = {
        "LoRA": lab.run("noise", "LoRA", common, 0),
        "all weights": lab.run("noise", "all weights", (*common, "experiment=full_finetune"), 0),
    }
    models: dict[str, BaseModel] = {"base": load("demo")}
    models |= {name: trained_base(run, finished_config(run)) for name, run in runs.items()}
    latents, drawn_noise, timesteps = noisy_scenes(models["base"], count)
    noisy = add_noise(latents, drawn_noise, timesteps, make_scheduler("ddpm", models["base"]).alphas_cumprod)
    predicted, images = {"pure noise": drawn_noise}, {}
    for name, base in models.items():
        embeds = base.encode_captions(prompts(count))
        predicted[name] = torch.cat([
            base.unet(noisy[i : i + 20], timesteps[i : i + 20], embeds[i : i + 20], return_dict=False)[0]
            for i in range(0, count, 20)
        ])  # fmt: skip
        images[name] = sampled(base, name, 7.5, prompts(count))
    decoded = {name: models["base"].decode(latent) for name, latent in predicted.items()}
    reference = scaled(real(REAL, REFERENCE))

    def frechet(found: torch.Tensor) -> float:
        rows = extractor().measure(found, prompts(count))["features"]
        return round(frechet_distance(scaled(rows), reference), 1)

    distances = {name: frechet(found) for name, found in decoded.items()}
    of_images = {name: frechet(found) for name, found in images.items()}
    of_images["real images"] = round(frechet_distance(scaled(real(PROMPTS, count)), reference), 1)
    plot_noise(distances, of_images, decoded, images)
    note("noise", lab, began, count=count, predicted_noise_decoded=distances, images=of_images)


def sampled(base: BaseModel, name: str, scale: float, texts: list[str]) -> torch.Tensor:
    """Draw an image of each text by DDIM, from the same noise for all runs, (N, 3, SIDE, SIDE) in 0 .. 1."""
    parts = []
    with counted(f"drawing: {name}, guidance {scale:g}") as on_progress:
        for start in range(0, len(texts), 20):
            part = texts[start : start + 20]
            seeds = list(range(start, start + len(part)))
            options = {"num_inference_steps": STEPS, "seeds": seeds, "resolution": SIDE}
            parts.append(sample(base, part, Cell("ddim", scale), **options))
            on_progress(start + len(part), len(texts))
    return torch.cat(parts)


def plot_noise(
    distances: dict[str, float],
    of_images: dict[str, float],
    decoded: dict[str, torch.Tensor],
    images: dict[str, torch.Tensor],
) -> None:
    """Draw both distances as bars, and for each model what either was computed from."""
    names = ["base", "LoRA", "all weights", "pure noise"]
    figure = plt.figure(figsize=(10, 4.6), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=(1, 1.25))
    axis = left.subplots()
    rows = {f"{name},\nits noise decoded": distances[name] for name in names[:3]}
    rows["pure noise,\ndecoded"] = distances["pure noise"]
    rows |= {f"{name},\nimages": of_images[name] for name in names[:3]}
    rows["real images"] = of_images["real images"]
    colours = ["#d9731a"] * len(names) + ["#1f6fb4"] * 3 + ["#777777"]
    bars = axis.barh(list(rows), list(rows.values()), color=colours)
    axis.bar_label(bars, fmt="%.0f", padding=2, fontsize=8)
    axis.invert_yaxis()
    axis.set(xlabel="Frechet distance to real images (style features)", xlim=(0, 1.15 * max(rows.values())))
    axis.tick_params(axis="y", labelsize=8)
    axes = right.subplots(2, len(names))
    for col, name in enumerate(names):
        for row, found in enumerate((decoded, images)):
            tile = axes[row, col]
            tile.set(xticks=[], yticks=[])
            if name in found:
                tile.imshow(to_image(found[name][len(found[name]) // 2]))  # of timestep 500
            else:
                tile.axis("off")
        axes[0, col].set_title(name, fontsize=9)
    for row, label in enumerate(("predicted noise,\ndecoded", "image, DDIM at 7.5")):
        axes[row, 0].set_ylabel(label, fontsize=8)
    FIGURES.mkdir(exist_ok=True)
    figure.savefig(FIGURES / "noise.png", dpi=110)
    plt.close(figure)


@torch.no_grad()
def asrun(lab: Lab) -> None:
    """The reference study's LoRA with its mistakes, and as meant: images at guidance 1 and 7.5."""
    began, scales, common = time.monotonic(), (1, 7.5), ("model=demo", "trainer.max_epochs=6")
    rows: dict[str, Any] = {}
    for seed, name in product(range(lab.seeds), ("slides", "slides_asrun")):
        run = lab.run("asrun", name, (*common, f"experiment={name}"), seed)
        probe = best_probe(run)
        assert probe is not None, f"{run.path} has finished"
        row = {
            "gain": probe.val_gain.signed_size,
            "by timestep": [gain.signed_size for gain in probe.gain_by_timestep],
            "distance by scale": {f"{s:g}": pair(distance(run, s, lab.samples)) for s in scales},
        }
        rows.setdefault(name, []).append(row)
    base = {f"{s:g}": pair(base_distance(s, lab.samples)) for s in scales}
    note("asrun", lab, began, runs=rows, base=base)


def base_distance(scale: float, count: int) -> Estimate:
    """Return the style distance of the untouched base's images."""
    images = sampled(load("demo"), "base", scale, prompts(count))
    rows = extractor().measure(images, prompts(count))["features"]
    return kernel_distance(scaled(rows), scaled(real(REAL, REFERENCE)))


def which_gain(lab: Lab) -> None:
    """Which gain goes along with better images, over the runs of `rates`."""
    began, compare = time.monotonic(), runpy.run_path(str(ROOT / "docs" / "gain_check.py"))["compare"]
    rows, groups = [], []
    for run in (RunDir(path) for path in sorted((WORK / "rates").glob("*"))):
        groups.append(run.path.name.partition("+seed=")[0])
        probe, found = best_probe(run), measured(run, 7.5, lab.samples)
        assert probe is not None, f"{run.path} has finished"
        rows.append({
            "gain": probe.val_gain.value, "balanced gain": probe.balanced_gain.value,
            "distance": distance(run, 7.5, lab.samples).value,
            "caption fit": found["caption_fit"].mean().item(),
        })  # fmt: skip
    note("which_gain", lab, began, lines=compare(rows, groups))


def race(lab: Lab, orders: int = 50, bootstraps: int = 200) -> None:
    """Race the trials that other parts have trained to the end: winner, epochs, and false stops."""
    began, draws = time.monotonic(), np.random.default_rng(0)
    rows = lab.before.get("race", {}).get("studies", {})
    for folder in (WORK / part for part in RACED):
        runs = [RunDir(path) for path in sorted(folder.glob("*+seed=0"))]
        histories = [history_of(run) for run in runs if run.status.state == "finished"]
        if len(histories) < 4:
            continue
        last = [history[best_epoch(history)].val.double().mean().item() for history in histories]
        best, found = int(np.argmin(last)), []
        for _ in range(orders):
            order = draws.permutation(len(histories))
            one = replay([histories[index] for index in order])
            found.append((int(order[one["winner"]]) == best, one["epochs"]))
        false = sum(
            is_false(histories, draws.integers(len(histories[0][0].val), size=len(histories[0][0].val)))
            for _ in range(bootstraps)
        )
        rows[folder.name] = {
            "trials": len(histories), "epochs in all": sum(len(history) - 1 for history in histories),
            "orders": orders, "the same winner": sum(same for same, _ in found),
            "mean epochs": round(float(np.mean([epochs for _, epochs in found])), 1),
            "bootstraps": bootstraps, "with a false stop": false,
        }  # fmt: skip
    note("race", lab, began, studies=rows)


def is_false(histories: list[list[Probe]], images: np.ndarray) -> bool:
    """Tell whether a race on resampled images stops a trial that on all images is not behind its leader."""
    drawn = [[Probe(**{key: rows[images] for key, rows in held_out(one)}) for one in h] for h in histories]
    stopped = replay(drawn)["stopped"]
    for number, at in stopped.items():
        before = [other for other in range(number) if other not in stopped]
        leader = min(before, key=lambda other: Runner("", 0, drawn[other]).loss)
        if histories[number][at].val.double().mean() <= histories[leader][at].val.double().mean():
            return True
    return False


def held_out(probe: Probe) -> list[tuple[str, torch.Tensor]]:
    """Return a probe's fields, those of training images replaced by the held-out ones of the same length."""
    val, base = probe.val, probe.base_val
    return [("val", val), ("val_g1", val), ("train", val), ("base_val", base), ("base_train", base)]


PARTS: tuple[Callable[[Lab], None], ...] = (
    mistakes, noise, dropout, losses, optimizers, guidance, rates, which_gain, ranks, sizes, asrun, race,
)  # fmt: skip


def main() -> None:
    """Run the parts that are named, or all."""
    parts = {part.__name__: part for part in PARTS}
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("words", nargs="*", metavar="PART | KEY=VALUE", help=", ".join(parts))
    parser.add_argument("--seeds", type=int, default=3, help="of each setting (default: 3)")
    parser.add_argument("--samples", type=int, default=100, help="images of a cell (default: 100)")
    given = parser.parse_intermixed_args()
    words = [word for word in given.words if "=" in word]
    names = [word for word in given.words if "=" not in word]
    if unknown := set(names) - set(parts):
        parser.error(f"no part {', '.join(sorted(unknown))}; there are {', '.join(parts)}")
    config: Config = compose_config([*QUIET, *words])
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    for name in names or parts:
        parts[name](Lab(words, given.seeds, given.samples))


if __name__ == "__main__":
    main()
