"""How each prefix of a response matches the references: what the value head is shown while training.

The reward compares the whole response with the references, so most of what can be known of it in mid-response is
how well the prefix matches them. A critic that sees this (an asymmetric critic, Pinto et al. 2017) explains far more
of the return than one that must guess the references from the source; the policy never sees it.
"""

from collections import Counter
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from lmdqn.episodes import MATCH_FEATURES, Episode

LONGEST_NGRAM = 4
KEPT_REFERENCES = 4096  # sets of references whose n-grams are kept


def measure_matches(episodes: Sequence[Episode]) -> None:
    """Write each episode's `match_features`, one row for every prefix of its response, from empty to whole.

    For a prefix of t tokens and references of m_r tokens with longest common subsequences c_r, the row holds: the
    best of c_r / m_r, of c_r / t and of 2 c_r / (t + m_r); for n = 1 .. 4 the share of the prefix's n-grams found
    in the references (clipped as in BLEU; 1 where it has none); the length of the matching n-gram that ends the
    prefix, over 4; and t over the references' mean length. Episodes without references keep None.
    """
    with_references = [e for e in episodes if e.example.reference_ids]
    if not with_references:
        return
    subsequence = _subsequence_features(with_references)
    for episode, of_lcs in zip(with_references, subsequence, strict=True):
        of_ngrams = torch.tensor(_ngram_features(episode))
        episode.match_features = torch.cat([of_lcs, of_ngrams], dim=1)
        assert episode.match_features.shape[1] == MATCH_FEATURES


def _subsequence_features(episodes: Sequence[Episode]) -> list[Tensor]:
    """For each episode (n + 1, 3): recall, precision and F of the longest common subsequence, best over references."""
    pairs = [(e.response_ids, ids) for e in episodes for ids in e.example.reference_ids]
    responses = pad_sequence([torch.tensor(r) for r, _ in pairs], batch_first=True, padding_value=-1)
    references = pad_sequence([torch.tensor(ids) for _, ids in pairs], batch_first=True, padding_value=-2)
    common = lcs_lengths(responses, references).float()  # (pairs, T + 1)
    lengths = torch.tensor([len(ids) for _, ids in pairs])[:, None]
    t = torch.arange(common.shape[1])[None]
    scores = torch.stack([common / lengths, common / t.clamp(min=1), 2 * common / (t + lengths)], dim=-1)
    by_episode = scores.split([len(e.example.reference_ids) for e in episodes])
    return [s.amax(0)[: len(e.response_ids) + 1] for s, e in zip(by_episode, episodes, strict=True)]


def lcs_lengths(first: Tensor, second: Tensor) -> Tensor:
    """Length of the longest common subsequence of every prefix of `first` with the whole of `second`.

    first (P, T), second (P, M) -> (P, T + 1). Paddings must differ from each other and from all tokens.
    """
    row = torch.zeros(len(second), second.shape[1] + 1, dtype=torch.int64)  # of the prefix with each prefix of second
    lengths = [row[:, -1]]
    for token in first.unbind(1):
        extended = row[:, :-1] + (second == token[:, None])
        row = torch.nn.functional.pad(torch.maximum(row[:, 1:], extended), (1, 0)).cummax(dim=1).values
        lengths.append(row[:, -1])
    return torch.stack(lengths, dim=1)


def _ngram_features(episode: Episode) -> list[list[float]]:
    """(n + 1, 6): clipped precision for n = 1 .. 4, the longest matching ending over 4, and the relative length."""
    references = episode.example.reference_ids
    allowed = _most_in_a_reference(references)
    mean_length = sum(len(ids) for ids in references) / len(references)
    response, matched = episode.response_ids, [0] * LONGEST_NGRAM
    used: Counter[tuple[int, ...]] = Counter()
    rows = [[1.0] * LONGEST_NGRAM + [0.0, 0.0]]
    for t in range(1, len(response) + 1):
        ending = 0
        for n in range(1, min(LONGEST_NGRAM, t) + 1):
            gram = tuple(response[t - n : t])
            if used[gram] < allowed.get(gram, 0):
                used[gram] += 1
                matched[n - 1] += 1
                ending = n
        precision = [m / (t - n) if t > n else 1.0 for n, m in enumerate(matched)]
        rows.append([*precision, ending / LONGEST_NGRAM, t / mean_length])
    return rows


@lru_cache(maxsize=KEPT_REFERENCES)
def _most_in_a_reference(references: tuple[tuple[int, ...], ...]) -> dict[tuple[int, ...], int]:
    """How often each n-gram stands in the reference that has most of it; kept, as prompts come back."""
    most: dict[tuple[int, ...], int] = {}
    for ids in references:
        for gram, count in Counter(_ngrams(ids)).items():
            most[gram] = max(most.get(gram, 0), count)
    return most


def _ngrams(ids: Sequence[int]) -> list[tuple[int, ...]]:
    return [tuple(ids[i : i + n]) for n in range(1, LONGEST_NGRAM + 1) for i in range(len(ids) - n + 1)]
