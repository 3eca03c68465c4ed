"""Advice follows the measured times, and slimming that does not pay is never advised."""

from __future__ import annotations

import pytest
import torch
from families import built, photos

from patchlife import LifeConfig, SlimModel, wrap
from patchlife.backbones import adapt
from patchlife.benchmarks import schedule_search
from patchlife.benchmarks.schedule_search import BlockTimes, advise, candidates, fastest, settings_text, verdict
from patchlife.evaluation.threads import ThreadTimes
from patchlife.evaluation.timing import Spread, Timing
from patchlife.slimming.regressor import LifeRegressor

SCHEDULES = {
    "default": {"start": 3, "drops": [3, 6], "patches": ""},
    "fastest": {"start": 4, "drops": [4], "patches": ""},
}


def around(value: float) -> Spread:
    return Spread(value, 0.98 * value, 1.02 * value)


def test_block_times_are_interpolated() -> None:
    times = BlockTimes(adapt(built("vit")), {36: 4.0, 18: 2.0, 4: 1.0})
    assert times.block(1, 27) == pytest.approx(3.0)
    assert times.block(1, 2) == pytest.approx(1.0)  # below the smallest measured count the time is constant


def test_a_step_in_the_block_times_decides_the_schedule() -> None:
    """On a device that is fast up to 18 patches and slow above, one drop to 17 beats two drops with a slow block."""
    bb = adapt(built("vit"))
    times = BlockTimes(bb, {36: 10.0, 19: 9.9, 18: 1.0, 1: 0.9})
    model = SlimModel(bb, LifeConfig(budget=0.62)).eval()
    first, second, *_ = fastest(times, model, 0.62)
    assert first == (1, (1,)), "an early single drop lets most blocks run on 18 or fewer"
    assert second != first


def test_a_learned_scorer_keeps_its_start() -> None:
    bb = adapt(built("vit"))
    times = BlockTimes(bb, {36: 10.0, 1: 0.9})
    scorer = LifeRegressor(bb.dim, bb.prefix, 8, 4)
    model = SlimModel(bb, LifeConfig(budget=0.8, start=2), scorer).eval()
    keys = fastest(times, model, 0.8)
    assert len(keys) > 1
    assert {start for start, _ in keys} == {2}


def test_candidates_start_at_a_quarter_of_the_depth() -> None:
    keys = list(candidates(12))
    assert min(start for start, _ in keys) == 3
    assert (3, (3, 6)) in keys
    assert all(drops[0] == start for start, drops in keys)


def test_slimming_that_does_not_pay_is_refused() -> None:
    text, pays = verdict({"default": around(0.9), "fastest": around(1.0)}, SCHEDULES)
    assert not pays
    assert "does not pay" in text
    assert "stay with the dense model" in text


def test_the_default_is_kept_unless_something_is_clearly_faster() -> None:
    text, pays = verdict({"default": around(1.5), "fastest": around(1.52)}, SCHEDULES)
    assert pays
    assert text.startswith("the default schedule (start 3, drops 3, 6): 1.50x")
    text, _ = verdict({"default": around(1.5), "fastest": around(1.7)}, SCHEDULES)
    assert text.startswith("start 4, drops 4: 1.70x")
    assert "the default schedule reaches 1.50x" in text


def test_noise_gives_no_advice() -> None:
    text, pays = verdict({"default": Spread(1.5, 0.8, 2.0)}, SCHEDULES)
    assert "too noisy" in text
    assert not pays


@pytest.mark.parametrize("name", ["vit", "dinov3"])
def test_advice_is_made_from_what_was_timed(name: str) -> None:
    model = wrap(built(name))
    advice = advise(model, photos(name, 2), 0.65, few=2)
    schedules, ratios = advice["schedules"], {name: Spread(**values) for name, values in advice["ratios"].items()}
    assert (advice["verdict"], advice["pays"]) == verdict(ratios, schedules)
    assert {"default"} < set(ratios) <= {"default", "fastest", "second"}
    assert set(schedules) == set(ratios)
    keys = {name: (row["start"], tuple(row["drops"])) for name, row in schedules.items()}
    assert keys["default"] == (model.start, model.drops)
    assert len(set(keys.values())) == len(keys), "no schedule is timed twice"
    assert all(0.6 < row["flops"] <= 0.65 for row in schedules.values())
    assert list(advice["block_ms"]) == [4, 9, 14, 20, 25, 31, 36]
    assert all(milliseconds > 0 for milliseconds in advice["block_ms"].values())


