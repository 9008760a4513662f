"""``GET /classes``, ``/views``, ``/models`` and ``/model``: the served models and views."""

from __future__ import annotations

from fastapi import Depends

from service.http.dependencies import ServiceDep
from service.http.parameters import ModelQuery, known_query
from service.http.problems import documented
from service.http.routers import ServiceRouter
from service.schemas import (
    ClassLabel,
    LabelMap,
    ListedModel,
    ListedView,
    ModelDescription,
    ModelList,
    ViewList,
)
from service.views import COMMON_PARAMETERS, VIEWS

router = ServiceRouter(
    tags=["catalogue"],
    dependencies=[Depends(known_query)],
    responses=documented(422),
)


@router.get("/classes", summary="The label map", responses=documented(404, 503))
async def classes(service: ServiceDep, model: ModelQuery = None) -> LabelMap:
    """The classes of a model: id (the pixel value in the mask), name and colour."""
    async with service.engines.use(model) as engine:
        labels = engine.model.contract.labels
    return LabelMap(
        classes=[
            ClassLabel(id=index, name=name, color=color)
            for index, (name, color) in enumerate(zip(labels.names, labels.colors, strict=True))
        ],
        ignore_index=labels.ignore_index,
    )


@router.get("/views", summary="The views of a photo")
async def views() -> ViewList:
    """The values of `view=`, and the media types and parameters of each view."""
    return ViewList(
        views=[
            ListedView(
                name=view.name,
                description=view.description,
                media_types=list(view.media_types),
                parameters=[*COMMON_PARAMETERS, *view.parameters],
            )
            for view in VIEWS.values()
        ]
    )


@router.get("/models", summary="The served models", responses=documented(503))
async def models(service: ServiceDep) -> ModelList:
    """The default model first, then those of the artefact folders beside it."""
    engines = service.engines
    listed = []
    for number, name in enumerate(engines.names):
        manifest = engines.manifest(name)
        listed.append(
            ListedModel(
                name=name,
                version=manifest.version,
                default=number == 0,
                loaded=engines.loaded(name) is not None,
                accuracy=manifest.metrics,
            )
        )
    return ModelList(models=listed)


@router.get("/model", summary="The default model")
async def model(service: ServiceDep) -> ModelDescription:
    """Its name, file, sha256, measured accuracy per class, provider and licences."""
    loaded = service.engines.default.model
    contract, manifest = loaded.contract, loaded.manifest
    return ModelDescription(
        name=contract.name,
        version=contract.version,
        network=contract.network,
        file=loaded.file_name,
        sha256=manifest.files[loaded.file_name].sha256,
        precision=contract.precision,
        provider=loaded.provider,
        stride=contract.stride,
        working_size=contract.working_size,
        shapes=contract.shapes,
        accuracy=manifest.metrics.get(contract.precision),
        data=dict(manifest.data),
        licences=manifest.licences,
        created=manifest.created,
    )
