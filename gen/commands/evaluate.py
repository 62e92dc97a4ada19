"""Measure the step budget: midway evaluate --model runs/digits-dit --features runs/digits-features

Measurements are stored in cells/ of the report, so an interrupted sweep resumes, and a sweep with more solvers measures only the
new ones. Several processes divide the work:

    accelerate launch --num_processes 4 -m midway evaluate --model runs/cifar10-dit --samples 50000

External samples: midway evaluate --images samples.npz --data digits --features runs/digits-features --out report
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

import torch

from midway.gen.core.errors import UsageError
from midway.gen.core.files import clear_temporaries
from midway.gen.core.processes import ProcessInfo, device_and_process, raised_by_all
from midway.gen.core.signals import stop_note
from midway.gen.core.text import echo
from midway.gen.data.external import ExternalImages, images_per_block
from midway.gen.data.places import changed_since, images_at, splits_of
from midway.gen.data.splits import Splits, load_splits
from midway.gen.diffusion.load import TrainedModel
from midway.gen.evaluation.metrics import check_metrics
from midway.gen.evaluation.sources import EvaluatedLatentModel, EvaluatedModel
from midway.gen.evaluation.spaces import Spaces, spaces_of
from midway.gen.features.extractor import Extractor, plain_float32
from midway.gen.features.published import save_reference
from midway.gen.flags.cli import names, resolve
from midway.gen.flags.evaluation_flags import EvaluateTask, blocks, check_flags, folder, make_folders, search_of
from midway.gen.flags.evaluation_inputs import (
    budgets_of,
    check_rows,
    check_teachers,
    classes_of,
    defaults_of,
    jobs_beside,
    model_warnings,
    open_few_step,
    open_main,
    open_model,
    open_priors,
    open_repeats,
    open_spaces,
    solver_names,
)
from midway.gen.flags.evaluation_reference import (
    check_reference,
    draw_of,
    external_images,
    image_jobs,
    image_notes,
    protocol_note,
    published,
    references,
    with_protocol,
)
from midway.gen.progress.bar import busy, duration
from midway.gen.progress.memory import peak_memory
from midway.gen.report.html import Block
from midway.gen.report.notes import (
    class_notes,
    common_notes,
    exact_notes,
    few_note,
    few_step_notes,
    floor_text,
    notes,
    timing_notes,
)
from midway.gen.report.sections import CODED, code_section, guidance_notes, trajectory_section
from midway.gen.report.sweep import check_out, terminal_text, write_report
from midway.gen.report.sweep_page import pictures_of
from midway.gen.report.table import ReportContext
from midway.gen.sweep.guidance import searched_plan
from midway.gen.sweep.jobs import Plan, SweepConfig, plan_of
from midway.gen.sweep.run import Sweep, held_out_images, run_sweep
from midway.gen.sweep.store import CellStore


def run(task: EvaluateTask) -> Sweep:
    """Measure, print the table, write the report; samples and features are computed in IEEE float32."""
    device, process = device_and_process()
    check_flags(task)
    with plain_float32(device):
        return measure_and_report(with_protocol(task), device, process)


def measure_and_report(task: EvaluateTask, device: torch.device, process: ProcessInfo) -> Sweep:
    """`run` on this device, as this share of the processes; everything is checked before anything is written."""
    begun, main = time.monotonic(), open_main(task, device)
    trained = main if isinstance(main, TrainedModel) else None
    model, repeats = open_model(task, trained, device), open_repeats(task, trained, device)
    data = images_at(main.run, task.data_path, task.data.download) if main else task.data
    out = folder(task)
    extractors = open_spaces(task, data, "the model" if main else "the reference")
    check_reference(task, extractors)
    few_step = open_few_step(task, trained, data, device)
    check_teachers(extractors, [trained, *repeats, *few_step.values()])
    priors = open_priors(task, main, data, device)
    splits = splits_of(main.run, data) if main else load_splits(data)
    for extractor in extractors:
        extractor.check(splits.train.images, "the reference has")
    for one in [*filter(None, [model]), *map(EvaluatedLatentModel, few_step.values())]:
        one.check_images(splits.train.images)
    if priors is not None:
        priors.check_images(splits.train.images)
    changed = changed_since(main.run, splits.train) if main else ()
    externals = external_images(task, splits)
    solved = task if main is trained else replace(task, solvers=None, nfe=None, grids=None)  # those of a prior
    config = sweep_config(solved, trained, model, classes_of(model, few_step, priors), externals, splits, device)
    for extractor in extractors:
        extractor.check_count(config.n)
    dim = extractors[0].measured_dim(splits.train.images)
    check_metrics(config.metrics, config.n, dim, extractors[0].has_logits)
    others = [
        *jobs_beside(task, few_step, data, splits, config, device),
        *([] if priors is None else priors.jobs(splits, config)),
        *image_jobs(externals, config),
    ]
    check_rows(others, config.solvers if model else ())
    with busy("making samplers and fitting their grids"):
        plan = plan_of if config.search is None else searched_plan
        plans = [plan(one, config) for one in ([] if model is None else [model, *repeats])] or [
            Plan([]) if priors is None else Plan([], reconstruct=priors.reconstruct)
        ]
    plans[0].jobs.extend(others)
    given = published(task, extractors, splits)

    check_out(out)
    stop_note(f"what was measured is stored in {out / 'cells'}; the same command goes on")
    make_folders({"--export-npz": task.export_npz, "--save-images": task.save_images})
    shown = process.rank == 0
    with ExitStack() as stack:
        with raised_by_all():
            if shown:
                stack.enter_context(claimed(out, task.fresh))
        if shown:
            echo(
                *model_warnings(task),
                *changed,
                *(() if priors is None else priors.warnings),
                *class_notes(splits, config.n, config.draw),
                *image_notes(externals, config),
            )
        spaces = spaces_of(references(task, extractors, splits, given, out / "reference", device))
        if shown and task.save_reference is not None:
            save_reference(task.save_reference, spaces[""])
        sweeps: list[Sweep] = []
        for number, plan in enumerate(plans, 1):
            if shown and len(plans) > 1:
                echo(f"training {number} of {len(plans)}")
            choice = sweeps[0].choice if sweeps else None
            sweeps.append(run_sweep(plan, spaces, splits.held_out, config, out, process, choice))
        sweep, missing = merged(sweeps)
        if shown:
            own = trained.tokenizer if trained else None
            real = held_out_images(splits.held_out, config.n)
            drawn = () if priors is None else tuple(priors.lines(own, real, spaces))
            facts = context(
                task, model, few_step, drawn, splits, config, externals, sweep, spaces, extractors, missing, changed
            )
            with busy("writing the report"):
                parts = sections(trained, splits, config, sweep)
                write_report(out, sweep.measurements, facts, pictures_of(sweep, splits, config), parts, sweep.choice)
            echo(terminal_text(sweep.measurements, facts.warnings))
            if model is None and not (few_step or priors):
                echo(floor_text(sweep))
            echo(f"measured in {duration(time.monotonic() - begun)}; {peak_memory()}", f"report: {out / 'report.html'}")
            if task.export_npz or task.save_images:
                from midway.gen.sweep.export import exported

                for path in exported(sweep, task.seed, task.export_npz, task.save_images):
                    echo(f"images: {path}")
        return sweep


@contextmanager
def claimed(out: Path, fresh: bool) -> Iterator[None]:
    """Within the block the report is this sweep's own, tidied first; errors as CellStore.claimed."""
    with CellStore(out / "cells").claimed(fresh):
        for folder in (out, out / "reference"):
            clear_temporaries(folder)
        yield


