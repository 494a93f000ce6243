"""An API server for tests, at the level of HTTP: what of Kubernetes a client can get wrong.

It keeps objects of the kinds that are used here with UIDs and resource versions, validates each against the schemas of
Kubernetes (`kubernetes-validate`, strict: an unknown field is an error) and of KEDA (the fields that are used here, in
our words), merges server-side applies by field manager with conflicts and hand-overs, serves watches from a resource
version and answers 410 when that is too old, collects what an owner leaves behind, and ends pods by their grace. Two
parts of Kubernetes are played by the test: `roll_out` is the Deployment's controller, `set_status` the kubelet.
"""

from __future__ import annotations

import asyncio
import copy
import functools
import json
import uuid
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import jsonschema_rs
import kubernetes_validate
from aiohttp import web

Object = dict[str, Any]

KINDS = {
    ("v1", "pods"): "Pod",
    ("v1", "secrets"): "Secret",
    ("v1", "nodes"): "Node",
    ("apps/v1", "deployments"): "Deployment",
    ("policy/v1", "poddisruptionbudgets"): "PodDisruptionBudget",
    ("networking.k8s.io/v1", "networkpolicies"): "NetworkPolicy",
    ("keda.sh/v1alpha1", "scaledobjects"): "ScaledObject",
}
SCHEMAS = "1.37"
_KEYED_BY_NAME = frozenset({"env", "containers", "initContainers", "volumes", "volumeMounts", "ports"})

_RULES = {
    "type": "object",
    "additionalProperties": False,
    "required": ["policies"],
    "properties": {
        "stabilizationWindowSeconds": {"type": "integer", "minimum": 0, "maximum": 3600},
        "selectPolicy": {"enum": ["Max", "Min", "Disabled"]},
        "policies": {
            "type": "array",
            "minItems": 1,
            "items": {
                "type": "object",
                "additionalProperties": False,
                "required": ["type", "value", "periodSeconds"],
                "properties": {
                    "type": {"enum": ["Percent", "Pods"]},
                    "value": {"type": "integer", "minimum": 1},
                    "periodSeconds": {"type": "integer", "minimum": 1, "maximum": 1800},
                },
            },
        },
    },
}
_WORDS = {"type": "object", "additionalProperties": {"type": "string"}}
SCALED_OBJECT = jsonschema_rs.validator_for(
    {
        "type": "object",
        "additionalProperties": False,
        "required": ["apiVersion", "kind", "metadata", "spec"],
        "properties": {
            "apiVersion": {"const": "keda.sh/v1alpha1"},
            "kind": {"const": "ScaledObject"},
            "metadata": {"type": "object"},
            "status": {"type": "object"},
            "spec": {
                "type": "object",
                "additionalProperties": False,
                "required": ["scaleTargetRef", "triggers"],
                "properties": {
                    "scaleTargetRef": {
                        "type": "object",
                        "additionalProperties": False,
                        "required": ["name"],
                        "properties": {name: {"type": "string"} for name in ("apiVersion", "kind", "name")},
                    },
                    **{
                        name: {"type": "integer", "minimum": 0}
                        for name in ("pollingInterval", "cooldownPeriod", "minReplicaCount", "maxReplicaCount")
                    },
                    "advanced": {
                        "type": "object",
                        "additionalProperties": False,
                        "properties": {
                            "horizontalPodAutoscalerConfig": {
                                "type": "object",
                                "additionalProperties": False,
                                "properties": {
                                    "behavior": {
                                        "type": "object",
                                        "additionalProperties": False,
                                        "properties": {"scaleUp": _RULES, "scaleDown": _RULES},
                                    }
                                },
                            }
                        },
                    },
                    "triggers": {
                        "type": "array",
                        "minItems": 1,
                        "items": {
                            "type": "object",
                            "additionalProperties": False,
                            "required": ["type", "metadata"],
                            "properties": {
                                "type": {"type": "string"},
                                "metricType": {"enum": ["AverageValue", "Value", "Utilization"]},
                                "metadata": _WORDS,
                            },
                        },
                    },
                },
            },
        },
    }
)


