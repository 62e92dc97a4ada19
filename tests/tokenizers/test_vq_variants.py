"""Vector quantizers that learn by gradient, on the sphere, by rotation, through one linear map, and with an entropy loss."""

import math
import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from multiprocess import together
from tensors import grad, normal
from torch import Tensor

from midway.tokenizers import clustering, codebook, nearest_kernel
from midway.tokenizers.clustering import kmeans
from midway.tokenizers.code_entropy import code_entropy, soft_assignment
from midway.tokenizers.codebook import Codebook
from midway.tokenizers.fsq import FSQ
from midway.tokenizers.gradient_vq import GradientVQ
from midway.tokenizers.rotation import rotated, rotated_gradient, unit
from midway.tokenizers.simvq import SimVQ
from midway.tokenizers.vq import VQ

pytestmark = pytest.mark.usefixtures("one_thread")

FORMS: dict[str, tuple[type[Codebook], dict[str, Any]]] = {
    "vq": (VQ, {}),
    "vq, unit": (VQ, {"normalize": True}),
    "vq, rotation": (VQ, {"gradient": "rotation"}),
    "gradient": (GradientVQ, {}),
    "gradient, unit, rotation": (GradientVQ, {"normalize": True, "gradient": "rotation"}),
    "gradient, entropy": (GradientVQ, {"entropy_weight": 0.1, "entropy_temperature": 0.5}),
    "simvq": (SimVQ, {}),
    "simvq, unit, rotation": (SimVQ, {"normalize": True, "gradient": "rotation"}),
}
every_form = pytest.mark.parametrize("form", FORMS)


def make(form: str, size: int = 32, dim: int = 4, **options: Any) -> Any:
    kind, own = FORMS[form]
    return kind(codebook_size=size, dim=dim, **{**own, **options})


def started(form: str, size: int = 32, dim: int = 4, **options: Any) -> Any:
    quantizer = make(form, size, dim, **options)
    quantizer.start(normal(300, dim, seed=7))
    return quantizer


# Codes and indices ----------------------------------------------------------------------------------------------------


def test_simvq_decodes_by_the_projected_codebook() -> None:
    quantizer = started("simvq", 50)
    expected = quantizer.base.double() @ quantizer.weight.double().T + quantizer.bias.double()
    codes = quantizer.indices_to_codes(torch.arange(50).view(1, -1))[0].T
    torch.testing.assert_close(codes.double(), expected.detach(), atol=1e-6, rtol=1e-6)
    assert (codes - quantizer.base).abs().max() > 0.1


def test_the_base_of_simvq_is_frozen_and_has_variance_one_over_d() -> None:
    quantizer = SimVQ(4096, 16)
    assert quantizer.base.square().mean().item() == pytest.approx(1 / 16, rel=0.02)
    assert {name for name, _ in quantizer.named_parameters()} == {"weight", "bias"}
    before = quantizer.base.clone()
    optimizer = torch.optim.SGD(quantizer.parameters(), lr=1.0)
    quantizer.observe(quantizer(normal(64, 16)).loss.backward())
    optimizer.step()
    assert torch.equal(quantizer.base, before)
    assert (SimVQ(4096, 16).codes() != quantizer.codes()).any(1).all()  # one step moved every code


def test_initial_codes_depend_on_the_seed_and_not_on_the_global_generator() -> None:
    torch.manual_seed(0)
    state = torch.get_rng_state()
    for form in FORMS:
        assert torch.equal(make(form, seed=3).codes(), make(form, seed=3).codes())
        assert not torch.equal(make(form, seed=3).codes(), make(form, seed=4).codes())
    assert torch.equal(torch.get_rng_state(), state)


# Nearest code ---------------------------------------------------------------------------------------------------------


