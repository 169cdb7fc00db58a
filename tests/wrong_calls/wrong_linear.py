"""Wrong calls of lora_linear, lora_linears, nf4_linear and the 4-bit functions."""

from wrong import Wrong

CALLS: tuple[Wrong, ...] = ()
