"""Where a request stands, as the JSON envelope of `exec` (contract/invocation.md §3.2, §5, D17). Pure."""

from __future__ import annotations

import orjson
from multidict import CIMultiDict

from api import headers, problems
from api.answers import Answer

# They tell of the function's body by itself, which is a part of another one here.
_OF_THE_BODY = frozenset({"etag", "last-modified", "accept-ranges"})


def enclose(answer: Answer, *, result_url: str) -> Answer:
    """What `api.answers` says, in an envelope; what went wrong stays a problem.

    `result_url` is where the answer can be read as it is, for one that is no JSON.
    """
    if answer.status >= 400:
        return answer
    arrived = answer.headers
    found = CIMultiDict((name, value) for name, value in arrived.items() if not _tells_of_the_body(name))
    members: dict[str, object] = {"reqId": arrived[headers.REQUEST_ID], "status": arrived[headers.STATUS]}
    status = 200
    if answer.status == 202:
        status = 202
        if headers.PERCENT_COMPLETE in arrived:
            members["percentComplete"] = int(arrived[headers.PERCENT_COMPLETE])
    else:
        members["percentComplete"] = 100
        if location := found.pop("Location", ""):
            members["responseReference"] = location
    if answer.body:
        if not _is_json(answer.body):
            return _not_json(found, result_url)
        members["response"] = orjson.Fragment(answer.body)
    found["Content-Type"] = "application/json"
    return Answer(status=status, headers=found, body=orjson.dumps(members))


def _not_json(found: CIMultiDict[str], result_url: str) -> Answer:
    """It ran, and its answer is kept: only this way of asking cannot show it."""
    found["Content-Type"] = problems.CONTENT_TYPE
    detail = f"the function's answer is not JSON, which this envelope is made of; read it as it is at {result_url}"
    content = problems.body(problems.NOT_JSON, detail, requestId=found[headers.REQUEST_ID])
    return Answer(status=problems.NOT_JSON.status, headers=found, body=content)


def _tells_of_the_body(name: str) -> bool:
    key = name.lower()
    return key in _OF_THE_BODY or key.startswith("content-")


def _is_json(body: bytes) -> bool:
    try:
        orjson.loads(body)
    except orjson.JSONDecodeError:
        return False
    return True
