"""ToMe's un-merging against a slow reference that follows every patch of the grid by itself."""

from __future__ import annotations

import pytest
import torch
from families import built, photos
from plain_blocks import backbone, images
from torch import Tensor

from patchlife.backbones import adapt
from patchlife.benchmarks.baselines.tome import Pairs
from patchlife.benchmarks.baselines.tome_unmerging import UnmergingToMe

PAIRS = (4, 0, 6, 5, 2)


class Recorded(UnmergingToMe):
    """Keeps what each merge saw: tokens before, pairs, tokens after."""

    def merged(self, patches: Tensor, size: Tensor, pairs: Pairs) -> tuple[Tensor, Tensor]:
        after, new_size = super().merged(patches, size, pairs)
        self.merges.append((patches, pairs, after))
        return after, new_size


def followed(merges: list, image: int, patch: int) -> list[tuple[Tensor, bool, Tensor]]:
    """At each merge: the state of the patch's token before, whether it moved into another, its new token's state."""
    place, steps = patch, []
    for before, (unmerged, merged, target), after in merges:
        moved = place % 2 == 0 and place // 2 in merged[image].tolist()
        kept = unmerged[image].tolist()
        if moved:
            new = len(kept) + int(target[image][merged[image].tolist().index(place // 2)])
        else:
            new = kept.index(place // 2) if place % 2 == 0 else len(kept) + place // 2
        steps.append((before[image, place], moved, after[image, new]))
        place = new
    return [*steps, (place,)]


def expected(how: str, merges: list, tokens: Tensor, image: int, patch: int) -> Tensor:
    *steps, (place,) = followed(merges, image, patch)
    state = tokens[image, place]
    if how == "last":
        return next((before for before, moved, _ in steps if moved), state)
    return state + sum(before - after for before, _, after in steps) if how == "residual" else state


@pytest.mark.parametrize("how", ["target", "residual", "last"])
def test_every_patch_gets_what_the_rule_says(how: str) -> None:
    bb = backbone()
    model, block = Recorded(bb, PAIRS, how), 3
    model.merges = []
    got = model.features(images(), (block,))[0].flatten(2).transpose(1, 2)
    x, size = bb.embed(images()).tokens, torch.ones(4, 36)
    for index in range(block + 1):
        x, size = model.block(index, x, size)
    merges = model.merges[:3]  # the same run was recorded twice: once for features, once here
    places = [[expected(how, merges, x[:, 1:], image, patch) for patch in range(36)] for image in range(4)]
    torch.testing.assert_close(got, bb.norm(torch.stack([torch.stack(each) for each in places])), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("how", ["target", "residual", "last"])
@pytest.mark.parametrize("name", ["vit", "deit-distilled"])
def test_without_merging_they_are_the_dense_features(name: str, how: str) -> None:
    bb, batch = adapt(built(name)), photos(name)
    got = UnmergingToMe(bb, (0,) * bb.depth, how).features(batch, (1, 4))
    dense = bb.model.forward_intermediates(batch, indices=[1, 4], norm=True, intermediates_only=True)
    torch.testing.assert_close(got, dense, rtol=1e-4, atol=1e-5)


def test_identical_patches_are_restored_exactly() -> None:
    """All patches equal, in a model without positions: merging loses nothing."""
    bb = backbone()
    bb.model.pos_embed.data[:, 1:] = bb.model.pos_embed[:, 1:2].clone()
    batch = torch.ones(2, *images().shape[1:])
    got = UnmergingToMe(bb, (10, 5, 3, 0, 0), "target").features(batch, (4,))
    dense = bb.model.forward_intermediates(batch, indices=[4], norm=True, intermediates_only=True)
    torch.testing.assert_close(got, dense, rtol=1e-3, atol=1e-4)


def test_features_leave_nothing_behind_for_the_next_call() -> None:
    model = UnmergingToMe(backbone(), PAIRS)
    first = model.features(images(), (4,))[0]
    model(images())
    torch.testing.assert_close(model.features(images(), (4,))[0], first)


def test_a_run_that_fails_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    model = UnmergingToMe(backbone(), PAIRS)
    expected = model(images())
    with monkeypatch.context() as patch:
        patch.setattr(model.backbone, "norm", lambda _: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            model.features(images(), (3,))
    assert torch.equal(model(images()[:2]), expected[:2])
