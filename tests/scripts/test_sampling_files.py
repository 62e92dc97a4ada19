"""sample.py to files: the images of a grid one by one, whatever stopped it, whoever shared it; of chosen classes, of images, and
of noise that inversion found."""

import json
import os
import runpy
import signal
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from multiprocess import launch, programs
from PIL import Image
from pipelines import SCRIPTS, Pipeline, Script
from torch import Tensor

from midway.gen.commands.sample import SampleTask, run
from midway.gen.core.errors import MidwayError, UsageError
from midway.gen.data.images import load_images
from midway.gen.diffusion import sample_folder
from midway.gen.diffusion.inversion import SavedNoise, from_latents, from_noise, inverse, noise_of_state, rest_of
from midway.gen.diffusion.sample_folder import SampleFolder, file_name
from midway.gen.diffusion.samplers import SamplerConfig, make_samplers
from midway.gen.diffusion.sampling import decode, encode, noise_of, sample_latents
from midway.gen.evaluation.sources import SolverSource
from midway.gen.flags.sample_inputs import chosen_labels, read_images
from midway.samplers.grids import logsnr
from midway.samplers.schedule import EDM, VP, Linear, Schedule
from midway.samplers.solvers import SOLVERS

pytestmark = pytest.mark.usefixtures("one_thread")
CALL = "--solver dpmpp2m --nfe 4 --grid uniform --seed 3 --n 11 --batch-size 4"


def _pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image)


def _images(folder: Path) -> dict[str, np.ndarray]:
    return {path.name: _pixels(path) for path in sorted(folder.glob("*.png"))}


def _call(pipeline: Pipeline, out: Path, more: str = "") -> str:
    return f"sample --model {pipeline.model} {CALL} --out {out} {more}"


@pytest.fixture(scope="module")
def expected(pipeline: Pipeline) -> Tensor:
    """The images of `CALL`, uint8 (11, 1, 8, 8)."""
    (sampler,) = make_samplers(pipeline.load(), "dpmpp2m", 4, SamplerConfig(grids=("uniform",))).values()
    return decode(pipeline.load(), sample_latents(pipeline.load(), sampler, torch.arange(3, 14)).latents)


# ---- files ----


def test_a_folder_a_zip_and_an_npz_hold_the_images_of_their_seeds(
    pipeline: Pipeline, succeed: Script, tmp_path: Path, expected: Tensor
) -> None:
    names = [f"{seed:08d}-{seed % 10}.png" for seed in range(3, 14)]
    labels = [[name, seed % 10] for seed, name in enumerate(names, start=3)]
    done = succeed(_call(pipeline, tmp_path / "folder"))
    assert "11 images, 4 evaluations each" in done.out
    found = _images(tmp_path / "folder")
    assert list(found) == names
    assert np.array_equal(np.stack(list(found.values())), expected[:, 0])
    assert json.loads((tmp_path / "folder/dataset.json").read_text()) == {"labels": labels}
    succeed(_call(pipeline, tmp_path / "x.zip"))
    with zipfile.ZipFile(tmp_path / "x.zip") as archive:
        assert archive.namelist() == [*names, "dataset.json"]
        assert json.loads(archive.read("dataset.json")) == {"labels": labels}
        assert [archive.read(name) for name in names] == [(tmp_path / "folder" / name).read_bytes() for name in names]
    succeed(_call(pipeline, tmp_path / "x.npz"))
    with np.load(tmp_path / "x.npz", allow_pickle=False) as arrays:
        assert arrays.files == ["arr_0", "arr_1", "seeds"]
        assert arrays["arr_0"].dtype == np.uint8
        assert np.array_equal(arrays["arr_0"], expected.expand(-1, 3, -1, -1).permute(0, 2, 3, 1))
        assert arrays["arr_1"].tolist() == [seed % 10 for seed in range(3, 14)]
        assert arrays["seeds"].tolist() == list(range(3, 14))
    assert {path.name for path in tmp_path.iterdir()} == {"folder", "x.zip", "x.npz"}


