"""Wrong calls of flash_attention and decode_attention."""

from burnish.kernels import flash_attention
from wrong import Wrong, int32, randn

Q, K = randn(12, 4, 16), randn(12, 2, 16, seed=1)


def packed(**changed):
    return lambda: flash_attention(**{"q": Q, "k": K, "v": K, "cu_seqlens": int32(0, 12), **changed})


CALLS = (
    Wrong("attention: window 0", packed(window=0), "window: expected at least 1, got 0"),
    Wrong("attention: softcap 0", packed(softcap=0), "softcap: expected a positive number, got 0"),
)
