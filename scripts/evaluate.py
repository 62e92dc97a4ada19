"""Measure the step budget: python scripts/evaluate.py --model runs/digits-dit --features runs/digits-features

What is measured is kept in cells/ of the report, so a sweep that was killed goes on where it was, and one with more solvers
measures those alone. Several processes share the work:

    accelerate launch --num_processes 4 scripts/evaluate.py --model runs/cifar10-dit --samples 50000

Anybody's samples: python scripts/evaluate.py --images samples.npz --data digits --features runs/digits-features --out report
"""

import shutil
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro
from sampling_flags import SamplingFlags
from tqdm import tqdm

from cli import main, names, numbers, resolve
from midway.gen.baselines.registry import TrainedBaseline, load_trained_baseline
from midway.gen.core.environment import command_line, environment, hardware
from midway.gen.core.errors import DataError, UsageError
from midway.gen.core.processes import ProcessInfo, device_and_process
from midway.gen.data.splits import DataConfig, Splits, load_splits
from midway.gen.diffusion.load import LEARNED, TrainedModel, load_model, solver_path
from midway.gen.diffusion.samplers import LEARNED_ON
from midway.gen.evaluation.diffusers_model import check_images, load_diffusers
from midway.gen.evaluation.export import check_folders, export_measurement, to_export
from midway.gen.evaluation.external import ExternalImages, ReadingOptions, fitted, images_per_block, read_all
from midway.gen.evaluation.jobs import Model, Other, SweepConfig, all_jobs, planned_cells
from midway.gen.evaluation.measure import FineSolution
from midway.gen.evaluation.metrics import check_metrics
from midway.gen.evaluation.repeats import check_repeats, left_out, merge_trainings
from midway.gen.evaluation.sweep import Sweep, run_sweep, with_best
from midway.gen.features.extractor import plain_float32
from midway.gen.features.open import open_extractor, same_images
from midway.gen.features.reference import make_reference
from midway.gen.metrics.frechet import Root
from midway.gen.report.notes import (
    class_notes,
    common_notes,
    external_notes,
    few_note,
    floor_text,
    model_text,
    notes,
    reference_notes,
    timing_notes,
)
from midway.gen.report.sections import CODED, Section, code_section, trajectory_section
from midway.gen.report.sweep import terminal_text, write_report
from midway.gen.report.table import ReportContext
from midway.samplers.solvers import ALIASES, SOLVERS
from tasks import Flat

UNNAMED = DataConfig(data="")
"""The reference data while none are named."""


