"""Deployment files for Docker, Kubernetes, Helm, KServe, Prometheus and Grafana match the code."""

import json
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any

import container_test
import jsonschema
import kubernetes_validate
import pytest
import yaml
from builders import HARDENING
from prometheus_client import generate_latest
from prometheus_client.metrics import MetricWrapperBase
from typer.main import get_command

from sopdeploy.base.plugins import VARIABLE
from sopdeploy_commands.app import app
from sopdeploy_service.app import PATHS
from sopdeploy_service.http.middleware import METRICS_PATH
from sopdeploy_service.inference import decoders
from sopdeploy_service.keep import Keeper
from sopdeploy_service.observability.metrics import Metrics
from sopdeploy_service.settings import FILE_VARIABLE, VARIABLE_PREFIX, Settings, load_settings
from tests.docs.reading import PAGES, text_of

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
CHART = DEPLOY / "helm" / "sopdeploy"
DOCKERFILE = (ROOT / "Dockerfile").read_text(encoding="utf-8")
KUBERNETES = "1.33"
COMMANDS: Any = get_command(app)
SCALED_OBJECT = json.loads(
    (Path(__file__).parent / "scaled_object.json").read_text(encoding="utf-8")
)
KEDA = {"prometheus": "http://prometheus:9090", "requestsPerSecond": "50", "requestsQuery": ""}
AUTOSCALING: dict[str, Any] = {
    "enabled": True,
    "minReplicas": 1,
    "maxReplicas": 3,
    "busy": "0.6",
}
FILL = {
    "name": "fill",
    "image": "amazon/aws-cli",
    "args": ["s3", "cp", "--recursive", "s3://models/flowers", "/models"],
    "volumeMounts": [{"name": "models", "mountPath": "/models"}],
}
VALUES: dict[str, dict[str, Any]] = {
    "with defaults": {},
    "on GPUs": yaml.safe_load((CHART / "values-gpu.yaml").read_text()),
    "with everything": {
        "models": {"path": "/bundles", "claim": "", "initContainers": [FILL]},
        "extraEnv": [{"name": "AWS_ENDPOINT_URL", "value": "http://minio:9000"}],
        "envFrom": [{"secretRef": {"name": "minio"}}],
        "extraVolumes": [{"name": "authority", "configMap": {"name": "authority"}}],
        "extraVolumeMounts": [{"name": "authority", "mountPath": "/etc/authority"}],
        "alerts": {"enabled": True, "labels": {"release": "prometheus"}},
        "requireSignature": {"configMap": "release"},
        "keys": {"secret": "keys"},
        "settings": {"SOPDEPLOY_THREADS": "2", "SOPDEPLOY_MAX_BATCH": "8"},
        "extraArgs": ["--setting", "top_k=3"],
        "podAnnotations": {"sidecar.istio.io/inject": "false"},
        "priorityClassName": "important",
        "maxSurge": "10%",
        "autoscaling": AUTOSCALING | {"keda": {"prometheus": ""}},
        "nodeSelector": {"disk": "fast"},
        "tolerations": [{"key": "gpu", "operator": "Exists"}],
        "affinity": {
            "nodeAffinity": {
                "requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms": []}
            }
        },
        "topologySpread": {"key": "zone", "maxSkew": 2, "whenUnsatisfiable": "DoNotSchedule"},
        "imagePullSecrets": [{"name": "registry"}],
        "serviceAccount": {"create": True, "annotations": {"role": "reader"}},
        "ingress": {
            "host": "shop.example",
            "path": "/shop",
            "className": "nginx",
            "tlsSecret": "tls",
            "annotations": {"nginx.ingress.kubernetes.io/proxy-body-size": "64m"},
        },
        "networkPolicy": {
            "enabled": True,
            "podLabels": {"app": "gateway"},
            "namespaceLabels": {"team": "shop"},
            "egress": [{"ports": [{"port": 443, "protocol": "TCP"}]}],
        },
        "serviceMonitor": {
            "enabled": True,
            "interval": "30s",
            "labels": {"release": "prometheus"},
        },
    },
    "with a claim for photographs": {"replicas": 1, "keep": {"claim": "kept"}},
    "with a claim that pods share": {"replicas": 2, "keep": {"claim": "kept"}},
    "with KEDA": {"autoscaling": AUTOSCALING | {"keda": KEDA}},
    "with KEDA and a proxy's requests": {
        "autoscaling": AUTOSCALING
        | {"minReplicas": 0, "keda": KEDA | {"requestsQuery": "sum(proxy)"}}
    },
}


