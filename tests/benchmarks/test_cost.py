"""What an invocation costs our own processes in CPU, against a plain pipe's in the same run: never in time."""

from __future__ import annotations

import statistics
from pathlib import Path

import pytest

from benchmarks.load import generator
from benchmarks.measure import Bench, Measurement, Plan, Workload
from benchmarks.targets import pipe, production
from infra.local.process import Server
from infra.local.servers import S3, RabbitMQ, Redis

DB = 5
# 0.65 when it was written, and single rounds half as much again on a machine with eight times the work that it can do.
MOST = 0.95
OURS = ("api", "sidecar")  # of a pipe, its front end and its worker; the servers are other tests' too


@pytest.mark.servers
@pytest.mark.timeout(300)
def test_an_invocation_costs_less_than_in_a_plain_pipe_without_promises(
    product_rabbitmq: RabbitMQ, redis_server: Redis, s3: S3, tmp_path: Path
) -> None:
    servers: dict[str, Server] = {
        "FNQUEUE_QUEUE_URL": product_rabbitmq,
        "FNQUEUE_STORE_URL": redis_server,
        "FNQUEUE_BLOBS_URL": s3,
    }
    own = {"FNQUEUE_STORE_URL": f"{redis_server.url.rpartition('/')[0]}/{DB}"}
    plan = Plan(workloads=[Workload.SYNC], concurrencies=[32], rounds=5, seconds=1.0, body_bytes=1024, drain_s=30)
    with (
        pipe(tmp_path, "plain", servers, slots=32) as plain,
        production(tmp_path, slots=32, servers=servers, settings=own) as fnqueue,
        generator() as send,
    ):
        measured = Bench(send, plan, say=lambda _: None).run(plain, fnqueue)
    assert [one.faults for one in measured] == [0] * len(measured), measured
    ours, theirs = (_costs(measured, target.name) for target in (fnqueue, plain))
    ratio = statistics.median(one / other for one, other in zip(ours, theirs, strict=True))
    assert ratio < MOST, (ours, theirs)


def _costs(measured: list[Measurement], target: str) -> list[float]:
    """Microseconds for each request, by round."""
    rounds = [one for one in measured if one.target == target and one.round]
    return [sum(one.cpu_s[role] for role in OURS) / one.completed * 1e6 for one in rounds]
