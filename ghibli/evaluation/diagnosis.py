"""The run doctor's rules: what goes wrong in a training, what was seen, what it means and what to do.

Pure functions from settings and scores to findings; the callback Doctor calls them and reports.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import torch

from ghibli.config.schema import Config
from ghibli.diffusion.process import usual_guidance
from ghibli.evaluation.gain import Probe, best_epoch, paired_difference, paired_gain
from ghibli.runtime.wording import number_of

EPOCHS_TO_LEARN = 3  # a learning rate that fits shows in the first epoch; three leave a margin
NOTHING = 0.001  # a gain below this is nothing, even if it is significantly above zero
VISIBLE = 0.01  # 2 standard errors must be below this before the absence of a gain means anything
FEWEST_IMAGES = 5  # held out; with fewer a standard error is meaningless
MEASURED = 7.5  # the guidance of trainings whose sampling scale was measured, see usual_guidance
COLLAPSED = 0.9  # always predicting zero has loss 1.0, the variance of the noise


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong, or worth knowing."""

    name: str
    text: str
    level: str = "warning"  # or error, or note


def percent_text(share: float) -> str:
    """Format a share as a percentage: `4.1 %` for 0.041."""
    return f"{100 * share:.1f} %"


def at_the_start(
    guidance: float,
    alphas_cumprod: torch.Tensor,
    base_alphas_cumprod: torch.Tensor,
    trainable: Iterable[torch.Tensor],
) -> list[Finding]:
    """Return the findings before the first step.

    Args:
        guidance: of the training, LossConfig.own_guidance.
        alphas_cumprod, base_alphas_cumprod: (T,) of the training and of the base.
        trainable: the weights that are trained.
    """
    found = [
        wrong_noise_schedule(alphas_cumprod, base_alphas_cumprod),
        weights_in_16_bits(trainable),
        guided_sampling_scale(guidance),
    ]
    return [finding for finding in found if finding is not None]


def after_epoch(history: list[Probe], config: Config) -> list[Finding]:
    """Return the findings from the newest probe.

    With fewer than FEWEST_IMAGES held-out images, only the rules that need no standard error apply.

    Args:
        history: starts with the untouched model.
    """
    if len(history) < 2 or not history[-1].base_val.isfinite().all():
        return []
    rate, finetune = config.optimizer.lr, config.finetune
    # a guided loss starts far above the loss of zero
    found = [collapse(history, rate)] if config.loss.own_guidance <= 1 else []
    found.append(no_effect(history, finetune))
    enough_images = len(history[-1].val) >= FEWEST_IMAGES
    # a training with other noise than the probe's may get worse at any learning rate
    same_noise = config.loss.noise_schedule == "base" and config.loss.noise_offset == 0
    if enough_images and same_noise and not any(found):
        found += [learning_rate_too_high(history, rate), no_learning(history, rate)]
    if enough_images:
        found.append(overfitting(history, finetune))
        planned = config.trainer.get("max_epochs")
        least = min(EPOCHS_TO_LEARN, planned) if isinstance(planned, int) and planned > 0 else EPOCHS_TO_LEARN
        if len(history) - 1 >= least:
            found.append(worse_at_some_noise(history[-1]))
    found.append(forgets_faster(history, config))
    return [finding for finding in found if finding is not None]


def wrong_noise_schedule(alphas_cumprod: torch.Tensor, base_alphas_cumprod: torch.Tensor) -> Finding | None:
    """Return a finding if training adds noise with other betas than the base was trained with; both (T,)."""
    if torch.allclose(alphas_cumprod, base_alphas_cumprod, atol=1e-6):
        return None
    middle = len(alphas_cumprod) // 2
    meant, given = ((1 - table[middle]).sqrt().item() for table in (base_alphas_cumprod, alphas_cumprod))
    return Finding(
        "noise schedule",
        f"at timestep {middle} the base expects noise with an amplitude of {meant:.3f} and this training "
        f"gives it {given:.3f}: the adapter learns to correct this mismatch before it learns the style, and "
        "every sampler uses the base's schedule; keep loss.noise_schedule=base, unless you want to reproduce "
        "the reference study's error",
    )


def weights_in_16_bits(trainable: Iterable[torch.Tensor]) -> Finding | None:
    """Return a finding if trained weights have 16 bits, which lose small updates.

    In bf16, 0.05 + 0.0001 is 0.05.
    """
    kinds = {str(weight.dtype).removeprefix("torch.") for weight in trainable} - {"float32", "float64"}
    if not kinds:
        return None
    return Finding(
        "weights in 16 bits",
        f"the trained weights are {', '.join(sorted(kinds))}, in which small updates round to nothing "
        "(0.05 + 0.0001 is 0.05): keep them in float32 and use trainer.precision=bf16-mixed or 16-mixed",
    )


