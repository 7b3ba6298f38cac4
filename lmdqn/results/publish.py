"""A run on the Hugging Face hub: model or adapter, tokenizer, generation config and card, all in one commit."""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.errors import HTTPError as NetworkError  # type: ignore[attr-defined]  # its HTTP library's own

from lmdqn.errors import UserError
from lmdqn.recipe import Recipe, load_recipe
from lmdqn.results.model_card import Published, is_local, model_card
from lmdqn.results.run_folder import RunFolder

NOT_PUBLISHED = ("README.md", "value_head.safetensors")  # peft's own card names local paths; V serves training alone
MADE_BY_THE_HUB = {".gitattributes"}


def push(
    run_path: Path,
    repository: str,
    private: bool = False,
    merge: bool = False,
    revision: str = "main",
    replace: bool = False,
) -> str:
    """Publish a finished run's best model to `USER/NAME`; gives the commit's address.

    All files go up in one commit, so that a cut upload leaves none. `merge` publishes an adapter merged into its
    base model. A branch that holds files already is refused unless `replace` puts this run's in their place (its
    history stays). The token is the hub client's own: HF_TOKEN, or what `hf auth login` stored.

    Raises:
        UserError: the run is not finished, its adapter's base is nowhere but here, no token or a wrong one, the
            repository is taken, or the network was cut.
    """
    run = RunFolder(run_path)
    results, examples = run.read_results(), len(run.read_predictions())
    recipe = load_recipe(run.recipe)
    is_adapter = (run.model / "adapter_config.json").exists()
    if merge and not is_adapter:
        raise UserError(f"run {run.path} trained all weights: there is no adapter to merge")
    if is_adapter and not merge:
        _check_base(run)
    api = _signed_in(repository)
    with TemporaryDirectory(prefix="lmdqn-push-") as staged:
        folder = Path(staged)
        if merge:
            _merge(run, recipe, folder)
        else:
            shutil.copytree(run.model, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns(*NOT_PUBLISHED))
        published = Published(repository, revision, is_adapter and not merge, _is_seq2seq(folder))
        model_card(recipe, results, examples, published).save(folder / "README.md")
        return _commit(api, folder, published, private, replace)


def _check_base(run: RunFolder) -> None:
    adapter = json.loads((run.model / "adapter_config.json").read_text(encoding="utf-8"))
    if is_local(base := adapter["base_model_name_or_path"]):
        raise UserError(f"the adapter's base model is the local folder {base}, which nobody else has: add --merge")


def _signed_in(repository: str) -> HfApi:
    """The hub client, its token checked."""
    if repository.count("/") != 1:
        raise UserError(f"{repository!r} must read USER/NAME, such as jane/my-summariser")
    if get_token() is None:
        raise UserError("no hub token: run `hf auth login`, or set HF_TOKEN")
    api = HfApi()
    with _in_one_sentence("the hub does not answer", "try again when it does"):
        try:
            api.whoami()
        except HfHubHTTPError as error:
            if error.response.status_code != 401:
                raise
            raise UserError("the hub refuses the token: run `hf auth login` anew, or set HF_TOKEN right") from error
    return api


def _merge(run: RunFolder, recipe: Recipe, folder: Path) -> None:
    from lmdqn.model.loading import load_trained

    loaded = load_trained(run.model, recipe.model, recipe.max_response_tokens)
    loaded.model.merge_and_unload().save_pretrained(folder)
    loaded.tokenizer.save_pretrained(folder)


def _is_seq2seq(folder: Path) -> bool:
    if (adapter := folder / "adapter_config.json").exists():
        return bool(json.loads(adapter.read_text(encoding="utf-8"))["task_type"] == "SEQ_2_SEQ_LM")
    return bool(json.loads((folder / "config.json").read_text(encoding="utf-8")).get("is_encoder_decoder"))


def _commit(api: HfApi, folder: Path, published: Published, private: bool, replace: bool) -> str:
    repository, revision = published.repository, published.revision
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    additions = [CommitOperationAdd(file.relative_to(folder).as_posix(), file) for file in files]
    with _in_one_sentence(f"cannot publish to {repository}", "nothing was uploaded"):
        there = _open_branch(api, published, private, replace)
    stale = there - {addition.path_in_repo for addition in additions} - MADE_BY_THE_HUB
    deletions = [CommitOperationDelete(path, is_folder=False) for path in sorted(stale)]
    again = "nothing was committed, run the same command again"
    with _in_one_sentence(f"the upload to {repository} was cut", again):
        api.preupload_lfs_files(repository, additions, revision=revision, free_memory=False)
    lost = f"look at {api.endpoint}/{repository}, and run the same command again if the files are not there"
    with _in_one_sentence(f"{repository} did not confirm the commit", lost):
        message = "A model fine-tuned with lmdqn"
        info = api.create_commit(repository, [*additions, *deletions], commit_message=message, revision=revision)
    return str(info.commit_url)


def _open_branch(api: HfApi, published: Published, private: bool, replace: bool) -> set[str]:
    """Create the repository and the branch where they are missing; gives the files the branch holds."""
    repository, revision = published.repository, published.revision
    if not api.repo_exists(repository):
        api.create_repo(repository, private=private or None)
    elif private and not api.repo_info(repository).private:
        raise UserError(f"{repository} is there and public: --private hides no existing repository, change it there")
    heads = {branch.name: branch.target_commit for branch in api.list_repo_refs(repository).branches}
    if revision not in heads:
        api.create_branch(repository, branch=revision)
    is_new = revision not in heads or (revision != "main" and heads[revision] == heads.get("main"))
    there = set(api.list_repo_files(repository, revision=revision))
    if there - MADE_BY_THE_HUB and not (is_new or replace):
        raise UserError(
            f"{repository} already holds files on {revision}: --replace commits this run in their place (history "
            "stays), --revision names another branch"
        )
    return there


@contextmanager
def _in_one_sentence(problem: str, advice: str) -> Iterator[None]:
    """What the hub client raises (HTTP, network, upload) as one sentence."""
    try:
        yield
    except (NetworkError, OSError, RuntimeError, ValueError) as error:
        reason = getattr(error, "server_message", None) or str(error.__cause__ or error) or type(error).__name__
        raise UserError(f"{problem} ({reason.strip().splitlines()[0]}): {advice}") from error
