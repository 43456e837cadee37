r"""The kinds of update that an adapter file holds for one layer, each as the matrix W' - W it stands for.

    kind   W' - W, with s = alpha / rank                 source
    LoRA   s B A                                         Hu et al. 2021, section 4.1
    LoCon  s B M A, M over the kernel (Tucker)           Yeh et al. 2024 (LyCORIS), section 3
    LoHa   s (B1 A1) * (B2 A2), elementwise              Hyeon-Woo et al. 2022 (FedPara)
    LoKr   s C (x) (B A), a Kronecker product            Yeh et al. 2024; Edalati et al. 2022 (KronA)
    OFT    (R - 1) W, R orthogonal in blocks             Qiu et al. 2023; Cayley's (1 + Q) (1 - Q)^-1
           or W (R^T - 1), which PEFT trains             R = (1 - Q) (1 + Q)^-1
    full   the difference itself
    DoRA   m V / |V| - W, with V = W + one of the above  Liu et al. 2024, section 4.1

Names of tensors and what alpha means are those of LyCORIS, whose files are the most common.
"""

from dataclasses import dataclass, replace
from functools import lru_cache
from math import isclose
from typing import ClassVar, TypeVar

import torch

Dims = tuple[str, ...]  # of a factor, by name: equal names, equal sizes


@dataclass(frozen=True, kw_only=True)
class Update:
    """The update of one layer of the base: a weight (out, in) or, for a convolution, (out, in, k, k)."""

    magnitude: torch.Tensor | None = None  # DoRA's m: (out, 1, ...), or (1, in, ...) per input

    name: ClassVar[str]
    file_names: ClassVar[dict[str, str]]  # field -> how LyCORIS names it in a file, in its order

    @property
    def rank(self) -> int | None:
        """Inner size of the factors; None where there is none."""
        return None

    @property
    def scale(self) -> float:
        """What the product of the factors is multiplied by: alpha / rank, 1 where there is none of either."""
        alpha = getattr(self, "alpha", None)
        return 1.0 if alpha is None or self.rank is None else alpha / self.rank

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the tensors."""
        return next(iter(self.tensors.values())).dtype

    @property
    def kind(self) -> str:
        """What users call it: LoRA, LoCon, LoHa, ... and DoRA for any of them with magnitudes."""
        if self.magnitude is None:
            return self.name
        return "DoRA" if self.name == "LoRA" else f"{self.name} with DoRA's magnitudes"

    @property
    def per_output(self) -> bool:
        """Whether the magnitudes are one an output, as in the paper and in PEFT, or one an input."""
        return self.magnitude is not None and (
            self.magnitude.shape[0] == self.magnitude.numel()  # (1, 1) is both: no matter
        )

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        """The tensors by field, without the magnitudes."""
        values = {field: getattr(self, field) for field in self.file_names}
        return {field: value for field, value in values.items() if value is not None}

    @property
    def dims(self) -> dict[str, Dims]:
        """The dimensions of every tensor; a last one stands for all that follow."""
        raise NotImplementedError

    def plain_delta(self, weight: torch.Tensor) -> torch.Tensor:
        """Return W' - W before DoRA, in the dtype and with the shape of `weight`."""
        raise NotImplementedError

    def delta(self, weight: torch.Tensor) -> torch.Tensor:
        """Return W' - W, in the dtype and the shape of the base's `weight`; in float64 exactly."""
        change = self.plain_delta(weight)
        if self.magnitude is None:
            return change
        changed = weight + change
        axes = [axis for axis in range(weight.ndim) if axis != (0 if self.per_output else 1)]
        norm = torch.linalg.vector_norm(changed, dim=axes, keepdim=True)
        norm = norm.clamp(min=torch.finfo(weight.dtype).tiny)
        return changed * (self.magnitude.to(weight) / norm) - weight


