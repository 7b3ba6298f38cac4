"""Models and tokenizers: from the hub, from a folder, or built small from the data."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.utils import cached_file

from lmdqn.episodes import SequenceFormat
from lmdqn.errors import UserError
from lmdqn.model.sharing import can_share_prompts
from lmdqn.recipe import FromScratch, Lora, ModelSection, nearest

PAD, BOS, EOS = "<pad>", "<s>", "</s>"
ADAPTER_CONFIG = "adapter_config.json"


@dataclass
class LoadedModel:
    """An ordinary transformers (or, with an adapter, peft) model, its tokenizer, and how its sequences are laid out."""

    model: Any  # PreTrainedModel or PeftModel, which share no static type
    tokenizer: Any
    layout: SequenceFormat


def load_model(section: ModelSection, texts: Sequence[str], seed: int, max_response_tokens: int) -> LoadedModel:
    """Load the recipe's pretrained model, or build one whose tokenizer is trained on `texts`.

    The model's generation config is replaced by plain greedy decoding, which is what evaluation measures.

    Raises:
        UserError: no such model, no network, no LM head, no pad or EOS token, or a config the family refuses.
    """
    if section.from_scratch is not None:
        tokenizer = train_tokenizer(texts, section.from_scratch.vocabulary_size)
        config = scratch_config(section.from_scratch, tokenizer)
        tokenizer = _end_sources(tokenizer) if config.is_encoder_decoder else tokenizer
        model = build(config, seed)
    else:
        config = read_config(section)
        tokenizer = _load_tokenizer(section)
        model = _load_pretrained(section, config)
    model.eval()
    layout = _sequence_format(model, tokenizer)
    layout = replace(layout, shares_prompts=can_share_prompts(model, layout), token_cost=_token_cost(model))
    model.generation_config = _plain_generation(layout, max_response_tokens)
    if section.lora is not None:
        model = add_lora(model, section.lora, seed, section.revision)
    return LoadedModel(model.eval(), tokenizer, layout)


def load_trained(folder: str | Path, like: ModelSection, max_response_tokens: int) -> LoadedModel:
    """The model that a run saved in its `model/` folder, or any other by name, full or adapter, for evaluation.

    `like` says how else it is loaded: dtype, special tokens, remote code.
    """

    def named(name: str) -> ModelSection:
        revision = like.revision if name == like.name else None
        return like.model_copy(update={"name": name, "revision": revision, "from_scratch": None, "lora": None})

    section = named(str(folder))
    if not _has_file(section, ADAPTER_CONFIG):
        return load_model(section, (), 0, max_response_tokens)
    from peft import PeftConfig, PeftModel

    if not _has_file(section, "adapter_model.safetensors"):  # peft would look for a pickle
        raise UserError(f"cannot load adapter {folder}: it has no adapter_model.safetensors")
    base = PeftConfig.from_pretrained(str(folder), revision=section.revision).base_model_name_or_path
    assert base is not None
    loaded = load_model(named(base), (), 0, max_response_tokens)
    adapted = PeftModel.from_pretrained(loaded.model, str(folder), revision=section.revision)
    return replace(loaded, model=adapted.eval())


def _has_file(section: ModelSection, file: str, local_files_only: bool = False) -> bool:
    """Whether a pretrained model's folder or repository (or what is here of it) has a file."""
    assert section.name is not None
    quiet = ("missing_entries", "gated_repo", "connection_errors")
    try:
        options = {f"_raise_exceptions_for_{problem}": False for problem in quiet}
        options["local_files_only"] = local_files_only
        return cached_file(section.name, file, revision=section.revision, **options) is not None
    except OSError:  # there is no such model, as loading it will tell
        return False


