from __future__ import annotations

import gc
import json

import pytest
import torch

import patchlife.evaluation.timing as timing
from patchlife.errors import ConfigError
from patchlife.evaluation.timing import Spread, alternate, conditions


class Clock:
    """Replaces the clock; time passes only in its workers."""

    def __init__(self, monkeypatch) -> None:
        self.now, self.calls = 0.0, []
        monkeypatch.setattr(timing.time, "perf_counter", lambda: self.now)

    def worker(self, name: str, *seconds: float):
        """A function that takes these seconds, call by call; the last value is repeated."""
        left = list(seconds)

        def work() -> None:
            self.calls.append(name)
            self.now += left.pop(0) if len(left) > 1 else left[0]

        return work


@pytest.fixture
def clock(monkeypatch) -> Clock:
    return Clock(monkeypatch)


def test_functions_run_in_turns_and_warm_up_is_not_counted(clock):
    runs = {"dense": clock.worker("d", 100, 3), "slimmed": clock.worker("s", 100, 2)}
    timed = alternate(runs, rounds=6, warmup=1)
    assert clock.calls == ["d", "s"] + ["d", "s", "s", "d"] * 3, "every second round runs in reverse order"
    assert timed.seconds["dense"] == Spread(3, 3, 3)
    assert timed.ratios["slimmed"] == Spread(1.5, 1.5, 1.5)
    assert timed.ratios["dense"].median == 1
    assert timed.verdict("slimmed") == "1.50x (1.50x to 1.50x)"
    assert (timed.conditions["rounds"], timed.conditions["warmup"], timed.conditions["reference"]) == (6, 1, "dense")


def test_ratios_are_taken_pair_by_pair(clock):
    seconds = [1, 8, 1, 1, 9, 1]  # two slow rounds, for both
    runs = {"a": clock.worker("a", *seconds), "b": clock.worker("b", *(t / 2 for t in seconds))}
    timed = alternate(runs, rounds=6, warmup=0)
    assert timed.ratios["b"] == Spread(2, 2, 2)
    assert timed.seconds["a"].noisy
    assert timed.noisy == []


@pytest.mark.parametrize("others", ["", "a", "ab", "abc", "abcd"])
def test_the_first_function_runs_beside_each_of_the_others(clock, others):
    timed = alternate({name: clock.worker(name, 1) for name in "f" + others}, rounds=5, warmup=0)
    forward = {"": "f", "a": "fa", "ab": "fabf", "abc": "fabfc", "abcd": "fabfcdf"}[others]
    assert "".join(clock.calls) == forward + forward[::-1] + forward + forward[::-1] + forward
    assert timed.conditions["rounds"] == 5


def test_a_machine_that_slows_down_within_a_round_changes_no_ratio(clock):
    """Every call takes a tenth longer than the call before; the other functions take half of the first one's time."""
    slowness = [1.0]

    def worker(fraction: float):
        def work() -> None:
            clock.now += fraction * slowness[0]
            slowness[0] *= 1.1

        return work

    timed = alternate({"d": worker(1), "a": worker(0.5), "b": worker(0.5), "c": worker(0.5)}, rounds=6, warmup=0)
    for name in "abc":
        assert timed.ratios[name].median == pytest.approx(2, rel=0.12)


def test_a_noisy_ratio_is_not_stated(clock):
    timed = alternate({"a": clock.worker("a", 1), "b": clock.worker("b", 1, 3, 1, 2, 1, 3)}, rounds=6, warmup=0)
    assert timed.verdict("b").startswith("too noisy (0.33x to 1.00x)")
    assert timed.noisy == timed.to_dict()["noisy"] == ["b"]


def test_patience_ends_the_rounds_but_never_before_five(clock):
    timed = alternate({"a": clock.worker("a", 10), "b": clock.worker("b", 10)}, rounds=50, warmup=0, patience=30)
    assert timed.conditions["rounds"] == 5
    timed = alternate({"a": clock.worker("a", 10), "b": clock.worker("b", 10)}, rounds=50, warmup=0, patience=130)
    assert timed.conditions["rounds"] == 7


def test_percentiles():
    assert Spread.of(list(range(11))) == Spread(5, 1, 9)
    assert not Spread(1, 0.9, 1.3).noisy
    assert Spread(1, 0.9, 1.4).noisy
    assert Spread(1, 0.9, float("nan")).noisy


def test_the_device_is_synchronised_around_every_call(monkeypatch, clock):
    waits = []
    monkeypatch.setattr(timing, "synchronise", lambda device: waits.append(len(clock.calls)))
    alternate({"a": clock.worker("a", 1), "b": clock.worker("b", 1)}, rounds=5, warmup=1)
    assert waits == [n for call in range(12) for n in (call, call + 1)]


def test_synchronise_calls_the_function_of_the_device(monkeypatch):
    calls = []
    monkeypatch.setattr(torch.cuda, "synchronize", calls.append)
    monkeypatch.setattr(torch.mps, "synchronize", lambda: calls.append("mps"))
    for device in ("cpu", torch.device("cuda:0"), "mps"):
        timing.synchronise(device)
    assert calls == [torch.device("cuda:0"), "mps"]


def test_garbage_collection_and_gradients_are_off(clock):
    states = []

    def record() -> None:
        states.append((gc.isenabled(), torch.is_grad_enabled()))
        clock.now += 1

    alternate({"a": record}, rounds=5, warmup=0)
    assert set(states) == {(False, False)}
    assert gc.isenabled()


def test_garbage_collection_is_restored_after_an_error():
    with pytest.raises(ZeroDivisionError):
        alternate({"a": lambda: 1 / 0}, rounds=5)
    assert gc.isenabled()


def test_results_hold_their_conditions(clock):
    timed = alternate({"a": clock.worker("a", 1)}, rounds=5, metadata={"batch": 16, "dtype": "float32"})
    stored = json.loads(json.dumps(timed.to_dict()))["conditions"]
    assert stored["batch"] == 16
    assert stored["torch"] == torch.__version__
    assert {"device", "cpu", "threads", "timm", "python", "omp_wait_policy", "load"} <= stored.keys()
    assert conditions()["device"] == "cpu"


@pytest.mark.parametrize(("runs", "rounds"), [({}, 9), ({"a": int}, 4)])
def test_no_functions_or_too_few_rounds_are_refused(runs, rounds):
    with pytest.raises(ConfigError, match=f"at least 5 rounds, got {len(runs)} functions and {rounds} rounds"):
        alternate(runs, rounds)


@pytest.mark.slow
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_on_a_gpu_the_kernels_are_timed():
    large = torch.randn(4096, 4096, device="cuda")
    small = large[:512, :512].contiguous()
    timed = alternate({"large": lambda: large @ large, "small": lambda: small @ small}, device="cuda")
    assert timed.ratios["small"].median > 5
