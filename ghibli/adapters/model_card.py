"""README.md beside an adapter: what it is, how it was made, how good it is, what one may do with it."""

import json
from pathlib import Path

from ghibli.config.registry import sampler_label
from ghibli.config.schema import Config, describe
from ghibli.diffusion.process import usual_guidance
from ghibli.runs.folder import RunDir

LICENCE = """The style and the images it was trained on are Studio Ghibli's. Do not pass off what it
draws as theirs, and ask a lawyer before you earn money with it. Stable Diffusion 1.5 and all that derives
from it come under the CreativeML OpenRAIL-M licence; its use restrictions bind you and all you give it to.
The demo base of Ghibli LoRA Lab and its drawn images come under Apache-2.0."""


def model_card(run: RunDir, config: Config, name: str, files: list[str]) -> str:
    """The card's text, with the heading that the hub reads.

    Args:
        name: of the folder it lies in.
        files: a sentence for each file, or for one that could not be written.
    """
    status, words = run.read_status(), config.data.style.strip(" ,")
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

{usage(config)}

## How good it is

{gain(status)}

{distance(run)}

## Files

{bullets(files)}

## How it was made

| setting | value |
|---|---|
{settings(config, status)}

## Intended use and licence

For trying out a style and for studying how adapters learn. {LICENCE}
"""


def bullets(lines: list[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)


def usage(config: Config) -> str:
    """Lines of Python for diffusers, and where other programs want the file."""
    if config.finetune == "full":
        return "The folder `merged/` is a whole diffusers pipeline."
    base = json.dumps(config.model.path)
    prompt = json.dumps(f"a house by a lake{config.data.style}")
    return f"""    pipeline = diffusers.StableDiffusionPipeline.from_pretrained({base})
    pipeline.load_lora_weights("FOLDER", weight_name="pytorch_lora_weights.safetensors")
    pipeline({prompt}, guidance_scale={usual_guidance(config.loss.guidance):g})

ComfyUI: the kohya file into `models/loras`. A1111, Forge: into `models/Lora`, then `<lora:NAME:1>`."""


def gain(status: dict[str, object]) -> str:
    """The probe's sentence."""
    value, error = status.get("gain"), status.get("gain_se")
    if value is None or error is None:
        return "It was not measured on held-out images."
    return (
        f"On held-out images its denoising loss is {100 * value:.1f} % +- {100 * error:.1f} % (one "
        "standard error) below the base's, at the same noise and timesteps, after epoch "
        f"{status.get('best_epoch')}."
    )


def distance(run: RunDir) -> str:
    """The kernel distances of `ghibli evaluate`, if they are of these weights."""
    if not run.evaluation.is_file():
        return "The distance of its images to real ones was not measured (`ghibli evaluate`)."
    found = run.load_evaluation()
    if found["weights"] != run.weights:
        return "Its last evaluation is of other weights (`ghibli evaluate` makes a new one)."
    rows = [
        f"| {model} | {sampler_label(row['sampler'])} | {row['guidance']:g} "
        f"| {row['kernel'][0]:.2f} +- {row['kernel'][1]:.2f} |"
        for model, cells in found["models"].items()
        for row in cells
    ]
    head = [
        f"Kernel distance of {found['samples']} samples to {found['reference_images']} real images "
        f"({found['features']} features), lower is nearer:",
        "",
        "| model | sampler | guidance | distance |",
        "|---|---|---|---|",
    ]
    return "\n".join([*head, *rows])


def settings(config: Config, status: dict[str, object]) -> str:
    """Rows of a table."""
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
