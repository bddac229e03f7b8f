"""The files of docker/, as far as they can be checked without containers: `make test-compose` runs them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from evosample_server.settings import Settings

DOCKER = Path(__file__).parents[1] / "docker"
KUBERNETES = DOCKER / "kubernetes"
MANIFESTS = sorted(path for path in KUBERNETES.glob("*.yaml") if path.name != "kustomization.yaml")
VERSIONS = ("1.29", kubernetes_validate.latest_version())


def resources() -> dict[tuple[str, str], dict[str, Any]]:
    """The manifests' resources by kind and name."""
    found = [resource for path in MANIFESTS for resource in yaml.safe_load_all(path.read_text())]
    return {(resource["kind"], resource["metadata"]["name"]): resource for resource in found}


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize(("kind", "name"), resources())
def test_a_manifest_is_what_kubernetes_expects(kind: str, name: str, version: str) -> None:
    kubernetes_validate.validate(resources()[kind, name], version, strict=True)


def test_what_the_manifests_name_is_there() -> None:
    kustomization = yaml.safe_load((KUBERNETES / "kustomization.yaml").read_text())
    assert sorted(kustomization["resources"]) == [path.name for path in MANIFESTS]
    found = resources()
    workloads = {
        name: found[kind, name]["spec"]["template"]
        for kind, name in found
        if "template" in found[kind, name].get("spec", {})
    }
    manual = (KUBERNETES / "README.md").read_text()
    assert {image["name"] for image in kustomization["images"]} <= {
        container["image"] for template in workloads.values() for container in template["spec"]["containers"]
    }
    for (kind, _), resource in found.items():
        if kind in ("Service", "PodDisruptionBudget"):
            selector = resource["spec"]["selector"].get("matchLabels", resource["spec"]["selector"])
            (template,) = (t for t in workloads.values() if selector.items() <= t["metadata"]["labels"].items())
            ports = {p["name"]: p["containerPort"] for c in template["spec"]["containers"] for p in c["ports"]}
            for port in resource["spec"].get("ports", ()):
                assert port.get("targetPort", port["port"]) in (*ports, *ports.values())
    for template in workloads.values():
        for volume in template["spec"]["volumes"]:
            assert volume.get("secret", {}).get("secretName", "") in manual


def test_every_variable_is_an_option_of_the_server() -> None:
    # EVOSAMPLE_PORT and others in ${...} are the compose file's own, explained in .env.example.
    own = set(re.findall(r"^([A-Z_]+)=", (DOCKER / ".env.example").read_text(), re.MULTILINE))
    options = {f"EVOSAMPLE_{name.upper()}" for name in Settings.model_fields}
    files = [*DOCKER.glob("compose*.yaml"), *MANIFESTS, DOCKER / "Dockerfile"]
    for path in files:
        text = path.read_text()
        assert set(re.findall(r"\$\{([A-Z_]+)", text)) <= own, path
        assert set(re.findall(r"(?<!\{)\b(EVOSAMPLE_[A-Z_]+)", text)) <= options | own, path
    assert own == {name for path in files for name in re.findall(r"\$\{([A-Z_]+)", path.read_text())}
