"""Loaders: what the fields of many objects need, in one query each.

They batch and do not cache: a loader lives as long as its operation, and a subscription may last for hours.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import TypeVar
from uuid import UUID

from strawberry.dataloader import DataLoader

from models.records import AttachmentRecord, MessageRecord, ProjectRecord, ShareRecord, ThreadRecord
from providers.registry import ModelRecord
from services.attachments import Attachments
from services.messages import Messages
from services.models import Models
from services.paging import Page, PageRequest, PathPosition, ThreadPosition
from services.projects import Projects
from services.sharing import Sharing
from services.threads import Threads
from services.usage import TokenTotals, Usage
from services.viewer import Viewer

Key = TypeVar("Key", bound=Hashable)


class Loaders:
    """The loaders of one operation of one viewer."""

    def __init__(
        self,
        viewer: Viewer,
        *,
        threads: Threads,
        messages: Messages,
        projects: Projects,
        sharing: Sharing,
        usage: Usage,
        attachments: Attachments,
        models: Models,
    ) -> None:
        self._viewer = viewer
        self._threads = threads
        self._messages = messages
        self._projects = projects
        self._sharing = sharing
        self._usage = usage
        self._attachments = attachments
        self._models = models
        self._thread_pages: dict[PageRequest[ThreadPosition], DataLoader[UUID, Page[ThreadRecord]]] = {}
        self._pages: dict[PageRequest[PathPosition], DataLoader[UUID, Page[MessageRecord]]] = {}
        self.thread: DataLoader[UUID, ThreadRecord | None] = DataLoader(self._load_threads, cache=False)
        self.project: DataLoader[UUID, ProjectRecord | None] = DataLoader(self._load_projects, cache=False)
        self.message: DataLoader[UUID, MessageRecord | None] = DataLoader(self._load_messages, cache=False)
        self.live_message: DataLoader[UUID, MessageRecord | None] = DataLoader(self._load_live, cache=False)
        self.attachment: DataLoader[UUID, AttachmentRecord | None] = DataLoader(self._load_attachments, cache=False)
        self.siblings: DataLoader[tuple[UUID, UUID | None], list[MessageRecord]] = DataLoader(
            self._load_siblings, cache=False
        )
        self.shares: DataLoader[UUID, list[ShareRecord]] = DataLoader(self._load_shares, cache=False)
        self.thread_usage: DataLoader[UUID, TokenTotals] = DataLoader(self._load_thread_usage, cache=False)
        self.own_models: DataLoader[str, ModelRecord | None] = DataLoader(self._load_own_models, cache=False)
        self.answer_cost: DataLoader[UUID, int | None] = DataLoader(self._load_answer_costs, cache=False)

    def messages_page(self, request: PageRequest[PathPosition]) -> DataLoader[UUID, Page[MessageRecord]]:
        """The loader of equal pages of many threads."""
        loader = self._pages.get(request)
        if loader is None:

            async def load(thread_ids: list[UUID]) -> list[Page[MessageRecord]]:
                wanted = _unique(thread_ids)
                pages = dict(zip(wanted, await self._messages.pages(self._viewer, wanted, request), strict=True))
                return [pages[thread_id] for thread_id in thread_ids]

            loader = self._pages[request] = DataLoader(load, cache=False)
        return loader

    def threads_page(self, request: PageRequest[ThreadPosition]) -> DataLoader[UUID, Page[ThreadRecord]]:
        """The loader of equal pages of many projects."""
        loader = self._thread_pages.get(request)
        if loader is None:

            async def load(project_ids: list[UUID]) -> list[Page[ThreadRecord]]:
                wanted = _unique(project_ids)
                pages = await self._threads.pages_of_projects(self._viewer, wanted, request)
                found = dict(zip(wanted, pages, strict=True))
                return [found[project_id] for project_id in project_ids]

            loader = self._thread_pages[request] = DataLoader(load, cache=False)
        return loader

    async def _load_own_models(self, ids: list[str]) -> list[ModelRecord | None]:
        unique = _unique(ids)
        found = dict(zip(unique, await self._models.describe_many(self._viewer, unique), strict=True))
        return [found[model_id] for model_id in ids]

    async def _load_projects(self, ids: list[UUID]) -> list[ProjectRecord | None]:
        wanted = _unique(ids)
        found = dict(zip(wanted, await self._projects.find_many(self._viewer, wanted), strict=True))
        return [found[key] for key in ids]

    async def _load_threads(self, ids: list[UUID]) -> list[ThreadRecord | None]:
        wanted = _unique(ids)
        found = dict(zip(wanted, await self._threads.find_many(self._viewer, wanted), strict=True))
        return [found[key] for key in ids]

    async def _load_messages(self, ids: list[UUID]) -> list[MessageRecord | None]:
        wanted = _unique(ids)
        found = dict(zip(wanted, await self._messages.find_many(self._viewer, wanted), strict=True))
        return [found[key] for key in ids]

    async def _load_attachments(self, ids: list[UUID]) -> list[AttachmentRecord | None]:
        wanted = _unique(ids)
        found = dict(zip(wanted, await self._attachments.find_many(self._viewer, wanted), strict=True))
        return [found[key] for key in ids]

    async def _load_live(self, ids: list[UUID]) -> list[MessageRecord | None]:
        return await self._messages.live(self._viewer, ids)

    async def _load_siblings(self, places: list[tuple[UUID, UUID | None]]) -> list[list[MessageRecord]]:
        return await self._messages.siblings(self._viewer, places)

    async def _load_shares(self, thread_ids: list[UUID]) -> list[list[ShareRecord]]:
        wanted = _unique(thread_ids)
        found = dict(zip(wanted, await self._sharing.of_threads(self._viewer, wanted), strict=True))
        return [found[key] for key in thread_ids]

    async def _load_thread_usage(self, thread_ids: list[UUID]) -> list[TokenTotals]:
        return await self._usage.of_threads(self._viewer, thread_ids)

    async def _load_answer_costs(self, message_ids: list[UUID]) -> list[int | None]:
        return await self._usage.costs_of_answers(self._viewer, message_ids)


def _unique(keys: list[Key]) -> list[Key]:
    return list(dict.fromkeys(keys))
