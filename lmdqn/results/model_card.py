"""The model card of a published run: metadata for the hub, a page for people; no local path enters it."""

import json
import os
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from lmdqn.recipe import DataSection, QLearningSection, Recipe, TaskSection
from lmdqn.results.tables import COLUMNS, PHASES, p_value_line

METRIC_TYPES = {  # the hub's names
    "bleu": "bleu",
    "rouge1": "rouge",
    "rouge2": "rouge",
    "rougeL": "rouge",
    "rougeLsum": "rouge",
    "chrf": "chrf",
}

Q_FORMS = {
    "dueling": "Q(s, a) = V(s) + beta log(pi(a|s) / pi_0(a|s)),      pi = softmax of the LM head's logits",
    "calibrated": "Q(s, a) = beta (f(a|s) - f_0(a|s)),      f the LM head's logits, f_0 those of the reference pi_0",
    "classic": "Q(s, a) = the LM head's logit of a in s",
}
NEXT_VALUES = {
    "soft": "beta log sum_a pi_0(a|s) exp(Qbar(s, a) / beta)",
    "soft_double": "the soft value of Qbar less beta times the KL of the online policy to the target's",
    "hard": "max_a Qbar(s, a)",
    "double": "Qbar(s, argmax_a Q(s, a))",
    "expected": "the mean of Qbar(s, a) under the behaviour policy",
}


@dataclass(frozen=True)
class Published:
    """What is published, and where."""

    repository: str
    revision: str
    is_adapter: bool
    is_seq2seq: bool


def model_card(recipe: Recipe, results: Mapping[str, Any], examples: int, published: Published) -> ModelCard:
    """The card of a finished run; `results` is its `results.json`, measured on `examples` test examples."""
    sections = {
        f"# {published.repository.partition('/')[2]}": _opening(recipe, published),
        "## How to load": f"```python\n{snippet(recipe, published)}```",
        "## Results": _results(recipe, results, examples),
        "## Data": _data(recipe),
        "## Method": _method(recipe),
        "## Intended use": "Responses to inputs like those of the training data, prompted as above and decoded "
        "greedily, which is what the saved generation config does and the table measures. Nothing else was evaluated.",
        "## Limits": _limits(recipe, results, examples),
        "## Recipe": _how_it_was_run(recipe, results),
    }
    page = "\n\n".join(f"{heading}\n\n{text}" for heading, text in sections.items())
    return ModelCard(f"---\n{_metadata(recipe, results, published).to_yaml()}\n---\n\n{page}\n")


def snippet(recipe: Recipe, published: Published) -> str:
    """Python that loads the published model and answers one source, as `lmdqn generate` would."""
    code = ", trust_remote_code=True" if recipe.model.trust_remote_code else ""
    auto = f"AutoModelFor{'Seq2SeqLM' if published.is_seq2seq else 'CausalLM'}"
    where = "repository" if published.revision == "main" else f'repository, revision="{published.revision}"'
    loading = [f"from transformers import {auto}, AutoTokenizer", f"model = {auto}.from_pretrained({where}{code})"]
    generating = "model.generate(**inputs)"
    if published.is_adapter:
        loading = [
            f"from peft import AutoPeftModelFor{auto.removeprefix('AutoModelFor')}\n"
            "from transformers import AutoTokenizer, GenerationConfig",
            f"model = AutoPeftModelFor{auto.removeprefix('AutoModelFor')}.from_pretrained({where}{code})",
        ]
        generating = f"model.generate(**inputs, generation_config=GenerationConfig.from_pretrained({where}))"
    answer = "output" if published.is_seq2seq else 'output[inputs["input_ids"].shape[1] :]'
    return f"""{loading[0]}

repository = "{published.repository}"
tokenizer = AutoTokenizer.from_pretrained({where}{code})
{loading[1]}

{_prompting(recipe, published)}
output = {generating}[0]
print(tokenizer.decode({answer}, skip_special_tokens=True).strip())
"""


