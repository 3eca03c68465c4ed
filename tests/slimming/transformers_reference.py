"""The slow reference of `reference.py` for layers of transformers, which take an additive ``attention_mask``.

transformers' model runs on all tokens in grid order by its own code; hooks on its layers drop the patches.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from reference import PatchDropper, assert_close, targets_of
from torch import Tensor, nn
from transformers_families import tensors

from patchlife import Lives, Plan, SlimModel
from patchlife.slimming.merging import MergeTargets


@contextmanager
def dropping(
    layers: Any, prefix: int, life: Tensor, start: int, merge: bool, targets: MergeTargets | None
) -> Iterator[PatchDropper]:
    """Within it, a patch takes part in layer ``l`` only while ``l < life`` (batch, patches)."""
    dropper = PatchDropper(life, prefix, start, merge, targets)
    handles = []
    for index, layer in enumerate(layers):

        def mask(_: nn.Module, args: tuple, kwargs: dict, index: int = index) -> tuple:
            assert args[1:] in ((), (None,))
            x, bias = dropper.before(index, args[0])
            return (x,), {**kwargs, "attention_mask": bias[:, None, None]}

        def keep(_: nn.Module, args: tuple, out: Tensor, index: int = index) -> Tensor:
            return dropper.after(index, args[0], out)

        handles.append(layer.register_forward_pre_hook(mask, with_kwargs=True))
        handles.append(layer.register_forward_hook(keep, prepend=True))  # before transformers records its output
    try:
        yield dropper
    finally:
        for handle in handles:
            handle.remove()


def masked(model: SlimModel, lives: Lives, given: dict[str, Any], plan: Plan | None = None) -> Any:
    """Outputs of ``model``'s backbone for the arguments ``given`` when its patches are dropped as in ``lives``.

    A ``plan`` also gives the merge targets, for precisions so coarse that ties decide between them.
    """
    backbone, merge = model.backbone, model.settings.merge
    with dropping(backbone.blocks, backbone.prefix, lives.life, model.start, merge, targets_of(plan)):
        return backbone.model(**given)


def assert_same_outputs(actual: Any, expected: Any, tolerance: float = 1e-5) -> None:
    """Assert that two outputs are of one class and that all their tensors are equal up to rounding."""
    assert type(actual) is type(expected)
    found, wanted = tensors(actual), tensors(expected)
    assert found.keys() == wanted.keys()
    assert wanted
    for place, tensor in wanted.items():
        assert tensor.dtype == found[place].dtype
        try:
            assert_close(found[place], tensor, tolerance)
        except AssertionError as error:
            raise AssertionError(f"{place}: {error}") from None
