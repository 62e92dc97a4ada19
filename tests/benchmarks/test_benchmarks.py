"""The benchmarks: what they count, judge, print and write, and that both sides of a comparison do the same work.

How fast anything is depends on the machine and is no test's business: where speed matters here, the clock is one of our own.
"""

import json
import math
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from benchmark_modules import Report, as_before, benchmark, run_main
from pipelines import Pipeline
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from midway.gen.diffusion.load import TrainedModel
from midway.gen.diffusion.sampling import sample_latents
from midway.gen.training.batches import Context
from midway.gen.training.config import TrainConfig
from midway.gen.training.interface import Items
from midway.samplers.grids import GRIDS, karras
from midway.samplers.learned_solver import LEARNED
from midway.samplers.plugin import BASES
from midway.samplers.sample import ForwardCounter
from midway.samplers.solvers import SOLVERS

CPU = torch.device("cpu")
ON_CPU = ("--device", "cpu")


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    with as_before():
        yield


# ---- samplers.py ----


@pytest.fixture(scope="module")
def samplers() -> ModuleType:
    pytest.importorskip("diffusers", reason="the peer that solvers are measured beside")
    pytest.importorskip("torchdiffeq", reason="the peer that Runge-Kutta methods are measured beside")
    return benchmark("samplers")