def public_recipe(recipe: Recipe) -> str:
    """The resolved recipe as YAML in which folders and files stand by their last name alone."""
    tree = recipe.model_dump(mode="json")
    tasks = list((tree["tasks"] or {"": tree}).values())
    places = [(task["data"], "path") for task in tasks]
    places += [(tree["output"], "dir"), (tree["offline"], "path"), (tree["continued"], "run")]
    places += [(tree["continued"], "episodes")]
    if is_local(recipe.model.name or ""):
        places.append((tree["model"], "name"))
    for section, key in places:
        if section is not None and section[key] is not None:
            section[key] = PurePath(section[key]).name
    for task in tasks:
        task["reward"]["mix"] = _public_mix(task["reward"]["mix"])
    return yaml.safe_dump(tree, sort_keys=False, allow_unicode=True)


def is_local(name: str) -> bool:
    """Whether a name is a place on this machine rather than one on the hub."""
    return Path(name).is_absolute() or name.startswith(".") or os.path.exists(name)


def _public_mix(mix: Mapping[str, float]) -> dict[str, float]:
    """Terms of one's own, file.py:function, without the file's folder."""
    return {PurePath(term).name if ".py:" in term else term: weight for term, weight in mix.items()}


def _metadata(recipe: Recipe, results: Mapping[str, Any], published: Published) -> ModelCardData:
    base, tasks = recipe.model.name, recipe.every_task
    measured = [
        EvalResult(
            task_type="text-generation",
            dataset_type=task.data.hub or set_name(task.data),
            dataset_name=set_name(task.data),
            dataset_config=task.data.hub_config,
            dataset_split=task.data.splits.test,
            metric_type=METRIC_TYPES[metric],
            metric_value=round(value, 2),
            metric_name=COLUMNS[metric],
        )
        for name, task in tasks.items()
        for metric, value in (results["tasks"][name] if name else results)["test"]["dqn"].items()
        if metric in METRIC_TYPES
    ]
    hubs = [task.data.hub for task in tasks.values() if task.data.hub is not None]
    return ModelCardData(
        base_model=base if base is not None and not is_local(base) else None,
        datasets=list(dict.fromkeys(hubs)) or None,
        library_name="peft" if published.is_adapter else "transformers",
        pipeline_tag="text-generation",
        tags=["lmdqn", "dqn", "reinforcement-learning"],
        metrics=sorted({result.metric_type for result in measured}) or None,
        model_name=published.repository.partition("/")[2],
        eval_results=measured or None,
    )


def _opening(recipe: Recipe, published: Published) -> str:
    if recipe.model.from_scratch is not None:
        base = f"A small {recipe.model.from_scratch.family} model, built from scratch"
    elif is_local(recipe.model.name or ""):
        base = f"The model `{PurePath(recipe.model.name or '').name}` (a local folder)"
    else:
        base = f"[{recipe.model.name}](https://huggingface.co/{recipe.model.name})"
    kind = "a LoRA adapter" if published.is_adapter else "all weights"
    if recipe.model.lora is not None and not published.is_adapter:
        kind = "a LoRA adapter, merged into the weights"
    how = "fine-tuned by token-level DQN"
    if recipe.continued is not None:
        how = f"{how} on from an earlier run"
    if recipe.warm_start is not None:
        how = f"first trained by likelihood on the references, then {how}"
    return f"{base}, {how} ({kind}). The LM head is the Q-function, the reward is {_reward(recipe)}. Made with lmdqn."


def _reward(recipe: Recipe) -> str:
    mixes = []
    for task_name, task in recipe.every_task.items():
        terms = _public_mix(task.reward.mix)
        mix = " + ".join(f"{weight:g} `{name}`" for name, weight in terms.items())
        mixes.append(f"{mix} (task `{task_name}`)" if task_name else mix)
    return ", ".join(mixes)


