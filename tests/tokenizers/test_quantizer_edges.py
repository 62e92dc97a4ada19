"""Contracts of all quantizers at the edges: batches without samples, and encoders whose output is not finite."""

import copy
import math
from typing import Any

import pytest
import torch
from quantizer_cases import CASES, CONTINUOUS, LEARNING, VQ, inputs, started
from tensors import grad, normal

from midway.gen.tokenizer.loss_config import LossConfig
from midway.gen.tokenizer.objective import TokenizerObjective, batch_codes
from midway.gen.training.batches import Context, ImageBatch
from midway.tokenizers.adversarial import Kind
from midway.tokenizers.losses import pixel_loss
from midway.tokenizers.tokenizer import ImageTokenizer

pytestmark = pytest.mark.usefixtures("one_thread")

of_all = pytest.mark.parametrize("name", CASES)

UNWEIGHTED: dict[str, dict[str, Any]] = {
    "lfq, no losses": {"type": "lfq", "bits": 5, "commitment": 0.0, "entropy_weight": 0.0},
    "bsq, no losses": {"type": "bsq", "bits": 5, "commitment": 0.0, "entropy_weight": 0.0},
    "vq, no losses": {**VQ, "commitment": 0.0},
    "kl, no losses": {"type": "kl", "dim": 3, "weight": 0.0},
    "grouped, fsq": {"type": "grouped", "base": CASES["fsq"], "groups": 2},
    "two_level, fsq": {"type": "two_level", "top": CASES["fsq"], "bottom": CASES["fsq"]},
}


@of_all
@pytest.mark.parametrize("training", [True, False])
def test_a_batch_without_samples_has_no_loss_and_teaches_nothing(name: str, training: bool) -> None:
    quantizer = started(name).train(training)
    before = copy.deepcopy(quantizer.state_dict())
    z, noise = (x[:0] for x in inputs(quantizer))
    out = quantizer(z.requires_grad_(), noise)
    assert out.loss.item() == 0
    assert {value.item() for value in out.losses.values()} <= {0.0}
    (out.loss + out.codes.sum()).backward()
    assert grad(z).shape == z.shape
    assert all(p.grad is None or not p.grad.any() for p in quantizer.parameters())
    assert quantizer.encode(z)[1].shape == out.indices.shape
    assert all(value.item() == 0 for value in batch_codes(out.indices, out.counts).values())
    quantizer.observe(out)
    quantizer.update()
    assert all(torch.equal(value, before[key]) for key, value in quantizer.state_dict().items())


@pytest.mark.parametrize("name", LEARNING)
def test_an_empty_micro_batch_does_not_move_the_draws_of_the_others(name: str) -> None:
    """Without noise, restarts draw by the number of the micro-batch."""
    states = []
    for cuts in ((3, 3), (0, 3, 0, 3, 0)):
        quantizer = started(name).eval()  # in which dropout takes no noise
        for step in range(4):
            for z in inputs(quantizer, seed=step)[0].split(cuts):
                quantizer.observe(quantizer(0.2 * z + step))
            quantizer.update()
        states.append(quantizer.state_dict())
    assert all(torch.equal(value, states[1][key]) for key, value in states[0].items())


@pytest.mark.parametrize("name", [*CASES, *UNWEIGHTED])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_the_loss_is_not_finite_where_z_is_not(name: str, training: bool, value: float) -> None:
    """Codes are finite whatever z is, so no other term of the objective shows it."""
    quantizer = started(CASES[name] if name in CASES else UNWEIGHTED[name]).train(training)
    z, noise = inputs(quantizer)
    assert quantizer(z, noise).loss.isfinite()
    for channel in range(quantizer.in_dim):
        broken = z.clone()
        broken[2, channel, 1, 3] = value
        for dtype in (torch.float32, torch.bfloat16):
            assert not quantizer(broken.to(dtype), noise).loss.isfinite()
    assert quantizer(1e30 * z, noise).loss.isfinite() or name not in ("fsq", "lfq, no losses")


@pytest.mark.parametrize("network", ["conv", "vit"])
@pytest.mark.parametrize("name", ["fsq", "vq", "kl", "two_level", "residual"])
def test_a_tokenizer_takes_no_images(name: str, network: str) -> None:
    options: dict[str, Any] = {"attention": True} if network == "conv" else {"network": "vit", "depth": 1, "heads": 2}
    model = ImageTokenizer(width=8, blocks=1, quantizer=CASES[name], **options)
    model.start(normal(64, 1, 8, 8))
    dim = model.quantizer.dim
    model.set_latent_statistics(torch.zeros(dim), torch.ones(dim))
    nothing = normal(0, 1, 8, 8)
    out = model(nothing, normal(0, *model.noise_shape))
    assert out.reconstruction.shape == nothing.shape
    assert model.decode_latents(model.encode_latents(nothing)).shape == nothing.shape
    if name not in CONTINUOUS:
        assert model.decode_indices(model.encode_indices(nothing)).shape == nothing.shape
    for kind in ("l1", "l2", "charbonnier"):
        loss = pixel_loss(out.reconstruction, nothing, kind) + out.quantized.loss
        assert loss.item() == 0
        loss.backward(retain_graph=True)
    assert all(p.grad is not None and not p.grad.any() for p in model.encoder.parameters())


