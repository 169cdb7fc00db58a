"""Fixtures that every test gets or may ask for."""

import os
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy
import pytest
import torch
from faults import Fault
from planted import copies

INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"

torch.set_num_threads(1)  # two threads are slower than one on matrices this small

if INTERPRET:
    import bf16
    import guard
    from triton.runtime import interpreter

    bf16.install()
    guard.install()

    def _dot(self, a, b, acc, *_):
        """A tile's product, rounded once. By NumPy's BLAS, a @ b and b.T @ a.T differ, on some processors more."""
        product = numpy.matmul(a.data.astype(numpy.float64), b.data.astype(numpy.float64)) + acc.data
        return interpreter.TensorHandle(product.astype(acc.data.dtype), acc.dtype.scalar)

    interpreter.InterpreterBuilder.create_dot = _dot
    patch_tensor = interpreter._patch_lang_tensor

    def _patch_lang_tensor(tensor, scope):
        """Triton 3.6 makes an integer of an array of one element, which NumPy refuses from 2.5 on; 3.7 does not."""
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = _patch_lang_tensor


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


@pytest.fixture
def copy_of(tmp_path: Path) -> Callable[..., ModuleType]:
    """copy_of(file, fault, top): the module `top` of kernels/, the file itself unless named, that sees the fault.

    The file is one of kernels/: "norm", or "kernels/norm" as a fault has it.
    """

    def copy(file: str, fault: Fault | None = None, top: str = "") -> ModuleType:
        file = file.removeprefix("kernels/")
        return copies(file, top or file, tmp_path, fault)

    return copy
