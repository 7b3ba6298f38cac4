"""The house rules: a module imports only what stands below it, and stays short enough to be read."""

import ast
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import lmdqn

PACKAGE = Path(lmdqn.__file__).parent
FLOORS = [  # from the ground up; modules of one floor may import each other in the order they stand
    ["lmdqn.errors", "lmdqn.background", "lmdqn.whole_files", "lmdqn.recipe.section"],
    [
        "lmdqn.recipe.model",
        "lmdqn.recipe.data",
        "lmdqn.recipe.reward",
        "lmdqn.recipe.decoding",
        "lmdqn.recipe.guards",
        "lmdqn.recipe.experience",
        "lmdqn.recipe.offline",
        "lmdqn.recipe.continued",
        "lmdqn.recipe.qlearning",
        "lmdqn.recipe.learning",
        "lmdqn.recipe.tasks",
    ],
    ["lmdqn.recipe.recipe", "lmdqn.recipe.reading", "lmdqn.shipped", "lmdqn.episodes"],
    [
        "lmdqn.text.data",
        "lmdqn.text.prompts",
        "lmdqn.text.sentence_scores",
        "lmdqn.text.metrics",
        "lmdqn.learn.targets",
        "lmdqn.learn.losses",
        "lmdqn.learn.prompt_draw",
    ],
    [
        "lmdqn.model.merging",
        "lmdqn.model.sharding",
        "lmdqn.model.zero",
        "lmdqn.model.sharing",
        "lmdqn.model.loading",
        "lmdqn.model.compiling",
        "lmdqn.model.activation_checkpointing",
        "lmdqn.model.head",
        "lmdqn.model.cache",
        "lmdqn.model.reading",
        "lmdqn.model.counting",
        "lmdqn.model.memory",
        "lmdqn.model.vocabulary",
        "lmdqn.model.exploration",
    ],
    [
        "lmdqn.text.rewards",
        "lmdqn.text.episode_log",
        "lmdqn.learn.packing",
        "lmdqn.learn.priorities",
        "lmdqn.learn.replay",
        "lmdqn.learn.match_features",
        "lmdqn.model.qnetwork",
        "lmdqn.model.networks",
    ],
    [
        "lmdqn.text.agreement",
        "lmdqn.model.rollout",
        "lmdqn.model.decoding",
        "lmdqn.results.trackers",
        "lmdqn.results.tracking",
    ],
    ["lmdqn.results.evaluate", "lmdqn.results.significance", "lmdqn.results.environment", "lmdqn.results.run_folder"],
    ["lmdqn.results.tables", "lmdqn.results.model_card", "lmdqn.results.publish", "lmdqn.answering"],
    [
        "lmdqn.learn.launch",
        "lmdqn.learn.processes",
        "lmdqn.learn.behaviour",
        "lmdqn.learn.budget",
        "lmdqn.learn.learning_rates",
        "lmdqn.learn.optimisation",
        "lmdqn.learn.backups",
        "lmdqn.learn.objective",
        "lmdqn.learn.step_record",
        "lmdqn.learn.guards",
    ],
    ["lmdqn.learn.stopping", "lmdqn.learn.checkpoint", "lmdqn.learn.continuation"],
    ["lmdqn.results.page", "lmdqn.results.plots", "lmdqn.results.browser"],
    ["lmdqn.results.calibration", "lmdqn.results.report", "lmdqn.results.compare"],
    ["lmdqn.results.inspection", "lmdqn.results.inspection_view", "lmdqn.chat"],
    ["lmdqn.learn.warm_start", "lmdqn.learn.collector", "lmdqn.learn.updater", "lmdqn.learn.trainer"],
    ["lmdqn.preparation", "lmdqn.run", "lmdqn.pipeline", "lmdqn.quickstart"],
    [
        "lmdqn.cli.common",
        "lmdqn.cli.training",
        "lmdqn.cli.using",
        "lmdqn.cli.results",
        "lmdqn.cli.recipes",
        "lmdqn.cli.app",
        "lmdqn.__main__",
    ],
]
PURE = (
    "lmdqn.learn.prompt_draw",
    "lmdqn.learn.targets",
    "lmdqn.learn.losses",
    "lmdqn.learn.packing",
    "lmdqn.learn.priorities",
    "lmdqn.learn.replay",
    "lmdqn.text.sentence_scores",
    "lmdqn.text.metrics",
)
ORDER = [module for floor in FLOORS for module in floor]


def module_name(file: Path) -> str:
    return ".".join(["lmdqn", *file.relative_to(PACKAGE).with_suffix("").parts])


def imports_of(file: Path) -> set[str]:
    """Every module that a file imports, inside functions too."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return found


def modules() -> dict[str, Path]:
    return {module_name(f): f for f in sorted(PACKAGE.rglob("*.py")) if f.name != "__init__.py"}


def test_every_module_has_its_place() -> None:
    assert sorted(modules()) == sorted(ORDER)


def test_modules_import_only_what_stands_below_them() -> None:
    for name, file in modules().items():
        for imported in imports_of(file) & set(ORDER):
            assert ORDER.index(imported) < ORDER.index(name), f"{name} must not import {imported}"


def test_pure_modules_know_no_files_and_no_transformers() -> None:
    for name in PURE:
        roots = {imported.partition(".")[0] for imported in imports_of(modules()[name])}
        assert not roots & {"transformers", "accelerate", "peft", "datasets", "pathlib", "os"}, name


def test_files_are_read_in_one_sitting() -> None:
    for name, file in modules().items():
        assert len(file.read_text(encoding="utf-8").splitlines()) <= 320, name


def test_importing_lmdqn_imports_nothing_heavy() -> None:
    code = (
        "import sys, lmdqn; print([m for m in ('torch', 'transformers', 'pydantic', 'datasets') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_check_of_a_known_family_imports_neither_torch_nor_transformers(write_data: Callable[..., Path]) -> None:
    code = (
        "import sys; from lmdqn.cli import main; sys.argv = ['lmdqn', 'check', 'from_scratch_causal', "
        f"'data.path={write_data()}']\ntry: main()\nfinally: print([m for m in "
        "('torch', 'transformers', 'accelerate', 'nltk', 'datasets') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "parameters" in done.stdout
    assert done.stdout.strip().endswith("[]")
