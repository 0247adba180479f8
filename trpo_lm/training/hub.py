"""A model hub: asked before a run whether it takes the results, and given them after it."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.utils import validate_repo_id

from trpo_lm.config import TrainerConfig
from trpo_lm.errors import TrpoLMError, first_line

# What others can use of a run's folder; not checkpoints, completions, or settings with paths.
PUBLISHED = (
    "README.md", "adapter_config.json", "adapter_model.safetensors", "value_head.safetensors",
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt",
    "chat_template*", "plots/*",
)  # fmt: skip


def require_hub(args: TrainerConfig) -> None:
    """Check that there is an account to upload to, and that the repository may have its name.

    Raises:
        TrpoLMError: If the name is not valid, or nobody is logged in, or the hub cannot be reached.
    """
    name = _name(args)
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise TrpoLMError(
            f"{name!r} cannot be the name of a repository: {first_line(error)}",
            where="hub_model_id", hint="name one with --hub_model_id, e.g. me/my-adapter",
        ) from None  # fmt: skip
    if get_token() is None:
        raise TrpoLMError(
            "nobody is logged in to the hub",
            where="push_to_hub", hint="log in with `hf auth login`, or set HF_TOKEN",
        )  # fmt: skip
    _asked(lambda: HfApi().whoami(), "the hub does not know who this is")


def create_repository(args: TrainerConfig) -> str:
    """Create the repository if there is none, and return its full name.

    Raises:
        TrpoLMError: If it may not be created.
    """
    name = _name(args)
    found = _asked(
        lambda: HfApi().create_repo(name, private=args.hub_private_repo, exist_ok=True),
        f"the repository {name} cannot be created",
    )
    return found.repo_id


def upload(folder: Path, repository: str) -> str:
    """Upload what can be used of a finished run; return a note for the screen.

    Nothing that goes wrong is an error: the run is on the disk, and the note has the command that
    uploads it later.
    """
    try:
        found = HfApi().upload_folder(
            repo_id=repository,
            folder_path=folder,
            allow_patterns=list(PUBLISHED),
            commit_message="Adapter trained with trpo_lm",
        )
    except Exception as error:
        return f"not uploaded: {_reason(error)}; later:\n  {upload_command(folder, repository)}"
    return f"uploaded: {found.repo_url}"


def upload_command(folder: Path, repository: str) -> str:
    """Return the command that uploads a finished run."""
    patterns = [word for pattern in PUBLISHED for word in ("--include", pattern)]
    return shlex.join(["hf", "upload", repository, str(folder), ".", *patterns])


def _name(args: TrainerConfig) -> str:
    return args.hub_model_id or Path(args.output_dir).expanduser().absolute().name


def _asked(question: Callable[[], Any], what: str) -> Any:
    try:
        return question()
    except Exception as error:  # of a hub, a proxy, a network, or a library for one of them
        hint = "train without --push_to_hub; the card and the files are the same"
        if isinstance(error, HfHubHTTPError):
            hint = "check HF_TOKEN and its right to write, and --hub_model_id; or " + hint
        raise TrpoLMError(f"{what}: {_reason(error)}", where="push_to_hub", hint=hint) from error


def _reason(error: Exception) -> str:
    """Return the first line of an error, without what may be a secret of an address."""
    return re.sub(r"(?<=://)[^/@\s]+(?=@)", "***", first_line(error))
