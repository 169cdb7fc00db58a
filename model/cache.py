"""A cache of keys and values for sampling. A prompt is stored once, and its samples store only their own tokens.

    prompts   cache.open(packed, rows); model.prefill(packed, cache)    runs each prompt once, into a row of its own
    samples   cache.begin(slots, rows)                                  starts new sequences, each after its prompt
    a step    model.decode(tokens, cache)                               adds one token to slots 0, 1, ..., B - 1
    an end    cache.keep(slots)                                         moves survivors and their prompts to the front

    prompt rows     0 | p p p p p p . .      1 | p p p . . . . .          as long as the longest prompt
    slots           0 | a a a . .   1 | b . . . .   2 | c c c c .         as long as the most new tokens
    prompt            0               0               1                   slots 0 and 1 are samples of one prompt

The slots in use are always the first slots, in order, so that a step reads them in place. In memory a row has heads
before positions, so that the keys of one head are a matrix.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..kernels import decode_attention
from .config import ModelConfig
from .packed import Packed


def cache_bytes(
    config: ModelConfig, prompts: int, prompt_capacity: int, slots: int, capacity: int, dtype: torch.dtype
) -> int:
    """Return the bytes of a Cache's keys and values: 2 L G D numbers per token."""
    layers, heads, width = _shape(config)
    return (prompts * prompt_capacity + slots * capacity) * 2 * layers * heads * width * dtype.itemsize


def _shape(config: ModelConfig) -> tuple[int, int, int]:
    heads = config.num_attention_heads if config.latent else config.num_key_value_heads
    return config.num_hidden_layers, heads, config.attention_width