# In another process: Helm is a library in Go, which installs signal handlers.
HELM = """
import json, sys
from helm_python import chart
folder, name, values = *sys.argv[1:], json.load(sys.stdin)
lint = [chart.lint(folder, case, strict=True, kube_version="v1.33.0") for case in values]
rendered = []
for case, report in zip(values, lint):
    try:
        rendered.append([*chart.Chart.load(folder).render(case, name=name, namespace="default").values()])
    except Exception as error:  # a template that fails, which lint takes for information
        report["errors"].append(str(error))
json.dump([lint, rendered], sys.stdout)
"""
HAS_HELM = find_spec("helm_python") is not None


@cache
def helm() -> tuple[list[Any], list[list[str]]]:
    """Return the report on the chart and its manifests for each case of `VALUES`."""
    return run_helm(list(VALUES.values()))


def run_helm(
    values: list[dict[str, Any]], name: str = "shop", folder: Path = CHART
) -> tuple[list[Any], list[list[str]]]:
    """Return a report for each of *values*, and the manifests of the release *name*; skip without Helm."""
    if not HAS_HELM:
        pytest.skip("Helm's library is not installed")
    command = [sys.executable, "-c", HELM, str(folder), name]
    done = subprocess.run(
        command, input=json.dumps(values), capture_output=True, text=True, check=True
    )
    reports, rendered = json.loads(done.stdout)
    return reports, rendered


def chart(case: str) -> list[dict[str, Any]]:
    texts = helm()[1][list(VALUES).index(case)]
    return [found for text in texts for found in yaml.safe_load_all(text) if found]


def documents(name: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((DEPLOY / name).read_text()))


CLUSTER = {
    "the plain manifests": documents("kubernetes/sopdeploy.yaml"),
    **({f"the chart {case}": chart(case) for case in VALUES} if HAS_HELM else {}),
}
DEPLOYMENTS = {
    name: document["spec"]
    for name, found in CLUSTER.items()
    for document in found
    if document["kind"] == "Deployment"
}
PODS = {name: spec["template"]["spec"] for name, spec in DEPLOYMENTS.items()}


def pod_of_chart(case: str) -> dict[str, Any]:
    (deployment,) = [found for found in chart(case) if found["kind"] == "Deployment"]
    pod: dict[str, Any] = deployment["spec"]["template"]["spec"]
    return pod


@pytest.mark.parametrize("name", CLUSTER)
def test_manifests_match_the_kubernetes_schemas(name: str) -> None:
    kinds = [document["kind"] for document in CLUSTER[name]]
    assert {"Deployment", "Service", "PodDisruptionBudget"} <= set(kinds)

    without_autoscaler = {
        f"the chart {case}" for case, given in VALUES.items() if "autoscaling" not in given
    }
    autoscaler = "ScaledObject" if "KEDA" in name else "HorizontalPodAutoscaler"

    assert (autoscaler in kinds) == (name not in without_autoscaler)
    assert not {"ScaledObject", "HorizontalPodAutoscaler"} <= set(kinds)

    for document in CLUSTER[name]:
        if document["kind"] == "ScaledObject":
            jsonschema.validate(document, SCALED_OBJECT)
        # Those of an operator are compared below.
        elif document["kind"] not in {"ServiceMonitor", "PrometheusRule"}:
            kubernetes_validate.validate(document, KUBERNETES, strict=True)


OPTIONAL = {"ServiceAccount", "Ingress", "NetworkPolicy", "ServiceMonitor", "PrometheusRule"}


@pytest.fixture
def everything() -> dict[str, Any]:
    """The objects of a release with all parts, by kind."""
    return {document["kind"]: document for document in chart("with everything")}


def test_optional_parts_are_there_only_if_the_values_ask_for_them(everything) -> None:
    by_default = {document["kind"] for document in chart("with defaults")}

    assert everything.keys() >= OPTIONAL
    assert by_default & OPTIONAL == set()


def test_a_pod_has_the_priority_annotations_and_account_of_the_values(everything) -> None:
    pod = everything["Deployment"]["spec"]["template"]
    account = everything["ServiceAccount"]

    assert pod["spec"]["priorityClassName"] == "important"
    annotations = pod["metadata"]["annotations"].keys()
    assert annotations >= {"prometheus.io/port", "sidecar.istio.io/inject"}
    assert pod["spec"]["serviceAccountName"] == account["metadata"]["name"]
    assert account["automountServiceAccountToken"] is False


def test_the_optional_parts_name_ports_that_exist(everything) -> None:
    pod = everything["Deployment"]["spec"]["template"]["spec"]
    service = everything["Service"]["spec"]["ports"]
    paths = everything["Ingress"]["spec"]["rules"][0]["http"]["paths"]
    backend = paths[0]["backend"]["service"]
    monitor = everything["ServiceMonitor"]["spec"]
    policy = everything["NetworkPolicy"]["spec"]

    pod_ports = {port["name"] for port in pod["containers"][0]["ports"]}
    assert {port["targetPort"] for port in service} == pod_ports
    assert [path for path in paths if path["backend"]["service"] != backend] == []
    assert backend["name"] == everything["Service"]["metadata"]["name"]
    assert backend["port"]["name"] in {port["name"] for port in service}
    assert [end["port"] for end in monitor["endpoints"]] == ["http"]
    assert [rule["ports"][0]["port"] for rule in policy["ingress"]] == ["http"]


