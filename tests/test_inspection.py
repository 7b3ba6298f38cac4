"""Inspection against plain transformers, against the run's own predictions, and by hand."""

import re
import shutil
from collections.abc import Callable
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import lmdqn
from lmdqn.episodes import Episode, Example
from lmdqn.learn.match_features import measure_matches
from lmdqn.recipe import load_recipe
from lmdqn.results.inspection import Choice, Inspected, Step, inspect_run, pairs_to_inspect, piece
from lmdqn.results.inspection_view import NO_REFERENCES, caveat, full_colour, terminal_parts
from lmdqn.results.run_folder import RunFolder
from lmdqn.results.tables import show
from lmdqn.text.data import Pair
from tests.conftest import Ran

WORDS = ("one", "two", "three", "four", "five", "six")
ROWS = [{"source": f"say {word}", "references": [f"it is {word}", f"we say {word}"]} for word in WORDS]
GPT2 = {
    "family": "gpt2",
    "vocabulary_size": 300,
    "config": {"n_layer": 1, "n_embd": 16, "n_head": 2, "n_positions": 64},
}
T5_CONFIG = {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2}
T5 = {"family": "t5", "vocabulary_size": 300, "config": T5_CONFIG}
BETA = 0.02
MakeRun = Callable[..., Path]


@pytest.fixture
def make_run(tmp_path: Path, write_data: Callable[..., Path], write_recipe: Callable[[Any], Path]) -> MakeRun:
    """`make_run(name, **sections)`: a real run of a second."""
    data = write_data(ROWS)

    def make(name: str, **sections: Any) -> Path:
        tree = {
            "model": {"from_scratch": GPT2},
            "data": {"path": str(data), "max_response_tokens": 10},
            "warm_start": {"epochs": 4, "batch_examples": 2, "learning_rate": 1e-2},
            "rollout": {"prompts": 3, "samples": 2},
            "qlearning": {"max_steps": 4, "beta": BETA, "target_polyak": 1.0},
            "optimisation": {"learning_rate": 5e-3},
            "evaluation": {"every_steps": 4, "bootstrap_samples": 100},
            "output": {"dir": str(tmp_path / name)},
        }
        tree = {key: section for key, section in {**tree, **sections}.items() if section is not None}
        return lmdqn.train(load_recipe(write_recipe(tree))).folder.path

    return make


@pytest.fixture
def run(make_run: MakeRun) -> Path:
    return make_run("run")


@pytest.fixture
def moved(run: Path) -> Path:
    """The same, its model that of the last step: four steps need not make a better one than that of step 0."""
    shutil.rmtree(run / "model")
    (run / "last").rename(run / "model")
    return run


def inspect_test(run: Path, **more: Any) -> list[Inspected]:
    return inspect_run(run, pairs_to_inspect(load_recipe(run / "recipe.yaml"), [], [], "test", 6), **more)


def predicted(run: Path, phase: str) -> list[str]:
    return [line[phase] for line in RunFolder(run).read_predictions()]