@dataclass(frozen=True)
class LoRA(Update):
    """(alpha / rank) B A; with `mid`, a Tucker decomposition of a convolution."""

    down: torch.Tensor  # A: (rank, in) or, for a convolution, (rank, in, k, k)
    up: torch.Tensor  # B: (out, rank) or (out, rank, 1, 1)
    alpha: float
    mid: torch.Tensor | None = None  # (rank, rank, k, k); `down` is then (rank, in, 1, 1)

    file_names: ClassVar = {"up": "lora_up.weight", "down": "lora_down.weight", "mid": "lora_mid.weight"}

    @property
    def name(self) -> str:  # type: ignore[override]
        return "LoRA" if self.mid is None else "LoCon"

    @property
    def rank(self) -> int:
        return self.down.shape[0]

    @property
    def is_plain(self) -> bool:
        """Whether it is two factors and nothing else, which every program can keep."""
        return self.mid is None and self.magnitude is None

    @property
    def dims(self) -> dict[str, Dims]:
        if self.mid is None:
            return {"up": ("out", "rank"), "down": ("rank", "in * k")}
        return {"up": ("out", "rank out"), "mid": ("rank out", "rank", "k"), "down": ("rank", "in")}

    def plain_delta(self, weight: torch.Tensor) -> torch.Tensor:
        up, down = self.up.to(weight).flatten(1), self.down.to(weight).flatten(1)
        if self.mid is not None:
            down = tucker(self.mid.to(weight), torch.eye(up.shape[1]).to(weight), down)
        return (up @ down.flatten(1) * self.scale).reshape(weight.shape)


