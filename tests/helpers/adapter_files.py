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


def difference(kind: str, weight: torch.Tensor, tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    """Compute W' - W of one layer in float64 from its tensors, as the papers write it.

    Args:
        weight: W in float64: (out, in) or (out, in, k, k).
        tensors: by their endings, as layer_tensors makes them.
    """
    own = {key: value.double() for key, value in tensors.items()}
    if kind == "full":
        return own["diff"]
    if kind == "oft":
        one = torch.eye(own["oft_blocks"].shape[1]).double()
        skews = [each - each.T for each in own["oft_blocks"]]
        turn = torch.block_diag(*((one + each) @ torch.linalg.inv(one - each) for each in skews))
        return (turn.T @ weight.flatten(1)).reshape(weight.shape) - weight
    change = product(kind.partition("_")[0], own).reshape(weight.shape)
    if "dora_scale" not in own:
        return change
    v, summed = weight + change, (0 if kind == "dora_in" else 1, *range(2, weight.ndim))
    return own["dora_scale"] * v / (v**2).sum(summed, keepdim=True).sqrt() - weight


def product(family: str, own: dict[str, torch.Tensor]) -> torch.Tensor:
    """Multiply the factors of a LoRA, LoCon, LoHa or LoKr, times alpha / rank where it has a rank."""
    core = "pq...,op,qi->oi..."
    if family in ("lora", "dora"):
        up, down = own["lora_up.weight"].flatten(1), own["lora_down.weight"]
        return own["alpha"] / len(down) * torch.einsum("or,r...->o...", up, down)
    if family == "tucker":
        up, down = own["lora_up.weight"].flatten(1), own["lora_down.weight"].flatten(1)
        return own["alpha"] / len(down) * torch.einsum(core, own["lora_mid.weight"], up, down)
    if family == "loha":
        pairs = [(own[f"hada_w{n}_a"], own[f"hada_w{n}_b"], own.get(f"hada_t{n}")) for n in "12"]
        halves = [a @ b if t is None else torch.einsum(core, t, a.T, b) for a, b, t in pairs]
        return own["alpha"] / len(own["hada_w1_b"]) * halves[0] * halves[1]
    if "lokr_w2" in own:  # whole: without a rank, hence without a scale
        inner, scale = own["lokr_w2"], torch.tensor(1.0)
    else:
        a, b, scale = own["lokr_w2_a"], own["lokr_w2_b"], own["alpha"] / len(own["lokr_w2_b"])
        inner = a @ b if "lokr_t2" not in own else torch.einsum(core, own["lokr_t2"], a.T, b)
    whole = torch.einsum("ac,bd...->abcd...", own["lokr_w1"], inner)
    return scale * whole.flatten(0, 1).flatten(1, 2)


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
