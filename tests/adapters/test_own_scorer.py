"""Scorers of users: the adapter holds their kind and settings, and `load` needs their class."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from families import built, photos
from torch import Tensor, nn
from torch.nn.functional import normalize

import patchlife
from patchlife import LifeConfig, Scorer, SlimModel
from patchlife.errors import AdapterError
from patchlife.io.files import sha256_of
from patchlife.io.folders import SUMS
from patchlife.slimming import AttentionScorer
from patchlife.slimming.regressor import LifeRegressor
from patchlife.slimming.scorers import Scores


class Linear(Scorer):
    """A learned scorer with a setting of every JSON kind."""

    kind = "linear"

    def __init__(self, dim: int, scale: float = 1.0, sizes: Any = (1, 2), more: dict | None = None) -> None:
        super().__init__()
        self.arguments = {"dim": dim, "scale": scale, "sizes": sizes, "more": more}
        self.score = nn.Linear(dim, 1)
        self.tied = self.score

    def settings(self) -> dict[str, Any]:
        return self.arguments

    def forward(self, tokens: Tensor, rope: Tensor | None, backbone: Any, start: int) -> Scores:
        patches = tokens[:, backbone.prefix :]
        return Scores(self.arguments["scale"] * self.score(patches).squeeze(-1), normalize(patches, dim=-1))


def wrapped(scorer: Scorer) -> SlimModel:
    """The small ViT with this scorer."""
    return patchlife.wrap(built("vit"), LifeConfig(budget=0.7, start=2), scorer=scorer)


@pytest.fixture
def saved(tmp_path: Path) -> tuple[SlimModel, Path]:
    torch.manual_seed(0)
    model = wrapped(Linear(48, scale=2.0, more={"a": [1, None, True, "b"]})).calibrate([photos("vit", 4)])
    return model, patchlife.save(model, tmp_path / "adapter")


@pytest.mark.parametrize("given", ["class", "instance"])
def test_a_loaded_scorer_equals_the_saved_one(saved: tuple[SlimModel, Path], tmp_path: Path, given: str) -> None:
    model, folder = saved
    torch.manual_seed(1)
    instance = Linear(48, scale=2.0, more={"a": [1, None, True, "b"]})
    before = instance.score.weight.clone()
    loaded = patchlife.load(folder, built("vit"), scorer=Linear if given == "class" else instance)
    assert type(loaded.scorer) is Linear
    assert not any(p.requires_grad for p in loaded.scorer.parameters())
    assert torch.equal(before, instance.score.weight), "the given instance must not change"
    for mode in ("fixed", "adaptive"):
        images = photos("vit", 3)
        assert torch.equal(loaded.set_mode(mode)(images), model.set_mode(mode)(images))
    patchlife.save(loaded.set_mode("fixed"), tmp_path / "again")
    assert torch.equal(
        patchlife.load(tmp_path / "again", built("vit"), Linear)(images), model.set_mode("fixed")(images)
    )


def test_loading_needs_the_class(saved: tuple[SlimModel, Path]) -> None:
    message = r"'linear'.* attention-coverage-2, life-regressor.*; .*patchlife\.load\(folder, vit, scorer=TheClass\)"
    with pytest.raises(AdapterError, match=message):
        patchlife.load(saved[1], built("vit"))


def test_an_adapter_does_not_name_the_module_of_the_class(saved: tuple[SlimModel, Path], tmp_path: Path) -> None:
    text = (saved[1] / "adapter.json").read_text()
    assert json.loads(text)["scorer"] == {
        "kind": "linear",
        "settings": json.loads(json.dumps(saved[0].scorer.settings())),
    }
    assert __name__ not in text


class Other(Linear):
    kind = "other"


class Wider(Linear):
    def __init__(self, dim: int, **more: Any) -> None:
        super().__init__(dim, **more)
        self.score = self.tied = nn.Linear(dim, 2)


class Strict(Scorer):
    kind = "linear"

    def __init__(self, width: int) -> None:
        super().__init__()


class Broken(Scorer):
    kind = "linear"

    def __init__(self, **settings: Any) -> None:
        raise RuntimeError("no GPU")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (Other, "'linear'.* Other .*'other'"),
        (LifeRegressor, "'linear'.* LifeRegressor .*'life-regressor'"),
        (AttentionScorer(), "'linear'.* AttentionScorer .*'attention-coverage-2'"),
        (nn.Linear(48, 1), "'linear'.* Linear .*None"),
        (Wider, r"adapter .* Wider: .*score\.weight"),
        (Strict, r"Strict .*TypeError.*settings\(\)"),
        (Broken, r"Broken .*RuntimeError: no GPU"),
        (Linear(48), r"Linear.*'scale': 2\.0.*'scale': 1\.0"),
        (Linear(24, scale=2.0, more={"a": [1, None, True, "b"]}), r"Linear.*'dim': 48.*'dim': 24"),
    ],
)
def test_another_class_is_refused(saved: tuple[SlimModel, Path], given: Any, message: str) -> None:
    with pytest.raises(AdapterError, match=message):
        patchlife.load(saved[1], built("vit"), scorer=given)


def test_a_life_regressor_of_another_width_is_refused(tmp_path: Path) -> None:
    patchlife.save(wrapped(LifeRegressor(48, 1, width=8)), tmp_path / "adapter")
    manifest = tmp_path / "adapter" / "adapter.json"
    manifest.write_text(manifest.read_text().replace('"width": 8', '"width": 9'))
    names = ("adapter.json", "adapter.safetensors")
    lines = "".join(f"{sha256_of(manifest.with_name(name))}  {name}\n" for name in names)
    manifest.with_name(SUMS).write_text(lines)
    with pytest.raises(AdapterError, match=r"adapter .* LifeRegressor: .*size mismatch"):
        patchlife.load(tmp_path / "adapter", built("vit"))


class Subclass(LifeRegressor):
    """Inherits the kind of its parent."""


class WithoutKind(Scorer):
    forward = AttentionScorer.forward


class Stateful(Linear):
    def get_extra_state(self) -> str:
        return "more than tensors"

    def set_extra_state(self, state: str) -> None:
        pass


@pytest.mark.parametrize(
    ("scorer", "message"),
    [
        (
            Subclass(48, 1),
            r"Subclass .*'life-regressor'.* LifeRegressor.*kind = 'my-scorer'",
        ),
        (WithoutKind(), "WithoutKind .* kind = 'my-scorer'"),
        (Stateful(48), r"Stateful.*\(_extra_state\).*settings\(\)"),
        (Linear(48, more={"f": print}), r"Linear\.settings\(\) .*JSON.* got more="),
        (Linear(48, sizes=torch.ones(2)), r"got sizes=tensor"),
        (Linear(48, sizes={1, 2}), r"got sizes=\{1, 2\}"),
        (Linear(48, scale=float("nan")), r"got scale=nan"),
        (Linear(48, more={1: "a key that is not a string"}), r"got more=\{1: .*string keys"),
        (Linear(48, sizes=Path("x")), r"got sizes=PosixPath"),
    ],
)
def test_a_scorer_that_could_not_be_loaded_is_not_saved(tmp_path: Path, scorer: Scorer, message: str) -> None:
    patchlife.save(wrapped(AttentionScorer()), tmp_path / "kept")
    before = (tmp_path / "kept" / "adapter.json").read_bytes()
    for name in ("kept", "new"):
        with pytest.raises(AdapterError, match=message):
            patchlife.save(wrapped(scorer), tmp_path / name)
    assert [entry.name for entry in tmp_path.iterdir()] == ["kept"]
    assert (tmp_path / "kept" / "adapter.json").read_bytes() == before
