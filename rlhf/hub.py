"""The Hugging Face hub: whether it answers, and one revision of a model as a local folder. Never hangs."""

from __future__ import annotations

import functools
import os
import threading
import urllib.error
import urllib.request
from pathlib import Path

from rlhf.errors import UserError

PROBE_SECONDS = 2.0
"""How long the hub may take to answer before it counts as unreachable."""

_FILES = ["*.safetensors", "*.json", "*.jinja", "*.txt", "*.model"]


@functools.cache
def hub_reachable() -> bool:
    """Whether the hub answers within `PROBE_SECONDS`; asked once a process.

    A name look-up has no time limit of its own, hence the thread. `HF_HUB_OFFLINE` answers without asking.
    """
    if offline_by_environment():
        return False
    answered = threading.Event()
    thread = threading.Thread(target=_ask, args=(answered,), daemon=True)
    thread.start()
    thread.join(PROBE_SECONDS)
    return answered.is_set()


def _ask(answered: threading.Event) -> None:
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    try:
        request = urllib.request.Request(endpoint, method="HEAD")
        urllib.request.urlopen(request, timeout=PROBE_SECONDS).close()
    except urllib.error.HTTPError as error:
        if error.code >= 500:
            return
    except (OSError, ValueError):
        return
    answered.set()


def offline_by_environment() -> bool:
    """Whether Hugging Face's own variables forbid the network."""
    names = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
    return any(os.environ.get(name, "").upper() in {"1", "ON", "YES", "TRUE"} for name in names)


def why_offline(asked: bool) -> str:
    """The reason, as part of a sentence, that only the local cache is looked at."""
    return "offline mode is on" if asked or offline_by_environment() else "the hub cannot be reached"


def fetch(hub_id: str, key: str, revision: str = "", *, offline: bool = False, code: bool = False) -> Path:
    """The snapshot folder of a hub repository, whose name is the commit; `key` is the config key in errors.

    Takes the cache alone when `offline` or when the hub does not answer. `code` also fetches Python files.
    Raises `UserError` in one sentence for whatever is missing, gated or unknown.
    """
    local_only = offline or not hub_reachable()
    try:
        return snapshot(hub_id, revision, local_only=local_only, code=code)
    except FileNotFoundError as error:
        if not local_only:
            raise UserError(_trouble(hub_id, key, revision, error)) from error
        raise UserError(
            f"{key}={hub_id}{revision and '@'}{revision} is not in the Hugging Face cache and "
            f"{why_offline(offline)}: download it on a connected machine, or name a local folder."
        ) from None
    except Exception as error:
        raise UserError(_trouble(hub_id, key, revision, error)) from error


def snapshot(hub_id: str, revision: str = "", *, local_only: bool, code: bool = False) -> Path:
    """Find, or without `local_only` download, one revision. Raises FileNotFoundError when it is not there."""
    from huggingface_hub import snapshot_download

    folder = snapshot_download(
        hub_id,
        revision=revision or None,
        local_files_only=local_only,
        allow_patterns=[*_FILES, "*.py"] if code else _FILES,
        ignore_patterns=["consolidated*", "original/*"],
    )
    return Path(folder)


def cached_model(hub_id: str, revision: str = "") -> Path | None:
    """The folder in Hugging Face's cache with `config.json` of a revision, if any; never the network."""
    from huggingface_hub import try_to_load_from_cache

    try:
        found = try_to_load_from_cache(hub_id, "config.json", revision=revision or None)
    except ValueError:  # no name of a repository
        return None
    return Path(found).parent if isinstance(found, str) else None


def _trouble(hub_id: str, key: str, revision: str, error: Exception) -> str:
    """One sentence for what huggingface_hub raised."""
    name = type(error).__name__
    if name == "GatedRepoError":
        return f"{key}={hub_id} is gated: accept its terms on the hub and log in with `hf auth login`."
    if name == "RepositoryNotFoundError":
        return f"{key}={hub_id} is not on the hub, or is private: correct it or log in with `hf auth login`."
    if name == "RevisionNotFoundError":
        return f"{key}={hub_id}@{revision} is no revision of {hub_id}: name a branch, tag or commit of it."
    reason = (str(error).splitlines() or [""])[0][:200]
    return f"{key}={hub_id} could not be downloaded ({name}: {reason}): try again, or name a local folder."
