"""What every other test relies on, in whichever process it runs."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings

import pytest
import torch

from patchlife.export.cache import cache_folder


def test_warnings_are_errors() -> None:
    with pytest.raises(UserWarning, match="anything"):
        warnings.warn("anything", stacklevel=1)


def test_the_cache_is_this_processes_own(tmp_path_factory: pytest.TempPathFactory) -> None:
    assert cache_folder().is_relative_to(tmp_path_factory.getbasetemp())


def test_one_thread_here_and_in_what_is_started() -> None:
    assert torch.get_num_threads() == 1
    code = "import torch; print(torch.get_num_threads())"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert int(said) == int(os.environ["OMP_NUM_THREADS"])


def test_gradients_are_there_as_for_a_user() -> None:
    assert torch.is_grad_enabled()
