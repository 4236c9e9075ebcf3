"""The backfills, in the order in which a server runs those that a migration asked for.

A migration asks for one by noting it: `INSERT INTO backfills (name) VALUES ('…') ON CONFLICT DO NOTHING`.
"""

from __future__ import annotations

from services.backfills import search_documents, thread_counts, usage
from services.backfills.provider_keys import ProviderKeysBackfill
from services.backfills.runner import Backfill
from services.encryption import Vault

BACKFILLS: tuple[Backfill, ...] = (
    Backfill(
        name="thread-counts",
        description="Counts the threads of every project anew and mends the counts that lists show.",
        count=thread_counts.count,
        run_batch=thread_counts.run_batch,
    ),
    Backfill(
        name="search-documents",
        description="Makes what is searched of threads and messages that were there before search was.",
        count=search_documents.count,
        run_batch=search_documents.run_batch,
    ),
    Backfill(
        name="usage-threads",
        description="Gives usage events of before threads had totals the thread of their message.",
        count=usage.count_events,
        run_batch=usage.fill_threads,
    ),
    Backfill(
        name="usage-rollup",
        description="Sums up every user's usage events anew and mends what reports and budgets read.",
        count=usage.count_users,
        run_batch=usage.rebuild_quarters,
    ),
)


def backfills(vault: Vault) -> tuple[Backfill, ...]:
    """Those, and the one that needs the operator's keys."""
    provider_keys = ProviderKeysBackfill(vault)
    return (
        *BACKFILLS,
        Backfill(
            name="provider-keys",
            description="Encrypts users' provider keys anew with the first of ENCRYPTION_KEYS.",
            count=provider_keys.count,
            run_batch=provider_keys.run_batch,
            note=provider_keys.note,
        ),
    )
