"""Keys and values of sequences that grow by a token a step.

    prompts   cache.open(packed, slots); model(packed, cache)     each prompt run once, stored for all its samples
    a step    model.decode(tokens, cache)                         one further token of slots 0, 1, ..., B - 1
    an end    cache.keep(slots)                                   the survivors move to the front

The slots in use are always the first ones, in order, so a step reads them in place instead of gathering them.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..kernels import decode_attention
from .config import ModelConfig
from .packed import Packed


class Cache:
    """For each layer keys and values (slots, capacity, G, D), and a length for each slot.

    A slot holds all of its sequence, also where a layer's window no longer reaches back.
    """

    def __init__(
        self,
        config: ModelConfig,
        slots: int,
        capacity: int,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
    ):
        heads = config.num_attention_heads if config.latent else config.num_key_value_heads
        shape = (config.num_hidden_layers, slots, capacity, heads, config.head_dim)
        # zeros, not empty: a masked key meets a probability of 0, and 0 * NaN is NaN
        self.keys = torch.zeros(shape, dtype=dtype, device=device).unbind()
        self.values = torch.zeros(shape, dtype=dtype, device=device).unbind()
        self.capacity = capacity
        self.length = torch.zeros(slots, dtype=torch.int64, device=device)  # tokens that each slot holds
        self.slot = torch.arange(slots, device=device)
        self.adapter: Tensor | None = None  # (slots,) int32, where the model has several: Packed.adapter
        self.source: Tensor | None = None  # the rows of the running pass to store, None for all of them
        self.target = self.slot[:0]  # and where to: slot * capacity + position

    def open(self, packed: Packed, slots: Sequence[Sequence[int]]) -> None:
        """The next forward pass writes segment i of `packed` into each of slots[i], from position 0 on."""
        starts = packed.cu_seqlens.tolist()
        source: list[int] = []
        target: list[int] = []
        opened: list[int] = []
        lengths: list[int] = []
        for copies, start, end in zip(slots, starts[:-1], starts[1:], strict=True):
            for slot in copies:
                source += range(start, end)
                target += range(slot * self.capacity, slot * self.capacity + end - start)
            opened += copies
            lengths += [end - start] * len(copies)
        device = self.length.device
        self.length[torch.tensor(opened, device=device)] = torch.tensor(lengths, device=device)
        if packed.adapter is not None:
            if self.adapter is None:
                self.adapter = torch.full_like(self.slot, -1, dtype=torch.int32)
            lasts = [end - 1 for copies, end in zip(slots, starts[1:], strict=True) for _ in copies]
            self.adapter[torch.tensor(opened, device=device)] = packed.adapter[
                torch.tensor(lasts, device=device)
            ]
        self.source, self.target = torch.tensor(source, device=device), torch.tensor(target, device=device)

    def grow(self, slots: int) -> Tensor:
        """Room for one token in each of the first slots; its position, (slots,). A full slot overwrites its last."""
        position = self.length[:slots].add_(1).clamp_(max=self.capacity) - 1
        self.source, self.target = None, self.slot[:slots] * self.capacity + position
        return position

    def write(self, layer: int, k: Tensor, v: Tensor) -> None:
        """Store k and v, (total, G, D), as `open` or `grow` said."""
        if self.source is not None:
            k, v = k[self.source], v[self.source]
        self.keys[layer].flatten(0, 1).index_copy_(0, self.target, k)
        self.values[layer].flatten(0, 1).index_copy_(0, self.target, v)

    def attend(
        self,
        layer: int,
        q: Tensor,
        window: int | None,
        scale: float | None = None,
        sinks: Tensor | None = None,
    ) -> Tensor:
        """q (B, H, D), the newest token of each of the first B slots, to (B, H, D)."""
        B = q.shape[0]
        keys, values = self.keys[layer][:B], self.values[layer][:B]
        return decode_attention(
            q, keys, values, self.slot[:B], self.length[:B], window=window, scale=scale, sinks=sinks
        )

    def keep(self, slots: Tensor) -> None:
        """Move these slots (n,), ascending, to the front; the others are free again."""
        n = slots.numel()
        longest = int(self.length[slots].max()) if n else 0
        for held in (*self.keys, *self.values):
            held[:n, :longest] = held[slots, :longest]
        self.length[:n] = self.length[slots]
        if self.adapter is not None:
            self.adapter[:n] = self.adapter[slots]