def reaches(rules: list[dict[str, Any]], path: str) -> bool:
    """Check whether one of *rules* of an ingress takes *path*, as Kubernetes defines it."""
    return any(
        path == rule["path"]
        if rule["pathType"] == "Exact"
        else f"{path}/".startswith(f"{rule['path'].rstrip('/')}/")
        for rule in rules
    )


@pytest.mark.parametrize("root", ["/", "/ml", "/a/b"])
def test_the_ingress_leads_to_every_path_of_the_server_but_the_metrics(root: str) -> None:
    _, (texts,) = run_helm([{"ingress": {"host": "shop.example", "path": root}}])
    found = [each for text in texts for each in yaml.safe_load_all(text) if each]
    (ingress,) = [each for each in found if each["kind"] == "Ingress"]
    kubernetes_validate.validate(ingress, KUBERNETES, strict=True)
    rules = ingress["spec"]["rules"][0]["http"]["paths"]
    prefix = root.rstrip("/")

    assert {path for path in PATHS if not reaches(rules, prefix + path)} == {METRICS_PATH}
    assert reaches(rules, root)
    for path in ("//metrics", "/metrics/", "/v1metrics"):
        assert not reaches(rules, prefix + path)


def test_the_network_policy_lets_in_and_out_what_the_values_say(everything) -> None:
    policy = everything["NetworkPolicy"]["spec"]

    assert {*policy["ingress"][0]["from"][0]} == {"podSelector", "namespaceSelector"}
    # Name servers, the store of the init container, and what the values add
    assert len(policy["egress"]) == 3


def test_every_selector_has_both_labels_of_the_pods(everything) -> None:
    """By both labels: a chart around this one has other pods of the same instance."""
    deployment = everything["Deployment"]["spec"]
    labels = deployment["template"]["metadata"]["labels"]
    (spread,) = deployment["template"]["spec"]["topologySpreadConstraints"]
    service = everything["Service"]

    assert labels.keys() >= {"app.kubernetes.io/name", "app.kubernetes.io/instance"}
    for selected in (
        everything["NetworkPolicy"]["spec"]["podSelector"]["matchLabels"],
        spread["labelSelector"]["matchLabels"],
        everything["PodDisruptionBudget"]["spec"]["selector"]["matchLabels"],
        deployment["selector"]["matchLabels"],
        service["spec"]["selector"],
    ):
        assert selected == labels

    monitored = everything["ServiceMonitor"]["spec"]["selector"]["matchLabels"]
    assert monitored.items() <= service["metadata"]["labels"].items()


def test_an_init_container_fills_the_folder_that_the_server_reads() -> None:
    given = VALUES["with everything"]
    pod = pod_of_chart("with everything")
    (server,) = pod["containers"]
    assert pod["initContainers"] == [FILL]
    assert {"name": "models", "emptyDir": {}} in pod["volumes"]
    assert {"name": "models", "mountPath": "/bundles", "readOnly": True} in server[
        "volumeMounts"
    ]

    assert server["args"][:2] == ["serve", "/bundles"]
    assert given["extraEnv"][0] in server["env"]
    assert server["envFrom"] == given["envFrom"]
    assert given["extraVolumeMounts"][0] in server["volumeMounts"]
    volumes = {volume["name"] for volume in pod["volumes"]}
    assert {mount["name"] for mount in server["volumeMounts"]} <= volumes


def test_the_server_writes_photographs_to_the_claim() -> None:
    pod = pod_of_chart("with a claim for photographs")
    (server,) = pod["containers"]

    assert {"name": "SOPDEPLOY_KEEP", "value": "/keep"} in server["env"]
    assert {"name": "keep", "mountPath": "/keep"} in server["volumeMounts"]
    assert {"name": "keep", "persistentVolumeClaim": {"claimName": "kept"}} in pod["volumes"]


def leaves(schema: dict[str, Any]) -> dict[str, Any]:
    """Reduce a schema to the nested names of its properties, as in values.yaml."""
    return {name: leaves(one) for name, one in schema.get("properties", {}).items()}


