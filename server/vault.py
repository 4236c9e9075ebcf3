"""The operator's keys for users' keys, from the settings or the data folder."""

from __future__ import annotations

from config import Settings, SettingsError
from services.encryption import Vault, encryption_key


def open_vault(settings: Settings) -> Vault:
    """What encrypts users' keys.

    Raises:
        SettingsError: the key of the data folder is damaged.
    """
    try:
        return Vault(settings.encryption_keys or (encryption_key(settings.data_dir),))
    except ValueError as error:
        raise SettingsError(f"ENCRYPTION_KEYS: it is not set, and {error}") from error
