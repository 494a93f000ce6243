"""What functions of the type LLM have beside the others: accepted, kept and shown (contract/management.md §1.5)."""

from __future__ import annotations

import re
from typing import Annotated

from pydantic import AfterValidator, Field, model_validator

from fnqueue.wire.fields import AccountId, Name, Uri, Wire

MAX_PRIORITY = 2**32 - 1
ROUTING_METHODS = frozenset(
    {
        "power-of-two",
        "wait-and-widen",
        "round-robin",
        "random",
        "pulsar",
        "pulsar-wait-and-widen",
        "groq-multiregion",
        "pulsar-multiregion",
    }
)
_RATE = re.compile(r"([1-9][0-9]{0,11})-([SMHDW])", re.ASCII)


def _token_rates(value: str) -> str:
    found = [_RATE.fullmatch(part.strip().upper()) for part in value.split(",")]
    units = [match[2] for match in found if match]
    if None in found or len(set(units)) < len(units):
        raise ValueError("must be rates as 100-S, 500-W: a positive number and one of S, M, H, D, W, each once")
    return ", ".join(match[0] for match in found if match)


def _routing_method(value: str) -> str:
    method = value.lower().replace("_", "-")
    if method not in ROUTING_METHODS:
        raise ValueError(f"must be one of {', '.join(sorted(ROUTING_METHODS))}")
    return method


TokenRates = Annotated[str, Field(max_length=256), AfterValidator(_token_rates)]
RoutingMethod = Annotated[str, Field(max_length=64), AfterValidator(_routing_method)]
PriorityLevel = Annotated[int, Field(ge=0, le=MAX_PRIORITY)]


class LlmConfig(Wire):
    uris: Annotated[list[Uri], Field(min_length=1, max_length=64)]
    tokenizer: Annotated[str, Field(max_length=1024)] | None = None
    token_rate_limit: TokenRates | None = None
    routing_method: RoutingMethod | None = None


class Priority(Wire):
    default_priority: PriorityLevel | None = None
    per_account_priority: Annotated[dict[AccountId, PriorityLevel], Field(max_length=64)] | None = None

    @model_validator(mode="after")
    def _has_a_default(self) -> Priority:
        if self.per_account_priority and self.default_priority is None:
            raise ValueError("perAccountPriority: needs a defaultPriority")
        return self


class LlmInvocationConfig(Wire):
    priority: Priority | None = None


class LlmConfigUpdate(Wire):
    token_rate_limit: TokenRates | None = None
    routing_method: RoutingMethod | None = None

    @model_validator(mode="after")
    def _says_something(self) -> LlmConfigUpdate:
        if not self.model_fields_set:
            raise ValueError("llmConfig: one of tokenRateLimit and routingMethod is needed")
        return self


class ModelUpdate(Wire):
    model_name: Name
    llm_config: LlmConfigUpdate