def test_the_schema_of_the_chart_has_exactly_the_keys_of_its_values() -> None:
    def same_keys(names: dict[str, Any], values: Any, at: str) -> list[str]:
        if not names:
            return []
        different = [f"{at}{name}" for name in names.keys() ^ values.keys()]
        common = names.keys() & values.keys()
        return different + [
            key
            for name in common
            for key in same_keys(names[name], values[name], f"{at}{name}.")
        ]

    schema = json.loads((CHART / "values.schema.json").read_text(encoding="utf-8"))
    values = yaml.safe_load((CHART / "values.yaml").read_text(encoding="utf-8"))
    absent = {"global", "resources.claims"}  # of Helm, and of clusters with dynamic resources
    absent |= {"models.pull", "autoscaling.queueDepth"}  # of 0.3.0, if empty
    assert set(same_keys(leaves(schema), values, "")) == absent


def values_of(command: str) -> dict[str, Any]:
    """Return the values that Helm reads from the options `--set` of *command*."""
    words = shlex.split(command)
    values: dict[str, Any] = {}

    for option, text in pairwise(words):
        if option == "--set":
            for assignment in text.split(","):
                path, _, value = assignment.partition("=")
                *folders, name = path.split(".")
                part = values
                for folder in folders:
                    part = part.setdefault(folder, {})
                is_other = value.isdigit() or value in {"true", "false"}
                part[name] = json.loads(value) if is_other else value

    return values


def merged(values: dict[str, Any], others: dict[str, Any]) -> dict[str, Any]:
    """Return *values* with *others*, as Helm merges them."""
    result = {**values}
    for name, other in others.items():
        is_part = isinstance(other, dict)
        result[name] = merged(values.get(name, {}), other) if is_part else other
    return result


def test_the_chart_accepts_the_values_of_every_command_on_a_page() -> None:
    given: list[dict[str, Any]] = []
    for page in PAGES:
        values: dict[str, Any] = {}
        text = page.read_text(encoding="utf-8")
        for command in re.findall(r"^ {4}(helm (?:.*\\\n)*.*)$", text, re.MULTILINE):
            values = merged(values, values_of(command))
            given.append(values)

    reports, rendered = run_helm(given)
    assert [report["errors"] for report in reports] == [[]] * len(given)
    assert len(rendered) == len(given) >= 5


OF_RELEASES = {
    path.name.removesuffix(".values.yaml"): yaml.safe_load(path.read_text(encoding="utf-8"))
    for path in (ROOT / "tests" / "formats").glob("*.values.yaml")
}


def test_a_release_of_the_last_two_versions_is_upgraded_with_its_values() -> None:
    """Also with a copy of all its values, and with its chart's defaults, which `--reuse-values` keeps."""
    archives = (ROOT / "tests" / "formats").glob("*.tar.xz")
    assert OF_RELEASES.keys() == {path.name.removesuffix(".tar.xz") for path in archives}
    assert {"0.3.0", "0.4.0"} <= OF_RELEASES.keys()
    given = [
        merged(values, more) for values in OF_RELEASES.values() for more in VALUES.values()
    ]

    reports, rendered = run_helm(given)
    assert [report["errors"] for report in reports] == [[]] * len(given)
    assert len(rendered) == len(given)
    for command in re.findall(r"helm upgrade.*", text_of("docs/deploy.md")):
        assert "--reset-then-reuse-values" in command


def test_a_value_that_has_left_is_refused_if_it_is_set() -> None:
    left = [
        {"models": {"pull": {"source": "s3://models/flowers.tar"}}},
        {"autoscaling": {"queueDepth": "8"}},
    ]
    for values, name in zip(left, ("models.pull", "queueDepth"), strict=True):
        ((report,), rendered) = run_helm([values])
        assert rendered == []
        assert name in "".join(report["errors"])


@pytest.mark.parametrize("share", [0.4, "0.4", ".4"])
def test_a_number_of_the_autoscaler_may_be_a_text(share: float | str) -> None:
    _, (texts,) = run_helm([{"autoscaling": {"enabled": True, "busy": share}}])
    (found,) = re.findall(r'averageValue: "(.*)"', "".join(texts))

    assert float(found) == 0.4


def test_the_chart_refuses_values_that_it_would_ignore_or_cannot_use() -> None:
    wrong: list[dict[str, Any]] = [
        {"resourcs": {}},
        {"replicas": "two"},
        {"models": {"initContainers": [{"name": "fill"}]}},
        {"settings": {"MAX_BATCH": "8"}},
        {"settings": {"SOPDEPLOY_MAX_BATCH": 8}},
        {"settings": {"SOPDEPLOY_PORT": "9000"}},
        {"autoscaling": {"enabled": True, "minReplicas": 0}},
        {"autoscaling": {"enabled": True, "minReplicas": 0, "keda": KEDA}},
        {"autoscaling": {"enabled": True, "minReplicas": 4, "maxReplicas": 3}},
        {"autoscaling": {"enabled": True, "busy": 60}},
        {"autoscaling": {"enabled": True, "busy": "60 %"}},
        {"maxSurge": 0},
        {"maxSurge": "0%"},
        {"preStopSeconds": 20},
        {"settings": {"SOPDEPLOY_DRAIN_SECONDS": "60"}},
        {"settings": {"SOPDEPLOY_MAX_BATCHES": "8"}},
        {"extraEnv": [{"name": "SOPDEPLOY_THREAD", "value": "2"}]},
        {"ingress": {"host": "https://shop.example"}},
        {"ingress": {"host": "shop.example/ml"}},
        {"ingress": {"host": "shop.example:443"}},
        {"fullnameOverride": "Shop"},
        {"extraArgs": "--setting top_k=3"},
    ]
    reports, rendered = run_helm(wrong)

    assert [
        value for value, report in zip(wrong, reports, strict=True) if not report["errors"]
    ] == []
    assert rendered == []


