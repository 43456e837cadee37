"""The run doctor: what goes wrong in a training, each with what was seen, what it means, what to do.

Pure rules: configuration and scores in, findings out. callbacks.Doctor asks and tells.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from ghibli.config.schema import Config
from ghibli.diffusion.process import GUIDED_SCALE
from ghibli.evaluation.gain import Probe, best_epoch, paired_difference, paired_gain

EPOCHS_TO_LEARN = 3  # a learning rate that fits shows within the first; three leave room for doubt
NOTHING = 0.001  # a gain below this is nothing, even where pairing proves that it is not zero
VISIBLE = 0.01  # a gain that 2 standard errors must be able to show before its absence means anything
FEWEST_IMAGES = 5  # held out; with fewer a standard error is worth nothing
COLLAPSED = 0.9  # always predicting zero scores 1.0, the variance of the noise


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong, or that one should know."""

    name: str
    text: str
    level: str = "warning"  # or error, or note


def percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def at_the_start(
    config: Config,
    alphas_cumprod: torch.Tensor,
    base_alphas_cumprod: torch.Tensor,
    trainable: Iterable[torch.Tensor],
) -> list[Finding]:
    """What can be said before the first step.

    Args:
        alphas_cumprod, base_alphas_cumprod: (T,) of training and of the base.
        trainable: the weights that are trained.
    """
    found = [
        schedule(alphas_cumprod, base_alphas_cumprod),
        half_precision(trainable),
        sampling_scale(config.loss.guidance),
    ]
    return [finding for finding in found if finding is not None]


def after_epoch(history: list[Probe], config: Config) -> list[Finding]:
    """What the newest probe says. `history` starts with the untouched model.

    With fewer than FEWEST_IMAGES held-out images only what needs no standard error is asked.
    """
    if len(history) < 2 or not history[-1].base_val.isfinite().all():
        return []
    rate = config.optimizer.lr
    collapse = collapsed(history, rate) if config.loss.guidance == 1 else None
    found = [collapse, no_effect(history, config.finetune)]
    enough = len(history[-1].val) >= FEWEST_IMAGES
    # trained with other noise than it is judged with, it may get worse whatever the rate is
    same_noise = config.loss.noise_schedule == "base" and config.loss.noise_offset == 0
    if enough and same_noise and not any(found):
        found += [rate_too_high(history, rate), no_learning(history, rate)]
    if enough:
        found.append(overfitting(history, config.finetune))
    return [finding for finding in found if finding is not None]


def schedule(alphas_cumprod: torch.Tensor, base_alphas_cumprod: torch.Tensor) -> Finding | None:
    """Training adds noise by other betas than the base was trained with."""
    if torch.allclose(alphas_cumprod, base_alphas_cumprod, atol=1e-6):
        return None
    middle = len(alphas_cumprod) // 2
    meant, given = ((1 - table[middle]).sqrt().item() for table in (base_alphas_cumprod, alphas_cumprod))
    return Finding(
        "noise schedule",
        f"at timestep {middle} the base expects {percent(meant)} noise and this training gives it "
        f"{percent(given)}: the adapter learns to correct the mix-up before it learns the style, and every "
        "sampler uses the base's schedule; leave loss.noise_schedule at base, unless the slides' mistake "
        "is what you want to see",
    )


def half_precision(trainable: Iterable[torch.Tensor]) -> Finding | None:
    """Trained weights in 16 bits lose small updates: 0.05 + 0.0001 is 0.05 in bf16."""
    kinds = {str(weight.dtype).removeprefix("torch.") for weight in trainable} - {"float32", "float64"}
    if not kinds:
        return None
    return Finding(
        "weights in 16 bits",
        f"the trained weights are {', '.join(sorted(kinds))}, in which small updates round to nothing "
        "(0.05 + 0.0001 is 0.05): keep them in float32 and use trainer.precision=bf16-mixed or 16-mixed",
    )


def sampling_scale(guidance: float) -> Finding | None:
    """A guided training moves the sampling scale at which images look as usual."""
    if guidance == 1:
        return None
    return Finding(
        "sampling scale",
        f"trained with loss.guidance={guidance:g}, it is mush when sampled at 1 and looks like an ordinary "
        f"model at 1 when sampled at {guidance:g}; neither means that training failed: sample it at about "
        f"{GUIDED_SCALE * guidance:g}, the last column of the grids (`ghibli evaluate RUN` tries more)",
    )


def collapsed(history: list[Probe], rate: float) -> Finding | None:
    """Guidance 1 only: the loss of a network that always predicts zero. The base was far below."""
    now, base = history[-1].val_g1.mean().item(), history[-1].base_val.mean().item()
    if now < COLLAPSED or base >= COLLAPSED:
        return None
    return Finding(
        "collapse",
        f"the held-out loss is {now:.2f}, the base's {base:.2f}; 1.0 is what predicting nothing scores: "
        f"the weights are destroyed and will hardly recover; stop, and start again with a tenth of the "
        f"learning rate, optimizer.lr={rate / 10:g}",
    )