@every_form
def test_the_code_is_the_nearest_by_brute_force_in_float64(form: str) -> None:
    quantizer = started(form, 200, 8)
    z = normal(3, 5, 8, 7).transpose(1, 2)  # not contiguous
    rows = quantizer.latents(z).movedim(1, -1).reshape(-1, 8)
    distances = torch.cdist(rows.double(), quantizer.codes().double(), compute_mode="donot_use_mm_for_euclid_dist")
    assert torch.equal(quantizer(z).indices.flatten(), distances.argmin(1))


@every_form
def test_ties_go_to_the_lowest_index(form: str) -> None:
    quantizer = started(form, 16)
    with torch.no_grad():
        table = quantizer.base if isinstance(quantizer, SimVQ) else quantizer.codebook
        table[8:] = table[:8].clone()
    assert quantizer(normal(100, 4)).indices.max() < 8


@every_form
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_broken_vector_shows_in_the_loss_and_has_a_known_index(form: str, bad: float) -> None:
    quantizer = started(form)
    z = normal(6, 4, 3)
    sound = quantizer(z).indices
    z[2, 1, 1] = bad
    out = quantizer(z)
    assert not out.loss.isfinite()
    assert out.indices[2, 1] == 0 if math.isnan(bad) else 0 <= out.indices[2, 1] < 32
    out.indices[2, 1] = sound[2, 1]
    assert torch.equal(out.indices, sound)


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("kind", [VQ, GradientVQ])
def test_a_broken_code_shows_in_the_loss(kind: type[VQ | GradientVQ], normalize: bool) -> None:
    quantizer = kind(32, 4, normalize=normalize).eval()
    with torch.no_grad():
        quantizer.codebook[5, 2] = quantizer.codebook[9, 1] = math.nan
    out = quantizer(normal(20, 4))
    assert out.loss.isnan()
    assert (out.indices == 5).all()


def test_the_kernel_is_unavailable_without_a_cuda_device() -> None:
    with pytest.warns(UserWarning, match="by torch"):
        assert not nearest_kernel.works(torch.device("cpu"), 4)
    assert not nearest_kernel.works(torch.device("cpu"), nearest_kernel.WIDEST + 1)


def test_the_kernel_finds_the_codes_that_torch_finds() -> None:
    """By Triton's interpreter, in a process of its own, since it decides once where it runs.

    Integers have exact scores, so that both must find the same index: of ties the lowest, whatever the sizes are to the blocks
    of 64 and to the powers of 2, and whatever the rows were before they were float32. NaN counts as infinite.
    """
    pytest.importorskip("triton")
    code = (
        "import torch; from midway.tokenizers import nearest_kernel as kernel\n"
        "from midway.tokenizers.clustering import nearest_code\n"
        "assert kernel.works(torch.device('cpu'), 5)\n"
        "g = torch.Generator().manual_seed(0)\n"
        "def integers(*shape): return torch.randint(-3, 4, shape, generator=g).float()\n"
        "ties = 0\n"
        "for n, k, d in [(1, 1, 1), (64, 64, 16), (65, 63, 17), (63, 65, 15), (7, 200, 1), (130, 129, 33), (3, 5, 128)]:\n"
        "    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):\n"
        "        rows, codes = integers(n, d).to(dtype), integers(k, d).to(dtype)\n"
        "        codes[k // 2:] = codes[: k - k // 2].clone()  # each twice\n"
        "        bias = codes.float().square().sum(1) / -2\n"
        "        scores = rows.double() @ codes.double().T + bias\n"
        "        expected = scores.argmax(1)\n"
        "        ties += int((scores == scores.amax(1, True)).sum(1).max() > 1)\n"
        "        strided = rows.float().repeat(1, 2)[:, :d]\n"
        "        for given in (rows.float(), strided):\n"
        "            assert torch.equal(kernel.highest_score(given, codes.float(), bias), expected), (n, k, d, dtype)\n"
        "        distances = torch.cdist(rows.double(), codes.double())\n"
        "        assert torch.equal(distances.argmin(1), expected), (n, k, d, dtype)\n"
        "assert ties >= 20, ties\n"
        "rows, codes = integers(70, 4), integers(90, 4); bias = codes.square().sum(1) / -2\n"
        "broken = rows.clone(); broken[3, 2] = torch.nan; broken[69] = torch.nan\n"
        "assert torch.equal(kernel.highest_score(broken, codes, bias), torch.addmm(bias, broken, codes.T).argmax(1))\n"
        "for value in (torch.inf, -torch.inf):\n"
        "    broken = rows.clone(); broken[5, 2] = value; found = kernel.highest_score(broken, codes, bias)\n"
        "    scores = torch.addmm(bias, broken, codes.T).nan_to_num(torch.inf, torch.inf, -torch.inf)\n"
        "    assert torch.equal(found, scores.argmax(1)), value\n"
        "codes[[80, 17], 1] = torch.nan; bias = codes.square().sum(1) / -2\n"
        "assert (kernel.highest_score(rows, codes, bias) == 17).all()\n"
    )
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


