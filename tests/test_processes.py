"""Several processes on the CPU, started as a person would: they do what one does, none hangs, one may die."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from accelerate import Accelerator
from accelerate.commands.config.config_args import load_config_from_file
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import lmdqn
from lmdqn import preparation
from lmdqn.episodes import Episode
from lmdqn.errors import UserError
from lmdqn.learn import launch as launch_module
from lmdqn.learn.checkpoint import read_state
from lmdqn.learn.launch import sharding_of_launch
from lmdqn.learn.processes import Processes, deal
from lmdqn.recipe import load_recipe
from lmdqn.results.tracking import Tracker
from lmdqn.shipped import shipped_folder
from tests import several_runs
from tests.runs import contents, write_splits

WORDS = ("one", "two", "three", "four", "five", "six", "seven", "eight")
GPT2 = {
    "family": "gpt2",
    "vocabulary_size": 300,
    "config": {"n_layer": 2, "n_embd": 16, "n_head": 2, "n_positions": 64}
    | {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
}
T5 = {
    "family": "t5",
    "vocabulary_size": 300,
    "config": {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2, "dropout_rate": 0.0},
}
Changes = dict[str, dict[str, Any]]
KINDS: dict[str, Changes] = {
    "causal": {},
    "lora": {"model": {"name": "BASE", "from_scratch": None, "lora": {"rank": 2}}},
    "seq2seq": {"model": {"from_scratch": T5}},
    "offline": {
        "offline": {"path": "LOG", "rounds": 1, "steps_per_round": 2},
        "replay": {"sampling": "prioritised", "batch_groups": 4},
        "qlearning": {"baseline": "running"},
    },
    # micro-batches of one group, logits in chunks of few states, hard copies, a reference that moves
    "in pieces": {
        "optimisation": {"micro_batch_tokens": 1, "vocabulary_chunk_mib": 0.01},
        "qlearning": {"target_polyak": None, "target_copy_every": 3, "reference_reset_every": 2, "backup": "double"},
        "output": {"checkpoint_every_steps": 1, "keep_checkpoints": 9},
    },
    # a rollout waits in every checkpoint, and now and then its scoring fails in one process or both
    "overlap": {
        "rollout": {"overlap_scoring": True},
        "reward": {"mix": {"REWARD:now_and_then": 1}},
        "qlearning": {"max_steps": 6, "reference_reset_every": 2},
    },
    # now and then a gradient is not finite, in one process or both
    "skips": {"reward": {"mix": {"REWARD:score": 1}}, "qlearning": {"max_steps": 6}, "replay": {"fresh_share": 1.0}},
}
STOPPED = ("causal", "lora", "seq2seq", "offline", "overlap")
REWARD = """
def score(responses, references, sources):
    return [1e300 * len(r) if "three" in s else len(set(r)) / 9 for r, s in zip(responses, sources)]

def now_and_then(responses, references, sources):
    return [float("nan") if r.startswith("it is f") else len(set(r)) / 9 for r in responses]
