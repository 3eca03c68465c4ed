"""Training mode: dropout, stochastic depth, patch dropout, checkpointing and training loops work as on the backbone."""

from __future__ import annotations

import copy
import socket
from typing import Any

import pytest
import timm
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from families import FAMILIES, FEW, fresh, liven, photos
from reference import assert_close
from slim_models import far_apart, slim
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import NativeScaler
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from versions import needs_timm

from patchlife import LifeConfig, SlimModel, wrap
from patchlife.slimming.regressor import LifeRegressor, LifeRegressors

DROPOUTS = {  # every kind of dropout in timm
    "drop_rate": 0.2,
    "pos_drop_rate": 0.1,
    "proj_drop_rate": 0.2,
    "attn_drop_rate": 0.3,
    "drop_path_rate": 0.3,
}


def with_dropout(name: str, **rates: float) -> nn.Module:
    """A family's small model with these dropout rates, in training mode."""
    family = FAMILIES[name]
    if family.since:
        needs_timm(*family.since)
    try:
        vit = family.make(family.entry, **family.arguments, **rates)
    except TypeError as error:  # a factory that does not accept all of them
        pytest.skip(str(error))
    return liven(vit).train()


def step(model: nn.Module, vit: nn.Module, images: Tensor) -> tuple[Tensor, dict[str, Tensor | None]]:
    """(logits, gradients of ``vit``) from one seed."""
    vit.zero_grad(set_to_none=True)
    torch.manual_seed(3)
    with torch.enable_grad():
        logits = model(images)
        (logits * torch.linspace(-1, 1, logits.shape[-1])).square().mean().backward()
    return logits.detach(), {n: None if p.grad is None else p.grad.clone() for n, p in vit.named_parameters()}


def assert_same_step(model: SlimModel, vit: nn.Module, images: Tensor) -> None:
    """From one seed, logits and gradients of ``model`` equal those of its backbone ``vit``."""
    logits, gradients = step(model, vit, images)
    expected_logits, expected_gradients = step(vit, vit, images)
    assert_close(logits, expected_logits)
    for name, gradient in expected_gradients.items():
        if gradient is None:
            assert gradients[name] is None, name
        else:
            assert_close(gradients[name], gradient)


@pytest.mark.contract("training")
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", FAMILIES)
def test_a_step_at_budget_one_equals_a_step_of_the_backbone(name: str, checkpointing: bool) -> None:
    vit, images = with_dropout(name, **DROPOUTS), photos(name)
    vit.set_grad_checkpointing(checkpointing)
    assert far_apart(vit(images), vit(images)), "dropout has no effect"
    assert_same_step(wrap(vit, LifeConfig(budget=1.0)), vit, images)


@pytest.mark.parametrize("name", FAMILIES)
def test_patch_dropout_at_budget_one(name: str) -> None:
    vit, images = with_dropout(name, patch_drop_rate=0.4), photos(name)
    assert vit.forward_features(images).shape[1] < vit.eval().forward_features(images).shape[1]
    vit.train()
    assert_same_step(wrap(vit, LifeConfig(budget=1.0)), vit, images)
    model = wrap(vit, LifeConfig(budget=1.0))
    torch.manual_seed(0)
    features = model.forward_features(images)
    torch.manual_seed(0)
    assert_close(features, vit.forward_features(images))


