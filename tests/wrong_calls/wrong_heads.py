"""Wrong calls of token_logprobs, token_divergence, topk_logprobs and topk_divergence."""

from wrong import Wrong

CALLS: tuple[Wrong, ...] = ()
