"""Bootstrap intervals of a system's metrics, and paired significance between systems that answered the same sources.

Corpus BLEU and chrF are resampled by sacrebleu itself; means of sentence scores (reward, ROUGE, length, repetition)
by the same two procedures here. Distinct-2 is no mean and no sum over responses, so neither procedure fits it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from sacrebleu.metrics import BLEU, CHRF
from sacrebleu.significance import PairedTest

from lmdqn.results.evaluate import Evaluation
from lmdqn.text import metrics

BOOTSTRAP_SEED = 12345  # sacrebleu's own default
SIGNIFICANT = 0.05  # p below which a difference is called one
Kind = Literal["bootstrap", "randomisation"]


@dataclass
class Significance:
    """Of each system, by metric, in the unit of the metrics table."""

    interval: dict[str, dict[str, tuple[float, float]]]  # 95 % bootstrap interval
    p_value: dict[str, dict[str, float]]  # two-sided, against the baseline, which itself has none
    tasks: dict[str, "Significance"] = field(default_factory=dict)  # of several tasks, each one's own


def paired_significance(
    systems: Mapping[str, Evaluation],
    baseline: str,
    references: metrics.References,
    samples: int,
    kind: Kind = "bootstrap",
    weights: Mapping[str, float] | None = None,
) -> Significance:
    """Test every system against one of them, on the same examples.

    Bootstrap (Koehn 2004): resample the examples with replacement, the same ones for both systems; p is the share of
    resamples whose difference lies at least as far from the observed one as that lies from zero. Approximate
    randomisation (Riezler & Maxwell 2005): swap the two responses to each example with probability 1/2; p is the
    share of trials with a difference at least as large as the observed one.

    Of several tasks, `weights` are those of their mean: each task's examples are resampled among themselves, and
    the mean has no test for BLEU and chrF, which are no means over responses; each task by itself has all of it.
    """
    result = Significance({name: {} for name in systems}, {name: {} for name in systems if name != baseline})
    generator = np.random.default_rng(BOOTSTRAP_SEED)
    count = len(references)
    weights = weights if weights and systems[baseline].tasks else {}
    sizes = [len(systems[baseline].tasks[task].responses) for task in weights] or [count]
    ends = np.cumsum(sizes)
    shares = np.array(list(weights.values()) or [1.0])
    shares /= shares.sum()

    def mean(scores: np.ndarray) -> np.ndarray:
        """Over examples, and then over the tasks by their weights: (..., count) -> (...)."""
        spans = zip(shares, ends, sizes, strict=True)
        return np.sum([share * scores[..., end - size : end].mean(axis=-1) for share, end, size in spans], axis=0)

    drawn = [generator.integers(end - size, end, size=(samples, size)) for end, size in zip(ends, sizes, strict=True)]
    resamples = np.concatenate(drawn, axis=1)  # (samples, count)
    signs = generator.choice([-1.0, 1.0], size=(samples, count)) if kind == "randomisation" else None
    for name, system in systems.items():
        for metric, scores in system.per_response.items():
            scaled = in_table_unit(metric, scores)
            low, high = np.percentile(mean(scaled[resamples]), [2.5, 97.5])
            result.interval[name][metric] = float(low), float(high)
            if name != baseline and metric in systems[baseline].per_response:
                gains = scaled - in_table_unit(metric, systems[baseline].per_response[metric])
                by_chance = mean(gains * signs) if signs is not None else mean(gains[resamples])
                if signs is None:
                    by_chance -= by_chance.mean()
                result.p_value[name][metric] = _p_value(by_chance, float(mean(gains)))
    for task, end, size in zip(weights, ends, sizes, strict=False):
        own = {name: system.tasks[task] for name, system in systems.items()}
        result.tasks[task] = paired_significance(own, baseline, references[end - size : end], samples, kind)
    if all(references) and not weights:
        _add_corpus_metrics(result, systems, baseline, references, samples, kind)
    return result


def in_table_unit(metric: str, per_response: Sequence[float]) -> np.ndarray:
    """Sentence scores as the metrics table counts them: words for the length, 0 to 100 for all else."""
    return np.asarray(per_response, dtype=float) * (1 if metric == "length_words" else 100)


def _p_value(by_chance: np.ndarray, observed: float) -> float:
    extreme = np.abs(by_chance) >= abs(observed) - 1e-12
    return float((extreme.sum() + 1) / (len(by_chance) + 1))


def _add_corpus_metrics(
    result: Significance,
    systems: Mapping[str, Evaluation],
    baseline: str,
    references: metrics.References,
    samples: int,
    kind: Kind,
) -> None:
    """BLEU and chrF by sacrebleu's own resampling; its interval is the mean over resamples, plus and minus."""
    streams = metrics.reference_streams(references)
    test = PairedTest(
        [(name, systems[name].responses) for name in [baseline, *result.p_value]],
        {"BLEU": BLEU(references=streams), "chrF2": CHRF(references=streams)},
        references=None,
        test_type="bs" if kind == "bootstrap" else "ar",
        n_samples=samples,
        n_ar_confidence=samples,
    )
    _, table = test()
    for metric, column in (("bleu", "BLEU"), ("chrf", "chrF2")):
        for name, scores in zip([baseline, *result.p_value], table[column], strict=True):
            result.interval[name][metric] = float(scores.mean - scores.ci), float(scores.mean + scores.ci)
            if name != baseline:
                # of equal responses sacrebleu would say that no resample differs more: p = 1 / (samples + 1)
                same = systems[name].responses == systems[baseline].responses
                result.p_value[name][metric] = 1.0 if same else float(scores.p_value)