@pytest.mark.parametrize("variant", ["fixed", "fixed, merge"])
@pytest.mark.parametrize("name", [*FEW, "eva02", "dynamic-eva02", "dynamic"])
def test_with_patch_dropout_the_schedule_applies_to_the_remaining_patches(name: str, variant: str) -> None:
    vit, images = with_dropout(name, patch_drop_rate=0.5), photos(name)
    model = slim(name, variant, vit)
    entering: list[int] = []
    for block in vit.blocks:
        block.register_forward_pre_hook(lambda m, args: entering.append(args[0].shape[1] - vit.num_prefix_tokens))
    logits, _ = step(model, vit, images)
    patches = model.schedule(tuple(images.shape[-2:])).kept
    assert logits.isfinite().all()
    assert entering[0] < 0.6 * patches[0]
    assert entering == [max(1, n * entering[0] // patches[0]) for n in patches]
    assert model.eval()(images).shape == logits.shape


def test_attention_dropout_takes_effect_in_every_block() -> None:
    vit, images = with_dropout("vit", attn_drop_rate=0.5), photos("vit")
    model = slim("vit", "fixed, merge", vit)
    for block in vit.blocks:
        block.attn.attn_drop.p = 0.0
    assert torch.equal(model(images), model(images))
    vit.blocks[-1].attn.attn_drop.p = 0.5
    assert far_apart(model(images), model(images))


def test_checkpointing_saves_activations_at_a_budget_below_one() -> None:
    vit, images = fresh("vit").train(), photos("vit")
    model = slim("vit", "fixed, merge", vit)

    def saved_for_backward() -> int:
        saved: list[int] = []
        with (
            torch.enable_grad(),
            torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(t.numel()), t)[1], lambda t: t),
        ):
            model(images)
        return sum(saved)

    plain, (expected_logits, expected_gradients) = saved_for_backward(), step(model, vit, images)
    model.set_grad_checkpointing(True)
    assert saved_for_backward() < 0.4 * plain
    logits, gradients = step(model, vit, images)
    assert_close(logits, expected_logits)
    assert all(g is None or torch.allclose(g, gradients[n], atol=1e-6) for n, g in expected_gradients.items())


# ---- the scorer is trained by any loop


@pytest.mark.parametrize("budget", [0.65, 1.0])
@pytest.mark.parametrize("merge", [True, False])
def test_a_trainable_scorer_gets_gradients(budget: float, merge: bool) -> None:
    torch.manual_seed(0)
    model = wrap(fresh("vit").train(), LifeConfig(budget=budget, start=2, merge=merge), LifeRegressor(48, 1))
    with torch.enable_grad():
        model(photos("vit")).square().sum().backward()
    gradients = {n: p.grad for n, p in model.scorer.named_parameters()}
    assert all(g is not None for g in gradients.values())
    if budget < 1:
        assert all(g.abs().sum() > 0 for n, g in gradients.items() if n != "importance.bias")


def test_logits_do_not_depend_on_whether_the_scorer_is_trainable() -> None:
    torch.manual_seed(0)
    model = wrap(fresh("vit").train(), LifeConfig(budget=0.65, start=2), LifeRegressor(48, 1))
    with torch.enable_grad():
        logits = model(photos("vit")).detach()
        model.scorer.requires_grad_(False)
        assert_close(logits, model(photos("vit")).detach())
    assert_close(logits, model(photos("vit")))


def test_timms_training_loop() -> None:
    """timm's optimizer with layer decay, its scheduler and its loss scaler, as in timm's training script."""
    vit = fresh("vit").train()
    model, images, labels = slim("vit", "fixed, merge", vit), photos("vit", 8), torch.arange(8)
    optimizer = create_optimizer_v2(model, "adamw", lr=2e-3, weight_decay=0.05, layer_decay=0.8)
    scheduler, epochs = create_scheduler_v2(optimizer, "cosine", num_epochs=6)
    scaler, losses = NativeScaler(device="cpu"), []
    with torch.enable_grad():
        for epoch in range(min(6, epochs)):
            loss = nn.functional.cross_entropy(model(images), labels)
            optimizer.zero_grad()
            scaler(loss, optimizer, clip_grad=1.0, parameters=model.parameters())
            scheduler.step(epoch + 1)
            losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]


