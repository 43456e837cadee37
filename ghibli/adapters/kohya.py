"""Writing adapters in the layout of kohya's scripts, which A1111, Forge, ComfyUI and InvokeAI read.

Key names and metadata are those that kohya's `networks.lora` writes for Stable Diffusion 1.5.
"""

from dataclasses import replace
from pathlib import Path, PureWindowsPath
from typing import Any

import torch
from safetensors.torch import save

from ghibli.adapters.files import Adapter, is_plain
from ghibli.adapters.layers import UNSCALED, Full, InputOFT, Layer, LoHa, LoKr, LoRA, at_alpha, tucker
from ghibli.adapters.names import kohya_name, named_layers
from ghibli.adapters.sidecar import clean_name, title_of
from ghibli.config.schema import Config, describe
from ghibli.models.base import BaseModel
from ghibli.models.safetensors import with_sorted_metadata
from ghibli.runtime.errors import UserError
from ghibli.runtime.files import write_atomically


def to_kohya(adapter: Adapter, base: BaseModel | None = None) -> dict[str, torch.Tensor]:
    """Convert an adapter to kohya's state dict, with LyCORIS's names for what is not a LoRA.

    Args:
        base: as for written_layers.

    Raises:
        UserError: as written_layers.
    """
    state: dict[str, torch.Tensor] = {}
    for name, layer in written_layers(adapter, base).items():
        prefix = kohya_name(name)
        for field, tensor in layer.tensors.items():
            state[f"{prefix}.{layer.file_names[field]}"] = tensor.contiguous()
        if not isinstance(layer, UNSCALED) and layer.alpha is not None:
            state[f"{prefix}.alpha"] = torch.tensor(layer.alpha, dtype=layer.dtype)
        if layer.magnitude is not None:
            state[f"{prefix}.dora_scale"] = layer.magnitude.contiguous()
    return state


def written_layers(adapter: Adapter, base: BaseModel | None = None) -> dict[str, Layer]:
    """Return the same updates in the form in which the readers of kohya's layout get them right.

    DoRA's magnitudes, one an input, are kept: ComfyUI and A1111 agree on them. Of magnitudes one an output,
    ComfyUI divides by the norm of W instead of W + B A, and A1111 takes them for those of the inputs. Such a
    layer is its whole difference from the base, which all of them read. A Tucker decomposition over the
    kernel is multiplied out: ComfyUI and LyCORIS fail on most LoKr that have one, and stable-diffusion.cpp
    takes the core of LoRA and LoHa for its transpose.

    Args:
        base: what the adapter was trained on; only needed for DoRA.

    Raises:
        UserError: DoRA with magnitudes one an output, and no base.
    """
    known, found = {} if base is None else named_layers(base), dict[str, Layer]()
    layers = {
        name: layer if only_as_a_whole(layer) else in_two_factors(layer)
        for name, layer in adapter.layers.items()
    }
    for name, layer in at_one_alpha(layers).items():
        if only_as_a_whole(layer):
            layer = whole_difference(layer, adapter, known[name].weight if known else None)
        found[name] = layer
    return found


def at_one_alpha(layers: dict[str, Layer]) -> dict[str, Layer]:
    """Return the same layers, with alpha 1 in every plain LoRA if they have several alphas.

    diffusers 0.42 takes one alpha for all of the UNet's layers from a file in this layout, as it looks for
    the others under names that no layer has; rank and alpha of each layer are right everywhere else.
    """
    alphas = {layer.alpha for layer in layers.values() if isinstance(layer, LoRA) and layer.is_plain}
    return {name: at_alpha(layer, 1.0) for name, layer in layers.items()} if len(alphas) > 1 else layers


def only_as_a_whole(layer: Layer) -> bool:
    """Tell whether the readers of kohya's layout only get this update right as its whole difference."""
    return layer.per_output or isinstance(layer, InputOFT)


@torch.no_grad()
def whole_difference(layer: Layer, adapter: Adapter, weight: torch.Tensor | None) -> Full:
    """Return the same update as a full difference from the base's weight.

    Raises:
        UserError: no weight.
    """
    if weight is None:
        raise UserError(
            f"{adapter.file} is a DoRA, whose magnitudes ComfyUI and A1111 read wrongly in kohya's layout: "
            "use the diffusers file, or ghibli export --merge"
        )
    return Full(diff=layer.delta(weight.double()).to(layer.dtype))


