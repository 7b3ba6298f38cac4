"""Learning from a log: its file, what is refused, and whole runs from the command line."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from lmdqn.episodes import Episode, Example, SequenceFormat
from lmdqn.errors import UserError
from lmdqn.recipe import QLearningSection
from lmdqn.text.episode_log import EpisodeLog, read_log_rows, write_log
from tests.conftest import Ran
from tests.text_world import World, trainer_of, world_recipe

LAYOUT = SequenceFormat(pad_id=0, eos_ids=(2,), decoder_prefix=None, context_tokens=None)
ROWS: list[dict[str, Any]] = [
    {"prompt": "one\n", "response": "ab", "reward": 1.0, "behaviour_log_probs": [-1.0, -2.0, -0.5], "truncated": False},
    {"prompt": "two\n", "response": "cd", "reward": 0.5},
    {"prompt": "one\n", "response": "xyz", "reward": 0.0, "truncated": True},
]


def write_rows(file: Path, rows: list[dict[str, Any]]) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


def open_log(file: Path, tokenizer: Any, in_memory: bool = True, baseline: Any = "none", **more: Any) -> EpisodeLog:
    recipe = QLearningSection(baseline=baseline)
    rows = read_log_rows(file, in_memory)
    return EpisodeLog(str(file), rows, tokenizer, LAYOUT, more.get("examples", ()), more.get("longest", 10), recipe)


@pytest.mark.parametrize("in_memory", [True, False])
@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_rows_become_groups_by_prompt(suffix: str, in_memory: bool, byte_tokenizer: Any, tmp_path: Path) -> None:
    file = tmp_path / f"log{suffix}"
    if suffix == ".jsonl":
        write_rows(file, ROWS)
    else:
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), file)
    example = Example("one", ("ab",), tuple(byte_tokenizer("one\n").input_ids), ((5, 2),), "one\n")
    log = open_log(file, byte_tokenizer, in_memory, "group", examples=[example])
    assert len(log) == 2
    first, second = list(log)
    assert [e.text for e in first] == ["ab", "xyz"]
    assert [e.example is example for e in (*first, *second)] == [True, True, False]
    assert first[0].response_ids == [*byte_tokenizer("ab").input_ids, 2]
    assert first[0].behaviour_log_probs is not None
    assert first[0].behaviour_log_probs.tolist() == [-1.0, -2.0, -0.5]
    assert (first[0].truncated, first[1].truncated) == (False, True)
    assert first[1].response_ids == byte_tokenizer("xyz").input_ids
    assert [e.reward - e.baseline for e in (*first, *second)] == [0.5, -0.5, 0.0]
    assert [e.group for e in (*first, *second)] == [0, 0, 1]


def test_a_prompt_that_leaves_the_context_no_room_is_refused(byte_tokenizer: Any, tmp_path: Path) -> None:
    file = write_rows(tmp_path / "log.jsonl", [{"prompt": "0123456789", "response": "abc", "reward": 0.0}])
    recipe, rows = QLearningSection(baseline="none"), read_log_rows(file, True)
    for context in (14, 13):  # ten, three and EOS
        layout = replace(LAYOUT, context_tokens=context)
        log = EpisodeLog(str(file), rows, byte_tokenizer, layout, (), 10, recipe)
        if context == 14:
            assert len(log[0]) == 1
        else:
            with pytest.raises(UserError, match=r"log\.jsonl.*14 tokens do not fit into the model's context of 13"):
                list(log)


def test_the_estimated_behaviour_is_the_reference_that_stood_beside_the_log() -> None:
    """Not one that it was reset to, as a resumed run would find it."""
    world = World()
    offline = {"path": "log.jsonl", "behaviour": "reference"}
    recipe = world_recipe(1, offline=offline, qlearning={"reference_reset_every": 1, "importance": "token"})
    trainer = trainer_of(world, recipe)
    with torch.no_grad():
        trainer.networks.reference.model.head.weight += torch.randn_like(trainer.networks.reference.model.head.weight)
    episode = world.episode(world.responses[-1])
    expected = episode.behaviour_log_probs
    assert expected is not None
    episode.behaviour_log_probs = episode.reference_log_probs = None
    trainer.collector.measure([episode])
    assert episode.reference_log_probs is not None
    assert not torch.allclose(episode.reference_log_probs, expected)
    torch.testing.assert_close(episode.behaviour_log_probs, expected)


def test_what_is_written_is_read_again(byte_tokenizer: Any, tmp_path: Path) -> None:
    example = Example("one", (), tuple(byte_tokenizer("one\n").input_ids), (), "one\n")
    ab, c = [*byte_tokenizer("ab").input_ids, 2], byte_tokenizer("c").input_ids
    episodes = [Episode(example, ab, False, 0, text="ab", reward=0.25), Episode(example, c, True, 0, text="c")]
    episodes[0].behaviour_log_probs = torch.tensor([-0.5, -0.25, -1.0])
    write_log(tmp_path / "log.jsonl", episodes)
    again = open_log(tmp_path / "log.jsonl", byte_tokenizer, examples=[example])[0]
    for mine, theirs in zip(again, episodes, strict=True):
        assert (mine.response_ids, mine.truncated, mine.reward) == (
            theirs.response_ids,
            theirs.truncated,
            theirs.reward,
        )
    torch.testing.assert_close(again[0].behaviour_log_probs, episodes[0].behaviour_log_probs)
    with pytest.raises(UserError, match="already there"):
        write_log(tmp_path / "log.jsonl", episodes)


def test_a_prompt_of_no_example_comes_back_in_its_chat_template(byte_tokenizer: Any, tmp_path: Path) -> None:
    ids = tuple(byte_tokenizer("user: one|").input_ids)
    episode = Episode(Example("one", (), ids, (), "one"), [*byte_tokenizer("ab").input_ids, 2], False, 0, text="ab")
    write_log(tmp_path / "log.jsonl", [episode])
    assert open_log(tmp_path / "log.jsonl", byte_tokenizer)[0][0].example.prompt_ids == ids
    row = json.loads((tmp_path / "log.jsonl").read_text())
    write_rows(tmp_path / "other.jsonl", [{**row, "prompt_ids": [100_000]}])
    with pytest.raises(UserError, match="prompt_ids must be token ids of this model"):
        list(open_log(tmp_path / "other.jsonl", byte_tokenizer))


def test_where_nothing_can_be_written_nothing_is_sampled(tmp_path: Path) -> None:
    drawn = iter([Episode(Example("one", (), (1,), (), "one"), [2], False, 0)])
    with pytest.raises(UserError, match=r"cannot write .*log\.jsonl: No such file or directory"):
        write_log(tmp_path / "nowhere" / "log.jsonl", drawn)
    assert len(list(drawn)) == 1


def test_a_long_response_is_cut_and_no_longer_terminal(byte_tokenizer: Any, tmp_path: Path) -> None:
    log = open_log(write_rows(tmp_path / "log.jsonl", ROWS), byte_tokenizer, longest=2)
    assert log[0][0].truncated
    assert len(log[0][0].response_ids) == 2
    assert log[0][0].behaviour_log_probs.tolist() == [-1.0, -2.0]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"prompt": None}, ["row 2", "'prompt'"]),
        ({"response": 3}, ["row 2", "'response'"]),
        ({"reward": "high"}, ["row 2", "'reward'", "finite"]),
        ({"reward": float("nan")}, ["row 2", "'reward'", "finite"]),
        ({"behaviour_log_probs": [-1.0]}, ["row 2", "behaviour_log_probs", "3 numbers"]),
        ({"behaviour_log_probs": [-1.0, 0.5, -1.0]}, ["row 2", "at most 0"]),
        ({"response_ids": [99999]}, ["row 2", "response_ids"]),
        ({"response_ids": [70, 71, 2]}, ["row 2", "do not spell the response", "the model that wrote the log"]),
    ],
)
def test_a_row_that_is_no_episode_is_named(
    change: dict[str, Any], named: list[str], byte_tokenizer: Any, tmp_path: Path
) -> None:
    rows = [ROWS[0], {**ROWS[1], **change}]
    with pytest.raises(UserError) as refused:
        list(open_log(write_rows(tmp_path / "log.jsonl", rows), byte_tokenizer))
    for words in named:
        assert words in str(refused.value)


def test_what_a_log_cannot_be(byte_tokenizer: Any, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"\.jsonl or \.parquet"):
        read_log_rows(tmp_path / "log.csv", True)
    with pytest.raises(UserError, match="there is no file"):
        read_log_rows(tmp_path / "log.jsonl", True)
    with pytest.raises(UserError, match="no episodes"):
        open_log(write_rows(tmp_path / "empty.jsonl", []), byte_tokenizer)
    single = write_rows(tmp_path / "single.jsonl", ROWS[:2])
    with pytest.raises(UserError, match="baseline=running"):
        open_log(single, byte_tokenizer, baseline="group")


def test_a_behaviour_that_nobody_knows_is_refused_before_anything_loads(
    command_line: Callable[..., Ran],
    write_data: Callable[..., Path],
    write_recipe: Callable[[Any], Path],
    tmp_path: Path,
) -> None:
    """Row 1 has it, row 2 has not; there is no such model, which nobody comes to learn."""
    log = write_rows(tmp_path / "log.jsonl", ROWS)
    recipe = write_recipe({"model": {"name": "nobody/no-model"}, "data": {"path": str(write_data())}})
    for needed_by, wanted in (
        ("qlearning.importance", "qlearning.importance=token"),
        ("offline.boltzmann_js_nats", "offline.boltzmann_js_nats=0.1"),
    ):
        for command in ("train", "check"):
            refused = command_line(command, recipe, f"offline.path={log}", wanted, f"output.dir={tmp_path}/run")
            assert refused.code == 2
            assert f"{log}, row 2 has no behaviour_log_probs, which {needed_by} needs" in refused.err
            assert "offline.behaviour=reference" in refused.err
            assert not (tmp_path / "run").exists()


@pytest.fixture
def start(write_data: Callable[..., Path], write_recipe: Callable[[Any], Path], tmp_path: Path) -> Path:
    """A recipe whose warm start is a model to log from."""
    size = {"n_layer": 1, "n_embd": 32, "n_head": 2, "n_positions": 64}
    tree = {
        "model": {"from_scratch": {"family": "gpt2", "vocabulary_size": 300, "config": size}},
        "data": {"path": str(write_data()), "max_response_tokens": 8},
        "warm_start": {"epochs": 20, "batch_examples": 3},
        "rollout": {"prompts": 3, "samples": 4},
        "qlearning": {"max_steps": 1},
        "evaluation": {"every_steps": 4},
        "output": {"dir": str(tmp_path / "start"), "log_every_steps": 1},
    }
    return write_recipe(tree)


def test_log_then_offline_then_online(start: Path, command_line: Callable[..., Ran], tmp_path: Path) -> None:
    """`log` writes what `train` reads; steps 2 and 4 roll out, held to the log; it resumes where it was stopped."""
    assert command_line("train", start).code == 0
    log = tmp_path / "episodes.jsonl"
    made = command_line("log", tmp_path / "start", "--output", log)
    assert made.code == 0
    assert "12 episodes" in made.out
    assert command_line("log", tmp_path / "start", "--output", log).code == 2
    offline = [f"offline={{path: {log}, rounds: 2, steps_per_round: 2, boltzmann_js_nats: 0.1}}", "warm_start=null"]
    offline += [f"model={{name: {tmp_path}/start/model}}", "qlearning.importance=episode", "qlearning.max_steps=6"]
    offline += ["replay.fresh_share=0.5", "replay.kept_share=1", "replay.sampling=prioritised"]
    offline += ["qlearning.conservative=0.1"]
    done = command_line("train", start, *offline, f"output.dir={tmp_path}/offline")
    assert done.code == 0, done.err
    assert "log: 12 episodes of 3 prompts" in done.err
    assert done.err.count("nats from the log") == 2
    lines = [json.loads(line) for line in (tmp_path / "offline" / "metrics.jsonl").read_text().splitlines()]
    steps = {line["step"]: line for line in lines if line["phase"] == "dqn" and line["step"]}
    assert [step for step, line in steps.items() if "reward" in line] == [3, 5]
    assert all("loss" in line for line in steps.values())
    assert [line["replay_episodes"] for line in steps.values()] == [0, 0, 12, 12, 24, 24]


def test_the_reference_stands_in_for_an_unknown_behaviour(
    start: Path, command_line: Callable[..., Ran], tmp_path: Path
) -> None:
    log = write_rows(tmp_path / "log.jsonl", [{**row, "behaviour_log_probs": None} for row in ROWS])
    words = [f"offline={{path: {log}}}", "qlearning.importance=token", "qlearning.max_steps=2"]
    refused = command_line("train", start, *words)
    assert refused.code == 2
    assert "offline.behaviour=reference" in refused.err
    assert not (tmp_path / "start").exists()
    done = command_line("train", start, *words, "offline.behaviour=reference", "offline.in_memory=false")
    assert done.code == 0, done.err
