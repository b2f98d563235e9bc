"""Key/value slots: one row of cache per text, each at its own position, refilled without moving the others.

A text that ends leaves its slot to the next prompt at once (continuous batching). Rows are left-aligned: token ``p``
of a text sits at position ``p`` of its slot, so there is no left padding and no position arithmetic.
"""

from typing import Any

import torch as th
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

# Texts that are brought into their slots together: of similar length, so that little is padding.
PREFILL_ROWS = 16


class SlotLayer(CacheLayerMixin):  # type: ignore[misc]
    """Keys and values of one layer, ``[rows, heads, capacity, head_dim]``."""

    def __init__(self, n_rows: int, capacity: int) -> None:
        super().__init__()
        self.n_rows = n_rows
        self.capacity = capacity
        self.rows: Tensor | None = None
        self.positions: Tensor | None = None
        self.width = 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocate on first use, when heads, head size, dtype and device are known."""
        for name, states in (("keys", key_states), ("values", value_states)):
            shape = (self.n_rows, states.shape[1], self.capacity, states.shape[3])
            setattr(self, name, states.new_zeros(shape))
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Store new keys and values, and return those to attend to.

        :param key_states: ``[b, heads, q, head_dim]``
        :param value_states: likewise.
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if self.rows is not None:  # prefill: these rows from position 0 on; nothing lies before them
            width = key_states.shape[2]
            self.keys[self.rows, :, :width] = key_states
            self.values[self.rows, :, :width] = value_states
            return key_states, value_states
        assert self.positions is not None
        index = self.positions.view(-1, 1, 1, 1)
        self.keys.scatter_(2, index.expand_as(key_states), key_states)
        self.values.scatter_(2, index.expand_as(value_states), value_states)  # which may be of another size
        return self.keys[:, :, : self.width], self.values[:, :, : self.width]

    def get_seq_length(self) -> int:
        """0: positions are given with every call, never inferred."""
        return 0

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Keys a causal mask is made for, and their offset; asked for in a prefill only."""
        return query_length, 0

    def get_max_length(self) -> int:
        """Longest text a slot can hold."""
        return self.capacity

    get_max_cache_shape = get_max_length


class SlotCache(Cache):  # type: ignore[misc]
    """Slots of every layer, and the token ids that each row was filled with.

    :param config: the model's configuration, for its layers and how far each looks back.
    :param n_rows: texts written side by side.
    :param capacity: longest text, in tokens.
    :param device: where ids are compared.
    """

    layers: list[SlotLayer]

    def __init__(self, config: Any, n_rows: int, capacity: int, device: th.device) -> None:
        super().__init__(layers=[SlotLayer(n_rows, capacity) for _ in range(config.num_hidden_layers)])
        self.window: int | None = getattr(config, "sliding_window", None)
        self.layer_types: set[str] | None = set(getattr(config, "layer_types", None) or ()) or None
        self.n_rows = n_rows
        self.ids = th.full((n_rows, capacity), -1, device=device)
        self.filled = th.zeros(n_rows, dtype=th.long, device=device)
        self._columns = th.arange(capacity, device=device)

    def invalidate(self) -> None:
        """Trust no slot any more: weights have changed."""
        self.filled.zero_()

    def stale_rows(self, ids: Tensor, needed: Tensor) -> Tensor:
        """Rows whose slot does not hold the first ``needed`` tokens of their text.

        Ids are compared, not lengths: a new text may be as long as the old one.

        :param ids: ``[rows, capacity]``
        :param needed: ``[rows]``
        :return: indices ``[b]``
        """
        differs = ((ids != self.ids) & (self._columns < needed.unsqueeze(1))).any(dim=1)
        return th.nonzero(differs | (self.filled < needed)).view(-1)

    def begin_prefill(self, rows: Tensor) -> None:
        """The next forward pass brings texts of these rows, from their first token on."""
        for layer in self.layers:
            layer.rows = rows

    def begin_decode(self, positions: Tensor, width: int) -> Tensor | dict[str, Tensor]:
        """The next forward pass brings one token of every row.

        :param positions: ``[rows]``, where it stands in its text.
        :param width: slots positions to attend to, at least the largest position and one.
        :return: the attention mask ``[rows, 1, 1, width]``, true where a key may be seen; one for each kind of layer
            where there are layers that look back over a limited window.
        """
        for layer in self.layers:
            layer.rows, layer.positions, layer.width = None, positions, width
        columns, last = self._columns[:width], positions.unsqueeze(1)
        full = (columns <= last)[:, None, None, :]
        if self.window is None or (self.layer_types is not None and "sliding_attention" not in self.layer_types):
            return full
        recent = full & (columns > last - self.window)[:, None, None, :]
        return recent if self.layer_types is None else {"full_attention": full, "sliding_attention": recent}

    def remember(self, ids: Tensor, lengths: Tensor) -> None:
        """The slots now hold the first ``lengths`` ``[rows]`` tokens of ``ids`` ``[rows, capacity]``."""
        self.ids = ids
        self.filled = lengths.clone()  # the caller's may share memory with an observation, and this is overwritten


def additive(mask: Any, dtype: th.dtype) -> Any:
    """A mask that is added to attention scores, from one that says what may be seen; or several of them."""
    if isinstance(mask, dict):
        return {name: additive(part, dtype) for name, part in mask.items()}
    return th.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, -th.inf)
