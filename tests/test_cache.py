"""The cache with room holds what transformers' own holds."""

import torch
from transformers import DynamicCache, DynamicLayer

from lmdqn.model.cache import ROOM, RoomyLayer, make_room


def test_responses_that_shared_a_row_get_rows_of_their_own() -> None:
    """Two prompts of two tokens, three responses each, told apart by their numbers; the second one's first goes on."""
    prompts = torch.tensor([[10.0, 11.0], [20.0, 21.0]])[:, None, :, None]  # B, heads, L, D
    cache = DynamicCache()
    cache.update(prompts, -prompts, 0)
    make_room(cache)
    for step in range(ROOM + 2):
        new = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])[:, None, :, None] + 100 * step
        cache.update(new, -new, 0)
    cache.layers[0].part(torch.tensor([1, 0, 0]), torch.tensor([0, 0, 2]), prompt=2, width=3)
    new = torch.tensor([7.0, 8.0, 9.0])[:, None, None, None]
    keys, values = cache.update(new, -new, 0)
    steps = [100.0 * step for step in range(ROOM + 2)]
    expected = [[*start, *(first + s for s in steps), last]
                for start, first, last in (((20, 21), 4, 7), ((10, 11), 1, 8), ((10, 11), 3, 9))]  # fmt: skip
    assert keys[:, 0, :, 0].tolist() == expected
    assert torch.equal(values, -keys)


def test_a_roomy_layer_is_the_plain_one_past_its_room() -> None:
    """Rows repeated, kept and reordered between tokens, one at a time and several, until room is made anew twice."""
    generator = torch.Generator().manual_seed(0)
    plain, cache = DynamicCache(), DynamicCache()
    prompt = torch.randn(2, 2, 3, 5, 4, generator=generator)  # keys or values, B, heads, L, D
    for each in (plain, cache):
        each.update(*prompt, 0)
    make_room(cache)
    assert type(plain.layers[0]) is DynamicLayer
    assert type(cache.layers[0]) is RoomyLayer
    rows = 2
    for step in range(2 * ROOM + 3):
        if step == 1:
            rows *= 2
            for each in (plain, cache):
                each.batch_repeat_interleave(2)
        if step in (2, ROOM):
            chosen = torch.tensor([3, 0, 1] if step == 2 else [2, 1, 0])
            rows = len(chosen)
            for each in (plain, cache):
                each.batch_select_indices(chosen)
        new = torch.randn(2, rows, 3, 1 + step % 2, 4, generator=generator)
        for got, expected in zip(cache.update(*new, 0), plain.update(*new, 0), strict=True):
            assert torch.equal(got, expected)
        assert cache.get_seq_length() == plain.get_seq_length()
