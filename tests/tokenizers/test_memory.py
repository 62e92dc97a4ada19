"""Bytes of a computation counted without doing it, and the batch that follows from them."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from midway.gen.data.images import to_float
from midway.tokenizers import memory
from midway.tokenizers.memory import all_memory, batch_within, image_bytes, memory_of, peak_bytes, without_numbers
from midway.tokenizers.tiling import tile_networks
from midway.tokenizers.tokenizer import ImageTokenizer

CPU = torch.device("cpu")
KB = 1024


# ---- bytes of a computation ----


def test_what_is_referred_to_is_counted_and_what_is_not_is_not() -> None:
    """Of a chain of three maps two exist at a time; of three that are kept, three."""
    x = torch.zeros(KB // 4)  # 1 kB, made outside

    def chain() -> None:
        x.add(1).add(1).add(1)

    def kept() -> list[Tensor]:
        return [x.add(i) for i in range(3)]

    assert peak_bytes(chain) == 2 * KB
    assert peak_bytes(kept) == 3 * KB


def test_a_view_takes_no_memory() -> None:
    x = torch.zeros(KB // 4)
    made = x.add(1)
    assert peak_bytes(lambda: [made.view(2, -1), made[:3], made.expand(5, -1)]) <= KB  # its storage once


def test_gradients_hold_the_activations_that_the_backward_pass_needs() -> None:
    """y = x sigmoid x, ten times: without gradients two maps exist at once, with them all ten."""
    x = torch.zeros(KB // 4)

    def forward() -> Tensor:
        y = x
        for _ in range(10):
            y = F.silu(y)
        return y

    assert peak_bytes(forward) == 2 * KB
    assert peak_bytes(lambda: forward_with(forward, x)) == 10 * KB


def forward_with(forward: Callable[[], Tensor], x: Tensor) -> Tensor:
    x.requires_grad_()
    out = forward()
    x.requires_grad_(False)
    return out


@pytest.mark.parametrize("network", ["conv", "vit"])
def test_without_numbers_the_count_is_that_of_the_real_computation(network: str) -> None:
    options = {"conv": {"multipliers": [1, 2], "attention": True}, "vit": {"network": "vit", "depth": 2, "heads": 2}}
    tokenizer = ImageTokenizer(3, 16, 16, 4, 1, **options[network]).eval()  # pyright: ignore[reportArgumentType]
    hollow = without_numbers(tokenizer)
    assert {p.device.type for p in hollow.parameters()} == {"meta"}
    assert {p.device.type for p in tokenizer.parameters()} == {"cpu"}
    images, codes = torch.zeros(3, 3, 16, 16), torch.zeros(3, *tokenizer.latent_shape)
    empty_images, empty_codes = images.to("meta"), codes.to("meta")
    with torch.no_grad():
        assert peak_bytes(lambda: tokenizer.encode(images)) == peak_bytes(lambda: hollow.encode(empty_images)) > 0
        assert peak_bytes(lambda: tokenizer.decode(codes)) == peak_bytes(lambda: hollow.decode(empty_codes)) > 0


def test_shared_parameters_stay_shared_without_numbers() -> None:
    layer = nn.Linear(3, 3)
    hollow = without_numbers(nn.Sequential(layer, nn.ReLU(), layer))
    assert hollow[0].weight is hollow[2].weight


# ---- images at once ----


def decoder_of(side: int, width: int = 16) -> ImageTokenizer:
    return ImageTokenizer(3, side, width, 4, 1).eval()


def test_bytes_of_an_image_grow_with_its_pixels_and_not_in_tiles() -> None:
    small, large = image_bytes(decoder_of(64)), image_bytes(decoder_of(256))
    assert 15.5 < large / small < 16.5
    tiled = decoder_of(256)
    tile_networks(tiled, 64, 8)
    whole_maps = 256 * 256 * 3 * 4 * 4  # the copies of the image
    assert image_bytes(tiled) - whole_maps < (large - whole_maps) / 4


def test_tiles_are_counted_after_they_are_asked_for() -> None:
    tokenizer = decoder_of(256)
    before = image_bytes(tokenizer)
    tile_networks(tokenizer, 64, 8)
    assert image_bytes(tokenizer) < before


def test_the_batch_is_the_largest_power_of_two_that_fits() -> None:
    assert batch_within(KB, 400 * KB) == 64  # a quarter is 100
    assert batch_within(KB, 10**15) == 512
    assert batch_within(1 << 30, 10**15) == 4  # on no machine more than 4 GiB
    assert batch_within(KB, 100) == 1
    assert batch_within(0, 10**9) == 512
    for fits in range(1, 1200):
        batch = batch_within(3, 12 * fits)
        assert batch & (batch - 1) == 0
        assert batch <= min(fits, 512) < 2 * batch or batch == 512


def test_a_large_image_gets_a_small_batch_and_the_images_stay_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    from midway.gen.tokenizer.objective import reconstruct

    tokenizer = decoder_of(32)
    with torch.no_grad():
        for parameter in tokenizer.parameters():
            parameter.add_(0.02)
    images = torch.arange(20 * 3 * 32 * 32).remainder(251).byte().view(20, 3, 32, 32)
    each, sizes = image_bytes(tokenizer), list[int]()
    forward = tokenizer.encoder.forward
    monkeypatch.setattr(tokenizer.encoder, "forward", lambda x: sizes.append(len(x)) or forward(x))
    monkeypatch.setattr(memory, "all_memory", lambda device: 10**12)
    whole = reconstruct(tokenizer, images)
    monkeypatch.setattr(memory, "all_memory", lambda device: 9 * 4 * each)
    parts = reconstruct(tokenizer, images)
    assert sizes[-4:] == [20, 8, 8, 4]
    assert (whole.int() - parts.int()).abs().max() <= 1
    assert to_float(whole).std() > 0.1


# ---- bytes of a machine ----


def test_processes_of_one_machine_share_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    total, free = memory_of(CPU)
    assert 0 < free <= total
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert memory_of(CPU)[0] == total // 4
    assert all_memory(CPU) == total, "the batch of a tokenizer is the same for any number of processes"


def test_the_limit_of_a_control_group_is_the_memory_of_the_machine(tmp_path: Path) -> None:
    """Of the group of a job and all groups around it the tightest counts; pages of files that were read are free."""
    root, job = tmp_path / "groups", tmp_path / "groups" / "slurm" / "job_7"
    job.mkdir(parents=True)
    for folder, limit, used in ((root, "max", 900), (job.parent, "5000", 800), (job, "1000", 700)):
        (folder / "memory.max").write_text(f"{limit}\n")
        (folder / "memory.current").write_text(f"{used}\n")
        (folder / "memory.stat").write_text("anon 100\ninactive_file 500\n")
    (tmp_path / "own").write_text("0::/slurm/job_7\n")
    found = memory._limits(root, tmp_path / "own")
    assert found == [(1000, 200), (5000, 300)]
    assert memory._within(10**6, 10**5, found) == (1000, 800)
    assert memory._within(10**6, 10**5, [(1000, 1200)]) == (1000, 0)
    assert memory._limits(root, tmp_path / "absent") == []
