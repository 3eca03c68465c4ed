"""How every test runs: on one thread, with gradients only where something learns; and what test folders share."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings, strategies

TESTS = Path(__file__).parent
NO_GRADIENTS = tuple(
    TESTS / folder for folder in ("adapters", "backbones", "benchmarks/baselines", "export", "runtime", "slimming")
)
"""Folders that never learn, or say where they do; elsewhere a test finds torch as a user finds it."""

# A busy machine is slow, not wrong: `timeout` in pyproject.toml ends what hangs.
settings.register_profile("any machine", settings(), deadline=None)
settings.load_profile("any machine")


def pytest_configure() -> None:
    """Cores are shared by processes: the workers and whatever tests start take one thread each."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int | None:
    """A single file runs in this process, for a worker needs seconds to start; all else on every core."""
    return 0 if len(config.args) == 1 and ".py" in config.args[0] else None


def pytest_collection_finish() -> None:
    """Modules and tests stay to the end: looking for garbage among them again and again was a seventh of the time."""
    wake_hypothesis()
    gc.collect()
    gc.freeze()


@settings(max_examples=1, database=None)
@given(strategies.none())
def wake_hypothesis(_: None) -> None:
    """Its first run looks for holders of its random state, and frozen ones are not found (seen where CI is set)."""


def pytest_sessionfinish() -> None:
    gc.unfreeze()


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Exports that are kept by content: never the user's, and not another worker's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATCHLIFE_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(autouse=True)
def one_thread(request: pytest.FixtureRequest) -> Iterator[None]:
    """Tiny models run fastest on one thread, and mostly without gradients."""
    import torch  # seconds that the process which only hands out tests can do without

    torch.set_num_threads(1)
    with torch.set_grad_enabled(not any(request.path.is_relative_to(folder) for folder in NO_GRADIENTS)):
        yield


@pytest.fixture(scope="session")
def shared() -> Path:
    """The local folder with real weights and photos; PATCHLIFE_SHARED says where, if not next to the repo."""
    folder = Path(os.environ.get("PATCHLIFE_SHARED") or TESTS.parents[1] / "shared")
    if not (folder / "data").is_dir():
        pytest.skip("no local folder with the shared data")
    return folder