def rate_too_high(history: list[Probe], rate: float) -> Finding | None:
    """Worse than at the start by more than 3 standard errors and rising; training images are worse too."""
    gain = paired_gain(history[-1].val, history[0].val)
    rises = history[-1].val.sum() > history[-2].val.sum()
    by_heart = history[-1].train.sum() < history[0].train.sum()  # that is overfitting
    if not (gain.value < -3 * gain.standard_error and rises) or by_heart:
        return None
    return Finding(
        "learning rate too high",
        f"the held-out loss is {percent(-gain.value)} +- {percent(gain.standard_error)} above where it "
        f"started and rises: each step goes too far; start again with a third of the learning rate, "
        f"optimizer.lr={rate / 3:.2g}",
    )


def no_effect(history: list[Probe], finetune: str) -> Finding | None:
    """Every score is still the untouched model's, to the bit."""
    if not torch.equal(history[-1].val, history[0].val):
        return None
    switched_off = " or an adapter that is switched off" if finetune == "lora" else ""
    return Finding(
        "no effect",
        "every score is exactly that of the untouched model: what is trained does not reach the prediction "
        f"(a learning rate of almost 0{switched_off}); check optimizer.lr",
    )


def no_learning(history: list[Probe], rate: float) -> Finding | None:
    """Within 2 standard errors of the start, or next to it, after EPOCHS_TO_LEARN epochs.

    Not asked where the standard error is so large that a gain of VISIBLE could hide in it.
    """
    gain = paired_gain(history[-1].val, history[0].val)
    error = gain.standard_error
    if len(history) - 1 < EPOCHS_TO_LEARN or abs(gain.value) > max(2 * error, NOTHING) or 2 * error > VISIBLE:
        return None
    return Finding(
        "no learning",
        f"after {len(history) - 1} epochs the gain since the start is {percent(gain.value)} +- "
        f"{percent(error)}, which is nothing: the learning rate is too low, or captions and images do not "
        f"belong together; try optimizer.lr={3 * rate:.2g}, and look at the captions in data.root",
    )


def overfitting(history: list[Probe], finetune: str) -> Finding | None:
    """Two epochs in a row, held-out images are worse than at the best epoch, training ones better."""
    best = best_epoch(history)
    since = history[best + 1 :]
    if len(since) < 2 or not all(memorising(probe, history[best]) for probe in since[-2:]):
        return None
    now, then = history[-1], history[best]
    smaller = " or a lower lora.rank" if finetune == "lora" else ""
    return Finding(
        "overfitting",
        f"since epoch {best} held-out images get worse (gain {percent(then.val_gain.value)}, now "
        f"{percent(now.val_gain.value)}) while training images get better "
        f"({percent(then.train_gain.value)}, now {percent(now.train_gain.value)}): it learns these images "
        f"by heart; best.ckpt keeps the best epoch; more images, fewer epochs{smaller} help",
    )


def few_images(images: int, features: int, real_frechet: float) -> list[Finding]:
    """A Frechet distance asked of too few images for a covariance of that many features.

    Args:
        images: the smaller of the two sets.
        real_frechet: the distance of two sets of real images of about that size.
    """
    if images > features:
        return []
    text = (
        f"the Frechet distance is taken from {images} images in a space of {features} features, where it "
        f"is mostly bias (two sets of real images are {real_frechet:.3g} apart): judge by the kernel "
        f"distance, which is free of it, or give more than {features} images (evaluate.samples, "
        "data.reference)"
    )
    return [Finding("few images", text)]


def memorising(now: Probe, then: Probe) -> bool:
    """Held-out images worse by more than 2 standard errors of the difference, training ones better."""
    difference, error = paired_difference(now.val, then.val)
    return difference > 2 * error and bool(now.train.sum() < then.train.sum())


def not_finite(names: list[str], timesteps: list[int], losses: list[float], step: int, rate: float) -> str:
    """The sentence for a loss or gradient that is no number, naming the worst examples.

    Args:
        names, timesteps, losses: of the examples since the last optimiser step.
    """
    examples = list(zip(names, timesteps, losses, strict=True))
    broken = [e for e in examples if e[2] - e[2] != 0]  # inf and nan
    if broken:
        what = "the loss is not finite for " + listed(broken)
        cure = "run it again, and if it is the same images, look at them; else lower"
    else:
        what = "a gradient is not finite, after the losses of " + listed(examples)
        cure = "lower"
    return (
        f"step {step}: {what}; nothing was updated with it and the checkpoints are from before: {cure} "
        f"optimizer.lr (it is {rate:g}) or use trainer.precision=32-true"
    )


def listed(examples: list[tuple[str, int, float]]) -> str:
    """`panda.png at timestep 812 (nan), ...`, five at most."""
    words = [f"{name} at timestep {timestep} ({loss:.3g})" for name, timestep, loss in examples[:5]]
    more = len(examples) - len(words)
    return ", ".join(words) + (f" and {more} more" if more else "")
