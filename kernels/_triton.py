"""Triton where it is installed; elsewhere a stand-in that lets the kernel files be imported.

On macOS and Windows, where PyTorch comes without Triton, CPU tensors take the torch path and need no more than this.
"""

from typing import Any

try:
    import triton as triton
    import triton.language as tl
    from triton.tools.tensor_descriptor import TensorDescriptor as TensorDescriptor
except ModuleNotFoundError as error:
    if error.name != "triton":  # one that is installed and broken says what it lacks
        raise

    class _Missing:
        """Any name of Triton: it decorates and annotates kernels, and is not launched."""

        def __getattr__(self, name: str) -> "_Missing":
            if name.startswith("__"):
                raise AttributeError(name)
            return self

        def __call__(self, *args: Any, **options: Any) -> "_Missing":
            return self

        def __getitem__(self, grid: Any) -> Any:
            raise ModuleNotFoundError(
                "triton: expected it installed where tensors are on a GPU: pip install triton", name="triton"
            )

    triton = tl = TensorDescriptor = _Missing()  # pyright: ignore[reportAssignmentType]
