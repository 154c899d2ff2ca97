"""Repositories of the Hugging Face hub: downloads and uploads, whose errors are sentences."""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .files import sha256
from .text import need


class HubError(OSError):
    """What the hub refused, or that it can't be reached, as a sentence."""


@contextmanager
def _hub(doing: str, instead: str) -> Iterator[Any]:
    """The library huggingface_hub; its errors become HubErrors `can't DOING: why; remedy`."""
    hub = need("huggingface_hub", "the hub", '"k-diffusion[hub]"')
    errors = need("huggingface_hub.errors", "the hub", '"k-diffusion[hub]"')
    log_in = "log in with `hf auth login`"
    try:
        yield hub
    except errors.HFValidationError as error:
        why = f"{_first_line(error)}; a repository is OWNER/NAME"
    except errors.GatedRepoError:
        why = f"its owner asks for terms to be accepted; do so on its page, then {log_in}"
    except errors.RepositoryNotFoundError:
        why = f"the hub has no such repository, or hides it; check the name, or {log_in}"
    except errors.RevisionNotFoundError:
        why = "it has no such revision; pass a branch, a tag or a commit of it"
    except (OSError, errors.HTTPError) as error:
        if getattr(error, "errno", None):
            raise  # of this machine's disk
        status = getattr(getattr(error, "response", None), "status_code", None)
        if status in {401, 403} or isinstance(error, errors.LocalTokenNotFoundError):
            why = f"the hub refuses it ({_first_line(error)}); {log_in} as one who may"
        elif status:
            why = f"the hub answers: {_first_line(error)}; {instead}"
        else:
            why = f"the hub can't be reached; connect to the network, or {instead}"
    else:
        return
    raise HubError(f"can't {doing}: {why}")


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0].rstrip(".") if lines else type(error).__name__


def download_file(repo: str, file: str, what: str) -> Path:
    """A file of a repository, from the hub's cache where it is there, with the hub's SHA-256.

    what: it is, for errors. Raises HubError for one that can't be had, or has another SHA-256 than
    the hub says, which is kept as NAME.wrong and never used. ImportError without huggingface_hub.
    """
    instead = "put it into the hub's cache ($HF_HOME), or pass the path of a copy"
    with _hub(f"download {what} from the hub's {repo}", instead) as hub:
        path = Path(hub.hf_hub_download(repo, file))
    # the cache names its files by what the hub says of them: of large ones, the SHA-256
    stored = path.resolve()
    if re.fullmatch(r"[0-9a-f]{64}", stored.name) and (got := sha256(stored)) != stored.name:
        aside = stored.rename(stored.with_name(f"{stored.name}.wrong"))
        raise HubError(
            f"{file} of the hub's {repo} must have SHA-256 {stored.name}, got {got}; it is kept as "
            f"{aside}; try again to download it anew"
        )
    return path


def download(repo: str, revision: str | None, files: Sequence[str]) -> Path:
    """A folder with those files of a repository that match, from the cache where they are there.

    files: names in the repository's top folder, or patterns such as "*.safetensors". revision: a
    branch, tag or commit. Raises HubError, ImportError without huggingface_hub.
    """
    at = f" at revision {revision}" if revision else ""
    doing = f"load {repo}{at}, which is no local file or folder, from the hub"
    with _hub(doing, "pass a local folder") as hub:
        below = [] if any("/" in name for name in files) else ["*/*"]
        folder = hub.snapshot_download(
            repo, revision=revision, allow_patterns=list(files), ignore_patterns=below
        )
    return Path(folder)


def make_repository(repo: str, private: bool = False) -> None:
    """Makes a repository of models unless it is there. Raises HubError, ImportError."""
    with _hub(f"push to {repo}", "write a folder and upload it later") as hub:
        hub.HfApi().create_repo(repo, private=private, exist_ok=True)


def upload(folder: Path, repo: str, files: Sequence[str]) -> str:
    """Uploads files of a folder in one commit; its address. Raises HubError, ImportError.

    files: their names; whatever else lies in the folder stays on this machine.
    """
    with _hub(f"push to {repo}", "write a folder and upload it later") as hub:
        message = "Upload a k-diffusion model"
        commit = hub.HfApi().upload_folder(
            repo_id=repo,
            folder_path=folder,
            commit_message=message,
            allow_patterns=list(files),
        )
    return str(commit.commit_url)
