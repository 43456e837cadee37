"""A diffusers pipeline around a base's own parts."""

from typing import Any

from diffusers import DDPMScheduler, DiffusionPipeline, StableDiffusionPipeline

from ghibli.models.base import BaseModel


def make_pipeline(
    base: BaseModel,
    pipeline_class: type[DiffusionPipeline] = StableDiffusionPipeline,
    scheduler: Any = None,
    **parts: Any,
) -> Any:
    """Wrap a base in a diffusers pipeline that shares its parts and has no safety checker.

    Args:
        pipeline_class: StableDiffusionPipeline or a sibling with the same parts, such as image-to-image.
        scheduler: a diffusers scheduler; None = DDPM with the base's noise schedule.
        parts: further ones that the class asks for, such as controlnet.
    """
    return pipeline_class(
        vae=base.vae, text_encoder=base.text_encoder, tokenizer=base.tokenizer, unet=base.unet,
        scheduler=scheduler or DDPMScheduler.from_config(base.scheduler_config), **parts,
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
