"""Counter-based random numbers: every draw is a function of named integers, never of a stream's position.

A training step calls `normal(seed, "noise", step, sample_ids, shape)` and gets, for each sample, values that depend on
(seed, purpose, step, that sample's id) alone: not on the batch it came in, the number of processes, accumulation or a restart.

Construction: SplitMix64 (Steele, Lea, Flood 2014, "Fast splittable pseudorandom number generators"): the words of one
sample are `mix(key + (j + 1) * golden)`, its `key` the mixed hash of the integers above. Integer arithmetic is exact on
every device. Normals are Box-Muller in float64, rounded to float32; masks compare the words as integers.
"""

import functools
import hashlib
import math
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_WORD = (1 << 64) - 1
_GOLDEN = -7046029254386353131  # 0x9E3779B97F4A7C15 as a signed 64-bit integer
_BELOW_1 = 1 - 2.0**-53  # 2^53 - 1/2 rounds up
_MIX_1 = -4658895280553007687  # 0xBF58476D1CE4E5B9
_MIX_2 = -7723592293110705685  # 0x94D049BB133111EB


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """Logical right shift of int64 (torch's own is arithmetic)."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _mix(x: Tensor) -> Tensor:
    """SplitMix64's finaliser, a bijection of 64-bit words."""
    x = (x ^ _shift_right(x, 30)) * _MIX_1
    x = (x ^ _shift_right(x, 27)) * _MIX_2
    return x ^ _shift_right(x, 31)


def _signed(value: int) -> int:
    value &= _WORD
    return value - (1 << 64) if value >> 63 else value


@functools.cache
def _purpose_key(purpose: str) -> int:
    return int.from_bytes(hashlib.sha256(purpose.encode()).digest()[:8], "little", signed=True)


def _mix_integer(x: int) -> int:
    """The same on an unsigned Python integer."""
    x = (x ^ x >> 30) * (_MIX_1 & _WORD) & _WORD
    x = (x ^ x >> 27) * (_MIX_2 & _WORD) & _WORD
    return x ^ x >> 31