"""
needs_deepspeed = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed: pip install 'lmdqn[deepspeed]'"
)


def write_run(folder: Path, changes: Changes | None = None) -> Path:
    """A recipe of seconds without dropout, and its data."""
    write_splits(folder, [{"source": f"say {w}", "references": [f"it is {w}", f"we say {w}"]} for w in WORDS])
    tree: dict[str, Any] = {
        "seed": 3,
        "model": {"from_scratch": GPT2},
        "data": {"path": str(folder), "max_response_tokens": 24},
        "warm_start": {"epochs": 12, "batch_examples": 4, "learning_rate": 1e-2},
        "rollout": {"prompts": 5, "samples": 2, "temperature": 0.7},
        "replay": {"batch_groups": 5, "fresh_share": 0.5, "demonstrations": 1},
        "qlearning": {"max_steps": 4, "huber_delta": 10.0, "value_learning_rate": 9e-4},
        "optimisation": {"learning_rate": 3e-4},  # low, as steps make rounding errors larger
        "evaluation": {"every_steps": 2, "bootstrap_samples": 100},
        "output": {"dir": str(folder / "run"), "log_every_steps": 1},
    }
    for section, values in (changes or {}).items():
        tree[section] = {**tree.get(section, {}), **values}
    recipe = folder / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(tree), encoding="utf-8")
    return recipe


def launch(processes: int, *command: str, config: str = "one_node") -> subprocess.Popen[str]:
    """`accelerate launch` as the README has it, on CPUs."""
    accelerate = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--config_file"]
    accelerate += [str(shipped_folder("recipes") / "accelerate" / f"{config}.yaml"), f"--num_processes={processes}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    return subprocess.Popen(
        [*accelerate, "--main_process_port=0", "-m", *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        start_new_session=True,
    )


def finish(processes: subprocess.Popen[str]) -> tuple[str, str]:
    """What they told on their two streams, when they have ended well."""
    with processes:
        told, complaints = processes.communicate(timeout=300)
    assert processes.returncode == 0, complaints
    return told, complaints


class Runs:
    """Runs of every kind in a folder, and what one process alone does."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._alone: set[str] = set()
        rows = [
            {"prompt": f"say {w}\n", "response": r, "reward": len(r) / 20 + k}
            for w in WORDS[:6]
            for k, r in enumerate((f"it is {w}", "we", f"{w} {w}"))
        ]
        (folder / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        (folder / "reward.py").write_text(REWARD, encoding="utf-8")

    def write(self, where: str, kind: str) -> Path:
        """A recipe of this kind."""
        files = {"BASE": "alone/causal/run/model", "LOG": "log.jsonl", "REWARD": "reward.py"}
        text = json.dumps(KINDS[kind])
        for word, file in files.items():
            text = text.replace(word, str(self.folder / file))
        changes = json.loads(text)
        return write_run(self.folder / where / kind, changes)

    def alone(self, kind: str) -> Path:
        """The folder of a run of this kind by one process."""
        if kind not in self._alone:
            if kind == "lora":
                self.alone("causal")
            several_runs.train([str(self.write("alone", kind))])
            self._alone.add(kind)
        return self.folder / "alone" / kind / "run"


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(tmp_path_factory.mktemp("runs"))


def metrics(run: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [{k: v for k, v in line.items() if k not in ("seconds", "episodes_per_s")} for line in lines]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    (file,) = folder.glob("*model.safetensors")
    return load_file(file)


def assert_close(one: Path, other: Path) -> None:
    """The same episodes and responses, and numbers to within rounding (1e-4).

    One process has all prompts and episodes: a number of the first process's share alone would differ.
    """
    first, second = metrics(one), metrics(other)
    assert len(first) == len(second)
    for line, again in zip(first, second, strict=True):
        assert line.pop("phase") == again.pop("phase")
        assert line == pytest.approx(again, rel=2e-3, abs=1e-4)
    for folder in ("model", "last"):
        others = weights(other / folder)
        for name, weight in weights(one / folder).items():
            torch.testing.assert_close(weight, others[name], atol=1e-4, rtol=0)
    assert replay(one) == replay(other)
    assert (one / "predictions.jsonl").read_bytes() == (other / "predictions.jsonl").read_bytes()


def replay(run: Path) -> list[tuple[int, str]]:
    """Group and text of each episode in the last checkpoint."""
    return [(episode.group, episode.text) for episode in held(run)]


def held(run: Path) -> list[Episode]:
    """The episodes in the last checkpoint's replay."""
    return read_state(run / "checkpoints" / "last")["learner"]["replay"]["episodes"]


def longest(run: Path, prompts: int, processes: int) -> list[list[int]]:
    """Of each rollout in the last checkpoint, the tokens of each process's longest response."""
    found: dict[int, list[int]] = {}
    for episode in held(run):
        rollout, place = divmod(episode.group, prompts)
        of_process = found.setdefault(rollout, [0] * processes)
        of_process[place % processes] = max(of_process[place % processes], len(episode.response_ids))
    return list(found.values())


@pytest.fixture(scope="module")
def in_two(runs: Runs) -> Path:
    """What two processes did: `straight` of every kind, and `stopped` at the second step and begun again."""
    runs.alone("causal")
    straight = [str(runs.write("straight", kind)) for kind in KINDS]
    stopped = [f"{runs.write('stopped', kind)}@2" for kind in STOPPED]
    told, _ = finish(launch(2, "tests.several_runs", *straight, *stopped))
    assert told.count("was stopped") == 2 * len(STOPPED)
    return runs.folder


def test_kinds_of_runs_in_two_processes(runs: Runs, in_two: Path) -> None:
    """LoRA, seq2seq, a log, small pieces.

    Five prompts between two: shares differ in size, and responses in length, for which nobody waits.
    """
    for kind in KINDS:
        assert_close(runs.alone(kind), in_two / "straight" / kind / "run")
    assert_the_target_moves_by_copies(in_two / "straight" / "in pieces" / "run")
    for kind in ("overlap", "skips"):
        assert_some_steps_are_skipped(in_two / "straight" / kind / "run")
    run = in_two / "straight" / "causal" / "run"
    assert len(replay(run)) == 4 * 5 * (2 + 1)
    assert any(one != other for one, other in longest(run, prompts=5, processes=2))


def test_two_processes_go_on_bit_for_bit(in_two: Path) -> None:
    """A run that was stopped and went on is to the bit that of two processes that never stopped."""
    for kind in STOPPED:
        one, other = (contents(in_two / which / kind / "run") for which in ("straight", "stopped"))
        for name, content in one.items():
            if not name.startswith("checkpoints"):  # the stop made one more
                assert content == other[name], (kind, name)


def test_four_processes_do_what_one_does(runs: Runs) -> None:
    recipe = runs.write("four", "causal")
    finish(launch(4, "tests.several_runs", str(recipe)))
    assert_close(runs.alone("causal"), recipe.parent / "run")


@pytest.mark.parametrize(
    ("config", "by"),
    [
        ("fsdp2", "FSDP2"),
        pytest.param("zero2", "DeepSpeed ZeRO-2", marks=needs_deepspeed),
        pytest.param("zero3", "DeepSpeed ZeRO-3", marks=needs_deepspeed),
    ],
)
def test_shards_do_what_one_process_does(config: str, by: str, runs: Runs) -> None:
    """Full and seq2seq models, a log, small pieces (of which one process has more), skipped steps, a stop."""
    kinds = [kind for kind in KINDS if kind != "lora"]
    recipes = {kind: runs.write(config, kind) for kind in kinds}
    words = [f"{recipe}@2" if kind == "causal" else str(recipe) for kind, recipe in recipes.items()]
    told, complaints = finish(launch(2, "tests.several_runs", *words, config=config))
    assert "was stopped" in told
    assert " ".join(complaints.split()).count(f"shared out over the processes ({by})") == len(kinds) + 1  # one went on
    for kind, recipe in recipes.items():
        assert_close(runs.alone(kind), recipe.parent / "run")
    assert_the_target_moves_by_copies(recipes["in pieces"].parent / "run")
    assert_some_steps_are_skipped(recipes["skips"].parent / "run")
    logits = []
    for folder in (runs.alone("causal"), recipes["causal"].parent / "run"):
        model = AutoModelForCausalLM.from_pretrained(folder / "model")
        given = AutoTokenizer.from_pretrained(folder / "model")("say one", return_tensors="pt").input_ids
        logits.append(model(input_ids=given).logits)
    torch.testing.assert_close(*logits, atol=1e-3, rtol=0)


def assert_some_steps_are_skipped(run: Path) -> None:
    steps = [line for line in metrics(run) if line["phase"] == "dqn" and line["step"]]
    assert 0 < steps[-1]["skipped_updates"] < len(steps)


def assert_the_target_moves_by_copies(run: Path) -> None:
    """Every third update: it stays as it began, to the bit, then is the online network."""

    def learnt(name: str, role: str) -> bool:
        """A weight; but what is usual is told to all value heads at once."""
        return f"/networks/{role}/" in name and not name.endswith(("feature_mean", "feature_rate", "scale"))

    networks = [
        {role: {n: t for n, t in tensors.items() if learnt(n, role)} for role in ("online", "target")}
        for tensors in (load_file(run / "checkpoints" / f"dqn-{step:06d}" / "tensors.safetensors") for step in range(5))
    ]

    def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> list[bool]:
        return [torch.equal(a, b) for a, b in zip(one.values(), other.values(), strict=True)]

    start, last = networks[0]["target"], networks[4]["target"]
    assert len(start) > 10
    assert all(same(networks[2]["target"], start))
    assert not any(same(networks[2]["online"], start))
    assert all(same(networks[3]["target"], networks[3]["online"]))
    assert all(same(last, networks[3]["target"]))


def test_groups_are_dealt_evenly_and_mostly_to_who_has_them() -> None:
    assert deal([3, 1, 2], 1) == [[3, 1, 2]]
    assert deal([4, 5, 6, 7], 2) == [[4, 6], [5, 7]]
    assert deal([0, 2, 4, 6, 7], 2) == [[0, 2, 4], [7, 6]]
    assert deal([0], 3) == [[0], [], []]


def test_a_killed_process_ends_the_others_and_the_run_goes_on(tmp_path: Path) -> None:
    """From the command line. The other ends within a minute and says why; its checkpoint goes on under FSDP2."""
    slow = tmp_path / "slow.py"
    slow.write_text(
        "import time\n\ndef score(responses, references, sources):\n"
        "    time.sleep(0.1)\n    return [len(set(r)) for r in responses]\n"
    )
    changes: Changes = {"reward": {"mix": {f"{slow}:score": 1}}, "output": {"checkpoint_every_steps": 1}}
    straight, killed = write_run(tmp_path / "straight", changes), write_run(tmp_path / "killed", changes)
    with launch(2, "lmdqn", "train", str(killed)) as processes:
        while not (killed.parent / "run" / "checkpoints" / "dqn-000001").exists():
            assert processes.poll() is None, processes.communicate()
            time.sleep(0.01)
        victim = _workers(processes.pid)[-1]
        os.kill(victim, signal.SIGKILL)
        _, told = processes.communicate(timeout=60)  # gloo alone would wait for half an hour
    assert processes.returncode != 0
    assert "learning in 2 processes" in told
    assert "another process of this run has ended" in told
    told, _ = finish(launch(2, "lmdqn", "train", str(killed), "--resume", config="fsdp2"))
    assert told.count("predictions.jsonl") == 1  # one of them speaks
    several_runs.train([str(straight)])
    assert_close(straight.parent / "run", killed.parent / "run")


def _workers(parent: int) -> list[int]:
    """The processes that a launcher started."""
    found = subprocess.run(["ps", "-o", "pid=", "--ppid", str(parent)], capture_output=True, text=True).stdout
    return [int(pid) for pid in found.split()]


def test_a_share_for_each_process(tmp_path: Path) -> None:
    recipe = load_recipe(write_run(tmp_path / "few", {"rollout": {"prompts": 1}}))
    processes = Processes(Accelerator(cpu=True))
    processes.count = 2
    with pytest.raises(UserError, match=r"rollout\.prompts=1 is too few for 2 processes"):
        preparation._prepare_alone(recipe, Tracker(), False, processes, torch.device("cpu"))
    assert not (tmp_path / "few" / "run").exists()


# --- what a launcher may ask for ------------------------------------------------------------------------------------

FSDP2 = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
ZERO3 = {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"}
REFUSED = {
    "zero_stage to 2 or 3": {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "1"},
    "offload_param_device is not supported": ZERO3 | {"ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE": "cpu"},
    "gradient_clipping is not supported": ZERO3 | {"ACCELERATE_GRADIENT_CLIPPING": "1.0"},
    "Megatron-LM is not supported": {"ACCELERATE_USE_MEGATRON_LM": "true"},
    "leave gradient_accumulation_steps at 1": {"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4"},
    "set fsdp_version: 2": {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "1"},
    "fsdp_cpu_ram_efficient_loading is not supported": {"FSDP_CPU_RAM_EFFICIENT_LOADING": "true"},
    "fsdp_offload_params is not supported": {"FSDP_OFFLOAD_PARAMS": "true"},
    "parallelism_config is not supported": {"ACCELERATE_USE_PARALLELISM_CONFIG": "true"},
}


@pytest.mark.parametrize("sentence", REFUSED)
def test_what_the_launcher_asks_for_and_is_not_there_is_refused(
    sentence: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before anything is loaded, and not silently left out."""
    recipe = load_recipe(write_run(tmp_path / "refused"))
    assert sharding_of_launch(recipe) is None
    asked = FSDP2 if "fsdp_" in sentence or "para" in sentence else {}
    for variable, value in (asked | REFUSED[sentence]).items():
        monkeypatch.setenv(variable, value)
    with pytest.raises(UserError, match=sentence):
        lmdqn.train(recipe)


LORA: Changes = {"model": {"name": "any", "from_scratch": None, "lora": {}}}


@pytest.mark.parametrize(
    ("launcher", "changes", "sentence"),
    [
        (FSDP2, LORA, r"FSDP2 with model\.lora"),
        (FSDP2, {"optimisation": {"mixed_precision": "fp16"}}, r"FSDP2 with optimisation\.mixed_precision=fp16"),
        (FSDP2, {"optimisation": {"torch_compile": True}}, r"FSDP2 with optimisation\.torch_compile is not"),
        (ZERO3, {"optimisation": {"gradient_checkpointing": True}}, r"optimisation\.gradient_checkpointing is not"),
        (ZERO3, LORA, r"DeepSpeed ZeRO-3 with model\.lora"),
        (ZERO3, {"optimisation": {"mixed_precision": "bf16"}}, r"ZeRO-3 with optimisation\.mixed_precision=bf16"),
    ],
)
def test_recipes_that_shards_cannot_run_are_refused(
    launcher: dict[str, str], changes: Changes, sentence: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = load_recipe(write_run(tmp_path / "refused", changes))
    monkeypatch.setattr(launch_module, "find_spec", lambda name: True)
    for variable, value in launcher.items():
        monkeypatch.setenv(variable, value)
    with pytest.raises(UserError, match=sentence):
        lmdqn.train(recipe)


def test_deepspeed_that_is_not_installed_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = load_recipe(write_run(tmp_path / "refused"))
    monkeypatch.setattr(launch_module, "find_spec", lambda name: None)
    for variable, value in ZERO3.items():
        monkeypatch.setenv(variable, value)
    with pytest.raises(UserError, match=r"pip install 'lmdqn\[deepspeed\]'"):
        lmdqn.train(recipe)


def test_shipped_accelerate_configs_are_what_they_say() -> None:
    """Each has its exact command in its header, and what accelerate reads is one machine's or two machines' share."""
    for file in (shipped_folder("recipes") / "accelerate").glob("*.yaml"):
        text = file.read_text(encoding="utf-8")
        config = load_config_from_file(str(file))
        assert f"accelerate launch --config_file recipes/accelerate/{file.name}" in text
        assert config.num_machines == (2 if file.stem.startswith("two_nodes") else 1)
        assert (config.distributed_type == "FSDP") == ("fsdp2" in file.stem)
        assert (config.distributed_type == "DEEPSPEED") == ("zero" in file.stem)
        stage = config.deepspeed_config.get("zero_stage")
        assert stage == (int(file.stem[-1]) if "zero" in file.stem else None)
        assert config.fsdp_config.get("fsdp_version") == (2 if "fsdp2" in file.stem else None)
