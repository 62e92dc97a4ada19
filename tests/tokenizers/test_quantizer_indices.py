"""Contracts of the indices of all quantizers: those of z are those of forward, those of codes are exact or an error."""

import math

import pytest
import torch
from quantizer_cases import DISCRETE, LEARNING, SUMS, VQ, every_index, inputs, started
from tensors import normal
from torch import Tensor

from midway.tokenizers import codebook
from midway.tokenizers.base import Quantizer
from midway.tokenizers.clustering import nearest_code
from midway.tokenizers.quantizers import make_quantizer

pytestmark = pytest.mark.usefixtures("one_thread")

of_discrete = pytest.mark.parametrize("name", DISCRETE)


@of_discrete
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_indices_of_z_are_those_of_forward_whatever_the_batch(name: str, dtype: torch.dtype) -> None:
    quantizer = started(name)
    for step in range(3):  # of training, so that codes are means and not vectors of the data
        quantizer.observe(quantizer(*inputs(quantizer, seed=step)))
        quantizer.update()
    z, noise = (x.to(dtype) for x in inputs(quantizer, 9, 6))
    for training in (True, False):
        quantizer.train(training)
        for mine, draws in zip(z.split([1, 8]), noise.split([1, 8]), strict=True):
            assert torch.equal(quantizer.encode(mine)[1], quantizer(mine, draws).indices)


@pytest.mark.parametrize("name", LEARNING)
def test_indices_of_z_take_as_many_searches_as_forward(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    counted: list[int] = []

    def counting(rows: Tensor, codes: Tensor) -> Tensor:
        counted.append(len(rows) * len(codes))
        return nearest_code(rows, codes)

    quantizer = started(name)
    monkeypatch.setattr(codebook, "nearest_code", counting)
    z, noise = inputs(quantizer)
    quantizer(z, noise)
    forward, counted[:] = sum(counted), []
    assert forward > 0
    quantizer.encode(z)
    assert sum(counted) == forward


LOW = [torch.bfloat16, torch.float16, torch.float8_e4m3fn]


def returned(quantizer: Quantizer, codes: Tensor) -> Tensor | None:
    """The indices of codes, None if they raise."""
    try:
        return quantizer.codes_to_indices(codes)
    except ValueError as error:
        assert "Keep the indices" in str(error) or "keep codes in float32" in str(error)
        return None


@of_discrete
@pytest.mark.parametrize("dtype", LOW)
def test_rounded_codes_have_their_indices_or_raise(name: str, dtype: torch.dtype) -> None:
    quantizer = started(name).eval()
    out = quantizer(*inputs(quantizer))
    rounded = out.codes.detach().to(dtype)
    found = returned(quantizer, rounded)
    assert found is None or torch.equal(found, out.indices)
    if dtype != torch.float8_e4m3fn and name not in SUMS and name != "residual, fsq":
        assert found is not None  # few codes, far apart
    if not torch.equal(rounded.float(), out.codes):  # bits were lost before
        assert returned(quantizer, rounded.float()) is None
    assert torch.equal(quantizer.codes_to_indices(out.codes.double()), out.indices)


@pytest.mark.parametrize("level", [256, 512, 513, 1000, 1024, 4096, 65536])
@pytest.mark.parametrize("form", ["tanh", "sigmoid"])
def test_fine_grids_in_half_precision_raise_unless_every_code_survives(level: int, form: str) -> None:
    """A code of 1024 levels rounded to bfloat16 is another code, exactly."""
    for levels in ([level], [3, level]):
        quantizer = make_quantizer({"type": "fsq", "levels": levels, "form": form})
        codes = quantizer.indices_to_codes(torch.arange(quantizer.codebook_size or 0).unsqueeze(0))
        for dtype in LOW:
            survived = torch.equal(quantizer.nearest(codes.to(dtype))[1], torch.arange(codes.shape[2]).unsqueeze(0))
            one_by_one = [returned(quantizer, code) for code in codes.to(dtype).split(max(1, codes.shape[2] // 9), 2)]
            assert all((found is not None) == survived for found in one_by_one)


def test_codes_of_a_codebook_that_collide_in_half_precision_raise() -> None:
    quantizer = make_quantizer(VQ)
    state = quantizer.state_dict()
    state["codebook"][5] = state["codebook"][3] * (1 + 2**-12)
    codes = quantizer.indices_to_codes(torch.tensor([[3, 5]]))
    assert quantizer.codes_to_indices(codes).tolist() == [[3, 5]]
    assert returned(quantizer, codes.bfloat16()) is None


def test_what_is_no_code_raises() -> None:
    for name in DISCRETE:
        quantizer = started(name)
        codes = quantizer.indices_to_codes(every_index(quantizer)[-7:])
        for wrong in (codes + 1e-6, codes * math.nan, normal(*codes.shape)):
            assert returned(quantizer, wrong) is None
        with pytest.raises(ValueError, match="int64"):
            quantizer.codes_to_indices(codes.long())


def test_most_sums_of_many_codes_are_taken_apart() -> None:
    """Of the nearest codes of a sum about half are the codes that were added."""
    quantizer = make_quantizer({"type": "residual", "base": {"type": "vq", "codebook_size": 64, "dim": 6}, "depth": 6})
    quantizer.start(normal(4000, 6, seed=9))
    indices = quantizer(normal(400, 6)).indices
    codes = quantizer.indices_to_codes(indices)
    assert (quantizer.nearest(codes)[1] == indices).all(1).double().mean() < 0.7
    assert (quantizer._search(codes) == indices).all(1).double().mean() > 0.99
