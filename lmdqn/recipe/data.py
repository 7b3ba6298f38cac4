"""Recipe section `data`: what is learnt from and measured on."""

from typing import Literal, Self

from pydantic import Field, model_validator

from lmdqn.recipe.section import Place, Section


class Splits(Section):
    train: str = Field("train", description="name of the training split")
    validation: str = Field("validation", description="name of the validation split")
    test: str = Field("test", description="name of the test split")


class Limits(Section):
    train: int | None = Field(None, ge=1, description="first n training examples, after a seeded shuffle")
    validation: int | None = Field(300, ge=1, description="first n validation examples, after a seeded shuffle")
    test: int | None = Field(None, ge=1, description="first n test examples, in file order")


class Conversation(Section):
    column: str = Field("dialog", description="column that holds a whole conversation, a list of turns")
    history: int = Field(4, ge=1, description="turns of context before the reply that is learnt")


class DataSection(Section):
    path: Place | None = Field(
        None, description="folder of {train,validation,test}.{jsonl,csv,parquet}, or a folder saved by datasets"
    )
    hub: str | None = Field(None, description="data set name on the Hugging Face hub")
    hub_config: str | None = Field(None, description="the hub data set's configuration")
    hub_revision: str | None = Field(
        None, description="its branch or commit; refs/convert/parquet serves sets that were made by a script"
    )
    splits: Splits = Field(default_factory=Splits, description="what the three splits are called")
    source: str = Field("source", description="column of the source: text, or a list of turns or messages")
    references: str | None = Field(
        "references", description="column of the reference or list of references; a dot reaches into a record"
    )
    conversation: Conversation | None = Field(
        None, description="learn every reply of whole conversations instead of source and references"
    )
    merge_references: bool = Field(True, description="rows of equal prompt become one example")
    prompt: str | None = Field(
        None,
        description="template over the columns, such as 'summarize: {source}'; default: the source, which for a "
        "causal model without chat ends in a line break",
    )
    chat: bool = Field(False, description="wrap the prompt in the tokenizer's chat template")
    system: str | None = Field(None, description="system message, with chat")
    max_prompt_tokens: int | None = Field(
        None, ge=1, description="longer prompts are cut inside the source, and the cut is reported"
    )
    cut: Literal["end", "start"] = Field(
        "end", description="which end of a long source is cut: end for documents, start for dialogues"
    )
    max_response_tokens: int = Field(64, ge=1, description="longest response, its EOS included")
    limits: Limits = Field(default_factory=Limits, description="how many examples of each split are used")

    @model_validator(mode="after")
    def _one_origin(self) -> Self:
        if self.path is not None and self.hub is not None:
            raise ValueError("data needs only one of data.path and data.hub")
        if self.system is not None and not self.chat:
            raise ValueError("data.system is part of a chat template: set data.chat=true")
        return self
