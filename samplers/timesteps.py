"""The timesteps of a run, one for each evaluation, and which of them a caller is at."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Timesteps:
    """`tensor` float32 (N,), which pipelines iterate over, perhaps on a device; `values`: the same numbers on the host."""

    tensor: Tensor
    values: tuple[float, ...]
    version: int
    """Of the tensor as it was made: torch counts what is written into it."""

    @staticmethod
    def on(device: str | torch.device | None, values: Tensor) -> "Timesteps":
        """Of float32 values (N,) on the host."""
        with torch.inference_mode(False):  # tensors of inference mode have no version
            tensor = values.to(device, copy=True)
        return Timesteps(tensor, tuple(values.tolist()), tensor._version)

    def __reduce__(self) -> tuple[object, ...]:
        """A copy has its own version."""
        return _restored, (self.tensor, self.values, self.is_changed)

    @property
    def is_changed(self) -> bool:
        """Whether somebody wrote into `tensor`."""
        return self.tensor._version != self.version

    def find(self, timestep: Tensor | float) -> tuple[int, ...]:
        """The indices that this timestep can stand for, several where stages share a time.

        An entry of `tensor` is recognised by its place in memory, so that nothing waits for the device. Any other tensor is read,
        as are entries after somebody wrote into `tensor`, and compared as finely as its dtype resolves: in half precision it
        stands for every entry that is rounded to it.
        ValueError for a timestep that is not in the list, and for more than one.
        """
        own = self._own(timestep)
        if own is not None:
            return (own,)
        value, dtype = _read(timestep)
        rounded = torch.tensor(self.values).to(dtype).tolist()
        if value in rounded:
            return tuple(i for i, listed in enumerate(rounded) if listed == value)
        resolution, nearest = torch.finfo(dtype).eps, min(self.values, key=lambda listed: abs(listed - value))
        if not abs(nearest - value) <= resolution * abs(nearest):
            raise ValueError(
                f"timestep {value:g} is not one of the {len(self.values)} of this run; the nearest is {nearest:g}, entry "
                f"{self.values.index(nearest)}: pass entries of timesteps, and call set_timesteps(n) before every run"
            )
        return tuple(i for i, listed in enumerate(self.values) if listed == nearest)

    def _own(self, timestep: Tensor | float) -> int | None:
        """The index of a view of one entry of `tensor`, also one that is expanded to a batch; None of anything else."""
        whole = self.tensor
        if not isinstance(timestep, Tensor) or timestep.dtype != whole.dtype or timestep.device != whole.device:
            return None
        if self.is_changed:
            return None
        one = all(size == 1 or stride == 0 for size, stride in zip(timestep.shape, timestep.stride(), strict=True))
        if not one or timestep.untyped_storage().data_ptr() != whole.untyped_storage().data_ptr():
            return None
        index = int(timestep.storage_offset() - whole.storage_offset())
        return index if 0 <= index < len(self.values) else None


def _restored(tensor: Tensor, values: tuple[float, ...], is_changed: bool) -> Timesteps:
    return Timesteps(tensor, values, tensor._version - is_changed)


def _read(timestep: Tensor | float) -> tuple[float, torch.dtype]:
    """The number, and its dtype if that is coarser than float32, else float32."""
    given = torch.as_tensor(timestep)
    first = given.flatten()[:1]
    if given.numel() == 0 or not bool((given == first).all()):
        raise ValueError(f"a step is of one timestep for the whole batch, got {given.tolist()}")
    coarse = given.is_floating_point() and torch.finfo(given.dtype).bits < 32
    return float(first.item()), given.dtype if coarse else torch.float32
