"""The cache of exports: entries are found again, replaced when damaged, and safe with two processes at once."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path

import exported_models
import pytest
import torch

import patchlife
from patchlife.data import Preprocess
from patchlife.data.labels import numbered_labels
from patchlife.errors import ExportError
from patchlife.export import cache
from patchlife.export.cache import cache_folder, cached_engine
from patchlife.runtime.engine import checksum_file
from patchlife.runtime.metadata import metadata_of

INPUT = (numbered_labels(7), Preprocess(size=(48, 48)))


@pytest.fixture
def exports(onnx_file, tmp_path, monkeypatch):
    """The paths exported to so far; the export itself is replaced by copying an earlier file."""
    monkeypatch.setenv("PATCHLIFE_CACHE", str(tmp_path / "cache"))
    calls = []

    def copy(model, out, *args, **kwargs):
        calls.append(out)
        shutil.copy(onnx_file.exported.path, out)
        shutil.copy(checksum_file(onnx_file.exported.path), checksum_file(Path(out)))

    monkeypatch.setattr(cache, "export", copy)
    return calls


def test_a_second_run_uses_the_entry(exports):
    model = exported_models.small()
    first = cached_engine(model, "onnx", *INPUT)
    second = cached_engine(exported_models.small(), "onnx", *INPUT)
    assert len(exports) == 1
    images = exported_models.images(2).numpy()
    assert (first(images).logits == second(images).logits).all()
    assert len(list(cache_folder().iterdir())) == 1, "nothing temporary is left"


def test_what_changes_the_outputs_changes_the_name(exports):
    model = exported_models.small()
    cached_engine(model, "onnx", *INPUT)
    cached_engine(exported_models.small(budget=0.6), "onnx", *INPUT)
    with torch.no_grad():
        model.backbone.model.head.bias[0] += 1
    cached_engine(model, "onnx", *INPUT)
    assert len(exports) == 3


def test_a_damaged_entry_is_exported_again(exports):
    cached_engine(exported_models.small(), "onnx", *INPUT)
    (kept,) = cache_folder().glob("*/onnx")
    kept.write_bytes(kept.read_bytes()[:-1])
    cached_engine(exported_models.small(), "onnx", *INPUT)
    assert len(exports) == 2


def test_two_processes_at_once(exports, monkeypatch):
    real = cache.export

    def export_after_another_process(model, out, *args, **kwargs):
        monkeypatch.setattr(cache, "export", real)
        cached_engine(model, "onnx", *INPUT)  # the other process starts later and finishes first
        real(model, out, *args, **kwargs)

    monkeypatch.setattr(cache, "export", export_after_another_process)
    engine = cached_engine(exported_models.small(), "onnx", *INPUT)
    assert engine(exported_models.images(1).numpy()).logits.shape == (1, 7)
    assert len(exports) == 2
    assert len(list(cache_folder().iterdir())) == 1


def test_a_full_disk_is_not_hidden(exports, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(cache, "export", full)
    with pytest.raises(OSError, match="No space left"):
        cached_engine(exported_models.small(), "onnx", *INPUT)
    assert not list(cache_folder().iterdir())


@pytest.mark.parametrize("card", [None, {}, "no attribute"])
def test_a_model_that_was_built_from_its_class(exports, card):
    model = exported_models.small()
    model.backbone.model = copy.deepcopy(model.backbone.model)
    model.backbone.model.pretrained_cfg = card
    if card == "no attribute":
        del model.backbone.model.pretrained_cfg
    metadata = metadata_of(model, "onnx")
    assert (metadata.model, metadata.labels) == ("VisionTransformer", tuple("0123456"))
    cached_engine(model, "onnx")
    assert len(exports) == 1


class Negated(patchlife.Scorer):
    """The attention scorer with negated scores. It has no weights."""

    kind = "negated"

    def __init__(self, power: float = 1.0) -> None:
        super().__init__()
        self.power, self.attention = power, patchlife.slimming.AttentionScorer()

    def settings(self) -> dict[str, float]:
        return {"power": self.power}

    def forward(self, *inputs):
        scores = self.attention(*inputs)
        return scores._replace(score=-(scores.score**self.power))


def test_a_scorer_without_weights_changes_the_name(exports):
    vit = exported_models.small().backbone.model
    for scorer in (None, Negated(), Negated(2.0), Negated(), Negated(2.0)):
        model = patchlife.wrap(vit, exported_models.small().settings, scorer=scorer).eval()
        cached_engine(model, "onnx", *INPUT)
    assert len(exports) == 3


def test_an_entry_replaced_by_another_process_is_not_removed(exports, monkeypatch):
    """Two processes find the same damaged entry; one of them replaces it before the other begins to."""
    cached_engine(exported_models.small(), "onnx", *INPUT)
    (kept,) = cache_folder().glob("*/onnx")
    kept.write_bytes(b"damaged")
    real = cache.open_engine

    def other_process(path):
        try:
            return real(path)
        except ExportError:
            monkeypatch.setattr(cache, "open_engine", real)
            cached_engine(exported_models.small(), "onnx", *INPUT)  # now the entry is complete again
            raise

    monkeypatch.setattr(cache, "open_engine", other_process)
    assert cached_engine(exported_models.small(), "onnx", *INPUT)(exported_models.images(1).numpy()).logits.shape == (
        1,
        7,
    )
    assert len(exports) == 2, "the other process's entry is used"


def test_leftovers_of_a_killed_process_are_removed(exports):
    cached_engine(exported_models.small(), "onnx", *INPUT)
    (entry,) = cache_folder().iterdir()
    left = entry.with_name(f".{entry.name}.{'0' * 32}")
    left.mkdir()
    (left / "onnx").write_bytes(b"half of it")
    (entry / "onnx").write_bytes(b"damaged")
    cached_engine(exported_models.small(), "onnx", *INPUT)
    assert list(cache_folder().iterdir()) == [entry]
