"""Users' own keys at rest: AES-256-GCM under the operator's keys (docs/keys.md, decision 0017).

A stored key is: version (1 byte) | id of the operator's key (8) | nonce (12) | ciphertext and tag. What is in front of
the nonce, the owner and the provider are authenticated with it: a ciphertext that was moved to another owner or
provider cannot be read there. The id is a hash of the operator's key, so reading never tries keys, and rotation can
tell what is left to be done.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path
from uuid import UUID

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from services.kept_secrets import kept_secret

KEY_BYTES = 32
_VERSION = b"\x01"
_ID_BYTES = 8
# NIST SP 800-38D allows 2^32 random nonces of this length for one key.
_NONCE_BYTES = 12
_TAG_BYTES = 16
_HEAD_BYTES = len(_VERSION) + _ID_BYTES
_LABEL = b"threadgraph key id\0"


class UnreadableKeyError(Exception):
    """A stored key cannot be read: made with a key that is not here, for somebody or something else, or damaged."""


class Vault:
    """Encrypts and decrypts users' keys.

    Args:
        keys: the operator's, 32 bytes each. The first encrypts, all decrypt.

    Raises:
        ValueError: there is none, one has another length, or two are equal.
    """

    def __init__(self, keys: Sequence[bytes]) -> None:
        if not keys or any(len(key) != KEY_BYTES for key in keys) or len(set(keys)) < len(keys):
            raise ValueError(f"one or more different keys of {KEY_BYTES} bytes")
        self._ciphers = {_id_of(key): AESGCM(key) for key in keys}
        self._first = _id_of(keys[0])

    def __repr__(self) -> str:
        return f"<Vault of {len(self._ciphers)} keys>"

    def encrypt(self, owner_id: UUID, provider: str, secret: str) -> bytes:
        """A secret as it is stored for this owner and provider, and can be read for no other."""
        head = _VERSION + self._first
        nonce = os.urandom(_NONCE_BYTES)
        bound = _bound_to(head, owner_id, provider)
        return head + nonce + self._ciphers[self._first].encrypt(nonce, secret.encode(), bound)

    def decrypt(self, owner_id: UUID, provider: str, blob: bytes) -> str:
        """The secret that was stored for this owner and provider.

        Raises:
            UnreadableKeyError: it cannot be read; nothing of it is in the message.
        """
        cipher = self._ciphers.get(self.key_id(blob))
        if cipher is None:
            raise UnreadableKeyError("it was encrypted with a key that is not among ENCRYPTION_KEYS")
        head, rest = blob[:_HEAD_BYTES], blob[_HEAD_BYTES:]
        try:
            return cipher.decrypt(
                rest[:_NONCE_BYTES], rest[_NONCE_BYTES:], _bound_to(head, owner_id, provider)
            ).decode()
        except (InvalidTag, UnicodeDecodeError):
            # Without its cause: nobody needs the trace of it.
            raise UnreadableKeyError("it is damaged, or was stored for somebody or something else") from None

    def key_id(self, blob: bytes) -> bytes:
        """Which of the operator's keys something was encrypted with.

        Raises:
            UnreadableKeyError: it has not the form of what this makes.
        """
        if len(blob) < _HEAD_BYTES + _NONCE_BYTES + _TAG_BYTES or blob[:1] != _VERSION:
            raise UnreadableKeyError("it has not the form of a stored key")
        return blob[1:_HEAD_BYTES]

    def is_current(self, blob: bytes) -> bool:
        """Whether something was encrypted with the first key."""
        try:
            return self.key_id(blob) == self._first
        except UnreadableKeyError:
            return False


def encryption_key(data_dir: Path) -> bytes:
    """The key kept in the data folder; made at the first start, readable by the server's user only.

    Raises:
        OSError: the folder cannot be written to.
        ValueError: what is in the file is no key.
    """
    file = data_dir / "encryption.key"
    try:
        key = bytes.fromhex(kept_secret(file))
    except ValueError:
        key = b""
    if len(key) != KEY_BYTES:
        raise ValueError(f"{file.name} in DATA_DIR is not the key that was kept there")
    return key


def _id_of(key: bytes) -> bytes:
    return sha256(_LABEL + key).digest()[:_ID_BYTES]


def _bound_to(head: bytes, owner_id: UUID, provider: str) -> bytes:
    # Of fixed lengths but for the last: there is one way to read it.
    return head + owner_id.bytes + provider.encode()