def set_name(data: DataSection) -> str:
    """What a data set is called."""
    return data.hub or PurePath(data.path or "data").name


def _data(recipe: Recipe) -> str:
    if recipe.tasks is None:
        return _data_of(recipe.only_task)
    tasks = recipe.tasks.items()
    return "\n".join(f"- Task `{name}`, weight {task.weight:g}: {_data_of(task)}" for name, task in tasks)


def _data_of(task: TaskSection) -> str:
    data = task.data
    if data.hub is None:
        prompted = "conversations" if data.conversation else f"`{data.source}` is what a model is asked with"
        answered = f"; `{data.references}` holds what it should answer" if data.references else ""
        return f"Local files (`{set_name(data)}`), not published here: {prompted}{answered}."
    config = f", configuration `{data.hub_config}`" if data.hub_config else ""
    link = f"[{data.hub}](https://huggingface.co/datasets/{data.hub})"
    return f"{link}{config}; tested on its split `{data.splits.test}`."


def _method(recipe: Recipe) -> str:
    q = recipe.qlearning
    settings = f"beta = {q.beta:g} reward units a nat, gamma = {q.gamma:g}, lambda = {q.trace:g}"
    start = "the frozen start of the DQN phase"
    if recipe.continued is not None:
        start = "the reference of the run that this one learnt on from"
    if q.reference_reset_every is not None:
        start = f"the policy as it was up to {q.reference_reset_every} updates before, {start} at first"
    return (
        f"A state is the prompt and the tokens so far, an action the next token; pi_0 is {start}."
        f"\n\n```\n{_equations(q)}\n```\n\n{settings}; rewards centred by: {q.baseline}. The published weights "
        "are the target network's, the best on validation. Terms beyond these equations, where there are any, stand "
        "in the recipe below."
    )


def _equations(q: QLearningSection) -> str:
    """Q, its target and its residual."""
    residual = "" if q.form == "classic" else " / beta"
    if q.loss == "path":
        value = "the mean over the prompt's responses of [R - beta sum_t log(pi / pi_0)(a_t|s_t)]"
        lines = [f"V(s_1) = {value if q.path_value == 'group' else 'the value network of the prompt'}"]
        lines += ["loss = mean over responses of ((V(s_1) + beta sum_t log(pi / pi_0)(a_t|s_t) - R) / beta)^2 / 2"]
        return "\n".join([Q_FORMS[q.form], *lines])
    cost = " - beta log(pi / pi_0)(a_{t+1}|s_{t+1})" if q.backup.startswith("soft") else ""
    target = f"r_t + gamma {{ (1 - lambda) B(s_{{t+1}}) + lambda [ y_{{t+1}}{cost} ] }}"
    if q.n_step is not None:
        target = f"the {q.n_step}-step return of the same rewards and costs, then B"
    elif q.trace == 0:
        target = "r_t + gamma B(s_{t+1})"
    loss = f"loss = mean over response tokens of ((Q(s_t, a_t) - y_t){residual})^2 / 2"
    lines = [Q_FORMS[q.form], f"y_t = {target}", f"B(s) = {NEXT_VALUES[q.backup]}", loss]
    if q.has_value_head:
        of_values = "by quantile regression" if q.value_quantiles else "by its squared error"
        lines.append(f"V(s_t) learns y_t - beta log(pi / pi_0)(a_t|s_t), lambda = {q.trace_of_values:g}, {of_values}")
    if q.supervised:
        lines.append(f"       on tokens of demonstrations instead {q.supervised:g} times -log pi(a_t|s_t)")
    return "\n".join(lines)


