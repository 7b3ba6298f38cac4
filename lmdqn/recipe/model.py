"""Recipe section `model`: what is fine-tuned."""

from typing import Any, Literal, Self

from pydantic import Field, model_validator

from lmdqn.recipe.section import HubName, Section


class FromScratch(Section):
    family: str = Field("gpt2", description="transformers model type: gpt2, llama, qwen2, t5, bart, ...")
    config: dict[str, Any] = Field(
        default_factory=dict, description="fields of that family's config, such as n_layer and n_embd"
    )
    vocabulary_size: int = Field(1500, ge=300, description="tokens of the byte-level BPE trained on the data")


class Lora(Section):
    rank: int = Field(16, ge=1, description="rank of the update matrices")
    alpha: float = Field(32, gt=0, description="the update is scaled by alpha / rank")
    target_modules: str | list[str] = Field(
        "all-linear", description="modules to adapt: PEFT's 'all-linear', one name, or a list of names"
    )


class ModelSection(Section):
    name: HubName | None = Field(None, description="hub name or local folder of a pretrained model")
    from_scratch: FromScratch | None = Field(
        None, description="build a small model and its tokenizer from the data instead of loading one"
    )
    architecture: Literal["auto", "causal", "seq2seq"] = Field(
        "auto", description="auto reads it from the model's config"
    )
    revision: str | None = Field(None, description="branch, tag or commit on the hub")
    dtype: Literal["float32", "bfloat16", "float16", "auto"] = Field(
        "float32", description="type the weights are held in"
    )
    lora: Lora | None = Field(None, description="train a LoRA adapter instead of all weights")
    pad_token: str | None = Field(None, description="pad token, for a tokenizer that has none")
    eos_token: str | None = Field(None, description="end token, for a tokenizer that has none")
    trust_remote_code: bool = Field(False, description="run Python code that comes with the model")

    @model_validator(mode="after")
    def _one_origin(self) -> Self:
        if (self.name is None) == (self.from_scratch is None):
            raise ValueError("model needs exactly one of model.name and model.from_scratch")
        if self.from_scratch is not None and self.lora is not None:
            raise ValueError("model.lora adapts pretrained weights: drop it, or replace from_scratch by model.name")
        return self