def test_written_samples_are_read_as_data(
    pipeline: Pipeline, succeed: Script, tmp_path: Path, expected: Tensor
) -> None:
    """Folder and zip carry their labels."""
    for out in (tmp_path / "folder", tmp_path / "x.zip"):
        succeed(_call(pipeline, out))
        data = load_images(str(out))
        assert torch.equal(data.images[:], expected) and data.classes == tuple("0123456789")
        assert data.labels.tolist() == [seed % 10 for seed in range(3, 14)]


def test_without_classes_files_have_seeds_alone(
    unconditional: Path, pipeline: Pipeline, succeed: Script, tmp_path: Path
) -> None:
    for name in ("folder", "x.npz", "x.zip"):
        succeed(_call(pipeline, tmp_path / name, f"--n 2 --model {unconditional}"))
    assert list(_images(tmp_path / "folder")) == ["00000003.png", "00000004.png"]
    assert json.loads((tmp_path / "folder/dataset.json").read_text()) == {"labels": None}
    with np.load(tmp_path / "x.npz", allow_pickle=False) as arrays:
        assert arrays.files == ["arr_0", "seeds"]


@pytest.mark.parametrize(
    ("name", "safe"),
    [
        ("cat", "00000007-2-cat.png"),
        ("2", "00000007-2.png"),
        ("../../etc/passwd", "00000007-2-etc_passwd.png"),
        ("a/b\\c:d*e?\n", "00000007-2-a_b_c_d_e.png"),
        ("..", "00000007-2.png"),
        ("\udcff\x00", "00000007-2.png"),
        ("née  Café", "00000007-2-née_Café.png"),
        ("猫" * 90, f"00000007-2-{'猫' * 26}.png"),
    ],
)
def test_names_of_classes_are_safe_names_of_files(name: str, safe: str, tmp_path: Path) -> None:
    assert file_name(7, 2, name) == safe
    (tmp_path / file_name(7, 2, name)).write_bytes(b"")
    assert [path.name for path in tmp_path.iterdir()] == [safe]


# ---- interrupted, shared ----


