"""From the tensors of an adapter file to updates of layers: every key is used, or the file is refused.

Which layer a key belongs to is in adapters.names, what its tensors mean in adapters.layers.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from ghibli.adapters.layers import KINDS, OFT, UNSCALED, Full, InputOFT, Layer, LoHa, LoKr, LoRA
from ghibli.adapters.names import DOTTED, FLAT, PEFT_PREFIX, explain, named_layers, names_in_files, weight_of
from ghibli.adapters.settings import setting_of, settings_of, terms_of, whole_scale
from ghibli.adapters.shapes import misfit
from ghibli.models.base import BaseModel
from ghibli.runtime.errors import UserError, first_line

SHARED = {
    "magnitude": (
        "dora_scale",
        *(f"lora_magnitude_vector{end}" for end in ("", ".weight", ".default.weight")),
    ),
    "alpha": ("alpha", "lora.alpha", "lora_linear_layer.alpha"),
}
LORA_FACTORS = {
    "down": ("lora_down.weight", "lora_A", "lora_A.weight", "lora_A.default.weight", "lora.down.weight",
             "down.weight", "lora_linear_layer.down.weight"),
    "up": ("lora_up.weight", "lora_B", "lora_B.weight", "lora_B.default.weight", "lora.up.weight",
           "up.weight", "lora_linear_layer.up.weight"),
}  # fmt: skip
ENDINGS: dict[str, tuple[type[Layer] | None, str]] = {
    **{f".{name}": (kind, name_of) for kind in KINDS for name_of, name in kind.file_names.items()},
    **{f".{name}": (LoRA, factor) for factor, names in LORA_FACTORS.items() for name in names},
    **{f".{name}": (None, name_of) for name_of, names in SHARED.items() for name in names},
}
WHOLE = {  # of every kind: sets of tensors that are a layer, without those that may be missing
    LoRA: [{"down", "up"}],
    LoHa: [{"w1_a", "w1_b", "w2_a", "w2_b"}, {"w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2"}],
    LoKr: [
        left | right
        for left in ({"w1"}, {"w1_a", "w1_b"})
        for right in ({"w2"}, {"w2_a", "w2_b"}, {"w2_a", "w2_b", "t2"})
    ],
    OFT: [{"blocks"}],
    InputOFT: [{"angles"}],
    Full: [{"diff"}],
}
MAY_LACK = {"mid", "rescale"}


@dataclass
class Found:
    """What a file holds for one layer of the base."""

    keys: dict[str, str] = field(default_factory=dict)  # field of a Layer, or of SHARED -> key in the file
    kinds: dict[type[Layer], str] = field(default_factory=dict)  # kind -> the first key of it


def read_layers(file: Path, base: BaseModel, what: str) -> tuple[str, dict[str, Layer], dict[str, str]]:
    """Read an adapter file for a base.

    Args:
        what: the file as users named it, for messages.

    Returns:
        (layout, layers by name as in adapters.names, metadata)

    Raises:
        UserError: a key that no layer of this base takes, half a layer, a wrong shape, a value that is not
            finite, metadata that cannot be read: the message names the first such key.
    """
    with safe_open(file, framework="pt") as opened:
        metadata, keys = opened.metadata() or {}, list(opened.keys())
        if not keys:
            raise UserError(f"{what} holds no tensors")
        found = sort_keys(keys, base, what)
        layout = layout_of(keys[0])
        settings = settings_of(metadata, file, layout, what)
        layers: dict[str, Layer] = {}
        known = named_layers(base)
        for name, place in found.items():
            kind = check_whole_layer(place, what)
            tensors = {each: load_tensor(opened, key, what) for each, key in place.keys.items()}
            if settings.get(f"{name.partition('.')[0]}.use_dora") and "magnitude" not in tensors:
                first = next(iter(place.keys.values()))
                raise UserError(
                    f"{what} is a DoRA by its settings, but `{first}` is there without magnitudes"
                )
            layer = build(kind, place, tensors, weight_of(known[name]), what)
            if not isinstance(layer, UNSCALED):
                where = f"{what}: `{place.keys.get('alpha')}`"
                alpha = alpha_of(layer, tensors.get("alpha"), setting_of(settings, name, layer.rank), where)
                layer = replace(layer, alpha=alpha)
            if isinstance(layer, LoKr) and layer.w1 is not None and layer.rank is None:
                layer = replace(layer, w1=layer.w1 * whole_scale(settings, name))
            if isinstance(layer, InputOFT):
                layer = replace(layer, terms=terms_of(settings, name, f"{what}: `{place.keys['angles']}`"))
            layers[name] = layer
    return layout, layers, metadata


def sort_keys(keys: Iterable[str], base: BaseModel, what: str) -> dict[str, Found]:
    """Sort the keys of a file by the layers of the base.

    Raises:
        UserError: a key that is of no layer of this base, or a layer under two names.
    """
    names, found, unknown = names_in_files(base), dict[str, Found](), list[str]()
    for key in keys:
        match = split_key(key, names)
        if match is None:
            unknown.append(key)
            continue
        name, kind, field_name = match
        place = found.setdefault(name, Found())
        twin = place.keys.setdefault(field_name, key)
        if twin != key:
            raise UserError(f"{what} holds the same tensor of {name} twice, as `{twin}` and `{key}`")
        if kind is not None:
            place.kinds.setdefault(kind, key)
    if unknown:
        raise UserError(explain(unknown, names, what))
    return found


def split_key(key: str, names: dict[str, str]) -> tuple[str, type[Layer] | None, str] | None:
    """Split a key into (layer, kind or None, field of a Layer or of SHARED); None if it is of no layer."""
    for at in [at for at, letter in enumerate(key) if letter == "."]:  # the longest ending first
        if key[at:] in ENDINGS and key[:at] in names:
            return names[key[:at]], *ENDINGS[key[at:]]
    return None


def layout_of(key: str) -> str:
    """Name the layout of a file by one of its keys."""
    if key.startswith(PEFT_PREFIX):
        return "PEFT"
    if key.startswith(tuple(before for each in FLAT.values() for before in each)):
        return "kohya"
    comfy = ("diffusion_model.", "model.diffusion_model.", *DOTTED["text_encoder"][4:])
    return "ComfyUI" if key.startswith(comfy) else "diffusers"


def check_whole_layer(place: Found, what: str) -> type[Layer]:
    """Return the kind of a layer.

    Raises:
        UserError: tensors of two kinds, or not all of one.
    """
    first = next(iter(place.keys.values()))
    if not place.kinds:
        raise UserError(f"{what} is incomplete: `{first}` is there without the matrices that it belongs to")
    kind, *others = place.kinds
    if others:
        one, two = list(place.kinds.values())[:2]
        raise UserError(f"{what} holds two kinds of update for one layer: `{one}` and `{two}`")
    have = set(place.keys) & set(kind.file_names) - MAY_LACK
    if have not in WHOLE[kind]:
        nearest = min(WHOLE[kind], key=lambda whole: (len(have - whole), len(whole - have)))
        extra, missing = sorted(have - nearest), sorted(nearest - have)
        if extra:
            raise UserError(
                f"{what}: `{place.keys[extra[0]]}` does not go with the other tensors of its layer"
            )
        there = next(iter(place.kinds.values()))
        lacks = beside(there, kind, missing[0])
        raise UserError(f"{what} is incomplete: `{there}` is there without `{lacks}`")
    if kind in UNSCALED and "alpha" in place.keys:
        raise UserError(f"{what}: `{place.keys['alpha']}` would scale a {kind.name}, which has no scale")
    return kind


def beside(key: str, kind: type[Layer], missing: str) -> str:
    """Return the key that a missing tensor would have, in the naming of a key that is there."""
    ending = max((end for end in ENDINGS if key.endswith(end)), key=len)
    naming = dict(zip(LORA_FACTORS["down"], LORA_FACTORS["up"], strict=True))
    naming |= {up: down for down, up in naming.items()}
    name = naming.get(ending[1:], kind.file_names[missing]) if kind is LoRA else kind.file_names[missing]
    return f"{key.removesuffix(ending)}.{name}"


def load_tensor(opened: Any, key: str, what: str) -> torch.Tensor:
    """Load one tensor.

    Raises:
        UserError: it is empty, not of floating point, or has a NaN or an infinity.
    """
    try:
        tensor = opened.get_tensor(key)
    except Exception as error:  # safetensors raises many types for a dtype that torch lacks
        raise UserError(f"{what}: `{key}` cannot be read: {first_line(error)}") from error
    if tensor.numel() == 0:
        raise UserError(f"{what}: `{key}` is empty, of shape {tuple(tensor.shape)}")
    if not tensor.is_floating_point() and not key.endswith(".alpha"):
        raise UserError(
            f"{what}: `{key}` is of {str(tensor.dtype).removeprefix('torch.')}, not of floating point"
        )
    if not tensor.float().isfinite().all():
        raise UserError(f"{what}: `{key}` has values that are not finite (NaN or infinity)")
    return tensor


def build(
    kind: type[Layer], place: Found, tensors: dict[str, torch.Tensor], weight: torch.Tensor, what: str
) -> Layer:
    """Make the update of a layer from its tensors, with an alpha of 0 until alpha_of has read it.

    Args:
        tensors: by field.
        weight: of the base's layer.

    Raises:
        UserError: a wrong shape.
    """
    options: dict[str, Any] = {each: tensors[each] for each in kind.file_names if each in tensors}
    if "magnitude" in tensors:
        key = place.keys["magnitude"]
        options["magnitude"] = shaped_magnitude(tensors["magnitude"], key, weight, what)
    if kind is OFT and tensors["blocks"].ndim == 4:
        raise UserError(f"{what}: `{place.keys['blocks']}` is of BOFT, which is not supported")
    layer = kind(**(options if kind in UNSCALED else options | {"alpha": 0.0}))
    wrong = misfit(layer, weight)
    if wrong is not None:
        shapes = [f"`{place.keys[name]}` of {tuple(tensors[name].shape)}" for name in wrong.fields]
        reason = "it was made for another base" if len(shapes) == 1 else "one of them is of another layer"
        raise UserError(
            f"{what}: {' and '.join(shapes)} cannot be: a layer of the shape {tuple(weight.shape)} needs "
            f"{wrong.needed}; {reason}"
        )
    return layer


def shaped_magnitude(magnitude: torch.Tensor, key: str, weight: torch.Tensor, what: str) -> torch.Tensor:
    """Reshape DoRA's magnitudes to (out, 1, ...) or, one an input, (1, in, ...).

    PEFT has one an output in any shape; LyCORIS either, told by the shape.

    Raises:
        UserError: any other shape.
    """
    out, inside, *kernel = weight.shape
    ones, shape = (1,) * len(kernel), tuple(magnitude.shape)
    of_peft = ".lora_magnitude_vector" in key or len(shape) == 1
    if magnitude.numel() == out and (of_peft or shape[0] == out):
        return magnitude.reshape(out, 1, *ones)
    if magnitude.numel() == inside and not of_peft and shape[:2] == (1, inside):
        return magnitude.reshape(1, inside, *ones)
    raise UserError(
        f"{what}: `{key}` has the shape {shape}; the base's layer, {tuple(weight.shape)}, needs {out} "
        f"magnitudes or, one an input, {(1, inside, *ones)}"
    )


def alpha_of(
    layer: LoRA | LoHa | LoKr | OFT, stored: torch.Tensor | None, set_to: float | None, where: str
) -> float:
    """Return a layer's alpha: the tensor in the file, else PEFT's setting, else what scales by 1.

    Raises:
        UserError: several numbers, 0, or a tensor and a setting that contradict each other.
    """
    if isinstance(layer, OFT):
        return 0.0 if stored is None else as_number(stored, where)
    if stored is None:
        return float(layer.rank or 1) if set_to is None else set_to
    alpha = as_number(stored, where)
    if alpha == 0 and layer.rank is not None:
        raise UserError(f"{where} is 0: programs differ on whether that is no effect or full strength")
    if set_to is not None and abs(set_to - alpha) > 1e-3 * abs(alpha):
        raise UserError(f"{where} is {alpha:g}, but the file's settings say {set_to:g}")
    return alpha


def as_number(tensor: torch.Tensor, where: str) -> float:
    """Return the only value of a tensor.

    Raises:
        UserError: it has several.
    """
    if tensor.numel() != 1:
        raise UserError(f"{where} should be one number, but has the shape {tuple(tensor.shape)}")
    return float(tensor)
