"""A real Prometheus over processes that a test runs, with the configuration that we ship."""

from __future__ import annotations

import http.client
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import aiohttp
import yaml

from infra.local import binaries
from infra.local.process import LOOPBACK, PROBE_S, Server, bare_environment, free_port

SHIPPED = Path(__file__).parents[1] / "infra" / "prometheus"


class Prometheus(Server):
    """Scrapes and evaluates twice a second, where `places` says that the addresses of `prometheus.yml` are."""

    name = "prometheus"

    def __init__(self, folder: Path, places: Mapping[str, str]) -> None:
        super().__init__(folder)
        self.port = free_port()
        text = (SHIPPED / "prometheus.yml").read_text()
        for shipped, place in places.items():
            assert shipped in text, shipped
            text = text.replace(shipped, place)
        configuration: dict[str, Any] = yaml.safe_load(text)
        configuration["global"] = {"scrape_interval": "500ms", "evaluation_interval": "500ms"}
        configuration["rule_files"] = [str(SHIPPED / name) for name in configuration["rule_files"]]
        for job in configuration["scrape_configs"]:
            for discovery in job.get("http_sd_configs", []):
                discovery["refresh_interval"] = "500ms"
        (self.folder / "prometheus.yml").write_text(yaml.safe_dump(configuration))

    @property
    def url(self) -> str:
        return f"http://{LOOPBACK}:{self.port}"

    def command(self) -> Sequence[str]:
        return [
            str(binaries.program(self.name)),
            f"--config.file={self.folder / 'prometheus.yml'}",
            f"--storage.tsdb.path={self.folder / 'data'}",
            f"--web.listen-address={LOOPBACK}:{self.port}",
            "--log.level=warn",
        ]

    def environment(self) -> Mapping[str, str]:
        return bare_environment()

    def answers(self) -> bool:
        connection = http.client.HTTPConnection(LOOPBACK, self.port, timeout=PROBE_S)
        try:
            connection.request("GET", "/-/ready")
            return connection.getresponse().status == 200
        except (OSError, http.client.HTTPException):
            return False
        finally:
            connection.close()

    async def query(self, expression: str) -> list[Any]:
        """What it finds now; fails where it cannot read the question."""
        found = await self._ask("query", query=expression)
        return list(found["result"])

    async def rules(self) -> list[Any]:
        return [rule for group in (await self._ask("rules"))["groups"] for rule in group["rules"]]

    async def _ask(self, path: str, **parameters: str) -> dict[str, Any]:
        async with (
            aiohttp.ClientSession() as session,
            session.get(f"{self.url}/api/v1/{path}", params=parameters) as answered,
        ):
            told = await answered.json()
            assert told["status"] == "success", told
            data: dict[str, Any] = told["data"]
            return data
