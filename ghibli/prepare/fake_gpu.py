"""A GPU that is not there: operations on it have shapes, dtypes, devices and memory, but no numbers.

torch's fake tensors (torch._subclasses.fake_tensor, private as of torch 2.14) follow every operation without
computing it and refuse tensors of two devices in one. What has no CUDA tensor among its inputs is computed
as usual, so code runs as it would with a GPU: a training step of Stable Diffusion 1.5 in a second. The
backward pass alone does not run without a driver; what it would keep is counted.
"""

import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.cuda.amp.common as amp
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

aten = torch.ops.aten
CUDA = torch.device("cuda", 0)
BLOCK = 512  # bytes: the CUDA allocator rounds every tensor up to a multiple
PRODUCTS = {  # operations that want one dtype, which fakes do not check for matrices
    aten.mm.default, aten.addmm.default, aten.bmm.default, aten.baddbmm.default, aten.linear.default,
    aten.convolution.default,
}  # fmt: skip


class FakeGpu(TorchDispatchMode):
    """Runs what touches a CUDA tensor as a fake, all else for real; counts bytes, and waits for the GPU.

    What comes back from the GPU are zeros, or ones for a single number: code that waits goes on.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0  # bytes of the CUDA tensors that operations have made and that are alive
        self.largest = 0  # bytes of the largest of them since restart_peak
        self.waits: list[str] = []  # operations whose result the CPU asked for
        self._all_fake = False
        self._known: dict[int, weakref.ref] = {}  # id of a live storage -> reference to it

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        device = kwargs.get("device")
        to_gpu = device is not None and torch.device(device).type == "cuda"
        if not self._all_fake and not to_gpu and not has_fake(args, kwargs):
            with unset_fake_temporarily():
                return func(*args, **kwargs)
        if func is aten._local_scalar_dense.default:
            self.waits.append("item")
            dtype = args[0].dtype
            return True if dtype == torch.bool else 1.0 if dtype.is_floating_point else 1
        to_cpu = func is aten._to_copy.default and device is not None and not to_gpu and on_gpu(args[0])
        if to_cpu and not isinstance(args[0], nn.Parameter):  # weights stay fakes
            self.waits.append("cpu")
            with unset_fake_temporarily():
                return torch.zeros(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype)
        if func in PRODUCTS:
            check_alike(func, [value for value in args if isinstance(value, torch.Tensor)])
        if (
            func is aten.index.Tensor
            and not on_gpu(args[0])
            and any(on_gpu(i) for i in args[1] if i is not None)
        ):
            raise RuntimeError(f"{func}: a tensor on the CPU is indexed by one on another device")
        result = func(*args, **kwargs)
        self._count(result)
        return result

    def _count(self, result: Any) -> None:
        for tensor in tree_iter(result):
            if isinstance(tensor, FakeTensor) and on_gpu(tensor):
                self.add(tensor)

    def add(self, tensor: torch.Tensor) -> None:
        """Count a tensor until it is freed; views of one storage count once."""
        storage = tensor.untyped_storage()
        if id(storage) in self._known:
            return
        key, size = id(storage), -(-storage.nbytes() // BLOCK) * BLOCK

        def on_freed(_: Any) -> None:
            self.now -= size
            del self._known[key]

        self._known[key] = weakref.ref(storage, on_freed)
        self.now += size
        self.peak, self.largest = max(self.peak, self.now), max(self.largest, size)

    def restart_peak(self) -> None:
        """Restart the count of the peak, as torch.cuda.reset_peak_memory_stats does."""
        self.peak, self.largest = self.now, 0

    @contextmanager
    def all_fake(self) -> Iterator[None]:
        """Make fakes on the CPU too in this block: networks whose weights take no memory."""
        self._all_fake = True
        try:
            yield
        finally:
            self._all_fake = False


def has_fake(args: Any, kwargs: Any) -> bool:
    """Tell whether a fake is among the arguments of an operation; mostly it is one of the first."""
    return any(isinstance(value, FakeTensor) for value in args) or any(
        isinstance(value, FakeTensor) for value in tree_iter((args, kwargs))
    )


def check_alike(func: Any, tensors: list[torch.Tensor]) -> None:
    """Raise a RuntimeError, as a GPU does, for a product of tensors of several devices or dtypes."""
    for what in ("device", "dtype"):
        found = {str(getattr(tensor, what)) for tensor in tensors}
        if len(found) > 1:
            raise RuntimeError(f"{func} of different {what}s: {', '.join(sorted(found))}")


def on_gpu(tensor: torch.Tensor) -> bool:
    """Tell whether a tensor is one of the GPU's."""
    return tensor.device.type == "cuda"