def sweep_config(
    task: EvaluateTask,
    trained: TrainedModel | None,
    model: EvaluatedModel | None,
    classes: tuple[int, tuple[int, ...]] | None,
    externals: dict[str, ExternalImages],
    splits: Splits,
    device: torch.device,
) -> SweepConfig:
    """What to measure, on seeds with these classes; UsageError for nothing, and for numbers that measure nothing."""
    budgets, count, options = budgets_of(task, trained), blocks(task), task.sampler_options(device)
    search = search_of(task, options)
    n = len(splits.held_out.images) if task.n is None else task.n
    if task.n is None and classes is None and externals and count > 0:
        n = images_per_block(list(externals.values()), count)
    config = SweepConfig(
        solvers=solver_names(task.solvers, trained, budgets),
        nfe=budgets,
        grids=names(defaults_of(trained).grids if task.grids is None else task.grids),
        n=n,
        blocks=count,
        first_seed=task.seed,
        exact_nfe=task.exact_nfe if model and model.exact and search is None else 0,
        choice=task.choice_seeds,
        metrics=names(task.metrics or ""),
        overlap=task.overlap,
        draw=None if classes is None else draw_of(task, splits, *classes),
        skip=task.skip_unreachable or (task.nfe is None and bool(task.few_step)),
        search=search,
        **options,
    )
    if not config.solvers or not config.grids:
        raise UsageError("--solvers or --grids is empty", "there is nothing to measure", "name at least one of each")
    config.check()
    return config