# Gradients ------------------------------------------------------------------------------------------------------------


def rotation_of(value: Tensor, carrier: Tensor) -> tuple[float, Tensor]:
    """lambda and the D x D matrix R of one pair, in float64: the plane rotation by the angle between them.

    R = I + (v u^T - u v^T) + (v u^T - u v^T)^2 / (1 + u . v), which is Rodrigues' formula.
    """
    u, v = carrier.double() / carrier.double().norm(), value.double() / value.double().norm()
    turn = torch.outer(v, u) - torch.outer(u, v)
    matrix = torch.eye(len(u), dtype=torch.float64) + turn + turn @ turn / (1 + u @ v)
    return (value.double().norm() / carrier.double().norm()).item(), matrix


def test_the_rotated_gradient_is_that_of_the_rotation() -> None:
    value, carrier, g = normal(40, 5), 3 * normal(40, 5, seed=1), normal(40, 5, seed=2)
    e = carrier.clone().requires_grad_()
    q = value.clone().requires_grad_()
    out = rotated(q, e)
    (out * g).sum().backward()
    assert torch.equal(out, value)
    assert q.grad is None
    for row in range(40):
        scale, matrix = rotation_of(value[row], carrier[row])
        torch.testing.assert_close(matrix @ matrix.T, torch.eye(5, dtype=torch.float64))
        torch.testing.assert_close(scale * matrix @ carrier[row].double(), value[row].double())
        torch.testing.assert_close(grad(e)[row].double(), scale * matrix.T @ g[row].double(), atol=1e-4, rtol=1e-4)
    length = value.norm(dim=1) / carrier.norm(dim=1) * g.norm(dim=1)
    torch.testing.assert_close(grad(e).norm(dim=1), length, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("lean", [0.0, 1e-7, 1e-5, 1e-3, 1e-2])
def test_the_rotated_gradient_of_opposite_vectors_keeps_its_length(lean: float) -> None:
    carrier, g = normal(50, 6), normal(50, 6, seed=1)
    value = -2 * carrier + lean * normal(50, 6, seed=2)
    turned = rotated_gradient(value, carrier, g)
    expected = value.norm(dim=1) / carrier.norm(dim=1) * g.norm(dim=1)
    torch.testing.assert_close(turned.norm(dim=1), expected, rtol=1e-2, atol=1e-2)
    along = rotated_gradient(value, carrier, unit(value))  # R^T v = u
    torch.testing.assert_close(unit(along), unit(carrier), atol=2e-3, rtol=0)


def test_the_rotated_gradient_without_a_direction_is_finite() -> None:
    zero, vector, g = torch.zeros(3, 4), normal(3, 4), normal(3, 4, seed=1)
    assert torch.equal(rotated_gradient(vector, zero, g), g)
    assert torch.equal(rotated_gradient(zero, zero, g), g)
    assert torch.equal(rotated_gradient(zero, vector, g), zero)


@pytest.mark.parametrize("through", ["straight_through", "rotation"])
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("kind", [VQ, GradientVQ, SimVQ])
def test_gradient_to_the_encoder_in_closed_form(kind: Any, normalize: bool, through: str) -> None:
    """Codes and commitment; the Jacobian of normalising is (I - u u^T) / |z|."""
    quantizer = kind(16, 4, normalize=normalize, gradient=through)
    quantizer.start(normal(100, 4, seed=7))
    z, weight = normal(30, 4).requires_grad_(), normal(30, 4, seed=1)
    out = quantizer(z)
    ((out.codes * weight).sum() + out.loss).backward()
    commitment = (quantizer.latents(z) - out.codes).square().mean().item()
    assert out.losses["commitment"].item() == pytest.approx(commitment, rel=1e-5)
    for row in range(30):
        x, code, g = (each[row].detach().double() for each in (z, out.codes, weight))
        latent = x / x.norm() if normalize else x
        if through == "rotation":
            scale, matrix = rotation_of(code, latent)
            g = scale * matrix.T @ g
        expected = g + 2 * 0.25 * (latent - code) / z.numel()
        if normalize:
            expected = (expected - latent * (latent @ expected)) / x.norm()
        torch.testing.assert_close(grad(z)[row].double(), expected, atol=2e-4, rtol=2e-4)


def test_beta_weighs_the_commitment_and_not_the_codebook() -> None:
    """The other way round is the default of taming-transformers and diffusers."""
    quantizer = GradientVQ(128, 4, commitment=0.1).eval()
    z = normal(50, 4).requires_grad_()
    out = quantizer(z)
    out.loss.backward()
    difference = (z.detach() - out.codes.detach()) / z.numel()
    torch.testing.assert_close(grad(z), 2 * 0.1 * difference)
    expected = torch.zeros(128, 4).index_add_(0, out.indices, -2 * difference)
    torch.testing.assert_close(grad(quantizer.codebook), expected)
    unused = torch.ones(128).index_fill_(0, out.indices, 0).bool()
    assert unused.any()
    assert (grad(quantizer.codebook)[unused] == 0).all()
    assert out.losses["codebook"].item() == out.losses["commitment"].item()
    assert out.loss.item() == pytest.approx(1.1 * out.losses["commitment"].item())


def test_the_gradient_of_simvq_is_that_of_its_linear_map() -> None:
    quantizer = SimVQ(32, 4)
    z = normal(60, 4)
    out = quantizer(z)
    out.loss.backward()
    difference = 2 * (out.codes.detach() - z).double() / z.numel()
    torch.testing.assert_close(grad(quantizer.bias).double(), difference.sum(0), atol=1e-6, rtol=1e-5)
    expected = difference.T @ quantizer.base.double()[out.indices]
    torch.testing.assert_close(grad(quantizer.weight).double(), expected, atol=1e-6, rtol=1e-5)


@every_form
def test_zero_vectors_and_zero_codes_stay_finite(form: str) -> None:
    quantizer = started(form)
    with torch.no_grad():
        (quantizer.base if isinstance(quantizer, SimVQ) else quantizer.codebook)[3] = 0
    z = torch.cat([torch.zeros(4, 4), 1e-30 * normal(4, 4), normal(20, 4)]).requires_grad_()
    out = quantizer(z)
    ((out.codes * normal(28, 4)).sum() + out.loss).backward()
    quantizer.observe(out)
    assert out.codes.isfinite().all()
    assert grad(z).abs().max() < 1e3
    quantizer.update()
    assert all(value.isfinite().all() for value in quantizer.state_dict().values())


# Codebooks on the sphere ----------------------------------------------------------------------------------------------


def test_spherical_kmeans_finds_directions_whatever_the_lengths() -> None:
    directions = unit(normal(6, 3, seed=3))
    rows = (directions + 0.02 * normal(80, 6, 3)) * normal(80, 6, 1, seed=1).exp()
    centres = kmeans(unit(rows.reshape(-1, 3)), 6, 10, torch.Generator().manual_seed(0), spherical=True)
    torch.testing.assert_close(centres.norm(dim=1), torch.ones(6))
    assert (centres @ directions.T).amax(0).min() > 0.999
    for kind in (VQ, GradientVQ):
        quantizer = kind(6, 3, normalize=True)
        quantizer.start(torch.cat([rows.reshape(-1, 3), torch.zeros(500, 3)]))  # zeros have no direction
        assert (quantizer.codes() @ directions.T).amax(0).min() > 0.999


def test_an_averaged_codebook_is_normalised_on_use() -> None:
    """Averages of weights are no unit vectors."""
    quantizer = started("vq, unit")
    quantizer.codebook.mul_(torch.rand(32, 1, generator=torch.Generator().manual_seed(0)) + 0.1)
    z = normal(50, 4)
    out = quantizer(z)
    torch.testing.assert_close(out.codes.norm(dim=1), torch.ones(50))
    torch.testing.assert_close((out.codes * unit(z)).sum(1), (unit(z) @ quantizer.codes().T).amax(1))


# Entropy loss ---------------------------------------------------------------------------------------------------------


def entropies(rows: Tensor, codes: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """By the whole N x K table."""
    p = torch.softmax(-torch.cdist(rows, codes, compute_mode="donot_use_mm_for_euclid_dist").square() / temperature, 1)
    mean = p.mean(0)
    return -(p * p.log()).sum(1).mean(), -(mean * mean.log()).sum()


@pytest.mark.parametrize("scores", [1, 100, 2**20])
def test_entropies_and_gradients_agree_with_the_whole_table(scores: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clustering, "_SCORES_PER_CHUNK", scores)
    found, expected = [], []
    for function, into in ((code_entropy, found), (entropies, expected)):
        rows = (normal(37, 3).double() + 4).requires_grad_()
        codes = (normal(11, 3, seed=1).double() + 4).requires_grad_()
        sample, batch = function(rows, codes, 0.7)
        (1.3 * sample - 0.4 * batch).backward()
        into += [sample.detach(), batch.detach(), grad(rows), grad(codes)]
    torch.testing.assert_close(found, expected, atol=1e-10, rtol=1e-10)


def test_gradients_of_the_soft_assignment_agree_with_finite_differences() -> None:
    rows, codes = normal(5, 3).double().requires_grad_(), normal(4, 3, seed=1).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda r, c: soft_assignment(r, c, 0.8), (rows, codes))


@pytest.mark.parametrize("temperature", [0.01, 1.0, 100.0])
def test_entropies_keep_their_bounds_and_unused_codes_stay_finite(temperature: float) -> None:
    rows = normal(64, 4).requires_grad_()
    codes = torch.cat([normal(20, 4, seed=1), normal(20, 4, seed=2) + 100]).requires_grad_()
    sample, batch = code_entropy(rows, codes, temperature)
    (sample - batch).backward()
    assert -1e-6 <= sample.item() <= batch.item() + 1e-5 <= math.log(40) + 1e-4
    assert grad(rows).isfinite().all()
    assert grad(codes).isfinite().all()
    assert [each.item() for each in code_entropy(rows[:0], codes, temperature)] == [0, 0]


@pytest.mark.parametrize("kind", [VQ, GradientVQ, SimVQ])
def test_the_entropy_loss_is_added_with_its_weight(kind: Any) -> None:
    plain, weighted = (kind(16, 4, entropy_weight=weight, entropy_temperature=0.5) for weight in (0.0, 0.2))
    z = normal(30, 4)
    without, out = plain.eval()(z), weighted.eval()(z)
    sample, batch = entropies(z.double(), weighted.codes().double(), 0.5)
    assert out.losses["entropy_sample"].item() == pytest.approx(sample.item(), rel=1e-5)
    assert out.losses["entropy_batch"].item() == pytest.approx(batch.item(), rel=1e-5)
    assert (out.loss - without.loss).item() == pytest.approx(0.2 * (sample - batch).item(), rel=1e-4)
    assert without.losses.keys() == out.losses.keys() - {"entropy_sample", "entropy_batch"}


@every_form
def test_without_weight_no_entropy_is_computed(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(codebook, "code_entropy", None)
    started(form, entropy_weight=0.0)(normal(10, 4))


def test_autograd_keeps_no_table_of_vectors_by_codes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clustering, "_SCORES_PER_CHUNK", 1000)
    kept: list[int] = []
    quantizer = started("gradient, entropy", 100)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t.numel()), t)[1], lambda t: t):
        quantizer.observe(quantizer(normal(500, 4).requires_grad_()))
    assert 0 < max(kept) <= 500 * 4


