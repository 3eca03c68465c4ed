"""Scorers of one's own: an adapter names their kind, and the class that is given for it must be the one."""

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
from patchlife.slimming import AttentionScorer
from patchlife.slimming.regressor import LifeRegressor
from patchlife.slimming.scorers import Scores


class Linear(Scorer):
    """A learned scorer with a setting of every JSON kind."""

    kind = "linear"

    def __init__(self, dim: int, scale: float = 1.0, sizes: Any = (1, 2), more: dict | None = None) -> None:
        super().__init__()
        self.said = {"dim": dim, "scale": scale, "sizes": sizes, "more": more}
        self.score = nn.Linear(dim, 1)
        self.tied = self.score

    def settings(self) -> dict[str, Any]:
        return self.said

    def forward(self, tokens: Tensor, rope: Tensor | None, backbone: Any, start: int) -> Scores:
        patches = tokens[:, backbone.prefix :]
        return Scores(self.said["scale"] * self.score(patches).squeeze(-1), normalize(patches, dim=-1))


def slimmed(scorer: Scorer) -> SlimModel:
    return patchlife.wrap(built("vit"), LifeConfig(budget=0.7, start=2), scorer=scorer)


@pytest.fixture
def saved(tmp_path: Path) -> tuple[SlimModel, Path]:
    torch.manual_seed(0)
    model = slimmed(Linear(48, scale=2.0, more={"a": [1, None, True, "b"]})).calibrate([photos("vit", 4)])
    return model, patchlife.save(model, tmp_path / "adapter")


@pytest.mark.parametrize("given", ["class", "instance"])
def test_it_comes_back(saved: tuple[SlimModel, Path], tmp_path: Path, given: str) -> None:
    model, folder = saved
    torch.manual_seed(1)
    instance = Linear(48, scale=2.0, more={"a": [1, None, True, "b"]})
    before = instance.score.weight.clone()
    loaded = patchlife.load(folder, built("vit"), scorer=Linear if given == "class" else instance)
    assert type(loaded.scorer) is Linear
    assert not any(p.requires_grad for p in loaded.scorer.parameters())
    assert torch.equal(before, instance.score.weight), "what was given stays as it is"
    for mode in ("fixed", "adaptive"):
        images = photos("vit", 3)
        assert torch.equal(loaded.set_mode(mode)(images), model.set_mode(mode)(images))
    patchlife.save(loaded.set_mode("fixed"), tmp_path / "again")
    assert torch.equal(
        patchlife.load(tmp_path / "again", built("vit"), Linear)(images), model.set_mode("fixed")(images)
    )


def test_without_the_class_it_says_what_to_give(saved: tuple[SlimModel, Path]) -> None:
    wanted = r"scorer of kind 'linear', and patchlife itself has attention-coverage, life-regressor; give the class"
    with pytest.raises(AdapterError, match=wanted + r".*patchlife\.load\(folder, vit, scorer=TheClass\)"):
        patchlife.load(saved[1], built("vit"))


def test_no_file_brings_code(saved: tuple[SlimModel, Path], tmp_path: Path) -> None:
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
        (Other, "kind 'linear', and Other is of kind 'other'; give the class that it was saved with"),
        (LifeRegressor, "kind 'linear', and LifeRegressor is of kind 'life-regressor'"),
        (AttentionScorer(), "kind 'linear', and AttentionScorer is of kind"),
        (nn.Linear(48, 1), "kind 'linear', and Linear is of kind None"),
        (Wider, r"the scorer in .*adapter does not fit Wider: .*score\.weight.*was the class changed since\?"),
        (Strict, r"Strict cannot be made with the settings in .*TypeError.*settings\(\) must give the arguments"),
        (Broken, r"Broken cannot be made with the settings in .*RuntimeError: no GPU"),
        (Linear(48), r"was saved with Linear's settings .*'scale': 2\.0.*, and this one has .*'scale': 1\.0"),
        (Linear(24, scale=2.0, more={"a": [1, None, True, "b"]}), r"was saved with Linear's settings .*'dim': 48"),
    ],
)
def test_another_class_is_refused(saved: tuple[SlimModel, Path], given: Any, message: str) -> None:
    with pytest.raises(AdapterError, match=message):
        patchlife.load(saved[1], built("vit"), scorer=given)


def test_a_learned_scorer_of_another_width_is_refused(tmp_path: Path) -> None:
    patchlife.save(slimmed(LifeRegressor(48, 1, width=8)), tmp_path / "adapter")
    about = tmp_path / "adapter" / "adapter.json"
    about.write_text(about.read_text().replace('"width": 8', '"width": 9'))
    from patchlife.io.files import SUMS, sha256_of

    names = ("adapter.json", "adapter.safetensors")
    lines = "".join(f"{sha256_of(about.with_name(name))}  {name}\n" for name in names)
    about.with_name(SUMS).write_text(lines)
    with pytest.raises(AdapterError, match=r"the scorer in .*adapter does not fit LifeRegressor: .*size mismatch"):
        patchlife.load(tmp_path / "adapter", built("vit"))


class Subclassed(LifeRegressor):
    """Inherits its parent's kind."""


class Nameless(Scorer):
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
            Subclassed(48, 1),
            r"Subclassed has the kind 'life-regressor', which is LifeRegressor's; .* kind = 'my-scorer'",
        ),
        (Nameless(), "Nameless has no kind, so an adapter cannot name it; add one to the class"),
        (Stateful(48), r"Stateful's state_dict holds more than tensors \(_extra_state\)"),
        (Linear(48, more={"f": print}), r"Linear\.settings\(\) must return JSON values, got more="),
        (Linear(48, sizes=torch.ones(2)), r"got sizes=tensor"),
        (Linear(48, sizes={1, 2}), r"got sizes=\{1, 2\}"),
        (Linear(48, scale=float("nan")), r"got scale=nan"),
        (Linear(48, more={1: "a key that is no string"}), r"got more=\{1: .*JSON would change it"),
        (Linear(48, sizes=Path("x")), r"got sizes=PosixPath"),
    ],
)
def test_what_could_not_be_loaded_is_not_saved(tmp_path: Path, scorer: Scorer, message: str) -> None:
    patchlife.save(slimmed(AttentionScorer()), tmp_path / "kept")
    before = (tmp_path / "kept" / "adapter.json").read_bytes()
    for name in ("kept", "new"):
        with pytest.raises(AdapterError, match=message):
            patchlife.save(slimmed(scorer), tmp_path / name)
    assert [entry.name for entry in tmp_path.iterdir()] == ["kept"]
    assert (tmp_path / "kept" / "adapter.json").read_bytes() == before
