"""Fixtures that every test gets or may ask for."""

from pathlib import Path

import numpy
import pytest
import torch
from burnish.kernels._launch import INTERPRET

torch.set_num_threads(1)  # two threads are slower than one on matrices this small

if INTERPRET:
    from triton.runtime import interpreter

    def _dot(self, a, b, acc, *_):
        """A tile's product, rounded once. By NumPy's BLAS, a @ b and b.T @ a.T differ, on some processors more."""
        product = numpy.matmul(a.data.astype(numpy.float64), b.data.astype(numpy.float64)) + acc.data
        return interpreter.TensorHandle(product.astype(acc.data.dtype), acc.dtype.scalar)

    interpreter.InterpreterBuilder.create_dot = _dot


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