# Restarts of a codebook that learns by gradient -----------------------------------------------------------------------


def idle(size: int = 16, dead: int = 4, **options: Any) -> GradientVQ:
    """The last `dead` codes are far away and at the end of their patience, all but the steps of the next update."""
    quantizer = GradientVQ(size, 4, **{"restart_after": 10, **options})
    quantizer.step.fill_(0)
    with torch.no_grad():
        quantizer.codebook[size - dead :] += 100
    quantizer.idle_steps[size - dead :] = 9
    quantizer.idle_vectors[size - dead :] = 8 * size
    return quantizer


def test_dead_codes_move_to_the_vectors_of_largest_noise_and_others_stay() -> None:
    quantizer = idle()
    quantizer.idle_vectors[14] += 5  # the longest unused is first
    before = quantizer.codebook.detach().clone()
    z, noise = normal(10, 4, 3), normal(10, 1, 3, seed=1)
    quantizer.observe(quantizer(z, noise))
    assert torch.equal(quantizer.codebook, before)  # nothing before update
    quantizer.update()
    rows = z.movedim(1, -1).reshape(-1, 4)[noise.flatten().argsort(descending=True)]
    assert torch.equal(quantizer.codebook[[14, 12, 13, 15]], rows[:4])
    assert torch.equal(quantizer.codebook[:12], before[:12])
    assert quantizer.idle_steps[12:].tolist() == quantizer.idle_vectors[12:].tolist() == [0] * 4
    assert quantizer.codebook.requires_grad
    assert quantizer.step == 1


