"""Responses of a saved model to files, lines and a person, from the command line."""

import io
import json
import shutil
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file, save_file

import lmdqn
from lmdqn.answering import decoder, load_for_use
from lmdqn.chat import Chat
from lmdqn.episodes import VALUE_FEATURES
from lmdqn.model.loading import load_model
from lmdqn.model.qnetwork import ValueHead
from lmdqn.recipe import Recipe, dump_recipe, load_recipe
from lmdqn.text.data import source_alone
from lmdqn.text.prompts import encode_examples

CommandLine = Callable[..., Any]
GPT2 = {"n_layer": 1, "n_head": 2, "n_embd": 32, "n_positions": 96}
TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}|{% endfor %}"
SOURCES = ["cat", "a longer source", "dog", "x y z", "the last one"]


def save_run(folder: Path, **data: Any) -> Path:
    """What a run leaves that responds: an untrained model, which answers different things to different prompts."""
    recipe = Recipe.model_validate(
        {
            "model": {"from_scratch": {"family": "gpt2", "vocabulary_size": 300, "config": GPT2}},
            "data": {"path": ".", "max_response_tokens": 6, **data},
            "evaluation": {"batch_examples": 2},
        }
    )
    loaded = load_model(recipe.model, ["some words"], seed=1, max_response_tokens=6)
    for parameter in loaded.model.parameters():
        parameter.data *= 5  # far from uniform: what is likeliest depends on the prompt
    loaded.tokenizer.chat_template = TEMPLATE
    loaded.model.save_pretrained(folder / "model")
    loaded.tokenizer.save_pretrained(folder / "model")
    (folder / "recipe.yaml").write_text(dump_recipe(recipe), encoding="utf-8")
    return folder


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return save_run(tmp_path / "run")


# --- generate ---------------------------------------------------------------------------------------------------------


def test_lines_in_lines_out_in_order(run: Path, tmp_path: Path, command_line: CommandLine) -> None:
    (tmp_path / "in.txt").write_text("\n".join(SOURCES) + "\n\n", encoding="utf-8")
    ran = command_line("generate", run, "--input", tmp_path / "in.txt", "--output", tmp_path / "out.txt")
    assert (ran.code, ran.out) == (0, ""), ran.err
    one_by_one = [lmdqn.generate(run, [source])[0] for source in SOURCES]
    assert len(set(one_by_one)) > 1
    written = (tmp_path / "out.txt").read_text(encoding="utf-8").split("\n")
    assert written == [*(" ".join(response.splitlines()) for response in one_by_one), ""]
    printed = command_line("generate", run, "--input", tmp_path / "in.txt")
    assert printed.out == "\n".join(written)


def test_standard_input_is_a_file_of_lines(run: Path, command_line: CommandLine, monkeypatch: Any) -> None:
    def piped(content: bytes) -> Any:
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(content), encoding="utf-8"))
        return command_line("generate", run, "--input", "-")

    odd = "d\u2028og\x0c"
    assert piped(f"cat\r\n\n{odd}\n".encode()).out.split("\n") == [
        *(" ".join(lmdqn.generate(run, [source])[0].splitlines()) for source in ("cat", odd)),
        "",
    ]
    refused = piped(b"\xff\n")
    assert (refused.code, refused.err) == (2, "lmdqn: cannot read standard input: not UTF-8\n")


def test_precision_is_the_recipes(run: Path) -> None:
    """As in the run, whose results.json was measured under autocast."""
    recipe = load_recipe(run / "recipe.yaml", ["optimisation.mixed_precision=bf16"])
    with torch.autocast("cpu", torch.bfloat16):
        expected = lmdqn.generate(run, SOURCES)
    AcceleratorState._reset_state(reset_partial_state=True)  # a process has one precision
    dtypes = set()
    loaded, _ = load_for_use(run, recipe)
    decode = decoder(run, loaded, recipe)
    loaded.model.lm_head.register_forward_hook(lambda head, inputs, output: dtypes.add(output.dtype))
    pairs = [source_alone(source) for source in SOURCES]
    examples, _ = encode_examples(pairs, recipe.only_task.data, loaded.tokenizer, loaded.layout)
    assert decode(examples, 0) == expected
    assert dtypes == {torch.bfloat16}
    AcceleratorState._reset_state(reset_partial_state=True)


def test_version(command_line: CommandLine) -> None:
    assert command_line("--version").out == f"lmdqn {metadata.version('lmdqn')}\n"


def test_objects_in_objects_out_with_the_recipes_columns(tmp_path: Path, command_line: CommandLine) -> None:
    run = save_run(tmp_path / "run", source="text", prompt="{topic}: {source} =>")
    rows = [{"text": source, "topic": topic} for source in SOURCES[:2] for topic in ("animals", "plants")]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    ran = command_line("generate", run, "--input", tmp_path / "in.jsonl", "--output", tmp_path / "out.jsonl")
    assert ran.code == 0, ran.err
    answers = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [answer["source"] for answer in answers] == [row["text"] for row in rows]
    plain = save_run(tmp_path / "plain", prompt="{source} =>")
    prompts = [f"{row['topic']}: {row['text']}" for row in rows]
    assert [answer["response"] for answer in answers] == lmdqn.generate(plain, prompts)


def test_an_output_file_is_kept_unless_told(run: Path, tmp_path: Path, command_line: CommandLine) -> None:
    output = tmp_path / "out.txt"
    output.write_text("mine", encoding="utf-8")
    arguments = ("generate", run, "--source", "cat", "--output", output)
    ran = command_line(*arguments)
    assert (ran.code, ran.err) == (2, f"lmdqn: {output} is already there: --overwrite replaces it\n")
    assert output.read_text(encoding="utf-8") == "mine"
    assert command_line(*arguments, "--overwrite").code == 0
    assert output.read_text(encoding="utf-8") != "mine"