def merged(sweeps: list[Sweep]) -> tuple[Sweep, list[str]]:
    """Several trainings as one sweep, the pictures of the first, and what not all of them have."""
    first, *rest = sweeps
    if not rest:
        return first, []
    from midway.gen.sweep.repeats import left_out, merge_trainings

    trainings = [sweep.measurements for sweep in sweeps]
    return replace(first, measurements=merge_trainings(trainings)), left_out(trainings)


def sections(trained: TrainedModel | None, splits: Splits, config: SweepConfig, sweep: Sweep) -> list[Block]:
    """Report sections on a latent model: trajectories, and codes of the fine solution."""
    if trained is None:
        return []
    latents = None if sweep.fine is None else sweep.fine.latents(CODED)
    sound = latents is not None and bool(latents.isfinite().all())
    codes = code_section(trained, splits.held_out.images, latents) if latents is not None and sound else None
    found = [trajectory_section(trained, config.sampling()), codes]
    return [section for section in found if section is not None]


def context(
    task: EvaluateTask,
    model: EvaluatedModel | None,
    few_step: Mapping[str, TrainedModel],
    drawn: tuple[str, ...],
    splits: Splits,
    config: SweepConfig,
    externals: dict[str, ExternalImages],
    sweep: Sweep,
    spaces: Spaces,
    extractors: Sequence[Extractor],
    missing: list[str],
    changed: tuple[str, ...],
) -> ReportContext:
    """Everything a reader needs beside the numbers."""
    features = " ".join(extractor.note for extractor in extractors)
    against = spaces[""].text
    alone = (*common_notes(config, splits, features, against), floor_text(sweep))
    sampled = model or few_step or drawn
    whose = " and ".join(["few-step models"] * bool(few_step) + ["priors over codes"] * bool(drawn))
    protocol = notes(config, splits, len(task.repeats), features, against, missing) if sampled else alone
    return ReportContext(
        title=task.title,
        model=model.description if model else whose or "no model of ours",
        data=f"{splits.train.name} {splits.train.fingerprint[:12]} ({len(splits.train.images)} images)",
        seeds=str(config.seeds),
        guidance=config.guidance,
        warnings=model_warnings(task),
        notes=(
            *changed,
            *few_note(config.n, spaces[""].statistics.dim),
            *(line for reference in spaces.values() for line in reference.warnings),
            *class_notes(splits, config.n, config.draw),
            *protocol,
            protocol_note(config.n, spaces[""], config.draw),
            *few_step_notes({name: EvaluatedLatentModel(its).description for name, its in few_step.items()}, sweep),
            *drawn,
            *exact_notes(config, sweep, None if model is None else model.exact),
            *guidance_notes(sweep.choice),
            *timing_notes(sweep.measurements),
            *image_notes(externals, config),
        ),
    )


def command(arguments: list[str]) -> None:
    """The command line, parsed and run."""
    run(resolve(EvaluateTask, {}, arguments))
