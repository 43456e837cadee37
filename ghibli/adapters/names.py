"""How adapter files name a layer of the base, and what an unknown name tells of the file.

    diffusers, PEFT   unet.down_blocks.0.attentions.0.....attn1.to_q        with or without base_model.model.
    diffusers, 2023   unet.down_blocks.0.attentions.0.....attn1.processor.to_q_lora
    kohya, LyCORIS    lora_unet_down_blocks_0_attentions_0_..._attn1_to_q   or lycoris_...
    ComfyUI           diffusion_model.input_blocks.1.1.....attn1.to_q      the original code's names
    the text encoder  text_encoder., lora_te_, text_encoders.clip_l.transformer. and so on

Here a layer is called `unet.` or `text_encoder.`, then as in the base, without `text_model.`, which some
versions of transformers put in front.
"""

import re
from collections.abc import Collection, Iterator
from typing import Any

import torch
from torch import nn

from ghibli.models.base import BaseModel
from ghibli.models.original import original_unet_layers

KOHYA = {"unet": "lora_unet_", "text_encoder": "lora_te_"}
PEFT_PREFIX = "base_model.model."
DOTTED = {  # what stands before a layer's name, in any of the layouts that keep its dots
    "unet": ("unet.", "", f"{PEFT_PREFIX}unet.", PEFT_PREFIX, "diffusion_model.", "model.diffusion_model."),
    "text_encoder": (
        "text_encoder.", "", f"{PEFT_PREFIX}text_encoder.", PEFT_PREFIX, "text_encoders.clip_l.transformer.",
        "text_encoders.clip_l.", "clip_l.transformer.", "cond_stage_model.transformer.",
    ),
}  # fmt: skip
FLAT = {
    "unet": ("lora_unet_", "lycoris_", "lycoris_unet_"),
    "text_encoder": ("lora_te_", "lycoris_te_", "lycoris_"),
}
PROCESSORS = {"to_q": "to_q", "to_k": "to_k", "to_v": "to_v", "to_out.0": "to_out"}  # diffusers before 0.18
OLD_ATTENTION = {"q_proj": "to_q", "k_proj": "to_k", "v_proj": "to_v", "out_proj": "to_out"}
FOREIGN = (  # (pattern of a key's start, what such a file belongs to)
    (r"lora_te[12]_|text_encoder_2\.|text_encoders\.clip_[gh]\.|lora_unet_label_emb|.*add_embedding", "SDXL"),
    (r".*(input|middle|output|down|mid|up)_blocks?[._].*transformer_blocks[._][1-9]", "SDXL"),
    (r"(lora_)?transformer[._]|.*(double|single|joint)_blocks|.*t5xxl|lora_te3_", "Flux or SD 3"),
    (r".*(down|up)_blocks.*motion_modules", "AnimateDiff"),
    (r"lora_controlnet|control_model\.", "a ControlNet"),
    (r"lora_prior_", "Stable Cascade"),
)
NUMBERED = r"(unet|text_encoder):\d+:(up|down)"
KINDS = (  # (pattern of a whole key, what it is)
    (NUMBERED,
     "a numbered layer of cloneofsimo's lora of 2022, which only its own code can tell from the others"),
    (r"emb_params|string_to_(param|token).*|bundle_emb.*|clip_[lg]|<.*>|\*|.*learned_embeds.*",
     "a textual inversion: a word's embedding, not an update of a layer"),
    (r"(model\.diffusion_model|first_stage_model|cond_stage_model|model_ema)\..*(weight|bias)",
     "of a whole model, which is no adapter"),
    (r".*(\.w_norm|\.b_norm|norm\d?\.(diff|diff_b|weight|bias))",
     "an update of a normalisation, which is not supported"),
    (r".*(diff_b|bias)", "an update of a bias, which is not supported"),
    (r"oft_(unet|te)_.*", "of sd-scripts' own OFT, which is not supported (LyCORIS's is)"),
    (r".*\.(on_input|ia3_l.*)|lora_(unet|te)_\w+\.weight", "of IA3, which is not supported"),
    (r".*\.(a1|a2|b1|b2|bm1|bm2|c1|c2)\.weight", "of GLoRA, which is not supported"),
)  # fmt: skip


def layer_name(part: str, name: str) -> str:
    """Name a layer as Adapter.layers does: `unet.` or `text_encoder.`, then its name in the base."""
    return f"{part}.{name.removeprefix('text_model.')}"


