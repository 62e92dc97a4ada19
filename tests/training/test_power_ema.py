"""Power-function averages: closed forms, quadrature, and averages rebuilt after training beside those tracked in it."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from scipy.integrate import quad
from torch import Tensor, nn

from midway.gen.core.errors import DataError
from midway.gen.training.power_ema import (
    WIDEST,
    PowerAverage,
    Snapshot,
    find_snapshots,
    gamma_of,
    inner_products,
    reconstruct,
    save_snapshot,
    weights_of,
)

STORED = (0.05, 0.1)


class Tiny(nn.Module):
    """A weight, a statistic that learns, and a counter."""

    average: Tensor
    updates: Tensor

    def __init__(self, size: int = 3, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((size,), 100.0, dtype=dtype))
        self.register_buffer("average", torch.full((size,), 100.0, dtype=dtype))
        self.register_buffer("updates", torch.tensor(0))


def width(gamma: float) -> float:
    """Standard deviation of (gamma + 1) tau^gamma on [0, 1]."""
    return math.sqrt((gamma + 1) / ((gamma + 2) ** 2 * (gamma + 3)))


def profile(tau: np.ndarray, t: float, gamma: float) -> np.ndarray:
    """p(tau) of an average that ends at t."""
    return np.where(tau <= t, (gamma + 1) / t * np.minimum(tau / t, 1) ** gamma, 0)


def masses(steps: int, t: int, gamma: float) -> np.ndarray:
    """The integrals of the profile over [k - 1, k] for k = 1 ... steps."""
    ends = np.minimum(np.arange(steps + 1) / t, 1) ** (gamma + 1)
    return ends[1:] - ends[:-1]


def vector(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


# ---- width and exponent ----


@pytest.mark.parametrize("std", [1e-4, 0.01, 0.05, 0.1, 0.15, 0.25, 0.28, WIDEST])
def test_the_exponent_has_the_width_it_was_made_from(std: float) -> None:
    assert width(gamma_of(std)) == pytest.approx(std, rel=1e-13)


def test_exponents_of_the_paper_and_of_the_uniform_average() -> None:
    assert gamma_of(0.05) == pytest.approx(16.97, abs=0.005)
    assert gamma_of(0.1) == pytest.approx(6.94, abs=0.005)
    assert 0 <= gamma_of(WIDEST) < 1e-12


@pytest.mark.parametrize("std", [0.0, -0.1, 1e-200, 0.289, 1.0, math.nan, math.inf])
def test_a_width_out_of_range_raises(std: float) -> None:
    with pytest.raises(ValueError, match=f"got {std}; try 0.05 to 0.15"):
        gamma_of(std)


# ---- the average ----


@pytest.mark.parametrize("std", [0.03, 0.1, WIDEST])
def test_the_average_is_its_closed_form_sum(std: float) -> None:
    """The weights of step k count with the integral of the profile over [k - 1, k]; the initial ones not at all."""
    model, steps = Tiny(), 20
    average = PowerAverage(model, std)
    values = torch.randn(steps, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for step, value in enumerate(values):
        model.weight.data.copy_(value)
        model.average.copy_(-value)
        average.update(model, step)
        weights = torch.from_numpy(masses(step + 1, step + 1, gamma_of(std)))
        torch.testing.assert_close(average.shadow["weight"], weights @ values[: step + 1], rtol=0, atol=1e-14)
        assert torch.equal(average.shadow["average"], -average.shadow["weight"])


def test_the_first_update_takes_the_weights_and_later_ones_move_less_and_less() -> None:
    averages = [PowerAverage(Tiny(), std) for std in (0.05, 0.1, width(1.0), width(2.0))]
    assert [average.decay_after(0) for average in averages] == [0, 0, 0, 0]
    assert averages[2].decay_after(1) == pytest.approx(0.25)
    assert averages[3].decay_after(9) == pytest.approx(0.9**3)
    assert 0 < 1 - averages[0].decay_after(10**9) < 1e-7


def test_the_relative_width_of_a_long_average_is_its_std() -> None:
    """The average of (k, k^2) over k = 1 ... t gives the variance of the time that it looks at."""
    model, steps = Tiny(2), 2000
    averages = [PowerAverage(model, std) for std in (0.02, 0.05, 0.1, 0.25)]
    for step in range(steps):
        model.weight.data.copy_(vector((step + 1) / steps, ((step + 1) / steps) ** 2))
        for average in averages:
            average.update(model, step)
    for average in averages:
        first, second = average.shadow["weight"].tolist()
        assert math.sqrt(second - first**2) == pytest.approx(average.std, rel=2e-4)


def test_integers_are_copied_and_the_average_can_be_shown() -> None:
    model = Tiny()
    average = PowerAverage(model, 0.1)
    model.updates.fill_(7)
    average.update(model, 5)
    assert average.shadow["updates"].item() == 7
    average.shadow["weight"].fill_(5.0)
    with average.applied(model):
        assert torch.equal(model.weight, torch.full_like(model.weight, 5.0))


def test_a_loaded_average_continues_as_if_never_stored(tmp_path: Path) -> None:
    model = Tiny(dtype=torch.float32)
    whole, first, second = (PowerAverage(model, 0.1) for _ in range(3))
    for step in range(6):
        nn.init.normal_(model.weight, generator=torch.Generator().manual_seed(step))
        model.updates += 1
        whole.update(model, step)
        (first if step < 3 else second).update(model, step)
        if step == 2:
            second.load(load_file(save_snapshot(tmp_path, 3, 0.1, first.shadow)))
    assert all(torch.equal(value, second.shadow[name]) for name, value in whole.shadow.items())


@pytest.mark.parametrize("other", [Tiny(4), Tiny(dtype=torch.float32), nn.Linear(3, 1)])
def test_an_average_of_another_model_is_not_loaded(other: nn.Module) -> None:
    average = PowerAverage(Tiny(), 0.1)
    with pytest.raises(ValueError, match=r"of the tensors .*\(average"):
        average.load(other.state_dict())
    assert torch.equal(average.shadow["weight"], Tiny().weight)


# ---- inner products and weights ----


@pytest.mark.parametrize("first", [(1000, 0.05), (700, 0.2), (7, 0.01)])
@pytest.mark.parametrize("second", [(1000, 0.1), (990, 0.02), (300, WIDEST)])
def test_inner_products_are_the_integrals(first: tuple[int, float], second: tuple[int, float]) -> None:
    (t, std), (s, other) = first, second
    gamma, delta, end = gamma_of(std), gamma_of(other), min(t, s)
    near = [end * (1 - 10.0**-k) for k in (1, 2, 3)]  # where narrow profiles have their mass
    product, _ = quad(lambda x: float(profile(x, t, gamma) * profile(x, s, delta)), 0, end, points=near, epsabs=0)
    found = inner_products(vector(t), vector(gamma), vector(s), vector(delta)).item()
    assert found == pytest.approx(product, rel=1e-9)
    assert found == pytest.approx(inner_products(vector(s), vector(delta), vector(t), vector(gamma)).item(), rel=1e-14)


def test_large_exponents_and_long_runs_do_not_overflow() -> None:
    t, gamma = vector(1e7, 2, 9e6), torch.full((3,), gamma_of(1e-4), dtype=torch.float64)
    gram = inner_products(t, gamma, t, gamma)
    assert gram.isfinite().all()
    torch.testing.assert_close(gram.diagonal(), (gamma + 1) ** 2 / ((2 * gamma + 1) * t), rtol=1e-14, atol=0)
    assert gram[0, 1] == 0
    assert gram[0, 2] == 0


def test_weights_are_those_of_a_fit_to_sampled_profiles() -> None:
    """Among the stored steps are some after the target; midpoints sample every profile on the steps that it covers."""
    stored = [(120, 0.05), (120, 0.15), (300, 0.05), (300, 0.1), (410, 0.1), (500, 0.2)]
    times = (np.arange(20_000) + 0.5) / 40
    sampled = np.stack([profile(times, t, gamma_of(std)) for t, std in stored], axis=1)
    last, target = sampled[:, -1:], profile(times, 420, gamma_of(0.12))[:, None]  # the last weight is 1 less the others
    others = np.linalg.lstsq(sampled[:, :-1] - last, target - last, rcond=None)[0][:, 0]
    fitted = np.append(others, 1 - others.sum())
    weights = weights_of(stored, 420, 0.12)
    assert weights.dtype == torch.float64
    np.testing.assert_allclose(weights, fitted, rtol=0, atol=1e-7)


@pytest.mark.parametrize("wanted", [0, 7, 15, 40])
def test_a_stored_average_is_found_again(wanted: int) -> None:
    stored = [(100 * (k + 1), std) for k in range(32) for std in STORED]
    weights = weights_of(stored, *stored[wanted])
    torch.testing.assert_close(weights, torch.eye(64, dtype=torch.float64)[wanted], rtol=0, atol=1e-11)


@pytest.mark.parametrize(("step", "std"), [(800, 0.2), (400, 0.02), (450, 0.07), (100, 0.28)])
def test_weights_sum_to_one_however_far_the_profile_is(step: int, std: float) -> None:
    stored = [(100 * (k + 1), width) for k in range(8) for width in STORED]
    assert weights_of(stored, step, std).sum().item() == pytest.approx(1, abs=1e-13)


def test_equal_averages_share_their_weight() -> None:
    weights = weights_of([(100, 0.1), (200, 0.1), (200, 0.1)], 200, 0.1)
    torch.testing.assert_close(weights, vector(0, 0.5, 0.5), rtol=0, atol=1e-12)


def test_weights_of_nothing_and_before_the_first_step_raise() -> None:
    for stored, step in ([], 5), ([(5, 0.1)], 0), ([(5, 0.1), (0, 0.1)], 5):
        with pytest.raises(ValueError, match=f"{len(stored)} averages for step {step}: give one or more"):
            weights_of(stored, step, 0.1)
    with pytest.raises(ValueError, match="relative width"):
        weights_of([(5, 0.1)], 5, 0.5)


# ---- files ----


def some_state(seed: int, updates: int = 0) -> dict[str, Tensor]:
    """float32, bfloat16, integers and booleans."""
    generator = torch.Generator().manual_seed(seed)
    state = {
        "weight": torch.randn(40, 30, generator=generator).T,
        "half": torch.randn(50, generator=generator).bfloat16(),
    }
    return state | {"updates": torch.tensor(updates), "used": torch.arange(3) < updates}


def test_a_snapshot_is_read_back_bit_for_bit(tmp_path: Path) -> None:
    state = some_state(0, 2)
    path = save_snapshot(tmp_path / "new", 12, 0.05, state)
    assert path == tmp_path / "new" / "step-12-std-0.050.safetensors"
    assert list(path.parent.iterdir()) == [path]
    assert find_snapshots(path.parent) == [Snapshot(path, 12, 0.05)]
    read = load_file(path)
    assert read.keys() == state.keys()
    for name, value in state.items():
        assert read[name].dtype == value.dtype
        assert torch.equal(read[name], value)


def test_snapshots_come_by_step_and_width_and_near_widths_stay_apart(tmp_path: Path) -> None:
    wanted = [(9, 0.05), (10, 0.0501), (10, 0.0502), (10, 1 / 7), (100, 0.05)]
    for step, std in reversed(wanted):
        save_snapshot(tmp_path, step, std, some_state(0))
    assert [(s.step, s.std) for s in find_snapshots(tmp_path)] == wanted
    assert find_snapshots(tmp_path / "none") == []


@pytest.mark.parametrize(("step", "std"), [(0, 0.1), (-1, 0.1), (5, 0.4)])
def test_an_impossible_snapshot_is_not_stored(tmp_path: Path, step: int, std: float) -> None:
    with pytest.raises(ValueError, match=r"optimizer step|relative width"):
        save_snapshot(tmp_path, step, std, some_state(0))
    assert list(tmp_path.iterdir()) == []


def assert_names(error: DataError, path: Path, why: str) -> None:
    assert str(path) in error.what
    assert why in error.why
    assert error.fix
    assert error.exit_code == 3


@pytest.mark.parametrize("length", [0, 4, 200, -1])
def test_a_damaged_snapshot_raises(tmp_path: Path, length: int) -> None:
    snapshots = [Snapshot(save_snapshot(tmp_path, 5, std, some_state(0)), 5, std) for std in STORED]
    path = snapshots[1].path
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(DataError) as found:
        find_snapshots(tmp_path)
    assert_names(found.value, path, "cannot be read")
    with pytest.raises(DataError) as rebuilt:
        reconstruct(snapshots, 5, 0.07)
    assert_names(rebuilt.value, path, "cannot be read")


@pytest.mark.parametrize(
    ("header", "why"),
    [
        (None, "its format is None"),
        ({"format": "midway-posthoc-2", "step": "5", "std": "0.1"}, "its format is 'midway-posthoc-2'"),
        ({"format": "midway-posthoc-1", "std": "0.1"}, "step"),
        ({"format": "midway-posthoc-1", "step": "five", "std": "0.1"}, "five"),
        ({"format": "midway-posthoc-1", "step": "0", "std": "0.1"}, "at least 1"),
        ({"format": "midway-posthoc-1", "step": "5", "std": "nan"}, "relative width"),
    ],
)
def test_a_foreign_file_raises(tmp_path: Path, header: dict[str, str] | None, why: str) -> None:
    save_snapshot(tmp_path, 5, 0.05, some_state(0))
    path = tmp_path / "step-5-std-0.100.safetensors"
    save_file({"weight": torch.zeros(3)}, path, header)
    with pytest.raises(DataError) as caught:
        find_snapshots(tmp_path)
    assert_names(caught.value, path, why)


# ---- reconstruction ----


def train(folder: Path, steps: int, every: int, widths: tuple[float, ...]) -> list[PowerAverage]:
    """A model that drifts away from its start under noise: averages of `STORED` are stored, those of `widths` returned."""
    generator, model = torch.Generator().manual_seed(3), Tiny(200)
    averages = [PowerAverage(model, std) for std in STORED + widths]
    drift = torch.randn(200, generator=generator, dtype=torch.float64)
    for step in range(steps):
        noise = torch.randn(200, generator=generator, dtype=torch.float64)
        model.weight.data.copy_(drift * math.sqrt(step / steps) + noise)
        for average in averages:
            average.update(model, step)
            if average.std in STORED and (step + 1) % every == 0:
                save_snapshot(folder, step + 1, average.std, average.shadow)
    return averages[len(STORED) :]


def test_another_width_is_rebuilt_from_sixteen_averages(tmp_path: Path) -> None:
    """Measured: 0.0009 to 0.0013 from the tracked average, 23 to 26 times nearer than any stored one."""
    tracked = train(tmp_path, 800, 100, (0.07, 0.08, 0.12))
    snapshots = find_snapshots(tmp_path)
    assert len(snapshots) == 16
    for average in tracked:
        exact = average.shadow["weight"]
        rebuilt = reconstruct(snapshots, 800, average.std)["weight"]
        stored = [load_file(snapshot.path)["weight"] for snapshot in snapshots]
        error, *others = (((value - exact).norm() / exact.norm()).item() for value in (rebuilt, *stored))
        assert error < 0.004
        assert error < min(others) / 8


def test_a_stored_average_is_rebuilt_exactly(tmp_path: Path) -> None:
    for k in range(1, 9):
        for i, std in enumerate(STORED):
            save_snapshot(tmp_path, 100 * k, std, some_state(10 * k + i, k))
    snapshots = find_snapshots(tmp_path)
    for snapshot in snapshots:
        stored, rebuilt = load_file(snapshot.path), reconstruct(snapshots, snapshot.step, snapshot.std)
        assert rebuilt.keys() == stored.keys()
        for name, value in stored.items():
            assert rebuilt[name].dtype == value.dtype
            assert torch.equal(rebuilt[name], value), name


def test_the_sum_is_taken_in_float64_over_all_averages_later_ones_too(tmp_path: Path) -> None:
    for k in range(1, 9):
        save_snapshot(tmp_path, 100 * k, 0.1, some_state(k))
    snapshots = find_snapshots(tmp_path)
    rebuilt, weights = reconstruct(snapshots, 450, 0.07), weights_of([(s.step, s.std) for s in snapshots], 450, 0.07)
    for name in ("weight", "half"):
        stored = torch.stack([load_file(snapshot.path)[name].double() for snapshot in snapshots])
        expected = torch.tensordot(weights, stored, dims=1)
        assert torch.equal(rebuilt[name], expected.to(rebuilt[name].dtype))


def test_integers_come_from_the_newest_average_at_or_before_the_step(tmp_path: Path) -> None:
    for step, updates in (100, 1), (200, 2), (300, 3):
        save_snapshot(tmp_path, step, 0.1, some_state(step, updates))
    snapshots = find_snapshots(tmp_path)[::-1]
    for step, updates in (100, 1), (199, 1), (200, 2), (299, 2), (300, 3):
        rebuilt = reconstruct(snapshots, step, 0.07)
        assert rebuilt["updates"].item() == updates
        assert rebuilt["used"].tolist() == [k < updates for k in range(3)]


def test_what_cannot_be_rebuilt_raises(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no stored weight averages"):
        reconstruct([], 5, 0.1)
    snapshots = [Snapshot(save_snapshot(tmp_path, step, 0.1, some_state(step)), step, 0.1) for step in (10, 20)]
    for step in (9, 21):
        with pytest.raises(ValueError, match=f"from step 10 to 20: choose a step in between, not {step}"):
            reconstruct(snapshots, step, 0.1)
    with pytest.raises(ValueError, match="relative width"):
        reconstruct(snapshots, 15, 0.3)


def test_averages_of_different_models_raise(tmp_path: Path) -> None:
    other = some_state(0) | {"half": torch.zeros(6, dtype=torch.bfloat16)}
    states = (10, other), (20, some_state(0))
    snapshots = [Snapshot(save_snapshot(tmp_path, step, 0.1, state), step, 0.1) for step, state in states]
    with pytest.raises(DataError) as caught:
        reconstruct(snapshots, 20, 0.1)
    assert_names(caught.value, snapshots[0].path, "half bfloat16 (6,) instead of bfloat16 (50,)")