@contextmanager
def fake_gpu() -> Iterator[FakeGpu]:
    """Let `tensor.to("cuda")` and autocast work in this block, without a GPU.

    Flash attention is chosen as on a GPU since 2020 in 16 bits, the memory-efficient kernel otherwise.
    """
    with ExitStack() as stack:
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        gpu = stack.enter_context(FakeGpu())
        stack.enter_context(replaced(amp, "amp_definitely_not_available", lambda: False))
        stack.enter_context(replaced(torch.cuda, "is_bf16_supported", lambda *_, **__: True))
        stack.enter_context(replaced(torch.cuda, "get_device_name", lambda *_: "a GPU that is not there"))
        stack.enter_context(replaced(torch.cuda, "synchronize", lambda *_: gpu.waits.append("synchronize")))
        stack.enter_context(replaced(nn.functional, "scaled_dot_product_attention", attention))
        stack.enter_context(replaced(nn.Module, "_apply", replace_tensors))
        yield gpu


@contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Give an attribute of a module or class another value in this block."""
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


def replace_tensors(
    module: nn.Module, fn: Callable[[torch.Tensor], torch.Tensor], _: bool = True
) -> nn.Module:
    """Stand in for Module._apply, what moves a module: its parameters become new ones.

    torch itself would swap the contents of two fakes, which it refuses as long as anything refers weakly to
    one of them, and fakes always do. bitsandbytes' classes of parameters cannot hold fakes: plain ones with
    the same attributes, the scales among them, take their place.
    """
    for child in module.children():
        child._apply(fn)
    for name, parameter in module._parameters.items():
        if parameter is not None:
            with torch.no_grad():
                moved: Any = nn.Parameter(fn(parameter.data), parameter.requires_grad)
            vars(moved).update(
                {key: value for key, value in vars(parameter).items() if key not in vars(moved)}
            )
            if getattr(moved, "quant_state", None) is not None:
                moved.quant_state.to(moved.device)
            module._parameters[name] = moved
    for name, buffer in module._buffers.items():
        if buffer is not None:
            module._buffers[name] = fn(buffer)
    return module


def attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0, is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False,
) -> torch.Tensor:  # fmt: skip
    """Stand in for scaled_dot_product_attention, which picks its kernel by the properties of a real GPU."""
    if not on_gpu(query):
        return aten.scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    if torch.is_autocast_enabled("cuda"):
        dtype = torch.get_autocast_dtype("cuda")
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    if not query.dtype == key.dtype == value.dtype:
        raise RuntimeError(f"attention of {query.dtype}, {key.dtype} and {value.dtype}")
    if attn_mask is None and query.dtype != torch.float32:
        flash = aten._scaled_dot_product_flash_attention
        return flash(query, key, value, dropout_p, is_causal, scale=scale)[0]
    mask = None if attn_mask is None else attn_mask.to(query.dtype) if attn_mask.is_floating_point() else (
        torch.zeros_like(attn_mask, dtype=query.dtype)
    )  # fmt: skip
    efficient = aten._scaled_dot_product_efficient_attention
    return efficient(query, key, value, mask, True, dropout_p, is_causal, scale=scale)[0]


def kept_for_backward(forward: Callable[[], Any]) -> tuple[Any, list[torch.Tensor]]:
    """Run a forward pass; return its result and the tensors that its backward pass would keep."""
    kept: list[torch.Tensor] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        result = forward()
    return result, kept


def storage_bytes(tensors: Iterable[torch.Tensor]) -> int:
    """Return the bytes of tensors, those of one storage once."""
    storages = {id(tensor.untyped_storage()): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())