@pytest.mark.parametrize(("steps", "vectors"), [(8, 8 * 16), (9, 8 * 16 - 31)])
def test_a_code_is_dead_only_after_enough_steps_and_enough_vectors(steps: int, vectors: int) -> None:
    quantizer = idle()
    quantizer.idle_steps.fill_(steps)
    quantizer.idle_vectors.fill_(vectors)
    before = quantizer.codebook.detach().clone()
    quantizer.observe(quantizer(normal(30, 4)))
    quantizer.update()
    assert torch.equal(quantizer.codebook, before)
    assert quantizer.idle_steps[12:].tolist() == [steps + 1] * 4
    assert quantizer.idle_vectors[12:].tolist() == [vectors + 30] * 4
    used = quantizer(normal(30, 4)).counts > 0
    assert not quantizer.idle_steps[used].any()


def train(quantizer: GradientVQ, optimizer: torch.optim.Optimizer, z: Tensor) -> None:
    """A step on the losses of the quantizer."""
    optimizer.zero_grad()
    out = quantizer(z, normal(len(z), 1))
    out.loss.backward()
    quantizer.observe(out)
    optimizer.step()
    quantizer.update()


@pytest.mark.parametrize(
    "optimizer_of",
    [partial(torch.optim.Adam, lr=0.01, betas=(0.95, 0.999)), partial(torch.optim.SGD, lr=0.01, momentum=0.9)],
)
def test_momentum_does_not_undo_a_restart(optimizer_of: Callable[[list[Tensor]], torch.optim.Optimizer]) -> None:
    """Codes 4 to 7 learn, are then left alone for as long as it takes to be dead, restart, and stay where they were put."""
    quantizer = GradientVQ(8, 2)
    quantizer.step.fill_(0)
    with torch.no_grad():
        quantizer.codebook.copy_(normal(8, 2, seed=3) + torch.arange(8)[:, None] // 4 * 20)
    optimizer = optimizer_of([quantizer.codebook])

    for _ in range(20):
        train(quantizer, optimizer, torch.cat([normal(40, 2), normal(40, 2) + 20]))
    while not (restarted := quantizer.codebook[4:].norm(dim=1) < 10).any():
        train(quantizer, optimizer, normal(40, 2))
        assert quantizer.step < 150
    placed = quantizer.codebook[4:][restarted].detach().clone()
    quantizer.codebook.grad = torch.zeros_like(quantizer.codebook)
    for _ in range(100):
        optimizer.step()
    moved = (quantizer.codebook[4:][restarted] - placed).norm(dim=1).max()
    assert restarted.all()
    assert moved < 0.01 * 0.5  # half of one learning rate: all that is left of Adam's momentum, 0.95^100 * 20 steps


@pytest.mark.parametrize("normalize", [False, True])
def test_restarts_revive_a_codebook_and_a_codebook_without_them_stays_dead(normalize: bool) -> None:
    shares = []
    for restart_after in (0, 5):
        quantizer = GradientVQ(32, 4, restart_after=restart_after, normalize=normalize)
        quantizer.step.fill_(0)
        with torch.no_grad():
            quantizer.codebook[4:] = -100 * torch.ones(4) + 1e-3 * normal(28, 4)
        optimizer = torch.optim.Adam(quantizer.parameters(), lr=1e-2)
        for step in range(30):
            train(quantizer, optimizer, normal(256, 4, seed=step).abs())
        shares.append((quantizer(normal(2000, 4).abs()).counts > 0).double().mean().item())
    assert shares[0] <= 5 / 32
    assert shares[1] > 0.9


# Processes ------------------------------------------------------------------------------------------------------------


def entropies_of(rows: Tensor, processes: int = 1) -> dict[str, Tensor]:
    """Both entropies over all processes, and the gradient to the codes that processes average."""
    codes = normal(16, 4, seed=5).requires_grad_()
    sample, batch = code_entropy(rows, codes, 0.7, shared=True)
    (sample - 0.4 * batch).backward()
    if processes > 1:
        dist.all_reduce(grad(codes))
        grad(codes).div_(processes)
    return {"sample": sample.detach(), "batch": batch.detach(), "gradient": grad(codes)}


def shared_entropies(rank: int, processes: int, folder: Path) -> None:
    dist.init_process_group("gloo")
    own = normal(64, 4, seed=20)[(slice(40), slice(40, 64), slice(0))[rank]]
    torch.save(entropies_of(own, processes), folder / f"{rank}.pt")


def test_processes_give_the_entropies_of_one(tmp_path: Path) -> None:
    """The third process has no vectors."""
    expected = entropies_of(normal(64, 4, seed=20))
    together(shared_entropies, 3, 3, tmp_path)
    for rank in range(3):
        found = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-6)


