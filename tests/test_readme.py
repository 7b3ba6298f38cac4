"""The README says what is true: its commands run, its file map and its table of logged keys are complete."""

import json
import re
import shlex
import sys
from pathlib import Path

import pytest

from lmdqn.cli import main
from lmdqn.recipe import (
    ContinuedSection,
    DecodingSection,
    OfflineSection,
    QLearningSection,
    ReplaySection,
    RolloutSection,
    Section,
)
from lmdqn.results.tracking import LOGGED
from lmdqn.shipped import shipped_recipes

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
TINY_MODEL = (
    "model.from_scratch.config={hidden_size: 32, num_hidden_layers: 1, num_attention_heads: 2, "
    "num_key_value_heads: 2, intermediate_size: 48, max_position_embeddings: 512}"
)
TINY_T5 = "model.from_scratch.config={d_model: 32, d_kv: 16, d_ff: 32, num_layers: 1, num_heads: 2}"
SHORT = ["warm_start.epochs=1", "warm_start.max_seconds=2", "qlearning.max_steps=5", "data.max_response_tokens=16"]
SMALL = ["data.limits={train: 40, validation: 5, test: 12}"]


def marked_command(mark: str) -> str:
    found = re.search(rf"<!-- {mark} -->\n+```bash\n(.+?)\n```", README, re.S)
    assert found, mark
    return found.group(1)


def tour_commands() -> list[str]:
    """Every `lmdqn ...` line of the tour's bash blocks, comments dropped."""
    tour = README.split("## Five-minute tour")[1].split("## The recipe")[0]
    blocks = re.findall(r"```bash\n(.+?)```", tour, re.S)
    return [
        line.split("  #")[0].strip() for block in blocks for line in block.splitlines() if line.startswith("lmdqn ")
    ]


def run(command: str, monkeypatch: pytest.MonkeyPatch, *more: str) -> None:
    """The command line in this process; anything but success raises SystemExit with a code that is not 0."""
    words = shlex.split(command)
    assert words[0] == "lmdqn"
    monkeypatch.setattr(sys, "argv", [*words, *more])
    with pytest.raises(SystemExit) as stop:
        main()
    done = (0, 1, None) if words[1] == "compare" else (0, None)  # 1: the last run is no better
    assert stop.value.code in done, command


def test_both_commands_make_an_environment_install_and_run() -> None:
    for mark, last in (("main command", "lmdqn quickstart"), ("test command", "pytest")):
        command = marked_command(mark)
        assert "\n" not in command
        assert command.startswith("python3 -m venv ")
        assert "-c constraints.txt" in command
        assert command.endswith(last)


def test_the_main_command_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its last part, with a tiny model and seconds of training: table, p-values, three samples, where things are."""
    command = marked_command("main command").rpartition("&& .venv/bin/")[2]
    run(f"{command} summarisation --output {tmp_path}/run", monkeypatch, TINY_MODEL, *SHORT, *SMALL)
    printed = capsys.readouterr().out
    for expected in ("start", "MLE", "DQN", "ROUGE-L", "distinct-2", "paired bootstrap", str(tmp_path / "run")):
        assert expected in printed.replace("\n", "") or expected in printed
    assert json.loads((tmp_path / "run" / "results.json").read_text(encoding="utf-8"))["test"]["dqn"]


def test_the_tours_commands_run_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("my_data").mkdir()
    example = re.search(r'^\{"source".+\}$', README, re.M)
    assert example
    json.loads(example.group(0))
    for split in ("train", "validation", "test"):
        lines = (ROOT / "data" / "dialogue" / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()[:12]
        Path(f"my_data/{split}.jsonl").write_text("\n".join(lines), encoding="utf-8")
    commands = tour_commands()
    assert [command.split()[1] for command in commands] == [
        "train", "train", "recipes", "check", "train", "inspect", "compare", "evaluate", "generate",
    ]  # fmt: skip
    for command in commands:
        if "my.yaml" in command and " train " in command:
            continue  # that recipe's model is on the hub
        if " train " in command:
            run(command, monkeypatch, TINY_T5 if "seq2seq" in command else TINY_MODEL, *SHORT)
        else:
            run(command, monkeypatch)


def test_the_file_map_names_every_module_once() -> None:
    files = README.split("## Files")[1]
    for file in (ROOT / "lmdqn").rglob("*.py"):
        name = str(file.relative_to(ROOT / "lmdqn"))
        if not name.endswith(("__init__.py", "__main__.py")):
            assert len(re.findall(rf"^  {re.escape(name)} ", files, re.M)) == 1, name


def test_every_logged_key_stands_in_the_readme_with_its_meaning() -> None:
    for key, meaning in LOGGED.items():
        assert f"| `{key}` | {meaning.replace('|', chr(92) + '|')} |" in README, key


def test_the_catalogue_names_every_recipe() -> None:
    catalogue = (ROOT / "recipes" / "README.md").read_text(encoding="utf-8")
    assert set(re.findall(r"^\| `(\w+)` \|", catalogue, re.M)) == set(shipped_recipes())


PARTS: dict[str, type[Section]] = {
    "qlearning": QLearningSection,
    "rollout": RolloutSection,
    "replay": ReplaySection,
    "offline": OfflineSection,
    "continued": ContinuedSection,
    "decoding": DecodingSection,
}


@pytest.mark.parametrize("section", PARTS)
def test_every_part_has_its_row_in_the_method(section: str) -> None:
    """Its equation, paper, use and cost; a budget is no part of the method."""
    tables = [line for line in (ROOT / "recipes" / "METHOD.md").read_text(encoding="utf-8").splitlines() if "|" in line]
    for field in PARTS[section].model_fields:
        if not field.startswith("max_"):
            assert any(re.search(rf"`[^`]*\b{field}\b[^`]*`", line) for line in tables), field


def anchors(page: Path) -> set[str]:
    """Of its headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.M)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize(
    "page", ["README.md", "recipes/README.md", "recipes/METHOD.md", "recipes/RESULTS.md", "recipes/EXPERIMENTS.md"]
)
def test_links_lead_somewhere(page: str) -> None:
    here = ROOT / page
    for link in re.findall(r"\]\(([^)]+)\)", here.read_text(encoding="utf-8")):
        if not link.startswith("https://"):
            file, _, anchor = link.partition("#")
            target = here.parent / file if file else here
            assert target.exists(), link
            assert not anchor or anchor in anchors(target), link
