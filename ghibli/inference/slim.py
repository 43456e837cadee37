"""`ghibli slim`: which layers of a run's adapter carry its gain, and the smallest adapter that keeps it."""

import logging
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch

from ghibli.adapters import kohya
from ghibli.adapters.files import Adapter, read_adapter
from ghibli.adapters.layers import Layer, same_update
from ghibli.adapters.model_card import model_card
from ghibli.adapters.sidecar import clean_name, write_sidecar
from ghibli.adapters.subset import Parts, parameters_of, split, write_subset
from ghibli.adapters.trained import run_base
from ghibli.config.paths import ADAPTER_FILE
from ghibli.config.schema import Config
from ghibli.evaluation.gain import paired_gain
from ghibli.evaluation.layer_map import LayerMap, Row, block_of, blocks_of, check_own_files, write_map
from ghibli.evaluation.slimming import (
    Component,
    LostGain,
    has_gain,
    in_order_of_worth,
    lost_gain,
    most_trials,
    smallest,
)
from ghibli.inference.layer_scorer import LayerScorer, make_scorer
from ghibli.inference.owned import check_ours, prepared
from ghibli.models.base import BaseModel
from ghibli.runs.folder import RunDir
from ghibli.runtime.console import counted
from ghibli.runtime.errors import UserError
from ghibli.runtime.files import write_text

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Losses:
    """What the probe's items of the held-out images cost, each (P, K)."""

    base: torch.Tensor  # the untouched base, at guidance 1 as in every gain
    full: torch.Tensor  # the run's whole adapter, at the training guidance
    choose: list[int]  # rows that choose
    check: list[int]  # rows that only check

    def lost(self, losses: torch.Tensor, images: list[int]) -> LostGain:
        """Return the gain lost on some images; `losses` are of those only."""
        return lost_gain(losses, self.full[images], self.base[images])


@dataclass(frozen=True)
class Choice:
    """The smallest adapter that was found, and what it loses on either half of the held-out images."""

    layers: dict[str, Layer]
    chosen: LostGain  # on the half that chose it
    checked: LostGain  # on the other half
    limit: float

    @property
    def holds(self) -> bool:
        return self.checked.bound <= self.limit


@dataclass(frozen=True)
class Slimmed:
    """What `ghibli slim` found and wrote."""

    map: LayerMap
    files: list[Path]
    summary: str  # of the files; or why there are none
    notes: list[str]


def slim(run: RunDir, config: Config, limit: float, folder: Path) -> Slimmed:
    """Measure what each layer carries, and write the smallest adapter that loses less than `limit`.

    RUN/slim.json and slim.csv hold the map of the layers, whatever becomes of the adapter.

    Args:
        limit: share of the gain, 0 .. 1, that may be lost, with 95 % confidence.
        folder: gets the adapter, for diffusers and in kohya's layout, and a model card.

    Raises:
        UserError: a file of the user would be replaced, too few held-out images, another base or other images
            than in training, or no gain that could be lost.
    """
    name = f"{clean_name(run.path.resolve().name)}_slim"
    names = [ADAPTER_FILE, f"{name}_kohya.safetensors", f"{name}_kohya.json", "README.md"]
    check_own_files(run)
    check_ours(folder, names)
    base = run_base(run, config)
    adapter = read_adapter(run.adapter, base, "slim")
    parts = split(adapter, base)
    scorer = make_scorer(run, config, base, adapter)
    losses, seconds = measure_whole(scorer, adapter, run)
    announce(adapter, parts, losses, seconds)
    scores = score_without(scorer, adapter)
    found = layer_map(run, adapter, scores, losses, limit)
    write_map(run, found)
    effects = {name: losses.lost(scores[name][losses.choose], losses.choose) for name in adapter.layers}
    choice = choose(scorer, parts, effects, losses, limit)
    reason = refusal(choice, adapter, config)
    found = found.after(choice.chosen, choice.checked, choice.layers if reason is None else None)
    write_map(run, found)
    if reason is not None:
        return Slimmed(found, [], f"{run.path}: {reason}", [])
    files, notes = write_files(run, config, adapter, choice, base, folder, name)
    return Slimmed(found, files, summary_of(choice, adapter, files[0]), notes)


