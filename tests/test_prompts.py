"""Prompts: templates, chat, tokens, cuts and their report. The tokenizer takes every ASCII character for a token."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from lmdqn.episodes import Example, SequenceFormat
from lmdqn.errors import UserError
from lmdqn.recipe import DataSection
from lmdqn.text.data import Pair
from lmdqn.text.prompts import CutReport, encode_examples

EOS = 2
CAUSAL = SequenceFormat(pad_id=0, eos_ids=(EOS,), decoder_prefix=None, context_tokens=None)
SEQ2SEQ = replace(CAUSAL, decoder_prefix=(0,))
CHAT = (
    "{% for message in messages %}[{{ message.role }}]{{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


def pair(source: str, *references: str, turns: Sequence[tuple[str, str]] | None = None, **columns: Any) -> Pair:
    return Pair(source, references, {"source": source, **columns}, None if turns is None else tuple(turns))


def encode_one(pair: Pair, tokenizer: Any, layout: SequenceFormat = CAUSAL, **data: Any) -> tuple[Example, CutReport]:
    [example], cuts = encode_examples([pair], DataSection(**data), tokenizer, layout)
    return example, cuts


def refusal(pair: Pair, tokenizer: Any, layout: SequenceFormat = CAUSAL, **data: Any) -> str:
    with pytest.raises(UserError) as refused:
        encode_one(pair, tokenizer, layout, **data)
    assert "\n" not in str(refused.value)
    return str(refused.value)


def talk(tokenizer: Any) -> Any:
    tokenizer.chat_template = CHAT
    return tokenizer


def end_sources(tokenizer: Any) -> Any:
    """Let encoder inputs end in EOS, as T5's do."""
    from tokenizers.processors import TemplateProcessing

    processor = TemplateProcessing(single="$A </s>", special_tokens=[("</s>", EOS)])
    tokenizer.backend_tokenizer.post_processor = processor
    return tokenizer


# --- templates ----------------------------------------------------------------------------------------------------


def test_default_prompts(byte_tokenizer: Any) -> None:
    """A causal model needs a sign that the source is over; a seq2seq model has the encoder's end."""
    assert encode_one(pair("abc"), byte_tokenizer)[0].prompt == "abc\n"
    assert encode_one(pair("abc"), byte_tokenizer, SEQ2SEQ)[0].prompt == "abc"


def test_template_over_columns(byte_tokenizer: Any) -> None:
    example, cuts = encode_one(
        pair("abc", "r", question="who", year=1999), byte_tokenizer, prompt="Q: {question} ({year}) C: {source} A:"
    )
    assert example.prompt == "Q: who (1999) C: abc A:"
    assert byte_tokenizer.decode(list(example.prompt_ids)) == example.prompt
    assert len(example.prompt_ids) == len(example.prompt)
    assert (example.source, example.references) == ("abc", ("r",))
    assert not cuts


def test_source_is_the_mapped_column_whatever_another_column_is_called(byte_tokenizer: Any) -> None:
    example, _ = encode_one(
        Pair("mapped", (), {"text": "mapped", "source": "other"}), byte_tokenizer, prompt="{source}"
    )
    assert example.prompt == "mapped"


def test_braces(byte_tokenizer: Any) -> None:
    """Doubled in the template they are literal; in a source they are text."""
    example, _ = encode_one(pair("a {b} }"), byte_tokenizer, prompt='{{"in": "{source}"}}')
    assert example.prompt == '{"in": "a {b} }"}'


def test_unknown_column_names_the_nearest(byte_tokenizer: Any) -> None:
    sentence = refusal(pair("abc", question="who"), byte_tokenizer, prompt="{qestion} {source}")
    assert sentence == "data.prompt '{qestion} {source}': no column 'qestion'; did you mean 'question'?"


def test_column_that_a_later_row_lacks(byte_tokenizer: Any) -> None:
    pairs = [pair("abc", question="who"), pair("abc")]
    with pytest.raises(UserError, match="no column 'question'"):
        encode_examples(pairs, DataSection(prompt="{question} {source}"), byte_tokenizer, CAUSAL)


@pytest.mark.parametrize("template", ["{source", "source}", "{source} }"])
def test_unpaired_brace(byte_tokenizer: Any, template: str) -> None:
    sentence = refusal(pair("abc"), byte_tokenizer, prompt=template)
    assert sentence.startswith(f"data.prompt {template!r}: ")
    assert sentence.endswith("write a literal brace as {{ or }}")


# --- chat ---------------------------------------------------------------------------------------------------------


def test_chat_wraps_the_prompt(byte_tokenizer: Any) -> None:
    example, _ = encode_one(pair("abc"), talk(byte_tokenizer), chat=True, prompt="Shorten: {source}")
    assert byte_tokenizer.decode(list(example.prompt_ids)) == "[user]Shorten: abc\n[assistant]"