def test_other_keys_change_the_pods(tmp_path: Path) -> None:
    """Without a cluster, Helm finds no Secret, so each chart here contains one."""
    annotations: list[str] = []
    for keys in ("first", "second"):
        folder = shutil.copytree(CHART, tmp_path / keys / "sopdeploy")
        template = folder / "templates" / "deployment.yaml"
        text = template.read_text(encoding="utf-8")
        call = 'lookup "v1" "Secret" .Release.Namespace .Values.keys.secret'
        assert call in text
        template.write_text(text.replace(call, f'dict "data" (dict "keys.toml" "{keys}")'))

        _, (texts,) = run_helm([{"keys": {"secret": "keys"}}], folder=folder)
        annotations += re.findall("checksum/keys: ([0-9a-f]{64})", "".join(texts))

    assert len(set(annotations)) == 2


def test_the_chart_knows_every_setting() -> None:
    schema = json.loads((CHART / "values.schema.json").read_text(encoding="utf-8"))
    variables = {f"{VARIABLE_PREFIX}{name}".upper() for name in Settings.model_fields}
    known = schema["definitions"]["variable"]["enum"]

    assert known == sorted(variables | {FILE_VARIABLE, VARIABLE})


def test_every_object_of_a_release_gets_the_name_of_its_values() -> None:
    _, ((*texts,),) = run_helm([VALUES["with everything"] | {"fullnameOverride": "flowers"}])
    found = [each for text in texts for each in yaml.safe_load_all(text) if each]
    assert {each["metadata"]["name"] for each in found} == {"flowers"}

    (deployment,) = (each for each in found if each["kind"] == "Deployment")
    labels = deployment["spec"]["selector"]["matchLabels"]
    assert labels["app.kubernetes.io/instance"] == "shop"
    assert "shop" not in re.sub(
        r"instance: shop|shop\.example|: /shop|team: shop", "", "".join(texts)
    )


def test_a_counter_whose_first_event_raises_an_alert_has_its_series_before(
    tmp_path: Path,
) -> None:
    """Prometheus sees no increase in a series that begins at 1."""
    metrics = Metrics()
    series = r"increase\((\w+)\{(.*?)\}\[\w+\]\)+ > 0"
    Keeper(tmp_path / "kept", Settings(), metrics, lambda image: (image, ""))
    page = generate_latest(metrics.registry).decode()
    found = re.findall(series, (CHART / "alerts.yaml").read_text(encoding="utf-8"))

    assert "sopdeploy_kept_images_total" in {name for name, _ in found}

    for name, labels in found:
        assert re.search(rf"^{name}\{{.*{labels}.*\}} 0\.0$", page, re.MULTILINE), name


