"""Weights are read strictly: from safetensors alone, and exactly the tensors of the network, all of them finite.

A missing tensor would leave random numbers in the network, a surplus one belongs to another network, integers where floats belong
and NaN measure nothing, and a pickle can run any code.
"""

import hashlib
import json
import urllib.request
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.error import URLError

import huggingface_hub
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.modules.module import (
    register_module_buffer_registration_hook,
    register_module_parameter_registration_hook,
)

HALVES = (torch.float16, torch.bfloat16)
"""Types that published weights may have instead of float32, which holds all their numbers."""
CONFIG = "config.json"
FILE = "diffusion_pytorch_model.safetensors"
INDEX = f"{FILE}.index.json"
"""Names that `save_pretrained` of diffusers gives to the weights, and to the list of parts of large ones."""
HUB = ("revision", "token", "cache_dir", "local_files_only", "force_download")
"""Options of huggingface_hub."""
CONFIG_LIMIT = 64 << 20
"""Bytes of a configuration or an index of weights; the largest have some MB."""
WEIGHTS_LIMIT = 256 << 30
"""Bytes of one file of weights: 64 billion numbers in float32."""
DOWNLOAD_LIMIT = 16 << 30
"""Bytes of a download, which could fill the disk otherwise; the largest that is fetched, VGG-16, has 528 MB."""
CHUNK = 1 << 20
SLACK = 4
"""Factor between the parameters of a file and those at which a network is given up while it is built."""


def readable(path: Path, limit: int) -> Path:
    """`path`, if it is a regular file of at most `limit` bytes; OSError: pipes and devices never end."""
    size = path.stat().st_size
    if not path.is_file():
        raise OSError(f"{path} is not a regular file")
    if size > limit:
        raise OSError(f"{path} has {size:,} bytes, more than the limit of {limit:,}")
    return path


def receive(url: str, path: Path, limit: int = DOWNLOAD_LIMIT, algorithm: str = "sha256") -> str:
    """Write what `url` sends to `path`; its hexadecimal digest. URLError, which is an OSError, for more bytes than `limit`."""
    digest, size = hashlib.new(algorithm, usedforsecurity=False), 0
    request = urllib.request.Request(url, headers={"User-Agent": "midway"})
    with urllib.request.urlopen(request, timeout=20) as response, open(path, "wb") as file:
        while chunk := response.read(CHUNK):
            size += len(chunk)
            if size > limit:
                raise URLError(f"it sends more than the limit of {limit:,} bytes")
            digest.update(chunk)
            file.write(chunk)
    return digest.hexdigest()


def local_folder(source: str | Path, subfolder: str | None = None, **hub: Any) -> Path:
    """The folder `source`, or a copy of that Hub id's configuration, weights and card; OSError, ValueError if there is none."""
    inner = subfolder or ""
    if Path(source).is_dir():
        return Path(source) / inner
    names = (CONFIG, FILE, INDEX, "diffusion_pytorch_model-*.safetensors", "README.md")
    wanted = [str(Path(inner) / name) for name in names]
    return Path(huggingface_hub.snapshot_download(str(source), allow_patterns=wanted, **hub)) / inner


def of_run(folder: Path, name: str) -> Path:
    """`folder`, or the folder `name` in it where that alone has a configuration: what a training left in its run."""
    inside = folder / name
    return inside if (inside / CONFIG).exists() and not (folder / CONFIG).exists() else folder