def test_chat_without_a_template_of_ones_own_is_the_source_alone(byte_tokenizer: Any) -> None:
    example, _ = encode_one(pair("abc"), talk(byte_tokenizer), chat=True)
    assert byte_tokenizer.decode(list(example.prompt_ids)) == "[user]abc\n[assistant]"


def test_chat_of_several_turns_under_a_system_message(byte_tokenizer: Any) -> None:
    said = pair("Hi.\nHello!\nBye.", turns=[("user", "Hi."), ("assistant", "Hello!"), ("user", "Bye.")])
    example, _ = encode_one(said, talk(byte_tokenizer), chat=True, system="Be brief.")
    assert byte_tokenizer.decode(list(example.prompt_ids)) == (
        "[system]Be brief.\n[user]Hi.\n[assistant]Hello!\n[user]Bye.\n[assistant]"
    )


def test_turns_without_chat_are_lines(byte_tokenizer: Any) -> None:
    example, _ = encode_one(pair("Hi.\nHello!", turns=[("assistant", "Hi."), ("user", "Hello!")]), byte_tokenizer)
    assert byte_tokenizer.decode(list(example.prompt_ids)) == "Hi.\nHello!\n"


def test_chat_needs_the_tokenizers_template(byte_tokenizer: Any) -> None:
    sentence = refusal(pair("abc"), byte_tokenizer, chat=True)
    assert "data.chat" in sentence
    assert "data.prompt" in sentence


# --- cuts ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("cut", "left"), [("end", "abcd"), ("start", "ghij")])
def test_long_prompt_is_cut_inside_the_source(byte_tokenizer: Any, cut: str, left: str) -> None:
    """The template takes 4 + 3 of the 11 tokens."""
    example, cuts = encode_one(
        pair("abcdefghij"), byte_tokenizer, prompt="in: {source} :", max_prompt_tokens=10, cut=cut
    )
    assert example.prompt == f"in: {left} :"
    assert byte_tokenizer.decode(list(example.prompt_ids)) == example.prompt
    assert cuts == CutReport(prompts=1, prompt_tokens=6)
    assert example.source == "abcdefghij"


@pytest.mark.parametrize("spare", [0, 5])
def test_prompt_that_fits_is_left_alone(byte_tokenizer: Any, spare: int) -> None:
    example, cuts = encode_one(pair("abcdefghij"), byte_tokenizer, max_prompt_tokens=11 + spare)
    assert example.prompt == "abcdefghij\n"
    assert cuts == CutReport()


def test_another_column_of_the_template_is_not_cut(byte_tokenizer: Any) -> None:
    long = pair("abcdefghij", question="why is that")
    example, _ = encode_one(long, byte_tokenizer, prompt="{question}? {source}", max_prompt_tokens=15)
    assert example.prompt == "why is that? ab"


def test_prompt_cut_for_an_encoder_keeps_its_eos(byte_tokenizer: Any) -> None:
    example, cuts = encode_one(pair("abcdefghij"), end_sources(byte_tokenizer), SEQ2SEQ, max_prompt_tokens=5)
    assert example.prompt == "abcd"
    assert example.prompt_ids[-1] == EOS
    assert len(example.prompt_ids) == 5
    assert cuts == CutReport(prompts=1, prompt_tokens=6)


def test_chat_is_cut_inside_the_source(byte_tokenizer: Any) -> None:
    limit = len("[system]Be brief.\n[user]abc\n[assistant]")
    example, cuts = encode_one(
        pair("abcdefghij"), talk(byte_tokenizer), chat=True, system="Be brief.", max_prompt_tokens=limit
    )
    assert byte_tokenizer.decode(list(example.prompt_ids)) == "[system]Be brief.\n[user]abc\n[assistant]"
    assert cuts == CutReport(prompts=1, prompt_tokens=7)


def test_chat_of_several_turns_is_never_cut_in_its_template(byte_tokenizer: Any) -> None:
    """What was said first goes first; the system message and the marks of the turns stay."""
    turns = [("user", "old news " * 5), ("assistant", "Hello!"), ("user", "Bye.")]
    said = pair("\n".join(text for _, text in turns), turns=turns)
    end = "[assistant]Hello!\n[user]Bye.\n[assistant]"
    limit = len("[system]Be brief.\n[user]old") + len(end)
    example, cuts = encode_one(
        said, talk(byte_tokenizer), chat=True, system="Be brief.", max_prompt_tokens=limit, cut="start"
    )
    prompt = byte_tokenizer.decode(list(example.prompt_ids))
    assert prompt.startswith("[system]Be brief.\n[")
    assert prompt.endswith(end)
    assert len(prompt) <= limit
    assert cuts.prompts == 1


