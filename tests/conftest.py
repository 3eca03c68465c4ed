"""Settings of all tests (one thread, no gradients in folders without training) and shared fixtures."""

from __future__ import annotations

import gc
import os
import random
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings, strategies

TESTS = Path(__file__).parent
NO_GRADIENTS = tuple(
    TESTS / folder for folder in ("adapters", "backbones", "benchmarks/baselines", "export", "runtime", "slimming")
)
"""Folders whose tests run without gradients, unless a test enables them. Elsewhere torch's default applies."""

# No deadline, because a busy machine is slow. `timeout` in pyproject.toml ends tests that hang.
settings.register_profile("any machine", settings(), deadline=None)
settings.load_profile("any machine")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--sample", type=int, metavar="N", help="run N parametrisations of each test, 4 N of a contract")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """With --sample N: of each test N random parametrisations at most, of a contract 4 N; always the same ones."""
    if not (limit := config.getoption("--sample")):
        return
    tests: dict[str, list[pytest.Item]] = defaultdict(list)
    for item in items:
        tests[item.nodeid.partition("[")[0]].append(item)
    left_out: set[pytest.Item] = set()
    for name, cases in tests.items():
        most = 4 * limit if cases[0].get_closest_marker("contract") else limit
        left_out.update(random.Random(name).sample(cases, max(0, len(cases) - most)))
    config.hook.pytest_deselected(items=list(left_out))
    items[:] = [item for item in items if item not in left_out]


def pytest_configure() -> None:
    """One thread per process: workers and processes that tests start share the cores."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int | None:
    """No workers for a single test file, because a worker takes seconds to start; otherwise one worker per core."""
    return 0 if len(config.args) == 1 and ".py" in config.args[0] else None


def pytest_collection_finish() -> None:
    """Exclude modules and tests from garbage collection: scanning them took a seventh of the run time."""
    initialise_hypothesis()
    gc.collect()
    gc.freeze()


@settings(max_examples=1, database=None)
@given(strategies.none())
def initialise_hypothesis(_: None) -> None:
    """Run hypothesis once before objects are frozen: its first run searches for references to its random state.

    It does not find frozen objects and then warns (if the environment variable CI is set).
    """


def pytest_sessionfinish() -> None:
    gc.unfreeze()


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A cache folder for exported files that neither the user nor another worker uses."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATCHLIFE_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(autouse=True)
def one_thread(request: pytest.FixtureRequest) -> Iterator[None]:
    """One thread, which is fastest for tiny models, and no gradients in `NO_GRADIENTS`."""
    import torch  # imported here: the process that only distributes tests does not need torch

    torch.set_num_threads(1)
    with torch.set_grad_enabled(not any(request.path.is_relative_to(folder) for folder in NO_GRADIENTS)):
        yield


@pytest.fixture(scope="session")
def shared() -> Path:
    """Local folder with real weights and photos: PATCHLIFE_SHARED, or the folder "shared" beside the repository."""
    folder = Path(os.environ.get("PATCHLIFE_SHARED") or TESTS.parents[1] / "shared")
    if not (folder / "data").is_dir():
        pytest.skip("no local folder with the shared data")
    return folder
