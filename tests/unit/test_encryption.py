"""Keys at rest: what is encrypted for one owner and provider can be read for no other, by nobody without the key."""

from __future__ import annotations

import os
import stat
import threading
from pathlib import Path
from uuid import UUID, uuid4

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.encryption import UnreadableKeyError, Vault, encryption_key
from services.kept_secrets import kept_secret
from services.provider_keys import OwnKey

OLD, NEW = b"o" * 32, b"n" * 32
SECRET = "sk-canary-0123456789"
OWNER = uuid4()
VAULT = Vault([OLD])


def readable(vault: Vault, owner_id: UUID, provider: str, blob: bytes) -> bool:
    try:
        vault.decrypt(owner_id, provider, blob)
    except UnreadableKeyError:
        return False
    return True


@given(secret=st.text(min_size=1, max_size=500).filter(lambda text: text.isascii()), provider=st.sampled_from("abc"))
def test_what_was_encrypted_is_read_again(secret: str, provider: str) -> None:
    assert VAULT.decrypt(OWNER, provider, VAULT.encrypt(OWNER, provider, secret)) == secret


def test_nothing_of_a_secret_is_in_its_ciphertext_and_no_two_are_alike() -> None:
    blobs = [VAULT.encrypt(OWNER, "openai", SECRET) for _ in range(500)]
    assert not any(SECRET[:4].encode() in blob for blob in blobs)
    nonces = {blob[9:21] for blob in blobs}
    assert len(nonces) == 500
    assert len(set(blobs)) == 500


def test_a_ciphertext_is_read_for_its_owner_and_provider_alone() -> None:
    blob = VAULT.encrypt(OWNER, "openai", SECRET)
    assert not readable(VAULT, uuid4(), "openai", blob)
    assert not readable(VAULT, OWNER, "groq", blob)
    assert not readable(VAULT, OWNER, "openai2", blob)
    assert not readable(VAULT, OWNER, "", blob)
    assert readable(VAULT, OWNER, "openai", blob)


def test_why_something_cannot_be_read_says_nothing_of_what_it_is() -> None:
    for blob in (VAULT.encrypt(OWNER, "groq", SECRET), b"", Vault([NEW]).encrypt(OWNER, "openai", SECRET)):
        with pytest.raises(UnreadableKeyError) as refused:
            VAULT.decrypt(OWNER, "openai", blob)
        assert SECRET not in str(refused.value)
        assert refused.value.__cause__ is None


def test_every_flipped_bit_and_every_missing_or_added_byte_is_noticed() -> None:
    blob = VAULT.encrypt(OWNER, "openai", SECRET)
    for place in range(len(blob)):
        changed = bytearray(blob)
        changed[place] ^= 1
        assert not readable(VAULT, OWNER, "openai", bytes(changed)), place
        assert not readable(VAULT, OWNER, "openai", blob[:place]), place
    assert not readable(VAULT, OWNER, "openai", blob + b"\0")


@given(st.binary(max_size=100))
def test_any_bytes_are_unreadable_and_nothing_worse(blob: bytes) -> None:
    assert not readable(VAULT, OWNER, "openai", blob)
    assert not VAULT.is_current(blob)


def test_the_first_key_encrypts_and_all_decrypt() -> None:
    old = VAULT.encrypt(OWNER, "openai", SECRET)
    both = Vault([NEW, OLD])
    assert both.decrypt(OWNER, "openai", old) == SECRET
    assert not both.is_current(old)
    new = both.encrypt(OWNER, "openai", SECRET)
    assert both.is_current(new)
    assert both.key_id(new) != both.key_id(old)
    assert Vault([NEW]).decrypt(OWNER, "openai", new) == SECRET
    assert not readable(Vault([NEW]), OWNER, "openai", old)
    assert not readable(VAULT, OWNER, "openai", new)


@pytest.mark.parametrize("keys", [[], [b"short"], [b"x" * 33], [OLD, b""], [OLD, OLD]])
def test_a_vault_without_good_keys_is_none(keys: list[bytes]) -> None:
    with pytest.raises(ValueError, match="32 bytes"):
        Vault(keys)


def test_nothing_that_holds_a_secret_shows_it() -> None:
    shown = repr(VAULT) + str(VAULT) + repr(OwnKey("openai", SECRET, "6789")) + str(OwnKey("openai", SECRET, "6789"))
    assert "Vault of 1" in shown
    assert SECRET not in shown
    assert "oooo" not in shown


def test_the_key_of_the_data_folder_is_made_once_for_the_servers_user_alone(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    key = encryption_key(folder)
    assert encryption_key(folder) == key
    assert len(key) == 32
    assert encryption_key(tmp_path / "other") != key
    assert stat.S_IMODE((folder / "encryption.key").stat().st_mode) == 0o600
    assert [file.name for file in folder.iterdir()] == ["encryption.key"]
    # As it stands there, it can be put into ENCRYPTION_KEYS.
    assert (folder / "encryption.key").read_text() == key.hex()


@pytest.mark.parametrize("content", ["", "not a key", "ab" * 31])
def test_a_damaged_key_of_the_data_folder_is_said_and_not_replaced(tmp_path: Path, content: str) -> None:
    (tmp_path / "encryption.key").write_text(content)
    with pytest.raises(ValueError, match=r"encryption\.key in DATA_DIR"):
        encryption_key(tmp_path)
    assert (tmp_path / "encryption.key").read_text() == content


def test_of_many_that_make_a_secret_at_once_all_get_the_same(tmp_path: Path) -> None:
    found: list[str] = []
    together = threading.Barrier(8)

    def make() -> None:
        together.wait()
        found.append(kept_secret(tmp_path / "a.key"))

    threads = [threading.Thread(target=make) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8
    assert len(set(found)) == 1
    assert os.listdir(tmp_path) == ["a.key"]