class Cache:
    """The keys and values of prompts and of sampled tokens, for each layer, and their lengths.

    Each layer has tensors of the shapes (prompts, prompt_capacity, G, D) and (slots, capacity, G, D). A row keeps all
    of its tokens, even if a layer's window no longer reaches them.
    """

    def __init__(
        self,
        config: ModelConfig,
        prompts: int,
        prompt_capacity: int,
        slots: int,
        capacity: int,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
    ):
        layers, heads, width = _shape(config)

        def rows(count: int, length: int) -> tuple[Tensor, ...]:
            # zeros, not empty: a masked key is multiplied by a probability of 0, and 0 * NaN is NaN
            tensors = torch.zeros(layers, count, heads, length, width, dtype=dtype, device=device)
            return tensors.transpose(2, 3).unbind()  # for each layer (count, length, heads, width)

        self.prompt_keys, self.prompt_values = rows(prompts, prompt_capacity), rows(prompts, prompt_capacity)
        self.keys, self.values = rows(slots, capacity), rows(slots, capacity)
        self.capacity = capacity

        # state of each slot, and of each prompt row
        self.slot = torch.arange(slots, device=device)
        self.length = torch.zeros(slots, dtype=torch.int64, device=device)  # the tokens in each slot
        self.prompt = torch.zeros_like(self.slot)  # the row of each slot's prompt
        self.prompt_length = torch.zeros_like(self.slot)
        self.row_length = torch.zeros(prompts, dtype=torch.int64, device=device)
        self.adapter: Tensor | None = None  # (slots,) int32, as Packed.adapter, if the model has several
        self.row_adapter: Tensor | None = None  # (prompts,)

        # the place where the current forward pass writes
        self.opening = False  # whether the current pass writes prompts
        self.target = self.slot[:0]  # (row * G + head) * capacity of the row + position

    @property
    def nbytes(self) -> int:
        """The size of the keys and values in bytes."""
        tensors = (*self.prompt_keys, *self.prompt_values, *self.keys, *self.values)
        return sum(x.numel() * x.element_size() for x in tensors)

    def open(self, packed: Packed, rows: Sequence[int]) -> None:
        """Make the next forward pass write segment i of `packed` into the prompt row rows[i], from position 0 on."""
        row = torch.tensor(rows, device=self.slot.device)  # (segments,)
        lengths = packed.cu_seqlens.diff().long()
        self.row_length[row] = lengths

        if packed.adapter is not None:
            if self.row_adapter is None:
                self.row_adapter = torch.full_like(self.row_length, -1, dtype=torch.int32)
                self.adapter = torch.full_like(self.slot, -1, dtype=torch.int32)
            self.row_adapter[row] = packed.adapter[packed.cu_seqlens[1:].long() - 1]

        self.opening = True
        self._aim(self.prompt_keys[0], row.repeat_interleave(lengths), packed.positions)

    def begin(self, slots: slice, rows: Tensor) -> None:
        """Empty these slots, and start a new sequence in each.

        rows: (slots,), the prompt rows whose prompts the sequences continue.
        """
        self.length[slots] = 0
        self.prompt[slots], self.prompt_length[slots] = rows, self.row_length[rows]
        if self.adapter is not None and self.row_adapter is not None:
            self.adapter[slots] = self.row_adapter[rows]

    def grow(self, slots: int) -> Tensor:
        """Make room for one more token in each of the first `slots` slots, and return the tokens' positions (slots,).

        In a full slot, the new token overwrites the last one.
        """
        last = self.length[:slots].add_(1).clamp_(max=self.capacity) - 1
        self.opening = False
        self._aim(self.keys[0], self.slot[:slots], last)
        return self.prompt_length[:slots] + last

    def _aim(self, like: Tensor, row: Tensor, position: Tensor) -> None:
        """Tell `write` where to store tokens: token i goes to row row[i], position position[i].

        like: a tensor with the shape of the tensors that `write` will store into.
        """
        _, length, G, _ = like.shape
        head = torch.arange(G, device=row.device)
        self.target = ((row[:, None] * G + head) * length + position[:, None]).flatten()  # (tokens * G,)

    def write(self, layer: int, k: Tensor, v: Tensor) -> None:
        """Store a layer's k and v (total, G, D) at the rows and positions that `open` or `grow` has set."""
        keys, values = (self.prompt_keys, self.prompt_values) if self.opening else (self.keys, self.values)
        for stored, new in ((keys[layer], k), (values[layer], v)):
            stored.transpose(1, 2).flatten(0, 2).index_copy_(0, self.target, new.reshape(-1, new.shape[-1]))

    def attend(
        self,
        layer: int,
        q: Tensor,
        window: int | None,
        scale: float | None = None,
        sinks: Tensor | None = None,
    ) -> Tensor:
        """Compute attention of the newest token in each of the first B slots to the cached keys of its sequence.

        q is (B, H, D), and the result is (B, H, D).
        """
        B = q.shape[0]
        return decode_attention(
            q,
            self.keys[layer][:B],
            self.values[layer][:B],
            self.slot[:B],
            self.length[:B],
            prefix_slot=self.prompt[:B],
            prefix_length=self.prompt_length[:B],
            k_prefix=self.prompt_keys[layer],
            v_prefix=self.prompt_values[layer],
            window=window,
            scale=scale,
            sinks=sinks,
        )

    def keep(self, slots: Tensor, rows: Sequence[int] = ()) -> list[int]:
        """Move these slots (n,), in ascending order, to the front, and free all other slots.

        Their prompts and the prompt rows in `rows` also move to the front. Returns the old indices of the prompt rows
        that were kept, in their new order.
        """
        n = slots.numel()
        needed = torch.cat([self.prompt[slots], self.prompt.new_tensor(rows)])
        rows_kept, row = needed.unique(return_inverse=True)
        _move((*self.keys, *self.values), slots, self.length)
        _move((*self.prompt_keys, *self.prompt_values), rows_kept, self.row_length)

        for state in (self.length, self.prompt_length, self.adapter):
            if state is not None:
                state[:n] = state[slots]
        for state in (self.row_length, self.row_adapter):
            if state is not None:
                state[: rows_kept.numel()] = state[rows_kept]
        self.prompt[:n] = row[:n]
        return rows_kept.tolist()


def _move(tensors: Sequence[Tensor], rows: Tensor, lengths: Tensor) -> None:
    """Move the rows numbered `rows` (n,) to the front of each tensor.

    Only positions below the length of the longest of these rows are copied. Leading rows that are already in place are
    not copied.
    """
    moved = (rows != torch.arange(rows.numel(), device=rows.device)).nonzero().squeeze(1)
    if not moved.numel():
        return
    first, rows = int(moved[0]), rows[int(moved[0]) :]
    longest = int(lengths[rows].max())
    for x in tensors:
        x[first : first + rows.numel(), :longest] = x[rows, :longest]
