"""`fnqueue deploy` and `undeploy`: making a version run, and what became of that."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator

import click

from fnqueue import wire
from fnqueue.blocking import Client
from fnqueue.completion import function_names
from fnqueue.functions import delays, deployment, faults, path_of, version
from fnqueue.terminal import Failed, Line, Unfinished, Wrong, calling, server_options
from fnqueue.wire import Deployment, DeploymentAnswer, Function, FunctionAnswer

_LOOK_S = 1.0
_UP = frozenset({"ACTIVE", "DEGRADING"})
_CPU = "CPU"
_COUNT = click.IntRange(min=0)


@click.command("deploy")
@click.argument("function", shell_complete=function_names)
@click.option("--version", "version_id", help="This version, by ID.  [default: the newest]")
@click.option("--gpu", help="What to run on, as H100.  [default: the only GPU on offer, or CPU where there is none]")
@click.option("--instance-type", help="The type of instance.  [default: that GPU's]")
@click.option("--instances", type=_COUNT, help="How many instances are kept.  [default: 1]")
@click.option("--max-instances", type=click.IntRange(min=1), help="Up to so many when there is more to do.")
@click.option("--concurrency", type=click.IntRange(min=1), help="Requests at once in each instance.  [default: 1]")
@click.option("--no-wait", is_flag=True, help="Do not wait until it is ACTIVE.")
@click.option(
    "--timeout", type=click.FloatRange(min=0), default=1800.0, show_default=True, help="Seconds to wait for that."
)
@server_options
def deploy(
    *,
    url: str | None,
    key: str | None,
    as_json: bool,
    function: str,
    version_id: str | None,
    gpu: str | None,
    instance_type: str | None,
    instances: int | None,
    max_instances: int | None,
    concurrency: int | None,
    no_wait: bool,
    timeout: float,
) -> None:
    """Run FUNCTION, by name or ID, and wait until it is ACTIVE. One that runs is given other numbers of instances.

    Exit status 3: it cannot run, and why is said; 4: it is not ACTIVE yet, and goes on.
    """
    with calling(url, key) as fnq:
        one = version(fnq, function, version_id)
        before = deployment(fnq, one) if one.status not in ("INACTIVE", "ERROR") else None
        if before is None:
            least = 1 if instances is None else instances
            wanted = {
                "gpu": gpu or _gpu(fnq),
                "instanceType": instance_type,
                "minInstances": least,
                "maxInstances": max_instances or max(1, least),
                "maxRequestConcurrency": concurrency or 1,
            }
            told = {name: value for name, value in wanted.items() if value is not None}
            fnq.ask(DeploymentAnswer, "POST", f"/deployments{path_of(one)}", {"deploymentSpecifications": [told]})
        else:
            if gpu or instance_type or concurrency:
                raise Wrong(
                    "--gpu, --instance-type and --concurrency: it is deployed already; undeploy it to change them"
                )
            _rescale(fnq, before, instances, max_instances)
        if not no_wait:
            _wait(fnq, one, timeout)
        found = fnq.ask(FunctionAnswer, "GET", path_of(one)).function
        click.echo(_told(found, deployment(fnq, found)) if as_json else f"{found.version_id}  {_state(found)}")


@click.command("undeploy")
@click.argument("function", shell_complete=function_names)
@click.option("--version", "version_id", help="This version, by ID.  [default: the newest]")
@click.option("--graceful", is_flag=True, help="Keep its instances until nothing is queued or running.")
@server_options
def undeploy(
    url: str | None, key: str | None, as_json: bool, function: str, version_id: str | None, graceful: bool
) -> None:
    """Stop FUNCTION, by name or ID. It takes no requests from now on."""
    with calling(url, key) as fnq:
        one = version(fnq, function, version_id)
        query = "?graceful=true" if graceful else ""
        found = fnq.ask(FunctionAnswer, "DELETE", f"/deployments{path_of(one)}{query}").function
    click.echo(_told(found, None) if as_json else f"{found.version_id}  {found.status}")


def _gpu(fnq: Client) -> str:
    """Raises Wrong: there are several to choose from."""
    groups = fnq.ask(wire.ClusterGroups, "GET", "/clusterGroups").cluster_groups
    offered = {gpu.name for group in groups for gpu in group.gpus} - {_CPU}
    if len(offered) > 1:
        raise Wrong(f"--gpu: there are several on offer: {', '.join(sorted(offered))}, {_CPU}")
    return offered.pop() if offered else _CPU


def _rescale(fnq: Client, before: Deployment, instances: int | None, max_instances: int | None) -> None:
    """Raises Wrong: what is meant cannot be told."""
    if instances is None and max_instances is None:
        return
    if len(before.deployment_specifications) > 1:
        raise Wrong("--instances: it is deployed on several GPU specifications; change each by the API")
    [specification] = before.deployment_specifications
    least = specification.min_instances if instances is None else instances
    change = {"minInstances": least, "maxInstances": max(1, least, max_instances or specification.max_instances)}
    if max_instances is not None:
        change["maxInstances"] = max_instances
    path = f"/deployments/{before.deployment_id}/gpu-specifications/{specification.gpu_specification_id}"
    fnq.ask(wire.GpuSpecificationAnswer, "PATCH", path, change)


def _wait(fnq: Client, one: Function, timeout_s: float) -> None:
    """Until it is ACTIVE. Raises Failed, Unfinished."""
    line = Line()
    give_up_at = time.monotonic() + timeout_s
    try:
        for found, deployed in _looks(fnq, one):
            if found.status in _UP:
                return
            words = [word.splitlines()[0] for word in [*faults(deployed), *delays(found)]]
            if found.status not in ("DEPLOYING", "DEGRADED"):
                why = "\n".join(faults(deployed)) or "nobody says why"
                raise Failed(f"{found.version_id} is {found.status}: {why}")
            line.show(": ".join([_state(found), *words[:1]]))
            if time.monotonic() + _LOOK_S > give_up_at:
                why = f": {words[0]}" if words else ""
                raise Unfinished(f"{found.version_id} is still {found.status} after {timeout_s:g} s, and goes on{why}")
            time.sleep(_LOOK_S)
    except KeyboardInterrupt:
        line.end()
        click.echo(f"{one.version_id} goes on: fnqueue functions show {one.id}", err=True)
        raise
    finally:
        line.end()


def _looks(fnq: Client, one: Function) -> Iterator[tuple[Function, Deployment | None]]:
    while True:
        found = fnq.ask(FunctionAnswer, "GET", path_of(one)).function
        yield found, None if found.status in _UP else deployment(fnq, one)


def _state(found: Function) -> str:
    instances = found.active_instances or []
    running = sum(each.instance_status == "RUNNING" for each in instances)
    told = f"{running} of {len(instances)} instances" if instances else "no instances"
    return f"{found.status}, {told} running"


def _told(found: Function, deployed: Deployment | None) -> str:
    told = {"function": found.model_dump(mode="json", by_alias=True, exclude_none=True)}
    if deployed is not None:
        told["deployment"] = deployed.model_dump(mode="json", by_alias=True, exclude_none=True)
    return json.dumps(told, indent=2)