@dataclass(frozen=True, kw_only=True)
class EvaluateTask(SamplingFlags):
    """Fréchet distance and RMSE of every solver at every budget, of baselines, and of images that somebody else made.

    Writes results.csv, results.jsonl, report.md, report.html and two plots; cells/ holds what is measured, also of a sweep that
    was killed.
    """

    model: Path | None = None
    """Run directory of the latent model; its training images are the reference."""
    diffusers: Path | None = None
    """In place of --model: folder of a saved diffusers pipeline with a unet and a scheduler, and a vqvae or vae if latent."""
    images: tuple[Path, ...] = ()
    """Samples that somebody else made, each a row: folders or zips of image files, or NPZ with arr_0 uint8 (N, H, W, C)."""
    images_resize: int | None = None
    """Bring --images to this size: shorter side, then a centre crop. It changes their distance."""
    images_channels: Literal[1, 3] | None = None
    """1 converts --images to grey, 3 to RGB."""
    data: Annotated[DataConfig, Flat] = field(default_factory=lambda: UNNAMED)
    """Without --model: the reference, and its split, as they were given to the training of --features."""
    features: str | Path | None = None
    """What measures: run directory of a feature network (default: the one beside the model that was trained on its images), or a
    published one: inception, dinov2-vitb14, dinov2-vitl14, clip-vitb32, clip-vitl14."""
    feature_weights: Annotated[Path | None, tyro.conf.arg(aliases=["--inception-weights"])] = None
    """File with the weights of a published feature network (default: found in the cache, or downloaded)."""
    out: Path | None = None
    """Directory to write (default: report/ in the model's run; needed without --model)."""
    repeats: tuple[Path, ...] = ()
    """Run directories of trainings of the same configuration with other seeds: figures become means over trainings, and error
    bars their deviation. Learned solvers must have been learned for each."""
    baselines: tuple[Path, ...] = ()
    """Run directories of baselines of the same images, each a row at its own number of evaluations."""
    solvers: str = "euler,ddim,heun,dpm2,dpmpp2m"
    """Comma-separated; learned ones (table, amed, amed-constants, amed-plugin-...) must have been trained for every budget.
    all: every solver there is, and what was learned for every budget."""
    nfe: str = "4,6,8,10,20"
    """Comma-separated budgets of network evaluations."""
    grids: str = "uniform,logsnr,karras"
    """Comma-separated; every solver is measured on each, and shown on its best. gits is fitted to the model."""
    skip_unreachable: bool = False
    """Leave out budgets that a solver cannot reach (heun at 5), instead of refusing them."""
    n: Annotated[int | None, tyro.conf.arg(aliases=["--samples"])] = None
    """Images per block (default: as many as are held out, so that the floor is measured at the same count; without --model, as
    many as --images hold). Launchers take --n for a flag of their own; there write --samples."""
    blocks: int | None = None
    """Disjoint blocks of seeds, or of consecutive --images, whose spread is the error bar (default: 4; 1 of --images alone)."""
    seed: int = 0
    """First seed."""
    reference_nfe: int = 128
    """Evaluations of the fine solution behind RMSE and the use of codes; 0 leaves them out."""
    metrics: str = "kid"
    """Comma-separated, beside the Fréchet distance: kid, precision (and recall), density (and coverage), is, infinity; empty for
    none."""
    root: Root = "eigen"
    """newton-schulz finds the distance by matrix products alone, on the GPU if there is one; it refuses features it cannot do."""
    overlap: bool = False
    """Decode and look at images while the next are sampled. On a GPU more images a second; times overlap, too."""
    export_npz: Path | None = None
    """Folder for the images of each best cell (of all, with one solver) as NPZ, for ADM's evaluator; they are sampled again."""
    save_images: Path | None = None
    """The same as zips of PNG, in EDM's layout."""
    fresh: bool = False
    """Forget what was measured into --out before."""
    title: str = "Fréchet distance per step budget"


def run(task: EvaluateTask) -> Sweep:
    """Measure, print the table, write the report; samples and features are computed in IEEE float32."""
    device, process = device_and_process()
    check_flags(task)
    with plain_float32(device):
        return measure_and_report(task, device, process)


