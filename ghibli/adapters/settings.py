"""What PEFT's settings say of an adapter file, in its metadata or beside it: alphas, and OFT's series."""

import json
import logging
from math import isfinite
from pathlib import Path
from typing import Any

from peft.utils.other import get_pattern_key

from ghibli.adapters.names import DOTTED
from ghibli.runtime.errors import UserError, first_line
from ghibli.runtime.files import read_plain

logger = logging.getLogger(__name__)

METADATA = "lora_adapter_metadata"  # where diffusers stores PEFT's settings in a file
ALPHAS = ("lora_alpha", "alpha")  # PEFT's name of alpha for LoRA, and for LoHa and LoKr
MOST_TERMS = 50  # of OFT's series; PEFT's default is 5
LARGEST_SETTINGS = 2**24  # bytes of that file
PEFT_CONFIG = "adapter_config.json"  # where PEFT stores them, beside the file


def settings_of(metadata: dict[str, str], file: Path, layout: str, what: str) -> dict[str, Any]:
    """Read PEFT's settings, as part.name: from the file, or from adapter_config.json beside it.

    Raises:
        UserError: they cannot be read, or an alpha is not a finite number.
    """
    beside, settings = file.with_name(PEFT_CONFIG), dict[str, Any]()
    try:
        if METADATA in metadata:
            settings = dict(json.loads(metadata[METADATA]))
        elif layout == "PEFT" and beside.is_file():
            content = dict(json.loads(read_plain(beside, LARGEST_SETTINGS).decode()))
            settings = {f"{part}.{key}": value for part in DOTTED for key, value in content.items()}
        elif layout == "PEFT":
            logger.warning("%s has no %s beside it: alpha is taken to be the rank", what, PEFT_CONFIG)
        for part in DOTTED:
            patterns = dict(settings.get(f"{part}.alpha_pattern") or {})
            for alpha in (*(settings.get(f"{part}.{key}") for key in ALPHAS), *patterns.values()):
                if alpha is not None and not isfinite(float(alpha)):
                    raise ValueError(f"alpha is {alpha}")
    except (ValueError, TypeError, OSError, RecursionError) as error:
        damage = f"its settings are damaged: {first_line(error)}"
        raise UserError(f"{what} cannot be read as a LoRA: {damage}") from error
    return settings


def setting_of(settings: dict[str, Any], name: str, rank: int | None) -> float | None:
    """Return what PEFT's settings make of a layer's alpha, in the scale alpha / rank; None if nothing."""
    part, _, path = name.partition(".")
    patterns = settings.get(f"{part}.alpha_pattern") or {}
    general = next((settings[f"{part}.{key}"] for key in ALPHAS if f"{part}.{key}" in settings), None)
    alpha = patterns.get(get_pattern_key(patterns, path), general)
    if alpha is None:
        return None
    return float(alpha) * ((rank or 1) ** 0.5 if settings.get(f"{part}.use_rslora") else 1.0)


def whole_scale(settings: dict[str, Any], name: str) -> float:
    """Return what PEFT multiplies a LoKr of two whole matrices by: alpha / r of its settings, 1 without any.

    LyCORIS scales none of these.
    """
    part, _, path = name.partition(".")
    alpha, ranks = setting_of(settings, name, None), settings.get(f"{part}.rank_pattern") or {}
    rank = ranks.get(get_pattern_key(ranks, path), settings.get(f"{part}.r"))
    return 1.0 if alpha is None or not isinstance(rank, int) or rank < 1 else alpha / rank


def terms_of(settings: dict[str, Any], name: str, where: str) -> int | None:
    """Return how many terms of a series PEFT's settings take for OFT's rotations; None = the exact ones.

    Raises:
        UserError: constrained OFT, which PEFT changes once more before it is used; or no such number.
    """
    part = name.partition(".")[0]
    if settings.get(f"{part}.coft"):
        raise UserError(f"{where} is of PEFT's constrained OFT (coft), which is not supported")
    if not settings.get(f"{part}.use_cayley_neumann", True):
        return None
    terms = settings.get(f"{part}.num_cayley_neumann_terms", 5)
    if not isinstance(terms, int) or not 1 <= terms <= MOST_TERMS:
        raise UserError(f"{where}: num_cayley_neumann_terms={str(terms)[:40]} must be from 1 to {MOST_TERMS}")
    return terms
