"""What `.github/deploy/` and the pages tell Docker, Kubernetes and SLURM to run is what the command line takes."""

import json
import re
import shlex
import tomllib

import pytest
import yaml
from fake_model import make_pipeline
from places import ROOT

from instseg_jax.cli import build_parser, split_overrides
from instseg_jax.verbs.jobs import _parse_shard

DEPLOY, PAGES = ROOT / ".github" / "deploy", ROOT / ".github" / "docs"


def parse(words: list[str]):
    """The options of a command, without `instseg`; names of the shell's variables stand for a number."""
    arguments, _ = split_overrides([re.sub(r"\$\w+", "3", word) for word in words])
    return build_parser().parse_args(arguments)


def containers(documents) -> list[dict]:
    found = [each for each in documents if each["kind"] in ("Job", "Deployment")]
    return [container for each in found for container in each["spec"]["template"]["spec"]["containers"]]


def command_of(container: dict) -> list[str]:
    if "args" in container:
        return container["args"]
    shell, option, line = container["command"]
    words = shlex.split(line)
    assert (shell, option, words[0]) == ("sh", "-c", "exec")
    return words[words.index("instseg") + 1 :] if "instseg" in words else words[words.index("run.py") + 1 :]


def test_the_server_on_kubernetes():
    pytest.importorskip("fastapi")
    from running_server import LIMITS, make_app

    deployment, service = yaml.safe_load_all((DEPLOY / "serve.yaml").read_text())
    (container,) = containers([deployment])
    options = parse(command_of(container))
    (port,) = container["ports"]
    assert options.verb == "serve" and options.host == "0.0.0.0" and options.port == port["containerPort"]
    assert deployment["spec"]["template"]["spec"]["terminationGracePeriodSeconds"] > options.timeout
    app = make_app(make_pipeline(), LIMITS)
    app.state.server.close()
    paths = {route.path for route in app.routes if "GET" in getattr(route, "methods", ())}
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert container[probe]["httpGet"]["path"] in paths and container[probe]["httpGet"]["port"] == port["name"]
    assert service["spec"]["ports"][0]["targetPort"] == port["name"]
    labels = deployment["spec"]["template"]["metadata"]["labels"]
    assert service["spec"]["selector"] == deployment["spec"]["selector"]["matchLabels"] == labels
    volumes = {volume["name"] for volume in deployment["spec"]["template"]["spec"]["volumes"]}
    assert {mount["name"] for mount in container["volumeMounts"]} == volumes


def test_a_job_on_kubernetes():
    (job,) = yaml.safe_load_all((DEPLOY / "predict.yaml").read_text())
    options = parse(command_of(*containers([job])))
    assert options.verb == "predict" and job["spec"]["completionMode"] == "Indexed"
    assert _parse_shard(options.shard) == (3, job["spec"]["completions"])


def test_a_training_on_kubernetes():
    """The manifest of the page has as many processes as pods, and an address of its first one."""
    (block,) = re.findall(r"```yaml\n(apiVersion.*?)```", (PAGES / "training.md").read_text(), re.DOTALL)
    service, job = yaml.safe_load_all(block)
    words = [word.replace("CONFIG", "configs/finetune.py:n") for word in command_of(*containers([job]))]
    options = parse(words)
    name, subdomain = job["metadata"]["name"], job["spec"]["template"]["spec"]["subdomain"]
    assert options.verb == "train" and options.num_processes == job["spec"]["completions"] == job["spec"]["parallelism"]
    assert options.coordinator.split(":")[0] == f"{name}-0.{subdomain}" and subdomain == service["metadata"]["name"]
    assert service["spec"]["selector"] == {"job-name": name} and options.process_id == 3


def test_the_image():
    lines = (DEPLOY / "Dockerfile").read_text().splitlines()
    instructions = [line.split(maxsplit=1) for line in lines if line and line[0] not in "# "]
    command = json.loads(dict(instructions)["CMD"])
    options = parse(command)
    assert options.host == "0.0.0.0" and str(options.port) == dict(instructions)["EXPOSE"]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert json.loads(dict(instructions)["ENTRYPOINT"]) == [next(iter(project["scripts"]))]
    for line in re.findall(r"EXTRAS=(\S+)", "\n".join(lines)):
        assert set(line.split(",")) <= set(project["optional-dependencies"])
    copied = [name for word, rest in instructions if word == "COPY" for name in rest.split()[:-1]]
    assert {"pyproject.toml", "instseg_jax", "configs", project["readme"], *project["license-files"]} == set(copied)
    assert all((ROOT / name).exists() for name in copied)


@pytest.mark.parametrize("tool", ["SLURM", "GNU parallel", "xargs"])
def test_shares_of_a_job_elsewhere(tool):
    text = (PAGES / "scale.md").read_text()
    (line,) = [line for line in text.splitlines() if "--shard" in line and f"# {tool}" in line]
    words = shlex.split(line, comments=True)
    words = words[words.index("run.py") + 1 :]
    options = parse([word.replace("{}", "3") for word in words])
    assert _parse_shard(options.shard) == (3, int(options.shard.split("/")[1]))
    sizes = re.search(r"seq 0 (\d+)", line) or re.search(r"--array=0-(\d+)", text)
    assert int(sizes[1]) + 1 == int(options.shard.split("/")[1])
