"""Adapters on the Hugging Face hub: publish one, and load one from there.

An adapter on the hub is the folder that `patchlife.save` writes, with a model card. Only the files of the adapter are
downloaded, their checksums are verified, and nothing in them is executed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from huggingface_hub import CommitOperationAdd, HfApi, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from PIL import Image
from torch import nn

from ..adapters import load, read_adapter, save
from ..adapters.format import FILES
from ..data import Preprocess, read_photo
from ..errors import AdapterError, ConfigError, PatchLifeError
from ..io.folders import check_sums
from ..slimming import Scorer, SlimModel
from ..version import __version__
from ..visual import draw
from .model_card import Results, base_model_of, is_path, model_card

__all__ = ["download_adapter", "from_hub", "push_to_hub"]

_CARD, _PICTURE = "README.md", "life_map.png"


def push_to_hub(
    model: SlimModel,
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | None = None,
    commit_message: str | None = None,
    license: str | None = None,
    base_model: str | None = None,
    photo: str | Path | Image.Image | None = None,
    preprocess: Preprocess | None = None,
    results: Results | None = None,
) -> str:
    """Publish the adapter of ``model`` on the Hugging Face hub, with a model card, in one commit.

    Args:
        model: the slimmed model. The backbone is not uploaded.
        repo_id: name of the repository, ORG/NAME. It is made if it does not exist.
        private: whether a new repository is private; None: as the account's default.
        token: of an account that may write there; None: the one that ``hf auth login`` stored.
        commit_message: of the commit.
        license: identifier of the licence for the card, such as apache-2.0.
        base_model: the backbone's repository on the hub; if not given, it is taken from the model where it is known.
        photo: a photo for a life map on the card.
        preprocess: how the photo becomes the model's input, if the model does not know it.
        results: measured figures for the card's table, by name and budget: ``{"top-1 in %": {1.0: 82.2, 0.6: 82.0}}``.

    Returns:
        The address of the commit.

    Raises:
        AdapterError: the hub cannot be reached or refuses, or the adapter could not be loaded again.
        ConfigError: ``repo_id`` is not the name of a repository, or a budget in ``results`` cannot be reached.
        ImageError: ``photo`` cannot be read.
    """
    api = HfApi(token=token, library_name="patchlife", library_version=__version__)
    with TemporaryDirectory() as temporary:
        folder = Path(temporary) / "adapter"
        with _without_local_paths(model):
            save(model, folder)
            changes_weights = any(name.startswith("weight_delta.") for name in read_adapter(folder)[1])
            if photo is not None:
                _life_map(model, photo, preprocess).save(folder / _PICTURE)
            card = model_card(
                model,
                repo_id,
                license=license,
                base_model=base_model or base_model_of(model),
                results=results,
                changes_weights=changes_weights,
                picture=_PICTURE if photo is not None else None,
            )
        (folder / _CARD).write_text(str(card), encoding="utf-8")
        with _explained(repo_id, "upload to"):
            api.create_repo(repo_id, private=private, exist_ok=True)
            files = [CommitOperationAdd(file.name, file) for file in sorted(folder.iterdir())]
            message = commit_message or f"Adapter of patchlife {__version__}"
            return str(api.create_commit(repo_id, files, commit_message=message).commit_url)


def from_hub(
    repo_id: str,
    model: nn.Module | None = None,
    *,
    revision: str | None = None,
    token: str | None = None,
    scorer: Scorer | type[Scorer] | None = None,
) -> SlimModel:
    """The slimmed model of an adapter on the Hugging Face hub.

    Args:
        repo_id: name of the repository, ORG/NAME, or a local folder with an adapter.
        model: the backbone, not changed; if not given, it is built again from its origin.
        revision: a branch, a tag or a commit.
        token: of an account that may read the repository; None: the one that ``hf auth login`` stored.
        scorer: as for `patchlife.load`.

    Raises:
        AdapterError: the hub cannot be reached or refuses, or there is no intact adapter for this backbone.
        ConfigError: ``repo_id`` is not the name of a repository, or a ``revision`` of a local folder was asked for.
    """
    folder = Path(repo_id)
    if not folder.is_dir():
        folder = download_adapter(repo_id, revision, token)
    elif revision is not None:
        raise ConfigError(f"{repo_id} is a local folder, which has no revision {revision!r}; leave out revision")
    return load(folder, model, scorer)


def download_adapter(repo_id: str, revision: str | None = None, token: str | None = None) -> Path:
    """The local folder of an adapter on the hub, in the cache of the hub's client. Without network, a cached one.

    Raises AdapterError and ConfigError as `from_hub`.
    """
    folder = _snapshot(repo_id, revision, token)
    if not (folder / FILES[0]).is_file():
        raise AdapterError(
            f"{repo_id} is not a patchlife adapter: it has no {FILES[0]}; give a repository that push_to_hub wrote"
        )
    try:
        check_sums(folder, AdapterError)
    except AdapterError:  # the cache may be damaged; the reader verifies the new files
        folder = _snapshot(repo_id, revision, token, again=True)
    return folder


def _snapshot(repo_id: str, revision: str | None, token: str | None, again: bool = False) -> Path:
    with _explained(repo_id, "download from", revision):
        return Path(
            snapshot_download(
                repo_id,
                revision=revision,
                token=token,
                allow_patterns=list(FILES),
                force_download=again,
                library_name="patchlife",
                library_version=__version__,
            )
        )


@contextmanager
def _explained(repo_id: str, action: str, revision: str | None = None) -> Iterator[None]:
    """Within it, errors of the hub's client become errors that say what to do."""
    log_in = "log in with `hf auth login`, or give token="
    try:
        yield
    except HFValidationError:
        raise ConfigError(
            f"expected the name of a repository of the hub, ORG/NAME, or an existing folder, got {repo_id!r}"
        ) from None
    except GatedRepoError:
        raise AdapterError(f"{repo_id} is gated: accept its conditions on its page of the hub, then {log_in}") from None
    except RepositoryNotFoundError:
        raise AdapterError(
            f"expected a repository {repo_id} on the hub, found none that this account can read; check the name; if it "
            f"is private, {log_in}"
        ) from None
    except RevisionNotFoundError:
        raise AdapterError(f"{repo_id} has no revision {revision!r}; give a branch, a tag or a commit") from None
    except HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else None
        advice = f"{log_in} of an account with the right to" if status in (401, 403) else "try again later"
        raise AdapterError(f"could not {action} {repo_id}: {_reason(error)}; {advice}") from None
    except PatchLifeError:
        raise
    except Exception as error:  # the client and its HTTP library raise many kinds
        raise AdapterError(
            f"could not {action} {repo_id}: {_reason(error)}; check the network and that HF_HUB_OFFLINE is not set. A "
            "folder that was downloaded on another machine works as well: patchlife.load(folder, model)"
        ) from error


