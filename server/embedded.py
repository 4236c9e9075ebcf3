"""The embedded database as the settings have it: light to import, so that it can start before all else is."""

from __future__ import annotations

from config import Settings
from models.embedded import EmbeddedPostgres

# For what looks into a database beside its server: commands, psql, a backup.
_MORE_CONNECTIONS = 20


def embedded_postgres(settings: Settings) -> EmbeddedPostgres:
    """The database of DATA_DIR, not started yet."""
    return EmbeddedPostgres(
        settings.data_dir / "postgres", max_connections=settings.database_pool_size + _MORE_CONNECTIONS
    )
