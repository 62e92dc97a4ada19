"""What a solver adds to the network: host time and full-tensor operations of a step, beside diffusers and torchdiffeq.

Both sides get a network that costs nothing and walk 20 steps from a state of few numbers, in turns, in one process on one
thread; a step's time is the process time of a whole trajectory over its steps, lower decile of the turns (what else the
machine does only adds). Before each timed trajectory the same side walks one untimed, or the shorter one would mostly be charged
for what the other left in the processor's caches. `set_timesteps` of a scheduler is not timed, nor is building a table.
Operations are those whose result is as large as the state, views aside.

Parallel sampling: waves until the end state is within 1e-4 (relative) of the sequential one, on a Gaussian mixture.

With a GPU also, for a DiT-S on 16x16 latents: what a trajectory takes beyond its forward passes, with CUDA graph and without;
the latency of one image beside the loop of a diffusers pipeline; and parallel sampling's wall-clock beside the graphed
sequential loop.

    python benchmarks/samplers.py --out benchmarks/results/samplers.json
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from midway.gen.diffusion.model import LatentModel, LatentModelConfig
from midway.gen.networks.dit_config import DiTConfig
from midway.samplers.graph import Graphs
from midway.samplers.grids import karras, logsnr, uniform
from midway.samplers.parallel import ParallelConfig, sample_parallel
from midway.samplers.prediction import NetworkField, at
from midway.samplers.sample import sample
from midway.samplers.schedule import EDM, VP, Linear
from midway.samplers.solvers import SOLVERS
from midway.samplers.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "support"))
sys.path.insert(0, str(Path(__file__).resolve().parent))
from common import Result, conclude, printed, process_seconds
from oracles import mixture

STEPS = 20
STATE = 7  # numbers in a state: so few that only the host's work costs, and as many as no solver's own small matrix has
Trajectory = Callable[[], Tensor]
"""A whole trajectory from the same start; returns its end."""


# ---- host cost ----

PAIRS = {  # solver: (scheduler, its options, least ratio, most microseconds of ours)
    "euler": ("EulerDiscreteScheduler", {}, 1.0, 5.0),
    "ddim": ("DDIMScheduler", {}, 1.0, 5.0),
    "heun": ("HeunDiscreteScheduler", {}, 1.0, None),
    "dpmpp2m": ("DPMSolverMultistepScheduler", {"solver_order": 2}, 10.0, None),
    "dpmpp3m": ("DPMSolverMultistepScheduler", {"solver_order": 3}, 10.0, None),
    "unipc2": ("UniPCMultistepScheduler", {"solver_order": 2}, 30.0, None),
    "unipc3": ("UniPCMultistepScheduler", {"solver_order": 3}, 30.0, None),
    "deis3": ("DEISMultistepScheduler", {"solver_order": 3}, 10.0, None),
    "ipndm4": ("IPNDMScheduler", {}, 1.0, None),
}
FIXED_GRID = {
    "euler": "euler",
    "midpoint": "midpoint",
    "heun": "heun2",
    "rk38": "rk4",
}  # torchdiffeq's rk4 is the 3/8 rule


def free_network(x: Tensor, t: Tensor) -> Tensor:
    """It costs nothing."""
    return x


def our_trajectory(name: str, schedule: Any = None, target: Any = "eps") -> Trajectory:
    """A solver's table from a state of few numbers."""
    schedule = schedule or VP()
    table = SOLVERS[name].build(schedule, karras(schedule, STEPS))
    field, x = NetworkField(free_network, target, schedule), torch.ones(1, STATE)
    return lambda: sample(field, table, x)


def scheduler_trajectory(name: str, options: dict[str, Any]) -> tuple[Callable[[], None], Trajectory]:
    """How a diffusers scheduler is made ready, and the loop that its documentation shows."""
    import diffusers

    scheduler, x = getattr(diffusers, name)(**options), torch.ones(1, STATE)

    def loop() -> Tensor:
        state = x
        for t in scheduler.timesteps:
            state = scheduler.step(scheduler.scale_model_input(state, t), t, state).prev_sample
        return state

    return lambda: scheduler.set_timesteps(STEPS), loop


