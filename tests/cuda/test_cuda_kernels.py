"""The Triton kernels and the matrix root on a GPU, beside torch. No fixture of conftest.py is used."""

import pytest
import torch
from devices import every_device, on_cuda
from tensors import normal

from midway.gen.metrics.frechet import frechet_distance
from midway.gen.metrics.moments import FeatureStatistics
from midway.samplers import fused
from midway.tokenizers import nearest_kernel
from midway.tokenizers.clustering import nearest_code


@on_cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("count", [3, 16, 17, 40])
def test_the_row_sum_is_the_float64_one_rounded(count: int, dtype: torch.dtype, device: str) -> None:
    terms = [normal(3, 701, seed=i).to(device, dtype) for i in range(count)]
    weights = normal(count, seed=99).tolist()
    assert fused._kernel_works(torch.device(device)), "the library would use torch in its place"
    got = fused.fused(weights, terms)
    exact = sum(w * x.double() for w, x in zip(weights, terms, strict=True))
    assert isinstance(exact, torch.Tensor)
    scale = sum(abs(w) * x.double().abs() for w, x in zip(weights, terms, strict=True))
    # one rounding for every 16 terms, and those of the sum in float32
    bound = (1 + (count - 1) // 16) * torch.finfo(dtype).eps * scale + count * 2.0**-23 * scale
    assert got.dtype == dtype
    assert ((got.double() - exact).abs() <= bound).all()


@on_cuda
@pytest.mark.parametrize(("count", "size", "dim"), [(1, 1, 1), (1000, 333, 3), (70000, 64, 8), (5000, 5000, 100)])
def test_the_kernel_agrees_with_torch(count: int, size: int, dim: int, device: str) -> None:
    rows, codes = normal(count, dim).to(device), normal(size, dim, seed=1).to(device)
    assert nearest_kernel.works(torch.device(device), dim)
    bias = codes.square().sum(1) / -2
    scores = rows.double() @ codes.double().T + bias
    chosen = scores.gather(1, nearest_kernel.highest_score(rows, codes, bias)[:, None])[:, 0]
    torch.testing.assert_close(chosen, scores.amax(1), atol=1e-4, rtol=1e-5)


@every_device
def test_the_nearest_code_is_the_lowest_of_ties_on_every_device(device: str) -> None:
    """Small integers have exact scores, and a book that holds every code three times has ties in all of them."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(-3, 4, (40000, 4), generator=generator).float()
    codes = torch.randint(-3, 4, (75, 4), generator=generator).float().repeat(3, 1) - 1
    codes = torch.cat([codes, -codes.sum(0, keepdim=True)])  # their mean is 0, so that nothing is rounded
    expected = torch.cat([torch.cdist(part.double(), codes.double()).argmin(1) for part in rows.split(4000)])
    assert torch.equal(nearest_code(rows.to(device), codes.to(device)).cpu(), expected)


@every_device
@pytest.mark.parametrize("root", ["eigen", "newton-schulz"])
def test_the_distance_is_that_of_the_cpu(root: str, device: str) -> None:
    scales = torch.arange(1, 65, dtype=torch.float64) ** -0.5
    a, b = (FeatureStatistics.of(normal(400, 64, seed=s, dtype=torch.float64) * scales + 0.1 * s) for s in (1, 2))
    assert frechet_distance(a, b, root, device) == pytest.approx(frechet_distance(a, b), rel=1e-9)  # pyright: ignore