def test_what_fails_half_way_leaves_nothing(run: Path, tmp_path: Path, command_line: CommandLine) -> None:
    """The second batch does not fit the model."""
    (tmp_path / "in.txt").write_text("cat\ndog\n" + "long " * 200, encoding="utf-8")
    before = sorted(tmp_path.iterdir())
    ran = command_line("generate", run, "--input", tmp_path / "in.txt", "--output", tmp_path / "out.txt")
    assert ran.code == 2
    assert "does not fit" in ran.err
    assert sorted(tmp_path.iterdir()) == before
    missing = command_line("generate", run, "--input", tmp_path / "no.txt", "--output", tmp_path / "out.txt")
    assert f"cannot read {tmp_path / 'no.txt'}" in missing.err
    unwritable = command_line("generate", run, "--source", "cat", "--output", tmp_path / "no" / "out.txt")
    assert f"cannot write {tmp_path / 'no' / 'out.txt'}" in unwritable.err
    assert sorted(tmp_path.iterdir()) == before


# --- chat -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def talk(command_line: CommandLine, monkeypatch: pytest.MonkeyPatch) -> CommandLine:
    def type_in(run: Path, *lines: str) -> Any:
        monkeypatch.setattr("sys.stdin", io.StringIO("".join(line + "\n" for line in lines)))
        return command_line("chat", run)

    return type_in


def test_messages_to_a_model_without_turns_stand_alone(run: Path, talk: CommandLine) -> None:
    ran = talk(run, "cat", "", "x y z", "/help", "/quit", "never read")
    assert ran.code == 0, ran.err
    assert ran.out.split() == " ".join(lmdqn.generate(run, ["cat", "x y z"])).split()  # streamed, in pieces
    assert ran.err.startswith("/values shows")


def test_values_are_those_that_inspect_shows(tmp_path: Path, talk: CommandLine, command_line: CommandLine) -> None:
    run = save_run(tmp_path / "run", chat=True)
    shutil.copytree(run / "model", run / "reference")
    save_file({name: tensor * 1.5 for name, tensor in load_file(run / "model/model.safetensors").items()},
              run / "reference/model.safetensors", metadata={"format": "pt"})  # fmt: skip
    head = ValueHead(32, VALUE_FEATURES, 0.01)
    save_file(head.state_dict(), run / "model/value_head.safetensors")
    ran = talk(run, "/values", "cat", "/values")
    assert ran.code == 0, ran.err
    assert ran.err == "(there is no response yet)\n"
    shown = command_line("inspect", run, "--prompt", "cat").out
    assert "value" in shown
    assert shown.split("value")[1].split() == ran.out.split("value")[1].split()


def test_a_value_head_of_an_older_version_is_refused(tmp_path: Path, talk: CommandLine) -> None:
    run = save_run(tmp_path / "run", chat=True)
    shutil.copytree(run / "model", run / "reference")
    tensors = ValueHead(32, VALUE_FEATURES, 0.01).state_dict()
    del tensors["scale"]  # it stood elsewhere once
    save_file(tensors, run / "model/value_head.safetensors")
    ran = talk(run, "cat", "/values")
    assert "value_head.safetensors was written by an older version of lmdqn" in ran.err


def test_a_message_that_does_not_fit_ends_nothing(tmp_path: Path, talk: CommandLine) -> None:
    run = save_run(tmp_path / "run", prompt="{column} {source}")
    ran = talk(run, "cat")
    assert ran.code == 0
    assert "no column 'column'" in ran.err


class Listener:
    """A streamer that keeps the prompt that `generate` begins with."""

    def __init__(self) -> None:
        self.pieces: list[list[int]] = []

    def put(self, ids: Any) -> None:
        self.pieces.append(ids.flatten().tolist())

    def end(self) -> None:
        """Nothing to do."""


def prompt_of(chat: Chat, message: str) -> str:
    """What the model saw before it answered."""
    listener = Listener()
    response = chat.respond(message, listener)
    tokenizer = chat.loaded.tokenizer
    answered = tokenizer.decode([i for piece in listener.pieces[1:] for i in piece], skip_special_tokens=True)
    assert answered.strip() == response
    return str(tokenizer.decode(listener.pieces[0]))


def test_a_chat_remembers_until_it_is_reset(tmp_path: Path) -> None:
    chat = Chat(*load_for_use(save_run(tmp_path / "run", chat=True), None))
    assert prompt_of(chat, "hello") == "user: hello|"
    first = chat.turns[1][1]
    assert chat.turns == [("user", "hello"), ("assistant", first)]
    assert prompt_of(chat, "and?") == f"user: hello|assistant: {first}|user: and?|"
    chat.reset()
    assert prompt_of(chat, "again") == "user: again|"


def test_the_oldest_turns_leave_a_full_context(tmp_path: Path) -> None:
    chat = Chat(*load_for_use(save_run(tmp_path / "run", chat=True), None))
    for _ in range(6):
        prompt = prompt_of(chat, "twenty letters and on")
    assert prompt.endswith("user: twenty letters and on|")
    assert 0 < prompt.count("user: ") < 6


def test_a_conversation_keeps_the_turns_it_was_trained_on(tmp_path: Path) -> None:
    chat = Chat(*load_for_use(save_run(tmp_path / "run", conversation={"history": 3}), None))
    for message in ("one", "two", "three"):
        prompt = prompt_of(chat, message)
    two, three = chat.turns[3][1], chat.turns[4][1]
    assert prompt == f"two\n{two}\n{three}\n"