def test_every_number_is_that_of_plain_transformers(moved: Path) -> None:
    """Logits and hidden states of the two saved models, and the value head's formula written out."""
    before, after = (AutoModelForCausalLM.from_pretrained(moved / name).eval() for name in ("reference", "model"))
    tokenizer = AutoTokenizer.from_pretrained(moved / "model")
    head = load_file(moved / "model" / "value_head.safetensors")
    for one in inspect_test(moved)[:2]:
        ids = tokenizer(one.example.prompt).input_ids
        with torch.no_grad():
            written = after.generate(torch.tensor([ids]))[0].tolist()
            outputs = after(torch.tensor([written]), output_hidden_states=True)
            old = before(torch.tensor([written])).logits[0].log_softmax(-1)
        new, hidden = outputs.logits[0].log_softmax(-1), outputs.hidden_states[-1][0]
        response = written[len(ids) :]
        episode = Episode(one.example, response, one.truncated, 0)
        measure_matches([episode])
        assert episode.match_features is not None
        assert len(one.steps) == len(response)
        for t, (token, step) in enumerate(zip(response, one.steps, strict=True)):
            place = len(ids) - 1 + t
            features = (episode.match_features[t] - head["feature_mean"][:-1]) * head["feature_rate"][:-1]
            seen = torch.cat([hidden[place], features.clamp(-10, 10), torch.zeros(1)])  # it has no peers
            inner = torch.nn.functional.gelu(head["inner.weight"] @ seen + head["inner.bias"])
            value = float(head["scale"]) * float(head["outer.weight"][0] @ inner + head["outer.bias"][0])
            nats = float(new[place, token] - old[place, token])
            assert step.value == pytest.approx(value, abs=1e-6)
            assert step.nats == pytest.approx(nats, abs=1e-5)
            assert step.chosen.advantage == pytest.approx(BETA * nats, abs=1e-6)
            assert step.chosen.q == pytest.approx(value + BETA * nats, abs=1e-6)
            assert step.chosen.before == pytest.approx(float(old[place, token].exp()), abs=1e-6)
            assert step.chosen.after == pytest.approx(float(new[place, token].exp()), abs=1e-6)
            assert (step.instead_of is not None) == (int(old[place].argmax()) != token)
            assert step.alternatives[0] == step.chosen  # greedy
            likeliest = sorted((c.after for c in step.alternatives), reverse=True)[:2]
            assert likeliest == pytest.approx(new[place].exp().topk(2).values.tolist(), abs=1e-6)
    assert any(abs(step.nats) > 0.01 for step in one.steps)


KINDS: dict[str, dict[str, Any]] = {
    "seq2seq": {"model": {"from_scratch": T5}},
    "no MLE": {"warm_start": None},
}


@pytest.mark.parametrize("kind", KINDS)
def test_responses_are_those_the_run_recorded(kind: str, make_run: MakeRun) -> None:
    run = make_run("run", **KINDS[kind])
    inspected = inspect_test(run)
    assert [one.response for one in inspected] == predicted(run, "dqn")
    assert [one.before for one in inspected] == predicted(run, "start" if kind == "no MLE" else "mle")


@pytest.mark.parametrize("lora", [None, {"rank": 4}], ids=["full", "LoRA"])
@pytest.mark.parametrize("warm", [None, {"epochs": 3, "learning_rate": 1e-2}], ids=["no MLE", "MLE"])
def test_the_reference_of_a_pretrained_model(lora: Any, warm: Any, run: Path, make_run: MakeRun) -> None:
    """Saved where MLE moved it; else it is the model by its name, and nothing is copied."""
    tuned = make_run("tuned", model={"name": str(run / "model"), "lora": lora}, warm_start=warm)
    assert (tuned / "reference").exists() == (warm is not None)
    if warm and lora:
        assert (tuned / "reference" / "adapter_config.json").exists()
        assert not (tuned / "reference" / "model.safetensors").exists()
    inspected = inspect_test(tuned)
    assert [one.before for one in inspected] == predicted(tuned, "mle" if warm else "start")
    assert [one.response for one in inspected] == predicted(tuned, "dqn")


def test_a_path_loss_has_advantages_alone_and_the_classic_form_raw_logits(make_run: MakeRun) -> None:
    path = make_run("path", qlearning={"loss": "path", "max_steps": 2})
    for step in inspect_test(path)[0].steps:
        assert step.value is None
        assert step.chosen.q is None
    assert "no V and no Q" in caveat(load_recipe(path / "recipe.yaml"), inspect_test(path))
    classic = make_run("classic", qlearning={"form": "classic", "max_steps": 2})
    for step in inspect_test(classic)[0].steps:
        assert step.chosen.q == pytest.approx(step.value)  # the greedy token has the greatest Q
        assert step.chosen.advantage == 0
        assert all(choice.advantage <= 0 for choice in step.alternatives)


