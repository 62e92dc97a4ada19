"""Tokenizers, latent models and solvers as folders: saved and read bit for bit, uploaded as they are, described by a card."""

import json
import re
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import small_models
import torch
import yaml
from pipelines import TINY, TINY_DIT, Pipeline
from safetensors.torch import save_file

from midway.gen.cards.latent import finish_model, model_card
from midway.gen.cards.parts import training_rows
from midway.gen.cards.solver import finish_solver
from midway.gen.core import checkpoints
from midway.gen.core.errors import UsageError
from midway.gen.core.runs import Run
from midway.gen.data.images import load_images
from midway.gen.data.splits import DataConfig, split
from midway.gen.diffusion.load import CPU, load_model, write_model
from midway.gen.diffusion.model import LatentModel, LatentModelConfig
from midway.gen.diffusion.sampling import draw, sample_latents
from midway.gen.flags.tasks import LatentTask
from midway.gen.priors.config import Kind, PriorConfig
from midway.gen.priors.layout import CodeLayout
from midway.gen.priors.registry import Prior, make_prior
from midway.gen.training.config import TrainConfig
from midway.gen.trainings import train_latent
from midway.samplers.card import SolverCard
from midway.samplers.grids import karras
from midway.samplers.loading import load_solver
from midway.samplers.schedule import VP, Cosine, Linear
from midway.samplers.solvers import SOLVERS, make_solver
from midway.samplers.table import Table
from midway.tokenizers.hub import relicensed
from midway.tokenizers.tokenizer import ImageTokenizer

pytestmark = pytest.mark.usefixtures("one_thread")


class Api:
    """A Hub that keeps the files of every upload."""

    uploads: dict[str, dict[str, bytes]]

    def __init__(self, token: str | None = None) -> None:
        self.token = token

    def create_repo(self, repo_id: str, private: bool | None, exist_ok: bool) -> Any:
        assert exist_ok
        self.made = repo_id
        return type("Repo", (), {"repo_id": repo_id})

    def upload_folder(self, repo_id: str, folder_path: Path | str, commit_message: str) -> str:
        assert self.made == repo_id
        root = Path(folder_path)
        files = {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}
        self.uploads[f"{repo_id} {self.token}"] = files
        return f"address/{repo_id}"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> dict[str, dict[str, bytes]]:
    Api.uploads = {}
    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    return Api.uploads


LAYOUT = CodeLayout(((4, 4),), ((5, 3, 3),))


def tokenizer() -> ImageTokenizer:
    torch.manual_seed(0)
    made = ImageTokenizer(width=16, blocks=1, quantizer={"type": "fsq", "levels": [5, 3, 3]})
    made.set_latent_statistics(torch.zeros(3), torch.ones(3))
    return made.eval()


def model() -> LatentModel:
    torch.manual_seed(0)
    made = LatentModel(small_models.latent_config(), (3, 4, 4), 3, (1,), ("a", "b|c", "d"))
    for weight in made.network.parameters():  # at its start the network sees neither class nor time
        torch.nn.init.normal_(weight, std=0.2)
    return made.eval()


def prior(kind: Kind) -> Prior:
    torch.manual_seed(0)
    return make_prior(PriorConfig(kind, width=16, depth=1, heads=2), LAYOUT, 3, (1,), ("a", "b|c", "d")).eval()


def solver() -> Table:
    return make_solver("dpmpp2m", Cosine(), nfe=4)


THINGS: dict[str, tuple[Callable[[], Any], Callable[[Path], Any]]] = {
    "tokenizer": (tokenizer, ImageTokenizer.from_pretrained),
    "model": (model, LatentModel.from_pretrained),
    "causal prior": (lambda: prior("causal"), Prior.from_pretrained),
    "masked prior": (lambda: prior("masked"), Prior.from_pretrained),
    "solver": (solver, lambda folder: Table.from_pretrained(folder, Cosine())),
}


def is_same(a: Any, b: Any) -> bool:
    """Equal tables, or models in eval mode with equal weights."""
    if isinstance(a, Table):
        return a == b
    ours, theirs = a.state_dict(), b.state_dict()
    return not a.training and ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)


def front_of(card: str) -> dict[str, Any]:
    return yaml.safe_load(card.split("---\n")[1])


