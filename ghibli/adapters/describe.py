"""What an adapter file is, and the commands that use it, as `ghibli import` prints them."""

from itertools import combinations

from ghibli.adapters.files import Adapter, format_number
from ghibli.adapters.lora import ends_in
from ghibli.adapters.names import named_layers, target_of
from ghibli.adapters.start import VARIANTS_OF, why_not
from ghibli.config.schema import TARGETS, TEXT_ENCODER_TARGETS
from ghibli.models.base import BaseModel
from ghibli.runtime.commands import command_here, path_setting
from ghibli.runtime.wording import number_of


def describe_adapter(adapter: Adapter, base: BaseModel, overrides: list[str]) -> list[str]:
    """Describe an adapter file in lines; the last two are commands that use it.

    Args:
        base: what it was read for.
        overrides: of train.py, which chose that base.
    """
    what = f"{' and '.join(adapter.kinds)} of {number_of(len(adapter.layers), 'layer')}"
    numbers = [
        f"{name} {', '.join(map(format_number, values))}"
        for name, values in (("rank", adapter.ranks), ("alpha", adapter.alphas))
        if values
    ]
    metadata = {
        key: adapter.metadata[key]
        for key in (
            "modelspec.title",
            "modelspec.trigger_phrase",
            "ss_sd_model_name",
            "ss_training_comment",
            "ss_clip_skip",
        )
        if adapter.metadata.get(key)
    }
    targets = [*adapter.targets, *(["text encoder"] if adapter.has_text_encoder else [])]
    return [
        f"layout   {', '.join([adapter.layout, what, *numbers])}",
        f"targets  {', '.join(targets)}",
        *(f"metadata {key}: {value[:200]}" for key, value in metadata.items()),
        f"train    {training_command(adapter, base, overrides)}",
        f"generate {command_here('ghibli', 'generate', adapter.file, *overrides, '--prompt', 'TEXT')}",
    ]


def training_command(adapter: Adapter, base: BaseModel, overrides: list[str]) -> str:
    """Return the command that continues training from a file, or why there is none."""
    reason = why_not(adapter, base)
    if reason is not None:
        return f"not possible: {reason}"
    variant = VARIANTS_OF[adapter.kinds[0]][0]
    settings = [
        *overrides,
        path_setting("lora.init", adapter.file),
        f"lora.rank={adapter.ranks[0]}",
        *([f"lora.alpha={format_number(adapter.alphas[0])}"] if len(adapter.alphas) == 1 else []),
        f"lora.targets={as_setting(endings(adapter, base, 'unet'), TARGETS)}",
        f"lora.text_encoder={str(adapter.has_text_encoder).lower()}",
        *([f"lora.variant={variant}"] if variant != "lora" else []),
    ]
    if adapter.has_text_encoder:
        found = as_setting(endings(adapter, base, "text_encoder"), TEXT_ENCODER_TARGETS)
        settings.append(f"lora.text_encoder_targets={found}")
    return command_here("python", "train.py", *settings)


def endings(adapter: Adapter, base: BaseModel, part: str) -> list[str]:
    """Name the layers of a part that a file has, by endings where it has all of a kind, else one by one."""
    names = [name for name in named_layers(base) if name.startswith(f"{part}.")]
    own = [name for name in names if name in adapter.layers]
    found: list[str] = []
    for ending in sorted({target_of(name) for name in own}):
        alike = [name for name in names if ends_in(name, [ending])]
        if all(name in adapter.layers for name in alike):
            found.append(ending)
        else:
            found += [name.partition(".")[2] for name in own if target_of(name) == ending]
    return found


def as_setting(found: list[str], named: dict[str, list[str]]) -> str:
    """Format endings of layer names as a value of lora.targets: by a name such as attention+ff, or a list."""
    groups = [name for name in named if name not in ("all", "none")]
    for count in range(len(groups) + 1):
        for some in combinations(groups, count):
            if sorted(found) == sorted(each for name in some for each in named[name]):
                return "+".join(some) or "none"
    return f"[{','.join(found)}]"
