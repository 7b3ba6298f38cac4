"""Recipe section `continued`: learning on from a finished run, its replay kept."""

from pydantic import Field

from lmdqn.recipe.section import Place, Section


class ContinuedSection(Section):
    run: Place = Field(
        description="folder of a finished run: its kept model and value head are learnt on, against its reference "
        "policy, with its replay; `lmdqn train RECIPE --continue RUN` sets it"
    )
    episodes: Place | None = Field(
        None,
        description="episodes that join its replay, such as responses that people scored: .jsonl or .parquet, as in "
        "offline.path",
    )
