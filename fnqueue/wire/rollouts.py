"""How a function's calls are shared among its versions."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, model_validator

from fnqueue.wire.fields import Wire, unique

Weight = Annotated[float, Field(ge=0, le=100, allow_inf_nan=False)]


class VersionWeight(Wire):
    """Per cent of the calls that name the function only."""

    function_version_id: Annotated[str, Field(min_length=1, max_length=64)]
    weight: Weight


class SetWeights(Wire):
    """Body of `PUT /functions/{functionId}/weights`. Versions that are not named share the rest evenly; with an empty
    list, all do."""

    weights: Annotated[list[VersionWeight], Field(max_length=1024)]

    @model_validator(mode="after")
    def _names_each_once(self) -> SetWeights:
        unique((each.function_version_id.lower() for each in self.weights), "weights")
        return self


class VersionShare(Wire):
    """`weight` as it was set, absent where none was; `share` is the per cent of calls that the version gets now, of
    those versions that can be called."""

    function_version_id: str
    function_status: str
    weight: float | None = None
    share: float


class Weights(Wire):
    function_id: str
    weights: list[VersionShare]