@pytest.mark.parametrize("cut", ["end", "start"])
def test_a_character_of_several_tokens_is_not_torn(byte_tokenizer: Any, cut: str) -> None:
    source = "😀😁😂🤣😃😄"  # four tokens a character
    example, _ = encode_one(pair(source), byte_tokenizer, SEQ2SEQ, max_prompt_tokens=11, cut=cut)
    assert example.prompt == (source[:2] if cut == "end" else source[-2:])


def test_template_without_room_for_a_source(byte_tokenizer: Any) -> None:
    sentence = refusal(pair("abcdefghij"), byte_tokenizer, prompt="a long template: {source}", max_prompt_tokens=10)
    assert "data.max_prompt_tokens=10" in sentence
    assert "takes 17 tokens" in sentence


def test_references_end_in_eos(byte_tokenizer: Any) -> None:
    example, cuts = encode_one(pair("abc", "de", ""), byte_tokenizer)
    assert example.reference_ids == ((*byte_tokenizer("de").input_ids, EOS), (EOS,))
    assert not cuts


def test_the_models_first_eos_ends_references(byte_tokenizer: Any) -> None:
    example, _ = encode_one(pair("abc", "de"), byte_tokenizer, replace(CAUSAL, eos_ids=(1, EOS)))
    assert example.reference_ids[0][-1] == 1


def test_long_reference_loses_its_end_and_eos(byte_tokenizer: Any) -> None:
    example, cuts = encode_one(pair("abc", "defgh", "def", "de"), byte_tokenizer, max_response_tokens=3)
    cut = tuple(byte_tokenizer("def").input_ids)
    assert example.reference_ids == (cut, cut, (*cut[:2], EOS))
    assert cuts == CutReport(references=2, reference_tokens=3 + 1)


def test_an_encoders_eos_is_not_doubled_in_references(byte_tokenizer: Any) -> None:
    example, _ = encode_one(pair("abc", "de"), end_sources(byte_tokenizer), SEQ2SEQ)
    assert example.reference_ids[0].count(EOS) == 1


def test_the_report_adds_up_over_pairs_and_reads_as_a_sentence(byte_tokenizer: Any) -> None:
    pairs = [pair("abcdef", "x"), pair("abc", "xyz"), pair("abcdefgh", "wxyz")]
    data = DataSection(max_prompt_tokens=5, max_response_tokens=3)
    examples, cuts = encode_examples(pairs, data, byte_tokenizer, CAUSAL)
    assert [e.prompt for e in examples] == ["abcd\n", "abc\n", "abcd\n"]
    assert cuts == CutReport(prompts=2, prompt_tokens=2 + 4, references=2, reference_tokens=1 + 2)
    assert str(cuts) == "cut 2 prompts (6 tokens) and 2 references (3 tokens)"


# --- the model's context ------------------------------------------------------------------------------------------


def test_prompt_and_response_must_fit_a_causal_context(byte_tokenizer: Any) -> None:
    layout = replace(CAUSAL, context_tokens=20)
    assert encode_one(pair("abcdefghi"), byte_tokenizer, layout, max_response_tokens=10)[0].prompt == "abcdefghi\n"
    sentence = refusal(pair("abcdefghij"), byte_tokenizer, layout, max_response_tokens=10)
    assert "a prompt of 11 tokens does not fit" in sentence
    assert "set data.max_prompt_tokens=10" in sentence


def test_the_named_fix_mends_it(byte_tokenizer: Any) -> None:
    layout = replace(CAUSAL, context_tokens=20)
    example, _ = encode_one(pair("a" * 50), byte_tokenizer, layout, max_response_tokens=10, max_prompt_tokens=10)
    assert len(example.prompt_ids) == 10


def test_an_encoders_context_is_the_prompts_own(byte_tokenizer: Any) -> None:
    layout = replace(SEQ2SEQ, context_tokens=20)
    assert len(encode_one(pair("a" * 20), byte_tokenizer, layout, max_response_tokens=10)[0].prompt_ids) == 20
    assert "set data.max_prompt_tokens=20" in refusal(pair("a" * 21), byte_tokenizer, layout, max_response_tokens=10)


@pytest.mark.parametrize("layout", [CAUSAL, SEQ2SEQ], ids=["causal", "seq2seq"])
def test_responses_longer_than_the_context_are_refused_by_their_own_key(
    byte_tokenizer: Any, layout: SequenceFormat
) -> None:
    sentence = refusal(pair("abc"), byte_tokenizer, replace(layout, context_tokens=20), max_response_tokens=30)
    assert "data.max_response_tokens" in sentence
    assert "max_prompt_tokens=-" not in sentence