@pytest.fixture
def promtool(program: Callable[[str], str]) -> Callable[..., None]:
    """`promtool(*arguments)` runs it, and it must succeed (Debian: prometheus)."""
    path = program("promtool")

    def run(*arguments: str | Path) -> None:
        done = subprocess.run([path, *arguments], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr

    return run


ALERT_TESTS = ROOT / "tests" / "deploy" / "alerts.yaml"


def test_the_alert_rules_are_valid_and_fire_when_they_should(
    promtool: Callable[..., None],
) -> None:
    promtool("check", "rules", CHART / "alerts.yaml")
    promtool("test", "rules", ALERT_TESTS, ALERT_TESTS.with_name("night.yaml"))


@pytest.mark.slow
@pytest.mark.parametrize("days", ["calm.yaml", "drift.yaml"])
def test_calm_days_raise_no_alarm_and_drift_is_noticed(
    promtool: Callable[..., None], days: str
) -> None:
    promtool("test", "rules", ALERT_TESTS.with_name(days))


def test_the_dashboard_begins_with_the_alarms(
    promtool: Callable[..., None], tmp_path: Path
) -> None:
    dashboard = json.loads((DEPLOY / "dashboard.json").read_text(encoding="utf-8"))
    (query,) = dashboard["panels"][0]["targets"]
    unreadable = 'sopdeploy_keys_unreadable{job="shop",instance="a",process="supervisor"}'
    labels = '{severity="warning",alertname="SopdeployKeysUnreadable",job="shop",instance="a"}'
    case = {
        "interval": "1m",
        "input_series": [
            {"series": unreadable, "values": "1x10"},
            {"series": 'sopdeploy_bundle_info{job="shop",instance="a"}', "values": "1x10"},
        ],
        "promql_expr_test": [
            {
                "expr": query["expr"].replace("$namespace", ".*"),
                "eval_time": "10m",
                "exp_samples": [{"labels": labels, "value": 1}],
            }
        ],
    }
    rules = str(CHART / "alerts.yaml")
    (tmp_path / "tests.yaml").write_text(json.dumps({"rule_files": [rules], "tests": [case]}))
    promtool("test", "rules", tmp_path / "tests.yaml")


def test_the_alert_rules_of_two_releases_fire_once_each(
    promtool: Callable[..., None], tmp_path: Path
) -> None:
    tests = yaml.safe_load(ALERT_TESTS.read_text(encoding="utf-8")) | {
        "rule_files": ["shop", "toys"]
    }
    for name in tests["rule_files"]:
        (tmp_path / name).write_text(json.dumps(alert_rules({}, name)), encoding="utf-8")
        promtool("check", "rules", tmp_path / name)
    (tmp_path / "tests.yaml").write_text(json.dumps(tests), encoding="utf-8")
    promtool("test", "rules", tmp_path / "tests.yaml")


def alert_rules(values: dict[str, Any], name: str) -> dict[str, Any]:
    """Return the rules that the chart has for the release *name*."""
    ((manifests,)) = run_helm([values | {"alerts": {"enabled": True}}], name)[1]
    (found,) = [text for text in manifests if "PrometheusRule" in text]
    return yaml.safe_load(found)["spec"]


def test_every_selector_of_the_alert_rules_is_of_its_release() -> None:
    def selectors(rules: dict[str, Any]) -> list[str]:
        return [
            one
            for group in rules["groups"]
            for rule in group["rules"]
            for one in re.findall(SELECTOR, rule["expr"])
        ]

    own = selectors(alert_rules({}, "toys"))
    ours = 'namespace="default",job="toys",'
    assert [one for one in own if ours not in one] == []
    plain = yaml.safe_load((CHART / "alerts.yaml").read_text(encoding="utf-8"))
    assert [one.replace(ours, "") for one in own] == selectors(plain) != []


SELECTOR = r"\b(?:sopdeploy[_:]|process_|up\b)\w*(?:\{.*?\})?"


def test_a_release_that_may_have_no_pods_is_not_reported_as_down() -> None:
    keda = KEDA | {"requestsQuery": "sum(proxy)"}
    scaled = {"autoscaling": AUTOSCALING | {"minReplicas": 0, "keda": keda}}
    for values, reports in (({}, True), (scaled, False)):
        rules = alert_rules(values, "a")["groups"][0]["rules"]
        found = {rule["alert"]: rule["expr"] for rule in rules if "alert" in rule}
        assert ("absent" in found["SopdeployNotServing"]) == reports
        assert ("SopdeployNoTarget" in found) == reports
        assert {"SopdeployServerDown", "SopdeployProcessDown"} <= found.keys()


def test_prometheus_of_compose_loads_the_alert_rules(
    promtool: Callable[..., None], tmp_path: Path
) -> None:
    mounts = yaml.safe_load((ROOT / "compose.yaml").read_text())["services"]["prometheus"][
        "volumes"
    ]
    for source, target, *_ in (mount.split(":") for mount in mounts if mount.startswith("./")):
        shutil.copy(ROOT / source, tmp_path / Path(target).name)
        assert Path(target).parent == Path("/etc/prometheus")

    promtool("check", "config", tmp_path / "prometheus.yml")
    config = yaml.safe_load((tmp_path / "prometheus.yml").read_text())
    assert [(tmp_path / name).is_file() for name in config["rule_files"]] == [True]


def kserve_pod() -> dict[str, Any]:
    runtime = documents("kserve/runtime.yaml")[0]
    return {name: runtime["spec"][name] for name in ("containers", "volumes")}


def test_the_kserve_runtime_matches_the_schemas_and_its_service() -> None:
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "x"}, "spec": kserve_pod()}
    kubernetes_validate.validate(pod, KUBERNETES, strict=True)
    (runtime,) = documents("kserve/runtime.yaml")
    (service,) = documents("kserve/service.yaml")
    model = service["spec"]["predictor"]["model"]
    formats = runtime["spec"]["supportedModelFormats"]

    assert model["runtime"] == runtime["metadata"]["name"]
    assert model["modelFormat"] in [
        {"name": f["name"], "version": f["version"]} for f in formats
    ]
    assert model["protocolVersion"] in runtime["spec"]["protocolVersions"]
    assert runtime["spec"]["containers"][0]["name"] == "kserve-container"


