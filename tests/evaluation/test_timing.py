from __future__ import annotations

import gc
import json

import pytest
import torch

import patchlife.evaluation.timing as timing
from patchlife.errors import ConfigError
from patchlife.evaluation.timing import Spread, alternate, conditions


class Clock:
    """Time that only passes when somebody works."""

    def __init__(self, monkeypatch) -> None:
        self.now, self.calls = 0.0, []
        monkeypatch.setattr(timing.time, "perf_counter", lambda: self.now)

    def worker(self, name: str, *seconds: float):
        """A function that takes so many seconds, the last of them ever after."""
        left = list(seconds)

        def work() -> None:
            self.calls.append(name)
            self.now += left.pop(0) if len(left) > 1 else left[0]

        return work


@pytest.fixture
def clock(monkeypatch) -> Clock:
    return Clock(monkeypatch)


def test_they_take_turns_and_warm_up_does_not_count(clock):
    runs = {"dense": clock.worker("d", 100, 3), "slimmed": clock.worker("s", 100, 2)}
    found = alternate(runs, rounds=6, warmup=1)
    assert clock.calls == ["d", "s"] + ["d", "s", "s", "d"] * 3, "every second round goes backwards"
    assert found.seconds["dense"] == Spread(3, 3, 3)
    assert found.ratios["slimmed"] == Spread(1.5, 1.5, 1.5)
    assert found.ratios["dense"].median == 1
    assert found.verdict("slimmed") == "1.50x (1.50x to 1.50x)"
    assert (found.conditions["rounds"], found.conditions["warmup"], found.conditions["reference"]) == (6, 1, "dense")


def test_ratios_are_taken_pair_by_pair(clock):
    slow_spells = [1, 8, 1, 1, 9, 1]  # that hit both
    runs = {"a": clock.worker("a", *slow_spells), "b": clock.worker("b", *(t / 2 for t in slow_spells))}
    found = alternate(runs, rounds=6, warmup=0)
    assert found.ratios["b"] == Spread(2, 2, 2)
    assert found.seconds["a"].noisy
    assert found.noisy == []


@pytest.mark.parametrize("others", ["", "a", "ab", "abc", "abcd"])
def test_the_first_runs_beside_each_other_one(clock, others):
    found = alternate({name: clock.worker(name, 1) for name in "f" + others}, rounds=5, warmup=0)
    forth = {"": "f", "a": "fa", "ab": "fabf", "abc": "fabfc", "abcd": "fabfcdf"}[others]
    assert "".join(clock.calls) == forth + forth[::-1] + forth + forth[::-1] + forth
    assert found.conditions["rounds"] == 5


def test_a_machine_that_slows_down_within_a_round_makes_nobody_slower(clock):
    """Every call takes a tenth longer than the one before, and the others half of what the first would take."""
    pace = [1.0]

    def worker(share: float):
        def work() -> None:
            clock.now += share * pace[0]
            pace[0] *= 1.1

        return work

    found = alternate({"d": worker(1), "a": worker(0.5), "b": worker(0.5), "c": worker(0.5)}, rounds=6, warmup=0)
    for name in "abc":
        assert found.ratios[name].median == pytest.approx(2, rel=0.12)


def test_what_is_too_noisy_is_not_stated(clock):
    found = alternate({"a": clock.worker("a", 1), "b": clock.worker("b", 1, 3, 1, 2, 1, 3)}, rounds=6, warmup=0)
    assert found.verdict("b").startswith("too noisy to say (0.33x to 1.00x)")
    assert found.noisy == found.to_dict()["noisy"] == ["b"]


def test_patience_ends_it_but_never_before_five_rounds(clock):
    found = alternate({"a": clock.worker("a", 10), "b": clock.worker("b", 10)}, rounds=50, warmup=0, patience=30)
    assert found.conditions["rounds"] == 5
    found = alternate({"a": clock.worker("a", 10), "b": clock.worker("b", 10)}, rounds=50, warmup=0, patience=130)
    assert found.conditions["rounds"] == 7


def test_percentiles():
    assert Spread.of(list(range(11))) == Spread(5, 1, 9)
    assert not Spread(1, 0.9, 1.3).noisy
    assert Spread(1, 0.9, 1.4).noisy
    assert Spread(1, 0.9, float("nan")).noisy


def test_the_device_is_waited_for_around_every_call(monkeypatch, clock):
    waits = []
    monkeypatch.setattr(timing, "synchronise", lambda device: waits.append(len(clock.calls)))
    alternate({"a": clock.worker("a", 1), "b": clock.worker("b", 1)}, rounds=5, warmup=1)
    assert waits == [n for call in range(12) for n in (call, call + 1)]


def test_synchronise_reaches_the_device(monkeypatch):
    seen = []
    monkeypatch.setattr(torch.cuda, "synchronize", seen.append)
    monkeypatch.setattr(torch.mps, "synchronize", lambda: seen.append("mps"))
    for device in ("cpu", torch.device("cuda:0"), "mps"):
        timing.synchronise(device)
    assert seen == [torch.device("cuda:0"), "mps"]


def test_garbage_waits_and_gradients_are_off(clock):
    seen = []

    def look() -> None:
        seen.append((gc.isenabled(), torch.is_grad_enabled()))
        clock.now += 1

    alternate({"a": look}, rounds=5, warmup=0)
    assert set(seen) == {(False, False)}
    assert gc.isenabled()


def test_garbage_collection_comes_back_after_an_error():
    with pytest.raises(ZeroDivisionError):
        alternate({"a": lambda: 1 / 0}, rounds=5)
    assert gc.isenabled()


def test_conditions_travel_along(clock):
    found = alternate({"a": clock.worker("a", 1)}, rounds=5, about={"batch": 16, "dtype": "float32"})
    about = json.loads(json.dumps(found.to_dict()))["conditions"]
    assert about["batch"] == 16
    assert about["torch"] == torch.__version__
    assert {"device", "cpu", "threads", "timm", "python", "omp_wait_policy", "load"} <= about.keys()
    assert conditions()["device"] == "cpu"


@pytest.mark.parametrize(("runs", "rounds"), [({}, 9), ({"a": int}, 4)])
def test_too_little_to_say_anything(runs, rounds):
    with pytest.raises(ConfigError, match="at least 5 rounds"):
        alternate(runs, rounds)


@pytest.mark.slow
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_on_a_gpu_the_work_itself_is_timed():
    large = torch.randn(4096, 4096, device="cuda")
    small = large[:512, :512].contiguous()
    found = alternate({"large": lambda: large @ large, "small": lambda: small @ small}, device="cuda")
    assert found.ratios["small"].median > 5
