"""The config.json of a network, schedule or image processor: nothing absurd, nothing else that is loaded.

Such a file may come from anyone, and the libraries build what it describes: a schedule of 1e11 steps fills
the memory, an adapter beside the weights is added, an attention kernel is fetched from the hub and run.
"""

import json
import math
from pathlib import Path
from typing import Any

from ghibli.runtime.errors import UserError, first_line
from ghibli.runtime.files import read_plain

LARGEST_FILE = 2**20  # bytes of a config.json
LONGEST_LIST = 100  # entries, but for trained_betas
LIMITS: dict[str, tuple[float, float]] = {  # key -> least and largest value; lists entry by entry
    "num_train_timesteps": (1, 10_000),
    "beta_start": (1e-9, 1),
    "beta_end": (1e-9, 1),
    "trained_betas": (1e-9, 1),
    "steps_offset": (0, 1000),
    "scaling_factor": (1e-6, 1e6),
    "in_channels": (1, 64),
    "out_channels": (1, 64),
    "latent_channels": (1, 64),
    "sample_size": (1, 8192),
    "block_out_channels": (1, 8192),
    "layers_per_block": (1, 16),
    "transformer_layers_per_block": (1, 16),
    "attention_head_dim": (1, 1024),
    "cross_attention_dim": (1, 8192),
    "norm_num_groups": (1, 8192),
    "num_attention_heads": (1, 1024),
    "hidden_size": (1, 8192),
    "intermediate_size": (1, 65_536),
    "num_hidden_layers": (1, 64),
    "max_position_embeddings": (1, 8192),
    "vocab_size": (1, 1_000_000),
    "projection_dim": (1, 8192),
    "image_size": (1, 8192),
    "patch_size": (1, 8192),
    **dict.fromkeys(("height", "width", "shortest_edge", "longest_edge", "size", "crop_size"), (1, 2048)),
}
REFUSED = {  # key -> why
    "quantization_config": "a quantized network cannot be trained or merged here",
    "attn_implementation": "it can name code to be fetched from the hub",
    "_attn_implementation": "it can name code to be fetched from the hub",
}
HARMLESS = ("eager", "sdpa", None)  # values of attn_implementation


def check_config(file: Path, what: str) -> None:
    """Check a config.json, or one of its kind, and that no adapter lies beside it.

    Args:
        what: the setting that names its folder, for messages, such as model.path=DIR.

    Raises:
        UserError: it is no JSON object, has a number out of bounds, or would load something else.
    """
    where = f"{what}: {file.parent.name}/{file.name}"
    beside = file.parent / "adapter_config.json"
    if beside.exists():
        raise UserError(
            f"{what}: {beside.parent.name}/{beside.name} would add an adapter to the base unasked: move it "
            "away, and name an adapter with model.adapter=DIR"
        )
    try:
        content = json.loads(read_plain(file, LARGEST_FILE).decode())
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(
            f"{what}: {file.parent.name}/ cannot be loaded: {file.name}: {first_line(error)}"
        ) from error
    if not isinstance(content, dict):
        raise UserError(f"{where} holds no settings, but a {type(content).__name__}")
    check_values(content, where)
    first, last = content.get("beta_start"), content.get("beta_end")
    if first is not None and last is not None and first > last:
        raise UserError(f"{where}: beta_start={first:g} is above beta_end={last:g}")


def check_values(content: dict[str, Any], where: str) -> None:
    """Raise a UserError for a setting that is refused or out of bounds, in sections too."""
    for key, value in content.items():
        if key in REFUSED and value not in HARMLESS:
            raise UserError(f"{where}: {key} is not accepted: {REFUSED[key]}")
        if isinstance(value, dict):
            check_values(value, where)
            continue
        numbers = flat(value)
        if len(numbers) > (LIMITS["num_train_timesteps"][1] if key == "trained_betas" else LONGEST_LIST):
            raise UserError(f"{where}: {key} is a list of {len(numbers)} entries")
        least, largest = LIMITS.get(key, (-math.inf, math.inf))
        for number in numbers:
            is_number = isinstance(number, int | float) and not isinstance(number, bool)
            if key in LIMITS and number is not None and not is_number:
                raise UserError(f"{where}: {key}={str(number)[:40]} is not a number")
            if is_number and not (least <= number <= largest and abs(number) < math.inf):
                bounds = f" from {least:g} to {largest:g}" if key in LIMITS else ""
                raise UserError(f"{where}: {key}={number:.4g} must be a number{bounds}")


def flat(value: Any) -> list[Any]:
    """Return a value as a list, nested lists opened."""
    if not isinstance(value, list):
        return [value]
    return [entry for inner in value for entry in flat(inner)]
