"""Triton where it is installed, and elsewhere a stand-in with which the kernel files can still be imported.

On macOS and Windows PyTorch comes without Triton. CPU tensors then take the torch path, which needs only the stand-in.
"""

from typing import Any

INSTALLED = True

try:
    import triton as triton
    import triton.language as tl
    from triton.tools.tensor_descriptor import TensorDescriptor as TensorDescriptor
except ModuleNotFoundError as error:
    if error.name != "triton":  # Triton is installed but broken, and its own message names the missing module
        raise
    INSTALLED = False

    class _Missing:
        """A stand-in for any name in Triton. It can decorate kernels and annotate functions, but launches nothing."""

        __file__ = ""
        __version__ = "not installed"

        def __getattr__(self, name: str) -> "_Missing":
            if name.startswith("__"):
                raise AttributeError(name)
            return self

        def __call__(self, *args: Any, **options: Any) -> "_Missing":
            return self

        def __ror__(self, other: Any) -> "_Missing":  # for annotations: Tensor | TensorDescriptor
            return self

        __or__ = __ror__

    triton = tl = TensorDescriptor = _Missing()  # pyright: ignore[reportAssignmentType]


def expect_triton(what: str) -> None:
    """Raise ModuleNotFoundError if Triton is not installed. `what` is the thing that needs it, for the message."""
    if not INSTALLED:
        raise ModuleNotFoundError(
            f"{what}: expected Triton to be installed: pip install triton (on Windows triton-windows)",
            name="triton",
        )
