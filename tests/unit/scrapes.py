"""Metrics as Prometheus reads them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from prometheus_client.parser import text_string_to_metric_families

from broker.telemetry.metrics import OF_THE_PROCESS, REGISTRY, Metrics

_KNOWN = {metric.name for metric in REGISTRY} | set(OF_THE_PROCESS)


@dataclass(frozen=True, slots=True)
class Scrape:
    """What one page said."""

    samples: Mapping[tuple[str, frozenset[tuple[str, str]]], float]

    @classmethod
    def of(cls, text: str) -> Scrape:
        """Fails on a page that is not well-formed, says a thing twice, or shows what is not in the registry."""
        samples: dict[tuple[str, frozenset[tuple[str, str]]], float] = {}
        names: set[str] = set()
        for family in text_string_to_metric_families(text):
            name = f"{family.name}_total" if family.type == "counter" else family.name
            assert name in _KNOWN, name
            assert name not in names, f"{name} begins twice"
            names.add(name)
            for sample in family.samples:
                key = sample.name, frozenset(sample.labels.items())
                assert key not in samples, f"{key} is there twice"
                samples[key] = sample.value
        return cls(samples)

    def value(self, name: str, **labels: str) -> float | None:
        """That of the one series that has at least these labels; None if there is none."""
        found = [
            value
            for (each, given), value in self.samples.items()
            if each == name and frozenset(labels.items()) <= given
        ]
        assert len(found) < 2, f"{name} {labels} is more than one series"
        return found[0] if found else None

    def names(self) -> set[str]:
        return {name for name, _ in self.samples}


def scrape(metrics: Metrics) -> Scrape:
    return Scrape.of(metrics.read().text().decode())
