"""Rewards against the libraries that define them."""

import random
from collections.abc import Iterator

from rouge_score import rouge_scorer
from sacrebleu.metrics import BLEU

from lmdqn.text import metrics, sentence_scores
from speed.material import pairs
from speed.table import Line, Settings, compare

KINDS = ("rouge1", "rouge2", "rougeL")
BY_LIBRARIES = 1000  # responses, the first of all


def scoring(settings: Settings) -> Iterator[Line]:
    """BLEU and ROUGE-1/2/L of 10,000 responses, 8 to a source of 4 references."""
    responses, references = _responses(settings)
    bleu, rouge = BLEU(effective_order=True), rouge_scorer.RougeScorer(list(KINDS))

    def one_by_one() -> None:
        for response, texts in zip(responses[:BY_LIBRARIES], references, strict=False):
            bleu.sentence_score(response, texts)
            rouge.score_multi(texts, response)

    def all_at_once() -> None:
        metrics.sentence_bleu(responses, references)
        metrics.rouge(responses, references, KINDS)

    def for_the_first_time() -> None:
        for kept in (sentence_scores._words_13a, sentence_scores._words_alphanumeric):
            kept.clear()
        sentence_scores._bleu.cache_clear()
        all_at_once()

    for name, work in (("again", all_at_once), ("new words", for_the_first_time)):
        fast, slow = settings.alternate(
            lambda work=work: len(responses) / settings.seconds(work),  # type: ignore[misc]
            lambda: BY_LIBRARIES / settings.seconds(one_by_one),
        )
        yield compare(f"BLEU + ROUGE-1/2/L, one by one by the libraries; {name}", fast, slow, "responses/s", ">= 20")


def _responses(settings: Settings) -> tuple[list[str], list[list[str]]]:
    """A reference of each source with four of its words replaced, eight times; and all its references."""
    generator = random.Random(0)
    rows = pairs(settings.data, 1250, 4)
    responses, references = [], []
    for row in rows:
        for _ in range(8):
            words = generator.choice(row["references"]).split()
            for _ in range(4):
                others = generator.choice(rows)["references"][0].split()
                words[generator.randrange(len(words))] = generator.choice(others)
            responses.append(" ".join(words))
            references.append(row["references"][:4])
    return responses, references
