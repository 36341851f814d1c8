"""Ids of a prompt's leading blocks, as the database keeps them."""

from __future__ import annotations

from operator import sub

_ONE_BYTE = {step: step << 1 if step >= 0 else (-step << 1) - 1 for step in range(-64, 64)}


def pack(ids: list[int]) -> bytes:
    """Ids as zigzag deltas in base-128 varints: a sixth of their JSON."""
    if not ids:
        return b""
    try:
        # Mostly the next block is the next id: every step is one byte.
        return _varint(ids[0]) + bytes(map(_ONE_BYTE.__getitem__, map(sub, ids[1:], ids)))
    except KeyError:
        return b"".join(map(_varint, (ids[0], *map(sub, ids[1:], ids))))


def _varint(step: int) -> bytes:
    out = bytearray()
    coded = step << 1 if step >= 0 else (-step << 1) - 1
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
