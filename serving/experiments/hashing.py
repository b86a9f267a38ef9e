"""From a key to one of 10,000 buckets, the same in every process and language."""

from __future__ import annotations

from hashlib import sha256

BUCKETS = 10_000


def bucket(salt: str, key: str) -> int:
    """The bucket of a key, in [0, BUCKETS): the first 8 bytes of the SHA-256 of salt, a zero byte
    and key, both in UTF-8, read as a big-endian integer, modulo BUCKETS.

    salt: without a zero byte, so that no two pairs are hashed alike.

    A bucket's share differs from 1/BUCKETS by less than 1e-15. docs/assignment.md has it in other
    languages, and vectors to test them with.
    """
    digest = sha256(f"{salt}\0{key}".encode()).digest()
    return int.from_bytes(digest[:8], "big") % BUCKETS
