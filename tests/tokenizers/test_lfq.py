"""LFQ and BSQ: the bijection, integers, the forward value, gradients and losses, whatever the caller's dtype."""

import math
import random

import pytest
import torch
from tensors import normal
from torch import Tensor

from midway.tokenizers import lfq as lfq_module
from midway.tokenizers.lfq import BSQ, LFQ

BOTH: list[type[LFQ] | type[BSQ]] = [LFQ, BSQ]


def plain(quantizer: type[LFQ] | type[BSQ], bits: int) -> LFQ:
    """Without entropies, so that any number of bits will do."""
    return quantizer(bits, entropy_weight=0)


def amplitude(quantizer: LFQ) -> float:
    return 1 / math.sqrt(quantizer.dim) if isinstance(quantizer, BSQ) else 1.0


@pytest.mark.parametrize("make", BOTH)
@pytest.mark.parametrize("bits", range(1, 17))
def test_indices_and_codes_are_a_bijection_over_the_whole_codebook(make: type[LFQ], bits: int) -> None:
    quantizer = make(bits)
    indices = torch.arange(2**bits).view(1, -1)
    codes = quantizer.indices_to_codes(indices)
    assert torch.equal(quantizer.codes_to_indices(codes), indices)
    assert quantizer.codebook_size == 2**bits
    assert codes.dtype == torch.float32
    assert torch.equal(codes.abs(), torch.full_like(codes, amplitude(quantizer)))
    assert torch.equal(quantizer.snap(codes), codes)
    out = quantizer(codes * torch.linspace(0.01, 9, 2**bits))
    assert torch.equal(out.indices, indices)
    assert torch.equal(out.codes, codes)
    assert out.counts is not None
    assert out.counts.tolist() == [1] * 2**bits


@pytest.mark.parametrize("make", BOTH)
@pytest.mark.parametrize("bits", [25, 27, 40, 61, 62])
def test_huge_codebooks_are_exact_integers(make: type[LFQ], bits: int) -> None:
    """A float32 sum is wrong beyond 2**24 codes."""
    quantizer = plain(make, bits)
    source = random.Random(0)
    expected = [source.getrandbits(bits) for _ in range(2000)] + [0, 2**bits - 1, 2 ** (bits - 1)]
    signs = [[1.0 if index >> i & 1 else -1.0 for i in range(bits)] for index in expected]
    out = quantizer(0.3 * torch.tensor(signs).T[None])
    assert out.indices[0].tolist() == expected
    assert torch.equal(quantizer.indices_to_codes(out.indices), out.codes)
    assert torch.equal(quantizer.codes_to_indices(out.codes), out.indices)
    assert out.indices.dtype == torch.int64
    assert out.counts is None


@pytest.mark.parametrize("make", BOTH)
def test_zero_of_either_sign_is_rounded_up(make: type[LFQ]) -> None:
    z = torch.tensor([0.0, -0.0, 1e-30, -1e-30]).view(1, 4, 1)
    assert make(4)(z).indices.tolist() == [[0b0111]]
    assert make(4).nearest(z)[1].tolist() == [[0b0111]]


def test_latents_of_bsq_are_unit_vectors_and_of_lfq_z_itself() -> None:
    z = 5 * normal(3, 6, 4)
    torch.testing.assert_close(BSQ(6).latents(z), z / z.norm(dim=1, keepdim=True))
    torch.testing.assert_close(BSQ(6)(z).codes.norm(dim=1), torch.ones(3, 4))
    assert torch.equal(LFQ(6).latents(z), z)
    assert BSQ(6).latents(torch.zeros(1, 6, 1)).abs().max() == 0


def naive_entropies(latents: Tensor, codes: Tensor, tau: float) -> tuple[Tensor, Tensor]:
    """Both entropies of p(c | u) ~ exp(-tau |u - c|^2), from all distances: latents (N, d), codes (K, d)."""
    p = (-tau * (latents[:, None] - codes).square().sum(-1)).softmax(1)
    return torch.special.entr(p).sum(1).mean(), torch.special.entr(p.mean(0)).sum()


