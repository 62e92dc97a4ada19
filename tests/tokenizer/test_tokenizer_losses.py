"""What a tokenizer is trained for: each loss through the script, and the game with a critic inside fit()."""

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from pipelines import Outcome, Script
from resuming import newest, records
from safetensors.torch import load_file
from torch import Tensor

from midway.gen.data.splits import DataConfig
from midway.gen.distillation.table import TableConfig, make_distance
from midway.gen.flags.tasks import TokenizerConfig, TokenizerTask
from midway.gen.tokenizer.loss_config import LossConfig
from midway.gen.tokenizer.objective import TokenizerObjective
from midway.gen.training import fit, optim
from midway.gen.training.batches import Context, ImageBatch
from midway.gen.training.config import TrainConfig
from midway.gen.training.optim import make_optimizers, set_rate
from midway.gen.trainings import train_tokenizer
from midway.tokenizers.adversarial import discriminator_loss, generator_loss, gradient_penalty, r1_penalty
from midway.tokenizers.networks import Encoder
from midway.tokenizers.perceptual import Perceptual
from midway.tokenizers.tokenizer import ImageTokenizer

pytestmark = pytest.mark.usefixtures("one_thread")

GAME = LossConfig(adversary="hinge", adversary_weight=0.7, critic_width=8, critic_layers=1)
FSQ = TokenizerConfig(levels=(5, 5), width=8, blocks=1)
TRAIN = TrainConfig(steps=4, batch_size=16, lr=1e-2, warmup=0, ema=0, log_every=1, save_every=1, keep=9)
GAMES = ("hinge", "non_saturating", "wasserstein")


@pytest.fixture(autouse=True)
def another_precision() -> Iterator[None]:
    """Accelerate keeps one state per process."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def objective(losses: LossConfig = GAME, **options: object) -> TokenizerObjective:
    torch.manual_seed(0)
    tokenizer = ImageTokenizer(width=8, blocks=1, quantizer={"type": "fsq", "levels": [5, 5]}, **options)  # pyright: ignore
    for parameter in tokenizer.decoder.parameters():
        torch.nn.init.normal_(parameter, std=0.1)  # its last layer starts at zero, where no gradient comes through
    return TokenizerObjective(tokenizer, losses=losses)


def batch(count: int = 6) -> tuple[ImageBatch, Context]:
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(0, 256, (count, 1, 8, 8), generator=generator).to(torch.uint8)
    return ImageBatch(images, torch.zeros(count, dtype=torch.int64)), Context(0, 3, torch.arange(count))


def gradients(model: TokenizerObjective) -> dict[str, Tensor]:
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def task(out: Path, losses: LossConfig, train: TrainConfig = TRAIN, **options: object) -> TokenizerTask:
    return TokenizerTask(out, DataConfig(held_out=0.9), FSQ, losses, train=train, **options)  # pyright: ignore


# ---- one step ----


@pytest.mark.parametrize("game", GAMES)
def test_one_backward_gives_each_side_its_own_gradient(game: str) -> None:
    """Against two separate backward passes: the tokenizer's through the critic, the critic's on images without a gradient."""
    penalty = 0.5 if game == "wasserstein" else 0.0
    losses = replace(GAME, adversary=game, gradient_penalty=penalty, r1=0.3)
    model = objective(losses)
    shown, context = batch()
    model.loss(shown, context)[0].backward()
    together = gradients(model)

    assert model.adversary is not None
    critic, images = model.adversary.discriminator, shown.images.float() / 127.5 - 1
    model.zero_grad()
    out = model.tokenizer(images)
    gain = generator_loss(critic(out.reconstruction), game)  # pyright: ignore[reportArgumentType]
    ((out.reconstruction - images).square().mean() + 0.7 * gain).backward()
    apart = {name: grad for name, grad in gradients(model).items() if name.startswith("tokenizer.")}
    model.zero_grad()
    fake = out.reconstruction.detach()
    own = discriminator_loss(critic(images), critic(fake), game) + 0.3 * r1_penalty(critic, images)  # pyright: ignore
    if penalty:
        own = own + penalty * gradient_penalty(critic, images, fake, context.uniform("mix").float())
    own.backward()
    apart |= gradients(model)
    assert together.keys() == apart.keys()
    for name in apart:
        torch.testing.assert_close(together[name], apart[name], rtol=1e-4, atol=1e-7, msg=name)


def test_the_adaptive_weight_is_the_one_of_the_step_before() -> None:
    """Zero in the first step; then the ratio of both gradients at the decoder's last layer."""
    model = objective(replace(GAME, adaptive=True))
    shown, context = batch()
    first, logs = model.loss(shown, context)
    assert logs["adaptive_weight"].tolist() == [0, 1]
    torch.testing.assert_close(first, logs["mse"] + logs["critic"][0])
    out = model.tokenizer(shown.images.float() / 127.5 - 1)
    assert model.adversary is not None
    sides = (logs["mse"], generator_loss(model.adversary.discriminator(out.reconstruction), "hinge"))
    of_mse, of_gain = (
        torch.autograd.grad(side, model.tokenizer.last_layer, retain_graph=True)[0].norm() for side in sides
    )
    model.after_step(torch.tensor(True))
    second, logs = model.loss(shown, context)
    torch.testing.assert_close(logs["adaptive_weight"][0], of_mse / (of_gain + 1e-6))
    wanted = logs["mse"] + 0.7 * logs["adaptive_weight"][0] * logs["generator"][0] + logs["critic"][0]
    torch.testing.assert_close(second, wanted)