@dataclass(frozen=True)
class LoHa(Update):
    """(alpha / rank) times the elementwise product of two low-rank matrices."""

    w1_a: torch.Tensor  # (out, rank); with t1 and t2 (rank, out)
    w1_b: torch.Tensor  # (rank, in k k); with t1 and t2 (rank, in)
    w2_a: torch.Tensor
    w2_b: torch.Tensor
    alpha: float
    t1: torch.Tensor | None = None  # (rank, rank, k, k)
    t2: torch.Tensor | None = None

    name: ClassVar = "LoHa"
    file_names: ClassVar = {field: f"hada_{field}" for field in ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")}

    @property
    def rank(self) -> int:
        return self.w1_b.shape[0]

    @property
    def dims(self) -> dict[str, Dims]:
        if self.t1 is None or self.t2 is None:
            wide, tall = ("rank", "in * k"), ("out", "rank")
            return {"w1_a": tall, "w1_b": wide, "w2_a": ("out", "rank 2"), "w2_b": ("rank 2", "in * k")}
        square = ("rank", "rank", "k")
        wide, tall = ("rank", "in"), ("rank", "out")
        return {"w1_a": tall, "w1_b": wide, "w2_a": tall, "w2_b": wide, "t1": square, "t2": square}

    def plain_delta(self, weight: torch.Tensor) -> torch.Tensor:
        w1_a, w1_b, w2_a, w2_b = (each.to(weight) for each in (self.w1_a, self.w1_b, self.w2_a, self.w2_b))
        if self.t1 is None or self.t2 is None:
            product = (w1_a @ w1_b.flatten(1)) * (w2_a @ w2_b.flatten(1))
        else:
            product = tucker(self.t1.to(weight), w1_a.T, w1_b) * tucker(self.t2.to(weight), w2_a.T, w2_b)
        return (product * self.scale).reshape(weight.shape)


@dataclass(frozen=True)
class LoKr(Update):
    """(alpha / rank) times a Kronecker product of two matrices, each whole or in two factors."""

    alpha: float | None  # None where both matrices are whole: then nothing is scaled
    w1: torch.Tensor | None = None  # (a, c); the layer maps c d inputs to a b outputs
    w1_a: torch.Tensor | None = None  # (a, rank)
    w1_b: torch.Tensor | None = None  # (rank, c)
    w2: torch.Tensor | None = None  # (b, d) or (b, d, k, k)
    w2_a: torch.Tensor | None = None  # (b, rank); with t2 (rank, b)
    w2_b: torch.Tensor | None = None  # (rank, d) or (rank, d k k)
    t2: torch.Tensor | None = None  # (rank, rank, k, k)

    name: ClassVar = "LoKr"
    file_names: ClassVar = {
        field: f"lokr_{field}" for field in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")
    }

    @property
    def rank(self) -> int | None:
        inner = [each.shape[0] for each in (self.w1_b, self.w2_b) if each is not None]
        return inner[0] if inner else None

    @property
    def dims(self) -> dict[str, Dims]:
        dims: dict[str, Dims] = {"w1": ("a", "c"), "w1_a": ("a", "rank"), "w1_b": ("rank", "c")}
        if self.t2 is None:
            dims |= {"w2": ("b", "d * k"), "w2_a": ("b", "rank 2"), "w2_b": ("rank 2", "d * k")}
        else:
            dims |= {"w2_a": ("rank 2", "b"), "w2_b": ("rank 2", "d"), "t2": ("rank 2", "rank 2", "k")}
        return {field: dims[field] for field in self.tensors}

    def plain_delta(self, weight: torch.Tensor) -> torch.Tensor:
        have = {field: value.to(weight) for field, value in self.tensors.items()}
        left = have["w1"] if "w1" in have else have["w1_a"] @ have["w1_b"]
        if "w2" in have:
            right = have["w2"]
        elif "t2" in have:
            right = tucker(have["t2"], have["w2_a"].T, have["w2_b"])
        else:
            right = have["w2_a"] @ have["w2_b"].flatten(1)
        return (torch.kron(left, right.flatten(1)) * self.scale).reshape(weight.shape)


@dataclass(frozen=True)
class OFT(Update):
    """W turned by an orthogonal matrix, in blocks of the outputs."""

    blocks: torch.Tensor  # (blocks, n, n): Q is its skew part; blocks * n outputs
    alpha: float = 0.0  # largest norm of Q over the number of outputs; 0 = any
    rescale: torch.Tensor | None = None  # (out, 1, ...): a factor for each output

    name: ClassVar = "OFT"
    file_names: ClassVar = {"blocks": "oft_blocks", "rescale": "rescale"}

    @property
    def dims(self) -> dict[str, Dims]:
        return {"blocks": ("blocks", "n", "n"), "rescale": ("out", "1")}

    def plain_delta(self, weight: torch.Tensor) -> torch.Tensor:
        blocks = self.blocks.to(weight)
        skew = blocks - blocks.transpose(1, 2)
        limit, norm = self.alpha * weight.shape[0], skew.norm()
        if 0 < limit < norm:
            skew = skew * (limit / norm)
        one = torch.eye(blocks.shape[1]).to(weight)
        rotation = (one + skew) @ torch.linalg.inv(one - skew)
        turned = torch.einsum("knm,kni->kmi", rotation, weight.reshape(*blocks.shape[:2], -1))
        turned = turned.reshape(weight.shape)
        return (turned if self.rescale is None else turned * self.rescale.to(weight)) - weight


@dataclass(frozen=True)
class InputOFT(Update):
    """W with its inputs turned by an orthogonal matrix in blocks, as PEFT's OFT layer has it."""

    angles: torch.Tensor  # (blocks, n (n - 1) / 2): Q above its diagonal, by rows; blocks * n inputs
    terms: int | None = None  # of the series that PEFT takes for R by default; None = Cayley's transform

    name: ClassVar = "OFT of the inputs"
    file_names: ClassVar = {"angles": "oft_R.weight"}

    @property
    def dims(self) -> dict[str, Dims]:
        return {"angles": ("blocks", "angles")}

    @property
    def rank(self) -> int:
        return self.angles.shape[0]

    def plain_delta(self, weight: torch.Tensor) -> torch.Tensor:
        inputs = weight.shape[1] // self.rank
        above = torch.zeros(self.rank, inputs, inputs).to(weight)
        rows, columns = torch.triu_indices(inputs, inputs, 1)
        above[:, rows, columns] = self.angles.to(weight)
        skew, one = above - above.transpose(1, 2), torch.eye(inputs).to(weight)
        if self.terms is None:
            rotation = torch.linalg.solve(one + skew, one - skew, left=False)
        else:
            rotation = cayley_series(skew, self.terms)
        turned = torch.einsum("okn,kmn->okm", weight.reshape(-1, self.rank, inputs), rotation)
        return turned.reshape(weight.shape) - weight


@dataclass(frozen=True)
class Full(Update):
    """The difference itself, as LyCORIS's `full` and what was extracted from whole models have it."""

    diff: torch.Tensor  # the shape of the layer's weight

    name: ClassVar = "full difference"
    file_names: ClassVar = {"diff": "diff"}

    @property
    def dims(self) -> dict[str, Dims]:
        return {"diff": ("out", "in", "k")}

    def plain_delta(self, weight: torch.Tensor) -> torch.Tensor:
        return self.diff.to(weight).reshape(weight.shape)


Layer = LoRA | LoHa | LoKr | OFT | InputOFT | Full
KINDS: tuple[type[Layer], ...] = (LoRA, LoHa, LoKr, OFT, InputOFT, Full)
UNSCALED = (InputOFT, Full)  # without an alpha
L = TypeVar("L", bound=Update)


def same_update(one: Layer, other: Layer) -> bool:
    """Tell whether two updates have the same tensors, and alphas equal as far as a dtype holds them."""
    if type(one) is not type(other) or one.tensors.keys() != other.tensors.keys():
        return False
    alphas = [getattr(each, "alpha", None) or 0.0 for each in (one, other)]
    return isclose(*alphas, rel_tol=1e-3) and all(
        torch.equal(tensor, other.tensors[field]) for field, tensor in one.tensors.items()
    )


def at_alpha(layer: L, alpha: float) -> L:
    """Return a plain LoRA with another alpha and the same product, B multiplied by what it lacks."""
    if not isinstance(layer, LoRA) or not layer.is_plain or layer.alpha == alpha:
        return layer
    return replace(layer, up=layer.up * (layer.alpha / alpha), alpha=alpha)


def tucker(core: torch.Tensor, up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
    """Multiply out a Tucker decomposition: (p, q, k, k), (out, p), (q, in) -> (out, in, k, k)."""
    return torch.einsum("pq...,op,qi->oi...", core, up, down)


def cayley_series(skew: torch.Tensor, terms: int) -> torch.Tensor:
    """Sum PEFT's series for the rotations of skew matrices (blocks, n, n), which turns the other way.

    1 + 2 Q + 2 Q^2 + ... + Q^k with k = max(3, terms - 1); of fewer than three terms, the first ones.
    """
    one, last = torch.eye(skew.shape[-1]).to(skew), max(3, terms - 1)
    factors = [2.0] * (terms - 1) if terms < 3 else [2.0] * (last - 1) + [1.0]
    powers = [factor * torch.linalg.matrix_power(skew, k) for k, factor in enumerate(factors, start=1)]
    return sum(powers, start=one.expand_as(skew))


@torch.no_grad()
def to_factors(layer: Layer, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (A, B) with B A = W' - W, on the device and in the dtype of the base's weight.

    A plain LoRA keeps its rank, with alpha / rank multiplied into B. Anything else becomes the whole
    difference and an identity, on the side where it is smaller: exact, and zero at weight 0.

    Returns:
        A (rank, in) and B (out, rank) or, for a convolution, (rank, in, k, k) and (out, rank, 1, 1).
    """
    if isinstance(layer, LoRA) and layer.is_plain:
        down, up = layer.down.to(weight).clone(), layer.up.to(weight) * layer.scale
    else:
        change = layer.delta(weight.double()).to(weight).flatten(1)
        rank = min(change.shape)
        one = identity(rank, weight.device, weight.dtype)
        up, down = (one, change) if rank == change.shape[0] else (change, one)
    rank = down.shape[0]
    return down.reshape(rank, *weight.shape[1:]), up.reshape(-1, rank, *(1,) * (weight.ndim - 2))


@lru_cache(maxsize=8)
def identity(size: int, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """Return the identity matrix; layers of one size share it, which halves what whole differences take."""
    return torch.eye(size, device=device, dtype=dtype)
