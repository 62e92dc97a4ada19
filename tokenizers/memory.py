"""How much memory a computation takes, without doing it, and how many images a tokenizer can take at once.

A computation on "meta" tensors has all shapes and types of the real one and no numbers; at every operation the bytes of all
tensors that are still referred to are added up. What a kernel needs besides (workspaces, copies in another layout) is not among
them, and is left to the margin of `images_at_once`.
"""

import copy
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar, cast
from weakref import WeakKeyDictionary

import psutil
import torch
from torch import Tensor, nn
from torch.autograd.graph import _engine_run_backward
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

Module = TypeVar("Module", bound=nn.Module)

MOST = 512
"""Images of a batch at most: more are not faster, and small ones must not depend on the memory of a machine."""
SHARE, BATCH_BYTES = 0.25, 4 << 30
"""Of the memory of a machine, and bytes, that a batch may take. What is free at the moment does not enter: other batches round
differently in the last digits, so they must be the same when a command is repeated, and for any number of processes."""
_SAMPLES = 16, 32
_CGROUPS = Path("/sys/fs/cgroup")


# ---- bytes of a computation ----


class _Live(TorchDispatchMode):
    """Counts the bytes of tensors that are made inside it and still referred to."""

    def __init__(self) -> None:
        super().__init__()
        self.live: dict[StorageWeakRef, int] = {}
        self.peak = 0

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        for made in tree_leaves(out):
            if isinstance(made, Tensor):
                storage = made.untyped_storage()
                self.live.setdefault(StorageWeakRef(storage), storage.nbytes())
        self.live = {reference: size for reference, size in self.live.items() if not reference.expired()}
        self.peak = max(self.peak, sum(self.live.values()))
        return out


_MATRIX = (
    F.linear,
    F.conv2d,
    F.conv_transpose2d,
    torch.matmul,
    torch.bmm,
    torch.addmm,
    Tensor.matmul,
    Tensor.__matmul__,
)
_WIDE = (F.layer_norm, F.group_norm, F.softmax, torch.softmax)


class _AsOnDevice(TorchFunctionMode):
    """Meta tensors take the kernels that others take: attention that keeps no scores and, with `half`, autocast to bfloat16.

    torch has no autocast for meta tensors. These are the functions of its CUDA lists that networks here use.
    """

    def __init__(self, half: bool) -> None:
        super().__init__()
        self.half = half

    def __torch_function__(
        self, func: Callable[..., Any], types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is Tensor.backward:  # within a function the mode is off, and in this one blocks may be computed again
            loss, options = args[0], {"allow_unreachable": True, "accumulate_grad": True}
            with self:
                return _engine_run_backward((loss,), (torch.ones_like(loss),), False, False, (), **options)
        attention = func is F.scaled_dot_product_attention
        if self.half and (attention or func in _MATRIX):
            args, kwargs = tree_map(_to(torch.float32, torch.bfloat16), (args, kwargs))
        elif self.half and func in _WIDE:
            args, kwargs = tree_map(_to(torch.bfloat16, torch.float32), (args, kwargs))
        if attention and args[0].is_meta and len(args) == 3 and not kwargs.keys() - {"scale"}:
            return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*args, **kwargs)[0]
        return func(*args, **kwargs)


def _to(before: torch.dtype, after: torch.dtype) -> Callable[[Any], Any]:
    return lambda x: x.to(after) if isinstance(x, Tensor) and x.dtype == before else x


def peak_bytes(compute: Callable[[], object], half: bool = False) -> int:
    """The most bytes that tensors made within `compute()` hold at one time; real tensors and meta tensors count alike.

    half: of meta tensors, as under autocast to bfloat16.
    """
    with _AsOnDevice(half), _Live() as live:
        compute()
    return live.peak


def without_numbers(module: Module) -> Module:
    """A copy of a module on the device "meta": its shapes and types, in no memory."""
    memo: dict[int, Any] = {}
    for tensor in [*module.parameters(), *module.buffers()]:
        empty = torch.empty_like(tensor, device="meta")
        memo[id(tensor)] = nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty
    copied = copy.deepcopy(module, memo)
    return cast(
        Module, nn.Module._apply(copied, lambda tensor: tensor.to("meta"))
    )  # what is neither, the tensors of a Perceptual


