"""fit() against a plain loop; closed forms of the rate and the average; the same run however it is divided."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import regression
import small_models
import torch
from multiprocess import together
from regression import SIZE, Regression, Trained, assert_near, plain_loop, records, saved
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from midway.gen.core import randomness
from midway.gen.core.errors import DivergedError, UsageError
from midway.gen.core.runs import Run
from midway.gen.training.accelerator import make_accelerator
from midway.gen.training.config import TrainConfig, learning_rate
from midway.gen.training.ema import EMA
from midway.gen.training.fit import fit
from midway.gen.training.interface import Hooks, Items

pytestmark = pytest.mark.usefixtures("on_the_cpu")

CONFIG = TrainConfig(steps=5, batch_size=8, lr=0.05, warmup=2, decay="cosine", weight_decay=0.1, clip=0.5, ema=0.5)


def train(
    folder: Path, config: TrainConfig = CONFIG, model: Regression | None = None, hooks: Hooks | None = None
) -> Trained:
    return regression.train(folder, config, model, hooks)


def difference(a: nn.Module, b: nn.Module) -> float:
    pairs = zip(a.state_dict().values(), b.state_dict().values(), strict=True)
    return max((x.double() - y.double()).abs().max().item() for x, y in pairs)


# ---- the start ----


@pytest.mark.parametrize("steps", [0, 1])
def test_averages_begin_where_the_start_from_data_ends(steps: int, tmp_path: Path) -> None:
    """Not at the random weights before it, which an average of the first steps would still contain."""
    config = replace(CONFIG, steps=steps, ema=0.5, posthoc=(0.1,), lr=0.0, weight_decay=0.0)
    model, run = small_models.tokenizer({"type": "fsq", "levels": [5, 5]}, "principal"), Run(tmp_path, "test")
    result = fit(model, Items(small_models.images, small_models.SIZE), config, run, make_accelerator(config))
    assert result.ema is not None
    assert bool(model.tokenizer.shortcut_started)
    stored = load_file(tmp_path / f"checkpoints/step-{steps}/posthoc-0.100.safetensors")
    for name, value in model.state_dict().items():
        torch.testing.assert_close(result.ema.shadow[name], value)
        torch.testing.assert_close(stored[name], value)


# ---- the learning rate ----


def test_the_rate_rises_linearly_and_then_stays() -> None:
    config = TrainConfig(steps=100, lr=2.0, warmup=4)
    assert [learning_rate(config, s) for s in range(6)] == pytest.approx([0.5, 1.0, 1.5, 2.0, 2.0, 2.0])
    assert learning_rate(config, 99) == 2.0
    assert learning_rate(replace(config, warmup=0), 0) == 2.0


def test_the_cosine_starts_at_the_full_rate_is_half_in_the_middle_and_ends_at_zero() -> None:
    config = TrainConfig(steps=110, lr=3.0, warmup=10, decay="cosine")
    assert learning_rate(config, 9) == learning_rate(config, 10) == 3.0
    assert learning_rate(config, 60) == pytest.approx(1.5)
    assert learning_rate(config, 35) == pytest.approx(1.5 * (1 + math.sqrt(0.5)))
    assert learning_rate(config, 110) == pytest.approx(0, abs=1e-12)
    assert learning_rate(config, 500) == pytest.approx(0, abs=1e-12)


# ---- the average ----


def test_the_average_is_its_closed_form_sum() -> None:
    """shadow_n = sum_k w_k value_k, w_k = (1 - d_k) prod_(j > k) d_j; the weights, initial value included, sum to 1."""
    model, decay, steps = Regression(), 0.6, 12
    values = torch.randn(steps, 3, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    start, ema = model.weight.detach().clone(), EMA(model, decay)
    for step, value in enumerate(values):
        model.weight.data.copy_(value)
        ema.update(model, step)
    d = [min(0.6, (1 + s) / (10 + s)) for s in range(steps)]
    weights = torch.tensor([(1 - d[k]) * math.prod(d[k + 1 :]) for k in range(steps)], dtype=torch.float64)
    assert weights.sum() + math.prod(d) == pytest.approx(1)
    torch.testing.assert_close(ema.shadow["weight"], weights @ values + math.prod(d) * start, rtol=0, atol=1e-14)


def test_the_decay_warms_up_and_reaches_its_value() -> None:
    decay_after = EMA(Regression(), 0.999).decay_after
    assert [decay_after(s) for s in (0, 1, 8, 90)] == pytest.approx([0.1, 2 / 11, 0.5, 0.91])
    assert decay_after(8990) == decay_after(10**6) == 0.999
    assert decay_after(8980) < 0.999


def test_learned_buffers_are_averaged_and_integers_are_copied() -> None:
    model = Regression()
    ema = EMA(model, 0.9)
    model.average.fill_(1.0)
    model.updates.fill_(7)
    ema.update(model, 0)
    assert torch.equal(ema.shadow["average"], torch.full((3,), 0.9, dtype=torch.float64))
    assert ema.shadow["updates"].item() == 7


def test_applied_shows_the_average_and_gives_the_weights_back_even_after_an_error() -> None:
    model = Regression()
    ema, own = EMA(model, 0.9), Regression()
    ema.shadow["weight"].fill_(5.0)
    ema.shadow["updates"].fill_(3)
    with pytest.raises(KeyError), ema.applied(model):
        assert torch.equal(model.weight, torch.full_like(model.weight, 5.0))
        assert model.updates.item() == 3
        model.weight.data.zero_()
        raise KeyError
    assert difference(model, own) == 0
    assert torch.equal(ema.shadow["weight"], torch.full_like(model.weight, 5.0))


@pytest.mark.parametrize("decay", [1.0, -0.1, math.nan])
def test_a_decay_outside_its_range_raises(decay: float) -> None:
    with pytest.raises(ValueError, match="decay"):
        EMA(Regression(), decay)


# ---- fit() ----


def test_fit_is_the_plain_loop(tmp_path: Path) -> None:
    """Order, noise, clipping, rate, buffers, average: all against ten lines of torch."""
    config = replace(CONFIG, log_every=1)
    expected, trained = plain_loop(config), train(tmp_path, config)
    assert_near(saved(tmp_path), expected.state, atol=1e-12)
    assert [record["loss"] for record in trained.records] == pytest.approx(expected.losses, rel=1e-6)
    assert trained.result.ema is not None
    assert_near(trained.result.ema.shadow, {k[4:]: v for k, v in expected.state.items() if k[:3] == "ema"}, 1e-12)
    assert trained.result.steps == 5


def test_every_epoch_holds_every_item_once_in_another_order(tmp_path: Path) -> None:
    """Batches of 8 of 10 items cross the borders of epochs."""
    stream = torch.cat(train(tmp_path).items).view(4, SIZE)
    for epoch, order in enumerate(stream):
        assert torch.equal(order.sort().values, torch.arange(SIZE))
        assert torch.equal(order, randomness.permutation(0, "order", epoch, SIZE))
    assert len(stream.unique(dim=0)) == 4


def test_a_batch_may_hold_several_epochs(tmp_path: Path) -> None:
    items = train(tmp_path, replace(CONFIG, steps=2, batch_size=25)).items
    assert torch.equal(torch.cat(items).bincount(), torch.full((SIZE,), 5))
    assert [len(part) for part in items] == [25, 25]


def test_a_step_sees_noise_of_its_global_positions(tmp_path: Path) -> None:
    noise = train(tmp_path).model.noise
    for step, got in enumerate(noise):
        ids = torch.arange(8 * step, 8 * step + 8)
        assert torch.equal(got.float(), randomness.normal(0, "noise", step, ids, (3,)))


@pytest.mark.parametrize("accumulation", [2, 4])
def test_accumulation_changes_nothing(tmp_path: Path, accumulation: int) -> None:
    """The mean over micro-batches of equal size is the mean over the batch, so the steps are the same."""
    whole = train(tmp_path / "1")
    parts = train(tmp_path / "n", replace(CONFIG, accumulation=accumulation))
    assert torch.equal(torch.cat(parts.items), torch.cat(whole.items))
    assert torch.equal(torch.cat(parts.model.noise), torch.cat(whole.model.noise))
    assert len(parts.items) == accumulation * len(whole.items)
    assert difference(parts.model, whole.model) < 1e-12
    assert parts.model.updates.item() == CONFIG.steps
    for name in ("loss", "loss_time_0", "gradient_norm"):
        assert parts.result.last[name] == pytest.approx(whole.result.last[name], rel=1e-5)


def test_a_seed_is_a_run_bit_for_bit_and_another_seed_is_another(tmp_path: Path) -> None:
    first, again = train(tmp_path / "a"), train(tmp_path / "b")
    assert difference(first.model, again.model) == 0
    other = train(tmp_path / "c", replace(CONFIG, seed=1))
    assert difference(first.model, other.model) > 1e-3
    assert not torch.equal(first.items[0], other.items[0])


def test_the_global_generator_is_not_used(tmp_path: Path) -> None:
    torch.manual_seed(0)
    first = train(tmp_path / "a")
    torch.manual_seed(99)
    assert difference(first.model, train(tmp_path / "b").model) == 0


def test_time_over_stops_after_the_step_and_reports_it(tmp_path: Path) -> None:
    shown: list[int] = []
    config = replace(CONFIG, steps=10**6, max_seconds=0.2, log_every=10**6)
    trained = train(tmp_path, config, hooks=Hooks(preview=shown.append))
    steps = trained.result.steps
    assert 1 <= steps < 10**6
    assert trained.model.updates.item() == steps
    assert [record["step"] for record in trained.records] == shown == [steps]
    assert trained.result.seconds >= 0.2


def test_time_over_at_once_still_does_one_step(tmp_path: Path) -> None:
    assert train(tmp_path, replace(CONFIG, max_seconds=0.0)).result.steps == 1


def test_a_loss_that_stays_not_finite_ends_the_run_with_exit_code_4(tmp_path: Path) -> None:
    model = Regression(lambda context: torch.full((len(context.sample_ids),), context.step >= 3))
    with pytest.raises(DivergedError, match=r"the last losses were .*nan, nan") as caught:
        train(tmp_path, replace(CONFIG, log_every=1, patience=2), model)
    assert caught.value.exit_code == 4
    assert len(records(tmp_path)) == 4


def test_a_batch_that_cannot_be_shared_raises(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="multiple of 3") as caught:
        train(tmp_path, replace(CONFIG, accumulation=3))
    assert caught.value.exit_code == 2


def test_metrics_are_means_over_the_interval_and_pairs_are_added_before_dividing(tmp_path: Path) -> None:
    """`loss_time_0` averages over samples, not over batches; a bucket without samples is left out."""
    config = replace(CONFIG, log_every=2)
    expected, found = plain_loop(config), train(tmp_path, config).records
    assert [record["step"] for record in found] == [2, 4, 5]
    assert len(set(expected.counts)) > 1, "unequal counts distinguish the two means"
    for record, means in zip(found, expected.intervals, strict=True):
        assert {name: record[name] for name in means} == pytest.approx(means, rel=1e-5)
        assert record["lr"] == learning_rate(CONFIG, record["step"] - 1)
        assert record["images_per_second"] > 0
        assert "never" not in record


def test_previews_see_the_average_in_evaluation_mode_and_change_nothing(tmp_path: Path) -> None:
    seen: list[tuple[int, Tensor, bool, bool]] = []
    model = Regression()

    def preview(step: int) -> None:
        seen.append((step, model.weight.clone(), model.training, torch.is_grad_enabled()))

    trained = train(tmp_path / "a", replace(CONFIG, preview_every=2), model, Hooks(preview))
    assert [step for step, *_ in seen] == [2, 4, 5]
    assert not any(training or gradients for _, _, training, gradients in seen)
    assert trained.result.ema is not None
    assert torch.equal(seen[-1][1], trained.result.ema.shadow["weight"])
    assert (seen[-1][1] - trained.model.weight).abs().max() > 1e-3
    assert trained.model.training
    assert difference(trained.model, train(tmp_path / "b").model) == 0


def test_without_an_average_previews_see_the_newest_weights(tmp_path: Path) -> None:
    seen: list[Tensor] = []
    model = Regression()
    hooks = Hooks(preview=lambda _: seen.append(model.weight.detach().clone()))
    trained = train(tmp_path, replace(CONFIG, ema=0.0), model, hooks)
    assert trained.result.ema is None
    assert torch.equal(seen[-1], trained.model.weight)


SHARED = replace(CONFIG, batch_size=12)


def train_share(rank: int, folder: Path) -> None:
    """Train in one of several processes; what it saw and where it arrived."""
    for accumulation in (1, 2):
        trained = train(folder / str(accumulation), replace(SHARED, accumulation=accumulation))
        state = {
            **trained.model.state_dict(),
            "items": torch.cat(trained.items),
            "noise": torch.cat(trained.model.noise),
        }
        last = {name: torch.tensor(value) for name, value in trained.result.last.items()}
        save_file({**state, **last}, folder / f"{accumulation}-{rank}.safetensors")


@pytest.mark.parametrize("processes", [2, 3])
def test_several_processes_train_the_same_model_as_one(processes: int, tmp_path: Path) -> None:
    """The same global batch, noise and means, shared by gloo processes, with and without accumulation; the averages and the
    optimizer's means of gradients in the checkpoint too."""
    together(train_share, processes, tmp_path)
    for accumulation in (1, 2):
        one = train(tmp_path / f"one-{accumulation}", replace(SHARED, accumulation=accumulation))
        ranks = [load_file(tmp_path / f"{accumulation}-{rank}.safetensors") for rank in range(processes)]
        # (step and micro-batch, rank, share) in the order of the global stream
        for name, whole in (("items", torch.cat(one.items)), ("noise", torch.cat(one.model.noise))):
            shares = torch.stack([r[name].unflatten(0, (SHARED.steps * accumulation, -1)) for r in ranks], 1)
            assert torch.equal(shares.flatten(0, 2), whole)
        for name, value in one.model.state_dict().items():
            assert all(torch.equal(ranks[0][name], other[name]) for other in ranks)
            torch.testing.assert_close(ranks[0][name], value, rtol=0, atol=1e-10)
        for name in ("loss", "loss_time_0", "gradient_norm"):
            assert ranks[0][name].item() == pytest.approx(one.result.last[name], rel=1e-5)
        for file in ("model", "ema", "optimizer"):
            alone, shared = (
                load_file(folder / f"checkpoints/step-5/{file}.safetensors")
                for folder in (one.folder, tmp_path / str(accumulation))
            )
            assert alone.keys() == shared.keys()
            for name, value in alone.items():
                torch.testing.assert_close(shared[name], value, rtol=0, atol=1e-10)
    assert [record["step"] for record in records(tmp_path / "1")] == [5], "only the main process writes"
