"""Imported networks compute what their authors' do: beside diffusers, and beside the published equations written out."""

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from diffusers.models.transformers.dit_transformer_2d import DiTTransformer2DModel
from torch import Tensor
from torch.nn import functional as F

from midway.gen.core.errors import DataError, UsageError
from midway.gen.diffusion.inputs import network_time, timesteps
from midway.gen.foreign.convert import import_model, published_positions
from midway.gen.foreign.layouts import LAYOUTS
from midway.samplers.schedule import VP

XL: dict[str, int] = {"width": 1152, "depth": 1, "heads": 16, "patch": 2, "side": 32, "classes": 1000}
TINY: dict[str, int] = {"width": 32, "depth": 2, "heads": 2, "patch": 2, "side": 8, "classes": 7}


def peer(width: int, depth: int, heads: int, patch: int, side: int, classes: int, eps: float = 1e-5) -> Any:
    """diffusers' network with random weights, its embeddings equal in all blocks, as DiT is converted to it."""
    size: dict[str, Any] = {"num_attention_heads": heads, "attention_head_dim": width // heads, "num_layers": depth}
    place: dict[str, Any] = {"sample_size": side, "patch_size": patch, "num_embeds_ada_norm": classes}
    made = DiTTransformer2DModel(in_channels=4, out_channels=8, norm_eps=eps, **size, **place).eval()
    generator = torch.Generator().manual_seed(0)
    state = made.state_dict()
    for name, value in state.items():
        value.copy_(0.05 * torch.randn(value.shape, generator=generator))
        if ".norm1.emb." in name:
            value.copy_(state["transformer_blocks.0." + name.split(".", 2)[2]])
    return made


@pytest.fixture
def exact_convolutions() -> Iterator[None]:
    """oneDNN adds up a convolution's products in an order of its own."""
    with torch.backends.mkldnn.flags(enabled=False), torch.no_grad():
        yield


def batch(channels: int, side: int, classes: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return (
        torch.randn(2, channels, side, side, generator=generator),
        torch.tensor([999.0, 17.0]),
        torch.tensor([3, classes]),
    )


def as_dit(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """diffusers' tensors by the names of facebookresearch/DiT, without pos_embed."""
    found = {}
    for name, value in state.items():
        for old, new in (
            ("pos_embed.proj", "x_embedder.proj"),
            ("proj_out_1", "final_layer.adaLN_modulation.1"),
            ("proj_out_2", "final_layer.linear"),
            ("transformer_blocks", "blocks"),
            ("norm1.linear", "adaLN_modulation.1"),
            ("attn1.to_out.0", "attn.proj"),
            ("ff.net.0.proj", "mlp.fc1"),
            ("ff.net.2", "mlp.fc2"),
        ):
            name = name.replace(old, new)
        if ".norm1.emb." in name:
            if name.startswith("blocks.0."):
                _, last = name.split(".norm1.emb.")
                renamed = last.replace("timestep_embedder.linear_1", "t_embedder.mlp.0")
                renamed = renamed.replace("timestep_embedder.linear_2", "t_embedder.mlp.2")
                found[renamed.replace("class_embedder.", "y_embedder.")] = value
        elif "attn1.to_q" in name:
            parts = [state[_original(name).replace("to_q", f"to_{part}")] for part in "qkv"]
            found[name.replace("attn1.to_q", "attn.qkv")] = torch.cat(parts)
        elif "attn1" not in name:
            found[name] = value
    return found


def _original(name: str) -> str:
    return "transformer_" + name


@pytest.mark.parametrize("size", [TINY, XL], ids=["tiny", "XL"])
def test_a_network_of_diffusers_is_equal_bit_for_bit(size: dict[str, int], exact_convolutions: None) -> None:
    theirs = peer(**size)
    ours = import_model(theirs.state_dict(), "diffusers", settings=dict(theirs.config)).model
    x, t, labels = batch(4, size["side"], size["classes"])
    expected = theirs(x, timestep=t, class_labels=labels).sample[:, :4]
    assert torch.equal(ours.network(x, t, labels).value, expected)
    assert ours.latent_shape == (4, size["side"], size["side"]) and ours.classes == size["classes"]


@pytest.mark.slow
def test_the_whole_of_dit_xl_2_is_equal_bit_for_bit(exact_convolutions: None) -> None:
    size = XL | {"depth": 28}
    theirs = peer(**size)
    imported = import_model(theirs.state_dict(), "diffusers", settings=dict(theirs.config))
    x, t, labels = batch(4, 32, 1000)
    expected = theirs(x, timestep=t, class_labels=labels).sample[:, :4]
    assert torch.equal(imported.model.network(x, t, labels).value, expected)
    parameters = sum(p.numel() for p in imported.model.parameters())
    assert parameters + imported.dropped == 675_129_632 - 256 * 1152, (
        "published with 256 fixed positions of 1152 channels"
    )


@pytest.mark.parametrize(("layout", "sign"), [("dit", 1), ("sit", -1)])
@pytest.mark.parametrize("size", [TINY, XL], ids=["tiny", "XL"])
def test_the_names_of_dit_mean_the_same_weights(
    layout: Any, sign: int, size: dict[str, int], exact_convolutions: None
) -> None:
    """diffusers' network with the frequencies of DiT, whose exponents are i / 128, and its eps everywhere."""
    theirs = peer(**size, eps=1e-6)
    for block in theirs.transformer_blocks:
        block.norm1.emb.time_proj.downscale_freq_shift = 0
    tokens = size["side"] // size["patch"]
    state = as_dit(theirs.state_dict()) | {"pos_embed": theirs.pos_embed.pos_embed}
    assert torch.equal(published_positions(tokens, size["width"]), theirs.pos_embed.pos_embed[0])
    ours = import_model(state, layout, heads=size["heads"]).model
    x, t, labels = batch(4, size["side"], size["classes"])
    t = t if layout == "dit" else t / 1000
    expected = theirs(x, timestep=t, class_labels=labels).sample[:, :4]
    assert torch.equal(ours.network(x, t, labels).value, sign * expected)


# ---- what the field makes of the output ----


def test_the_field_of_dit_is_that_of_eps_at_a_timestep(exact_convolutions: None) -> None:
    theirs = peer(**TINY)
    ours = import_model(theirs.state_dict(), "diffusers", settings=dict(theirs.config)).model
    x, _, labels = batch(4, 8, 7)
    bars = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)
    for k in (20, 999 - 100, 500):
        rho = (1 / bars[k] - 1).sqrt()
        t = VP().time_of_rho(rho).item()
        eps = theirs(x, timestep=torch.full((2,), float(k)), class_labels=labels).sample[:, :4]
        x0 = (x - (1 - bars[k]).sqrt() * eps) / bars[k].sqrt()
        found = ours.field(labels)(x.double(), torch.full((2,), t, dtype=torch.float64))
        torch.testing.assert_close(found.eps.float(), eps, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(found.x0.float(), x0.float(), atol=1e-4, rtol=1e-4)
        field: Any = ours.field(labels)
        made = field.at((t,), x)
        torch.testing.assert_close(made.values[0](x), eps, atol=1e-6, rtol=1e-5)  # one embedded time for all samples


def test_the_field_of_sit_goes_from_noise_to_data(exact_convolutions: None) -> None:
    state = as_dit(peer(**TINY).state_dict()) | {"pos_embed": published_positions(4, 32)[None]}
    ours = import_model(state, "sit", heads=2).model
    x, _, labels = batch(4, 8, 7)
    for t in (0.25, 0.75):
        to_data = -ours.network(x, torch.full((2,), 1 - t), labels).value
        found = ours.field(labels)(x, torch.full((2,), t))
        torch.testing.assert_close(found.x0, x + t * to_data, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(found.eps, x - (1 - t) * to_data, atol=1e-5, rtol=1e-4)


def test_every_timestep_is_met_at_its_noise_level() -> None:
    bars = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)
    t = VP().time_of_rho((1 / bars - 1).sqrt())
    found = network_time("ddpm", t, VP().alpha(t), VP().sigma(t))
    known = t < 1
    assert torch.equal(found[known], torch.arange(1000.0, dtype=torch.float64)[known]) and known.sum() > 995
    assert timesteps().steps == 1000
    assert network_time("sit", torch.tensor([0.25]), *torch.ones(2, 1)).item() == 0.75


# ---- LightningDiT, by its equations ----


def lightning(width: int = 32, heads: int = 2, depth: int = 2, channels: int = 6, side: int = 4) -> dict[str, Tensor]:
    """Random weights of patch 1 with every option of the published models, and norms of queries and keys."""
    hidden, size = width * 8 // 3 // 8 * 8, width // heads
    shapes: dict[str, tuple[int, ...]] = {
        "x_embedder.proj.weight": (width, channels, 1, 1),
        "y_embedder.embedding_table.weight": (8, width),
        "final_layer.norm_final.weight": (width,),
    }
    linear = {
        "t_embedder.mlp.0": (width, 256),
        "t_embedder.mlp.2": (width, width),
        "final_layer.linear": (channels, width),
        "final_layer.adaLN_modulation.1": (2 * width, width),
    }
    for i in range(depth):
        for name, rows, columns in (
            ("attn.qkv", 3 * width, width),
            ("attn.proj", width, width),
            ("mlp.w12", 2 * hidden, width),
            ("mlp.w3", width, hidden),
            ("adaLN_modulation.1", 6 * width, width),
        ):
            linear[f"blocks.{i}.{name}"] = (rows, columns)
        shapes |= {f"blocks.{i}.norm{j}.weight": (width,) for j in (1, 2)}
        shapes |= {f"blocks.{i}.attn.{part}_norm.weight": (size,) for part in "qk"}
    shapes |= {f"{name}.weight": shape for name, shape in linear.items()}
    shapes |= {f"{name}.bias": shape[:1] for name, shape in linear.items()} | {"x_embedder.proj.bias": (width,)}
    generator = torch.Generator().manual_seed(2)
    state = {name: 0.1 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    quarter = size // 4
    frequencies = 10000.0 ** -(torch.arange(quarter) / quarter)
    rows, columns = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    angles = torch.cat([place.flatten()[:, None] * frequencies for place in (rows, columns)], 1)
    both = {"freqs_cos": angles.cos(), "freqs_sin": angles.sin()}
    state |= {f"feat_rope.{name}": value.repeat_interleave(2, 1) for name, value in both.items()}
    return state | {"pos_embed": published_positions(side, width)[None]}


def equations(state: dict[str, Tensor], x: Tensor, t: Tensor, labels: Tensor, heads: int = 2) -> Tensor:
    """Yao et al. 2025, arXiv 2501.01423: rotations as complex numbers, attention as a softmax."""

    def layer(h: Tensor, name: str) -> Tensor:
        return F.linear(h, state[f"{name}.weight"].flatten(1), state[f"{name}.bias"])

    def norm(h: Tensor, name: str) -> Tensor:
        return state[f"{name}.weight"] * h / (h.square().mean(-1, keepdim=True) + 1e-6).sqrt()

    turn = torch.complex(state["feat_rope.freqs_cos"][:, ::2], state["feat_rope.freqs_sin"][:, ::2])

    def rotate(h: Tensor) -> Tensor:
        return torch.view_as_real(torch.view_as_complex(h.unflatten(-1, (-1, 2)).contiguous()) * turn).flatten(-2)

    angles = t[:, None] * 10000.0 ** -(torch.arange(128) / 128)
    time = layer(F.silu(layer(torch.cat([angles.cos(), angles.sin()], 1), "t_embedder.mlp.0")), "t_embedder.mlp.2")
    condition = F.silu(time + state["y_embedder.embedding_table.weight"][labels])[:, None]
    h = layer(x.flatten(2).mT, "x_embedder.proj") + state["pos_embed"]
    for i in range(2):
        at = f"blocks.{i}"
        shift, scale, gate, shift_2, scale_2, gate_2 = layer(condition, f"{at}.adaLN_modulation.1").chunk(6, -1)
        qkv = layer(norm(h, f"{at}.norm1") * (1 + scale) + shift, f"{at}.attn.qkv")
        q, k, v = qkv.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
        q, k = rotate(norm(q, f"{at}.attn.q_norm")), rotate(norm(k, f"{at}.attn.k_norm"))
        mixed = (q @ k.mT / math.sqrt(q.shape[-1])).softmax(-1) @ v
        h = h + gate * layer(mixed.transpose(1, 2).flatten(2), f"{at}.attn.proj")
        a, b = layer(norm(h, f"{at}.norm2") * (1 + scale_2) + shift_2, f"{at}.mlp.w12").chunk(2, -1)
        h = h + gate_2 * layer(F.silu(a) * b, f"{at}.mlp.w3")
    shift, scale = layer(condition, "final_layer.adaLN_modulation.1").chunk(2, -1)
    out = layer(norm(h, "final_layer.norm_final") * (1 + scale) + shift, "final_layer.linear")
    return out.mT.unflatten(2, x.shape[2:])


def test_lightningdit_is_its_equations() -> None:
    state = lightning()
    x, t = torch.randn(2, 6, 4, 4, generator=torch.Generator().manual_seed(3)), torch.tensor([0.2, 0.9])
    labels = torch.tensor([2, 7])
    made = import_model(state, "lightningdit", heads=2).model
    with torch.no_grad():
        ours = -made.network(x, t, labels).value
    torch.testing.assert_close(ours, equations(state, x, t, labels), atol=1e-5, rtol=1e-4)
    assert made.config.inputs == "sit" and made.network.config.details.rope_pairs == "neighbours"  # pyright: ignore


def test_blocks_without_shifts_have_shifts_of_0() -> None:
    state = lightning()
    with_zeros = dict(state)
    for i in (0, 1):
        for kind in ("weight", "bias"):
            name = f"blocks.{i}.adaLN_modulation.1.{kind}"
            shift, scale, gate, shift_2, scale_2, gate_2 = state[name].chunk(6)
            state[name] = torch.cat([scale, gate, scale_2, gate_2])
            none = torch.zeros_like(shift)
            with_zeros[name] = torch.cat([none, scale, gate, none, scale_2, gate_2])
            assert shift_2.any()
    found, expected = (import_model(each, "lightningdit", heads=2).model.state_dict() for each in (state, with_zeros))
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)


# ---- errors ----


def dit_state() -> dict[str, Tensor]:
    return as_dit(peer(**TINY).state_dict()) | {"pos_embed": published_positions(4, 32)[None]}


def test_the_published_files_have_these_tensors() -> None:
    """DiT-XL-2-256x256.pt and SiT-XL-2-256x256.pt: 292 tensors of 675 million numbers."""
    blocks = [f"blocks.{i}.{layer}" for i in range(28) for layer in
              ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2", "adaLN_modulation.1")]  # fmt: skip
    outside = [
        "x_embedder.proj",
        "t_embedder.mlp.0",
        "t_embedder.mlp.2",
        "final_layer.linear",
        "final_layer.adaLN_modulation.1",
    ]
    names = {f"{layer}.{kind}" for layer in (*blocks, *outside) for kind in ("weight", "bias")}
    names |= {"pos_embed", "y_embedder.embedding_table.weight"}
    assert len(names) == 292
    for layout in (LAYOUTS["dit"], LAYOUTS["sit"]):
        every = layout.names | layout.options[0].names
        theirs = {name.replace("{i}", str(i)) for name in every.values() if isinstance(name, str) for i in range(28)}
        assert theirs == names


def test_a_wrong_layout_names_the_right_one() -> None:
    with pytest.raises(DataError, match="--layout dit or sit or lightningdit has exactly these"):
        import_model(dit_state(), "diffusers", heads=2)
    with pytest.raises(DataError, match="--layout lightningdit has exactly these"):
        import_model(lightning(), "dit", heads=2)


def test_tensors_of_no_layout_are_counted() -> None:
    state = dit_state()
    del state["blocks.1.attn.proj.bias"]
    with pytest.raises(DataError, match=r"1 missing, such as blocks\.1\.attn\.proj\.bias") as raised:
        import_model(state | {"extra": torch.zeros(1)}, "dit", heads=2)
    assert "1 surplus, such as extra" in str(raised.value) and "facebookresearch/DiT" in raised.value.fix


def test_what_no_network_here_has_is_an_error() -> None:
    theirs = peer(**TINY)
    settings = dict(theirs.config)
    with pytest.raises(DataError, match=r"config\.json"):
        import_model(theirs.state_dict(), "diffusers")
    with pytest.raises(DataError, match="its activation_fn is geglu"):
        import_model(theirs.state_dict(), "diffusers", settings=settings | {"activation_fn": "geglu"})
    theirs.transformer_blocks[1].norm1.emb.class_embedder.embedding_table.weight.data[0] += 1
    with pytest.raises(DataError, match="different embeddings"):
        import_model(theirs.state_dict(), "diffusers", settings=settings)
    with pytest.raises(UsageError, match="--heads is not given"):
        import_model(dit_state(), "dit")
    with pytest.raises(DataError, match="not finite"):
        import_model(dit_state() | {"pos_embed": torch.full((1, 16, 32), math.nan)}, "dit", heads=2)
    with pytest.raises(DataError, match="another shape"):
        import_model(dit_state() | {"blocks.1.attn.proj.bias": torch.zeros(3)}, "dit", heads=2)