def measure_whole(scorer: LayerScorer, adapter: Adapter, run: RunDir) -> tuple[Losses, float]:
    """Score the base and the whole adapter on all held-out images; return the seconds an image takes.

    Raises:
        UserError: on one half the adapter is not better than the base, beyond chance.
    """
    choose, check = scorer.halves
    every = range(len(scorer.batches))
    scorer.put({})
    base = scorer.losses(every, guidance=1.0)
    scorer.put(adapter.layers)
    start = time.monotonic()
    full = scorer.losses(every)
    seconds = (time.monotonic() - start) / len(every)
    for rows in (choose, check):
        gain = paired_gain(full[rows], base[rows])
        if not has_gain(gain, len(rows)):
            images = f"{len(rows)} held-out images"
            raise UserError(
                f"{run.path}: on {images} its gain is {gain.signed_size}, perhaps by chance, so there is "
                "none for a smaller adapter to keep: train longer, or hold out more images "
                "(data.val_fraction, validation.max_images)"
            )
    return Losses(base, full, choose, check), seconds


def announce(adapter: Adapter, parts: dict[str, Parts], losses: Losses, seconds: float) -> None:
    """Say what is going to be scored, and about how long it takes."""
    trials = most_trials(sum(len(each.shares) for each in parts.values()))
    blocks = len(left_out(adapter)) - len(adapter.layers)
    images = len(losses.base) * len(left_out(adapter))
    images += len(losses.choose) * trials + len(losses.check)
    logger.info(
        f"{len(adapter.layers)} layers and {blocks} blocks, each left out in turn on {len(losses.base)} "
        f"held-out images, then up to {trials} smaller adapters on half of them: about "
        f"{duration(images * seconds)}"
    )


def duration(seconds: float) -> str:
    """Format seconds as `40 s`, `12 min` or `3.5 h`."""
    if seconds < 100:
        return f"{max(seconds, 1):.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def left_out(adapter: Adapter) -> dict[str, list[str]]:
    """Return what is left out in turn, by name: every layer, and every block of more than one."""
    blocks = {name: inside for name, inside in blocks_of(adapter.layers).items() if len(inside) > 1}
    return {name: [name] for name in adapter.layers} | blocks


def score_without(scorer: LayerScorer, adapter: Adapter) -> dict[str, torch.Tensor]:
    """Return the scores (P, K) of all held-out images without each layer and each block, by its name."""
    every, wanted = range(len(scorer.batches)), left_out(adapter)
    scores: dict[str, torch.Tensor] = {}
    with counted("leaving out layers") as on_progress:

        def tell(image: int, images: int) -> None:
            on_progress(len(scores) * images + image, len(wanted) * images)

        for name, inside in wanted.items():
            scorer.put({other: layer for other, layer in adapter.layers.items() if other not in inside})
            scores[name] = scorer.losses(every, tell)
    return scores


def layer_map(
    run: RunDir, adapter: Adapter, scores: dict[str, torch.Tensor], losses: Losses, limit: float
) -> LayerMap:
    """Return what each layer and each block carries, on all held-out images, in the model's order."""
    every = list(range(len(losses.base)))

    def row(name: str, inside: list[str]) -> Row:
        layers = [adapter.layers[each] for each in inside]
        score = scores[name] if name in scores else scores[inside[0]]
        return Row(
            name=name, block=block_of(inside[0]), kind=layers[0].kind if len(layers) == 1 else "",
            layers=len(layers), rank=layers[0].rank if len(layers) == 1 else None,
            parameters=sum(map(parameters_of, layers)), lost=losses.lost(score, every),
        )  # fmt: skip

    return LayerMap(
        weights=run.weights, limit=limit, gain=paired_gain(losses.full, losses.base), images=len(every),
        items=losses.base.shape[1], layers=[row(name, [name]) for name in adapter.layers],
        blocks=[row(name, inside) for name, inside in blocks_of(adapter.layers).items()],
    )  # fmt: skip


def choose(
    scorer: LayerScorer, parts: dict[str, Parts], effects: dict[str, LostGain], losses: Losses, limit: float
) -> Choice:
    """Choose the smallest adapter on one half of the images, and check it, once, on the other.

    The choosing half demands the cautious bound, so that the check is likely to agree.

    Args:
        effects: of every layer, the gain lost without it on the half that chooses.
    """
    components = [
        Component(name, each.parameters, share) for name, each in parts.items() for share in each.shares
    ]
    ordered = in_order_of_worth(components, effects)
    tried: dict[int, LostGain] = {}

    def layers_of(count: int) -> dict[str, Layer]:
        ranks = Counter(component.layer for component in ordered[:count])
        return {name: parts[name].first(ranks[name]) for name in parts if ranks[name]}

    trials = most_trials(len(ordered))
    with counted("trying smaller adapters") as on_progress:

        def holds(count: int) -> bool:
            scorer.put(layers_of(count))
            number = len(tried)

            def tell(image: int, images: int) -> None:
                on_progress(number * images + image, max(trials, number + 1) * images)

            tried[count] = losses.lost(scorer.losses(losses.choose, tell), losses.choose)
            return tried[count].cautious_bound <= limit

        count = smallest(len(ordered), holds)
        if count not in tried:  # all of it, which needs no trial but has a number
            holds(count)
    layers = layers_of(count)
    scorer.put(layers)
    checked = losses.lost(scorer.losses(losses.check), losses.check)
    scorer.put({})  # whole differences are written from the untouched base
    return Choice(layers, tried[count], checked, limit)


