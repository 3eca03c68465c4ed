"""Adapters on the hub: published in one commit, loaded without anything but their own files, refused with advice."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
from converted import pair
from families import built, fresh, photos
from huggingface_hub import ModelCard
from local_hub import LocalHub, Repository, local_hub
from PIL import Image
from small import photo

import patchlife
from patchlife import LifeConfig, SlimModel
from patchlife.adapters.format import FILES
from patchlife.backbones import Origin
from patchlife.errors import AdapterError, ConfigError
from patchlife.runtime import download_adapter
from patchlife.slimming.regressor import LifeRegressor

NAME = "someone/vit-slim"


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[LocalHub]:
    with local_hub(tmp_path / "cache") as running:
        yield running


def a_model(budget: float = 0.7) -> SlimModel:
    torch.manual_seed(0)
    model = patchlife.wrap(built("vit"), LifeConfig(budget=budget, start=2), scorer=LifeRegressor(48, 1))
    return model.calibrate([photos("vit", 8)])


def test_what_was_pushed_is_loaded(hub: LocalHub) -> None:
    model = a_model()
    address = patchlife.push_to_hub(model, NAME)
    loaded = patchlife.from_hub(NAME, built("vit"))
    for mode in ("fixed", "adaptive"):
        expected, got = (m.set_mode(mode)(photos("vit")) for m in (model, loaded))
        assert torch.equal(expected, got)
    (sha,) = hub.repositories[NAME].commits
    assert address == f"{hub.url}/{NAME}/commit/{sha}"
    assert set(hub.repositories[NAME].files()) == {*FILES, "README.md"}


def test_an_adapter_of_a_model_of_transformers(hub: LocalHub) -> None:
    vit, base = pair("vit")
    model = patchlife.wrap(base, LifeConfig(budget=0.7, start=2))
    patchlife.push_to_hub(model, NAME)
    for side in (vit, base):
        torch.testing.assert_close(
            patchlife.from_hub(NAME, side).output(photos("vit")), model.output(photos("vit")), rtol=0, atol=1e-5
        )
    assert "transformers 5" in hub.repositories[NAME].files()["README.md"].decode()


def test_a_push_is_one_commit_with_its_message(hub: LocalHub) -> None:
    patchlife.push_to_hub(a_model(), NAME, commit_message="The first")
    patchlife.push_to_hub(a_model(0.6), NAME, commit_message="The second")
    repository = hub.repositories[NAME]
    assert repository.messages == ["The first", "The second"]
    assert len(repository.commits) == 2
    assert patchlife.from_hub(NAME, built("vit")).settings.budget == 0.6


def test_a_revision_is_a_commit_a_branch_or_a_tag(hub: LocalHub) -> None:
    patchlife.push_to_hub(a_model(0.7), NAME)
    first = hub.repositories[NAME].refs["main"]
    patchlife.push_to_hub(a_model(0.6), NAME)
    hub.repositories[NAME].refs["v1"] = first
    for revision, budget in ((first, 0.7), ("v1", 0.7), ("main", 0.6), (None, 0.6)):
        assert patchlife.from_hub(NAME, built("vit"), revision=revision).settings.budget == budget
    with pytest.raises(AdapterError, match=r"someone/vit-slim has no revision 'v2'; give a branch, a tag or a commit"):
        patchlife.from_hub(NAME, built("vit"), revision="v2")


def test_only_the_files_of_the_adapter_are_downloaded(hub: LocalHub) -> None:
    patchlife.push_to_hub(a_model(), NAME)
    hub.repositories[NAME].commit({"code.py": b"raise SystemExit", "model.bin": b"pickle"})
    folder = download_adapter(NAME)
    assert {file.name for file in folder.iterdir()} == set(FILES)
    assert not any(name in path for _, path in hub.requests for name in ("code.py", "model.bin", "README.md/"))


@pytest.mark.parametrize("private", [True, False])
def test_a_private_repository(hub: LocalHub, private: bool) -> None:
    patchlife.push_to_hub(a_model(), NAME, private=private)
    assert hub.repositories[NAME].private == private
    if private:
        with pytest.raises(AdapterError, match=r"someone/vit-slim .*none that this account can read; .*hf auth login"):
            patchlife.from_hub(NAME, built("vit"))
        assert patchlife.from_hub(NAME, built("vit"), token="hf_of_the_test").settings.budget == 0.7


def test_a_repository_that_is_not_there_or_gated(hub: LocalHub) -> None:
    with pytest.raises(AdapterError, match=r"expected a repository someone/nothing on the hub.*check the name"):
        patchlife.from_hub("someone/nothing", built("vit"))
    hub.repositories[NAME] = Repository(gated=True)
    hub.repositories[NAME].commit({})
    with pytest.raises(AdapterError, match="someone/vit-slim is gated: accept its conditions"):
        patchlife.from_hub(NAME, built("vit"))


def test_a_repository_without_an_adapter(hub: LocalHub) -> None:
    hub.repositories[NAME] = Repository()
    hub.repositories[NAME].commit({"config.json": b"{}", "model.safetensors": b""})
    with pytest.raises(AdapterError, match=r"someone/vit-slim is not a patchlife adapter: it has no adapter\.json"):
        patchlife.from_hub(NAME, built("vit"))


@pytest.mark.parametrize("name", FILES[:2])
def test_a_damaged_file_is_refused(hub: LocalHub, name: str) -> None:
    patchlife.push_to_hub(a_model(), NAME)
    data = bytearray(hub.repositories[NAME].files()[name])
    data[len(data) // 2] ^= 1
    hub.repositories[NAME].commit({name: bytes(data)})
    with pytest.raises(AdapterError, match=rf"{name} is damaged: its sha256"):
        patchlife.from_hub(NAME, built("vit"))


def test_a_damaged_cache_is_downloaded_again(hub: LocalHub) -> None:
    patchlife.push_to_hub(a_model(), NAME)
    cached = download_adapter(NAME) / FILES[1]
    cached.write_bytes(cached.read_bytes()[:-1] + b"\0\0")
    assert patchlife.from_hub(NAME, built("vit")).settings.budget == 0.7


@pytest.mark.parametrize("fault", ["broken", "refused"])
def test_an_interrupted_upload_changes_nothing(hub: LocalHub, fault: str) -> None:
    patchlife.push_to_hub(a_model(), NAME)
    before = dict(hub.repositories[NAME].files())
    setattr(hub, fault, 403)
    advice = "check the network" if fault == "broken" else "log in with .* the right to"
    with pytest.raises(AdapterError, match=f"could not upload to {NAME}: .*; {advice}"):
        patchlife.push_to_hub(a_model(0.6), NAME)
    assert hub.repositories[NAME].files() == before
    assert patchlife.from_hub(NAME, built("vit")).settings.budget == 0.7
    setattr(hub, fault, 0)
    patchlife.push_to_hub(a_model(0.6), NAME)
    assert patchlife.from_hub(NAME, built("vit")).settings.budget == 0.6


def test_without_network_a_cached_adapter_is_loaded(hub: LocalHub, monkeypatch: pytest.MonkeyPatch) -> None:
    patchlife.push_to_hub(a_model(), NAME)
    patchlife.from_hub(NAME, built("vit"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert patchlife.from_hub(NAME, built("vit")).settings.budget == 0.7
    with pytest.raises(AdapterError, match=r"could not download from someone/other: .*check the network"):
        patchlife.from_hub("someone/other", built("vit"))
    with pytest.raises(AdapterError, match=r"could not upload to someone/vit-slim: .*HF_HUB_OFFLINE"):
        patchlife.push_to_hub(a_model(), NAME)


def test_a_host_that_does_not_answer(hub: LocalHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(AdapterError, match=r"could not download from someone/vit-slim: .*check the network"):
        patchlife.from_hub(NAME, built("vit"))


def test_a_local_folder_is_loaded(hub: LocalHub, tmp_path: Path) -> None:
    patchlife.save(a_model(), tmp_path / "adapter")
    assert patchlife.from_hub(str(tmp_path / "adapter"), built("vit")).settings.budget == 0.7
    assert not hub.requests
    with pytest.raises(ConfigError, match="is a local folder, which has no revision 'main'"):
        patchlife.from_hub(str(tmp_path / "adapter"), built("vit"), revision="main")
    with pytest.raises(ConfigError, match=r"expected the name of a repository of the hub, ORG/NAME.*gone"):
        patchlife.from_hub(str(tmp_path / "gone"), built("vit"))
    with pytest.raises(ConfigError, match="expected the name of a repository"):
        patchlife.push_to_hub(a_model(), "not a name")


def test_an_adapter_for_other_weights(hub: LocalHub) -> None:
    patchlife.push_to_hub(a_model(), NAME)
    other = fresh("vit")
    other.blocks[1].mlp.fc1.weight.mul_(1.01)
    with pytest.raises(AdapterError, match="other weights"):
        patchlife.from_hub(NAME, other)


def test_paths_of_this_machine_are_not_published(hub: LocalHub, tmp_path: Path) -> None:
    model = a_model()
    origin = Origin("vit_tiny_patch16_224", checkpoint=str(tmp_path / "vit.safetensors"), sha256="0" * 64)
    folders = [f"local-dir:{tmp_path}", f"hf:{tmp_path}", f"open_clip:local-dir:{tmp_path}"]
    for given in (origin, *(Origin(folder, pretrained=True) for folder in folders)):
        model.origin = given
        model.base["name"] = str(tmp_path)
        patchlife.push_to_hub(model, NAME)
        published = hub.repositories[NAME].files()
        assert not any(str(tmp_path).encode() in content for content in published.values())
        saved = json.loads(published["adapter.json"])["origin"]
        assert saved == (None if given is not origin else replace(origin, checkpoint=None).to_dict())
        assert model.origin is given
        assert model.base["name"] == str(tmp_path)


def test_a_photo_gives_a_life_map(hub: LocalHub, tmp_path: Path) -> None:
    photo(0).save(tmp_path / "photo.png")
    for given in (tmp_path / "photo.png", photo(0)):
        patchlife.push_to_hub(a_model(), NAME, photo=given)
        files = hub.repositories[NAME].files()
        with Image.open(io.BytesIO(files["life_map.png"])) as picture:
            assert picture.width == 480
        assert "![Life map](life_map.png)" in ModelCard(files["README.md"].decode()).text
    with pytest.raises(patchlife.PatchLifeError, match="gone"):
        patchlife.push_to_hub(a_model(), NAME, photo=tmp_path / "gone.png")


def test_nothing_is_uploaded_if_the_adapter_could_not_be_loaded_again(hub: LocalHub) -> None:
    model = a_model()
    model.scorer.kind = None
    with pytest.raises(AdapterError, match="kind"):
        patchlife.push_to_hub(model, NAME)
    assert not hub.requests
