"""The prefix cache of one prefill worker: which leading blocks of a prompt need no work."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence


class PrefixCache:
    """Whole blocks by id, at most ``capacity`` of them, least recently used first out.

    A block's id stands for its content and everything before it, so a prompt hits as far as its leading blocks are
    held. Of one prompt's blocks the last leave first: without its head a tail is worth nothing.
    """

    __slots__ = ("_held", "capacity")

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self._held: OrderedDict[int, None] = OrderedDict()

    def __len__(self) -> int:
        return len(self._held)

    def hit(self, blocks: Sequence[int]) -> int:
        """How many leading blocks are held."""
        held = self._held
        for n, block in enumerate(blocks):
            if block not in held:
                return n
        return len(blocks)

    def keep(self, blocks: Sequence[int]) -> None:
        """A prompt with these blocks has been computed: hold them, as far as there is room."""
        held = self._held
        for block in reversed(blocks[: self.capacity]):
            held[block] = None
            held.move_to_end(block)
        while len(held) > self.capacity:
            held.popitem(last=False)