@pytest.mark.parametrize("name", THINGS)
def test_three_verbs_keep_every_bit_and_the_licence(
    name: str, tmp_path: Path, hub: dict[str, dict[str, bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    make, read = THINGS[name]
    thing = make()
    thing.save_pretrained(tmp_path / "plain")
    thing.save_pretrained(tmp_path / "mit", license="mit")
    again = read(tmp_path / "plain")
    assert is_same(again, thing)
    for licence, folder in (("apache-2.0", "plain"), ("mit", "mit")):
        card = (tmp_path / folder / "README.md").read_text()
        header = front_of(card)
        assert (header["license"], header["library_name"]) == (licence, "midway")
        assert header["tags"]
        assert f"## Licence\n\n{licence}\n" in card
        assert str(tmp_path) not in card
    address = again.push_to_hub("someone/thing", token="secret")
    assert address == "address/someone/thing"
    (uploaded,) = hub.items()
    assert uploaded[0] == "someone/thing secret"
    (tmp_path / "uploaded").mkdir()
    for file, content in uploaded[1].items():
        (tmp_path / "uploaded" / file).write_bytes(content)
    assert is_same(read(tmp_path / "uploaded"), thing)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda repo, **options: tmp_path / "uploaded")
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda repo, file, **options: tmp_path / "uploaded" / file)
    monkeypatch.chdir(tmp_path)
    assert is_same(read(Path("someone/thing")), thing)
    assert uploaded[1]["README.md"] == (tmp_path / "plain" / "README.md").read_bytes()
    assert sorted(uploaded[1]) == sorted(path.name for path in (tmp_path / "plain").iterdir())


def test_a_card_goes_with_its_model_and_takes_another_licence(tmp_path: Path) -> None:
    tokenizer().save_pretrained(tmp_path / "a")
    page = tmp_path / "a" / "README.md"
    page.write_text(page.read_text().replace("# Image", "Measured: 31 dB.\n\n# Image"))
    read = ImageTokenizer.from_pretrained(tmp_path / "a")
    read.save_pretrained(tmp_path / "b")
    assert (tmp_path / "b" / "README.md").read_text() == page.read_text()
    read.save_pretrained(tmp_path / "c", license="cc-by-4.0")
    card = (tmp_path / "c" / "README.md").read_text()
    assert card == page.read_text().replace("apache-2.0", "cc-by-4.0")
    assert relicensed("# A page without header\n", "mit") == "---\nlicense: mit\n---\n# A page without header\n"
    with pytest.raises(ValueError, match=r"'a\\nb' is no identifier|is no identifier of a licence: give one such as"):
        read.save_pretrained(tmp_path / "d", license="a\nb: c")


def make_run(tmp_path: Path) -> Run:
    run = Run.create(tmp_path / "run", "latent_model", {"data": {"data": "digits"}, "train": {"ema": 0.0}})

    def write(folder: Path) -> None:
        write_model(folder, model(), tokenizer())
        torch.manual_seed(0)
        save_file(model().state_dict(), folder / "model.safetensors")

    checkpoints.save(run.checkpoints, 10, write)
    return run


def test_the_folder_of_a_run_draws_the_images_of_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One hash, the same images by seed, and a card whose facts are those of the training and whose lines run."""
    run = make_run(tmp_path)
    trained = load_model(run.path, CPU)
    train, _ = split(load_images("digits"), 0.25, 3)
    weights = training_rows(trained.weights, 10, replace(TrainConfig(), batch_size=96, seed=5))
    data = DataConfig(held_out=0.25, split_seed=3)
    card = model_card(trained.model, trained.tokenizer, data, train, weights, {"loss": 0.25}, "cc-by-4.0")
    folder = finish_model(run, trained.model, trained.tokenizer, card)
    assert folder == run.path / "model"
    shared = LatentModel.from_pretrained(folder)
    assert shared.hash == trained.hash == trained.model.hash
    assert (shared.empty, shared.class_names) == ((1,), ("a", "b|c", "d"))
    table, seeds = make_solver("ddim", shared.schedule, 3), torch.tensor([4, 7, 1 << 40])
    ours = draw(shared, ImageTokenizer.from_pretrained(folder / "tokenizer"), table, seeds.tolist())
    latents = sample_latents(trained, table, seeds).latents
    assert torch.equal(ours, draw(trained.model, trained.tokenizer, table, seeds.tolist()))
    decoded = trained.tokenizer.decode_latents(latents)
    assert torch.equal(ours, ((decoded.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8))
    rows = dict(re.findall(r"^\| (.+?) \| (.*) \|$", card, re.MULTILINE))
    facts = {"hash": trained.hash, "training images": "1348", "seed": "5", "effective batch": "96", "loss": "0.25"}
    assert facts.items() <= rows.items()
    assert rows["fingerprint of the training images"] == train.fingerprint
    assert rows["class names"] == r"a, b\|c, d"
    assert front_of(card) == {
        "license": "cc-by-4.0",
        "library_name": "midway",
        "tags": ["latent-model", "cosine", "image-generation"],
    }
    assert str(tmp_path) not in card
    monkeypatch.chdir(folder)
    (block,) = re.findall(r"```python\n(.*?)\n```", card, re.DOTALL)
    assert len(block.splitlines()) == 5
    exec(block, {})
    assert (folder / "samples.png").read_bytes().startswith(b"\x89PNG")


def test_a_learned_solver_is_shared_and_belongs_to_its_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, owner = Run.create(tmp_path / "run", "solver", {}), model()
    plain = make_solver("dpmpp3m", Cosine(), 4)
    facts = SolverCard("table", "best", "cosine", owner.hash, 4, False, 1.5, 12345, "heun at 60")
    learned = replace(plain, solver="table", metadata={"card": json.dumps(asdict(facts))})
    folder = finish_solver(run, learned, "mit")
    card = (folder / "README.md").read_text()
    assert f"| learned for the model | {owner.hash} |" in card
    assert "| evaluations spent on learning | 12,345 |" in card
    assert front_of(card)["license"] == "mit"
    assert load_solver(folder, owner) == load_solver(folder) == learned
    other = model()
    next(other.network.parameters()).data.add_(1)
    with pytest.raises(
        ValueError, match=f"was learned for model {owner.hash}, this one is {other.hash}: learn a solver"
    ):
        load_solver(folder, other)
    with pytest.raises(ValueError, match="was made for Cosine"):
        Table.from_pretrained(folder, Linear())
    with pytest.raises(FileNotFoundError, match=r"has no solver\.safetensors"):
        load_solver(tmp_path, owner)
    monkeypatch.chdir(folder)
    (block,) = re.findall(r"```python\n(.*?)\n```", card, re.DOTALL)
    exec(block, {})
    with pytest.raises(UsageError, match="--license my licence\n"):
        finish_solver(run, learned, "my licence")


# ---- a table as text ----


def test_a_table_prints_its_rows() -> None:
    assert (
        repr(make_solver("dpmpp2m", VP(), 3))
        == """\
Table dpmpp2m: NFE 3, VP(beta_min=0.1, beta_max=20.0), 3 steps from t = 0.9335 to 3.984e-05
  row  evaluates at  arrives at  next state
    0       0.93351     0.67193  +0.9948 x0 +0.08987 D0
    1       0.67193     0.13669  +0.4276 x1 -0.6191 D0 +1.48 D1
    2       0.13669     0.00004  +0.004702 x2 +0.9957 D2"""
    )
    heun = repr(make_solver("heun", Linear(), 2)).splitlines()
    assert len(heun) == 4
    many = repr(make_solver("ddpm", VP(), 20)).splitlines()
    assert len(many) == 15
    assert many[-1] == "  ... 8 more rows"
    assert many[2].endswith(" z")
    skipped = repr(SOLVER_WITHOUT_FIRST).splitlines()
    assert skipped[2].split()[1] == "-"


SOLVER_WITHOUT_FIRST = SOLVERS["ddim"].build(VP(), karras(VP(), 4), True)


def test_a_solver_by_name_spends_its_budget_and_near_names_are_shown() -> None:
    for name, nfe in (("euler", 7), ("heun", 6), ("edm_heun", 5), ("unipc3", 4)):
        assert make_solver(name, VP(), nfe).nfe == nfe
    with pytest.raises(ValueError, match="there is no solver 'dpmp2m': the nearest are dpmpp2m, "):
        make_solver("dpmp2m", VP(), 4)
    with pytest.raises(ValueError, match="there is no grid 'kerras': the nearest are karras"):
        make_solver("ddim", VP(), 4, grid="kerras")
    with pytest.raises(ValueError, match="5 network evaluations cannot be reached at 2 a step"):
        make_solver("heun", VP(), 5)


def test_training_leaves_the_folder_also_where_it_was_cut_short(pipeline: Pipeline, tmp_path: Path) -> None:
    """The card states the step; the folder has the weights of the newest checkpoint."""
    out = tmp_path / "short"
    model = LatentModelConfig(schedule="cosine", dit=TINY_DIT)
    train_latent.train(
        LatentTask(out, pipeline.tokenizer, model=model, train=replace(TINY, max_steps=2), license="mit")
    )
    card = (out / "model" / "README.md").read_text()
    assert "| optimizer steps | 2 of 25, not finished |" in card
    assert front_of(card)["license"] == "mit"
    assert LatentModel.from_pretrained(out / "model").hash == load_model(out, CPU).hash
    assert LatentModel.from_pretrained(out).hash == load_model(out, CPU).hash  # a run is enough
    assert ImageTokenizer.from_pretrained(pipeline.tokenizer).card is not None
    assert "| optimizer steps | 25 |" in (pipeline.model / "model" / "README.md").read_text()