def _mix_array(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The same on an array, in place."""
    for bits, factor in ((np.uint64(30), _MIX_1), (np.uint64(27), _MIX_2)):
        x ^= x >> bits
        x *= np.uint64(factor & _WORD)
    x ^= x >> np.uint64(31)
    return x


def _key(seed: int, purpose: str, step: int) -> int:
    """What all samples of a draw share, unsigned."""
    key = 0
    for part in (seed, _purpose_key(purpose), step):
        key = _mix_integer(key + part * _GOLDEN + _GOLDEN & _WORD)
    return key


def integer(seed: int, purpose: str, step: int) -> int:
    """A uniform integer in [0, 2^63)."""
    return _key(seed, purpose, step) >> 1


def words(seed: int, purpose: str, step: int, sample_ids: Tensor, count: int) -> Tensor:
    """int64 (B, count) of uniform 64-bit words for int64 `sample_ids` (B,)."""
    key = _key(seed, purpose, step)
    if _is_plain(sample_ids):
        return torch.from_numpy(_words_array(key, sample_ids, count).view(np.int64))
    return _words_tensor(key, sample_ids, count)


def _is_plain(tensor: Tensor) -> bool:
    """Whether numpy can read it."""
    return type(tensor) is Tensor and tensor.device.type == "cpu"


def _words_array(key: int | list[list[int]], sample_ids: Tensor, count: int) -> NDArray[np.uint64]:
    """On the CPU: small arrays cost numpy a fraction of what they cost torch. Several keys (P, 1) give (P, B, count)."""
    golden = np.uint64(_GOLDEN & _WORD)
    own = _mix_array(sample_ids.numpy().view(np.uint64) * golden + np.asarray(key, np.uint64))
    return _mix_array(own[..., None] + np.arange(1, count + 1, dtype=np.uint64) * golden)


def _words_tensor(key: int, sample_ids: Tensor, count: int) -> Tensor:
    """On any device."""
    own = _mix(_signed(key) + sample_ids * _GOLDEN)
    counter = torch.arange(1, count + 1, dtype=torch.int64, device=sample_ids.device) * _GOLDEN
    return _mix(own[:, None] + counter[None, :])


def _unit_array(bits: NDArray[np.uint64]) -> NDArray[np.float64]:
    """float64 in the open interval (0, 1): the upper 53 bits, centred in their cell."""
    values = (bits >> np.uint64(11)).astype(np.float64)
    values += 0.5
    values *= 2.0**-53
    return np.minimum(values, _BELOW_1, out=values)


def _unit_tensor(bits: Tensor) -> Tensor:
    """The same of signed words."""
    return ((_shift_right(bits, 11).double() + 0.5) * 2.0**-53).clamp(max=_BELOW_1)


def _unit(seed: int, purpose: str, step: int, sample_ids: Tensor, count: int) -> Tensor:
    """float64 (B, count) in the open interval (0, 1)."""
    key = _key(seed, purpose, step)
    if _is_plain(sample_ids):
        return torch.from_numpy(_unit_array(_words_array(key, sample_ids, count)))
    return _unit_tensor(_words_tensor(key, sample_ids, count))


def uniform(seed: int, purpose: str, step: int, sample_ids: Tensor, shape: Sequence[int] = ()) -> Tensor:
    """float64 (B, *shape), uniform on (0, 1)."""
    return _unit(seed, purpose, step, sample_ids, math.prod(shape)).view(len(sample_ids), *shape)


def uniform_at(seed: int, purpose: str, step: int, sample_ids: Tensor, places: Tensor) -> Tensor:
    """float64 (B, n): of what `uniform` gives for each sample in a row, the numbers at places int64 (B, n), on their device."""
    own = _mix(_signed(_key(seed, purpose, step)) + sample_ids.to(places.device) * _GOLDEN)
    return _unit_tensor(_mix(own[:, None] + (places + 1) * _GOLDEN))


def uniforms(seed: int, purposes: Sequence[str], step: int, sample_ids: Tensor) -> list[Tensor]:
    """What `uniform` gives for each purpose, float64 (B,); on a CPU for little more than the price of one."""
    if not _is_plain(sample_ids):
        return [uniform(seed, purpose, step, sample_ids) for purpose in purposes]
    keys = [[_key(seed, purpose, step)] for purpose in purposes]
    return list(torch.from_numpy(_unit_array(_words_array(keys, sample_ids, 1)[..., 0])))


def normal(seed: int, purpose: str, step: int, sample_ids: Tensor, shape: Sequence[int] = ()) -> Tensor:
    """float32 (B, *shape), standard normal (Box-Muller on pairs of words)."""
    count = math.prod(shape)
    half = (count + 1) // 2
    u = _unit(seed, purpose, step, sample_ids, 2 * half)
    radius = (-2.0 * u[:, :half].log()).sqrt()
    angle = 2.0 * math.pi * u[:, half:]
    pair = torch.cat([radius * angle.cos(), radius * angle.sin()], dim=1)
    return pair[:, :count].float().view(len(sample_ids), *shape)


def keep(seed: int, purpose: str, step: int, sample_ids: Tensor, shape: Sequence[int], probability: float) -> Tensor:
    """bool (B, *shape), each True with `probability` in (0, 1], exact to 2^-64. ValueError for another probability."""
    if not 0 < probability <= 1:
        raise ValueError(f"probability is {probability}; give a number in (0, 1]")
    return _mask(seed, purpose, step, sample_ids, list(shape), probability)


# An operator of its own, since networks draw masks: torch.compile cannot trace the 64-bit keys, and would for every step.
@torch.library.custom_op("midway::mask", mutates_args=())
def _mask(seed: int, purpose: str, step: int, sample_ids: Tensor, shape: Sequence[int], probability: float) -> Tensor:
    largest = math.ceil(probability * 2**64) - 1 - 2**63  # of the signed words that are kept
    return (words(seed, purpose, step, sample_ids, math.prod(shape)) <= largest).view(len(sample_ids), *shape)


@_mask.register_fake
def _mask_like(
    seed: int, purpose: str, step: int, sample_ids: Tensor, shape: Sequence[int], probability: float
) -> Tensor:
    return sample_ids.new_empty((len(sample_ids), *shape), dtype=torch.bool)


def permutation(seed: int, purpose: str, epoch: int, size: int) -> Tensor:
    """int64 (size,): the order of epoch `epoch`, by sorting one random word per item (ties are broken by index)."""
    keys = words(seed, purpose, epoch, torch.arange(size), 1)[:, 0]
    return torch.argsort(keys, stable=True)
