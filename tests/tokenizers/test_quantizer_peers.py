"""SimVQ and LFQ beside vector-quantize-pytorch: equal where it is right, and different where that is meant.

FSQ is compared in test_fsq_options.py, codebooks (with diffusers' too) in test_vq_variants.py, speed in benchmarks/quantizers.py.
"""

from typing import Any

import pytest
import torch
from tensors import grad, normal

from midway.tokenizers.lfq import LFQ
from midway.tokenizers.simvq import SimVQ

pytestmark = pytest.mark.usefixtures("one_thread")
peers: Any = pytest.importorskip("vector_quantize_pytorch")


def test_simvq_has_the_peers_indices_codes_losses_and_gradients() -> None:
    """Its linear map has no bias, so ours is set to zero; its two losses together are our weighted sum."""
    ours = SimVQ(64, 8)
    torch.nn.init.zeros_(ours.bias)
    theirs = peers.SimVQ(dim=8, codebook_size=64, rotation_trick=False)
    theirs.frozen_codebook.copy_(ours.base)
    theirs.code_transform.weight.data.copy_(ours.weight.data)
    z, x, weight = (
        normal(3, 8, 20).requires_grad_(),
        normal(3, 8, 20).mT.contiguous().requires_grad_(),
        normal(3, 8, 20, seed=1),
    )
    out, (codes, indices, loss) = ours(z), theirs(x)
    assert torch.equal(out.indices, indices)
    torch.testing.assert_close(out.codes, codes.mT, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(out.loss, loss)
    every = torch.arange(64)[None]
    torch.testing.assert_close(ours.indices_to_codes(every).mT, theirs.indices_to_codes(every), atol=1e-6, rtol=1e-6)
    (out.codes * weight).sum().add(out.loss).backward()
    (codes.mT * weight).sum().add(loss).backward()
    torch.testing.assert_close(grad(z), grad(x).mT, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(ours.weight.grad, theirs.code_transform.weight.grad, atol=1e-6, rtol=1e-5)


def test_lfq_has_the_peers_codes_and_entropies_and_the_reversed_bits() -> None:
    """Its first channel is the highest bit, ours the lowest; its logarithm stops at 1e-5, so that entropies agree to 1e-4 only,
    and gradients do not."""
    bits = 10
    ours = LFQ(bits, commitment=0.25, entropy_weight=0.1)
    theirs = peers.LFQ(dim=bits, entropy_loss_weight=0.1, commitment_loss_weight=0.25)
    theirs.train()
    z = 0.3 * normal(4, bits, 25)
    out = ours(z)
    (codes, indices, loss), parts = theirs(z.mT, return_loss_breakdown=True)
    torch.testing.assert_close(out.codes, codes.mT)
    reversed_bits = torch.stack([((indices >> i) & 1) << (bits - 1 - i) for i in range(bits)]).sum(0)
    assert torch.equal(out.indices, reversed_bits)
    torch.testing.assert_close(out.losses["entropy_sample"], parts.per_sample_entropy, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(out.losses["entropy_batch"], parts.batch_entropy, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(out.losses["commitment"], parts.commitment, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(out.loss, loss, atol=1e-5, rtol=1e-5)


def test_zero_is_the_bit_one_here_and_zero_there() -> None:
    middle = torch.zeros(1, 3, 1)
    assert LFQ(3)(middle).indices.item() == 7
    assert peers.LFQ(dim=3)(middle.mT)[1].item() == 0