SERVERS = [*(pod["containers"][0] for pod in PODS.values()), kserve_pod()["containers"][0]]

PROBES = {
    "livenessProbe": {"/livez", "/v2/health/live"},
    "readinessProbe": {"/readyz", "/v2/health/ready"},
}


@pytest.mark.parametrize("container", SERVERS)
def test_containers_have_valid_arguments_and_settings(container: dict[str, Any]) -> None:
    command, *arguments = container["args"]
    context = COMMANDS.commands[command].make_context(command, arguments)
    assert context.args == []
    for assignment in context.params.get("setting") or ():
        assert assignment.partition("=")[0] in Settings.model_fields

    for variable in container.get("env") or ():
        name = variable["name"].removeprefix("SOPDEPLOY_").lower()
        assert (
            name in Settings.model_fields or variable in VALUES["with everything"]["extraEnv"]
        )


@pytest.mark.parametrize("container", SERVERS)
def test_containers_have_no_privileges(container: dict[str, Any]) -> None:
    rules = container["securityContext"]

    assert rules["readOnlyRootFilesystem"] is True
    assert rules["allowPrivilegeEscalation"] is False
    assert rules["capabilities"] == {"drop": ["ALL"]}


@pytest.mark.parametrize("container", SERVERS)
def test_servers_have_probes_on_one_of_their_ports(container: dict[str, Any]) -> None:
    probes = {kind: container[kind]["httpGet"] for kind in PROBES if kind in container}
    assert probes.keys() == PROBES.keys()

    ports = {port.get("name"): port["containerPort"] for port in container.get("ports", ())}
    for kind, probe in probes.items():
        assert probe["path"] in PROBES[kind]
        assert probe["port"] in {*ports, *ports.values()}


@pytest.mark.parametrize("name", PODS)
def test_pods_run_as_non_root_roll_out_and_stop_cleanly(name: str) -> None:
    pod = PODS[name]
    surge = "10%" if name == "the chart with everything" else 1
    rolling = {
        "type": "RollingUpdate",
        "rollingUpdate": {"maxUnavailable": 0, "maxSurge": surge},
    }
    one_writer = name == "the chart with a claim for photographs"

    assert DEPLOYMENTS[name]["strategy"] == ({"type": "Recreate"} if one_writer else rolling)
    assert pod["enableServiceLinks"] is False
    assert pod["automountServiceAccountToken"] is False
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert f"USER {pod['securityContext']['runAsUser']}:" in DOCKERFILE

    (server,) = pod["containers"]
    variables = {each["name"]: each.get("value", "") for each in server["env"]}
    lame_duck = int(variables["SOPDEPLOY_LAME_DUCK_SECONDS"])
    assert lame_duck > 0
    assert "lifecycle" not in server
    assert pod["terminationGracePeriodSeconds"] >= lame_duck + load_settings().drain_seconds + 5


def test_pods_with_a_gpu_have_its_runtime_class_and_processes() -> None:
    pod = pod_of_chart("on GPUs")
    (server,) = pod["containers"]

    assert pod["runtimeClassName"] == "nvidia"
    assert server["resources"]["limits"]["nvidia.com/gpu"] == 1
    # Without a limit, the decoders and front ends of each pod would be those of all cores of
    # the node.
    assert server["resources"]["limits"]["cpu"] == server["resources"]["requests"]["cpu"]
    assert "runtimeClassName" not in pod_of_chart("with defaults")


def metric_names() -> set[str]:
    """Return the names of all exported metrics."""
    found = set()
    for metric in vars(Metrics()).values():
        if isinstance(metric, MetricWrapperBase):
            (family,) = metric.describe()
            ends = {
                "counter": ["_total"],
                "gauge": [""],
                "histogram": ["_bucket", "_sum", "_count"],
            }
            ends["summary"] = ["_sum", "_count"]
            found |= {family.name + end for end in ends[family.type]}

    return found


USERS = [
    "deploy/dashboard.json",
    "deploy/kubernetes/sopdeploy.yaml",
    "docs/deploy.md",
    f"{CHART}/templates/autoscaler.yaml",
    f"{CHART}/alerts.yaml",
]


@pytest.mark.parametrize("file", USERS)
def test_every_metric_in_deployment_files_exists(file: str) -> None:
    used = set(re.findall(r"\bsopdeploy_[a-z_]+[a-z]\b", text_of(file))) - {
        "sopdeploy_service",
        "sopdeploy_worker_up",  # of several processes
    }

    assert used
    assert used <= metric_names()


def test_compose_mounts_existing_files() -> None:
    services = yaml.safe_load((ROOT / "compose.yaml").read_text())["services"]
    mounts = [
        volume.split(":")[0] for service in services.values() for volume in service["volumes"]
    ]

    assert [
        mount for mount in mounts if mount.startswith("./") and not (ROOT / mount).is_file()
    ] == []


