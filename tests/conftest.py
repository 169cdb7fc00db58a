"""Fixtures that every test gets or may ask for."""

from pathlib import Path

import pytest
import torch

torch.set_num_threads(1)  # two threads are slower than one on matrices this small


@pytest.fixture(autouse=True)
def poison_uninitialised_memory():
    """torch.empty returns NaN: a kernel that leaves a hole in its output fails instead of passing by luck."""
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture
def data() -> Path:
    """The small golden files that the repository carries."""
    return Path(__file__).parent / "data"


@pytest.fixture
def shared_data() -> Path:
    """Real data that may not be committed: it lies beside the checkout, or the test is skipped."""
    folder = Path(__file__).resolve().parents[2] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"real data not present: {folder}")
    return folder
