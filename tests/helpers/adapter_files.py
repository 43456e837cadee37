"""Adapter files with random numbers, of every kind, in the names of kohya's scripts and LyCORIS."""

from math import prod

import torch

from ghibli.adapters.names import kohya_name, named_layers
from ghibli.models.base import BaseModel

KINDS = (
    "lora", "dora_out", "dora_in", "tucker", "loha", "loha_tucker", "lokr", "lokr_whole", "lokr_tucker",
    "loha_dora", "oft", "full",
)  # fmt: skip
RANK, ALPHA = 3, 5.0


def layer_tensors(kind: str, shape: torch.Size, seed: int) -> dict[str, torch.Tensor]:
    """Make the tensors of one layer for a weight of a shape, by their endings."""
    generator = torch.Generator().manual_seed(seed)
    out, inside, *kernel = shape
    wide, small = inside * prod(kernel), (1,) * len(kernel)

    def of(*sizes: int) -> torch.Tensor:
        return 0.3 * torch.randn(sizes, generator=generator)

    core = of(RANK, RANK, *kernel)
    half = (out // 2, inside // 2)
    alpha = {"alpha": torch.tensor(ALPHA)}
    plain = {"lora_up.weight": of(out, RANK, *small), "lora_down.weight": of(RANK, inside, *kernel)}
    two = {f"hada_w{n}_{ab}": of(*((out, RANK) if ab == "a" else (RANK, wide))) for n in "12" for ab in "ab"}
    made = {
        "lora": plain,
        "dora_out": plain | {"dora_scale": of(out, 1, *small).abs() + 0.5},
        "dora_in": plain | {"dora_scale": of(1, inside, *small).abs() + 0.5},
        "tucker": {
            "lora_up.weight": of(out, RANK, *small), "lora_mid.weight": core,
            "lora_down.weight": of(RANK, inside, *small),
        },
        "loha": two,
        "loha_dora": two | {"dora_scale": of(out, 1, *small).abs() + 0.5},
        "loha_tucker": {
            **{f"hada_w{n}_{ab}": of(RANK, out if ab == "a" else inside) for n in "12" for ab in "ab"},
            "hada_t1": core, "hada_t2": of(RANK, RANK, *kernel),
        },
        "lokr": {"lokr_w1": of(2, 2), "lokr_w2_a": of(half[0], RANK), "lokr_w2_b": of(RANK, wide // 2)},
        "lokr_whole": {"lokr_w1": of(2, 2), "lokr_w2": of(*half, *kernel)},
        "lokr_tucker": {
            "lokr_w1": of(2, 2), "lokr_w2_a": of(RANK, half[0]), "lokr_w2_b": of(RANK, half[1]),
            "lokr_t2": core,
        },
        "oft": {"oft_blocks": of(out // 4, 4, 4), "alpha": torch.tensor(0.0)},
        "full": {"diff": of(*shape)},
    }[kind]  # fmt: skip
    return made if kind in ("full", "oft") else made | alpha


def fits(kind: str, shape: torch.Size) -> bool:
    """Tell whether a kind exists for a weight: Tucker's only for convolutions over more than one pixel."""
    return prod(shape[2:]) > 1 if "tucker" in kind else shape[1] % 2 == 0 and shape[0] % 4 == 0


def adapter_state(base: BaseModel, kinds: dict[str, str], seed: int = 0) -> dict[str, torch.Tensor]:
    """Make an adapter's state dict.

    Args:
        kinds: of every layer, by its name in adapters.names.
    """
    layers = named_layers(base)
    return {
        f"{kohya_name(name)}.{ending}": tensor
        for number, (name, kind) in enumerate(kinds.items())
        for ending, tensor in layer_tensors(kind, layers[name].weight.shape, seed + number).items()
    }