def layers_of(base: BaseModel) -> Iterator[tuple[str, str, str, Any]]:
    """Yield every nn.Linear and nn.Conv2d of UNet and text encoder: its name, part, path there, and itself.

    A layer that has adapters counts once: the base's own, by its own path.
    """
    for part, module in base.adaptable.items():
        for path, layer in module.named_modules():
            if isinstance(layer, nn.Linear | nn.Conv2d) and ".lora_" not in path:
                own = path.removesuffix(".base_layer")
                yield layer_name(part, own), part, own, layer


def layer_paths(base: BaseModel) -> dict[str, tuple[str, str]]:
    """Name every linear and convolution layer of UNet and text encoder -> its part, and its path there."""
    return {name: (part, path) for name, part, path, _ in layers_of(base)}


def named_layers(base: BaseModel) -> dict[str, Any]:
    """Name every nn.Linear and nn.Conv2d of UNet and text encoder; under adapters, the base's own."""
    return {name: layer for name, _, _, layer in layers_of(base)}


def weight_of(layer: Any) -> torch.Tensor:
    """Return a layer's weight; of one in 8 or 4 bits, which are packed, an empty one of its shape."""
    if layer.weight.is_floating_point():
        return layer.weight
    return torch.empty(layer.out_features, layer.in_features, device="meta")


def kohya_name(name: str) -> str:
    """Translate a layer's name: unet.mid_block.attentions.0... to lora_unet_mid_block_attentions_0_..."""
    part, _, path = name.partition(".")
    path = path if part == "unet" else f"text_model.{path}"
    return KOHYA[part] + path.replace(".", "_")


def target_of(name: str) -> str:
    """Return the ending of a layer's name that tells its kind: to_q, to_out.0, ff.net.0.proj, conv1."""
    parts = name.split(".")
    if "ff" in parts:
        return ".".join(parts[parts.index("ff") :])
    return ".".join(parts[-2:]) if parts[-1].isdigit() else parts[-1]


def names_in_files(base: BaseModel) -> dict[str, str]:
    """Map every name that a file may give to a layer of this base to the layer's name here."""
    found: dict[str, str] = {}
    names = named_layers(base)
    paths = [name.removeprefix("unet.") for name in names if name.startswith("unet.")]
    originals = original_unet_layers(base, paths)
    for name in names:
        part, _, path = name.partition(".")
        aliases = unet_aliases(path, originals[path]) if part == "unet" else text_aliases(path)
        for alias in aliases:
            for before in DOTTED[part]:
                found[before + alias] = name
            for before in FLAT[part]:
                found[before + alias.replace(".", "_")] = name
    return found


def unet_aliases(path: str, original: str) -> Iterator[str]:
    """List the names of a layer of the UNet: diffusers', those of its old processors, the original code's."""
    yield path
    for new, old in PROCESSORS.items():
        if path.endswith((f"attn1.{new}", f"attn2.{new}")):
            yield f"{path.removesuffix(new)}processor.{old}_lora"
    yield original


def text_aliases(path: str) -> Iterator[str]:
    """List the names of a layer of the text encoder: with and without text_model., and those of 2023."""
    for before in ("text_model.", ""):
        yield before + path
        for new, old in OLD_ATTENTION.items():
            if path.endswith(f"self_attn.{new}"):
                yield f"{before}{path.removesuffix(new)}{old}_lora"


def explain(unknown: list[str], names: Collection[str], what: str) -> str:
    """Say what a file is that has keys of no layer of the base, naming one of them: the first that tells.

    Args:
        names: all names of the base's layers, as names_in_files has them.
        what: the file as users named it.
    """
    for pattern, family in FOREIGN:
        key = next((key for key in unknown if re.match(pattern, key)), None)
        if key is not None:
            base = "the base is Stable Diffusion 1 or 2"
            return f"{what} is an adapter for {family}; {base}, without `{printable(key)}`"
    key = next((key for key in unknown if re.fullmatch(NUMBERED, key)), unknown[0])  # among words of its own
    for pattern, kind in KINDS:
        if re.fullmatch(pattern, key):
            return f"{what}: `{printable(key)}` is {kind}"
    if any(key[:at] in names for at, letter in enumerate(key) if letter == "."):
        return f"{what}: `{printable(key)}` is of a kind that is not supported"
    return f"{what} is not a LoRA of this base: it has `{printable(key)}`, which the base lacks"


def printable(key: str) -> str:
    """Return a key of a stranger's file for a message: control characters as escapes, and not without end."""
    return "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in key[:200])