def measure_and_report(task: EvaluateTask, device: torch.device, process: ProcessInfo) -> Sweep:
    """`run` on this device, as this share of the processes."""
    model = load_diffusers(task.diffusers, device) if task.diffusers else None
    trained = load_model(task.model, device) if task.model else None
    repeats = load_repeats(task, trained, device)
    measured: Model | None = trained or model
    data, out = trained.data if trained else task.data, folder(task)
    baselines = load_baselines(task.baselines, data, device)
    budgets = numbers(task.nfe, "--nfe")
    config = SweepConfig(
        solvers=solver_names(task.solvers, trained, budgets),
        nfe=budgets,
        grids=names(task.grids),
        n=task.n,
        blocks=blocks(task),
        first_seed=task.seed,
        reference_nfe=task.reference_nfe if measured else 0,
        metrics=names(task.metrics),
        overlap=task.overlap,
        skip=task.skip_unreachable,
        **task.sampler_options(device),
    )
    if not config.solvers or not config.grids:
        raise UsageError("--solvers or --grids is empty", "there is nothing to measure", "name at least one of each")
    whose = "the model" if trained else "the reference"
    beside = [trained.run.path] if trained else []
    extractor = open_extractor(task.features, beside, data, whose, task.feature_weights)
    splits = load_splits(data)
    extractor.check(splits.train.images, "the reference has")
    if model is not None:
        check_images(model, splits.train.images)
    externals = external_images(task, splits)
    if measured is None and externals and config.n is None and config.blocks > 0:
        config = replace(config, n=images_per_block(list(externals.values()), config.blocks))
    check_folders({"--export-npz": task.export_npz, "--save-images": task.save_images})
    if process.rank == 0 and task.fresh:
        shutil.rmtree(out / "cells", ignore_errors=True)
    n = len(splits.held_out.images) if config.n is None else config.n
    config.check(n)
    check_metrics(config.metrics, n, extractor.dim, extractor.has_logits)
    others: dict[str, Other] = {**baselines, **externals}
    all_jobs(measured, others, config, n)  # what cannot be is refused before anything is written
    shown = process.rank == 0
    told = (*class_notes(splits, n, measured), *external_notes(externals, n, config.blocks))
    for line in told if shown else ():
        print(line)
    reference = make_reference(extractor.to(device), extractor.name, splits.train, out / "reference", task.root)
    planned = list(planned_cells(config, len(others), measured is not None))
    planned += [cell for _ in repeats for cell in planned_cells(config)]
    with tqdm(planned, desc="sweep", disable=None if shown else True, leave=False) as bar:

        def progress(cell: str) -> None:
            bar.set_postfix_str(cell)
            bar.update()

        sweep = run_sweep(measured, reference, splits, config, out, progress, others, process)
        again = [
            run_sweep(other, reference, splits, config, out, progress, {}, process).measurements for other in repeats
        ]
        missing = left_out([sweep.measurements, *again])
        sweep = with_best(sweep, merge_trainings([sweep.measurements, *again])) if again else sweep
    if shown:
        facts = context(task, measured, splits, config, externals, sweep, extractor.note, extractor.dim, missing)
        write_report(out, sweep.measurements, facts, sweep.grids, sections(trained, splits, config, sweep.fine))
        print(terminal_text(sweep.measurements))
        if measured is None:
            print(floor_text(sweep))
        print(f"report: {out / 'report.html'}")
        export_images(task, sweep)
    return sweep


def load_repeats(task: EvaluateTask, trained: TrainedModel | None, device: torch.device) -> list[TrainedModel]:
    """What --repeats names; DataError for other configurations."""
    found = [load_model(path, device) for path in task.repeats]
    if trained is not None:
        check_repeats(trained, found)
    return found


def sections(
    trained: TrainedModel | None, splits: Splits, config: SweepConfig, fine: FineSolution | None
) -> list[Section]:
    """What the report says of a model of ours beyond its distances; the codes are those of the fine solution."""
    if trained is None:
        return []
    latents = None if fine is None else fine.latents(CODED)
    sound = latents is not None and bool(latents.isfinite().all())
    codes = code_section(trained, splits.held_out.images, latents) if latents is not None and sound else None
    found = [trajectory_section(trained, config.sampling()), codes]
    return [section for section in found if section is not None]


def export_images(task: EvaluateTask, sweep: Sweep) -> None:
    """Write what --export-npz and --save-images ask for."""
    if task.export_npz is None and task.save_images is None:
        return
    for m in to_export(sweep):
        for path in export_measurement(sweep, m, task.seed, task.export_npz, task.save_images):
            print(f"images: {path}")


def check_flags(task: EvaluateTask) -> None:
    """UsageError for a reference that is named twice, or not at all, and for nothing to measure."""
    named = replace(task.data, on_bad_image=UNNAMED.on_bad_image, download=UNNAMED.download)
    if task.model and task.diffusers:
        raise UsageError("--model and --diffusers", "a report is of one model", "pass one of them")
    if task.model and named != UNNAMED:
        raise UsageError(
            "--model and flags of the reference data",
            "the reference is what the model was trained on",
            "drop --data, --held-out, --split-seed, --channels and --resize (of samples: --images-resize, --images-channels)",
        )
    if task.graph and task.overlap:
        raise UsageError("--graph and --overlap", "nothing else may run while a graph is captured", "pass one of them")
    if task.repeats and not task.model:
        raise UsageError("--repeats without --model", "they repeat its training", "pass --model")
    if not (task.model or task.diffusers or task.images or task.baselines):
        raise UsageError(
            "nothing to measure", "no model and no images are named", "pass --model, --diffusers or --images"
        )
    if not task.model and not task.data.data:
        raise UsageError(
            "--data is not given",
            "samples are compared with the images that they imitate",
            "pass --data, --held-out, ... as they were given to the training of --features",
        )