def read_config(section: ModelSection, local_files_only: bool = False) -> PreTrainedConfig:
    """The config of a pretrained model, its kind checked against `model.architecture`."""
    assert section.name is not None
    try:
        config = AutoConfig.from_pretrained(
            section.name,
            revision=section.revision,
            trust_remote_code=section.trust_remote_code,
            local_files_only=local_files_only,
        )
    except (OSError, ValueError) as error:
        if _has_file(section, ADAPTER_CONFIG, local_files_only=True):
            raise UserError(
                f"model {section.name} is an adapter, and model.name must be a whole model: merge it into its base "
                "(`lmdqn push --merge`, or PEFT's merge_and_unload), or go on from its run with --continue"
            ) from error
        raise UserError(f"cannot load model {section.name}: {_first_sentence(error)}") from error
    kind = "seq2seq" if config.is_encoder_decoder else "causal"
    if section.architecture not in ("auto", kind):
        raise UserError(f"model {section.name} is {kind}: set model.architecture={kind} or auto")
    if type(config) not in auto_class(config)._model_mapping:
        raise UserError(f"model {section.name} ({config.model_type}) has no LM head to read as Q-values")
    return config


def train_tokenizer(texts: Sequence[str], vocabulary_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE (as GPT-2's) with <pad>, <s> and </s>; each digit is a token, so numbers can be copied."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary_size,
        special_tokens=[PAD, BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, pad_token=PAD, bos_token=BOS, eos_token=EOS)


def scratch_config(scratch: FromScratch, tokenizer: Any) -> PreTrainedConfig:
    """The family's config with the recipe's fields and the tokenizer's ids."""
    try:
        config = AutoConfig.for_model(scratch.family)
    except ValueError as error:
        raise UserError(f"model.from_scratch.family {scratch.family!r} is no transformers model type") from error
    if type(config) not in auto_class(config)._model_mapping:
        raise UserError(f"model.from_scratch.family {scratch.family!r} has no LM head to read as Q-values")
    for key in scratch.config:
        if not hasattr(config, key):
            raise UserError(
                f"model.from_scratch.config: {scratch.family} has no field {key!r}{nearest(key, config.to_dict())}"
            )
    ids = {name: tokenizer.convert_tokens_to_ids(t) for name, t in (("pad", PAD), ("bos", BOS), ("eos", EOS))}
    fields = {f"{name}_token_id": i for name, i in ids.items()} | {"vocab_size": len(tokenizer)}
    if config.is_encoder_decoder:
        fields |= {"decoder_start_token_id": ids["pad"], "forced_bos_token_id": None, "forced_eos_token_id": None}
    try:
        return AutoConfig.for_model(scratch.family, **fields, **scratch.config)
    except (ValueError, TypeError, StrictDataclassError) as error:
        raise UserError(f"model.from_scratch.config: {' '.join(str(error).split())}") from error


def hidden_size(model: Any) -> int:
    """Width of what the LM head reads."""
    return model.get_output_embeddings().in_features


def _token_cost(model: Any) -> float:
    """A layer takes some 24 H^2 operations on a token, two for each weight, and 4 H on each place it attends to."""
    return 6.0 * hidden_size(model)


def build(config: PreTrainedConfig, seed: int) -> PreTrainedModel:
    """A model of random weights.

    Raises:
        UserError: its sizes do not go together.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        try:
            return auto_class(config).from_config(config)
        except (ValueError, AssertionError, RuntimeError) as error:
            raise UserError(f"model.from_scratch.config: {_first_sentence(error)}") from error


def _end_sources(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """Encoder inputs end in EOS, as T5's and BART's do."""
    from tokenizers.processors import TemplateProcessing

    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"$A {EOS}", special_tokens=[(EOS, tokenizer.eos_token_id)]
    )
    return tokenizer


def _load_tokenizer(section: ModelSection) -> Any:
    assert section.name is not None
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            section.name, revision=section.revision, trust_remote_code=section.trust_remote_code
        )
    except (OSError, ValueError) as error:
        raise UserError(f"cannot load the tokenizer of {section.name}: {_first_sentence(error)}") from error
    if not tokenizer("a").input_ids or len(tokenizer) <= len(tokenizer.all_special_ids):
        raise UserError(f"cannot load the tokenizer of {section.name}: its files are missing")
    for role in ("eos_token", "pad_token"):
        wanted = getattr(section, role)
        if wanted is not None:
            if wanted not in tokenizer.get_vocab():
                raise UserError(f"model.{role} {wanted!r} is not in the vocabulary of {section.name}")
            setattr(tokenizer, role, wanted)
        if getattr(tokenizer, role) is None:
            hint = "an unused token of its vocabulary"
            if role == "pad_token":
                hint = f"{tokenizer.eos_token!r} will do: padding is masked by length, never by its id"
            raise UserError(f"the tokenizer of {section.name} has no {role}: set model.{role} ({hint})")
    return tokenizer


def _load_pretrained(section: ModelSection, config: PreTrainedConfig) -> PreTrainedModel:
    assert section.name is not None
    try:
        model, report = auto_class(config).from_pretrained(
            section.name,
            revision=section.revision,
            dtype=section.dtype,
            trust_remote_code=section.trust_remote_code,
            use_safetensors=True,  # other files of weights are pickles, which may hold code
            output_loading_info=True,
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise UserError(f"cannot load model {section.name}: {_first_sentence(error)}") from error
    head = model.get_output_embeddings()
    missing = {name for name in report["missing_keys"] if model.get_submodule(name.rpartition(".")[0]) is head}
    if head is None or missing:
        raise UserError(f"model {section.name} has no LM head to read as Q-values (missing: {', '.join(missing)})")
    return model


def _sequence_format(model: Any, tokenizer: Any) -> SequenceFormat:
    config, generation = model.config, model.generation_config
    also_ends = generation.eos_token_id
    also_ends = also_ends if isinstance(also_ends, list) else [also_ends]
    eos_ids = dict.fromkeys([tokenizer.eos_token_id, *(i for i in also_ends if i is not None)])
    prefix = None
    if config.is_encoder_decoder:
        start = generation.decoder_start_token_id
        start = config.decoder_start_token_id if start is None else start
        if start is None:
            raise UserError("the seq2seq model's config has no decoder_start_token_id")
        forced = generation.forced_bos_token_id
        # What the tokenizer puts before a target text (BART's <s>, a language code) is given, not chosen.
        opening = [i for i in tokenizer(text_target="").input_ids if i not in eos_ids]
        prefix = (start, *(opening[:1] if forced is None else [forced]))
    context = getattr(config, "max_position_embeddings", None)
    return SequenceFormat(tokenizer.pad_token_id, tuple(eos_ids), prefix, context)


def _plain_generation(layout: SequenceFormat, max_response_tokens: int) -> GenerationConfig:
    """Greedy decoding with the model's own special tokens: sampling and penalties would hide what was learnt."""
    prefix = layout.decoder_prefix or ()
    return GenerationConfig(
        do_sample=False,
        max_new_tokens=max_response_tokens + len(prefix[1:]),
        pad_token_id=layout.pad_id,
        eos_token_id=list(layout.eos_ids),
        decoder_start_token_id=prefix[0] if prefix else None,
        forced_bos_token_id=prefix[1] if len(prefix) > 1 else None,
    )


def add_lora(model: PreTrainedModel, lora: Lora, seed: int, revision: str | None = None) -> Any:
    """The model with a fresh adapter, as a PeftModel, which is saved with the base's revision."""
    from peft import LoraConfig, TaskType, get_peft_model

    task = TaskType.SEQ_2_SEQ_LM if model.config.is_encoder_decoder else TaskType.CAUSAL_LM
    config = LoraConfig(r=lora.rank, lora_alpha=lora.alpha, target_modules=lora.target_modules, task_type=task)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        try:
            return get_peft_model(model, config, revision=revision)
        except ValueError as error:
            raise UserError(f"model.lora: {_first_sentence(error)}") from error


def auto_class(config: PreTrainedConfig) -> Any:
    """The transformers class that loads this kind of model with its LM head."""
    return AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM


def _first_sentence(error: Exception) -> str:
    """transformers writes paragraphs; the first line says what is wrong."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
