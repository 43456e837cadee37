"""The model card (README.md) beside an adapter: what it is, how it was made, how good it is, its licence.

A card is Markdown that strangers' browsers show, and the run folder may come from a stranger too: every text
of its settings and results is escaped, and no path of this machine is named.
"""

import html
import json
import math
import re
from pathlib import Path, PureWindowsPath
from typing import Any

import yaml

from ghibli.config.paths import DEMO, resolve_path
from ghibli.config.registry import sampler_label
from ghibli.config.schema import Config, describe
from ghibli.diffusion.process import usual_guidance
from ghibli.runs.folder import RunDir
from ghibli.runtime.files import ROOT
from ghibli.runtime.home import expanded

LICENCE = """The style and the training images are Studio Ghibli's. Do not pass off generated images as
theirs, and ask a lawyer before any commercial use. Stable Diffusion 1.5 and everything derived from it are
under the CreativeML OpenRAIL-M licence; its use restrictions bind you and everyone you pass the files on to.
The demo base of Ghibli LoRA Lab and its drawn images are under Apache-2.0."""
TAGS = "tags: [stable-diffusion, lora, diffusers, text-to-image]"
INTENDED = "## Intended use and licence"


def model_card(
    run: RunDir, config: Config, name: str, lines: list[str], files: list[str], grid: str | None = None
) -> str:
    """Write the card's text, with the YAML header that the hub reads.

    Args:
        name: title of the card.
        lines: a sentence for each file, and for each that could not be written.
        files: names of the files beside the card.
        grid: path of a sample grid, from the card's folder; None = there is none.
    """
    status, words = run.status.read(), config.data.style.strip(" ,")
    base = public_name(config.model.path)
    of_hub = f"base_model: {yaml_text(base)}\n" if "/" in base else ""
    trigger = f"instance_prompt: {yaml_text(words)}\n" if words else ""
    ending = f" End prompts with {code(f', {words}')}." if words else ""
    skip = config.model.clip_skip
    ending += f" Trained at clip skip {skip}: set that when drawing." if skip > 1 else ""
    adapter = config.model.adapter
    on_top = "" if adapter is None else f", with {plain(public_name(adapter))} merged into it first"
    return f"""---
license: creativeml-openrail-m
{of_hub}{TAGS}
{trigger}---

# {plain(name)}

{describe(config)}, for {plain(base)}{on_top}.{ending}
{grid_section(grid)}
## Use

{usage_section(config, files)}

## How good it is

{gain_sentence(status, config.loss.own_guidance)}

{distance_section(run)}

## Files

{bullet_list(lines)}

## How it was made

| setting | value |
|---|---|
{settings_rows(config, status)}

{INTENDED}

For exploring a style and for studying how adapters learn. {LICENCE}
"""


def grid_section(grid: str | None) -> str:
    """Show a grid of the run; empty without one."""
    if grid is None:
        return ""
    what = "Prompts, samplers and guidance scales: the base above, this model below, from the same noise"
    return f"\n![{what}]({grid})\n\n*{what}.*\n"


def public_name(path: str) -> str:
    """Return a hub id as it is, and of a path, of Windows too, only the last name."""
    is_hub_id = re.fullmatch(r"[\w.-]+/[\w.-]+", path) and path[0] not in ".~" and not Path(path).exists()
    return path if is_hub_id else PureWindowsPath(expanded(path).resolve().name).name


def plain(value: object) -> str:
    """Return a text for one line of Markdown, in which nothing is markup."""
    text = html.escape(" ".join(readable(value).split()), quote=False)
    return re.sub(r"([\\`*_\[\]|#~!])", r"\\\1", text)


def code(value: object) -> str:
    """Return a text in code style where it can be, else as plain."""
    text = " ".join(readable(value).split())
    return plain(text) if re.search("[`<>&]", text) else f"`{text}`"


def readable(value: object) -> str:
    """Return a text without control characters and without halves of characters, which UTF-8 cannot write."""
    text = str(value).encode("utf-8", "replace").decode()
    kept = "\n\u200d"  # the joiner holds composed emoji together
    return "".join(letter if letter.isprintable() or letter in kept else " " for letter in text)


def quoted(text: str) -> str:
    """Write a Python string in double quotes, without a letter that could begin an HTML tag."""
    return json.dumps(readable(text), ensure_ascii=False).replace("<", "\\x3c")


def yaml_text(text: str) -> str:
    """Write a double-quoted YAML text, without a letter that could begin an HTML tag."""
    line = " ".join(readable(text).split())
    dumped = yaml.safe_dump(line, default_style='"', allow_unicode=True, width=2**20)
    return dumped.strip().replace("<", "\\x3c")


def bullet_list(lines: list[str]) -> str:
    """Format lines as a Markdown list."""
    return "\n".join(f"- {line}" for line in lines)


