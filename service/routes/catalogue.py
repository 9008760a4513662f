"""``GET /classes``, ``/models``, ``/model`` and ``/views``: what is served, and what it means."""

from __future__ import annotations

from service.http.dependencies import ServiceDep
from service.http.parameters import ModelQuery
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
from service.views import VIEWS

router = ServiceRouter(tags=["catalogue"])


@router.get("/classes", summary="The label map", responses=documented(404, 503))
async def classes(service: ServiceDep, model: ModelQuery = None) -> LabelMap:
    """The classes of a model: id (the mask's pixel value), name and colour."""
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
    """What `view=` takes, the media types of each, and the parameters that it reads."""
    return ViewList(
        views=[
            ListedView(
                name=view.name,
                description=view.description,
                media_types=list(view.media_types),
                parameters=["classes", "max_side", "model", *view.parameters],
            )
            for view in VIEWS.values()
        ]
    )


@router.get("/models", summary="The models that are served", responses=documented(503))
async def models(service: ServiceDep) -> ModelList:
    """The default first, then the artefact folders beside it."""
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
    """Its name, file and sha256, measured accuracy per class, provider in use and licences."""
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
