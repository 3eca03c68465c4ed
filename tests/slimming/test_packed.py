"""All implementations of packed attention give equal results; a slow function stands for the GPU kernel."""

from __future__ import annotations

import inspect
from functools import partial
from itertools import pairwise

import pytest
import torch
from families import START, fresh, photos

from patchlife import LifeConfig, wrap
from patchlife.slimming import merging
from patchlife.slimming.run import adaptive, packed
from patchlife.slimming.run.packed import packed_attention

OFFSETS = (0, 5, 41, 42, 75, 140)


@pytest.fixture
def qkv():
    draw = torch.Generator().manual_seed(0)
    return [torch.randn(OFFSETS[-1], 3, 16, generator=draw) for _ in range(3)]


@pytest.fixture(params=[False, True], ids=["plain", "bias"])
def bias(request):
    size = torch.randint(1, 40, (OFFSETS[-1],), generator=torch.Generator().manual_seed(1))
    return 0.75 * size.float().log() if request.param else None


def slow_kernel(q, k, v, begin_q, begin_k, longest_q, longest_k, *, scale, num_splits):
    """The definition of torch.nn.attention.varlen.varlen_attn."""
    assert begin_q.dtype == torch.int32
    assert torch.equal(begin_q, begin_k)
    assert longest_q == longest_k == max(b - a for a, b in pairwise(begin_q.tolist()))
    assert q.shape[-1] % 8 == 0
    assert num_splits == 1, "an image's result must not depend on the other images of the batch"
    out = torch.empty_like(v)
    for a, b in pairwise(begin_q.tolist()):
        logits = torch.einsum("qhd,khd->hqk", q[a:b].float(), k[a:b].float()) * scale
        out[a:b] = torch.einsum("hqk,khd->qhd", logits.softmax(-1), v[a:b].float()).to(v.dtype)
    return out


def test_groups_equal_the_loop(qkv, bias):
    expected = packed_attention(OFFSETS, bias, qkv[0])(*qkv)
    groups = packed._groups(OFFSETS, qkv[0].device)
    assert 1 < len(groups) < len(OFFSETS) - 1, "some images must share a group, not all"
    torch.testing.assert_close(packed._in_groups(groups, bias, *qkv), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_kernel_gets_the_bias_as_channels(qkv, bias, dtype):
    q, k, v = (t.to(dtype) for t in qkv)
    expected = packed_attention(OFFSETS, bias, qkv[0])(q.float(), k.float(), v.float())
    begin = torch.tensor(OFFSETS, dtype=torch.int32)
    channels = None if bias is None else packed.BiasChannels(bias)
    for _ in range(2):  # the second time with the same channels
        out = packed.varlen_attention(slow_kernel, begin, packed._longest(OFFSETS), channels, q, k, v)
    assert out.shape == q.shape
    assert out.dtype == dtype
    close = {"atol": 1e-5, "rtol": 1e-5} if dtype == torch.float32 else {"atol": 2e-2, "rtol": 2e-2}
    torch.testing.assert_close(out.float(), expected, **close)


@pytest.mark.parametrize("name", ["vit", "eva02"])
def test_adaptive_mode_as_on_a_gpu_gives_the_same_logits(name, monkeypatch):
    vit = fresh(name)
    model = wrap(vit, LifeConfig(0.65, start=START)).calibrate([photos(name, 8, seed=1)]).set_mode("adaptive")
    expected = model(photos(name))

    def attention(offsets, bias, like, begins):
        channels = packed.BiasChannels(bias)
        return partial(packed.varlen_attention, slow_kernel, begins.int(), packed._longest(offsets), channels)

    monkeypatch.setattr(adaptive, "packed_attention", attention)
    monkeypatch.setattr(merging, "adds_in_order", lambda x: False)
    torch.testing.assert_close(model(photos(name)), expected, atol=1e-4, rtol=1e-4)


def test_the_kernel_is_called_as_torch_defines_it():
    varlen = pytest.importorskip("torch.nn.attention.varlen").varlen_attn
    taken = set(inspect.signature(varlen).parameters) & {"scale", "num_splits"}
    inspect.signature(varlen).bind(*range(7), **dict.fromkeys(taken, 1))


@pytest.mark.parametrize("known", [(), ("scale",), ("scale", "num_splits")])
def test_kernels_of_older_torch_give_the_same(qkv, bias, known):
    """The kernel of torch 2.10 has no argument scale, that of 2.11 no num_splits."""

    def older(q, *others, **options):
        assert set(options) == set(known)
        return slow_kernel(q, *others, **{"scale": q.shape[-1] ** -0.5, "num_splits": 1} | options)

    names = ["q", "k", "v", "cu_seq_q", "cu_seq_k", "max_q", "max_k", *known]
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    older.__signature__ = inspect.Signature([inspect.Parameter(name, kind) for name in names])
    offsets = torch.tensor(OFFSETS, dtype=torch.int32)
    channels = None if bias is None else packed.BiasChannels(bias)
    actual = packed.varlen_attention(packed.as_called(older), offsets, packed._longest(OFFSETS), channels, *qkv)
    torch.testing.assert_close(actual, packed_attention(OFFSETS, bias, qkv[0])(*qkv), atol=1e-5, rtol=1e-5)


def test_a_cpu_uses_the_loop(qkv, monkeypatch):
    monkeypatch.setattr(packed, "varlen_kernel", lambda like: pytest.fail("looked for a GPU kernel"))
    monkeypatch.setattr(packed, "_groups", lambda *_: pytest.fail("made groups on a CPU"))
    packed_attention(OFFSETS, None, qkv[0])(*qkv)


class GpuTensor:
    """The attributes of a tensor on a GPU that the choice of an implementation reads."""

    is_cuda = True

    def __init__(self, dtype):
        self.dtype, self.device = dtype, torch.device("cpu")


@pytest.mark.parametrize(
    ("dtype", "capability", "implementation"),
    [
        (torch.bfloat16, 9, "varlen_attention"),
        (torch.float16, 8, "varlen_attention"),
        (torch.bfloat16, 7, "_in_groups"),
        (torch.float32, 9, "_in_groups"),
    ],
)
def test_the_implementation_on_a_gpu_depends_on_dtype_and_capability(monkeypatch, dtype, capability, implementation):
    if implementation == "varlen_attention":
        pytest.importorskip("torch.nn.attention.varlen", reason="torch 2.9 has no variable-length kernel")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (capability, 0))
    assert packed_attention(OFFSETS, None, GpuTensor(dtype)).func is getattr(packed, implementation)
