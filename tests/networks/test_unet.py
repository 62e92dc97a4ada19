"""The U-Net of diffusers as the network of a latent model: its own forward, and all that networks are used for."""

import sys
from dataclasses import replace

import pytest
import torch
from derivatives import check_derivative
from tensors import normal, randomised
from torch import Tensor

from midway.gen.core.errors import UsageError
from midway.gen.diffusion.model import LatentModel, LatentModelConfig
from midway.gen.networks.dit_config import DiTConfig
from midway.gen.networks.unet import UNet, UNetConfig
from midway.gen.training.batches import Context, LatentBatch
from midway.gen.training.optim import checkpoint_activations
from midway.samplers.grids import karras
from midway.samplers.sample import sample
from midway.samplers.solvers import heun

TINY = UNetConfig(widths=(8, 16))
LABELS = torch.tensor([0, 3, 5])


def network(config: UNetConfig = TINY, more: tuple[str, ...] = ()) -> UNet:
    """Of 3x4x6 latents and 5 classes."""
    torch.manual_seed(0)
    return UNet(config, 3, 4, 6, 5, more)


def inputs(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    return normal(3, 3, 4, 6, dtype=dtype), torch.tensor([0.2, 0.5, 0.9], dtype=dtype), LABELS


def latent_model() -> LatentModel:
    torch.manual_seed(0)
    config = LatentModelConfig(network="unet", unet=TINY)
    return randomised(LatentModel(config, (3, 4, 4), 5), std=0.1)


def test_a_new_network_returns_0_and_hidden_tokens_of_the_lowest_resolution() -> None:
    made = network(more=("span",))
    out = made(*inputs(), more={"span": torch.rand(3)})
    assert not out.value.any()
    assert out.value.shape == (3, 3, 4, 6)
    assert out.hidden.shape == (3, 6, 16) == (3, made.grid[0] * made.grid[1], made.feature_dim)


@pytest.mark.parametrize(
    "config", [TINY, UNetConfig((8, 16, 24), blocks=2), UNetConfig((16,), attention=False)], ids=str
)
def test_it_is_the_network_of_diffusers(config: UNetConfig) -> None:
    """With the condition in the place of its class embedding, and no time of its own."""
    from diffusers.models.unets.unet_2d import UNet2DModel

    made = randomised(UNet(config, 3, 4, 8, 5), std=0.2)
    levels = len(config.widths) - config.attention
    theirs = UNet2DModel(
        in_channels=3,
        out_channels=3,
        block_out_channels=config.widths,
        layers_per_block=config.blocks,
        down_block_types=("DownBlock2D",) * levels + ("AttnDownBlock2D",) * config.attention,
        up_block_types=("AttnUpBlock2D",) * config.attention + ("UpBlock2D",) * levels,
        add_attention=config.attention,
        norm_num_groups=8 if 24 in config.widths else min(config.widths),
        class_embed_type="identity",
    )
    names = {"enter": "conv_in", "down": "down_blocks", "middle": "mid_block", "up": "up_blocks"}
    names |= {"leave.0": "conv_norm_out", "leave.2": "conv_out"}
    for ours, name in names.items():
        theirs.get_submodule(name).load_state_dict(made.get_submodule(ours).state_dict())
    for parameter in theirs.get_submodule("time_embedding").parameters():
        torch.nn.init.zeros_(parameter)
    x, condition = normal(3, 3, 4, 8), normal(3, 4 * config.widths[0], seed=1)
    with torch.no_grad():
        expected = theirs(x, 0, condition).sample
        torch.testing.assert_close(made(x, condition=condition).value, expected, rtol=1e-5, atol=1e-5)


def test_the_derivative_by_state_and_time_is_that_of_finite_differences() -> None:
    made = randomised(network(replace(TINY, time_scale=1.0), ("span",)), std=0.1).double()
    check_derivative(made, *inputs(torch.float64))


def test_conditions_of_all_times_are_those_of_each() -> None:
    made = randomised(network(more=("span",)), std=0.1)
    angles, spans = torch.tensor([0.1, 0.9]), torch.tensor([0.0, 0.4])
    x, _, labels = inputs()
    together = made.conditions(angles, labels, {"span": spans})
    assert together.shape == (2, 3, 32)
    for i in range(2):
        alone = made(x, angles[i].expand(3), labels, more={"span": spans[i].expand(3)})
        for found, expected in zip(made(x, condition=together[i]), alone, strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("autocast", [False, True])
def test_recomputing_activations_changes_no_bit(autocast: bool) -> None:
    def gradients(made: UNet) -> list[Tensor]:
        made.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            out = made(*inputs(), Context(0, 0, torch.arange(3)))
        out.value.float().square().sum().backward()
        return [out.value.detach(), *(p.grad.clone() for p in made.parameters() if p.grad is not None)]

    made, calls = randomised(network(), std=0.1), list[int]()
    made.middle.resnets[0].register_forward_hook(lambda *_: calls.append(1))  # pyright: ignore
    plain = gradients(made)
    assert len(plain) == 1 + len(list(made.parameters())), "every parameter is used"
    checkpoint_activations(made)
    again = gradients(made)
    assert all(torch.equal(a, b) for a, b in zip(again, plain, strict=True))
    assert made.down[0].gradient_checkpointing  # pyright: ignore


def test_it_compiles_as_one_graph() -> None:
    made, graphs = randomised(network(), std=0.1), list[object]()
    expected = made(*inputs()).value
    made.compile(backend=lambda graph, _: graphs.append(graph) or graph.forward, fullgraph=True)
    assert torch.equal(made(*inputs()).value, expected)
    assert len(graphs) == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_weights_of_another_precision_give_nearly_the_same(dtype: torch.dtype) -> None:
    made = randomised(network(), std=0.1)
    expected = made(*inputs()).value.detach()
    got = made.to(dtype)(*inputs()).value.detach()
    assert got.dtype == dtype
    torch.testing.assert_close(got.float(), expected, rtol=0, atol=0.1)


def test_solvers_see_one_field_prepared_or_called() -> None:
    made = latent_model()
    table = heun(made.schedule, karras(made.schedule, 4))
    noise = normal(3, 3, 4, 4, seed=3)
    for scale in (1.0, 2.0):
        field = made.field(LABELS, scale)
        with torch.no_grad():
            got = sample(field, table, noise)
            torch.testing.assert_close(got, sample(lambda x, t, f=field: f(x, t), table, noise), rtol=1e-4, atol=1e-4)
    features = made.conditional_field(noise, torch.full((3,), 0.5), LABELS).features
    assert features is not None and features.shape == (3, made.feature_dim)


def test_saved_and_read_again_it_is_the_same(tmp_path) -> None:
    made = latent_model()
    made.save_pretrained(tmp_path)
    again = LatentModel.from_pretrained(tmp_path)
    batch = LatentBatch(normal(4, 3, 4, 4), torch.arange(4))
    losses = [model.loss(batch, Context(0, 0, torch.arange(4)))[0] for model in (made, again)]
    assert torch.equal(*losses)
    assert made.hash == again.hash


def test_what_cannot_be_raises_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="cannot be halved 2 times: give fewer widths"):
        UNet(UNetConfig((8, 8, 8)), 3, 6, 6, 5)
    with pytest.raises(ValueError, match="give multiples of 8"):
        UNetConfig((8, 12))
    with pytest.raises(ValueError, match="settings of dit have no effect with network unet"):
        LatentModelConfig(network="unet", dit=DiTConfig(depth=5))
    with pytest.raises(ValueError, match="settings of unet have no effect with network dit"):
        LatentModelConfig(unet=TINY)
    monkeypatch.setitem(sys.modules, "diffusers.models.unets.unet_2d", None)
    with pytest.raises(UsageError, match="needs the package diffusers") as caught:
        network()
    assert "pip install 'midway[bench]'" in str(caught.value)