# Oracles --------------------------------------------------------------------------------------------------------------


def test_a_gaussian_source_costs_what_is_known() -> None:
    """64 codes, 2 channels: k-means 0.0303 per channel, above the rate-distortion bound 2^-6, below FSQ with its best decoder."""
    from sklearn.cluster import KMeans  # here, because the spawned processes import this module too

    rows, fresh = normal(6000, 2), normal(20000, 2, seed=1)
    quantizer = VQ(64, 2)
    quantizer.start(rows)
    quantizer.eval()
    own, found = (quantizer(each).losses["commitment"].item() for each in (rows, fresh))
    best = -KMeans(64, random_state=0).fit(rows.numpy()).score(rows.numpy()) / rows.numel()
    assert own < 1.03 * best
    scalar = FSQ([8, 8])(rows).indices
    sums = clustering.sums_by_code(rows, scalar, 64)
    centroids = sums[:, :2] / sums[:, 2:].clamp(min=1)
    of_scalar = (fresh - centroids[FSQ([8, 8])(fresh).indices]).square().mean().item()
    assert 2**-6 < found < of_scalar
    assert 0.0294 < found < 0.0328


@pytest.mark.parametrize("legacy", [False, True])
def test_diffusers_vector_quantizer_agrees(legacy: bool) -> None:
    """Its legacy form, the default, weighs the codebook by beta, and the commitment by 1."""
    from diffusers.models.autoencoders.vae import VectorQuantizer

    ours = GradientVQ(64, 8, commitment=0.25).eval()
    theirs = VectorQuantizer(64, 8, beta=0.25, legacy=legacy)
    theirs.embedding.weight.data.copy_(ours.codebook.data)
    z, x = (normal(2, 8, 6, 6).requires_grad_() for _ in range(2))
    out = ours(z)
    codes, loss, (_, _, indices) = theirs(x)
    ((out.losses["codebook"] * 0.25 + out.losses["commitment"]) if legacy else out.loss).backward(retain_graph=True)
    loss.backward(retain_graph=True)
    assert torch.equal(out.indices.flatten(), indices.flatten())
    torch.testing.assert_close(out.codes, codes)
    torch.testing.assert_close(out.loss.item(), loss.item())
    own, foreign = (grad(ours.codebook), grad(z)), (grad(theirs.embedding.weight), grad(x))
    if not legacy:
        torch.testing.assert_close(own, foreign)
        return
    z.grad = x.grad = ours.codebook.grad = theirs.embedding.weight.grad = None
    out.loss.backward()
    loss.backward()
    torch.testing.assert_close(grad(z) * 4, grad(x))
    torch.testing.assert_close(grad(ours.codebook), 4 * grad(theirs.embedding.weight))


