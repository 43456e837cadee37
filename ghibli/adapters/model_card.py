"""The model card (README.md) beside an adapter: what it is, how it was made, how good it is, its licence."""

import json
from pathlib import Path
from typing import Any

from ghibli.config.registry import sampler_label
from ghibli.config.schema import Config, describe
from ghibli.diffusion.process import usual_guidance
from ghibli.runs.folder import RunDir

LICENCE = """The style and the training images are Studio Ghibli's. Do not pass off generated images as
theirs, and ask a lawyer before any commercial use. Stable Diffusion 1.5 and everything derived from it are
under the CreativeML OpenRAIL-M licence; its use restrictions bind you and everyone you pass the files on to.
The demo base of Ghibli LoRA Lab and its drawn images are under Apache-2.0."""


def model_card(run: RunDir, config: Config, name: str, files: list[str]) -> str:
    """Write the card's text, with the YAML header that the hub reads.

    Args:
        name: title of the card.
        files: a sentence for each file, and for each that could not be written.
    """
    status, words = run.status.read(), config.data.style.strip(" ,")
    base = config.model.path
    of_hub = f"base_model: {json.dumps(base)}\n" if base.count("/") == 1 and not Path(base).exists() else ""
    trigger = f"instance_prompt: {json.dumps(words)}\n" if words else ""
    ending = f" End prompts with `, {words}`." if words else ""
    on_top = "" if config.model.adapter is None else f", with {config.model.adapter} merged into it first"
    return f"""---
license: creativeml-openrail-m
{of_hub}tags: [stable-diffusion, lora, diffusers, text-to-image]
{trigger}---

# {name}

{describe(config)}, for {base}{on_top}.{ending}

## Use

{usage_section(config)}

## How good it is

{gain_sentence(status)}

{distance_section(run)}

## Files

{bullet_list(files)}

## How it was made

| setting | value |
|---|---|
{settings_rows(config, status)}

## Intended use and licence

For exploring a style and for studying how adapters learn. {LICENCE}
"""


def bullet_list(lines: list[str]) -> str:
    """Format lines as a Markdown list."""
    return "\n".join(f"- {line}" for line in lines)


def usage_section(config: Config) -> str:
    """Explain how to use the files in diffusers and where other programs expect them."""
    if config.finetune == "full":
        return "The folder `merged/` is a complete diffusers pipeline."
    base = json.dumps(config.model.path)
    prompt = json.dumps(f"a house by a lake{config.data.style}")
    return f"""    pipeline = diffusers.StableDiffusionPipeline.from_pretrained({base})
    pipeline.load_lora_weights("FOLDER", weight_name="pytorch_lora_weights.safetensors")
    pipeline({prompt}, guidance_scale={usual_guidance(config.loss.guidance):g})

ComfyUI: put the kohya file into `models/loras`. A1111, Forge: into `models/Lora`, then `<lora:NAME:1>`."""


def gain_sentence(status: dict[str, Any]) -> str:
    """Summarise the held-out gain with its standard error."""
    value, error = status.get("gain"), status.get("gain_se")
    if value is None or error is None:
        return "Its gain on held-out images was not measured."
    return (
        f"On held-out images its denoising loss is {100 * value:.1f} % +- {100 * error:.1f} % (standard "
        "error) below the base's at the same noise and timesteps, after epoch "
        f"{status.get('best_epoch')}."
    )


def distance_section(run: RunDir) -> str:
    """Tabulate the kernel distances of `ghibli evaluate`, if they were measured with these weights."""
    if not run.evaluation.is_file():
        return "The distance of its images to real ones was not measured (`ghibli evaluate`)."
    found = run.load_evaluation()
    if found["weights"] != run.weights:
        return "Its last evaluation used other weights (`ghibli evaluate` makes a new one)."
    rows = [
        f"| {model} | {sampler_label(row['sampler'])} | {row['guidance']:g} "
        f"| {row['kernel'][0]:.2f} +- {row['kernel'][1]:.2f} |"
        for model, cells in found["models"].items()
        for row in cells
    ]
    head = [
        f"Kernel distance of {found['samples']} samples to {found['reference_images']} real images "
        f"({found['features']} features), lower is better:",
        "",
        "| model | sampler | guidance | distance |",
        "|---|---|---|---|",
    ]
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
        "loss": f"guidance {config.loss.guidance:g}, caption dropout {config.loss.caption_dropout:g}",
        "optimiser": f"{config.optimizer.name}, learning rate {config.optimizer.lr:g}",
        "steps": status.get("step"),
        "resolution": f"{config.model.resolution} px",
        "seed": config.seed,
        "images": f"hash {str(status.get('data_hash'))[:12]}",
        "base": f"hash {str(status.get('base_hash'))[:12]}",
        "code": f"commit {str(status.get('git_commit'))[:12]}",
    }
    return "\n".join(f"| {name} | {value} |" for name, value in rows.items())