def guided_sampling_scale(guidance: float) -> Finding | None:
    """Return a finding if training uses guidance, in its loss or (below 1) in its target.

    Guidance moves the sampling scale at which images look as usual.
    """
    if guidance == 1:
        return None
    scale = usual_guidance(guidance)
    if guidance < 1:
        return Finding(
            "sampling scale",
            f"trained with loss.guidance_target={1 / guidance:g}, sample at about {scale:g}, a column of the "
            "grids: the guess that follows from the loss, though short trainings on the demo were nearer "
            "to real images at larger scales (`ghibli evaluate RUN` tries more)",
        )
    guess = "" if guidance == MEASURED else f", a guess from trainings at {MEASURED:g} on the demo"
    return Finding(
        "sampling scale",
        f"trained with loss.guidance={guidance:g}, the images are mush when sampled at 1 and not at their "
        f"best at {guidance:g}; neither means that training failed: sample at about {scale:g}, the last "
        f"column of the grids{guess} (`ghibli evaluate RUN` tries more)",
    )


def collapse(history: list[Probe], rate: float) -> Finding | None:
    """Return a finding if the loss is that of a network that always predicts zero.

    Checked where the noise is learned at guidance 1 or below, and only if the base's loss was far below.
    """
    now, base = history[-1].val.mean().item(), history[-1].base_val.mean().item()
    if now < COLLAPSED or base >= COLLAPSED:
        return None
    return Finding(
        "collapse",
        f"the held-out loss is {now:.2f}, the base's {base:.2f}, and always predicting zero scores 1.0: the "
        "weights are destroyed and will hardly recover; stop, and start again with a tenth of the learning "
        f"rate, optimizer.lr={rate / 10:g}",
    )


def learning_rate_too_high(history: list[Probe], rate: float) -> Finding | None:
    """Return a finding if the held-out loss is far above its start and still rising.

    By over 3 standard errors, and on training images too.
    """
    gain = paired_gain(history[-1].val, history[0].val)
    is_rising = history[-1].val.sum() > history[-2].val.sum()
    training_improved = history[-1].train.sum() < history[0].train.sum()  # then it is overfitting
    if not (gain.value < -3 * gain.standard_error and is_rising) or training_improved:
        return None
    return Finding(
        "learning rate too high",
        f"the held-out loss is {percent_text(-gain.value)} +- {percent_text(gain.standard_error)} above "
        "where it started and still rising: each step overshoots; start again with a third of the learning "
        f"rate, optimizer.lr={rate / 3:.2g}",
    )


def no_effect(history: list[Probe], finetune: str) -> Finding | None:
    """Return a finding if every score still equals the untouched model's, bit for bit."""
    if not torch.equal(history[-1].val, history[0].val):
        return None
    switched_off = " or an adapter that is switched off" if finetune == "lora" else ""
    return Finding(
        "no effect",
        "every score is exactly that of the untouched model: what is trained does not reach the prediction "
        f"(a learning rate of almost 0{switched_off}); check optimizer.lr",
    )


def no_learning(history: list[Probe], rate: float) -> Finding | None:
    """Return a finding if there is no gain after EPOCHS_TO_LEARN epochs.

    No gain means within 2 standard errors of zero, or below NOTHING. Skipped if the standard error is so
    large that a gain of VISIBLE could hide in it.
    """
    gain = paired_gain(history[-1].val, history[0].val)
    error = gain.standard_error
    if len(history) - 1 < EPOCHS_TO_LEARN or abs(gain.value) > max(2 * error, NOTHING) or 2 * error > VISIBLE:
        return None
    return Finding(
        "no learning",
        f"after {number_of(len(history) - 1, 'epoch')} the gain since the start is "
        f"{percent_text(gain.value)} +- {percent_text(error)}, which is nothing: the learning rate is too "
        f"low, or captions and images do not match; try optimizer.lr={3 * rate:.2g}, and check the captions "
        "in data.root",
    )


def overfitting(history: list[Probe], finetune: str) -> Finding | None:
    """Return a finding if the last two epochs memorise training images.

    In both, held-out images are worse than at the best epoch, and training images better.
    """
    best = best_epoch(history)
    since = history[best + 1 :]
    if len(since) < 2 or not all(memorising(probe, history[best]) for probe in since[-2:]):
        return None
    now, then = history[-1], history[best]
    smaller = " or a lower lora.rank" if finetune == "lora" else ""
    return Finding(
        "overfitting",
        f"since epoch {best} held-out images get worse (gain {percent_text(then.val_gain.value)}, now "
        f"{percent_text(now.val_gain.value)}) while training images get better "
        f"({percent_text(then.train_gain.value)}, now {percent_text(now.train_gain.value)}): the training "
        f"images are memorised; best.ckpt keeps the best epoch; more images, fewer epochs{smaller} help",
    )