@pytest.mark.parametrize("name", ["folder", "x.npz", "x.zip"])
def test_an_interrupted_command_goes_on_where_it_stopped(
    name: str, pipeline: Pipeline, succeed: Script, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Batches 3-6, 7-10, 11-13; stopped in the second. Then an image is cut, and one is of somebody else."""
    succeed(_call(pipeline, tmp_path / "whole" / name))
    out = tmp_path / name
    place = out if name == "folder" else tmp_path / f"{name}.parts"
    real, calls = SampleFolder.write, list[int]()

    def write(folder: SampleFolder, seeds: Tensor, labels: Tensor, images: Tensor) -> None:
        calls.append(int(seeds[0]))
        if len(calls) == 2:
            real(folder, seeds[:2], labels[:2], images[:2])
            raise KeyboardInterrupt
        real(folder, seeds, labels, images)

    monkeypatch.setattr(SampleFolder, "write", write)
    stopped = run_script(_call(pipeline, out), monkeypatch)
    assert stopped == 130 and not (out.exists() and out.is_file())
    there = _images(place)
    assert list(there) == [f"{seed:08d}-{seed}.png" for seed in range(3, 9)]
    cut = place / "00000004-4.png"
    cut.write_bytes(cut.read_bytes()[:-3])
    times = {path.name: path.stat().st_mtime_ns for path in place.glob("*.png") if path != cut}
    done = succeed(_call(pipeline, out))
    assert calls == [3, 7, 3, 7, 11] and "11 images" in done.out
    if name == "folder":
        assert all((place / name).stat().st_mtime_ns == time for name, time in times.items())
        whole = {path.name: path.read_bytes() for path in (tmp_path / "whole/folder").iterdir()}
        assert {path.name: path.read_bytes() for path in place.iterdir()} == whole
    else:
        assert not place.exists() and out.read_bytes() == (tmp_path / "whole" / name).read_bytes()
    again = succeed(_call(pipeline, out))
    assert "all of them there already" in again.out and calls == [3, 7, 3, 7, 11]


def run_script(line: str, monkeypatch: pytest.MonkeyPatch) -> int:
    """Exit code of a command line in this process."""
    name, *arguments = line.split()
    monkeypatch.setattr(sys, "argv", [str(SCRIPTS / f"{name}.py"), *arguments])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(sys.argv[0], run_name="__main__")
    assert isinstance(ended.value.code, int)
    return ended.value.code


def test_a_killed_process_leaves_whole_images_and_the_next_completes_them(
    pipeline: Pipeline, tmp_path: Path, expected: Tensor
) -> None:
    task = SampleTask(
        model=pipeline.model, out=tmp_path / "f", solver="dpmpp2m", nfe=4, grid="uniform", seed=3, n=11, batch_size=1
    )
    with programs(run, tmp_path / "1", task) as (program,):
        program.wait_for(lambda: len(list((tmp_path / "f").glob("*.png"))) > 1)
        os.kill(program.process.pid or 0, signal.SIGKILL)
        assert program.finish() == -signal.SIGKILL
    assert all(image.shape == (8, 8) for image in _images(tmp_path / "f").values())
    run(task)
    assert np.array_equal(np.stack(list(_images(tmp_path / "f").values())), expected[:, 0])
    assert {path.suffix for path in (tmp_path / "f").iterdir()} <= {".png", ".json", ""}


@pytest.mark.parametrize("name", ["folder", "x.npz"])
def test_several_processes_write_the_same_files(name: str, pipeline: Pipeline, succeed: Script, tmp_path: Path) -> None:
    succeed(_call(pipeline, tmp_path / "one" / name))
    flags = _call(pipeline, tmp_path / "two" / name).split()[1:]
    first, second = launch(SCRIPTS / "sample.py", *flags, processes=2)
    assert "11 images (7 drawn here), 4 evaluations each" in first and second == ""
    one, two = tmp_path / "one" / name, tmp_path / "two" / name
    if name == "folder":
        contents = [{path.name: path.read_bytes() for path in folder.iterdir()} for folder in (one, two)]
        assert contents[0] == contents[1] and len(contents[0]) == 14
    else:
        assert one.read_bytes() == two.read_bytes()


def test_no_more_than_a_batch_is_held(
    pipeline: Pipeline, succeed: Script, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes, read = list[int](), list[int]()
    real, stack = SampleFolder.write, torch.stack
    monkeypatch.setattr(SampleFolder, "write", lambda folder, *some: sizes.append(len(some[2])) or real(folder, *some))
    monkeypatch.setattr(sample_folder, "READ", 3)
    monkeypatch.setattr(sample_folder.torch, "stack", lambda images: read.append(len(images)) or stack(images))
    succeed(_call(pipeline, tmp_path / "x.npz"))
    assert sizes == [4, 4, 3] and read == [3, 3, 3, 2]


def test_more_seeds_are_added_and_other_settings_are_an_error(
    pipeline: Pipeline, succeed: Script, script: Script, tmp_path: Path
) -> None:
    out = tmp_path / "f"
    succeed(_call(pipeline, out))
    before = {path.name: path.stat().st_mtime_ns for path in out.glob("*.png")}
    succeed(_call(pipeline, out, "--n 14"))
    succeed(_call(pipeline, out, "--seed 30 --n 2"))
    found = {path.name: path.stat().st_mtime_ns for path in out.glob("*.png")}
    assert len(found) == 16 and before.items() <= found.items()
    assert len(json.loads((out / "dataset.json").read_text())["labels"]) == 16
    contents = {path.name: path.read_bytes() for path in out.iterdir()}
    changes = ("--nfe 6", "--solver ddim", "--grid karras", "--guidance 2", "--labels 3", "--tile 8 --tile-margin 0")
    for more in (*changes, "--init digits", "--precision bf16", "--parallel picard"):
        done = script(*_call(pipeline, out, more).split())
        assert done.code == 2 and "holds samples of other settings" in done.err, more
    assert "--nfe was 4, is 6" in script(*_call(pipeline, out, "--nfe 6").split()).err
    assert {path.name: path.read_bytes() for path in out.iterdir()} == contents
    (out / "sampling.json").write_text("[]")
    assert "sampling.json cannot be read" in script(*_call(pipeline, out).split()).err


@pytest.mark.parametrize("name", ["x.npz", "x.zip"])
def test_an_archive_of_other_images_stays(name: str, pipeline: Pipeline, script: Script, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"mine")
    done = script(*_call(pipeline, tmp_path / name).split())
    assert done.code == 2 and f"{name} is of other images" in done.err
    assert [path.name for path in tmp_path.iterdir()] == [name] and (tmp_path / name).read_bytes() == b"mine"


def test_a_folder_that_another_command_writes_is_an_error(
    pipeline: Pipeline, script: Script, succeed: Script, tmp_path: Path
) -> None:
    succeed(_call(pipeline, tmp_path / "f"))
    settings = json.loads((tmp_path / "f/sampling.json").read_text())
    with SampleFolder(tmp_path / "f", settings, 10).claimed():
        done = script(*_call(pipeline, tmp_path / "f").split())
    assert done.code == 2 and "is being written by another process" in done.err


@pytest.mark.parametrize("out", ["grid.png", "n.safetensors"])
def test_a_grid_is_drawn_by_one_process(
    out: str, script: Script, pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setattr("midway.gen.core.processes.watch", lambda: None)
    flags = f"--model {pipeline.model} --out {tmp_path / out}" + " --invert digits" * out.startswith("n")
    done = script("sample", *flags.split())
    assert done.code == 2 and "with 2 processes" in done.err and "which processes share" in done.err


# ---- classes ----


def test_labels_take_turns_by_seed(pipeline: Pipeline, succeed: Script, tmp_path: Path) -> None:
    succeed(_call(pipeline, tmp_path / "f", "--labels 7,2,5 --n 5"))
    assert list(_images(tmp_path / "f")) == [f"{seed:08d}-{(7, 2, 5)[seed % 3]}.png" for seed in range(3, 8)]
    succeed(_call(pipeline, tmp_path / "g", "--labels 2 --seed 4 --n 1"))
    assert np.array_equal(_pixels(tmp_path / "g/00000004-2.png"), _pixels(tmp_path / "f/00000004-2.png"))


def test_classes_are_named_by_number_or_name() -> None:
    model: Any = SimpleNamespace(classes=4, class_names=("cat", "dog", "2", "bee"), empty=(3,))
    assert chosen_labels("dog, 0,cat", model) == (1, 0, 0)
    assert chosen_labels("2", model) == (2,)
    model.class_names = ("2", "10", "0", "1")
    assert chosen_labels("2,0", model) == (0, 2), "a name is a name, also one that looks like another's number"
    model.class_names = ("cat", "dog", "2", "bee")
    for words, why in (
        ("dgo", "did you mean 'dog'"),
        ("bee", "3: bee had no training image"),
        ("3", "3: bee had no training image"),
        ("4", "classes 0 to 3"),
        ("", "names no class"),
    ):
        with pytest.raises(UsageError, match=why):
            chosen_labels(words, model)


# ---- images ----


def _stripes(folder: Path, count: int = 3, side: int = 20) -> Path:
    """RGB images of twice the model's size and more, so that they are resized and made grey."""
    folder.mkdir(parents=True)
    for number in range(count):
        pixels = np.zeros((side, side + 4, 3), np.uint8)
        pixels[:, number * 3 :: 6] = 255
        Image.fromarray(pixels).save(folder / f"{number}.png")
    return folder


@pytest.mark.parametrize("solver", ["dpmpp3m", "ddpm"])
@pytest.mark.parametrize(("strength", "left"), [(0.6, 3), (0.01, 1), (1.0, 5)])
def test_image_to_image_is_the_solver_on_the_rest_of_the_grid(
    solver: str, strength: float, left: int, pipeline: Pipeline, succeed: Script, tmp_path: Path
) -> None:
    images = _stripes(tmp_path / "in")
    flags = f"--solver {solver} --grid logsnr --nfe 5 --init {images} --strength {strength} --seed 0 --labels 4 --n 5"
    done = succeed(_call(pipeline, tmp_path / "f", flags))
    assert f"5 images, {left} evaluations each" in done.out, "counted at the network"
    assert f"then {left} of 5 steps" in done.out and "3 images: " in done.out
    trained = pipeline.load()
    schedule, grid = trained.model.schedule, logsnr(trained.model.schedule, 5)[5 - left :]
    pixels = read_images(str(images), trained.tokenizer.image_shape, "--init").pixels
    assert pixels.shape == (3, 1, 8, 8)
    x0, seeds = encode(trained, pixels), torch.arange(5)
    t = torch.tensor(grid[0], dtype=torch.float64)
    noise = noise_of(seeds, trained.model.latent_shape)
    start = schedule.alpha(t).item() * x0[seeds % 3] + schedule.sigma(t).item() * noise
    table = SOLVERS[solver].build(schedule, grid)
    made = sample_latents(trained, table, seeds, None, torch.full((5,), 4), lambda *_: start)
    assert np.array_equal(np.stack(list(_images(tmp_path / "f").values())), decode(trained, made.latents)[:, 0])


def test_images_are_a_file_a_folder_a_zip_an_npz_or_a_source(
    pipeline: Pipeline, succeed: Script, tmp_path: Path
) -> None:
    folder = _stripes(tmp_path / "in")
    with zipfile.ZipFile(tmp_path / "in.zip", "w") as archive:
        for path in sorted(folder.iterdir()):
            archive.write(path, path.name)
    np.savez(tmp_path / "in.npz", np.stack([_pixels(path) for path in sorted(folder.iterdir())]))
    found = []
    for number, source in enumerate((folder, tmp_path / "in.zip", tmp_path / "in.npz")):
        done = succeed(_call(pipeline, tmp_path / f"{number}.png", f"--init {source} --n 3"))
        assert "3 images, 2 evaluations each" in done.out, "0.6 of 4 steps by default"
        found.append(_pixels(tmp_path / f"{number}.png"))
    assert all(np.array_equal(found[0], other) for other in found[1:])
    for source, count in ((folder / "1.png", 1), ("digits", 1797)):
        succeed(_call(pipeline, tmp_path / "one.png", f"--init {source} --n {min(count, 2)}"))


def test_the_share_of_steps_is_the_nearest(pipeline: Pipeline) -> None:
    trained = pipeline.load()
    (sampler,) = make_samplers(trained, "dpmpp2m", 10, SamplerConfig(grids=("uniform",))).values()
    schedule = trained.model.schedule
    for strength, left in ((1.0, 10), (0.96, 10), (0.94, 9), (0.5, 5), (0.44, 4), (0.001, 1)):
        assert rest_of(sampler, "dpmpp2m", schedule, strength).grid == sampler.grid[10 - left :]
    assert rest_of(sampler, "dpmpp2m", schedule, 1.0) is sampler
    state = from_latents(lambda seeds: torch.ones(len(seeds), 2), schedule, 0.5)(torch.arange(2), torch.zeros(2, 2))
    assert state.flatten().tolist() == pytest.approx([schedule.alpha(torch.tensor(0.5)).item()] * 4)


# ---- inversion ----


@pytest.mark.parametrize("schedule", [Linear(), EDM(), VP()])
def test_noise_of_a_state_is_what_begins_there(schedule: Schedule) -> None:
    noise = torch.randn(3, 2, 2, 2, generator=torch.Generator().manual_seed(0))
    state = from_noise(noise, schedule, 0.7)(torch.tensor([4, 2]), noise[:2])
    spread = torch.hypot(schedule.alpha(torch.tensor(0.7)), schedule.sigma(torch.tensor(0.7)))
    torch.testing.assert_close(state, spread * noise[[1, 2]])
    torch.testing.assert_close(noise_of_state(state, schedule, 0.7), noise[[1, 2]])


@pytest.mark.parametrize("solver", ["ddim", "dpmpp2m", "heun", "edm_heun"])
def test_noise_and_back_comes_to_the_images_at_the_order_of_the_solver(solver: str, pipeline: Pipeline) -> None:
    trained = pipeline.load()
    model, schedule, seeds = trained.model, trained.model.schedule, torch.arange(8)
    latents, errors = torch.randn(8, *model.latent_shape, generator=torch.Generator().manual_seed(0)), []
    steps = (16, 32, 64)
    for budget in (n * SOLVERS[solver].evaluations - SOLVERS[solver].to_data for n in steps):
        (sampler,) = make_samplers(trained, solver, budget, SamplerConfig(grids=("logsnr",))).values()
        table = inverse(sampler, solver, schedule)
        state = sample_latents(trained, table, seeds, start=lambda some, _: latents[some]).latents
        noise = noise_of_state(state, schedule, sampler.grid[0])
        back = sample_latents(trained, sampler, seeds, start=from_noise(noise, schedule, sampler.grid[0])).latents
        errors.append((back - latents).square().mean().sqrt().item())
    order = np.log2(errors[0] / errors[-1]) / 2
    assert order > SOLVERS[solver].order - 0.35, errors
    assert errors[-1] < 0.15


def test_invert_and_noise_are_commands(pipeline: Pipeline, succeed: Script, script: Script, tmp_path: Path) -> None:
    call = f"sample --model {pipeline.model} --solver dpmpp2m --nfe 40 --grid logsnr --batch-size 3"
    file = tmp_path / "n.safetensors"
    done = succeed(f"{call} --invert digits --n 4 --out {file}")
    assert "4 images, 40 evaluations each" in done.out and "reconstruction from this noise: RMSE of latents" in done.out
    rmse = float(done.out.split("RMSE of latents ")[1].split(",")[0])
    trained = pipeline.load()
    found = SavedNoise.load(file, trained.model.latent_shape, 10)
    assert found.about["model"] == trained.hash and found.labels.tolist() == [0, 1, 2, 3], "classes of the images"
    succeed(f"{call} --noise {file} --out {tmp_path / 'back'}")
    pixels = read_images("digits", trained.tokenizer.image_shape, "--invert").pixels[:4]
    (sampler,) = make_samplers(trained, "dpmpp2m", 40, SamplerConfig(grids=("logsnr",))).values()
    start = from_noise(found.noise, trained.model.schedule, sampler.grid[0])
    latents = sample_latents(trained, sampler, torch.arange(4), None, found.labels, start).latents
    assert (latents - encode(trained, pixels)).square().mean().sqrt().item() == pytest.approx(rmse, rel=0.02)
    images = _images(tmp_path / "back")
    assert list(images) == [f"{seed:08d}-{seed}.png" for seed in range(4)]
    assert np.array_equal(np.stack(list(images.values())), decode(trained, latents)[:, 0])
    succeed(f"{call} --noise {file} --labels 9 --n 6 --out {tmp_path / 'other'}")
    assert list(_images(tmp_path / "other")) == [f"{seed:08d}-9.png" for seed in range(6)]


@pytest.mark.parametrize(
    ("noise", "labels", "match"),
    [
        (torch.zeros(2, 1, 1, 1), torch.zeros(2, dtype=torch.int64), "holds noise of shape"),
        (torch.full((2, 2, 2, 2), torch.nan), torch.zeros(2, dtype=torch.int64), "or not finite"),
        (torch.zeros(2, 2, 2, 2), torch.zeros(3, dtype=torch.int64), "its labels are"),
        (torch.zeros(2, 2, 2, 2), torch.tensor([0, 11]), "holds classes up to 11"),
        (torch.zeros(2, 2, 2, 2, dtype=torch.float64), torch.zeros(2, dtype=torch.int64), "float64"),
    ],
)
def test_noise_that_does_not_fit_is_an_error(noise: Tensor, labels: Tensor, match: str, tmp_path: Path) -> None:
    SavedNoise(noise, labels, {}).save(tmp_path / "n.safetensors")
    with pytest.raises(MidwayError, match=match):
        SavedNoise.load(tmp_path / "n.safetensors", (2, 2, 2), 10)


def test_the_settings_of_a_folder_hold_the_identity_of_the_samples(
    pipeline: Pipeline, succeed: Script, tmp_path: Path
) -> None:
    succeed(_call(pipeline, tmp_path / "f", "--n 1"))
    (sampler,) = make_samplers(pipeline.load(), "dpmpp2m", 4, SamplerConfig(grids=("uniform",))).values()
    identity = SolverSource(pipeline.load(), sampler, SamplerConfig().sampling()).identity
    assert json.loads(json.dumps(identity)).items() <= json.loads((tmp_path / "f/sampling.json").read_text()).items()
