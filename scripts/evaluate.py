"""Measure the step budget: python scripts/evaluate.py --model runs/digits-dit --features runs/digits-features

Measurements are stored in cells/ of the report, so an interrupted sweep resumes, and a sweep with more solvers measures only the
new ones. Several processes divide the work:

    accelerate launch --num_processes 4 scripts/evaluate.py --model runs/cifar10-dit --samples 50000

External samples: python scripts/evaluate.py --images samples.npz --data digits --features runs/digits-features --out report
"""

import shutil
from dataclasses import replace
from pathlib import Path

import torch
from evaluation_flags import EvaluateTask, blocks, check_flags, folder
from tqdm import tqdm

from cli import main, names, numbers, resolve
from midway.gen.baselines.registry import TrainedBaseline, load_trained_baseline
from midway.gen.core.environment import command_line, environment, hardware
from midway.gen.core.errors import DataError, UsageError
from midway.gen.core.processes import ProcessInfo, device_and_process
from midway.gen.data.splits import DataConfig, Splits, load_splits
from midway.gen.diffusion.load import LEARNED, TrainedModel, load_model, solver_path
from midway.gen.diffusion.samplers import LEARNED_ON
from midway.gen.evaluation.diffusers import check_images, load_diffusers
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
    all_jobs(measured, others, config, n)  # raises for impossible combinations before anything is written
    shown = process.rank == 0
    warnings = (*class_notes(splits, n, measured), *external_notes(externals, n, config.blocks))
    for line in warnings if shown else ():
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
    """Report sections on a latent model: trajectories, and codes of the fine solution."""
    if trained is None:
        return []
    latents = None if fine is None else fine.latents(CODED)
    sound = latents is not None and bool(latents.isfinite().all())
    codes = code_section(trained, splits.held_out.images, latents) if latents is not None and sound else None
    found = [trajectory_section(trained, config.sampling()), codes]
    return [section for section in found if section is not None]


def export_images(task: EvaluateTask, sweep: Sweep) -> None:
    """Write the images of --export-npz and --save-images."""
    if task.export_npz is None and task.save_images is None:
        return
    for m in to_export(sweep):
        for path in export_measurement(sweep, m, task.seed, task.export_npz, task.save_images):
            print(f"images: {path}")


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
    protocol = alone if model is None else notes(n, config, splits, len(task.repeats), features, missing)
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
            *protocol,
            *reference_notes(sweep),
            *timing_notes(sweep.measurements),
            *external_notes(externals, n, config.blocks),
        ),
    )


if __name__ == "__main__":
    main(lambda arguments: run(resolve(EvaluateTask, {}, arguments)) and None)
