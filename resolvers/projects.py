"""Root fields about projects."""

from __future__ import annotations

from typing import Annotated, Any

import strawberry

from graph.context import Info
from graph.scalars import INPUT, key_of
from graph.types.connection import After, Before, First, Last
from graph.types.project import (
    ArchiveProjectInput,
    ArchiveProjectPayload,
    CreateProjectInput,
    CreateProjectPayload,
    DeleteProjectInput,
    DeleteProjectPayload,
    Project,
    ProjectConnection,
    ProjectFilter,
    UpdateProjectInput,
    UpdateProjectPayload,
)
from models.ids import IdKind
from services import projects
from services.paging import AgePosition, page_request

ProjectId = Annotated[strawberry.ID, strawberry.argument(description="Id of a project.")]
Filter = Annotated[ProjectFilter | None, strawberry.argument(description="Which to list; null: all but the archived.")]


@strawberry.type
class ProjectQuery:
    """Queries."""

    @strawberry.field(description="The viewer's projects, newest first.")
    async def projects(
        self,
        info: Info,
        first: First = None,
        after: After = None,
        last: Last = None,
        before: Before = None,
        filter: Filter = None,  # noqa: A002 - the argument's name in the API
    ) -> ProjectConnection:
        viewer = info.context.viewer
        request = page_request(AgePosition.parse, first, after, last, before)
        wanted = projects.ProjectFilter()
        if filter is not None:
            wanted = projects.ProjectFilter(archived=filter.archived, name=filter.name)
        return ProjectConnection(page=await info.context.services.projects.page(viewer, request, wanted))

    @strawberry.field(description="One project; null where the viewer has none of this id.")
    async def project(self, info: Info, id: ProjectId) -> Project | None:  # noqa: A002 - the argument's name in the API
        viewer = info.context.viewer
        record = await info.context.services.projects.find(viewer, key_of(IdKind.PROJECT, id, field="id"))
        return None if record is None else Project.of(record)


@strawberry.type
class ProjectMutation:
    """Mutations."""

    @strawberry.mutation(description="Make a project.")
    async def create_project(self, info: Info, input: Annotated[CreateProjectInput, INPUT]) -> CreateProjectPayload:  # noqa: A002
        values, _ = _values(input)
        return CreateProjectPayload(
            project=Project.of(await info.context.services.projects.create(info.context.viewer, values))
        )

    @strawberry.mutation(description="Change a project: the fields that are given, and no other.")
    async def update_project(self, info: Info, input: Annotated[UpdateProjectInput, INPUT]) -> UpdateProjectPayload:  # noqa: A002
        viewer = info.context.viewer
        project_id = key_of(IdKind.PROJECT, input.project_id, field="projectId")
        record = await info.context.services.projects.update(viewer, project_id, *_values(input))
        return UpdateProjectPayload(project=Project.of(record))

    @strawberry.mutation(description="Take a project out of the list, or bring it back.")
    async def archive_project(self, info: Info, input: Annotated[ArchiveProjectInput, INPUT]) -> ArchiveProjectPayload:  # noqa: A002
        viewer = info.context.viewer
        project_id = key_of(IdKind.PROJECT, input.project_id, field="projectId")
        record = await info.context.services.projects.archive(viewer, project_id, archived=input.archived)
        return ArchiveProjectPayload(project=Project.of(record))

    @strawberry.mutation(
        description="Delete a project. Its threads are moved out of it, or deleted with it where that is asked for."
    )
    async def delete_project(self, info: Info, input: Annotated[DeleteProjectInput, INPUT]) -> DeleteProjectPayload:  # noqa: A002
        viewer = info.context.viewer
        project_id = key_of(IdKind.PROJECT, input.project_id, field="projectId")
        await info.context.services.projects.delete(viewer, project_id, delete_threads=input.delete_threads)
        return DeleteProjectPayload(deleted_project_id=input.project_id)


_NAMES = {name: name for name in ("name", "description", "color", "icon", "prompt")} | {
    "default_model_id": "default_model"
}


def _values(given: CreateProjectInput | UpdateProjectInput) -> tuple[projects.ProjectValues, set[str]]:
    """The values that were given, and which were."""
    values: dict[str, Any] = {}
    for outside, inside in _NAMES.items():
        value = getattr(given, outside)
        if value is not strawberry.UNSET:
            values[inside] = value.value if outside == "color" and value is not None else value
    return projects.ProjectValues(**values), set(values)
