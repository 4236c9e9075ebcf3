"""Projects."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from enum import Enum
from typing import TYPE_CHECKING, Annotated, ClassVar

import strawberry

from graph.batching import batched_field, unique
from graph.context import Context
from graph.scalars import Cursor
from graph.types.connection import After, Before, First, Last, PageInfo, page_info
from graph.types.model import Model, models_of
from graph.types.node import Needs, Node, RecordView
from models.ids import IdKind
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


async def _default_models(projects: list[Project], context: Context) -> list[Model | None]:
    return await models_of(context, [project.record.default_model for project in projects])


async def _threads(
    projects: list[Project],
    context: Context,
    first: First = None,
    after: After = None,
    last: Last = None,
    before: Before = None,
) -> list[Annotated[ThreadConnection, strawberry.lazy("graph.types.thread")]]:
    from graph.types.thread import ThreadConnection

    request = page_request(ThreadPosition.parse, first, after, last, before)
    ids = unique([project.record.id for project in projects])
    found = await context.services.threads.pages_of_projects(context.viewer, ids, request)
    pages = dict(zip(ids, found, strict=True))
    return [ThreadConnection(page=pages[project.record.id]) for project in projects]


@strawberry.type(description="A folder of threads, with what turns in it are told and asked of.")
class Project(RecordView, Node):
    """A project."""

    kind = IdKind.PROJECT
    columns = ProjectRecord
    needs: ClassVar[Needs] = {
        name: (name,)
        for name in (
            *("id", "name", "description", "color", "icon", "prompt", "default_model", "archived", "thread_count"),
            *("created_at", "updated_at"),
        )
    }
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

    default_model: Model | None = batched_field(
        _default_models, description="The model of turns in it that name none; null: the viewer's default."
    )
    threads: Annotated[ThreadConnection, strawberry.lazy("graph.types.thread")] = batched_field(
        _threads, description="Its threads, neither archived nor temporary: pinned first, then by last activity."
    )


@strawberry.type(description="A project in its place in the list.")
class ProjectEdge:
    """An edge."""

    node: Project = strawberry.field(description="The project.")

    @strawberry.field(description="This place.")
    def cursor(self) -> Cursor:
        return Cursor(_place(self.node.record))


@strawberry.type(description="A page of projects, newest first.")
class ProjectConnection:
    """A connection of projects."""

    page: strawberry.Private[Page[ProjectRecord]]

    @strawberry.field(description="The projects with their places.")
    def edges(self) -> list[ProjectEdge]:
        return [ProjectEdge(node=project) for project in Project.of_each(self.page.records)]

    @strawberry.field(description="Where this page lies.")
    def page_info(self) -> PageInfo:
        return page_info(self.page, _place)

    @strawberry.field(description="The projects without their places.")
    def nodes(self) -> Sequence[Project]:
        return Project.of_each(self.page.records)


def _place(record: ProjectRecord) -> str:
    return AgePosition(record.id).cursor()


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