def read_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file; OSError if there is none, ValueError for anything else."""
    try:
        found = json.loads(readable(path, CONFIG_LIMIT).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON ({line(error)})") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} is no JSON object: it is {found!r:.100}")
    return found


def read_folder(folder: Path) -> dict[str, Tensor]:
    """All tensors that `save_pretrained` wrote into a folder, in one file or several, on the CPU.

    OSError, SafetensorError or ValueError for files that are missing, damaged, pickled, or not those of their index.
    """
    index = folder / INDEX
    if index.exists():
        return _read_parts(folder, _parts_of(index))
    if not (folder / FILE).exists():
        raise ValueError(
            f"{folder} has no {FILE}, and pickled weights (.bin, .ckpt, .pt), which can run any "
            "code, are not loaded: get the safetensors of this model, or where you trust the file convert it by diffusers' "
            "from_pretrained(..., use_safetensors=False).save_pretrained(...)"
        )
    return load_file(readable(folder / FILE, WEIGHTS_LIMIT))


def _parts_of(index: Path) -> dict[str, str]:
    """The file of each tensor by an index."""
    parts = read_object(index).get("weight_map")
    if not isinstance(parts, dict) or not all(isinstance(f, str) and f == Path(f).name for f in parts.values()):
        raise ValueError(f"{index} does not name a file for each tensor: get the whole folder again")
    return parts


def _read_parts(folder: Path, parts: Mapping[str, str]) -> dict[str, Tensor]:
    files = {file: load_file(readable(folder / file, WEIGHTS_LIMIT)) for file in sorted(set(parts.values()))}
    found = {(name, file) for file, tensors in files.items() for name in tensors}
    if found != set(parts.items()):
        some = _some({name for name, _ in found ^ set(parts.items())})
        raise ValueError(
            f"the files of {folder} do not hold what {INDEX} lists, see {some}: get the whole folder again"
        )
    return {name: tensor for tensors in files.values() for name, tensor in tensors.items()}


def check_tensors(
    found: Mapping[str, Tensor], expected: Mapping[str, Tensor], also: Iterable[torch.dtype] = ()
) -> None:
    """ValueError unless `found` has the names, shapes and types of `expected`, and finite numbers; it names what differs.

    also: types that tensors may have where floating-point numbers are expected.
    """
    accepted = tuple(also)
    faults = {
        "missing": expected.keys() - found.keys(),
        "not of this network": found.keys() - expected.keys(),
        "of another shape or type": {
            f"{name} {_kind(found[name])} instead of {_kind(expected[name])}"
            for name in expected.keys() & found.keys()
            if not _fits(found[name], expected[name], accepted)
        },
        "not finite": {name for name, tensor in found.items() if not is_finite(tensor)},
    }
    wrong = [f"{len(names)} {what} ({_some(names)})" for what, names in faults.items() if names]
    if wrong:
        raise ValueError(f"of the tensors {', '.join(wrong)}: get the whole file again, or make it again")


def check_published(found: Mapping[str, Tensor]) -> None:
    """ValueError unless all are finite floating-point numbers that float32 holds."""
    floats = {name: torch.empty_like(tensor, dtype=torch.float32, device="meta") for name, tensor in found.items()}
    check_tensors(found, floats, HALVES)


def load_weights(network: nn.Module, found: Mapping[str, Tensor], also: Iterable[torch.dtype] = ()) -> None:
    """Copy `found` into `network`; ValueError as `check_tensors`."""
    check_tensors(found, network.state_dict(), also)
    network.load_state_dict(found)


def is_finite(tensor: Tensor) -> bool:
    """Whether no number is NaN or infinite."""
    return not tensor.is_floating_point() or bool(torch.isfinite(tensor).all())


def _fits(found: Tensor, expected: Tensor, also: tuple[torch.dtype, ...]) -> bool:
    known = found.dtype == expected.dtype or (expected.is_floating_point() and found.dtype in also)
    return known and found.shape == expected.shape


def _kind(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"


def _some(names: Iterable[str]) -> str:
    first = sorted(names)
    return ", ".join(first[:3]) + (", ..." if len(first) > 3 else "")


@contextmanager
def building(description: Path, tensors: Mapping[str, Tensor]) -> Iterator[None]:
    """Within the block a network is built as a file describes it, whose weights will be `tensors`; no random numbers are used up.

    ValueError naming the file for any error. A network that outgrows `tensors` by far is given up early: one wrong number can
    stand for billions of layers.
    """
    limits = [SLACK * len(tensors) + 100, SLACK * sum(tensor.numel() for tensor in tensors.values()) + 2**24]

    def count(module: nn.Module, name: str, tensor: Tensor | None) -> None:
        limits[0] -= 1
        limits[1] -= 0 if tensor is None else tensor.numel()
        if min(limits) < 0:
            raise ValueError(f"the network that it describes is far larger than the weights, see {name}")

    hooks = (register_module_parameter_registration_hook, register_module_buffer_registration_hook)
    handles = [register(count) for register in hooks]  # pyright: ignore[reportArgumentType]
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    except Exception as error:  # whatever constructors do with numbers that they do not expect
        raise ValueError(
            f"{description} and the weights beside it do not fit ({line(error)}): get both again"
        ) from error
    finally:
        for handle in handles:
            handle.remove()


def line(error: Exception) -> str:
    """The error as one line of at most 200 characters."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:200]
