"""The course of a benchmark: tune, choose, compare, report."""

import argparse
from collections.abc import Mapping, Sequence
from itertools import product
from statistics import fmean

from transformers.utils import logging

from lmdqn.errors import UserError
from lmdqn.recipe import nearest
from versus.arena import Settings, Task
from versus.compared import Compared
from versus.report import write_report
from versus.units import METHODS, TUNING_SEED, Bench, Method, Result, Setting, Unit, best_validation, choose

Tuning = dict[tuple[Task, str], dict[Setting, Result]]  # by task and method


def run_all(options: argparse.Namespace) -> None:
    """Everything the command line asks for, as far as it is not in the output folder yet.

    Raises:
        UserError: an unknown method or set, TRL missing, or an output folder made with other settings.
    """
    logging.disable_progress_bar()
    tasks = [Task(name, options.architecture) for name in options.sets]
    for task in tasks:
        if not (options.data / task.set).is_dir():
            raise UserError(f"--data {options.data} has no folder {task.set}")
    methods = _methods(options.methods, options.architecture)
    settings = Settings(
        options.data,
        options.output,
        options.seconds,
        options.evaluations,
        options.threads,
        options.clock,
        tuple(options.override),
        options.lora,
    )
    bench = Bench(settings)
    schedule = tasks[0].recipe(settings).optimisation.schedule
    grids = {name: _grid(METHODS[name], options.tune_lrs, options.schedules, schedule) for name in methods}
    tuning = _tune(bench, tasks, grids)
    chosen = {(task, name): _chosen(tuning, tasks, task, name, grids[name]) for task, name in product(tasks, methods)}
    finals: dict[tuple[Task, str], list[Result]] = {key: [] for key in chosen}
    for seed in range(1, options.seeds + 1):
        for (task, name), setting in chosen.items():
            finals[task, name].append(bench.result(Unit(task, name, setting, seed)))
        for task in tasks:
            mine = {name: finals[task, name] for name in methods}
            settings_of = {name: chosen[task, name] for name in methods}
            tuning_of = {name: tuning[task, name] for name in methods}
            write_report(Compared(task, settings, bench.start(task), mine, settings_of, tuning_of))
            bench.say(f"seed {seed} of {options.seeds}: {task.folder(settings) / 'report.md'}")


def _methods(wanted: Sequence[str] | None, architecture: str) -> list[str]:
    able = [name for name, method in METHODS.items() if architecture in method.architectures]
    for name in wanted or ():
        if name not in able:
            raise UserError(f"--methods: no {architecture} method {name!r}{nearest(name, able)}")
    return list(wanted or able)


def _grid(
    method: Method, rates: Sequence[float] | None, schedules: Sequence[str] | None, recipes_own: str
) -> list[Setting]:
    """The settings a method is tuned over: the command line's, else its own."""
    both = product(rates or method.rates, schedules or [method.schedule or recipes_own])
    return [Setting(rate, schedule) for rate, schedule in both]


def _tune(bench: Bench, tasks: Sequence[Task], grids: Mapping[str, list[Setting]]) -> Tuning:
    tuning: Tuning = {}
    for task in tasks:
        bench.start(task)
        for name, grid in grids.items():
            tried = grid if len(grid) > 1 else []
            tuning[task, name] = {s: bench.result(Unit(task, name, s, TUNING_SEED)) for s in tried}
    return tuning


def _chosen(tuning: Tuning, tasks: Sequence[Task], task: Task, name: str, grid: list[Setting]) -> Setting:
    """The setting of a method on a task: its best there, but for lmdqn the best on average over all tasks."""
    if len(grid) == 1:
        return grid[0]
    over = tasks if name == "lmdqn" else [task]
    return choose({s: fmean(best_validation(tuning[t, name][s]) for t in over) for s in grid})