@dataclass(frozen=True)
class Need:
    """Bytes that a micro-batch takes for its activations, from the loss to the last gradient: `base + each n` for n samples."""

    base: int
    each: int

    def of(self, samples: int) -> int:
        """Bytes of a micro-batch."""
        return self.base + self.each * samples

    def fits(self, memory: int) -> int:
        """Samples whose activations fit into `memory` bytes, 0 if not even one does."""
        return max(0, (memory - self.base) // self.each)


def training_bytes(module: Module, loss: Callable[[Module, int], Tensor], samples: int, half: bool = False) -> int:
    """What a micro-batch takes beside weights, gradients and what the optimizer keeps, without computing it.

    `loss(copy, n)` is the loss of n samples on the device "meta", for a `copy` of the module there; `half` as in `peak_bytes`.
    """
    copied = without_numbers(module).eval()  # in training mode some collect statistics on the host
    for parameter in copied.parameters():
        parameter.grad = torch.empty_like(parameter) if parameter.requires_grad else None
    return peak_bytes(lambda: loss(copied, samples).backward(), half)


def training_need(module: Module, loss: Callable[[Module, int], Tensor], half: bool = False) -> Need:
    """`training_bytes` as a line through two numbers of samples; few samples may take more, by the gradient of a layer."""
    low, high = (training_bytes(module, loss, samples, half) for samples in _SAMPLES)
    each = -(-(high - low) // (_SAMPLES[1] - _SAMPLES[0]))
    return Need(low - _SAMPLES[0] * each, each)


# ---- bytes of a machine ----


def memory_of(device: torch.device) -> tuple[int, int]:
    """(all, free) bytes of a device; of a CPU the share of this process, if a launcher started several on this machine.

    The limit of a control group, as schedulers set it, counts as the memory of the machine.
    """
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return total, free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    processes = max(1, int(os.environ.get("LOCAL_WORLD_SIZE") or 1))
    total, free = _machine()
    return total // processes, free // processes


def all_memory(device: torch.device) -> int:
    """Bytes of a device; of a CPU those of all processes together."""
    return torch.cuda.mem_get_info(device)[1] if device.type == "cuda" else _machine()[0]


def _machine() -> tuple[int, int]:
    memory = psutil.virtual_memory()
    return _within(memory.total, memory.available, _limits())


def _within(total: int, free: int, limits: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """Memory of a machine, cut to (limit, use) of every control group around this process."""
    for limit, used in limits:
        total, free = min(total, limit), min(free, max(0, limit - used))
    return total, free


def _limits(root: Path = _CGROUPS, own: Path = Path("/proc/self/cgroup")) -> list[tuple[int, int]]:
    """(limit, use) in bytes of the control groups (version 2) of this process that have a limit; pages of files are no use."""
    try:
        inside = own.read_text().strip().rpartition("\n")[2].rpartition(":")[2].lstrip("/")
    except OSError:
        return []
    found = []
    for folder in (root / inside, *(root / inside).parents):
        if not folder.is_relative_to(root):
            break
        try:
            stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
            used = int((folder / "memory.current").read_text()) - int(stat["inactive_file"])
            found.append((int((folder / "memory.max").read_text()), used))
        except (OSError, ValueError, KeyError):  # "max" is no limit
            continue
    return found


# ---- images at once ----

_known: WeakKeyDictionary[object, dict[object, int]] = WeakKeyDictionary()


class Tokenizer(Protocol):
    """What is needed of an ImageTokenizer here."""

    image_shape: tuple[int, int, int]
    tiles: tuple[int, int] | None

    @property
    def latent_shape(self) -> tuple[int, int, int]: ...
    @property
    def dtype(self) -> torch.dtype: ...
    @property
    def device(self) -> torch.device: ...
    def encode(self, images: Tensor) -> Tensor: ...
    def decode(self, codes: Tensor) -> Tensor: ...


def image_bytes(tokenizer: Tokenizer) -> int:
    """Bytes that one image takes at most while it is encoded or decoded without gradients, in tiles if it is tiled.

    Four copies of the image in float32 are added: it is converted on the way in and on the way out.
    """
    found = _known.setdefault(tokenizer, {})
    key = tokenizer.tiles, tokenizer.dtype
    if key not in found:
        network = cast(Tokenizer, without_numbers(cast(nn.Module, tokenizer)).eval())
        images = torch.empty(2, *tokenizer.image_shape, device="meta")  # GroupNorm takes no single number
        codes = torch.empty(2, *tokenizer.latent_shape, device="meta")
        with torch.no_grad():
            both = peak_bytes(lambda: network.encode(images)), peak_bytes(lambda: network.decode(codes))
        found[key] = -(-max(both) // 2) + 2 * images.nbytes
    return found[key]


def images_at_once(tokenizer: Tokenizer) -> int:
    """How many images to encode or to decode at once: a power of two, 1 to 512, by memory (`batch_within`).

    Images come out the same whatever the batch, up to the rounding of the network: on a CPU, convolutions of other batches round
    differently in the last digits. The number is a function of the network and, below 16 GiB, of the machine.
    """
    return batch_within(image_bytes(tokenizer), all_memory(tokenizer.device))


def batch_within(each: int, total: int) -> int:
    """The largest power of two, 1 to 512, of items of `each` bytes in a quarter of all memory, and in `BATCH_BYTES`."""
    fits = min(int(SHARE * total), BATCH_BYTES) // max(each, 1)
    return 1 << (min(max(fits, 1), MOST).bit_length() - 1)