def test_advice_names_the_schedule_that_was_measured_to_be_fastest(monkeypatch: pytest.MonkeyPatch) -> None:
    vit, images = built("vit"), photos("vit", 2)

    def given_times(runs: dict, **_: object) -> Timing:
        """Blocks take time in proportion to their patches; the second schedule by prediction is the fastest."""
        seconds = {name: around(float(name) if name.isdigit() else 1.0) for name in runs}
        ratios = {name: around(2.0 if name == "second" else 1.5) for name in runs}
        if "dense" in runs:
            assert all(run().shape == vit(images).shape for run in runs.values())
        return Timing(seconds, ratios, {})

    monkeypatch.setattr(schedule_search, "alternate", given_times)
    advice = advise(wrap(vit), images, 0.65, few=2)
    assert advice["pays"]
    assert advice["verdict"].startswith(f"{settings_text(advice['schedules']['second'])}: 2.00x the dense speed")


@pytest.mark.parametrize("engine", ["eager", "compile"])
def test_schedules_are_compared_on_the_best_number_of_threads(engine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiled code is made for one number of threads, so no other number is tried for it."""
    vit, images, present = built("vit"), photos("vit", 2), torch.get_num_threads()
    used: list[dict[str, int]] = []

    def given_times(runs: dict, threads: dict[str, int] | None = None, **_: object) -> Timing:
        used.append(threads or dict.fromkeys(runs, torch.get_num_threads()))
        spreads = {name: around(1.0) for name in runs}
        return Timing(spreads, spreads, {})

    def given_threads(runs: dict[str, dict]) -> dict[str, ThreadTimes]:
        assert {name: list(by_count) for name, by_count in runs.items()} == {"dense": [1, 3], "slimmed": [1, 3]}
        times = {1: around(2.0), 3: around(1.0)}
        return {"dense": ThreadTimes(times, 3), "slimmed": ThreadTimes(times, 1)}

    monkeypatch.setattr(schedule_search, "thread_counts", lambda: (1, 3))
    monkeypatch.setattr(schedule_search, "alternate", given_times)
    monkeypatch.setattr(schedule_search, "fastest_of", given_threads)
    monkeypatch.setattr(schedule_search, "prepared", lambda module, engine, images: lambda: module(images))
    advice = advise(wrap(vit), images, 0.65, engine)
    blocks, schedules = used
    dense, slimmed = (3, 1) if engine == "eager" else (present, present)
    assert set(blocks.values()) == {slimmed}
    assert schedules.pop("dense") == dense
    assert set(schedules.values()) == {slimmed}
    assert advice["threads"] == {"dense": dense, "slimmed": slimmed}
    assert advice["ms_by_threads"] == (
        {name: {"1": 2000.0, "3": 1000.0} for name in ("dense", "slimmed")} if engine == "eager" else {}
    )
    assert torch.get_num_threads() == present


def test_an_exported_graph_is_opened_for_each_number_of_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[int] = []

    def open_graph(*_: object) -> object:
        opened.append(torch.get_num_threads())
        return lambda: None

    def given_times(runs: dict, **_: object) -> Timing:
        spreads = {name: around(1.0) for name in runs}
        return Timing(spreads, spreads, {})

    monkeypatch.setattr(schedule_search, "thread_counts", lambda: (1, 3))
    monkeypatch.setattr(schedule_search, "prepared", open_graph)
    monkeypatch.setattr(schedule_search, "alternate", given_times)
    advise(wrap(built("vit")), photos("vit", 2), 0.65, "onnx", few=0)
    assert opened[:4] == [1, 3, 1, 3]


def test_advice_against_slimming_in_eager_mode_on_a_gpu_names_the_compiled_engine() -> None:
    gpu, cpu = torch.device("cuda"), torch.device("cpu")
    assert "--engine compile" in schedule_search._remark("eager", gpu, worthwhile=False)
    others = [("compile", gpu, False), ("eager", cpu, False), ("eager", gpu, True)]
    assert not any(schedule_search._remark(*other) for other in others)
