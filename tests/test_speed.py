"""The speed benchmark's rows for a GPU, on the CPU with tiny models; its other rows are run by hand."""

import subprocess
import sys
from pathlib import Path
from time import perf_counter
from typing import Any

import pytest
import speed
import torch
from accelerate.state import AcceleratorState
from speed.accelerator import MODELS, Shape, flops, updates_on
from speed.against_trainer import Manner
from speed.material import groups_of_random_words, model_of_config
from speed.table import Settings

QWEN = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 48, "tie_word_embeddings": True,
}  # fmt: skip
T5 = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 1, "num_heads": 4, "feed_forward_proj": "gated-gelu"}
SIZES = {"groups": 2, "prompt_tokens": 6, "response_tokens": 4, "micro_batch_tokens": 40}
SETTINGS = Settings(Path("data"), Path("output"), 2, perf_counter, peak_tflops=1.0)


@pytest.mark.parametrize("name", MODELS)
def test_an_update_is_measured_against_a_step(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On both sides in bf16 and in several passes, without torch.compile and with: it only traces here."""
    whole = torch.compile

    def traced(*arguments: Any, **options: Any) -> Any:
        return whole(*arguments, **options | {"backend": "eager"})

    monkeypatch.setattr(torch, "compile", traced)
    shape = Shape(MODELS[name].family, QWEN if MODELS[name].family == "qwen2" else T5, 300, **SIZES)
    lines = list(updates_on("cpu", {"tiny": shape}, SETTINGS))
    torch.compiler.reset()
    AcceleratorState._reset_state(reset_partial_state=True)
    assert [line.what.endswith("torch.compile") for line in lines] == [False, True]
    for line in lines:
        assert len(line.ratios) == 2
        assert min(line.ratios) > 0
        for side in (line.ours, line.theirs):
            assert "tokens/s" in side
            assert side.endswith("% of peak")


def test_operations_by_hand() -> None:
    """A layer of Qwen2: queries and outputs 2 x 32 x 32, keys and values 2 x 32 x 16, and three of 32 x 48."""
    layers, head = 2 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48), 300 * 32
    loaded = model_of_config(["the cat"], "qwen2", QWEN, 300)
    episodes = groups_of_random_words(2, 6, 4)
    ours, theirs = flops(loaded, episodes, Manner(micro_batch_tokens=10**6))
    in_rows = 2 * (6 + 4 * 4)  # a prompt of 6 with four responses, twice; a state after each cut response
    assert ours == 6 * (layers * in_rows + head * 8 * (4 + 1))
    assert theirs == 6 * (layers + head) * 8 * (6 + 4)


def test_without_a_gpu_its_rows_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    command = [sys.executable, str(Path(speed.__file__).parent), "accelerator"]
    ran = subprocess.run(command, capture_output=True, text=True, check=True)
    rows = ran.stdout.splitlines()[2:]
    assert len(rows) == 2 * len(MODELS)
    assert all("not measured: no CUDA device" in row for row in rows)