def refusal(choice: Choice, adapter: Adapter, config: Config) -> str | None:
    """Say why no adapter is written: the check's bound is too high, or nothing can be left out."""
    more = (
        f"allow more, such as --lose {200 * choice.limit:.3g}%, or hold out more images "
        f"(data.val_fraction={config.data.val_fraction:g} and validation.max_images="
        f"{config.validation.max_images} in training)"
    )
    if sum(map(parameters_of, choice.layers.values())) >= sum(map(parameters_of, adapter.layers.values())):
        return f"no smaller adapter loses less than {100 * choice.limit:.3g} %: nothing was written; {more}"
    if choice.holds:
        return None
    return (
        f"the adapter chosen on one half of the images loses {choice.checked} of the gain on the other, with "
        f"95 % confidence less than {100 * choice.checked.bound:.2f} %, not {100 * choice.limit:.3g} %: no "
        f"adapter was written; {more}"
    )


def summary_of(choice: Choice, adapter: Adapter, file: Path) -> str:
    """Say how small the adapter is, and what it loses."""
    before, after = adapter.file.stat().st_size, file.stat().st_size
    return (
        f"{len(choice.layers)} of {len(adapter.layers)} layers, {after / 2**20:.2f} of {before / 2**20:.2f} "
        f"MiB ({100 * after / before:.0f} %); on {choice.checked.images} held-out images that did not choose "
        f"it, it loses {choice.checked} of the gain, with 95 % confidence less than "
        f"{100 * choice.checked.bound:.2f} %"
    )


def write_files(
    run: RunDir, config: Config, adapter: Adapter, choice: Choice, base: BaseModel, folder: Path, name: str
) -> tuple[list[Path], list[str]]:
    """Write the adapter in both layouts with a model card, all of it prepared in a hidden folder first."""
    names = [ADAPTER_FILE, f"{name}_kohya.safetensors", f"{name}_kohya.json", "README.md"]
    with prepared(folder, names) as staging:
        files, notes = prepare(run, config, adapter, choice, base, staging / f"{name}_kohya.safetensors")
        lines = [f"`{file.name}`: {summary_of(choice, adapter, file)}" for file in files] + notes
        card = model_card(run, config, name, lines, [file.name for file in files])
        write_text(staging / "README.md", card)
    return [folder / file.name for file in files], notes


def prepare(
    run: RunDir, config: Config, adapter: Adapter, choice: Choice, base: BaseModel, kohya_file: Path
) -> tuple[list[Path], list[str]]:
    """Write both files and read them back; return them, and why the second one is not written.

    Raises:
        UserError: a file does not hold what was scored.
    """
    file, layers = kohya_file.with_name(ADAPTER_FILE), choice.layers
    write_subset(adapter, layers, base, file)
    check_same(read_adapter(file, base, "slim"), layers)
    layers = kohya.at_one_alpha(layers)
    written = Adapter(file, "diffusers", layers, {})
    try:
        metadata = kohya.metadata_of(written, base, config, run.status.read(), kohya_file.stem)
        kohya.write_kohya(written, kohya_file, metadata, base)
    except UserError as error:
        return [file], [f"no kohya file: {error}".replace(str(file), "this")]
    check_same(read_adapter(kohya_file, base, "slim"), kohya.written_layers(written, base))
    write_sidecar(kohya_file, config, base)
    return [file, kohya_file], []


def check_same(read: Adapter, layers: dict[str, Layer]) -> None:
    """Raise a UserError unless a file holds exactly some layers."""
    for name in layers.keys() | read.layers.keys():
        one, other = read.layers.get(name), layers.get(name)
        if one is None or other is None or not same_update(one, other) or not same_magnitudes(one, other):
            raise UserError(f"{read.file} was written wrongly: {name} differs; please report this")


def same_magnitudes(one: Layer, other: Layer) -> bool:
    """Tell whether two layers have the same magnitudes, or none."""
    if one.magnitude is None or other.magnitude is None:
        return one.magnitude is other.magnitude
    return torch.equal(one.magnitude, other.magnitude)
