"""The Kubernetes manifests, rendered by kubectl and checked against Kubernetes' own schemas."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from service.server.supervisor import _GRACE_S
from service.settings import Settings
from service.telemetry.metrics import Metrics
from tests.integration.test_container import read_dockerfile

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "docker" / "kubernetes"
KUBECTL = Path(sys.executable).parent / "kubectl"
OVERLAYS = ("cpu", "gpu")

OLDEST, NEWEST = "1.30", "1.37"

Manifest = dict[str, Any]


def render(overlay: str) -> dict[str, Manifest]:
    """The overlay's manifests by kind, as ``kubectl apply -k`` would send them."""
    done = subprocess.run(
        [KUBECTL, "kustomize", FOLDER / overlay],
        env={"PATH": os.environ["PATH"]},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    manifests = list(yaml.safe_load_all(done.stdout))
    by_kind = {manifest["kind"]: manifest for manifest in manifests}
    assert len(by_kind) == len(manifests)
    return by_kind


@pytest.fixture(scope="module", params=OVERLAYS)
def overlay(request: pytest.FixtureRequest) -> str:
    """The name of each overlay."""
    name: str = request.param
    return name


@pytest.fixture(scope="module")
def manifests(overlay: str) -> dict[str, Manifest]:
    """The overlay's manifests by kind."""
    return render(overlay)


@pytest.fixture(scope="module")
def pod(manifests: dict[str, Manifest]) -> Manifest:
    """The overlay's pod spec."""
    spec: Manifest = manifests["Deployment"]["spec"]["template"]["spec"]
    return spec


@pytest.fixture(scope="module")
def container(pod: Manifest) -> Manifest:
    """The pod's only container."""
    (found,) = pod["containers"]
    assert isinstance(found, dict)
    return found


@pytest.mark.parametrize("version", [OLDEST, NEWEST])
def test_kubernetes_knows_every_field(manifests: dict[str, Manifest], version: str) -> None:
    """No field is misspelt or has a wrong type, in old and new releases."""
    assert set(manifests) == {
        "Deployment",
        "HorizontalPodAutoscaler",
        "NetworkPolicy",
        "PodDisruptionBudget",
        "Service",
    }
    for manifest in manifests.values():
        kubernetes_validate.validate(manifest, version, strict=True)


def test_all_mean_the_same_pods(manifests: dict[str, Manifest]) -> None:
    """Every selector selects the deployment's pods."""
    deployment = manifests["Deployment"]
    labels = deployment["spec"]["template"]["metadata"]["labels"]
    selectors = [
        deployment["spec"]["selector"]["matchLabels"],
        manifests["Service"]["spec"]["selector"],
        manifests["PodDisruptionBudget"]["spec"]["selector"]["matchLabels"],
        manifests["NetworkPolicy"]["spec"]["podSelector"]["matchLabels"],
    ]
    assert [selector.items() <= labels.items() for selector in selectors] == [True] * 4
    assert all(selectors)
    target = manifests["HorizontalPodAutoscaler"]["spec"]["scaleTargetRef"]
    assert (target["kind"], target["name"]) == ("Deployment", deployment["metadata"]["name"])
    assert "replicas" not in deployment["spec"]


def test_the_image_is_ours(container: Manifest, overlay: str) -> None:
    """The overlay uses the image target of its name, its port, and existing settings."""
    image = read_dockerfile()[overlay]
    assert container["image"] == f"fcn-segment:{overlay}"
    assert [str(port["containerPort"]) for port in container["ports"]] == [image.last["EXPOSE"]]
    names = {f"FCN_{name.upper()}" for name in Settings.model_fields}
    assert {variable["name"] for variable in container["env"]} <= names


def test_probes(container: Manifest) -> None:
    """Liveness and readiness differ; the start may take three minutes."""
    paths = {
        kind: container[kind]["httpGet"]["path"]
        for kind in ("startupProbe", "readinessProbe", "livenessProbe")
    }
    assert paths == {
        "startupProbe": "/readyz",
        "readinessProbe": "/readyz",
        "livenessProbe": "/healthz",
    }
    start = container["startupProbe"]
    assert start["periodSeconds"] * start["failureThreshold"] >= 180
    ports = {container[kind]["httpGet"]["port"] for kind in paths}
    assert ports == {container["ports"][0]["name"]}


def test_pods_have_time_to_drain(pod: Manifest, container: Manifest) -> None:
    """Kubernetes kills only after the service itself has given up."""
    before = container["lifecycle"]["preStop"]["sleep"]["seconds"]
    deadline = Settings.model_fields["deadline_s"].default
    assert pod["terminationGracePeriodSeconds"] > before + deadline + _GRACE_S


def test_pods_are_restricted(pod: Manifest, container: Manifest, overlay: str) -> None:
    """Pods meet the Pod Security Standard `restricted` and have a read-only root."""
    assert pod["automountServiceAccountToken"] is False
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    (uid, gid) = read_dockerfile()[overlay].last["USER"].split(":")
    context = pod["securityContext"]
    assert (context["runAsUser"], context["runAsGroup"]) == (int(uid), int(gid))
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    mounts = {mount["mountPath"]: mount for mount in container["volumeMounts"]}
    writable = [path for path, mount in mounts.items() if not mount.get("readOnly")]
    assert writable == ["/tmp"]  # noqa: S108
    assert "emptyDir" in volumes[mounts["/tmp"]["name"]]  # noqa: S108


def test_pods_can_have_api_keys(pod: Manifest, container: Manifest) -> None:
    """They come from an optional secret, mounted whole, so that the pod sees changes."""
    (mount,) = [mount for mount in container["volumeMounts"] if mount["mountPath"] == "/keys"]
    (volume,) = [volume for volume in pod["volumes"] if volume["name"] == mount["name"]]
    assert volume["secret"] == {"secretName": "fcn-segment-keys", "optional": True}
    assert "subPath" not in mount


def test_resources(container: Manifest, overlay: str) -> None:
    """The GPU image gets one GPU, the other none; the CPU limit sets the inference threads."""
    requests, limits = container["resources"]["requests"], container["resources"]["limits"]
    assert set(requests) == set(limits)
    assert ("nvidia.com/gpu" in limits) == (overlay == "gpu")
    if overlay == "gpu":
        assert limits["nvidia.com/gpu"] == requests["nvidia.com/gpu"] == 1
    else:
        assert limits["cpu"] == requests["cpu"]


def test_the_autoscaler_asks_for_what_there_is(manifests: dict[str, Manifest]) -> None:
    """Its metric is defined by the adapter, from a metric that the service exposes."""
    (metric,) = manifests["HorizontalPodAutoscaler"]["spec"]["metrics"]
    values = yaml.safe_load((FOLDER / "prometheus-adapter-values.yaml").read_text())
    (rule,) = values["rules"]["custom"]
    assert metric["pods"]["metric"]["name"] == rule["name"]["as"]
    exposed = {family.name for family in Metrics().families()}
    for query in (rule["seriesQuery"], rule["metricsQuery"]):
        assert set(re.findall(r"fcn_\w+", query)) <= exposed
    assert set(rule["resources"]["overrides"]) == {"namespace", "pod"}


def test_a_pod_may_always_go(manifests: dict[str, Manifest]) -> None:
    """A budget that forbids every eviction would block node upgrades."""
    budget = manifests["PodDisruptionBudget"]["spec"]
    assert budget["maxUnavailable"] == 1
    assert manifests["HorizontalPodAutoscaler"]["spec"]["minReplicas"] >= 2


# ---- Ray -----------------------------------------------------------------------------------------

RAY: Manifest = yaml.safe_load((FOLDER / "ray" / "rayservice.yaml").read_text())
CONFIGS = {
    "rayservice": yaml.safe_load(RAY["spec"]["serveConfigV2"]),
    "cluster": yaml.safe_load((ROOT / "docker" / "cluster.yaml").read_text()),
}


def test_rays_pods_are_pods() -> None:
    """Pod templates match Kubernetes' schema; the other fields are KubeRay's."""
    assert (RAY["apiVersion"], RAY["kind"]) == ("ray.io/v1", "RayService")
    assert set(RAY["spec"]) == {"serveConfigV2", "excludeHeadPodFromServeSvc", "rayClusterConfig"}
    cluster = RAY["spec"]["rayClusterConfig"]
    (workers,) = cluster["workerGroupSpecs"]
    assert workers["minReplicas"] <= workers["replicas"] <= workers["maxReplicas"]
    for group in (cluster["headGroupSpec"], workers):
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "a"}, **group["template"]}
        kubernetes_validate.validate(pod, NEWEST, strict=True)
        assert all(isinstance(value, str) for value in group["rayStartParams"].values())
        for container in pod["spec"]["containers"]:
            assert container["image"] == "fcn-segment:ray"
            assert container["securityContext"]["allowPrivilegeEscalation"] is False
    assert (
        workers["template"]["spec"]["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == 1
    )


@pytest.mark.parametrize("name", CONFIGS)
def test_serve_takes_the_config(name: str) -> None:
    """The config matches Ray's schema; its settings and deployments exist in the code."""
    config = CONFIGS[name]
    # In a separate process, because importing Ray warns.
    check = "import json, sys; from ray.serve.schema import ServeDeploySchema as S; " + (
        "S.model_validate(json.load(sys.stdin))"
    )
    done = subprocess.run(
        [sys.executable, "-c", check],
        input=json.dumps(config),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    (application,) = config["applications"]
    assert set(application["args"]["settings"]) <= set(Settings.model_fields)
    deployments = {one["name"]: one for one in application["deployments"]}
    assert set(deployments) == {"Ingress", "Device"}
    device = deployments["Device"]
    assert set(device["user_config"]) == {"model"}
    if name == "rayservice":
        scaling = device["autoscaling_config"]
        (workers,) = RAY["spec"]["rayClusterConfig"]["workerGroupSpecs"]
        per_gpu = 1 / device["ray_actor_options"]["num_gpus"]
        assert scaling["max_replicas"] <= workers["maxReplicas"] * per_gpu


def test_rays_versions_agree() -> None:
    """The Dockerfile and the manifest use the same version."""
    version = RAY["spec"]["rayClusterConfig"]["rayVersion"]
    dockerfile = (FOLDER / "ray" / "Dockerfile").read_text()
    assert f"rayproject/ray:{version}-" in dockerfile
