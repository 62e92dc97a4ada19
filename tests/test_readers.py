"""What runs, caches and reports left is read as it was written or raises three lines: tensors, JSON and YAML, in any damage."""

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from damages import DAMAGES, damage, read
from mutations import MORE, TEXTS, mutations
from pipelines import Pipeline
from resuming import seal
from safetensors.torch import save_file
from sweeps import sweep_task

from midway.gen.baselines.registry import load_trained_baseline
from midway.gen.commands import evaluate, posthoc_ema, verify_resume
from midway.gen.core import checkpoints
from midway.gen.core.checkpoints import Checkpoint
from midway.gen.core.config import from_dict
from midway.gen.core.errors import DataError, MidwayError, UsageError
from midway.gen.core.files import state_hash
from midway.gen.core.runs import Run, kind_of
from midway.gen.data.places import data_of
from midway.gen.data.splits import load_splits
from midway.gen.diffusion.load import load_model, load_solver, load_tokenizer
from midway.gen.features.classifier import load_features
from midway.gen.features.open import open_features
from midway.gen.features.reference import make_reference
from midway.gen.flags.cli import own_fields, resolve
from midway.gen.flags.tasks import LatentTask
from midway.gen.recipes.recipes import LATENT_RECIPES
from midway.gen.sweep.store import Cell, Numbers, Part
from midway.gen.tokenizer.latents import open_latents
from midway.gen.training.checkpointing import read_state

CPU = torch.device("cpu")
Read = Callable[[Path], object]
"""Reads a file of a copy of the pipeline, whose folder it is given."""


