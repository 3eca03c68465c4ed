"""The test environment that all other tests rely on, in every worker process."""

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


def test_the_cache_folder_belongs_to_this_process(tmp_path_factory: pytest.TempPathFactory) -> None:
    assert cache_folder().is_relative_to(tmp_path_factory.getbasetemp())


def test_one_thread_in_this_process_and_in_child_processes() -> None:
    assert torch.get_num_threads() == 1
    code = "import torch; print(torch.get_num_threads())"
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert int(output) == int(os.environ["OMP_NUM_THREADS"])


def test_gradients_are_enabled_outside_the_listed_folders() -> None:
    assert torch.is_grad_enabled()
