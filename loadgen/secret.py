"""A secret that master and workers share: who joins proves that it knows it, and credentials travel sealed by it.

Locust's protocol asks nobody for a name. On top of it: the worker greets with a nonce; the master answers with its own and with
its proof; the worker checks that, and sends its own proof before it gets a job. A proof is an HMAC-SHA256 over role and both
nonces, so it is of no use a second time. What is sealed is XORed with an HMAC-SHA256 key stream in counter mode and
authenticated by an HMAC over it (encrypt, then authenticate), under keys of this greeting. Shards and rows travel in the
clear and unsigned: they hold lengths and times. Where others share the network, use a tunnel or a mesh (docs/security.md).
"""

from __future__ import annotations

import hashlib
import hmac
import os

from traces.credentials import read_secret
from traces.errors import InputError

SECRET = "STEELYARD_SWARM_SECRET"  # noqa: S105 - the name of the variable
NONCE_BYTES = 16
LEAST = 16
"""Characters: who listens to a greeting can try secrets at leisure."""


def given() -> bytes | None:
    """The secret from STEELYARD_SWARM_SECRET, or from the file or keyring that STEELYARD_SWARM_SECRET_FILE names; None
    without."""
    text = os.environ.get(SECRET, "")
    named = os.environ.get(f"{SECRET}_FILE", "")
    if not text and named:
        text = read_secret(named, f"{SECRET}_FILE")
    if text and len(text) < LEAST:
        raise InputError(
            f"{SECRET} must have at least {LEAST} characters (got {len(text)}). Make one: openssl rand -hex 32"
        )
    return text.encode() or None


def _mac(secret: bytes, purpose: str, *parts: bytes) -> bytes:
    # Lengths go in too, so that no two lists of parts read alike.
    body = b"".join(len(p).to_bytes(4, "big") + p for p in (purpose.encode(), *parts))
    return hmac.new(secret, body, hashlib.sha256).digest()


def proof(secret: bytes, role: str, worker_nonce: bytes, master_nonce: bytes) -> bytes:
    """What only who knows the secret can say in this greeting; role: master or worker."""
    return _mac(secret, f"steelyard {role}", worker_nonce, master_nonce)


def known(secret: bytes, role: str, worker_nonce: bytes, master_nonce: bytes, said: object) -> bool:
    """Is that the proof?"""
    return isinstance(said, bytes) and hmac.compare_digest(proof(secret, role, worker_nonce, master_nonce), said)


def session(secret: bytes, worker_nonce: bytes, master_nonce: bytes) -> bytes:
    """The key under which this worker's credentials are sealed."""
    return _mac(secret, "steelyard session", worker_nonce, master_nonce)


def _stream(key: bytes, nonce: bytes, n: int) -> bytes:
    blocks = (_mac(key, "stream", nonce, k.to_bytes(8, "big")) for k in range(-(-n // 32)))
    return b"".join(blocks)[:n]


def seal(key: bytes, text: bytes) -> bytes:
    """nonce + text that nobody else reads + tag."""
    nonce = os.urandom(NONCE_BYTES)
    hidden = bytes(a ^ b for a, b in zip(text, _stream(key, nonce, len(text)), strict=True))
    return nonce + hidden + _mac(key, "tag", nonce, hidden)


def unseal(key: bytes, sealed: bytes) -> bytes:
    """The text. ValueError when a byte of it is not what was sealed."""
    nonce, hidden, tag = sealed[:NONCE_BYTES], sealed[NONCE_BYTES:-32], sealed[-32:]
    if len(sealed) < NONCE_BYTES + 32 or not hmac.compare_digest(_mac(key, "tag", nonce, hidden), tag):
        raise ValueError("sealed text was changed, or is another greeting's")
    return bytes(a ^ b for a, b in zip(hidden, _stream(key, nonce, len(hidden)), strict=True))