@pytest.fixture(scope="module")
def root(pipeline: Pipeline, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of all runs of the pipeline, and a sweep."""
    root = tmp_path_factory.mktemp("readers") / "runs"
    evaluate.run(sweep_task(pipeline, root.parent / "report", solvers="ddim", grids="uniform", nfe="4", blocks=1))
    shutil.copytree(pipeline.root, root, ignore=shutil.ignore_patterns("unconditional", "samples"))
    return root


@contextmanager
def kept(file: Path) -> Iterator[None]:
    """The file is the same again after the block."""
    content = file.read_bytes()
    try:
        yield
    finally:
        file.write_bytes(content)


@pytest.fixture
def trusted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every manifest fits its files, as if they had been written so; test_a_sealed_checkpoint shows that this is the same."""
    monkeypatch.setattr(checkpoints, "verify", lambda path: Checkpoint(path, int(path.name[5:])))


def only(root: Path, pattern: str) -> Path:
    (file,) = root.glob(pattern)
    return file


# ---- tensors ----


def read_latents(root: Path) -> object:
    tokenizer, data = load_tokenizer(root / "tokenizer")
    found = open_latents(only(root, "tokenizer/latents-????????-????????"), load_splits(data).train, tokenizer)
    return found.read(torch.arange(len(found)))


def read_solver(root: Path, name: str) -> object:
    return load_solver(load_model(root / "model", CPU), name, "uniform", 4)


def average(root: Path) -> object:
    """Made of all stored ones, and not kept."""
    out = root / "average"
    try:
        return posthoc_ema.make(posthoc_ema.PosthocTask(root / "model", 0.07, out))
    finally:
        shutil.rmtree(out, ignore_errors=True)


STEP, AMED = "checkpoints/step-*", "solvers/amed-predictor-uniform-nfe4"
TENSORS: dict[str, tuple[str, Read]] = {
    "latent model": (f"model/{STEP}/ema.safetensors", lambda root: load_model(root / "model", CPU)),
    "tokenizer of a latent model": (
        f"model/{STEP}/tokenizer/*.safetensors",
        lambda root: load_model(root / "model", CPU),
    ),
    "tokenizer": (f"tokenizer/{STEP}/tokenizer/*.safetensors", lambda root: load_tokenizer(root / "tokenizer")),
    "baseline": ("baseline/best/step-*/ema.safetensors", lambda root: load_trained_baseline(root / "baseline")),
    "features": (
        f"features/{STEP}/features.safetensors",
        lambda root: load_features(only(root, f"features/{STEP}/features.safetensors")),
    ),
    "first average": ("model/posthoc/step-5-std-0.050.safetensors", average),
    "last average": ("model/posthoc/step-25-std-0.100.safetensors", average),
    "predictor": (f"model/{AMED}/{STEP}/solver.safetensors", lambda root: read_solver(root, "amed-predictor")),
    "constants": (
        f"model/solvers/amed-uniform-nfe4/{STEP}/solver.safetensors",
        lambda root: read_solver(root, "amed"),
    ),
    "reference": ("../report/reference/*.safetensors", lambda root: read_reference(root)),
}


def read_reference(root: Path) -> object:
    network = load_features(only(root, f"features/{STEP}/features.safetensors"))
    train = load_splits(data_of(Run.open(root / "features", "features"))).train
    return make_reference(network, network.name, train, root.parent / "report/reference")


@pytest.mark.usefixtures("trusted")
@pytest.mark.parametrize("source", TENSORS)
def test_a_file_with_other_tensors_is_never_used(source: str, root: Path) -> None:
    """Though its own hash, and the manifest around it, are those of the damaged file."""
    pattern, use = TENSORS[source]
    file = only(root, pattern)
    use(root)
    for name in DAMAGES:
        with kept(file):
            damage(file, name)
            tensors, header = read(file)
            if source == "reference":
                save_file(tensors, file, {**header, "hash": state_hash("reference", tensors)})
            elif source in ("predictor", "constants"):
                save_file(tensors, file, {key: value for key, value in header.items() if key != "hash"})
            with pytest.raises(DataError) as caught:
                use(root)
            assert str(root.parent) in str(caught.value), name
    use(root)


# ---- documents ----


@dataclass(frozen=True)
class Document:
    """A JSON or YAML file of the runs, and what reads it."""

    pattern: str
    uses: tuple[Read, ...]
    load: Callable[[str], Any] = json.loads
    dump: Callable[[Any], str] = json.dumps
    depth: int = 9
    forgiving: bool = False
    """Whether it is used as far as it can be."""


def resumed(run: Path) -> object:
    return read_state(checkpoints.verify(checkpoints.directories(run / "checkpoints")[0]))


def noted(run: Path) -> object:
    Run(run, "latent_model").note({"step": 1})
    return json.loads((run / "env.json").read_text())["starts"][-1]["step"]


def forgotten(run: Path) -> None:
    Run(run, "latent_model").forget_after(10)


def described(run: Path) -> object:
    """A run's configuration as commands use it, without its weights."""
    found = Run.open(run, kind_of(run))
    return data_of(found), verify_resume.open_any(run)


def searched(root: Path) -> object:
    """A feature run as a reference's."""
    return open_features(root / "features", data_of(Run.open(root / "tokenizer", "tokenizer")), "the tokenizer")


def restarted(run: Path) -> object:
    return resolve(LatentTask, LATENT_RECIPES, ["--config", str(run / "config.yaml"), "--out", str(run / "other")])


CONFIG: dict[str, Any] = {"load": yaml.safe_load, "dump": json.dumps, "depth": 1}
"""Deeper keys: test_every_key_of_a_configuration."""
DOCUMENTS: dict[str, Document] = {
    "state": Document(f"model/{STEP}/state.json", (lambda root: resumed(root / "model"),), depth=1),
    "latent model": Document(f"model/{STEP}/model.json", (TENSORS["latent model"][1],)),
    "baseline": Document("baseline/best/step-*/model.json", (TENSORS["baseline"][1],)),
    "latents": Document("tokenizer/latents-????????-????????/manifest.json", (read_latents,)),
    "tokenizer": Document(f"tokenizer/{STEP}/tokenizer/config.json", (TENSORS["tokenizer"][1],)),
    "environment": Document("model/env.json", (lambda root: noted(root / "model"),), depth=1, forgiving=True),
    "metrics": Document(
        "model/metrics.jsonl",
        (lambda root: verify_resume._records(root / "model"), lambda root: forgotten(root / "model")),
        lambda text: json.loads(text.splitlines()[0]),
        forgiving=True,
    ),
    "config of a latent model": Document(
        "model/config.yaml", (lambda root: described(root / "model"), lambda root: restarted(root / "model")), **CONFIG
    ),
    "config of features": Document(
        "features/config.yaml",
        (lambda root: described(root / "features"), searched),
        **CONFIG,
    ),
    "config of a tokenizer": Document("tokenizer/config.yaml", (lambda root: described(root / "tokenizer"),), **CONFIG),
    "config of a baseline": Document("baseline/config.yaml", (lambda root: described(root / "baseline"),), **CONFIG),
    "config of a solver": Document(
        f"model/{AMED}/config.yaml",
        (lambda root: verify_resume.open_any(root / "model" / AMED),),
        **CONFIG,
    ),
}
"""Readers rather than whole commands, which end in the same way (test_refusals.py)."""


@pytest.mark.usefixtures("trusted")
@pytest.mark.parametrize("name", DOCUMENTS)
def test_a_changed_document_raises_three_lines_or_is_used(name: str, root: Path) -> None:
    document = DOCUMENTS[name]
    file = only(root, document.pattern)
    found = document.load(file.read_text())
    for use in document.uses:
        with kept(file):
            use(root)
    damaged = [(change, document.dump(value).encode()) for change, value in mutations(found, document.depth)]
    damaged += [(f"text {text[:10]!r}", text) for text in TEXTS]
    used: list[str] = []
    for change, content in damaged:
        for use in document.uses:
            with kept(file), redirect_stdout(StringIO()):
                file.write_bytes(content)
                try:
                    use(root)
                    used.append(change)
                except MidwayError as error:
                    assert isinstance(error, DataError | UsageError) and error.why and error.fix, change
                except Exception as error:
                    raise AssertionError(f"{change}: {error!r}") from error
    assert document.forgiving or len(used) < 0.4 * len(damaged) * len(document.uses), used


def test_a_sealed_checkpoint(root: Path, tmp_path: Path) -> None:
    """One damage of each kind in a checkpoint whose manifest agrees with it."""
    for pattern, harm in (
        (f"model/{STEP}/ema.safetensors", lambda file: damage(file, "NaN")),
        (f"model/{STEP}/model.json", lambda file: file.write_text("[]")),
    ):
        run = Path(shutil.copytree(root / "model", tmp_path / pattern.rpartition("/")[2]))
        file = only(run.parent, pattern.replace("model/", f"{run.name}/", 1))
        harm(file)
        with pytest.raises(DataError, match="damaged"):
            load_model(run, CPU)
        seal(file.parent)
        with pytest.raises(DataError, match="cannot be"):
            load_model(run, CPU)


def test_a_changed_manifest_is_no_manifest(root: Path, tmp_path: Path) -> None:
    """Also with a hash that fits it, as far as what it names is of these types."""
    path = Path(shutil.copytree(only(root, f"tokenizer/{STEP}"), tmp_path / "step-25"))
    text = (path / checkpoints.MANIFEST).read_text()
    found = {key: value for key, value in json.loads(text).items() if key != "sha256"}
    checkpoints.verify(path)
    changes = [(change, sealed_manifest(value)) for change, value in mutations(found) if not change.startswith(OTHER)]
    for change, damaged in [*changes, *((str(t[:10]), t) for t in TEXTS)]:
        (path / checkpoints.MANIFEST).write_bytes(damaged)
        with pytest.raises(DataError, match="damaged") as caught:
            checkpoints.verify(path)
        assert "resume" in caught.value.fix, change
        assert next(checkpoints.valid(tmp_path, lambda line: None), None) is None, "the one before is used"


OTHER = ("versions", "no versions", "xversions", "config_hash", "no config_hash", "xconfig_hash")
"""Entries that nothing depends on."""


def sealed_manifest(values: dict[str, Any]) -> bytes:
    return json.dumps({**values, "sha256": checkpoints._own_hash(values)}).encode()


@pytest.mark.parametrize("name", ["model", "tokenizer", "features", "baseline", "solver"])
def test_every_key_of_a_configuration(name: str, root: Path) -> None:
    """Of any type and size: as deep as it goes, and without the time that YAML takes."""
    run = {"solver": root / "model" / AMED}.get(name, root / name)
    found = Run.open(run, kind_of(run))
    task = verify_resume.KINDS[found.kind].task(found.config)
    values = own_fields(task, found.config)
    from_dict(task, values)
    for change, value in mutations(values, values=MORE):
        try:
            from_dict(task, own_fields(task, value))
        except MidwayError as error:
            assert error.why and error.fix, change
        except Exception as error:
            raise AssertionError(f"{change}: {error!r}") from error


def test_the_header_of_a_feature_network(root: Path) -> None:
    file = only(root, f"features/{STEP}/features.safetensors")
    tensors, header = read(file)
    configs = [(change, json.dumps(value)) for change, value in mutations(json.loads(header["config"]))]
    configs += [(text[:9].decode(errors="replace"), text.decode(errors="replace")) for text in TEXTS]
    headers = [(change, {**header, "config": config}) for change, config in configs]
    headers += [(f"no {key}", {k: v for k, v in header.items() if k != key}) for key in header if key != "data"]
    headers += [(f"{key} = x", {**header, key: "x"}) for key in header if key != "data"]
    with kept(file):
        for change, damaged in headers:
            save_file(tensors, file, damaged)
            with pytest.raises(DataError):
                assert load_features(file), change


@pytest.mark.usefixtures("trusted")
@pytest.mark.parametrize("key", ["card", "config"])
def test_the_header_of_a_learned_solver(key: str, root: Path) -> None:
    file, trained = only(root, f"model/{AMED}/{STEP}/solver.safetensors"), load_model(root / "model", CPU)
    tensors, header = read(file)
    rest = {name: value for name, value in header.items() if name != "hash"}
    texts = [(change, json.dumps(value)) for change, value in mutations(json.loads(header[key]), values=MORE)]
    texts += [(text[:9].decode(errors="replace"), text.decode(errors="replace")) for text in TEXTS]
    used = list[str]()
    with kept(file):
        for change, text in texts:
            save_file(tensors, file, {**rest, key: text})
            try:
                load_solver(trained, "amed-predictor", "uniform", 4)
                used.append(change)
            except MidwayError as error:
                assert str(file) in error.what or str(file.parents[2]) in error.what, change
            except Exception as error:
                raise AssertionError(f"{change}: {error!r}") from error
    assert len(used) < 0.3 * len(texts), used


# ---- cells of a sweep ----


def solver_cell(root: Path) -> Path:
    """The file of the only solver's; the other is of the exact solution."""
    (file,) = (path for path in (root.parent / "report/cells").glob("*.json") if '"fine"' in path.read_text())
    return file


def sealed_cell(content: dict[str, Any]) -> str:
    """With the hash of what it holds."""
    body = {key: content[key] for key in ("identity", "numbers") if key in content}
    text = json.dumps(body, sort_keys=True, ensure_ascii=False)
    return json.dumps({**content, "sha256": hashlib.sha256(text.encode()).hexdigest()})


@pytest.mark.parametrize("seal_it", [True, False])
def test_a_damaged_cell_is_named_and_measured_again(
    seal_it: bool, root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With a hash that fits, too: what it holds must be the numbers of this cell."""
    file = solver_cell(root)
    found = json.loads(file.read_text())
    cell = Cell(file.parent, found["identity"])
    assert cell.id == file.stem and isinstance(cell.numbers(), Numbers)
    if seal_it:
        damaged = [(change, sealed_cell(value)) for change, value in mutations(found)]
    else:
        damaged = [(change, json.dumps({**found, "numbers": value})) for change, value in mutations(found["numbers"])]
    damaged += [(str(text[:10]), text.decode(errors="surrogateescape")) for text in TEXTS]
    kept_numbers = 0
    for change, text in damaged:
        with kept(file):
            file.write_bytes(text.encode(errors="surrogateescape"))
            numbers, said = cell.numbers(), capsys.readouterr().out
            assert numbers is None or isinstance(numbers, Numbers), change
            if numbers is None:
                assert said.startswith(f"{file.name} is damaged") and not file.exists(), change
            kept_numbers += numbers is not None
    assert kept_numbers < (0.4 * len(damaged) if seal_it else 1)


WRONG_NUMBERS: tuple[dict[str, Any], ...] = (
    {"nfe": -1},
    {"nonfinite": -1},
    {"nonfinite": 1},
    {"distances": [None]},
    {"distances": [-5.0]},
    {"distances": [1.0, 2.0], "metrics": {}},
    {"seconds": {"solver": -1.0, "decode": 0.0, "features": 0.0}},
)


@pytest.mark.parametrize("change", WRONG_NUMBERS, ids=str)
def test_numbers_that_mean_nothing_are_measured_again(
    change: dict[str, Any], root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Though of the right types, and with a hash that fits."""
    file = solver_cell(root)
    found = json.loads(file.read_text())
    with kept(file):
        file.write_bytes(sealed_cell({**found, "numbers": {**found["numbers"], **change}}).encode())
        assert Cell(file.parent, found["identity"]).numbers() is None
    assert capsys.readouterr().out.startswith(f"{file.name} is damaged")


CLASSES: tuple[dict[str, Any], ...] = (
    {"empty": [99]},
    {"empty": [-1]},
    {"empty": [3, 3]},
    {"empty": [4, 3]},
    {"empty": [*range(10)]},
    {"class_names": ["a"]},
)


@pytest.mark.usefixtures("trusted")
@pytest.mark.parametrize("change", CLASSES, ids=str)
def test_classes_that_a_model_does_not_have_raise(change: dict[str, Any], root: Path) -> None:
    file = only(root, f"model/{STEP}/model.json")
    with kept(file):
        file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
        with pytest.raises(DataError, match=r"model\.json cannot be used"):
            load_model(root / "model", CPU)


@pytest.mark.usefixtures("trusted")
def test_empty_classes_that_a_baseline_does_not_have_raise(root: Path) -> None:
    file = only(root, "baseline/best/step-*/model.json")
    with kept(file):
        file.write_text(json.dumps({**json.loads(file.read_text()), "empty": [99]}))
        with pytest.raises(DataError, match=r"model\.json cannot be used"):
            load_trained_baseline(root / "baseline")


@pytest.mark.usefixtures("trusted")
@pytest.mark.parametrize(("name", "value"), [("latent_std", 0.0), ("latent_std", -1.0), ("latents_measured", 0.0)])
def test_statistics_of_latents_that_nothing_has_raise(name: str, value: float, root: Path) -> None:
    file = only(root, f"model/{STEP}/tokenizer/*.safetensors")
    tensors, header = read(file)
    with kept(file):
        save_file({**tensors, name: torch.full_like(tensors[name], value)}, file, header)
        with pytest.raises(DataError, match="model/checkpoints"):
            load_model(root / "model", CPU)


def test_a_cell_of_another_identity_is_measured_again(root: Path, tmp_path: Path) -> None:
    file = solver_cell(root)
    other = Cell(tmp_path, {"a": 1})
    shutil.copy(file, tmp_path / f"{other.id}.json")
    assert other.numbers() is None


def test_a_damaged_part_is_named_and_made_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cell = Cell(tmp_path, {"a": 1})
    cell.write(0, Part({"features": torch.randn(4, 3)}, {"nfe": 4}))
    file = only(tmp_path, "*.parts/*")
    assert cell.part(0) is not None and cell.part(1) is None and capsys.readouterr().out == ""
    for name in DAMAGES:
        with kept(file):
            damage(file, name)
            assert cell.part(0) is None
            assert f"{file.name} is damaged" in capsys.readouterr().out
    for costs in ("[]", "x", "3", "[" * 100_000):
        with kept(file):
            tensors, _ = read(file)
            save_file(tensors, file, {"costs": costs, "hash": state_hash(costs, tensors)})
            assert cell.part(0) is None
