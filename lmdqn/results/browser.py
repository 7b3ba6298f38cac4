"""The browser of responses in a page: every system's response to each test source, scored, to sort and to search."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from lmdqn.results.evaluate import Evaluation

MOST_CHARACTERS = 3_000_000  # as much text as a page takes in
SCORES = {"reward": "reward", "rougeL": "ROUGE-L", "sentence_bleu": "sentence BLEU", "length_words": "length (words)"}


def browser_content(
    lines: Sequence[Mapping[str, Any]],
    systems: Mapping[str, Evaluation],
    labels: Mapping[str, tuple[str, str]],
    before: str,
    after: str,
) -> dict[str, Any]:
    """What `browser.html.j2` shows: gains are those of `after` over `before`.

    `lines` hold source and references; `labels` give each system's name and ink, in the order of display. Where there
    is more text than a page takes in, every k-th line is kept.
    """
    size = sum(len(line["source"]) for line in lines) + sum(len(r) for s in systems.values() for r in s.responses)
    kept = range(0, len(lines), math.ceil(size / MOST_CHARACTERS) or 1)
    scores = {key: title for key, title in SCORES.items() if all(key in s.per_response for s in systems.values())}
    samples = [
        {
            "number": i + 1,
            "task": lines[i].get("task", ""),
            "source": lines[i]["source"],
            "references": lines[i]["references"],
            "responses": [systems[name].responses[i] for name in labels],
            "scores": {key: [systems[name].per_response[key][i] for name in labels] for key in scores},
        }
        for i in kept
    ]
    order = list(labels)
    return {
        "shown": str(len(lines)) if len(kept) == len(lines) else f"{len(kept)} of {len(lines)}, evenly spaced",
        "scores": scores,
        "before": labels[before][0],
        "after": labels[after][0],
        "data": {
            "labels": [{"name": name, "ink": ink} for name, ink in labels.values()],
            "before": order.index(before),
            "after": order.index(after),
            "samples": samples,
        },
    }