@pytest.fixture(scope="module")
def report(samplers: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Report:
    """All rows that need no GPU, three turns each."""
    return run_main(samplers, tmp_path_factory.mktemp("samplers") / "made" / "samplers.json", *ON_CPU, "--turns", 3)


def test_every_solver_has_a_row_that_is_judged_and_printed(samplers: ModuleType, report: Report) -> None:
    rows = report.json["rows"]
    fixed = [(name, f"torchdiffeq {method}") for name, method in samplers.FIXED_GRID.items()]
    waves = [(f"waves, N = {steps}", "Picard") for steps in (20, 50, 100)]
    pairs = [(name, peer) for name, (peer, *_) in samplers.PAIRS.items()]
    wanted = [("torch.add alone", ""), *pairs, ("euler (flow)", "FlowMatchEuler"), *fixed, *waves]
    assert [(row["name"], row["peer_name"]) for row in rows] == wanted
    assert [row["name"] for row in rows if row["held"] is None] == [
        "torch.add alone",
        "waves, N = 20",
        "waves, N = 100",
    ]
    assert report.code == int(any(row["held"] is False for row in rows))
    _, *lines, last = report.lines
    assert last.startswith("wrote ")
    for row, printed in zip(rows, lines, strict=True):
        assert set(row) == {field.name for field in fields(samplers.Result)}
        assert printed.startswith(row["name"]) and row["target"] in printed
        assert {True: "yes", False: "NO", None: "-"}[row["held"]] in printed.split()
        assert (row["unit"] == "us/step") == (row["operations"] is not None)
        if row["peer"] is not None:
            assert row["ratio"] == pytest.approx(row["peer"] / row["ours"], rel=0.02)
    waves_rows = [row for row in rows if row["unit"] == "waves"]
    assert all(1 < row["ours"] < row["peer"] for row in waves_rows), "quasi-Newton needs fewer waves than Picard"


@pytest.mark.parametrize(("held", "code"), [((), 0), ((None, True), 0), ((True, False, None), 1)])
def test_a_missed_target_is_an_exit_code(
    held: tuple[bool | None, ...], code: int, samplers: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    rows = [samplers.Result("a", "us", 2.0, "b", 4.0, 2.0, "peer / ours >= 1", one) for one in held]
    monkeypatch.setattr(samplers, "host_rows", lambda turns: rows)
    monkeypatch.setattr(samplers, "wave_rows", list)
    done = run_main(samplers, tmp_path / "samplers.json", *ON_CPU)
    assert done.code == code
    assert [row["held"] for row in done.json["rows"]] == list(held)


def test_the_cost_of_a_step_is_the_lower_decile_of_turns(samplers: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a clock of our own: first turns and slow ones do not count, and each side is timed right after itself, ready again."""
    done: list[str] = []

    def seconds(trajectory: Callable[[], str]) -> float:
        turn = (done.count("ours") - 1) // 2
        scale = 1e-3 if turn < 3 else 50 if turn % 2 else 1
        return {"ours": 80e-6, "peer": 800e-6}[trajectory()] * scale

    def side(name: str) -> Callable[[], str]:
        return lambda: done.append(name) or name

    monkeypatch.setattr(samplers, "process_seconds", seconds)
    for ratio, most, held in ((9.0, None, True), (11.0, None, False), (9.0, 5.0, True), (9.0, 3.0, False)):
        done.clear()
        row = samplers.host_cost("a", side("ours"), "b", side("peer"), lambda: done.append("ready"), ratio, most, 20)
        assert done[: 6 * 23] == ["ours", "ours", "ready", "peer", "ready", "peer"] * 23
        assert (row.ours, row.peer, row.ratio, row.held) == (4.0, 40.0, 10.0, held)


def test_full_tensor_operations_are_counted(samplers: ModuleType) -> None:
    """Those of the state's size, in place too; neither views nor smaller results."""
    x = torch.ones(1, 4)
    for work, count in (
        (lambda: x * 2 + 1, 2),
        (lambda: x.clone().add_(x), 2),
        (lambda: x.view(2, 2).mT[None], 0),
        (lambda: x.sum() * 2, 0),
        (lambda: torch.ones(1, 8) * 2, 0),
    ):
        with samplers.FullTensorOperations(4) as mode:
            work()
        assert mode.count == count
    assert samplers.operations(lambda: torch.ones(1, samplers.STATE) + 1) == 2 / samplers.STEPS
    assert samplers.operations(samplers.our_trajectory("euler")) == 2


def test_both_sides_walk_as_many_steps(samplers: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps of a scheduler and evaluations of ours: 20 for each stage, but that diffusers' Heun ends on Euler's step."""
    import diffusers
    import torchdiffeq

    done: Counter[str] = Counter()

    def counted(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            done[name] += 1
            return function(*arguments, **named)

        return call

    odeint = torchdiffeq.odeint
    monkeypatch.setattr(samplers, "free_network", counted("ours", samplers.free_network))
    monkeypatch.setattr(torchdiffeq, "odeint", lambda f, *a, **named: odeint(counted("peer", f), *a, **named))
    for name in {*(scheduler for scheduler, *_ in samplers.PAIRS.values()), "FlowMatchEulerDiscreteScheduler"}:
        scheduler = getattr(diffusers, name)
        monkeypatch.setattr(scheduler, "step", counted("peer", scheduler.step))
    sides: list[tuple[str, Callable[[], None] | None, Callable[[], Tensor]]]
    sides = [(name, *samplers.scheduler_trajectory(*pair[:2])) for name, pair in samplers.PAIRS.items()]
    sides += [("euler", *samplers.flow_trajectory())]
    sides += [(name, None, samplers.torchdiffeq_trajectory(method)) for name, method in samplers.FIXED_GRID.items()]
    for name, ready, peer in sides:
        done.clear()
        if ready is not None:
            ready()
        ends = samplers.our_trajectory(name)(), peer()
        assert all(end.shape == (1, samplers.STATE) and end.isfinite().all() for end in ends)
        stages = SOLVERS[name].evaluations
        shorter = name == "heun" and ready is not None
        assert done == {"ours": 20 * stages, "peer": 20 * stages - shorter}, name


# ---- samplers.py: the rows of a GPU, on the CPU ----


def test_the_rows_of_a_gpu_are_made_for_any_network(samplers: ModuleType) -> None:
    with torch.no_grad():
        rows = samplers.device_rows(CPU, samplers.Network(32, 2, 4, 4), (1, 2), 1)
    overhead = [f"overhead, {how}, B = {batch}" for batch in (1, 2) for how in ("graph", "eager")]
    parallel = [f"parallel in time, N = {steps}, B = 1" for steps in (20, 50, 100)]
    assert [row.name for row in rows] == [*overhead, "latency, 5 NFE, B = 1", *parallel]
    for row in rows:
        assert all(math.isfinite(value) for value in (row.ours, row.peer, row.ratio) if value is not None)
        assert (row.unit == "share") == (row.peer is None) == (row.ratio is None)
        assert row.held is None and not row.target  # judged on a GPU, or never


def test_both_sides_of_a_gpu_row_make_as_many_forward_passes(samplers: ModuleType) -> None:
    """Three timings of each: overhead weighs whole trajectories against single passes, twice; latency two loops of 5."""
    model = samplers.make_model(samplers.Network(32, 2, 4, 4), CPU)
    table = SOLVERS["dpmpp2m"].build(model.schedule, karras(model.schedule, 10))
    with torch.no_grad(), ForwardCounter(model.network) as forward:
        samplers.overhead_rows(model, table, 2, CPU, 1)
        assert forward.evaluations == 2 * 2 * 3 * (1 + table.nfe)
        forward.evaluations = 0
        samplers.latency_row(model, CPU, 1)
        assert forward.evaluations == 2 * 3 * 5


# ---- training.py ----


@pytest.fixture(scope="module")
def training() -> ModuleType:
    return benchmark("training")


@pytest.fixture
def stepped() -> Iterator[Counter[torch.optim.Optimizer]]:
    """How many steps every optimizer of this process takes."""
    done: Counter[torch.optim.Optimizer] = Counter()
    hook = register_optimizer_step_post_hook(lambda optimizer, arguments, named: done.update([optimizer]))
    yield done
    hook.remove()


def test_there_is_a_row_for_every_recipe(training: ModuleType) -> None:
    pytest.importorskip("diffusers", reason="the peer of one row")
    rows = [make() for make in training.rows_for(CPU)]
    assert [row.name for row in rows] == [*training.TOKENIZERS, *training.LATENT_MODELS, "UNet2DModel"]
    row = training.latent_row("digits-dit", CPU, "bf16", True)
    assert (row.name, row.config.precision, row.config.compile) == ("digits-dit bf16 compiled", "bf16", True)


@pytest.mark.parametrize("name", ["digits-fsq", "digits-vq", "digits-dit", "UNet2DModel"])
def test_fit_and_its_peer_take_as_many_steps(
    name: str, training: ModuleType, stepped: Counter[torch.optim.Optimizer], monkeypatch: pytest.MonkeyPatch
) -> None:
    if name == "UNet2DModel":
        pytest.importorskip("diffusers", reason="the peer of this row")
    monkeypatch.setattr(training, "UNTIMED_TURNS", 1)
    makers = {"digits-dit": training.latent_row, "UNet2DModel": lambda _, *a: training.diffusers_row(*a[:2])}
    row = makers.get(name, training.tokenizer_row)(name, CPU, "no", False)
    before = [p.clone() for p in row.model.parameters()]
    pairs = training.take_turns(row, 1, CPU)
    assert len(pairs) == 1, "the untimed turn is left out"
    assert all(seconds > 0 for seconds in pairs[0])
    assert list(stepped.values()) == [2, 2]
    ours, theirs = ([p for group in optimizer.param_groups for p in group["params"]] for optimizer in stepped)
    assert sum(p.numel() for p in ours) == sum(p.numel() for p in theirs) == sum(p.numel() for p in before)
    assert all(torch.equal(p, q) for p, q in zip(row.model.parameters(), before, strict=True)), "each trains a copy"


def test_the_bare_loop_of_a_tokenizer_has_the_loss_of_fit(training: ModuleType) -> None:
    row, items = training.tokenizer_row("digits-fsq", CPU, "no", False), torch.arange(100, 164)
    model, loss_of, size, config, device = row.peer.args
    assert (model, size, config, device) == (row.model, row.items.size, row.config, CPU)
    ours, _ = row.model.loss(row.items.read(items), Context(0, 0, items))
    torch.testing.assert_close(loss_of(model, items), ours)


def test_the_bare_loop_of_a_latent_model_has_the_loss_of_fit(training: ModuleType) -> None:
    """Each draws its own noise, so only over many samples; weights that are not adaLN-zero's, with which the network is 0."""
    torch.manual_seed(0)
    row = training.latent_row("digits-dit", CPU, "no", False)
    model, loss_of, size, *_ = row.peer.args
    items = torch.arange(size)
    with torch.no_grad():
        for values in model.parameters():
            values.add_(0.05 * torch.randn(values.shape))
        ours, _ = row.model.loss(row.items.read(items), Context(0, 0, items))
        theirs = loss_of(model, items)
    assert ours.item() > 1.05
    assert theirs.item() == pytest.approx(ours.item(), rel=0.03)


def test_batches_of_the_bare_loop_go_through_all_items(training: ModuleType) -> None:
    batches = training.shuffled(10, 4)
    epochs = torch.cat([next(batches) for _ in range(5)]).view(2, 10)
    assert torch.equal(epochs.sort().values, torch.arange(10).expand(2, 10))
    assert len(next(training.shuffled(3, 8))) == 8


class Clock:
    """Moves only on demand, so that a ratio of speeds is known beforehand."""

    def __init__(self) -> None:
        self.now, self.peers = 0.0, 0

    def row(self, training: ModuleType, name: str, ours: float, peer: float, target: float) -> Any:
        """A training of one number, whose steps take `ours` seconds and those of its peer `peer`."""
        clock = self

        class Model(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.x = nn.Parameter(torch.ones(()))

            def loss(self, batch: Tensor, context: Context) -> tuple[Tensor, dict[str, Tensor]]:
                clock.now += ours
                return (self.x * batch).mean(), {}

            def after_step(self, step_ok: Tensor) -> None:
                """Nothing to do between optimizer steps."""

        def steps() -> Iterator[None]:
            clock.peers += 1
            while True:
                clock.now += peer
                yield

        config = TrainConfig(batch_size=16, warmup=0)
        return training.Row(name, "a loop", Model(), Items(lambda items: items.float(), 40), config, steps, target)


@pytest.fixture
def clock(training: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(training.TakingTurns, "_now", lambda self: made.now)
    return made


@pytest.mark.parametrize("target", [2.4, 2.6])
def test_a_training_row_is_the_ratio_of_times_per_step(target: float, training: ModuleType, clock: Clock) -> None:
    """2 seconds a step beside 5, for about the given seconds, at least 20 turns, the first few of which are not counted."""
    found = training.measure(clock.row(training, "a", 2.0, 5.0, target), 7.0 * 26, CPU)
    assert (found["ratio"], found["error"], found["turns"], found["held"]) == (2.5, 0.0, 26, target < 2.5)
    assert (found["ours_images_per_second"], found["peer_images_per_second"]) == (8.0, 3.2)
    assert clock.peers == 2, "the peer begins anew"


@pytest.mark.parametrize(("only", "names", "code"), [("", ["slow", "fast"], 1), ("fas", ["fast"], 0)])
def test_the_training_benchmark_prints_and_writes_its_rows(
    only: str,
    names: list[str],
    code: int,
    training: ModuleType,
    clock: Clock,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    rows = [clock.row(training, "slow", 2.0, 1.0, 1.0), clock.row(training, "fast", 1.0, 2.0, 1.0)]
    monkeypatch.setattr(training, "rows_for", lambda device: [lambda row=row: row for row in rows])
    done = run_main(training, tmp_path / "made" / "training.json", *ON_CPU, "--seconds", 0, "--only", only)
    assert done.code == code
    assert [(row["name"], row["held"]) for row in done.json["rows"]] == [(name, name == "fast") for name in names]
    assert {"device", "environment"} <= set(done.json)
    _, *lines, last = done.lines
    assert last.startswith("wrote ")
    assert [line.split()[0] for line in lines] == names
    assert [("yes" in line, "NO" in line) for line in lines] == [(n == "fast", n == "slow") for n in names]


def test_the_training_benchmark_raises_for_a_name_that_no_row_has(
    training: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(training, "rows_for", lambda device: [])
    with pytest.raises(SystemExit) as caught:
        run_main(training, tmp_path / "training.json", *ON_CPU, "--only", "nothing")
    assert caught.value.code == 2
    assert not (tmp_path / "training.json").exists()


# ---- amed_ablation.py ----


@pytest.fixture(scope="module")
def ablation() -> ModuleType:
    return benchmark("amed_ablation")


def _task(ablation: ModuleType, pipeline: Pipeline, out: Path) -> Any:
    """The smallest: 8 held-out samples, two optimizer steps."""
    sizes = {"n": 8, "reference_steps": 10, "trajectories": 6, "steps": 2, "batch_size": 4}
    return ablation.Ablation(pipeline.model, out, nfe=(4, 5), **sizes)


def _reached(trained: TrainedModel, ablation: ModuleType, name: str, steps: int, analytic: bool, grid: str) -> Tensor:
    """The held-out samples as `sample_latents` makes them from their seeds."""
    schedule = trained.model.schedule
    table = SOLVERS[name].build(schedule, GRIDS[grid](schedule, steps), analytic)
    return sample_latents(trained, table, ablation.FIRST_HELD_OUT + torch.arange(8)).latents


def test_unlearned_rows_are_distances_to_the_fine_solution(
    ablation: ModuleType, pipeline: Pipeline, tmp_path: Path
) -> None:
    """Odd budgets take the first slope analytically; a budget that a solver cannot make has no row."""
    trained, task = pipeline.load(), _task(ablation, pipeline, tmp_path / "a.json")
    data = ablation.held_out(trained, task, CPU)
    assert data.noise.shape == data.exact.shape == (8, *trained.model.latent_shape)
    exact = _reached(trained, ablation, "unipc3", 10, False, "logsnr")
    torch.testing.assert_close(data.exact, exact, rtol=1e-4, atol=1e-4)
    for name, nfe, steps in (("ddim", 4, 4), ("ddim", 5, 6), ("dpm2", 4, 2), ("dpm2", 5, 3)):
        row = ablation.plain(trained, data, name, "uniform", nfe)
        assert (row.solver, row.mode, row.grid, row.teacher, row.nfe) == (name, "", "uniform", "", nfe)
        assert (row.rmse_start, row.training_nfe, row.seconds) == (None, 0, 0.0)
        reached = _reached(trained, ablation, name, steps, nfe == 5, "uniform")
        assert row.rmse == pytest.approx((reached - exact).square().mean().sqrt().item(), rel=1e-3)
    assert ablation.plain(trained, data, "rk38", "uniform", 6) is None


@pytest.mark.parametrize("nfe", [4, 5])
@pytest.mark.parametrize(
    ("name", "mode", "grid", "teacher"),
    [
        ("amed", "per_step", "uniform", ("dpmpp2m", "uniform", 6)),
        ("amed-predictor", "end_to_end", "uniform", ("unipc3", "logsnr", 6)),
        ("amed-plugin-dpmpp2m", "end_to_end", "gits", ("heun", "logsnr", 6)),
        ("amed", "end_to_end", "uniform", ("heun", "karras", 6)),
    ],
)
def test_learned_rows_count_their_training(
    name: str,
    mode: str,
    grid: str,
    teacher: tuple[str, str, int],
    nfe: int,
    ablation: ModuleType,
    pipeline: Pipeline,
    tmp_path: Path,
) -> None:
    """Everything that goes through the network is training, but for measuring the solver before and after."""
    trained = replace(pipeline.load(), hash=f"of this test {name} {nfe}")  # whose grids are not fitted yet
    task = _task(ablation, pipeline, tmp_path / "a.json")
    data = ablation.held_out(trained, task, CPU)
    with ForwardCounter(trained.model.network) as network:
        row = ablation.learn(trained, task, data, ablation.Variant(name, mode, grid, teacher), nfe)
    assert (row.solver, row.mode, row.grid, row.nfe) == (name, mode, grid, nfe)
    assert row.teacher == f"{teacher[0]}, {teacher[2]} on {teacher[1]}"
    assert row.training_nfe == network.evaluations - 2 * nfe * task.n
    assert math.isfinite(row.rmse)
    assert row.rmse != row.rmse_start, "something was learned"
    if name == "amed":  # before learning it is DPM-Solver-2
        start = ablation.plain(trained, data, "dpm2", "uniform", nfe).rmse
        assert row.rmse_start == pytest.approx(start, rel=1e-3)


def test_every_variant_is_a_solver_that_can_be_learned(ablation: ModuleType) -> None:
    found = list(ablation.variants())
    assert len(set(found)) == len(found)
    assert {variant.name for variant in found} <= set(LEARNED)
    assert {LEARNED[variant.name].base for variant in found} == {"none", *ablation.BASES} <= set(BASES)
    assert {variant.mode for variant in found} == {"per_step", "end_to_end"}
    assert {variant.grid for variant in found} == {"uniform", "gits"}
    assert {variant.teacher for variant in found} == {*ablation.TEACHERS, ablation.Variant("amed").teacher}
    assert {teacher[0] for teacher in ablation.TEACHERS} | {*ablation.UNLEARNED} <= set(SOLVERS)


def test_the_ablation_writes_every_row_at_every_budget(
    ablation: ModuleType,
    pipeline: Pipeline,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    monkeypatch.setattr(ablation, "best_device", lambda: CPU)
    monkeypatch.setattr(ablation, "UNLEARNED", ("ddim", "rk38"))
    monkeypatch.setattr(ablation, "variants", lambda: iter([ablation.Variant("amed")]))
    task = _task(ablation, pipeline, tmp_path / "ablation.json")
    ablation.main(task)
    found = json.loads(task.out.read_text())
    assert set(found) == {"model", "model_hash", "task", "seconds", "environment", "results"}
    assert found["model_hash"] == pipeline.load().hash
    assert found["task"]["nfe"] == [4, 5]
    assert found["task"]["out"] == str(task.out)
    wanted = [("ddim", 4), ("ddim", 5), ("rk38", 4), ("ddim", 4), ("ddim", 5), ("rk38", 4), ("amed", 4), ("amed", 5)]
    assert [(row["solver"], row["nfe"]) for row in found["results"]] == wanted
    for row in found["results"]:
        assert set(row) == {field.name for field in fields(ablation.Result)}
    out = capsys.readouterr().out
    assert ablation.text([ablation.Result(**row) for row in found["results"]]) in out
    assert f"written: {task.out}" in out


# ---- precision.py ----


@pytest.mark.slow
def test_both_precisions_are_timed_and_trained(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    module = benchmark("precision")
    monkeypatch.setattr(module, "WIDTHS", {"conv": (16,), "vit": (16,)})
    monkeypatch.setattr(module, "QUALITY", {"narrow": ("digits-fsq", {"width": 16})})
    report = run_main(module, tmp_path / "precision.json", "--turns", 2, "--seeds", 2, "--steps", 2)
    rows = {row["name"]: row for row in report.json["speed"]}
    assert {"conv tokenizer, 8 px, 4x down, width 16", "vit tokenizer, 32 px, 8x down, width 16"} < rows.keys()
    assert {"digits-vq", "DiT, 4 tokens, width 256", "DiT, 16 tokens, width 96"} < rows.keys()
    assert all(row["float32_ms"] > 0 and row["bf16_ms"] > 0 and row["speedup"] > 0 for row in rows.values())
    assert rows["digits-vq"]["chosen"] == "no", "too narrow, whatever the machine"
    (quality,) = report.json["quality"]
    assert quality["steps"] == 2 and all(len(quality["psnr"][kind]) == 2 for kind in ("no", "bf16"))
    assert sum("width 16" in line for line in report.lines) == 2 * 5
