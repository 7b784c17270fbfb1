"""The files for clusters in docs/clusters, as far as they can be checked without one: syntax, options, names that must
agree, and the command of meshpipe in them.
"""

import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from meshpipe.cli.arguments import configure
from meshpipe.processes.config import DistributedConfig
from meshpipe.processes.secret import VARIABLE

ROOT = Path(__file__).resolve().parent.parent
SLURM = ROOT / "docs" / "clusters" / "slurm.sbatch"
KUBERNETES = ROOT / "docs" / "clusters" / "kubernetes-job.yaml"

SBATCH_OPTIONS = {
    "job-name": r"[\w-]+",
    "nodes": r"\d+(-\d+)?",
    "ntasks-per-node": r"\d+",
    "cpus-per-task": r"\d+",
    "gpus-per-task": r"(\w+:)?\d+",
    "time": r"(\d+-)?\d{1,2}:\d\d:\d\d",
    "signal": r"([RB]+:)?[A-Z]+(@\d+)?",
    "requeue": "",
    "open-mode": "append|truncate",
    "output": r"[\w%.-]+",
}
"""Long options of sbatch (its manual page), with the form of their values."""


def parsed(command: str, monkeypatch: pytest.MonkeyPatch) -> tuple[Any, DistributedConfig]:
    """The config and the process settings of a line `... meshpipe train RECIPE flags`."""
    monkeypatch.chdir(ROOT)
    words = shlex.split(command)
    program = next(index for index, word in enumerate(words) if word.endswith("meshpipe"))
    assert words[program + 1] == "train"
    _, config, distributed = configure("train", words[program + 2 :], "", DistributedConfig())
    return config, distributed


def line_with(text: str, part: str) -> str:
    (line,) = [line for line in text.replace("\\\n", " ").splitlines() if part in line]
    return line


def check_sbatch(text: str) -> dict[str, str]:
    """The options of a batch script; fails on one that sbatch does not have, or would ignore."""
    subprocess.run(["bash", "-n"], input=text, text=True, check=True)
    lines = text.splitlines()
    assert lines[0].startswith("#!"), "sbatch needs the name of an interpreter"
    first_command = next(index for index, line in enumerate(lines) if line and not line.startswith("#"))
    options = {}
    for index, line in enumerate(lines):
        if line.startswith("#SBATCH"):
            assert index < first_command, f"sbatch stops reading options before {line!r}"
            name, _, value = line.removeprefix("#SBATCH --").partition("=")
            assert name in SBATCH_OPTIONS, line
            assert re.fullmatch(SBATCH_OPTIONS[name], value), line
            options[name] = value
    return options


def test_the_slurm_script(monkeypatch: pytest.MonkeyPatch) -> None:
    text = SLURM.read_text()
    options = check_sbatch(text)
    config, distributed = parsed(line_with(text, "srun "), monkeypatch)
    assert distributed.coordinator is None, "Slurm says it"
    assert f"export {VARIABLE}=$(" in text[: text.index("srun ")]
    assert int(options["nodes"]) * int(options["ntasks-per-node"]) == config.mesh.num_devices
    assert config.checkpoint.auto_resume
    assert config.checkpoint.checkpoint_dir == "checkpoints/text_classifier"


@pytest.mark.parametrize(
    ("good", "bad"),
    [
        ("--nodes=4", "--node=4"),
        ("--time=04:00:00", "--time=4h"),
        ("#SBATCH --requeue", "true\n#SBATCH --requeue"),
        ('if [ "$status" -eq 143 ]; then', "if ["),
    ],
)
def test_mistakes_in_a_slurm_script_are_found(good: str, bad: str) -> None:
    text = SLURM.read_text()
    assert good in text
    with pytest.raises((AssertionError, subprocess.CalledProcessError)):
        check_sbatch(text.replace(good, bad))


KINDS: dict[str, dict[str, Any]] = {
    "Service": {"clusterIP": str, "publishNotReadyAddresses": bool, "selector": dict},
    "PersistentVolumeClaim": {"accessModes": list, "resources": dict},
    "Job": {
        "completionMode": str,
        "completions": int,
        "parallelism": int,
        "backoffLimit": int,
        "podFailurePolicy": {"rules": list},
        "template": {
            "metadata": {"labels": dict},
            "spec": {
                "subdomain": str,
                "restartPolicy": str,
                "terminationGracePeriodSeconds": int,
                "containers": list,
                "volumes": list,
            },
        },
    },
}
"""The fields of each kind's `spec` that are used, of v1 and batch/v1, all of which have to be there."""
CONTAINER = {
    "name": str,
    "image": str,
    "command": list,
    "args": list,
    "env": list,
    "resources": dict,
    "volumeMounts": list,
}
DNS_LABEL = r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?"