def fault_of(manifest: Object) -> str:
    """What Kubernetes, or KEDA, would find wrong with it; '' if nothing."""
    given = {
        name: value for name, value in manifest.get("metadata", {}).items() if name not in ("uid", "resourceVersion")
    }
    return _fault_of(json.dumps({**manifest, "metadata": given}, sort_keys=True))


@functools.lru_cache(maxsize=4096)
def _fault_of(text: str) -> str:
    """A schema takes 20 ms, and tests send much the same."""
    manifest = json.loads(text)
    if manifest.get("kind") == "ScaledObject":
        return "; ".join(fault.message for fault in SCALED_OBJECT.iter_errors(manifest))
    try:
        kubernetes_validate.validate(manifest, SCHEMAS, strict=True)
    except kubernetes_validate.ValidationError as exc:
        return str(exc.message)
    return ""


@dataclass(slots=True)
class _Stored:
    item: Object
    # Which manager applied which leaves; "" stands for whoever wrote without being one.
    owned: dict[str, set[tuple[str, ...]]] = field(default_factory=dict)


class KubernetesApi:
    """`requests` are the method and path of each call. `down` makes every call fail; `absent` are kinds that are not
    installed; `logs` what the containers of a pod, by name, wrote; those of `silent` have not begun."""

    def __init__(self) -> None:
        self.url = ""
        self.requests: list[tuple[str, str]] = []
        self.down = False
        self.absent: set[str] = set()
        self.logs: dict[str, str] = {}
        self.asked_logs: list[dict[str, str]] = []
        self.silent: set[str] = set()
        self._stored: dict[tuple[str, str], _Stored] = {}
        self._version = 100
        self._oldest = 0
        self._events: list[tuple[int, str, Object]] = []
        self._changed = asyncio.Condition()
        self._streams: set[asyncio.Task[None]] = set()

    # -- what tests see and do ---------------------------------------------------------------------

    def all(self, kind: str) -> list[Object]:
        return [copy.deepcopy(stored.item) for (of, _), stored in self._stored.items() if of == kind]

    def one(self, kind: str, name: str = "") -> Object:
        """The object of this name, or the only one."""
        found = [item for item in self.all(kind) if name in ("", item["metadata"]["name"])]
        assert len(found) == 1, [item["metadata"]["name"] for item in self.all(kind)]
        return found[0]

    async def add(self, item: Object) -> Object:
        item = {**item, "metadata": {**item["metadata"]}}
        return await self._put(_Stored(item), "ADDED")

    async def roll_out(self) -> list[Object]:
        """As many pods for each Deployment as it says; none for one that is being deleted."""
        for deployment in self.all("Deployment"):
            name = deployment["metadata"]["name"]
            own = [pod for pod in self.all("Pod") if _owner(pod) == deployment["metadata"]["uid"]]
            if deployment["metadata"].get("deletionTimestamp"):
                continue
            for _ in range(deployment["spec"].get("replicas", 1) - len(own)):
                template = copy.deepcopy(deployment["spec"]["template"])
                await self.add(
                    {
                        "apiVersion": "v1",
                        "kind": "Pod",
                        "metadata": {
                            **template["metadata"],
                            "name": f"{name}-{uuid.uuid4().hex[:5]}",
                            "namespace": deployment["metadata"]["namespace"],
                            "ownerReferences": [{"apiVersion": "apps/v1", "kind": "Deployment", "name": name,
                                                 "uid": deployment["metadata"]["uid"]}],
                        },
                        "spec": template["spec"],
                        "status": {"phase": "Pending"},
                    }
                )  # fmt: skip
        return self.all("Pod")

    async def set_status(self, name: str, status: Object) -> None:
        stored = self._stored["Pod", name]
        stored.item = {**stored.item, "status": status}
        await self._put(stored, "MODIFIED")

    async def scale(self, name: str, replicas: int) -> None:
        """As an autoscaler does."""
        stored = self._stored["Deployment", name]
        stored.item = {**stored.item, "spec": {**stored.item["spec"], "replicas": replicas}}
        await self._put(stored, "MODIFIED")

    async def end_pods(self) -> None:
        """What was told to end has ended."""
        for pod in self.all("Pod"):
            if pod["metadata"].get("deletionTimestamp"):
                await self._remove("Pod", pod["metadata"]["name"])
        await self._collect()

    async def forget_history(self) -> None:
        """Every resource version before now is too old for a watch, and the watches are cut."""
        self._events.clear()
        self._version += 1
        self._oldest = self._version
        await self.cut_watches()

    async def cut_watches(self) -> None:
        for task in list(self._streams):
            task.cancel()

    # -- HTTP --------------------------------------------------------------------------------------

    async def handle(self, request: web.Request) -> web.StreamResponse:
        self.requests.append((request.method, request.path))
        if self.down:
            return _status(503, "ServiceUnavailable", "the server is down")
        parts = request.path.strip("/").split("/")
        group, rest = (parts[1], parts[2:]) if parts[0] == "api" else ("/".join(parts[1:3]), parts[3:])
        namespace, rest = (rest[1], rest[2:]) if rest[0] == "namespaces" else ("", rest)
        kind = KINDS.get((group, rest[0]))
        if kind is None or kind in self.absent:
            return web.Response(status=404, text="404 page not found")
        name = rest[1] if len(rest) > 1 else ""
        if rest[2:] == ["log"]:
            self.asked_logs.append(dict(request.query))
            if name in self.silent:
                return _status(400, "BadRequest", "container is waiting to start: ContainerCreating")
            return web.Response(text=self.logs.get(name, ""))
        if rest[2:]:
            return _status(404, "NotFound", "no such subresource")
        if request.method == "GET" and not name:
            watched = request.query.get("watch") == "true"
            return await (self._watch(request, kind) if watched else self._list(request, group, kind))
        if request.method == "POST":
            return await self._create(await request.json(), group, kind, namespace)
        if request.method == "PATCH":
            return await self._patch(request, group, kind, namespace, name)
        stored = self._stored.get((kind, name))
        if stored is None:
            return _status(404, "NotFound", f'{kind.lower()} "{name}" not found')
        if request.method == "DELETE":
            return await self._delete(request, kind, name, stored)
        return web.json_response(stored.item)

    async def _list(self, request: web.Request, group: str, kind: str) -> web.Response:
        items = [item for item in self.all(kind) if _selected(item, request)]
        head = {"apiVersion": group, "kind": f"{kind}List", "metadata": {"resourceVersion": str(self._version)}}
        return web.json_response({**head, "items": items})

    async def _watch(self, request: web.Request, kind: str) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "application/json"})
        await response.prepare(request)
        since = int(request.query.get("resourceVersion", "0"))
        task = asyncio.current_task()
        assert task is not None
        self._streams.add(task)
        try:
            if since < self._oldest:
                gone = {"kind": "Status", "apiVersion": "v1", "status": "Failure", "code": 410, "reason": "Expired",
                        "message": "too old resource version"}  # fmt: skip
                await response.write(json.dumps({"type": "ERROR", "object": gone}).encode() + b"\n")
                return response
            while True:
                async with self._changed:
                    while self._version <= since:
                        await self._changed.wait()
                    new = [each for each in self._events if each[0] > since]
                    since = self._version
                for _, event, item in new:
                    if item["kind"] == kind and _selected(item, request):
                        await response.write(json.dumps({"type": event, "object": item}).encode() + b"\n")
        except (asyncio.CancelledError, ConnectionResetError):
            if request.transport is not None:
                request.transport.close()
            return response
        finally:
            self._streams.discard(task)

    async def _create(self, item: Object, group: str, kind: str, namespace: str) -> web.Response:
        name = item["metadata"]["name"]
        if (kind, name) in self._stored:
            return _status(409, "AlreadyExists", f'{kind} "{name}" already exists')
        if fault := self._refusal(item, group, kind, namespace):
            return _status(422, "Invalid", fault)
        return web.json_response(await self.add(item), status=201)

    async def _patch(self, request: web.Request, group: str, kind: str, namespace: str, name: str) -> web.Response:
        media = request.content_type
        change = json.loads(await request.read())
        stored = self._stored.get((kind, name))
        if media == "application/apply-patch+yaml":
            return await self._apply(request, change, stored, (group, kind, namespace, name))
        if media != "application/merge-patch+json":
            return _status(415, "UnsupportedMediaType", f"{media} is not played here")
        if stored is None:
            return _status(404, "NotFound", f'{kind.lower()} "{name}" not found')
        metadata = change.get("metadata", {})
        if metadata.get("uid") not in (None, stored.item["metadata"]["uid"]):
            return _status(409, "Conflict", "the UID in the precondition is another object's")
        if metadata.get("resourceVersion") not in (None, stored.item["metadata"]["resourceVersion"]):
            return _status(409, "Conflict", "the object has been modified")
        merged = _merge(stored.item, change)
        if fault := self._refusal(merged, group, kind, namespace):
            return _status(422, "Invalid", fault)
        stored.item = merged
        return web.json_response(await self._put(stored, "MODIFIED"))

    async def _apply(
        self, request: web.Request, wanted: Object, stored: _Stored | None, at: tuple[str, str, str, str]
    ) -> web.Response:
        group, kind, namespace, name = at
        manager = request.query.get("fieldManager")
        if not manager:
            return _status(422, "Invalid", "fieldManager is required for apply patch")
        if wanted.get("metadata", {}).get("name") != name:
            return _status(400, "BadRequest", "the name of the object is not that of the URL")
        if {"managedFields", "resourceVersion"} & wanted["metadata"].keys():
            return _status(400, "BadRequest", "metadata.managedFields must be nil")
        created = stored is None
        if stored is None:
            stored = _Stored({"metadata": {}})
        leaves = dict(_leaves(wanted))
        present = dict(_leaves(stored.item))
        others = {path for who, paths in stored.owned.items() if who != manager for path in paths}
        conflicts = [path for path in leaves if path in others and present.get(path) != leaves[path]]
        if conflicts and request.query.get("force") != "true":
            return _status(409, "Conflict", f"Apply failed with {len(conflicts)} conflicts: {conflicts[0]}")
        kept = dict(present)
        for path in stored.owned.get(manager, set()) - leaves.keys() - others:
            kept.pop(path, None)
        kept |= leaves
        merged = _built(kept)
        if fault := self._refusal(merged, group, kind, namespace):
            return _status(422, "Invalid", fault)
        if not created and merged == stored.item and stored.owned.get(manager) == set(leaves):
            return web.json_response(stored.item)
        for who in [who for who in stored.owned if who != manager]:
            stored.owned[who] -= set(conflicts)
        stored.owned[manager] = set(leaves)
        stored.item = merged
        await self._put(stored, "ADDED" if created else "MODIFIED")
        return web.json_response(stored.item, status=201 if created else 200)

    async def _delete(self, request: web.Request, kind: str, name: str, stored: _Stored) -> web.Response:
        metadata = stored.item["metadata"]
        if kind == "Pod":
            own_s = stored.item["spec"].get("terminationGracePeriodSeconds", 30)
            await self._end(stored, int(request.query.get("gracePeriodSeconds", own_s)))
        elif request.query.get("propagationPolicy") == "Foreground":
            metadata["deletionTimestamp"] = "2026-01-01T00:00:00Z"
            metadata["finalizers"] = ["foregroundDeletion"]
            await self._put(stored, "MODIFIED")
        else:
            await self._remove(kind, name)
        await self._collect()
        return web.json_response({"kind": "Status", "apiVersion": "v1", "status": "Success"})

    # -- inside ------------------------------------------------------------------------------------

    def _refusal(self, item: Object, group: str, kind: str, namespace: str) -> str:
        if (item.get("apiVersion"), item.get("kind")) != (group, kind):
            return "the kind of the object is not that of the URL"
        if item["metadata"].get("namespace", namespace) != namespace:
            return "the namespace of the object is not that of the URL"
        return fault_of(item)

    async def _put(self, stored: _Stored, event: str) -> Object:
        item = stored.item
        self._version += 1
        item["metadata"].setdefault("uid", str(uuid.uuid4()))
        item["metadata"]["resourceVersion"] = str(self._version)
        if item["kind"] == "Deployment":
            item["spec"].setdefault("replicas", 1)
        self._stored[item["kind"], item["metadata"]["name"]] = stored
        await self._tell(event, item)
        return item

    async def _tell(self, event: str, item: Object) -> None:
        async with self._changed:
            self._events.append((self._version, event, copy.deepcopy(item)))
            self._changed.notify_all()

    async def _remove(self, kind: str, name: str) -> None:
        stored = self._stored.pop((kind, name))
        self._version += 1
        stored.item["metadata"]["resourceVersion"] = str(self._version)
        await self._tell("DELETED", stored.item)

    async def _end(self, stored: _Stored, grace_s: int) -> None:
        """A later deletion may shorten the grace and never lengthens it."""
        metadata = stored.item["metadata"]
        left_s = metadata.get("deletionGracePeriodSeconds", grace_s)
        metadata["deletionTimestamp"] = "2026-01-01T00:00:00Z"
        metadata["deletionGracePeriodSeconds"] = min(left_s, grace_s)
        await self._put(stored, "MODIFIED")

    async def _collect(self) -> None:
        """The garbage collector: what belongs to nobody goes, pods by their grace, and then owners that waited."""
        live = {item["metadata"]["uid"] for item in self._items() if not item["metadata"].get("deletionTimestamp")}
        for stored in list(self._stored.values()):
            metadata = stored.item["metadata"]
            if _owner(stored.item) in ("", *live) or metadata.get("deletionTimestamp"):
                continue
            if stored.item["kind"] == "Pod":
                await self._end(stored, stored.item["spec"].get("terminationGracePeriodSeconds", 30))
            else:
                await self._remove(stored.item["kind"], metadata["name"])
        owners = {_owner(item) for item in self._items()}
        for item in list(self._items()):
            if item["metadata"].get("finalizers") and item["metadata"]["uid"] not in owners:
                await self._remove(item["kind"], item["metadata"]["name"])

    def _items(self) -> Iterator[Object]:
        return (stored.item for stored in list(self._stored.values()))