def flow_trajectory() -> tuple[Callable[[], None], Trajectory]:
    """FlowMatchEulerDiscreteScheduler, which scales nothing."""
    import diffusers

    scheduler, x = diffusers.FlowMatchEulerDiscreteScheduler(), torch.ones(1, STATE)

    def loop() -> Tensor:
        state = x
        for t in scheduler.timesteps:  # pyright: ignore[reportOptionalIterable]
            state = scheduler.step(state, t, state).prev_sample  # pyright: ignore
        return state

    return lambda: scheduler.set_timesteps(STEPS), loop


def torchdiffeq_trajectory(method: str) -> Trajectory:
    """A fixed-grid method of torchdiffeq on the same grid."""
    import torchdiffeq

    times, x = torch.tensor(karras(VP(), STEPS)), torch.ones(1, STATE)
    return lambda: torchdiffeq.odeint(lambda t, y: y, x, times, method=method)[-1]  # pyright: ignore


class FullTensorOperations(TorchDispatchMode):
    """Counts operations whose result is as large as the state and not a view."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size, self.count = size, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.count += isinstance(out, Tensor) and out.numel() == self.size and not func.is_view
        return out


def operations(trajectory: Trajectory) -> float:
    """Full-tensor operations of a step, of a state of few numbers."""
    with FullTensorOperations(STATE) as mode:
        trajectory()
    return round(mode.count / STEPS, 2)


def host_cost(
    name: str,
    ours: Trajectory,
    peer_name: str,
    peer: Trajectory,
    ready: Callable[[], None],
    ratio: float,
    most: float | None,
    turns: int,
) -> Result:
    """Both in turns, each right after the same trajectory untimed."""
    pairs = []
    for _ in range(turns + 3):
        ours()
        mine = process_seconds(ours)
        ready()
        peer()
        ready()
        pairs.append((mine, process_seconds(peer)))
    mine, theirs = (statistics.quantiles(side, n=10)[0] / STEPS * 1e6 for side in zip(*pairs[3:], strict=True))
    own_operations = operations(ours)
    ready()
    wanted = f"peer / ours >= {ratio:g}" + (f", ours <= {most:g} us" if most else "")
    return Result(
        name,
        "us/step",
        round(mine, 2),
        peer_name,
        round(theirs, 2),
        round(theirs / mine, 2),
        wanted,
        theirs / mine >= ratio and (most is None or mine <= most),
        own_operations,
        operations(peer),
    )


def one_operation(turns: int) -> Result:
    """What a single addition of the same size costs on this machine: every figure below is a multiple of it."""
    x = torch.ones(1, STATE)

    def twenty() -> Tensor:
        y = x
        for _ in range(STEPS):
            y = torch.add(y, x, alpha=0.5)
        return y

    seconds = statistics.quantiles([process_seconds(twenty) for _ in range(turns)], n=10)[0]
    return Result("torch.add alone", "us", round(seconds / STEPS * 1e6, 2), "", None, None, "", None)


def host_rows(turns: int) -> list[Result]:
    """Every pair."""
    rows = [one_operation(turns)]
    for name, (scheduler, options, ratio, most) in PAIRS.items():
        ready, peer = scheduler_trajectory(scheduler, options)
        rows.append(host_cost(name, our_trajectory(name), scheduler, peer, ready, ratio, most, turns))
    ready, peer = flow_trajectory()
    flow = our_trajectory("euler", Linear(), "velocity")
    rows.append(host_cost("euler (flow)", flow, "FlowMatchEuler", peer, ready, 1.0, 5.0, turns))
    for name, method in FIXED_GRID.items():
        peer = torchdiffeq_trajectory(method)
        rows.append(
            host_cost(name, our_trajectory(name), f"torchdiffeq {method}", peer, lambda: None, 1.0, None, turns)
        )
    return rows


# ---- parallel in time ----


def wave_rows() -> list[Result]:
    """Waves of the quasi-Newton iteration and of Picard's, beside the steps of the sequential loop."""
    rows = []
    for steps in (20, 50, 100):
        schedule = EDM()  # where the velocity is the noise, as in Picard's published form
        table = SOLVERS["ddim"].build(schedule, logsnr(schedule, steps))
        x = torch.randn(16, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 80
        field = mixture().field(schedule)
        exact = sample(field, table, x)
        waves = {method: _waves(field, table, schedule, x, exact, method) for method in ("gaussian", "picard")}
        ours, peer = waves["gaussian"], waves["picard"]
        most = steps / 5
        held = ours <= most if steps == 50 else None
        target = f"ours <= {most:g} waves" if steps == 50 else ""
        rows.append(Result(f"waves, N = {steps}", "waves", ours, "Picard", peer, round(peer / ours, 2), target, held))
    return rows


def _waves(field: Any, table: Table, schedule: Any, x: Tensor, exact: Tensor, method: Any) -> int:
    """The fewest waves, over tolerances, that bring the end to 1e-4 of the sequential one."""
    best = table.nfe
    for tolerance in (1e-2, 3e-3, 1e-3, 3e-4, 1e-4, 3e-5):
        config = ParallelConfig(method=method, tolerance=tolerance)
        found = sample_parallel(lambda copies: field, table, schedule, x, config)
        error = ((found.x - exact).square().mean().sqrt() / exact.square().mean().sqrt()).item()
        best = min(best, found.waves) if error <= 1e-4 else best
    return best


# ---- on a GPU ----


@dataclass(frozen=True)
class Network:
    """The DiT of the GPU rows."""

    width: int = 384
    depth: int = 12
    heads: int = 6
    size: int = 16


def make_model(network: Network, device: torch.device) -> LatentModel:
    """Random weights, none of them zero: an untrained DiT's output is, and then parallel sampling has nothing to find."""
    torch.manual_seed(0)
    dit = DiTConfig(width=network.width, depth=network.depth, heads=network.heads)
    model = LatentModel(LatentModelConfig(schedule="vp", target="eps", dit=dit), (4, network.size, network.size), 1000)
    for values in model.parameters():
        values.data.add_(0.02 * torch.randn(values.shape))
    return model.to(device).eval()


def elapsed(work: Callable[[], object], device: torch.device, repeats: int) -> float:
    """Median wall-clock seconds, the device waited for."""
    found = []
    for _ in range(repeats + 2):
        _wait(device)
        start = time.perf_counter()
        work()
        _wait(device)
        found.append(time.perf_counter() - start)
    return statistics.median(found[2:])


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def device_rows(device: torch.device, network: Network, batches: tuple[int, ...], repeats: int) -> list[Result]:
    """Overhead over the forward passes, latency beside a diffusers loop, parallel sampling beside the graph."""
    model, rows = make_model(network, device), []
    table = SOLVERS["dpmpp2m"].build(model.schedule, karras(model.schedule, 10))
    for batch in batches:
        rows += overhead_rows(model, table, batch, device, repeats)
    rows.append(latency_row(model, device, repeats))
    rows += [parallel_row(model, steps, device, repeats) for steps in (20, 50, 100)]
    return rows


def overhead_rows(model: LatentModel, table: Table, batch: int, device: torch.device, repeats: int) -> list[Result]:
    """(T - NFE T_forward) / T, with T_forward that of a graphed forward for the graph, of an eager one for eager."""
    labels = torch.zeros(batch, dtype=torch.int64, device=device)
    x = torch.randn(batch, *model.latent_shape, device=device)
    times = table.times[:1]
    forward = Table("forward", (table.grid[0], table.grid[1]), (0, 1), table.rows[:1], schedule=table.schedule)
    captured = Graphs()
    evaluate = at(model.field(labels), times, x).values[0]
    ways = {
        "graph": lambda which: captured.sample(model.field, which, x, (labels,)),
        "eager": lambda which: evaluate(x) if which is forward else sample(model.field(labels), which, x),
    }
    rows = []
    for how, run in ways.items():
        one = elapsed(partial(run, forward), device, repeats)
        whole = elapsed(partial(run, table), device, repeats)
        share = (whole - table.nfe * one) / whole
        judged = how == "graph" and batch == 1 and device.type == "cuda"
        target, held = ("<= 0.02", share <= 0.02) if judged else ("", None)
        rows.append(Result(f"overhead, {how}, B = {batch}", "share", round(share, 4), "", None, None, target, held))
    return rows


def diffusers_loop(model: LatentModel, name: str, steps: int, x: Tensor, labels: Tensor) -> Trajectory:
    """The loop of a diffusers pipeline over the same network; ModuleNotFoundError without diffusers."""
    import diffusers

    scheduler = getattr(diffusers, name)()

    def loop() -> Tensor:
        scheduler.set_timesteps(steps, device=x.device)
        state = x
        for t in scheduler.timesteps:
            scaled = scheduler.scale_model_input(state, t)
            value = model.network(scaled, (t / 1000).expand(len(x)), labels).value
            state = scheduler.step(value, t, state).prev_sample
        return state

    return loop


def latency_row(model: LatentModel, device: torch.device, repeats: int) -> Result:
    """One image in 5 evaluations: our graph beside the eager loop of a diffusers pipeline over the same network."""
    table = SOLVERS["ddim"].build(model.schedule, uniform(model.schedule, 5))
    labels = torch.zeros(1, dtype=torch.int64, device=device)
    x, graphs = torch.randn(1, *model.latent_shape, device=device), Graphs()
    loop = diffusers_loop(model, "DDIMScheduler", 5, x, labels)
    with torch.no_grad():
        theirs = elapsed(loop, device, repeats)
        ours = elapsed(lambda: graphs.sample(model.field, table, x, (labels,)), device, repeats)
    ratio = theirs / ours
    target, held = ("peer / ours >= 3", ratio >= 3) if device.type == "cuda" else ("", None)
    return Result(
        "latency, 5 NFE, B = 1",
        "ms",
        round(ours * 1e3, 3),
        "diffusers loop",
        round(theirs * 1e3, 3),
        round(ratio, 2),
        target,
        held,
    )


def parallel_row(model: LatentModel, steps: int, device: torch.device, repeats: int) -> Result:
    """Parallel in time beside the sequential loop in one graph; reported, not judged."""
    table = SOLVERS["ddim"].build(model.schedule, logsnr(model.schedule, steps))
    labels = torch.zeros(1, dtype=torch.int64, device=device)
    x, graphs = torch.randn(1, *model.latent_shape, device=device), Graphs()

    def parallel() -> Tensor:
        return sample_parallel(lambda n: model.field(labels.repeat(n)), table, model.schedule, x).x

    with torch.no_grad():
        ours = elapsed(parallel, device, repeats)
        theirs = elapsed(lambda: graphs.sample(model.field, table, x, (labels,)), device, repeats)
    name = f"parallel in time, N = {steps}, B = 1"
    return Result(
        name, "ms", round(ours * 1e3, 2), "sequential", round(theirs * 1e3, 2), round(theirs / ours, 2), "", None
    )


# ---- the table ----


def main() -> int:
    """Print the table, write the JSON; 1 when a target was missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "samplers.json")
    parser.add_argument("--turns", type=int, default=200, help="trajectories of each side")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    torch.set_num_threads(1)
    with torch.no_grad():
        makers = [lambda: host_rows(arguments.turns), wave_rows]
        if device.type == "cuda":
            makers.append(lambda: device_rows(device, Network(), (1, 16, 256), 20))
        rows = printed(makers, last_column="operations a step")
    return conclude(rows, arguments.out, device.type)


if __name__ == "__main__":
    sys.exit(main())
