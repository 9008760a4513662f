"""``GET /classes``, ``/models`` and ``/model``: what the numbers mean, and who says so."""

from __future__ import annotations

from fastapi import APIRouter

from service.artefact import voc
from service.http.dependencies import ServiceDep
from service.http.problems import documented
from service.schemas import ClassLabel, LabelMap, ListedModel, ModelDescription, ModelList

router = APIRouter(tags=["catalogue"])


@router.get("/classes", summary="The label map")
async def classes() -> LabelMap:
    """PASCAL VOC's classes: id (the mask's pixel value), name and colour."""
    return LabelMap(
        classes=[
            ClassLabel(id=index, name=name, color=voc.rgb(index))
            for index, name in enumerate(voc.CLASSES)
        ],
        ignore_index=voc.IGNORE_INDEX,
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
