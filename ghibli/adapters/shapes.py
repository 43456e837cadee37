"""Whether the tensors of an update fit the base's layer and each other."""

from dataclasses import dataclass
from math import prod

import torch

from ghibli.adapters.layers import InputOFT, Layer

BASE_DIMS = ("out", "in", "k", "in * k", "1")  # dimensions that the base sets
PRODUCTS = {  # dimensions that multiply to one of the base's
    ("a", "b"): "out", ("c", "d * k"): "in * k", ("c", "d"): "in", ("blocks", "n"): "out",
}  # fmt: skip


@dataclass(frozen=True)
class Misfit:
    """Tensors whose shapes do not fit."""

    fields: list[str]  # the one that does not, and the one that it contradicts, if that is not the base
    needed: str  # the shape that the first should have


def misfit(layer: Layer, weight: torch.Tensor) -> Misfit | None:
    """Find the first tensor of a layer whose shape does not fit the base's weight, or the tensors before."""
    out, inside, kernel = *weight.shape[:2], prod(weight.shape[2:])
    sizes = {"out": out, "in": inside, "k": kernel, "in * k": inside * kernel, "1": 1}
    origin: dict[str, str] = {}  # of a size: the field that set it
    tensors = layer.tensors
    for field, dims in ((field, dims) for field, dims in layer.dims.items() if field in tensors):
        value = tensors[field]
        shape = (*value.shape[: len(dims) - 1], prod(value.shape[len(dims) - 1 :]))
        before = dict(sizes)
        for dim, size in zip(dims, shape, strict=False):
            sizes.setdefault(dim, size)
            origin.setdefault(dim, field)
        wrong = [dim for dim, size in zip(dims, shape, strict=False) if sizes[dim] != size]
        if wrong or value.ndim < min(2, len(dims)) or len(shape) != len(dims):
            others = {origin[dim] for dim in wrong if dim in before} - {field}
            others = others if not set(wrong) & set(BASE_DIMS) else set()
            needed = ", ".join(str(before.get(dim, dim)) for dim in dims)
            return Misfit([field, *sorted(others)], f"({needed})")
    if isinstance(layer, InputOFT):
        blocks, angles = layer.angles.shape
        if inside % blocks or inside // blocks * (inside // blocks - 1) != 2 * angles or kernel > 1:
            return Misfit(["angles"], f"({blocks}, n (n - 1) / 2) with {blocks} n = {inside}")
    return misfit_of_products(layer, sizes)


def misfit_of_products(layer: Layer, sizes: dict[str, int]) -> Misfit | None:
    """Find two tensors of a layer, of the given sizes, that do not multiply to the base's weight."""
    for pair, total in PRODUCTS.items():
        if all(dim in sizes for dim in pair) and sizes[pair[0]] * sizes[pair[1]] != sizes[total]:
            own = {field: dims for field, dims in layer.dims.items() if field in layer.tensors}
            fields = [field for field, dims in own.items() if set(pair) & set(dims)]
            return Misfit(fields, f"{pair[0]} x {pair[1]} = {sizes[total]}")
    return None
