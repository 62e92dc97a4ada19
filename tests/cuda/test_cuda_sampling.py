"""Sampling on a GPU: the same samples as on the CPU, no synchronisation, graphs. No fixture of conftest.py is used: `make gpu`
runs these tests also where its imports are missing."""

import pytest
import torch
from devices import every_device, on_cuda
from torch import Tensor

from midway.gen.core import randomness
from midway.gen.diffusion.model import Guidance, LatentModel, LatentModelConfig
from midway.gen.networks.dit_config import DiTConfig
from midway.gen.training.batches import Context, LatentBatch
from midway.samplers import grids
from midway.samplers.graph import Graphs
from midway.samplers.parallel import ParallelConfig, sample_parallel
from midway.samplers.prediction import Field, NetworkField
from midway.samplers.sample import ForwardCounter, sample
from midway.samplers.schedule import VP, Cosine
from midway.samplers.solvers import ALIASES, SOLVERS

GUIDED = {"plain": 1.0, "guided": Guidance(2.0), "guided in an interval": Guidance(2.0, (0.3, 2.0))}


def a_model(device: str) -> LatentModel:
    """A small DiT whose output is not zero."""
    torch.manual_seed(0)
    dit = DiTConfig(width=32, depth=2, heads=2)
    model = LatentModel(LatentModelConfig(schedule="vp", target="eps", dit=dit), (4, 4, 4), 10)
    with torch.no_grad():
        for values in model.parameters():
            values.add_(0.05 * torch.randn(values.shape))
    return model.to(device).eval()


@on_cuda
@pytest.mark.parametrize("solver", ["ddim", "dpmpp2m", "heun"])
def test_a_graph_replays_what_eager_gives_without_a_synchronisation(solver: str, device: str) -> None:
    table = SOLVERS[solver].build(Cosine(), grids.uniform(Cosine(), 4))
    net = torch.nn.Linear(8, 8).to(device)

    def make_field(shift: Tensor) -> Field:
        return NetworkField(lambda x, t: net(x) + shift, "v", Cosine())

    graphs = Graphs()
    with torch.no_grad(), ForwardCounter(net) as counter:
        for seed in range(3):
            x, shift = torch.randn(5, 8).to(device) + seed, torch.ones(5, 8).to(device) * seed
            sample(make_field(shift), table, x)  # everything that is made once is made
            before = counter.evaluations
            got = graphs.sample(make_field, table, x, (shift,), counter=counter)
            assert counter.evaluations - before == 5 * table.nfe
            torch.cuda.set_sync_debug_mode("error")
            try:
                expected = sample(make_field(shift), table, x)
            finally:
                torch.cuda.set_sync_debug_mode("default")
            assert torch.equal(got, expected)


@every_device
@pytest.mark.parametrize("how", GUIDED)
def test_a_graph_of_a_latent_model_gives_what_eager_gives(how: str, device: str) -> None:
    """To rounding: a replay may choose other kernels for its products."""
    model, graphs = a_model(device), Graphs()
    table = SOLVERS["dpmpp2m"].build(model.schedule, grids.karras(model.schedule, 6))
    with torch.no_grad():
        for seed in range(2):
            generator = torch.Generator().manual_seed(seed)
            x = torch.randn(3, *model.latent_shape, generator=generator).to(device)
            labels = torch.tensor([seed, 3, 7], device=device)
            got = graphs.sample(lambda labels: model.field(labels, GUIDED[how]), table, x, (labels,))
            expected = sample(model.field(labels, GUIDED[how]), table, x)
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


@every_device
@pytest.mark.parametrize("solver", [name for name in SOLVERS if name not in ALIASES])
def test_a_solver_gives_on_every_device_what_it_gives_on_the_cpu(solver: str, device: str) -> None:
    """In float64, with the same noise where it draws any."""
    table = SOLVERS[solver].build(VP(), grids.karras(VP(), 6))
    weight = torch.randn(8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) / 8
    start = torch.randn(3, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))

    def run(where: str) -> Tensor:
        on = weight.to(where)
        draws = torch.Generator().manual_seed(2)
        field = NetworkField(lambda x, t: x @ on, "eps", VP())
        return sample(field, table, start.to(where), lambda x: torch.randn(x.shape, generator=draws).to(x)).cpu()

    torch.testing.assert_close(run(device), run("cpu"), rtol=1e-10, atol=1e-10)


@every_device
def test_parallel_sampling_ends_where_the_sequential_loop_does(device: str) -> None:
    model = a_model(device)
    table = SOLVERS["ddim"].build(model.schedule, grids.logsnr(model.schedule, 8))
    labels = torch.tensor([1, 2], device=device)
    x = torch.randn(2, *model.latent_shape, generator=torch.Generator().manual_seed(0)).to(device)
    with torch.no_grad():
        found = sample_parallel(
            lambda n: model.field(labels.repeat(n)), table, model.schedule, x, ParallelConfig(tolerance=0)
        )
        torch.testing.assert_close(found.x, sample(model.field(labels), table, x), rtol=1e-3, atol=1e-3)


@every_device
def test_random_words_are_the_same_bits_on_every_device(device: str) -> None:
    """So are the uniform numbers; normals and a loss differ by rounding only."""
    ids = torch.tensor([0, 1, 5, 2**40])
    assert torch.equal(
        randomness.words(3, "noise", 7, ids.to(device), 12).cpu(), randomness.words(3, "noise", 7, ids, 12)
    )
    same = randomness.uniform(3, "time", 7, ids.to(device), (5,)).cpu()
    assert torch.equal(same, randomness.uniform(3, "time", 7, ids, (5,)))
    normal = randomness.normal(3, "noise", 7, ids.to(device), (5,)).cpu()
    torch.testing.assert_close(normal, randomness.normal(3, "noise", 7, ids, (5,)), rtol=1e-6, atol=1e-7)
    latents = torch.randn(4, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    losses = [
        a_model(where).loss(LatentBatch(latents.to(where), ids.to(where) % 10), Context(0, 1, ids.to(where)))[0].item()
        for where in (device, "cpu")
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