@pytest.mark.parametrize("kind", ["hinge", "non_saturating", "wasserstein"])
def test_an_objective_of_no_images_is_zero_and_learns_nothing(kind: Kind) -> None:
    config = LossConfig(
        adversary=kind, adaptive=True, lecam=0.1, r1=1.0, gradient_penalty=1.0, critic_width=8, critic_layers=1
    )
    objective = TokenizerObjective(ImageTokenizer(width=8, blocks=1, quantizer=VQ), flip=True, losses=config)
    objective.tokenizer.start(normal(64, 1, 8, 8))
    context = Context(0, 3, torch.arange(0))
    before = copy.deepcopy(objective.state_dict())
    batch = ImageBatch(torch.zeros(0, 1, 8, 8, dtype=torch.uint8), torch.zeros(0, dtype=torch.int64))
    loss, logs = objective.loss(batch, context)
    loss.backward()
    objective.after_step(torch.tensor(True))
    assert loss.item() == 0
    assert all(value.isfinite().all() for value in logs.values())
    changed = [k for k, v in objective.state_dict().items() if not torch.equal(v, before[k])]
    assert all(key.endswith((".u", ".v")) for key in changed)  # of spectral norms


@pytest.mark.parametrize("name", ["fsq", "lfq, no losses", "residual, fsq", "two_level, fsq", "kl", "vq"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_the_objective_is_not_finite_where_the_encoder_is_not(name: str, value: float) -> None:
    config = CASES[name] if name in CASES else UNWEIGHTED[name]
    objective = TokenizerObjective(ImageTokenizer(width=8, blocks=1, quantizer=config))
    objective.tokenizer.start(normal(64, 1, 8, 8))
    batch = ImageBatch(torch.zeros(4, 1, 8, 8, dtype=torch.uint8), torch.zeros(4, dtype=torch.int64))
    context = Context(0, 0, torch.arange(4))
    assert objective.loss(batch, context)[0].isfinite()
    with torch.no_grad():
        next(objective.tokenizer.encoder.parameters())[0] = value
    assert not objective.loss(batch, context)[0].isfinite()


@of_all
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_codebooks_and_statistics_stay_in_float32(name: str, dtype: torch.dtype) -> None:
    """In bfloat16 neighbouring codes collide, and a running mean of 0.99 stops."""
    quantizer, moved = started(name), torch.nn.ModuleList([started(name)]).to(dtype)[0]
    for step in range(2):
        for each in (quantizer, moved):
            each.observe(each(*inputs(quantizer, seed=step)))  # pyright: ignore
            each.update()  # pyright: ignore
    for key, value in quantizer.state_dict().items():
        assert torch.equal(moved.state_dict()[key], value)
        assert moved.state_dict()[key].dtype == value.dtype


@pytest.mark.parametrize("network", ["conv", "vit"])
@pytest.mark.parametrize("name", ["fsq", "vq", "gradient", "simvq", "bsq", "kl", "residual", "two_level"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.filterwarnings("ignore:There are modules")
def test_a_tokenizer_of_any_dtype_learns_and_keeps_its_latent_statistics(
    name: str, network: str, dtype: torch.dtype
) -> None:
    options: dict[str, Any] = {"attention": True} if network == "conv" else {"network": "vit", "depth": 1, "heads": 2}
    torch.manual_seed(0)
    tokenizer = ImageTokenizer(width=8, blocks=1, quantizer=CASES[name], **options)
    tokenizer.start(normal(64, 1, 8, 8))
    dim = tokenizer.quantizer.dim
    mean, std = torch.full((dim,), 0.1234567), torch.full((dim,), 1.2345678)
    tokenizer.set_latent_statistics(mean, std)
    objective = TokenizerObjective(tokenizer).to(dtype)
    assert {p.dtype for p in tokenizer.encoder.parameters()} == {dtype}
    assert torch.equal(tokenizer.latent_mean, mean) and torch.equal(tokenizer.latent_std, std)
    batch = ImageBatch(torch.randint(0, 256, (4, 1, 8, 8), dtype=torch.uint8), torch.zeros(4, dtype=torch.int64))
    loss, _ = objective.loss(batch, Context(0, 0, torch.arange(4)))
    loss.backward()
    objective.after_step(torch.tensor(True))
    assert all(p.grad is not None and p.grad.isfinite().all() for p in tokenizer.encoder.parameters())
    images = normal(3, 1, 8, 8)
    tokenizer.eval()
    assert tokenizer.encode_latents(images).dtype == torch.float32
    if name not in CONTINUOUS:
        assert torch.equal(tokenizer.decode_indices(tokenizer.encode_indices(images)), tokenizer(images).reconstruction)
