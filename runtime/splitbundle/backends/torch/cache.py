"""The KV cache of a stage: the tensors that hold the keys and values of past positions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from splitbundle.backends.torch.positions import Positions
from splitbundle.format.architecture.decoder import Architecture
from splitbundle.stages.call import CacheState


class KVCache(CacheState):
    """The keys and values of a stage's layers. The slot of a token is its position."""

    def __init__(
        self,
        architecture: Architecture,
        layers: tuple[int, int],
        batch_size: int,
        capacity: int,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        super().__init__(architecture, layers, batch_size, capacity)
        self.device, self.dtype = device, dtype
        self.keys: dict[int, Tensor] = {}
        self.values: dict[int, Tensor] = {}
        # A tensor that is made in inference mode can't be changed outside it, and a session may go on there.
        with torch.inference_mode(False):
            for layer in range(*layers):
                attention = architecture.kind_of(layer).attention
                shape = (batch_size, attention.kv_heads, capacity)
                # Memory must start as zeros: a masked slot is still multiplied by 0, and uninitialized memory may hold
                # NaN. 0 · NaN is NaN.
                self.keys[layer] = torch.zeros(*shape, attention.head_dim, device=device, dtype=dtype)
                self.values[layer] = torch.zeros(*shape, attention.value_size, device=device, dtype=dtype)

    def __setstate__(self, state: dict[str, Any]) -> None:
        # A copy that is made in inference mode consists of tensors that can't be changed outside it.
        with torch.inference_mode(False):
            for name in ("keys", "values"):
                state[name] = {i: own.clone() if own.is_inference() else own for i, own in state[name].items()}
        self.__dict__.update(state)

    def extend(self, layer: int, keys: Tensor, values: Tensor, positions: Positions) -> tuple[Tensor, Tensor]:
        """Store this call's keys and values, and return those of all slots up to the last position.

        *Shape:* (batch, kv_heads, sequence, head_dim) and (…, value_dim) -> the same with slots for the sequence.
        """
        held = [own[layer].narrow(0, positions.first_place, len(positions.past)) for own in (self.keys, self.values)]
        for stored, new in zip(held, (keys, values), strict=True):
            if positions.uniform is not None:
                stored.narrow(2, positions.uniform, positions.length).copy_(new)
            else:
                rows, places, slots = positions.tokens
                stored[rows, :, slots] = new[rows, :, places].to(stored.dtype)  # under autocast, new may have another
        return held[0].narrow(2, 0, positions.stop), held[1].narrow(2, 0, positions.stop)

    def _swap(self, place: int, other: int, slots: int) -> None:
        for stored in (*self.keys.values(), *self.values.values()):
            stored[[place, other], :, :slots] = stored[[other, place], :, :slots]

    def grow(self, capacity: int) -> None:
        """Give each row more slots, by a copy."""
        more = capacity - self.capacity
        super().grow(capacity)
        with torch.inference_mode(False):  # as in __init__
            for stored in (self.keys, self.values):
                for layer, tensor in stored.items():
                    stored[layer] = torch.nn.functional.pad(tensor, (0, 0, 0, more))

    @property
    def kind(self) -> tuple[tuple[int, int], torch.dtype, torch.device]:
        """Return the layer range, the dtype and the device."""
        return self.layers, self.dtype, self.device

    def reorder(self, rows: Sequence[int]) -> None:
        """Replace each row i with the former row ``rows[i]``."""
        places = [self.places[row] for row in rows]
        with torch.inference_mode(False):  # as in __init__
            for stored in (self.keys, self.values):
                for layer, tensor in stored.items():
                    stored[layer] = tensor.index_select(0, torch.tensor(places, device=tensor.device))
        super().reorder(rows)
