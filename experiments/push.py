"""Push an exported student to the Hugging Face hub. The hub answers before torch is imported and anything exported."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from core.schema import UserError

if TYPE_CHECKING:
    from huggingface_hub import HfApi

TOKEN = "set HF_TOKEN, or log in with: hf auth login"


def check_hub(hub_id: str) -> None:
    """UserError for an id that no model can have, without a token, and when the hub must not be asked."""
    from huggingface_hub import constants, get_token
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(hub_id)
    except HFValidationError as error:
        raise UserError(f"--to {hub_id} is no id of the hub: {str(error).splitlines()[0]}") from error
    if hub_id.count("/") != 1:
        raise UserError(f"--to {hub_id} is no id of the hub; give OWNER/NAME, e.g. your-name/{hub_id}")
    if constants.HF_HUB_OFFLINE:
        raise UserError("HF_HUB_OFFLINE=1: the hub must not be asked; unset it to push")
    if get_token() is None:
        raise UserError(f"pushing to {hub_id} needs a token of the hub that may write; {TOKEN}")


def run_command(arguments: Namespace) -> int:
    """``fewstep push RUN --to HUB_ID``: prints where the student lies."""
    from huggingface_hub import HfApi

    api, hub_id, revision = HfApi(), arguments.to, arguments.revision
    with _hub_errors(hub_id, api.endpoint):
        url = _prepare(api, hub_id, revision, arguments.private)
    with TemporaryDirectory() as temporary:
        out = Path(arguments.out or f"{temporary}/{hub_id.rpartition('/')[2]}")
        _export(arguments, out)
        with _hub_errors(hub_id, api.endpoint):
            message = "Upload a student exported by fewstep"
            api.upload_folder(folder_path=out, repo_id=hub_id, revision=revision, commit_message=message)
    print(f"{url}/tree/{revision}" if revision else url)
    return 0


def _prepare(api: HfApi, hub_id: str, revision: str | None, private: bool) -> str:
    """Make the model and the branch on the hub, unless they exist; returns the model's URL."""
    url = api.create_repo(hub_id, private=private or None, exist_ok=True)
    if private and not api.model_info(hub_id).private:
        raise UserError(f"--private: {hub_id} exists and is public; make it private on the hub, or give another id")
    if revision:
        api.create_branch(hub_id, branch=revision, exist_ok=True)
    return str(url)


def _export(arguments: Namespace, out: Path) -> None:
    from experiments.quiet import quieten

    quieten()
    from experiments.export import export_run
    from experiments.model_card import Place

    export_run(arguments, out, Place(arguments.to, arguments.revision))


@contextmanager
def _hub_errors(hub_id: str, endpoint: str) -> Iterator[None]:
    """Tell in one line what the hub refused, or that it cannot be reached."""
    from huggingface_hub.errors import HfHubHTTPError

    client_error = HfHubHTTPError.__bases__[0]  # of the HTTP library, which is another from version to version
    try:
        yield
    except HfHubHTTPError as error:
        status = error.response.status_code
        raise UserError(_refused(hub_id, status, error)) from error
    except (client_error, OSError) as error:
        raise UserError(f"{endpoint} cannot be reached: {_first_line(error)}") from error


def _refused(hub_id: str, status: int, error: Exception) -> str:
    """The line for an answer of the hub that is an error."""
    if status == 401:
        return f"the hub does not accept the token for {hub_id}; {TOKEN}"
    if status in (403, 404):
        return f"the token may not write to {hub_id}; give an id of your own, or a token with write access"
    said = getattr(error, "server_message", None) or _first_line(error)
    return f"the hub refuses to write {hub_id} ({status}): {_first_line(said)}"


def _first_line(said: object) -> str:
    return next(iter(str(said).splitlines()), type(said).__name__)