@torch.no_grad()
def in_two_factors(layer: Layer) -> Layer:
    """Multiply the core of a Tucker decomposition into the factor of the inputs: same update, same rank.

    A layer without a core stays as it is.
    """
    if isinstance(layer, LoRA) and layer.mid is not None:
        alpha = layer.alpha * len(layer.mid) / layer.rank  # the core need not be square
        return replace(layer, down=times_core(layer.mid, layer.down), mid=None, alpha=alpha)
    if isinstance(layer, LoHa) and layer.t1 is not None and layer.t2 is not None:
        w1_b, w2_b = times_core(layer.t1, layer.w1_b), times_core(layer.t2, layer.w2_b)
        outside = replace(layer, w1_a=layer.w1_a.T, w2_a=layer.w2_a.T, t1=None, t2=None)
        return replace(outside, w1_b=w1_b.flatten(1), w2_b=w2_b.flatten(1))
    if isinstance(layer, LoKr) and layer.t2 is not None:
        assert layer.w2_a is not None and layer.w2_b is not None
        return replace(layer, w2_a=layer.w2_a.T, w2_b=times_core(layer.t2, layer.w2_b).flatten(1), t2=None)
    return layer


def times_core(core: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """Multiply a core (p, q, k, k) with the factor (q, in) beside the inputs: (p, in, k, k), in its dtype."""
    one = torch.eye(len(core), dtype=torch.float64, device=core.device)
    return tucker(core.double(), one, factor.double().flatten(1)).to(factor.dtype)


def write_kohya(
    adapter: Adapter, file: Path, metadata: dict[str, str], base: BaseModel | None = None
) -> None:
    """Write an adapter in kohya's layout, as to_kohya; the same adapter gives the same bytes."""
    content = with_sorted_metadata(save(to_kohya(adapter, base), metadata))
    write_atomically(file, lambda opened: opened.write(content))


def metadata_of(
    adapter: Adapter, base: BaseModel, config: Config, facts: dict[str, Any], name: str
) -> dict[str, str]:
    """Collect the metadata that other programs show: base, rank, alpha, trigger words, training, licence.

    Args:
        facts: step, best_epoch, base_hash, data_hash and optionally ended, as in status.json.
        name: under which A1111 lists the adapter; made fit for `<lora:NAME:1>`.
    """
    is_v2, is_v = base.family == "sd2", base.prediction_type == "v_prediction"
    v2_architecture = "stable-diffusion-v2-768-v" if is_v else "stable-diffusion-v2-512"
    size, words = config.model.resolution, config.data.style.strip(" ,")
    skipped = {"ss_clip_skip": str(config.model.clip_skip)} if config.model.clip_skip > 1 else {}
    dated = {"modelspec.date": facts["ended"][:19]} if facts.get("ended") else {}
    found = {
        "ss_output_name": clean_name(name),
        "ss_network_module": "networks.lora" if is_plain(adapter) else "lycoris.kohya",
        "ss_network_dim": str(adapter.ranks[0]) if len(adapter.ranks) == 1 else "Dynamic",
        "ss_network_alpha": f"{adapter.alphas[0]:g}" if len(adapter.alphas) == 1 else "Dynamic",
        "ss_network_dropout": f"{config.lora.dropout:g}",
        "ss_base_model_version": f"sd_{'v2' if is_v2 else 'v1'}{'_v' if is_v else ''}",
        "ss_v2": str(is_v2),
        "ss_sd_model_name": PureWindowsPath(config.model.path).name,
        "ss_sd_model_hash": str(facts.get("base_hash", "")),
        "ss_dataset_hash": str(facts.get("data_hash", "")),
        "ss_steps": str(facts.get("step", "")),
        "ss_epoch": str(facts.get("best_epoch", "")),
        "ss_seed": str(config.seed),
        "ss_learning_rate": f"{config.optimizer.lr:g}",
        "ss_optimizer": config.optimizer.name,
        "ss_resolution": f"({size}, {size})",
        "ss_training_comment": f"training {config.loss.guidance_text}; trigger words: {words}",
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": f"{v2_architecture if is_v2 else 'stable-diffusion-v1'}/lora",
        "modelspec.implementation": "diffusers",
        "modelspec.title": title_of(config.data.style, describe(config)),
        "modelspec.resolution": f"{size}x{size}",
        "modelspec.prediction_type": "v" if is_v else "epsilon",
        "modelspec.trigger_phrase": words,
        **dated,
        **skipped,
        # worded as in every file so far: the same training gives the same bytes
        "modelspec.license": "CreativeML OpenRAIL-M as its base; the style and pictures are Studio Ghibli's",
    }
    return {key: value.encode("utf-8", "replace").decode() for key, value in found.items()}
