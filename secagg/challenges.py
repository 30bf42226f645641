"""Challenges: the server commits to what it will ask about an upload before the upload is made.

The *challenge key* of a client and attempt expands, with the upload's digest, to all randomness of
the upload's sketch (`sketches`). Its commitment comes with the round and stands in the client's
receipt. So the server cannot choose its question to fit an upload, the client cannot make an upload
to fit the question, and once the key is shown the client can recompute the question.
"""

from __future__ import annotations

from secagg.transcript import digest

__all__ = ["CHALLENGE_KEY_BYTES", "challenge_key", "commitment"]

CHALLENGE_KEY_BYTES = 32


def challenge_key(secret: bytes, context_digest: bytes, client_key: bytes) -> bytes:
    """The key for all that is asked about one client's upload in one attempt; 32 bytes.

    Args:
        secret: 32 bytes that only the server knows, and that outlive a restart.
        context_digest: of the attempt.
        client_key: the client's public signing key.
    """
    return digest("challenge key", secret, context_digest, client_key)


def commitment(key: bytes) -> bytes:
    """What a challenge key is committed to by; 32 bytes."""
    return digest("challenge commitment", key)