def worse_at_some_noise(probe: Probe) -> Finding | None:
    """Return a finding if the gain hides a range of timesteps in which the model is worse than the base."""
    gains = probe.gain_by_timestep
    worst = min(range(len(gains)), key=lambda k: gains[k].value)
    if not (probe.val_gain.low > 0 and gains[worst].high < 0):
        return None
    share = (probe.base_val[:, worst].double().sum() / probe.base_val.double().sum()).item()
    return Finding(
        "worse at some noise",
        f"in part {worst + 1} of {len(gains)} of the timesteps (1 = least noise) held-out images are "
        f"{gains[worst].size} worse than the base's, while all together they are {probe.val_gain.size} "
        f"better: that part has {percent_text(share)} of the base's loss, so the gain hardly shows it. The "
        "last parts decide the layout of an image, the first its texture: look at the grids, and at "
        "probe/val_gain_balanced in probe.csv, which counts all parts alike",
    )


def forgets_faster(history: list[Probe], config: Config) -> Finding | None:
    """Return a finding if the last epoch took more from what the base was made for than it gave to the style.

    Both are squared errors of the noise, so they compare as they are, unlike gain and price, which are shares
    of two different losses: on the demo the base's is ten times as high on the style. The difference must be
    above 2 standard errors, and the rise above VISIBLE of the base's loss.
    """
    now, before = history[-1], history[-2]
    if min(len(now.price), len(before.price), len(now.val)) < FEWEST_IMAGES:
        return None
    lost, lost_error = paired_difference(now.price, before.price)
    learned, learned_error = paired_difference(before.val, now.val)
    visible = VISIBLE * now.base_price.double().mean().item()
    if not (lost > visible and lost - learned > 2 * math.hypot(lost_error, learned_error)):
        return None
    epoch = len(history) - 1
    stop = f"stop before it, trainer.max_epochs={epoch - 1}, or " if epoch > 1 else ""
    brake = " or brake with loss.keep=0.3 (docs/understanding.md)" if config.finetune == "lora" else ""
    return Finding(
        "forgets faster than it learns",
        f"in epoch {epoch} the loss on held-out images fell by {learned:.4f} +- {learned_error:.4f}, and "
        f"that on what the base was made for rose by {lost:.4f} +- {lost_error:.4f}: {stop}lower "
        f"optimizer.lr (it is {config.optimizer.lr:g}){brake}",
    )


def memorising(now: Probe, then: Probe) -> bool:
    """Return True if held-out images got worse while training images got better.

    Worse means by over 2 standard errors of the difference.
    """
    difference, error = paired_difference(now.val, then.val)
    return difference > 2 * error and bool(now.train.sum() < then.train.sum())


def few_images(images: int, features: int, real_frechet: float) -> list[Finding]:
    """Return a finding if the Frechet distance has too few images for a covariance of that many features.

    Args:
        images: the size of the smaller set.
        real_frechet: the distance between two sets of real images of about that size.
    """
    if images > features:
        return []
    text = (
        f"the Frechet distance is computed from {images} images in a space of {features} features, where it "
        f"is mostly bias (two sets of real images are {real_frechet:.3g} apart): judge by the kernel "
        f"distance, which is unbiased, or give more than {features} images (evaluate.samples, "
        "data.reference)"
    )
    return [Finding("few images", text)]


class TrainedExample(NamedTuple):
    """An example of training, and the losses of its forward pass."""

    name: str
    timestep: int
    loss: float  # of denoising
    total: float  # of its batch, with all terms that are added


def not_finite(examples: list[TrainedExample], step: int, rate: float) -> str:
    """Return the message for a loss or gradient that is not finite, naming the examples to blame.

    Args:
        examples: those since the last optimiser step.
    """
    broken = [e for e in examples if not math.isfinite(e.loss)]
    beside = [e for e in examples if not math.isfinite(e.total)]
    if broken:
        what = "the loss is not finite for " + list_examples(broken)
        cure = "run it again, and if it is the same images, check them; otherwise lower"
    elif beside:
        what = "a weight or a term of the loss is not finite, with the losses of " + list_examples(beside)
        cure = "lower"
    else:
        what = "a gradient is not finite, after the losses of " + list_examples(examples)
        cure = "lower"
    return (
        f"step {step}: {what}; the checkpoints are from before it: {cure} "
        f"optimizer.lr (it is {rate:g}) or use trainer.precision=32-true"
    )


def list_examples(examples: list[TrainedExample]) -> str:
    """Format examples with their losses, five at most: `panda.png at timestep 812 (nan), ...`."""
    listed = [f"{one.name} at timestep {one.timestep} ({one.loss:.3g})" for one in examples[:5]]
    more = len(examples) - len(listed)
    return ", ".join(listed) + (f" and {more} more" if more else "")
