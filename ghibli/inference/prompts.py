"""What of a prompt the text encoder would not see: named, and cut so that the style is kept."""

import re

from ghibli.inference.generate import ends_of, token_ids, truncation_warnings
from ghibli.models.base import BaseModel


def input_warnings(prompts: list[str], negative: str, guidance: float, base: BaseModel) -> list[str]:
    """Name what is not used: words that the encoder never sees, a negative prompt at guidance 1."""
    said = truncation_warnings(prompts, base)
    if not negative.strip():
        return said
    if guidance == 1:
        return [*said, "the negative prompt is not used: at guidance 1 there is nothing to steer away from"]
    return said + [f"negative prompt: {warning}" for warning in truncation_warnings([negative], base)]


def keep_style(prompt: str, style: str, base: BaseModel) -> tuple[str, str | None]:
    """Shorten a prompt that ends in `style` until the text encoder sees all of it, the style included.

    Returns:
        The prompt, and a sentence that names the words left out; None where all fit, or not even the style.
    """

    def fits(text: str) -> bool:
        return len(token_ids(text, base)) <= base.tokenizer.model_max_length

    if not style.strip() or not prompt.endswith(style) or fits(prompt) or not fits(style):
        return prompt, None
    caption = prompt.removesuffix(style)
    pieces = re.findall(r"\s*\S+", caption)
    if not fits(pieces[0] + style):
        pieces = list(caption)  # one word without an end
    kept, beyond = 0, len(pieces)
    while beyond - kept > 1:  # bisection: pieces[:kept] fit, pieces[:beyond] do not
        middle = (kept + beyond) // 2
        kept, beyond = (middle, beyond) if fits("".join(pieces[:middle]) + style) else (kept, middle)
    shorter, lost = "".join(pieces[:kept]).rstrip(" ,;:"), "".join(pieces[kept:]).strip()
    return shorter + style, (
        f"`{prompt[:40]} ...` is too long: the text encoder never sees `{ends_of(lost)}`, left out to keep "
        f"`{style.strip(' ,')}`"
    )