def test_vector_quantize_pytorch_agrees() -> None:
    """Indices, codes and the rotated gradient."""
    peers = pytest.importorskip("vector_quantize_pytorch")
    ours = VQ(64, 8, gradient="rotation").eval()
    theirs = peers.VectorQuantize(dim=8, codebook_size=64, rotation_trick=True, commitment_weight=0.25)
    theirs._codebook.embed.data.copy_(ours.codebook[None])
    theirs.eval()
    z = normal(3, 20, 8).requires_grad_()
    codes, indices, _ = theirs(z)
    out = ours(z.movedim(-1, 1))
    assert torch.equal(out.indices, indices)
    torch.testing.assert_close(out.codes.movedim(1, -1), codes, atol=1e-5, rtol=1e-5)
    theirs.train()
    x = normal(3, 20, 8).requires_grad_()
    (theirs(x, freeze_codebook=True)[0] * normal(3, 20, 8, seed=2)).sum().backward()
    (out.codes.movedim(1, -1) * normal(3, 20, 8, seed=2)).sum().backward()
    torch.testing.assert_close(grad(x), grad(z), atol=1e-4, rtol=1e-4)


# Settings -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [VQ, GradientVQ, SimVQ])
def test_unusable_settings_raise(kind: Any) -> None:
    bad: dict[str, Any] = {
        "codebook_size": 0,
        "dim": 0,
        "commitment": -1.0,
        "gradient": "rotate",
        "entropy_weight": math.inf,
        "entropy_temperature": 0.0,
    }
    own: dict[Any, dict[str, Any]] = {
        VQ: {"decay": 1.0, "eps": 0.0, "init": "random", "restart_threshold": math.nan},
        GradientVQ: {"init": "random", "restart_after": -1},
        SimVQ: {},
    }
    for name, value in {**bad, **own[kind]}.items():
        with pytest.raises(ValueError, match=name):
            kind(**{"codebook_size": 8, "dim": 2, name: value})


def test_noise_is_checked_where_it_is_used() -> None:
    z = normal(4, 4, 3)
    for quantizer in (VQ(8, 4), GradientVQ(8, 4)):
        assert quantizer.noise_channels == 1
        with pytest.raises(ValueError, match="noise"):
            quantizer.observe(quantizer(z, normal(3, 1, 3)))
    for quantizer in (SimVQ(8, 4), GradientVQ(8, 4, restart_after=0)):
        assert quantizer.noise_channels == 0
        quantizer.observe(quantizer(z, normal(3, 1, 3)))
        quantizer.update()