def check_fields(found: Any, expected: Any, where: str) -> None:
    if isinstance(expected, dict):
        assert isinstance(found, dict), where
        assert found.keys() == expected.keys(), where
        for name, kind in expected.items():
            check_fields(found[name], kind, f"{where}.{name}")
    else:
        assert type(found) is expected, where


def check_kubernetes(text: str) -> dict[str, Any]:
    """The objects by kind, each with known fields, after checking that they fit together."""
    objects = {document["kind"]: document for document in yaml.safe_load_all(text)}
    assert objects.keys() == KINDS.keys()
    for kind, document in objects.items():
        assert document["apiVersion"] == ("batch/v1" if kind == "Job" else "v1")
        assert re.fullmatch(DNS_LABEL, document["metadata"]["name"])
        assert document.keys() == {"apiVersion", "kind", "metadata", "spec"}
        check_fields(document["spec"], KINDS[kind], kind)
    service, job, claim = (objects[kind] for kind in ("Service", "Job", "PersistentVolumeClaim"))
    template = job["spec"]["template"]
    (container,), (volume,) = template["spec"]["containers"], template["spec"]["volumes"]
    check_fields(container, CONTAINER, "container")
    assert service["spec"]["clusterIP"] == "None"
    assert service["spec"]["selector"].items() <= template["metadata"]["labels"].items()
    assert template["spec"]["subdomain"] == service["metadata"]["name"]
    assert job["spec"]["completionMode"] == "Indexed"
    assert job["spec"]["completions"] == job["spec"]["parallelism"]
    assert template["spec"]["restartPolicy"] == "Never", "which a podFailurePolicy needs"
    assert {rule["action"] for rule in job["spec"]["podFailurePolicy"]["rules"]} <= {"FailJob", "Ignore", "Count"}
    assert volume["persistentVolumeClaim"] == {"claimName": claim["metadata"]["name"]}
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]
    assert [mount["name"] for mount in container["volumeMounts"]] == [volume["name"]]
    return objects


def test_the_kubernetes_job(monkeypatch: pytest.MonkeyPatch) -> None:
    objects = check_kubernetes(KUBERNETES.read_text())
    job, service = objects["Job"], objects["Service"]
    (container,) = job["spec"]["template"]["spec"]["containers"]
    (script,) = container["args"]
    subprocess.run(["sh", "-n"], input=script, text=True, check=True)
    config, distributed = parsed(line_with(script, "meshpipe train").replace("$JOB_COMPLETION_INDEX", "3"), monkeypatch)
    count, first = job["spec"]["completions"], f"{job['metadata']['name']}-0.{service['metadata']['name']}"
    assert distributed.process_id == 3
    assert distributed.process_count == count == config.mesh.num_devices
    assert distributed.coordinator is not None
    assert distributed.coordinator.rpartition(":")[0] == first
    assert f"getent hosts {first};" in script
    (secret,) = container["env"]
    assert secret["name"] == VARIABLE
    reference = secret["valueFrom"]["secretKeyRef"]
    created = f"kubectl create secret generic {reference['name']} --from-literal={reference['key']}="
    assert created in KUBERNETES.read_text()
    (mount,) = container["volumeMounts"]
    assert Path(mount["mountPath"]) in Path(str(config.checkpoint.checkpoint_dir)).parents
    assert config.checkpoint.auto_resume


@pytest.mark.parametrize(
    ("good", "bad"),
    [
        ("completions: 4", "completions: 3"),
        ("completions: 4", 'completions: "4"'),
        ("completionMode: Indexed", "completionmode: Indexed"),
        ("subdomain: meshpipe", "subdomain: other"),
        ("clusterIP: None", "clusterIP: null"),
        ("name: meshpipe-checkpoints", "name: Checkpoints"),
        ("      labels:\n        app: meshpipe", "      labels:\n        app: other"),
    ],
)
def test_mistakes_in_a_kubernetes_file_are_found(good: str, bad: str) -> None:
    text = KUBERNETES.read_text()
    assert good in text
    with pytest.raises(AssertionError):
        check_kubernetes(text.replace(good, bad, 1))
