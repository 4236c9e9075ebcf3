"""Projects."""

from __future__ import annotations

from datetime import datetime
from enum import Enum
from typing import TYPE_CHECKING, Annotated

import strawberry

from graph.context import Info
from graph.scalars import Cursor
from graph.types.connection import After, Before, First, Last, PageInfo, page_info
from graph.types.model import Model, model_of
from graph.types.node import Node
from models.ids import IdKind, outside_id
from models.records import ProjectRecord
from services.paging import AgePosition, Page, ThreadPosition, page_request

if TYPE_CHECKING:
    from graph.types.thread import ThreadConnection


@strawberry.enum(description="The colors a project can be marked with; what they look like is the frontend's.")
class ProjectColor(Enum):
    """The colors."""

    GRAY = strawberry.enum_value("GRAY", description="Gray.")
    RED = strawberry.enum_value("RED", description="Red.")
    ORANGE = strawberry.enum_value("ORANGE", description="Orange.")
    YELLOW = strawberry.enum_value("YELLOW", description="Yellow.")
    GREEN = strawberry.enum_value("GREEN", description="Green.")
    TEAL = strawberry.enum_value("TEAL", description="Teal.")
    BLUE = strawberry.enum_value("BLUE", description="Blue.")
    PURPLE = strawberry.enum_value("PURPLE", description="Purple.")
    PINK = strawberry.enum_value("PINK", description="Pink.")


_COLORS = dict(ProjectColor.__members__)


@strawberry.type(description="A folder of threads, with what turns in it are told and asked of.")
class Project(Node):
    """A project."""

    record: strawberry.Private[ProjectRecord]
    name: str = strawberry.field(description="As its user named it.")
    description: str | None = strawberry.field(description="What it is about.")
    color: ProjectColor | None = strawberry.field(description="The color it is marked with.")
    icon: str | None = strawberry.field(description="An emoji, or a name of the frontend's own icons.")
    prompt: str | None = strawberry.field(description="What every turn in the project tells the model first.")
    archived: bool = strawberry.field(description="Whether it is out of the list.")
    thread_count: int = strawberry.field(
        description="Threads in it that are neither archived nor temporary: as many as `threads` lists."
    )
    created_at: datetime = strawberry.field(description="When it was made.")
    updated_at: datetime = strawberry.field(description="When it was changed last; its threads do not count.")

    @classmethod
    def of(cls, record: ProjectRecord) -> Project:
        """From its row."""
        return cls(
            id=strawberry.ID(outside_id(IdKind.PROJECT, record.id)),
            record=record,
            name=record.name,
            description=record.description,
            color=None if record.color is None else _COLORS[record.color],
            icon=record.icon,
            prompt=record.prompt,
            archived=record.archived,
            thread_count=record.thread_count,
            created_at=record.created_at,
            updated_at=record.updated_at,
        )

    @strawberry.field(description="The model of turns in it that name none; null: the viewer's default.")
    def default_model(self, info: Info) -> Model | None:
        return model_of(info, self.record.default_model)

    @strawberry.field(description="Its threads, neither archived nor temporary: pinned first, then by last activity.")
    async def threads(
        self, info: Info, first: First = None, after: After = None, last: Last = None, before: Before = None
    ) -> Annotated[ThreadConnection, strawberry.lazy("graph.types.thread")]:
        from graph.types.thread import ThreadConnection

        request = page_request(ThreadPosition.parse, first, after, last, before)
        return ThreadConnection.of(await info.context.loaders.threads_page(request).load(self.record.id))


@strawberry.type(description="A project in its place in the list.")
class ProjectEdge:
    """An edge."""

    cursor: Cursor = strawberry.field(description="This place.")
    node: Project = strawberry.field(description="The project.")