LOCKS = {"cpu": ("cpu", "sign"), "gpu": ("gpu", "sign")}
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def package_name(requirement: str) -> str:
    return re.split(r"[\[<>=!~; ]", requirement, maxsplit=1)[0].lower().replace("_", "-")


@pytest.mark.parametrize("name", LOCKS)
def test_lock_files_pin_all_server_packages_by_hash_without_an_index(name: str) -> None:
    text = (DEPLOY / "lock" / f"{name}.txt").read_text(encoding="utf-8")
    pinned = re.findall(r"^([\w.-]+)==\S+", text, re.MULTILINE)
    extras = [r for extra in LOCKS[name] for r in PROJECT["optional-dependencies"][extra]]

    assert {package_name(r) for r in [*PROJECT["dependencies"], *extras]} <= set(pinned)

    entries = re.split(r"\n(?=\S)", text.strip())
    assert [entry for entry in entries if "--hash=sha256:" not in entry] == []
    assert "://" not in text
    assert not {"torch", "onnx", "timm", "scikit-learn"} & set(pinned)


def test_helm_finds_no_fault_in_the_chart() -> None:
    for case, report in zip(VALUES, helm()[0], strict=True):
        assert [m for m in report["messages"] if m["severity"] > 1] == report["errors"] == [], (
            case
        )


def test_further_packages_of_an_image_get_the_locked_versions_without_hashes(
    tmp_path: Path,
) -> None:
    """With hashes, pip requires one for every further package. Other steps need the image."""
    for name in ("lock/gpu.txt", "install_image.sh"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(DEPLOY / name, tmp_path / name)
    (tmp_path / "tools" / "bin").mkdir(parents=True)
    pip = tmp_path / "tools" / "bin" / "pip"
    pip.write_text('#!/bin/sh\necho "$*" >> calls.txt\n')
    pip.chmod(0o755)
    subprocess.run(
        ["sh", "install_image.sh", "gpu", "sopdeploy[tensorrt]"],
        cwd=tmp_path,
        capture_output=True,
        check=False,
    )
    *_, last = (tmp_path / "calls.txt").read_text().splitlines()

    assert last.endswith(
        "install --no-cache-dir --constraint constraints.txt sopdeploy[tensorrt]"
    )
    constraints = (tmp_path / "constraints.txt").read_text()

    assert constraints.count("==") >= constraints.count("\n") > 50
    assert "hash" not in constraints


# Megabytes of the server at rest, as docs/settings.md gives them; with a GPU, CUDA and its
# libraries.
LIMITED = {
    "kubernetes/sopdeploy.yaml": 150,
    "kserve/runtime.yaml": 150,
    "helm/sopdeploy/values.yaml": 150,
}
LIMITED |= {"helm/sopdeploy/values-gpu.yaml": 3000}


@pytest.mark.parametrize("name", LIMITED)
def test_the_memory_limits_suffice_for_photographs_of_64_megapixels(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = (DEPLOY / name).read_text()
    amount, unit = re.findall(r"limits:\s*(?:\{|\n\s*).*?memory: (\d+)([MG])i", text, re.S)[0]
    monkeypatch.setattr(
        decoders, "memory_limit", lambda: int(amount) << {"M": 20, "G": 30}[unit]
    )
    budget = decoders.decode_budget(Settings(), LIMITED[name] * 10**6)
    measured = 290 * 10**6

    assert decoders.plan_children(budget, 2, Settings().max_pixels).large_memory >= measured


def test_the_container_test_runs_the_documented_command() -> None:
    (command,) = re.findall(r"^CMD (\[.*\])$", DOCKERFILE, re.MULTILINE)
    assert json.loads(command) == container_test.COMMAND
    (health,) = re.findall(r"^ +CMD (\[.*\])$", DOCKERFILE, re.MULTILINE)
    assert json.loads(health) == container_test.HEALTH[1:]

    words = container_test.documented_run()
    of_docker = ("--publish=", "--volume=", "--env=", "--stop-timeout=", "--user=")
    assert [word for word in words if not word.startswith(of_docker)] == HARDENING

    # The folder of kept photos belongs to the owner, who looks through it.
    assert container_test.values(words, "user") == ["$(id -u):$(id -g)"]

    (seconds,) = container_test.values(words, "stop-timeout")
    assert int(seconds) > Settings().drain_seconds

    targets = {volume.split(":")[1] for volume in container_test.values(words, "volume")}
    settings = dict(word.split("=", 1) for word in container_test.values(words, "env"))
    assert targets == {"/models", *settings.values()}
    assert {name.removeprefix(VARIABLE_PREFIX).lower() for name in settings} <= set(
        Settings.model_fields
    )