def _reason(error: Exception) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[0].strip() if lines else type(error).__name__


@contextmanager
def _without_local_paths(model: SlimModel) -> Iterator[None]:
    """Within it, the model records no path of this machine, because other machines do not have it."""
    own = {name: model.__dict__[name] for name in ("origin", "base", "delta")}
    if model.origin is not None:
        local = is_path(model.origin.model.partition(":")[2].removeprefix("local-dir:"))  # as in open_clip:local-dir:
        model.origin = None if local else dataclasses.replace(model.origin, checkpoint=None)
    model.base = _without_path(model.base)
    if model.delta is not None:
        model.delta = dataclasses.replace(model.delta, base=_without_path(model.delta.base))
    try:
        yield
    finally:
        model.__dict__ |= own


def _without_path(signature: dict[str, Any]) -> dict[str, Any]:
    """A signature in which the backbone's name is not a path."""
    name = signature["name"] or ""
    return signature | {"name": Path(name).name or None} if is_path(name) else signature


def _life_map(model: SlimModel, photo: str | Path | Image.Image, preprocess: Preprocess | None) -> Image.Image:
    """A picture of the lives of one photo."""
    preprocess = preprocess or model.backbone.preprocess or Preprocess(size=model.backbone.image_size)
    image = photo if isinstance(photo, Image.Image) else read_photo(photo)
    batch = preprocess(image)[None].to(model.device, model.backbone.dtype)
    return draw(image, model.lives(batch), preprocess=preprocess)
