"""`smallm push RUN REPO`: uploads an export to a repository of the Hugging Face hub. Needs the extra `hub`."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from smallm.cli.arguments import ArgumentParser
from smallm.errors import UserError, command, missing_package
from smallm.language_model import find_model
from smallm.model_file.manifest import MANIFEST_FILE

DESCRIPTION = """\
Uploads the export folder of a run, with its model card, to a model repository on the Hugging Face hub. A new
repository is private unless --public is given; an existing one gets a commit. The token comes from the environment
variable HF_TOKEN or from `hf auth login`; it needs the permission to write."""


def main(argv: Sequence[str]) -> int:
    """Runs `smallm push` with these arguments."""
    parser = ArgumentParser("push", description=DESCRIPTION,
                            formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    add = parser.add_argument
    add("run", type=Path, metavar="RUN", help="a run that has been exported, or an export folder")
    add("repo", metavar="REPO", help="name of the repository: NAME or OWNER/NAME; default owner: that of the token")
    add("--public", action="store_true", help="create a public repository (default: private)")
    add("--message", default="Upload a model of smallm", help="commit message (default: %(default)s)")
    options = parser.parse_args(argv)
    print(push(options.run, options.repo, options.public, options.message))
    return 0


def push(run: Path, repo: str, public: bool, message: str) -> str:
    """Uploads an export folder and returns the web address of the commit. Raises `UserError`."""
    folder = find_model(run).parent
    if not (folder / MANIFEST_FILE).is_file():
        raise UserError(f"{run} is not an export folder; write one with: {command('export')}")
    try:
        import huggingface_hub as hub
    except ImportError:
        raise missing_package("push", "huggingface_hub", "hub") from None
    if hub.get_token() is None:
        raise UserError("there is no token for the Hugging Face hub; set HF_TOKEN, or run: hf auth login")
    try:
        api = hub.HfApi(library_name="smallm")
        name = api.create_repo(repo, private=not public, exist_ok=True).repo_id
        return str(api.upload_folder(repo_id=name, folder_path=folder, commit_message=message).commit_url)
    except Exception as error:  # the HTTP library, and so the types of its errors, depend on the version of the hub
        raise UserError(_message(repo, error)) from None


def _message(repo: str, error: Exception) -> str:
    response: Any = getattr(error, "response", None)
    status = getattr(response, "status_code", None)
    line = (str(error).strip().splitlines() or [type(error).__name__])[0]
    if status in (401, 403):
        return f"the hub refuses to write {repo} with this token ({line}); use a token with the permission to write"
    if status is not None:
        return f"the hub refuses the upload to {repo}: {line}"
    if isinstance(error, ValueError):
        return f"the repository name {repo!r} is not valid ({line}); write NAME or OWNER/NAME"
    return f"cannot reach the hub ({line}); check the network and HF_ENDPOINT, and try again"
