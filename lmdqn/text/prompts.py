"""From pairs to examples: prompt templates, chat templates, tokens, and a cap on lengths that reports its cuts."""

import string
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from lmdqn.episodes import Example, SequenceFormat
from lmdqn.errors import UserError
from lmdqn.recipe import DataSection, nearest
from lmdqn.text.data import Pair

Tokenizer = Any  # transformers' tokenizers share no useful static type


@dataclass
class CutReport:
    """How many prompts and references were longer than the recipe allows, and how much they lost."""

    prompts: int = 0
    prompt_tokens: int = 0
    references: int = 0
    reference_tokens: int = 0

    def __str__(self) -> str:
        return (
            f"cut {self.prompts} prompts ({self.prompt_tokens} tokens) "
            f"and {self.references} references ({self.reference_tokens} tokens)"
        )

    def __bool__(self) -> bool:
        return bool(self.prompts or self.references)


def encode_examples(
    pairs: Sequence[Pair],
    data: DataSection,
    tokenizer: Tokenizer,
    layout: SequenceFormat,
    task: str = "",
    longest_response: int = 0,
) -> tuple[list[Example], CutReport]:
    """Tokenise pairs of a task for the model, whose context has room for the longest response of any task.

    A prompt over `data.max_prompt_tokens` loses the end or start of its *source*, never of its template (a chat of
    several turns loses its oldest turns first); a
    reference over `data.max_response_tokens` loses its end and with it its EOS.

    Raises:
        UserError: the template names a column that is not there, the tokenizer has no chat template though
            `data.chat` is set, or a prompt does not fit the model's context.
    """
    template = data.prompt or ("{source}" if layout.is_seq2seq or data.chat else "{source}\n")
    for pair in pairs:
        _check_template(template, pair, data, tokenizer)
    room = None
    if layout.context_tokens is not None:
        longest_response = max(longest_response, data.max_response_tokens)  # tasks are decoded together
        if longest_response + len(layout.decoder_prefix or ()) > layout.context_tokens:
            of_task = "" if longest_response == data.max_response_tokens else "another task's "
            raise UserError(
                f"{of_task}data.max_response_tokens={longest_response} is more than the model's context of "
                f"{layout.context_tokens} tokens has room for"
            )
        room = layout.context_tokens - (0 if layout.is_seq2seq else longest_response)
    cuts = CutReport()
    examples = []
    for pair in pairs:
        prompt, prompt_ids = _encode_prompt(pair, template, data, tokenizer, cuts)
        if room is not None and len(prompt_ids) > room:
            raise UserError(
                f"a prompt of {len(prompt_ids)} tokens does not fit: the model's context of {layout.context_tokens} "
                f"leaves {room}; set data.max_prompt_tokens={room} or less (prompt: {prompt[:60]!r}...)"
            )
        references = tuple(_encode_reference(r, data, tokenizer, layout, cuts) for r in pair.references)
        examples.append(Example(pair.source, pair.references, tuple(prompt_ids), references, prompt, task))
    return examples, cuts


def _check_template(template: str, pair: Pair, data: DataSection, tokenizer: Tokenizer) -> None:
    try:
        names = [name for _, name, _, _ in string.Formatter().parse(template) if name is not None]
    except ValueError as error:
        raise UserError(f"data.prompt {template!r}: {error}; write a literal brace as {{{{ or }}}}") from error
    columns = {**pair.row, "source": pair.source}
    for name in names:
        if name not in columns:
            raise UserError(f"data.prompt {template!r}: no column {name!r}{nearest(name, columns)}")
    if data.chat and data.prompt is not None and pair.turns:
        raise UserError("data.prompt is a template for one text: drop it, as data.chat wraps these turns by itself")
    if data.chat and not tokenizer.chat_template:
        raise UserError("data.chat is set, but this model's tokenizer has no chat template: write data.prompt instead")


def _encode_prompt(
    pair: Pair, template: str, data: DataSection, tokenizer: Tokenizer, cuts: CutReport
) -> tuple[str, list[int]]:
    def render(source: str) -> str:
        return template.format(**{**pair.columns_used(template), "source": source})

    def tokenise(text: str) -> list[int]:
        if not data.chat:
            return list(tokenizer(text).input_ids)
        return tokenise_turns(pair.turns or [("user", text)])

    def tokenise_turns(turns: Sequence[tuple[str, str]]) -> list[int]:
        system = [{"role": "system", "content": data.system}] if data.system else []
        messages = system + [{"role": role, "content": said} for role, said in turns]
        return list(tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False))

    prompt = render(pair.source)
    ids = tokenise(prompt)
    if data.max_prompt_tokens is None or len(ids) <= data.max_prompt_tokens:
        return prompt, ids
    before = len(ids)
    if data.chat and pair.turns:
        turns = list(pair.turns)
        while len(ids) > data.max_prompt_tokens and len(turns) > 1:
            del turns[0]
            ids = tokenise_turns(turns)
        if len(ids) > data.max_prompt_tokens:
            role, said = turns[0]
            _, ids = _shorten(said, data, tokenizer, lambda piece: (piece, tokenise_turns([(role, piece)])))
    else:
        prompt, ids = _shorten(pair.source, data, tokenizer, lambda source: (render(source), tokenise(render(source))))
    cuts.prompts += 1
    cuts.prompt_tokens += before - len(ids)
    return prompt, ids


def _shorten(
    source: str, data: DataSection, tokenizer: Tokenizer, encode: Callable[[str], tuple[str, list[int]]]
) -> tuple[str, list[int]]:
    """The prompt with the longest piece of the source that fits; pieces are whole tokens of the source."""
    assert data.max_prompt_tokens is not None
    if not tokenizer.is_fast:
        raise UserError("data.max_prompt_tokens needs a fast tokenizer: this model's cannot say where tokens begin")
    offsets = tokenizer(source, add_special_tokens=False, return_offsets_mapping=True).offset_mapping
    keep = len(offsets)
    while True:
        if keep == 0:
            piece = ""
        elif data.cut == "end":
            piece = source[: offsets[keep][0] if keep < len(offsets) else None]
        else:
            begin = len(offsets) - keep
            piece = source[offsets[begin - 1][1] if begin else 0 :]
        prompt, ids = encode(piece)
        excess = len(ids) - data.max_prompt_tokens
        if excess <= 0:
            return prompt, ids
        if keep == 0:
            raise UserError(
                f"data.max_prompt_tokens={data.max_prompt_tokens} has no room for the template itself, "
                f"which takes {len(ids)} tokens"
            )
        keep = max(0, keep - excess)


def _encode_reference(
    reference: str, data: DataSection, tokenizer: Tokenizer, layout: SequenceFormat, cuts: CutReport
) -> tuple[int, ...]:
    ids = [*tokenizer(text_target=reference, add_special_tokens=False).input_ids, layout.eos_ids[0]]
    excess = len(ids) - data.max_response_tokens
    if excess > 0:
        cuts.references += 1
        cuts.reference_tokens += excess
    return tuple(ids[: data.max_response_tokens])
