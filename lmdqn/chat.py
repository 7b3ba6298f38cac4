"""A conversation with a trained model at the terminal: responses stream, commands begin with a slash."""

from collections.abc import Iterable
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text
from transformers import TextStreamer

from lmdqn.errors import UserError
from lmdqn.model.loading import LoadedModel
from lmdqn.recipe import Recipe
from lmdqn.results.inspection import inspect_run
from lmdqn.results.inspection_view import caveat, full_colour, terminal_parts
from lmdqn.results.tables import show
from lmdqn.text.data import Pair, source_alone
from lmdqn.text.prompts import encode_examples

COMMANDS = (
    "/values shows what each token of the last response was worth, /reset forgets the conversation, /quit ends it"
)


class Chat:
    """Turns so far, and how the recipe makes a prompt of them.

    A recipe that learns conversations, or wraps turns in a chat template, sees the turns so far; any other responds
    to each message by itself.
    """

    def __init__(self, loaded: LoadedModel, recipe: Recipe):
        self.loaded = loaded
        self.turns: list[tuple[str, str]] = []  # (role, text)
        self.answered: Pair | None = None  # what the last response answered
        data = recipe.only_task.data
        self._remembers = data.conversation is not None or (data.chat and data.prompt is None)
        self._history = data.conversation.history if data.conversation is not None else None
        context = loaded.layout.context_tokens
        if data.max_prompt_tokens is None and context is not None:  # the oldest turns go before the context is full
            taken = 0 if loaded.layout.is_seq2seq else data.max_response_tokens
            data = data.model_copy(update={"max_prompt_tokens": context - taken, "cut": "start"})
        self.recipe = recipe.model_copy(update={"data": data})
        self._data = data

    def reset(self) -> None:
        """Forget the conversation."""
        self.turns.clear()
        self.answered = None

    def respond(self, text: str, streamer: Any = None) -> str:
        """The model's greedy response to a message; a `transformers` streamer gets it token by token.

        Raises:
            UserError: the message does not fit the model's context, or the recipe's prompt needs more than a source.
        """
        turns = [*self.turns, ("user", text)][-(self._history or 0) :]
        pair = source_alone(text)
        if self._remembers:
            pair = Pair("\n".join(said for _, said in turns), (), {}, tuple(turns))
        (example,), _ = encode_examples([pair], self._data, self.loaded.tokenizer, self.loaded.layout)
        model = self.loaded.model
        ids = torch.tensor([example.prompt_ids], device=next(model.parameters()).device)  # (1, prompt)
        with torch.no_grad():
            output = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), streamer=streamer)[0]
        if not self.loaded.layout.is_seq2seq:
            output = output[ids.shape[1] :]
        response = str(self.loaded.tokenizer.decode(output, skip_special_tokens=True)).strip()
        self.answered = pair
        if self._remembers:
            self.turns += [("user", text), ("assistant", response)]
        return response


def values(chat: Chat, run: str) -> list[Text | Table]:
    """The last response, each token on the ground of its advantage beta log(pi / pi_0); see `lmdqn inspect`.

    Raises:
        UserError: there is no response yet, or `run` is no run with its reference policy.
    """
    if chat.answered is None:
        raise UserError("there is no response yet")
    inspected = inspect_run(run, [chat.answered], chat.recipe)
    note = caveat(chat.recipe, inspected)
    parts = [part for one in inspected for part in terminal_parts(one, full_colour(inspected))]
    return [*parts, Text(note)] if note else parts


def converse(chat: Chat, run: str, messages: Iterable[str], terminal: Console, aside: Console) -> None:
    """Answer each message on `terminal`, as it is written; what goes wrong with one is said aside and ends nothing."""
    streamer = TextStreamer(chat.loaded.tokenizer, skip_prompt=True, skip_special_tokens=True)
    for message in map(str.strip, messages):
        try:
            if message == "/quit":
                return
            if message == "/reset":
                chat.reset()
                show(aside, "(a new conversation)")
            elif message == "/values":
                show(terminal, *values(chat, run))
            elif message.startswith("/"):
                show(aside, COMMANDS)
            elif message:
                chat.respond(message, streamer)
        except UserError as error:
            show(aside, f"({error})")