def _results(recipe: Recipe, results: Mapping[str, Any], examples: int) -> str:
    sets = ", ".join(f"`{name or set_name(task.data)}`" for name, task in recipe.every_task.items())
    about = (
        f"{sets}, {examples} test examples, greedy decoding, one seed ({recipe.seed}); 0 to 100, "
        "lengths in words; in brackets 95 % bootstrap intervals. Reward: the mix above times 100; distinct-2: "
        "different word pairs over all word pairs; repeated 4-grams: those that stood earlier in the same response."
    )
    tables = [f"Task `{name}`:\n\n{_table(own)}" for name, own in results.get("tasks", {}).items()]
    mean = "The mean over the tasks by their weights:\n\n" if tables else ""
    return "\n\n".join([about, *tables, mean + _table(results)])


def _table(results: Mapping[str, Any]) -> str:
    systems: Mapping[str, Mapping[str, float]] = results["test"]
    columns = [name for name in COLUMNS if all(name in scores for scores in systems.values())]
    rows = [
        [PHASES.get(phase, phase), *(_cell(scores[name], results["interval"][phase].get(name)) for name in columns)]
        for phase, scores in systems.items()
    ]
    significance = p_value_line(results["p_value"], "mle" if "mle" in systems else "start")
    return _markdown(["system", *(COLUMNS[name] for name in columns)], rows) + f"\n\n{significance}."


def _how_it_was_run(recipe: Recipe, results: Mapping[str, Any]) -> str:
    """Versions, machine and time, and every setting, folded away."""
    made = results["environment"]
    versions = ", ".join(f"{name} {made[name]}" for name in ("lmdqn", "torch", "transformers"))
    took = ", ".join(f"{PHASES[phase]} {s:.0f} s" for phase, s in results["seconds"].items() if phase in PHASES)
    return (
        f"{took} on {made['device']}; {versions}. To repeat it, save the settings as `recipe.yaml`, put the data where "
        "`data` says and run `lmdqn train recipe.yaml`.\n\n"
        "<details><summary>Every setting; folders and files by name alone</summary>\n\n"
        f"```yaml\n{public_recipe(recipe)}```\n\n</details>"
    )


def _cell(value: float, interval: Sequence[float] | None) -> str:
    return f"{value:.1f}" + (f" [{interval[0]:.1f}, {interval[1]:.1f}]" if interval else "")


def _markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---", *(["---:"] * (len(header) - 1))], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _limits(recipe: Recipe, results: Mapping[str, Any], examples: int) -> str:
    sets = "one data set" if recipe.tasks is None else f"{len(recipe.tasks)} data sets"
    points = [
        "It was tuned towards the reward above: a higher score is closer wording, not checked facts or judged quality.",
        f"One seed, {examples} test examples, {sets}; nothing else was measured.",
        "The licences and biases of the base model and of the data apply; this card names no licence of its own.",
    ]
    scores = results["test"]
    before = scores.get("mle", scores["start"]).get("distinct2", 0.0)
    if (after := scores["dqn"].get("distinct2", 0.0)) < before:
        points.insert(1, f"Variety fell with tuning: distinct-2 from {before:.1f} to {after:.1f}.")
    return "\n".join(f"- {point}" for point in points)


def _prompting(recipe: Recipe, published: Published) -> str:
    """The lines that make `inputs` of a source, as the recipe prompts (in the first of several tasks)."""
    data = next(iter(recipe.every_task.values())).data
    template = data.prompt or ("{source}" if published.is_seq2seq or data.chat else "{source}\n")
    names = dict.fromkeys(name for _, name, _, _ in string.Formatter().parse(template) if name is not None)
    values = ", ".join(f'{name}="..."' for name in names)
    prompt = f"prompt = {json.dumps(template, ensure_ascii=False)}.format({values})"
    if not data.chat:
        return f'{prompt}\ninputs = tokenizer(prompt, return_tensors="pt")'
    system = f'{{"role": "system", "content": {json.dumps(data.system)}}}, ' if data.system else ""
    return (
        f'{prompt}\nmessages = [{system}{{"role": "user", "content": prompt}}]\n'
        "inputs = tokenizer.apply_chat_template(\n"
        '    messages, add_generation_prompt=True, return_tensors="pt", return_dict=True\n)'
    )