@strawberry.type(description="A page of projects, newest first.")
class ProjectConnection:
    """A connection of projects."""

    edges: list[ProjectEdge] = strawberry.field(description="The projects with their places.")
    page_info: PageInfo = strawberry.field(description="Where this page lies.")

    @classmethod
    def of(cls, page: Page[ProjectRecord]) -> ProjectConnection:
        """From a page of rows."""
        cursors = [AgePosition(record.id).cursor() for record in page.records]
        edges = [
            ProjectEdge(cursor=Cursor(cursor), node=Project.of(record))
            for cursor, record in zip(cursors, page.records, strict=True)
        ]
        return cls(edges=edges, page_info=page_info(page, cursors))

    @strawberry.field(description="The projects without their places.")
    def nodes(self) -> list[Project]:
        return [edge.node for edge in self.edges]


@strawberry.input(description="Which projects to list.")
class ProjectFilter:
    """Argument of `projects`."""

    archived: bool = strawberry.field(default=False, description="True lists the archived ones, and only them.")
    name: str | None = strawberry.field(default=None, description="Any part of the name, in any case.")


_NAME = "The name, at most 400 bytes; white space is folded."
_DESCRIPTION = "What it is about, at most 4,000 bytes."
_COLOR = "A color to mark it with."
_ICON = "An emoji, or a name of the frontend's own icons, at most 64 bytes."
_PROMPT = "What every turn in the project tells the model first, at most 32,768 bytes."
_MODEL = "The model of turns in it that name none; one of `models`."


@strawberry.input(description="A project to make.")
class CreateProjectInput:
    """Input of `createProject`."""

    name: str = strawberry.field(description=_NAME)
    description: str | None = strawberry.field(default=None, description=_DESCRIPTION)
    color: ProjectColor | None = strawberry.field(default=None, description=_COLOR)
    icon: str | None = strawberry.field(default=None, description=_ICON)
    prompt: str | None = strawberry.field(default=None, description=_PROMPT)
    default_model_id: str | None = strawberry.field(default=None, description=_MODEL)


@strawberry.type(description="The new project.")
class CreateProjectPayload:
    """Payload of `createProject`."""

    project: Project = strawberry.field(description="The project.")


@strawberry.input(description="Changes of a project. A field that is left out stays as it is; null clears it.")
class UpdateProjectInput:
    """Input of `updateProject`."""

    project_id: strawberry.ID = strawberry.field(description="The project.")
    name: str | None = strawberry.field(default=strawberry.UNSET, description=_NAME)
    description: str | None = strawberry.field(default=strawberry.UNSET, description=_DESCRIPTION)
    color: ProjectColor | None = strawberry.field(default=strawberry.UNSET, description=_COLOR)
    icon: str | None = strawberry.field(default=strawberry.UNSET, description=_ICON)
    prompt: str | None = strawberry.field(default=strawberry.UNSET, description=_PROMPT)
    default_model_id: str | None = strawberry.field(default=strawberry.UNSET, description=_MODEL)


@strawberry.type(description="The changed project.")
class UpdateProjectPayload:
    """Payload of `updateProject`."""

    project: Project = strawberry.field(description="As it is now.")


@strawberry.input(description="Whether a project is archived.")
class ArchiveProjectInput:
    """Input of `archiveProject`."""

    project_id: strawberry.ID = strawberry.field(description="The project.")
    archived: bool = strawberry.field(
        default=True, description="True takes it out of the list, false brings it back; its threads stay as they are."
    )


@strawberry.type(description="The project that was archived or brought back.")
class ArchiveProjectPayload:
    """Payload of `archiveProject`."""

    project: Project = strawberry.field(description="As it is now.")


@strawberry.input(description="A project to delete.")
class DeleteProjectInput:
    """Input of `deleteProject`."""

    project_id: strawberry.ID = strawberry.field(description="The project.")
    delete_threads: bool = strawberry.field(
        default=False,
        description="False moves its threads out of it; true deletes them with all that hangs on them.",
    )


@strawberry.type(description="What was deleted.")
class DeleteProjectPayload:
    """Payload of `deleteProject`."""

    deleted_project_id: strawberry.ID = strawberry.field(description="The id of the project that is gone.")