def test_an_accelerate_loop(tmp_path: Any) -> None:
    accelerate = pytest.importorskip("accelerate")
    accelerator = accelerate.Accelerator(cpu=True)
    torch.manual_seed(0)
    model = wrap(fresh("vit").train(), LifeConfig(budget=0.65, start=2), LifeRegressor(48, 1))
    data = torch.utils.data.TensorDataset(photos("vit", 8), torch.arange(8))
    loader = torch.utils.data.DataLoader(data, 4)
    model, optimizer, loader = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), 1e-3), loader)
    losses = []
    with torch.enable_grad():
        for _ in range(6):
            for images, labels in loader:
                loss = nn.functional.cross_entropy(model(images), labels)
                accelerator.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
            losses.append(loss.item())
    assert losses[-1] < losses[0]
    accelerator.save_state(str(tmp_path / "state"))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    model.head.weight.zero_()
    accelerator.load_state(str(tmp_path / "state"))
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize("start", [1, 2])
@torch.enable_grad()
def test_scorers_of_other_start_blocks_get_gradients_of_zero(start: int) -> None:
    """DistributedDataParallel waits for a gradient of every weight."""
    vit = fresh("vit").train()
    scorer = LifeRegressors(48, 1, (1, 2))
    wrap(vit, LifeConfig(budget=0.8, start=start), scorer)(photos("vit")).square().sum().backward()
    for other in scorer.starts:
        gradients = [parameter.grad for parameter in scorer.at(other).parameters()]
        assert all(gradient is not None for gradient in gradients)
        assert any(gradient.any() for gradient in gradients) == (other == start)


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


CASES = [(0.7, False), (0.7, True), (1.0, True)]  # (budget, whether the scorer is a trainable life regressor)


def _two_workers(rank: int, port: int, out: str) -> None:
    """Run by each of two processes: distances between a distributed model and one that got all images itself."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    torch.manual_seed(0)
    vit = liven(
        timm.models.VisionTransformer(img_size=32, patch_size=8, embed_dim=48, depth=4, num_heads=3, num_classes=5)
    ).train()
    images = torch.randn(4, 3, 32, 32)
    distances = {case: _replicated(vit, images, rank, *case) for case in CASES}
    distances |= {f"sharded {learned}": _sharded(vit, images, learned) for learned in (False, True)}
    if rank == 0:
        torch.save(distances, out)
    dist.destroy_process_group()


def _replicated(vit: nn.Module, images: Tensor, rank: int, budget: float, learned: bool) -> float:
    model = wrap(copy.deepcopy(vit), LifeConfig(budget=budget, start=1), LifeRegressor(48, 1) if learned else None)
    alone = copy.deepcopy(model)
    both = DistributedDataParallel(model)
    for module, batches in ((both, [images[rank::2]]), (alone, [images[0::2], images[1::2]])):
        optimizer = torch.optim.SGD(module.parameters(), 1e-2)
        for _ in range(3):
            optimizer.zero_grad()
            sum(module(batch).square().mean() / len(batches) for batch in batches).backward()
            optimizer.step()
    pairs = zip(model.parameters(), alone.parameters(), strict=True)
    return max(float((a - b).detach().abs().max()) for a, b in pairs)


def _sharded(vit: nn.Module, images: Tensor, learned: bool) -> float:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (2,))
    model = wrap(copy.deepcopy(vit), LifeConfig(budget=0.7, start=1), LifeRegressor(48, 1) if learned else None)
    expected = copy.deepcopy(model)(images).detach()
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    logits = model(images)
    logits.square().sum().backward()
    assert all(p.grad is not None for n, p in model.named_parameters() if n != "scorer.importance.bias")
    return float((logits.detach() - expected).abs().max())


def test_two_processes_equal_one(tmp_path: Any) -> None:
    """DistributedDataParallel waits for a gradient of every weight, also of a scorer that did not run; FSDP shards the
    weights that the scorer reads."""
    out = tmp_path / "distances.pt"
    mp.spawn(_two_workers, (_free_port(), str(out)), 2)
    distances = torch.load(out)
    assert len(distances) == 5
    assert max(distances.values()) < 1e-5, distances
