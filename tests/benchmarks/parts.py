"""Each part of the method alone against the default, on one data set: the table behind recipes/METHOD.md.

    python tests/benchmarks/parts.py RECIPE DATA OUTPUT [--steps 60] [--seeds 0 1 2] [--only NAME ...] [KEY=VALUE ...]

Every row changes one thing; all take as many steps, and the table says how long those took. One warm start, made
first, serves all; KEY=VALUE changes the recipe for it and for every row. Each run's numbers go to
OUTPUT/NAME-SEED.json, and what is there is not run again: stop it and start it as you like. The table is printed, and
kept in OUTPUT/table.md.
"""

import argparse
import json
import shutil
from pathlib import Path
from statistics import fmean, stdev

from lmdqn.pipeline import train
from lmdqn.recipe import Recipe, load_recipe

PARTS: dict[str, list[str]] = {
    "default": [],
    "form: calibrated": ["qlearning.form=calibrated"],
    "form: classic": ["qlearning.form=classic"],
    "backup: soft double": ["qlearning.backup=soft_double"],
    "backup: hard": ["qlearning.backup=hard"],
    "backup: hard in top 20": ["qlearning.backup=hard", "qlearning.backup_top_k=20"],
    "backup: double in top 20": ["qlearning.backup=double", "qlearning.backup_top_k=20"],
    "backup: expected": ["qlearning.backup=expected"],
    "return: one step": ["qlearning.trace=0"],
    "return: whole": ["qlearning.trace=1"],
    "return: 5 steps": ["qlearning.n_step=5"],
    "the value head by the trace of Q": ["qlearning.value_trace=0.95"],
    "gamma .98": ["qlearning.gamma=0.98"],
    "Huber 10": ["qlearning.huber_delta=10"],
    "path, group": ["qlearning.loss=path"],
    "path, network": ["qlearning.loss=path", "qlearning.path_value=network"],
    "path, network, calibrated": ["qlearning.loss=path", "qlearning.path_value=network", "qlearning.form=calibrated"],
    "quantiles 8": ["qlearning.value_quantiles=8"],
    "value without references": ["qlearning.value_sees_references=false"],
    "conservative .1": ["qlearning.conservative=0.1"],
    "actor 1": ["qlearning.actor=1"],
    "target: copies of 20": ["qlearning.target_polyak=null", "qlearning.target_copy_every=20"],
    "reference reset at 40": ["qlearning.reference_reset_every=40"],
    "beta .01": ["qlearning.beta=0.01"],
    "Boltzmann at 1": ["rollout.temperature=1"],
    "epsilon-greedy in top 20": [
        "rollout.epsilon_greedy=true",
        "rollout.epsilon_start=0.3",
        "rollout.reference_top_k=20",
    ],
    "inside the reference's .95": ["rollout.reference_top_p=0.95"],
    "replay: half": ["replay.fresh_share=0.5"],
    "replay: half, two updates": ["replay.fresh_share=0.5", "replay.updates_per_rollout=2"],
    "replay: half, prioritised": ["replay.fresh_share=0.5", "replay.sampling=prioritised"],
    "replay: half, by reward": ["replay.fresh_share=0.5", "replay.sampling=reward"],
    "replay: half, token weights": ["replay.fresh_share=0.5", "qlearning.importance=token"],
    "replay: half, episode weights": ["replay.fresh_share=0.5", "qlearning.importance=episode"],
    "demonstrations: 1": ["replay.demonstrations=1"],
    "demonstrations: 1, supervised 1": ["replay.demonstrations=1", "qlearning.supervised=1"],
    "64 prompts of 1 sample": [
        "rollout.prompts=64",
        "rollout.samples=1",
        "replay.batch_groups=64",
        "qlearning.baseline=running",
    ],
}
SHOWN = ("reward", "bleu", "rougeL", "length_words", "distinct2")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe")
    parser.add_argument("data")
    parser.add_argument("output", type=Path)
    parser.add_argument("overrides", nargs="*", default=[], metavar="KEY=VALUE")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--only", nargs="+", default=list(PARTS), choices=list(PARTS))
    arguments = parser.parse_intermixed_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    start = warm_start(arguments)
    for seed in arguments.seeds:  # every part once before any part twice
        for name in arguments.only:
            measure(name, seed, start, arguments)
            table = as_table(arguments.output)
            (arguments.output / "table.md").write_text(table, encoding="utf-8")
    print(table)


def warm_start(arguments: argparse.Namespace) -> Path:
    """The run whose model all others begin with: the recipe's warm start alone."""
    folder = arguments.output / "start"
    if not (folder / "results.json").exists():
        settings = [f"data.path={arguments.data}", f"output.dir={folder}", "output.overwrite=true"]
        train(load_recipe(arguments.recipe, [*arguments.overrides, *settings, "qlearning.max_steps=0"]))
    return folder


def measure(name: str, seed: int, start: Path, arguments: argparse.Namespace) -> None:
    """One part's run from the common start, its numbers kept and its folder dropped."""
    kept = arguments.output / f"{name.replace(' ', '_').replace(':', '').replace(',', '')}-{seed}.json"
    if kept.exists():
        return
    folder = arguments.output / "run"
    budget = [f"qlearning.max_steps={arguments.steps}", "qlearning.max_seconds=null", f"seed={seed}"]
    begin = [f"model={{name: {start / 'model'}}}", "warm_start=null", f"output.dir={folder}", "output.overwrite=true"]
    recipe: Recipe = load_recipe(start / "recipe.yaml", [*begin, *budget, *PARTS[name]])
    result = train(recipe)
    numbers = {
        phase: {metric: evaluation.metrics[metric] for metric in SHOWN} for phase, evaluation in result.test.items()
    }
    line = {"part": name, "seed": seed, "seconds": result.seconds["dqn"], **numbers}
    kept.write_text(json.dumps(line) + "\n", encoding="utf-8")
    shutil.rmtree(folder)


def as_table(output: Path) -> str:
    """Test metrics after DQN, mean over the seeds that are done, and the start's."""
    done = [json.loads(file.read_text(encoding="utf-8")) for file in sorted(output.glob("*-*.json"))]
    rows = [
        "| part | reward, each seed | mean ± deviation | seconds | " + " | ".join(SHOWN[1:]) + " |",
        "|" + "---|" * (len(SHOWN) + 3),
    ]
    if done:
        cells = " | ".join(f"{done[0]['start'][metric]:.1f}" for metric in SHOWN[1:])
        rows.append(f"| start | | {done[0]['start']['reward']:.1f} | | {cells} |")
    for name in PARTS:
        of_part = [run for run in done if run["part"] == name]
        if of_part:
            rewards = [run["dqn"]["reward"] for run in of_part]
            spread = f" ± {stdev(rewards):.1f}" if len(rewards) > 1 else ""
            cells = " | ".join(f"{fmean(run['dqn'][metric] for run in of_part):.1f}" for metric in SHOWN[1:])
            seconds = fmean(run["seconds"] for run in of_part)
            each = ", ".join(f"{reward:.1f}" for reward in rewards)
            rows.append(f"| {name} | {each} | {fmean(rewards):.1f}{spread} | {seconds:.0f} | {cells} |")
    return "\n".join(rows) + "\n"


if __name__ == "__main__":
    main()
