"""Wrong calls of moe, sampling, norms, gated linear units and rotary embeddings."""

from wrong import Wrong

CALLS: tuple[Wrong, ...] = ()