def test_the_sides_have_their_own_rates_and_gradient_norms(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """AdamW's first step is the learning rate, whatever the gradient's size: a rate of 0.25 is seen in the weights."""
    model = objective(replace(GAME, critic_rate=0.25))
    (adamw,) = make_optimizers(model, TRAIN, torch.device("cpu"))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    model.loss(*batch())[0].backward()
    set_rate([adamw], 0.01)
    adamw.step()
    for name, p in model.named_parameters():
        if p.grad is not None and (moved := (p - before[name]).abs()[p.grad.abs() > 1e-5]).numel():
            rate = 0.0025 if name.startswith("adversary.") else 0.01
            torch.testing.assert_close(moved, torch.full_like(moved, rate), rtol=0.01, atol=0, msg=name)
    theirs = {name for name, _ in model.named_parameters() if name.startswith("adversary.")}
    ours, opponents = optim.parameter_groups(model)
    assert (len(ours), len(opponents)) == (len(before) - len(theirs), len(theirs))

    seen: list[Tensor] = []
    real = torch.nn.utils.clip_grads_with_norm_

    def clip(parameters: list[Tensor], most: float, norm: Tensor) -> None:
        real(parameters, most, norm)
        seen.append(torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None]))

    monkeypatch.setattr(torch.nn.utils, "clip_grads_with_norm_", clip)
    run = train_tokenizer.train(task(tmp_path / "run", replace(GAME, r1=1e4), replace(TRAIN, steps=1, clip=1e-3)))
    assert run is not None
    assert len(seen) == 2
    assert [norm.item() for norm in seen] == pytest.approx([1e-3, 1e-3], rel=1e-3)
    record = records(run.path)[0]
    assert record["critic_gradient_norm"] > 100 * record["gradient_norm"], "the critic's norm is not counted as ours"


def test_fsq_logs_how_far_it_has_run_into_its_ends() -> None:
    """Of an encoder whose output is scaled up, all digits are the outermost."""
    model = objective(LossConfig())
    _, logs = model.loss(*batch())
    assert 0 < logs["edge_mass"] < 1
    assert logs["mean_abs_z"] > 0
    encoder = model.tokenizer.encoder
    assert isinstance(encoder, Encoder)
    encoder.shortcut.weight.data *= 1e4
    assert model.loss(*batch())[1]["edge_mass"] > 0.99


# ---- in a training ----


def test_before_its_start_a_critic_neither_learns_nor_counts(tmp_path: Path) -> None:
    """Its weights, its optimizer's state and the tokenizer are those of a run without one until then."""
    game = train_tokenizer.train(task(tmp_path / "game", replace(GAME, adversary_start=2)))
    plain = train_tokenizer.train(task(tmp_path / "plain", LossConfig()))
    assert game is not None
    assert plain is not None
    states = {step: load_file(game.checkpoints / f"step-{step}" / "model.safetensors") for step in (1, 2, 3)}
    theirs = [name for name in states[1] if name.startswith("adversary.")]
    assert theirs
    assert all(torch.equal(states[1][name], states[2][name]) for name in theirs)
    assert not any(torch.equal(states[2][name], states[3][name]) for name in theirs if name.endswith("weight"))
    expected = load_file(plain.checkpoints / "step-2" / "model.safetensors")
    assert all(torch.equal(states[2][name], value) for name, value in expected.items())
    adam = load_file(game.checkpoints / "step-4" / "optimizer.safetensors")
    assert {adam[name].item() for name in adam if name.startswith("adversary.") and name.endswith("/step")} == {2}
    logged = records(game.path)
    assert ["generator" in record for record in logged[:4]] == [False, False, True, True]