@pytest.mark.parametrize("make", BOTH)
@pytest.mark.parametrize("training", [True, False])
def test_losses_and_their_gradient_match_distances_to_all_codes(make: type[LFQ], training: bool) -> None:
    quantizer = make(6, 0.3, entropy_weight=0.7, diversity_gamma=1.9, inverse_temperature=0.8).train(training)
    z = normal(4, 6, 3, 2).requires_grad_()
    out = quantizer(z)
    precise = z.detach().double().requires_grad_()
    latents = precise if make is LFQ else precise / precise.norm(dim=1, keepdim=True)
    book = quantizer.indices_to_codes(torch.arange(64).view(1, -1))[0].T.double()
    sample, batch = naive_entropies(latents.movedim(1, -1).reshape(-1, 6), book, 0.8)
    commitment = (latents - out.codes.detach().double()).square().mean()
    expected = {"commitment": commitment, "entropy_sample": sample, "entropy_batch": batch}
    assert out.losses.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(out.losses[name].double(), value, rtol=1e-5, atol=1e-6)
    loss = 0.3 * commitment + 0.7 * (sample - 1.9 * batch)
    torch.testing.assert_close(out.loss.double(), loss, rtol=1e-5, atol=1e-6)
    (ours,), (reference,) = torch.autograd.grad(out.loss, z), torch.autograd.grad(loss, precise)
    torch.testing.assert_close(ours.double(), reference, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("make", BOTH)
def test_groups_of_bits_are_for_the_batch_entropy_only(make: type[LFQ]) -> None:
    z = normal(4, 30, 8)
    out = make(30, entropy_group=9)(z)
    assert out.losses["entropy_batch"] < 30 * math.log(2) + 1e-4
    exact, coarse, fine = (make(12, inverse_temperature=30, entropy_group=g)(z[:, :12]) for g in (None, 12, 1))
    torch.testing.assert_close(coarse.losses, exact.losses)
    assert coarse.losses["entropy_batch"] < fine.losses["entropy_batch"] - 0.1
    assert torch.equal(coarse.losses["entropy_sample"], fine.losses["entropy_sample"])


def test_a_term_without_weight_is_not_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object, **options: object) -> Tensor:
        raise AssertionError("computed")

    z = normal(4, 40, 8)
    monkeypatch.setattr(lfq_module, "batch_entropy", refuse)
    assert LFQ(40, diversity_gamma=0)(z).losses.keys() == {"commitment", "entropy_sample"}
    assert BSQ(40, diversity_gamma=0)(z).losses.keys() == {"entropy_sample"}
    monkeypatch.setattr(lfq_module, "sample_entropy", refuse)
    assert LFQ(40, entropy_weight=0)(z).losses.keys() == {"commitment"}
    nothing = LFQ(40, commitment=0, entropy_weight=0)(z)
    assert nothing.losses == {}
    assert nothing.loss.item() == 0
    assert nothing.loss.dtype == torch.float32


@pytest.mark.parametrize("make", BOTH)
def test_the_entropy_loss_spreads_collapsed_latents_over_the_codes(make: type[LFQ]) -> None:
    """By gradient descent from latents that all have one code. Without diversity they stay."""

    def used_after(gamma: float) -> int:
        z = (0.05 * normal(64, 4) + 0.2).requires_grad_()
        quantizer = make(4, commitment=0, entropy_weight=1, diversity_gamma=gamma, inverse_temperature=2)
        assert quantizer(z).indices.unique().tolist() == [15]
        optimizer = torch.optim.Adam([z], lr=0.02)
        for _ in range(100):
            optimizer.zero_grad()
            quantizer(z).loss.backward()
            optimizer.step()
        return len(quantizer(z).indices.unique())

    assert used_after(2.0) == 16
    assert used_after(0.0) == 1


def test_nan_shows_in_the_losses() -> None:
    z = normal(2, 4, 3)
    z[0, 1, 2] = math.nan
    for quantizer in (LFQ(4), BSQ(4)):
        out = quantizer(z)
        assert out.loss.isnan()
        assert 0 <= out.indices.min() <= out.indices.max() < 16


@pytest.mark.parametrize("make", BOTH)
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": 0}, "bits is 0; give an integer from 1 to 62"),
        ({"bits": 63}, "from 1 to 62"),
        ({"bits": 8.5}, "integer"),
        ({"bits": 21}, r"exact batch entropy of 21 bits .* set entropy_group"),
        ({"bits": 30, "entropy_group": 21}, "entropy_group is 21; give from 1 to 20"),
        ({"bits": 8, "entropy_group": 9}, "entropy_group is 9; give from 1 to 8"),
        ({"bits": 8, "entropy_group": 2.5}, "entropy_group is 2.5"),
        ({"commitment": -1}, "commitment is -1"),
        ({"entropy_weight": math.nan}, "entropy_weight is nan"),
        ({"diversity_gamma": math.inf}, "diversity_gamma is inf"),
        ({"inverse_temperature": 0}, "inverse_temperature is 0"),
        ({"inverse_temperature": math.inf}, "inverse_temperature is inf"),
    ],
)
def test_unusable_settings_raise(make: type[LFQ], options: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(**{"bits": 8, **options})  # pyright: ignore[reportArgumentType]
    assert make(20).codebook_size == 2**20
    assert make(62, diversity_gamma=0).codebook_size == 2**62


def test_the_state_is_empty() -> None:
    assert not LFQ(8).state_dict()
    assert not BSQ(8).state_dict()
    assert "bits=8" in repr(BSQ(8))