def usage_section(config: Config, files: list[str]) -> str:
    """Explain how to use the files in diffusers, and in other programs those that are there for them."""
    parts = []
    base, prompt = public_name(config.model.path), quoted(f"a house by a lake{config.data.style}")
    # diffusers counts the layers that are left out, everyone else the one that is used
    skip = f", clip_skip={config.model.clip_skip - 1}" if config.model.clip_skip > 1 else ""
    if config.finetune == "lora":
        where = "" if "/" in base else "  # a folder on your disk"
        place = resolve_path(config.model.path)
        if place.is_relative_to(DEMO):
            base, where = place.relative_to(ROOT).as_posix(), "  # in Ghibli LoRA Lab's repository"
        loaded = f"diffusers.StableDiffusionPipeline.from_pretrained({quoted(base)}){where}"
        parts.append(f"""    pipeline = {loaded}
    pipeline.load_lora_weights("FOLDER", weight_name="pytorch_lora_weights.safetensors")
    pipeline({prompt}, guidance_scale={usual_guidance(config.loss.own_guidance):g}{skip})""")
    kohya = next((Path(name).stem for name in files if name.endswith("kohya.safetensors")), None)
    if kohya is not None:
        parts.append(
            f"ComfyUI: put `{kohya}.safetensors` into `models/loras`. A1111, Forge: into `models/Lora`, then "
            f"`<lora:{kohya}:1>`; `{kohya}.json` beside it holds the trigger words."
        )
    whole = next((name for name in files if name.endswith("_merged.safetensors")), None)
    if "merged" in files:
        parts.append("The folder `merged/` is a complete diffusers pipeline.")
    if whole is not None:
        parts.append(
            f"`{whole}` is the complete model in one file: ComfyUI `models/checkpoints`, A1111 "
            "`models/Stable-diffusion`."
        )
    return "\n\n".join(parts)


def is_number(*values: object) -> bool:
    """Tell whether all values are finite numbers, as in status.json or evaluation.json of an intact run."""
    return all(
        isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        for value in values
    )


def gain_sentence(status: dict[str, Any], guidance: float) -> str:
    """Summarise the held-out gain with its standard error, and say what a gain below 0 means.

    Args:
        guidance: of the training, LossConfig.own_guidance.
    """
    value, error = status.get("gain"), status.get("gain_se")
    if value is None or error is None or not is_number(value, error):
        return "Its gain on held-out images was not measured."
    side, meaning = "lower than", ""
    if value < 0:
        side = "HIGHER than"
        if guidance == 1:
            meaning = " It predicts the noise worse than the base: do not expect better images."
        elif guidance > 1:
            meaning = f" Trained at guidance {guidance:g} it is no predictor of the noise: judge its images."
        else:
            target = f"{1 / guidance:g}"
            meaning = f" Trained with a guidance target of {target} it did not start at 0: judge its images."
    return (
        f"On held-out images its denoising loss is {100 * abs(value):.1f} % +- {100 * error:.1f} % (standard "
        f"error) {side} the base's at the same noise and timesteps, after epoch "
        f"{plain(status.get('best_epoch'))}.{meaning}"
    )


def distance_section(run: RunDir) -> str:
    """Tabulate the kernel distances of `ghibli evaluate`, if they were measured with these weights."""
    if not run.evaluation.is_file():
        return "The distance of its images to real ones was not measured (`ghibli evaluate`)."
    try:
        found = run.load_evaluation()
        if found["weights"] != run.weights:
            return "Its last evaluation used other weights (`ghibli evaluate` makes a new one)."
        rows = [
            f"| {plain(model)} | {plain(sampler_label(row['sampler']))} | {row['guidance']:g} "
            f"| {row['kernel'][0]:.2f} +- {row['kernel'][1]:.2f} |"
            for model, cells in found["models"].items()
            for row in cells
        ]
        name = "KID" if found["features"] == "inception" else "Style distance"
        head = [
            f"{name} of {plain(found['samples'])} samples to {plain(found['reference_images'])} "
            f"real images ({plain(found['features'])} features), lower is better:",
            "",
            "| model | sampler | guidance | distance |",
            "|---|---|---|---|",
        ]
    except (OSError, ValueError, KeyError, TypeError, IndexError, AttributeError):
        return "Its evaluation.json is damaged (`ghibli evaluate` makes a new one)."
    return "\n".join([*head, *rows])


def settings_rows(config: Config, status: dict[str, object]) -> str:
    """Format the settings of a run as rows of a Markdown table."""
    targets = ", ".join(config.lora.targets)
    lora = (
        f"rank {config.lora.rank}, alpha {config.lora.alpha:g}, dropout {config.lora.dropout:g}, {targets}"
        f"{', text encoder' if config.lora.text_encoder else ''}"
    )
    rows = {
        "adapter": lora if config.finetune == "lora" else "all weights of the UNet",
        "loss": f"{config.loss.guidance_text}, caption dropout {config.loss.caption_dropout:g}",
        "optimiser": f"{config.optimizer.name}, learning rate {config.optimizer.lr:g}",
        "steps": status.get("step"),
        "resolution": f"{config.model.resolution} px",
        "seed": config.seed,
        "images": f"hash {str(status.get('data_hash'))[:12]}",
        "base": f"hash {str(status.get('base_hash'))[:12]}",
        "code": f"commit {str(status.get('git_commit'))[:12]}",
    }
    return "\n".join(f"| {name} | {plain(value)} |" for name, value in rows.items())
