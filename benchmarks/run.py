"""Host cost of one solver step beside diffusers: what a solver adds to the network, on a state of four numbers.

Both sides get a network that costs nothing, run the same number of steps, interleaved in one process, and report the median
microseconds per step and the ratio. Results go to benchmarks/results/solver_host_cost.json.

    python benchmarks/run.py
"""

import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from midway.gen.runs import environment
from midway.samplers.grids import karras, uniform
from midway.samplers.prediction import Prediction
from midway.samplers.sample import sample
from midway.samplers.schedule import Cosine
from midway.samplers.solvers import SOLVERS

STEPS, REPEATS = 20, 30
OUT = Path(__file__).parent / "results" / "solver_host_cost.json"


def free_field(x: Tensor, t: Tensor) -> Prediction:
    """A network that costs nothing."""
    return Prediction(x, x)


def ours(name: str) -> Callable[[], float]:
    """Seconds of one trajectory of a Midway table; building it is not timed (a table is built once per run)."""
    schedule = Cosine()
    steps = STEPS // SOLVERS[name].evaluations
    table = SOLVERS[name].build(schedule, (karras if name == "dpmpp2m" else uniform)(schedule, steps))
    x = torch.ones(1, 4)

    def run() -> float:
        start = time.perf_counter()
        sample(free_field, table, x)
        return time.perf_counter() - start

    return run


def diffusers_loop(scheduler_name: str) -> Callable[[], float]:
    """Seconds of one trajectory of a diffusers scheduler, as its documentation writes the loop, `set_timesteps` not counted."""
    import diffusers

    scheduler = getattr(diffusers, scheduler_name)()
    x = torch.ones(1, 4)

    def run() -> float:
        state = x
        scheduler.set_timesteps(STEPS)
        start = time.perf_counter()
        for t in scheduler.timesteps:
            state = scheduler.step(scheduler.scale_model_input(state, t), t, state).prev_sample
        return time.perf_counter() - start

    return run


PAIRS = {
    "ddim": "DDIMScheduler",
    "euler": "EulerDiscreteScheduler",
    "dpmpp2m": "DPMSolverMultistepScheduler",
    "heun": "HeunDiscreteScheduler",
}


def main() -> None:
    """Time all pairs, interleaved, and write the JSON."""
    torch.set_num_threads(1)
    rows = {}
    for name, peer in PAIRS.items():
        mine, theirs = ours(name), diffusers_loop(peer)
        mine()
        theirs()
        timed = [(mine(), theirs()) for _ in range(REPEATS)]
        own, other = (statistics.median(side) / STEPS * 1e6 for side in zip(*timed, strict=True))
        rows[name] = {
            "midway_us": round(own, 1),
            "peer": peer,
            "peer_us": round(other, 1),
            "ratio": round(other / own, 1),
        }
        print(f"{name:8s} midway {own:7.1f} us/step   {peer} {other:7.1f} us/step   ratio {other / own:.1f}")
    OUT.parent.mkdir(parents=True, exist_ok=True)
    OUT.write_text(
        json.dumps({"steps": STEPS, "repeats": REPEATS, "environment": environment(), "rows": rows}, indent=2) + "\n"
    )
    print(f"wrote {OUT.relative_to(Path.cwd()) if OUT.is_relative_to(Path.cwd()) else OUT}")


if __name__ == "__main__":
    with torch.no_grad():
        main()