def test_without_references_the_value_is_said_to_be_a_guess(command_line: Callable[..., Ran], moved: Path) -> None:
    blind = command_line("inspect", moved, "--prompt", "say two")
    assert blind.code == 0, blind.err
    assert NO_REFERENCES[:60] in blind.out
    references = ["--reference", "it is two", "--reference", "we say two"]
    seeing = command_line("inspect", moved, "--prompt", "say two", *references)
    assert NO_REFERENCES[:60] not in seeing.out
    assert blind.out.splitlines()[0].split() == seeing.out.splitlines()[0].split() == ["source", "say", "two"]
    assert "choices changed" in seeing.out
    values = [
        inspect_run(moved, [Pair("say two", references, {"source": "say two"})])[0].steps[0].value
        for references in ((), ("it is two",))
    ]
    assert values[0] != values[1]


def test_a_value_head_that_saw_no_references_is_shown_none(make_run: MakeRun) -> None:
    run = make_run("blind", qlearning={"value_sees_references": False, "max_steps": 2})
    (run / "last").rename(run / "moved")
    shutil.rmtree(run / "model")
    (run / "moved").rename(run / "model")
    with_and_without = [
        inspect_run(run, [Pair("say two", references, {"source": "say two"})]) for references in ((), ("it is two",))
    ]
    values = [[step.value for step in inspected[0].steps] for inspected in with_and_without]
    assert values[0] == values[1]
    assert any(values[0])
    assert [caveat(load_recipe(run / "recipe.yaml"), inspected) for inspected in with_and_without] == ["", ""]


def test_what_cannot_be_inspected_is_told(command_line: Callable[..., Ran], run: Path, tmp_path: Path) -> None:
    for arguments, reason in (
        ([run], "give --prompt TEXT or --data test"),
        ([run, "--prompt", "a", "--prompt", "b", "--reference", "c"], "--reference belongs to one --prompt"),
        ([tmp_path / "nowhere", "--prompt", "a"], "no run of lmdqn"),
    ):
        done = command_line("inspect", *arguments)
        assert (done.code, done.err.count("\n")) == (2, 1)
        assert reason in done.err
    (run / "reference").rename(run / "elsewhere")
    done = command_line("inspect", run, "--prompt", "a")
    assert done.code == 2
    assert "the policy that Q-learning began from is not there" in done.err


def test_the_page_is_written(command_line: Callable[..., Ran], run: Path, tmp_path: Path) -> None:
    done = command_line("inspect", run, "--data", "test", "--limit", "3", "--output", tmp_path / "page.html")
    assert done.code == 0, done.err
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert page.count("<article") == 3
    assert full_colour(inspect_test(run)) > 0


def test_the_terminal_marks_tokens_and_lists_changed_choices() -> None:
    the, dog, cat = (Choice(text, 0.5, 0.01, 0.25, 0.75) for text in ("the", " [b]dog", " cat"))
    steps = [Step(the, 0.1, 0.01, [the], None), Step(dog, 0.2, 1.0, [dog], " cat"), Step(cat, 0.3, -1.0, [cat], None)]
    one = Inspected(Example("[red]s", (), (1,), (), "s"), "the [b]dog cat", "the cat", steps, False)
    console = Console(width=100, force_terminal=True, color_system="truecolor", file=StringIO())
    show(console, *terminal_parts(one, 1.0))
    assert isinstance(console.file, StringIO)
    printed = console.file.getvalue()
    plain = re.sub(r"\x1b\[[\d;]*m", "", printed)
    assert "[red]s" in plain
    assert "the [b]dog cat" in plain
    assert "▁▅█" in plain
    assert "1 of 3 choices changed" in plain
    assert re.search(r"2 +│ ' \[b\]dog' +│ ' cat' +│ \+0\.500 +│ \+0\.0100 │ \+1\.00 │ 0\.250 +│ 0\.750", plain)
    green, red = "\x1b[4;37;48;2;30;140;75m [b]dog", "\x1b[37;48;2;185;50;50m cat"
    assert f"the{green}\x1b[0m{red}" in printed


def test_pieces_join_to_the_text(byte_tokenizer: Any) -> None:
    ids = byte_tokenizer("é a\nb").input_ids
    pieces = [piece(byte_tokenizer, ids[:t], token) for t, token in enumerate(ids)]
    assert "".join(pieces[2:]) == " a\nb"
    assert pieces[0] == "\ufffd"  # half a letter
    assert piece(byte_tokenizer, ids, byte_tokenizer.eos_token_id) == "</s>"