@asynccontextmanager
async def kubernetes_api() -> AsyncIterator[KubernetesApi]:
    api = KubernetesApi()
    app = web.Application()
    app.router.add_route("*", "/{path:.*}", api.handle)
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
    await runner.setup()
    try:
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        api.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
        yield api
    finally:
        await api.cut_watches()
        await runner.cleanup()


def _status(code: int, reason: str, message: str) -> web.Response:
    body = {
        "kind": "Status",
        "apiVersion": "v1",
        "status": "Failure",
        "code": code,
        "reason": reason,
        "message": message,
    }
    return web.Response(status=code, body=json.dumps(body).encode(), headers={"Content-Type": "application/json"})


def _selected(item: Object, request: web.Request) -> bool:
    labels = item["metadata"].get("labels", {})
    selector = request.query.get("labelSelector", "")
    return all(labels.get(part.partition("=")[0]) == part.partition("=")[2] for part in selector.split(",") if part)


def _owner(item: Object) -> str:
    return next((str(each["uid"]) for each in item["metadata"].get("ownerReferences", [])), "")


def _merge(old: Any, change: Any) -> Any:
    if not isinstance(change, dict):
        return change
    merged = dict(old) if isinstance(old, dict) else {}
    for name, value in change.items():
        if value is None:
            merged.pop(name, None)
        else:
            merged[name] = _merge(merged.get(name), value)
    return merged


def _leaves(value: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], str]]:
    """Each leaf by its path, as JSON. Lists whose entries have names are taken apart by them, others are one leaf."""
    if isinstance(value, dict) and value:
        for name, part in value.items():
            yield from _leaves(part, (*path, name))
    elif path and path[-1] in _KEYED_BY_NAME and value and all(isinstance(e, dict) and "name" in e for e in value):
        for index, part in enumerate(value):
            yield from _leaves(part, (*path, f"#{part['name']}#{index:04}"))
    else:
        yield path, json.dumps(value, sort_keys=True)


def _built(leaves: dict[tuple[str, ...], str]) -> Object:
    root: Object = {}
    for path, text in leaves.items():
        at = root
        for part in path[:-1]:
            at = at.setdefault(part, {})
        at[path[-1]] = json.loads(text)
    return dict(_relisted(root))


def _relisted(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    if value and all(name.startswith("#") for name in value):
        ordered = sorted(value.items(), key=lambda entry: entry[0].rpartition("#")[2])
        return [_relisted(part) for _, part in ordered]
    return {name: _relisted(part) for name, part in value.items()}
