"""A diffusers pipeline around a base's own parts."""

from typing import Any

from diffusers import DDPMScheduler, DiffusionPipeline, StableDiffusionPipeline

from ghibli.models.base import BaseModel


def make_pipeline(
    base: BaseModel, pipeline_class: type[DiffusionPipeline] = StableDiffusionPipeline, scheduler: Any = None
) -> Any:
    """Wrap a base in a diffusers pipeline that shares its parts and has no safety checker.

    Args:
        pipeline_class: StableDiffusionPipeline or a sibling with the same parts, such as image-to-image.
        scheduler: a diffusers scheduler; None = DDPM with the base's noise schedule.
    """
    return pipeline_class(
        base.vae, base.text_encoder, base.tokenizer, base.unet,
        scheduler or DDPMScheduler.from_config(base.scheduler_config),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