def blocks(task: EvaluateTask) -> int:
    """Four, unless told otherwise; somebody's images are measured as the one set that they are."""
    if task.blocks is not None:
        return task.blocks
    return 4 if task.model or task.diffusers or task.baselines else 1


def folder(task: EvaluateTask) -> Path:
    """Where the report goes."""
    if task.out is None and task.model is not None:
        return task.model / "report"
    if task.out is None:
        raise UsageError("--out is not given", "there is no run that the report belongs to", "pass --out FOLDER")
    return task.out


def external_images(task: EvaluateTask, splits: Splits) -> dict[str, ExternalImages]:
    """What --images names, in the channels of the reference; DataError for what does not compare with it."""
    options = ReadingOptions(task.images_channels, task.images_resize, task.data.on_bad_image)
    found = read_all(task.images, options)
    return {name: fitted(images, splits.train.images) for name, images in found.items()}


def load_baselines(paths: tuple[Path, ...], data: DataConfig, device: torch.device) -> dict[str, TrainedBaseline]:
    """By the names of their runs; UsageError for one name twice, DataError for other images than the reference."""
    found: dict[str, TrainedBaseline] = {}
    for path in paths:
        name, baseline = path.resolve().name, load_trained_baseline(path, device)
        if name in found:
            raise UsageError(f"--baselines names {name} twice", "rows need different names", "rename one of the runs")
        if not same_images(baseline.data, data):
            raise DataError(
                f"{path} was trained on other images than the reference",
                f"its data are {baseline.data}, the reference is {data}",
                "train it on the same --data, --held-out, --split-seed, --channels and --resize",
            )
        found[name] = baseline
    return found


def solver_names(words: str, trained: TrainedModel | None, budgets: tuple[int, ...]) -> tuple[str, ...]:
    """The solvers that --solvers names."""
    if words != "all":
        return names(words)
    plain = tuple(name for name in SOLVERS if name not in ALIASES)
    if trained is None:
        return plain
    learned = [name for name in LEARNED if all(_is_learned(name, trained, nfe) for nfe in budgets)]
    return (*plain, *learned)


def _is_learned(name: str, trained: TrainedModel, nfe: int) -> bool:
    return any((solver_path(trained.run.path, name, grid, nfe) / "config.yaml").exists() for grid in LEARNED_ON)


def context(
    task: EvaluateTask,
    model: Model | None,
    splits: Splits,
    config: SweepConfig,
    externals: dict[str, ExternalImages],
    sweep: Sweep,
    features: str,
    dim: int,
    missing: list[str],
) -> ReportContext:
    """Everything a reader needs beside the numbers."""
    n = len(splits.held_out.images) if config.n is None else config.n
    alone = (*common_notes(n, config, splits, features), floor_text(sweep))
    told = alone if model is None else notes(n, config, splits, len(task.repeats), features, missing)
    return ReportContext(
        title=task.title,
        model=model_text(model),
        data=f"{splits.train.name} {splits.train.fingerprint[:12]} ({len(splits.train.images)} images)",
        command=command_line(),
        hardware=hardware(),
        versions={**environment()["packages"], "git": environment()["git"]},
        seeds=f"{config.first_seed}-{config.first_seed + n * config.blocks - 1}",
        guidance=config.guidance,
        notes=(
            *few_note(n, dim),
            *class_notes(splits, n, model),
            *told,
            *reference_notes(sweep),
            *timing_notes(sweep.measurements),
            *external_notes(externals, n, config.blocks),
        ),
    )


if __name__ == "__main__":
    main(lambda arguments: run(resolve(EvaluateTask, {}, arguments)) and None)