@pytest.mark.parametrize("spectral", [True, False])
def test_a_game_does_not_depend_on_accumulation(spectral: bool, tmp_path: Path) -> None:
    """Two steps as one batch and as four micro-batches: the weights, the averages and the adaptive weight, up to rounding."""
    losses = replace(GAME, adaptive=True, lecam=0.1, r1=0.1, gradient_penalty=0.1, spectral_norm=spectral)
    states = []
    for parts in (1, 4):
        train = replace(TRAIN, steps=3, accumulation=parts, lr=1e-3)
        run = train_tokenizer.train(task(tmp_path / f"{parts}", losses, train))
        assert run is not None
        states.append(load_file(newest(run.path) / "model.safetensors"))
    assert states[0]["adversary.adaptive.value"] > 0
    assert states[0]["adversary.averages.updates"] == 3
    for name, value in states[0].items():
        torch.testing.assert_close(states[1][name], value, rtol=2e-3, atol=2e-5, msg=name)


def test_a_critic_learns_to_tell_and_the_tokenizer_to_deceive(tmp_path: Path) -> None:
    """With a tokenizer that hardly learns, real logits rise above fake ones; all of a run's losses stay finite."""
    losses = replace(GAME, critic_rate=100.0, adversary_weight=0.0)
    run = train_tokenizer.train(task(tmp_path / "run", losses, replace(TRAIN, steps=30, lr=3e-5, save_every=0)))
    assert run is not None
    first, last = (records(run.path)[i] for i in (0, 29))
    assert last["real_logits"] - last["fake_logits"] > 0.2 + first["real_logits"] - first["fake_logits"]


# ---- through the script ----


FLAGS: dict[str, tuple[str, ...]] = {
    "l1": ("--loss.pixel", "l1"),
    "charbonnier": ("--loss.pixel", "charbonnier"),
    "hinge": ("--loss.adversary", "hinge", "--loss.adaptive", "--loss.lecam", "0.01", "--loss.critic-rate", "0.5"),
    "non-saturating": ("--loss.adversary", "non_saturating", "--loss.r1", "10", "--loss.adversary-start", "1"),
    "wasserstein": (
        "--loss.adversary",
        "wasserstein",
        "--loss.gradient-penalty",
        "10",
        "--loss.adversary-weight",
        "0.2",
    ),
    "lipschitz": ("--loss.adversary", "wasserstein", "--loss.spectral-norm", "--precision", "bf16"),
}
SMALL = ("--held-out", "0.9", "--steps", "2", "--batch-size", "8", "--model.width", "8", "--model.blocks", "1")


def call(script: Script, out: Path, *flags: str) -> Outcome:
    if "--loss.adversary" in flags:
        flags = (*flags, "--loss.critic-width", "8", "--loss.critic-layers", "1")
    return script("train_tokenizer", "--out", str(out), *SMALL, *flags)


@pytest.mark.parametrize("name", FLAGS)
def test_every_loss_runs_from_the_command_line(name: str, script: Script, tmp_path: Path) -> None:
    done = call(script, tmp_path / "run", *FLAGS[name])
    assert done.code == 0, done.err
    record = records(tmp_path / "run")[0]
    assert "mse" in record
    assert (name in record) == (name in ("l1", "charbonnier"))
    for flag in ("lecam", "r1", "gradient_penalty"):
        assert (flag in record) == any(flag.replace("_", "-") in word for word in FLAGS[name])


def test_lpips_trains_with_weights_from_a_file_and_is_in_no_checkpoint(
    script: Script, vgg: Path, tmp_path: Path
) -> None:
    pytest.importorskip("lpips")
    weights = ("--loss.perceptual-weights", str(vgg))
    done = call(script, tmp_path / "run", "--resize", "16", "--loss.perceptual", "0.5", *weights)
    assert done.code == 0, done.err
    record = records(tmp_path / "run")[0]
    assert record["loss"] == pytest.approx(record["mse"] + 0.5 * record["lpips"], rel=1e-4)
    state = load_file(newest(tmp_path / "run") / "model.safetensors")
    assert all(name.startswith("tokenizer.") for name in state)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--loss.r1", "1"), ("loss.r1", "loss.adversary")),
        (("--loss.adaptive",), ("loss.adaptive",)),
        (("--loss.adversary", "wasserstein"), ("Lipschitz", "gradient_penalty")),
        (("--loss.adversary", "hinge", "--loss.lecam", "-1"), ("loss.lecam", "negative")),
        (("--loss.adversary", "hinge", "--loss.critic-rate", "0"), ("critic_rate",)),
        (("--loss.perceptual-weights", "x.pth"), ("loss.perceptual",)),
        (("--loss.perceptual", "1", "--loss.perceptual-weights", "absent.pth", "--resize", "16"), ("absent.pth",)),
        (("--loss.perceptual", "1", "--loss.perceptual-weights", "VGG"), ("16 x 16",)),
        (("--loss.adversary", "hinge", "--model.quantizer", "identity", "--model.downsample", "1"), ("adversarial",)),
    ],
)
def test_losses_that_cannot_be_raise(
    flags: tuple[str, ...], words: tuple[str, ...], script: Script, vgg: Path, tmp_path: Path
) -> None:
    done = call(script, tmp_path / "run", *(str(vgg) if flag == "VGG" else flag for flag in flags))
    assert done.code == 2, done.err
    assert all(word in done.err for word in words), done.err
    assert not (tmp_path / "run").exists()


