"""Ids of a prompt's leading blocks, as the database keeps them."""

from __future__ import annotations


def pack(ids: list[int]) -> bytes:
    """Ids as zigzag deltas in base-128 varints: a sixth of their JSON."""
    out = bytearray()
    last = 0
    for i in ids:
        delta = i - last
        last = i
        coded = delta << 1 if delta >= 0 else (-delta << 1) - 1
        while coded >= 0x80:
            out.append(coded & 0x7F | 0x80)
            coded >>= 7
        out.append(coded)
    return bytes(out)


def unpack(data: bytes) -> list[int]:
    """The inverse of :func:`pack`."""
    ids, last, shift, coded = [], 0, 0, 0
    for byte in data:
        coded |= (byte & 0x7F) << shift
        if byte & 0x80:
            shift += 7
            continue
        last += coded >> 1 if not coded & 1 else -((coded + 1) >> 1)
        ids.append(last)
        shift = coded = 0
    return ids
