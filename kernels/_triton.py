"""Triton where it is installed; elsewhere a stand-in that lets the files that speak of it be imported.

On macOS and Windows, where PyTorch comes without Triton, CPU tensors take the torch path and need no more than this.
"""

from typing import Any

INSTALLED = True

try:
    import triton as triton
    import triton.language as tl
    from triton.tools.tensor_descriptor import TensorDescriptor as TensorDescriptor
except ModuleNotFoundError as error:
    if error.name != "triton":  # one that is installed and broken says what it lacks
        raise
    INSTALLED = False

    class _Missing:
        """Any name of Triton: it decorates kernels and annotates functions, and is not launched."""

        __file__ = ""
        __version__ = "not installed"

        def __getattr__(self, name: str) -> "_Missing":
            if name.startswith("__"):
                raise AttributeError(name)
            return self

        def __call__(self, *args: Any, **options: Any) -> "_Missing":
            return self

        def __ror__(self, other: Any) -> "_Missing":  # Tensor | TensorDescriptor
            return self

        __or__ = __ror__

    triton = tl = TensorDescriptor = _Missing()  # pyright: ignore[reportAssignmentType]


def expect_triton(what: str) -> None:
    """Raises ModuleNotFoundError, in one sentence, where Triton is not installed and `what` needs it."""
    if not INSTALLED:
        raise ModuleNotFoundError(
            f"{what}: expected Triton to be installed: pip install triton (on Windows triton-windows)",
            name="triton",
        )