def test_images_too_small_for_a_critic_raise(script: Script, tmp_path: Path) -> None:
    done = script("train_tokenizer", "--out", str(tmp_path / "run"), *SMALL, "--loss.adversary", "hinge")
    assert done.code == 2, done.err
    assert "8" in done.err
    assert not (tmp_path / "run").exists()


def test_a_table_is_learned_by_lpips_of_decoded_images(script: Script, vgg: Path, tmp_path: Path) -> None:
    pytest.importorskip("lpips")
    tokenizer, model = str(tmp_path / "tokenizer"), str(tmp_path / "model")
    assert script("train_tokenizer", "--out", tokenizer, *SMALL, "--resize", "16").code == 0
    latent = ("--model.dit.width", "16", "--model.dit.depth", "1", "--model.dit.heads", "2", "--batch-size", "8")
    assert script("train_latent", "--out", model, "--tokenizer", tokenizer, "--steps", "2", *latent).code == 0
    flags = ("--table.loss", "lpips", "--table.pairs", "4", "--table.teacher-steps", "4", "--batch-size", "4")
    table = ("table", "--model", model, "--nfe", "3", "--grid", "uniform", "--steps", "2", *flags)
    done = script("train_solver", *table, "--table.perceptual-weights", str(vgg))
    assert done.code == 0, done.err
    (run,) = (tmp_path / "model" / "solvers").iterdir()
    assert run.name.startswith("table-")
    done = script("train_solver", *table, "--overwrite", "--table.perceptual-weights", "absent.pth")
    assert done.code == 2
    assert "absent.pth" in done.err


def test_the_distance_by_lpips_is_the_one_of_decoded_images(vgg: Path) -> None:
    pytest.importorskip("lpips")
    tokenizer = objective(image_size=16).tokenizer.eval()
    tokenizer.set_latent_statistics(torch.tensor([0.1, -0.2]), torch.tensor([0.5, 2.0]))
    a, b = torch.randn(2, 3, *tokenizer.latent_shape, generator=torch.Generator().manual_seed(0))
    distance = make_distance(TableConfig(loss="lpips", perceptual_weights=vgg), tokenizer)
    images = [tokenizer.decode_latents(z, snap=False) for z in (a, b)]
    torch.testing.assert_close(distance(a, b), Perceptual("vgg", vgg)(*images).mean())
    torch.testing.assert_close(make_distance(TableConfig(loss="l1"), tokenizer)(a, b), (a - b).abs().mean())
    with pytest.raises(ValueError, match="16 x 16"):
        make_distance(TableConfig(loss="lpips", perceptual_weights=vgg), objective().tokenizer)


def test_a_card_says_what_was_minimised(script: Script, vgg: Path, tmp_path: Path) -> None:
    """With the name of LPIPS' network, by which the figure can be repeated."""
    pytest.importorskip("lpips")
    flags = ("--resize", "16", "--loss.perceptual", "0.5", "--loss.perceptual-weights", str(vgg))
    game = ("--loss.adversary", "hinge", "--loss.r1", "10", "--loss.spectral-norm")
    assert call(script, tmp_path / "run", *flags, *game).code == 0
    card = (tmp_path / "run" / "tokenizer" / "README.md").read_text()
    assert re.search(r"l2 1, LPIPS-vgg@[0-9a-f]{12} 0.5, hinge 0.1, r1 10, spectral norm", card), card


def test_sharded_parameters_and_a_critic_raise(script: Script, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A critic held fixed is not what FSDP shards; here every parameter counts as sharded."""
    monkeypatch.setattr(fit, "DTensor", torch.nn.Parameter)
    done = call(script, tmp_path / "run", "--loss.adversary", "hinge")
    assert done.code == 2, done.err
    assert "FSDP cannot train a tokenizer with a discriminator" in done.err
