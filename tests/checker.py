"""Says which promises a run has broken (PROTOCOL §2.2), from what its clients saw and what its containers wrote down.

Pure: it talks to no server, and the same one judges simulated runs and those of real processes. An operation whose
ending is UNKNOWN may have happened or not, and both are allowed from then on.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum


class Kind(StrEnum):
    SUBMIT = "submit"
    READ = "read"
    CANCEL = "cancel"


class Ending(StrEnum):
    """OK: it was done. FAILED: it was refused, and has no effect. UNKNOWN: nobody told."""

    OK = "ok"
    FAILED = "failed"
    UNKNOWN = "unknown"


# What a read may see. UNKNOWN_ID is the answer for an ID that nobody knows.
OPEN = frozenset({"queued", "running"})
UNKNOWN_ID = "unknown-id"
# Ends that need no attempt.
UNSTARTED = frozenset({"cancelled", "expired", "errored", "dead"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Operation:
    """What one client did, and what it learned. `name` is the client's own for the request, and what the container
    writes down; a repeated submit has the name and the Idempotency-Key of the first. Times are of one clock.

    `state`, `digest` (of the visible answer) and `attempt` are those of a record that was shown, "" and 0 if none was.
    """

    kind: Kind
    name: str
    ending: Ending
    began_at: float
    ended_at: float
    request_id: str = ""
    state: str = ""
    digest: str = ""
    attempt: int = 0
    note: str = ""

    @property
    def terminal(self) -> bool:
        return self.state not in OPEN and self.state not in ("", UNKNOWN_ID)

    def __str__(self) -> str:
        seen = " ".join(
            str(part) for part in (self.request_id, self.state, self.digest[:12], self.attempt or "") if part
        )
        times = f"{self.began_at:9.3f} to {self.ended_at:9.3f}"
        return f"{times}  {self.kind} {self.name}: {self.ending} {seen} {self.note}".rstrip()


@dataclass(frozen=True, slots=True, kw_only=True)
class Census:
    """What the store holds when all is quiet: the state by request ID, tombstones left out, and the two counts that
    it keeps beside its records."""

    states: Mapping[str, str]
    queued: int
    running: int

    @property
    def settled(self) -> bool:
        """Nothing runs, and nothing is counted that is not there."""
        states = list(self.states.values())
        return not self.running and "running" not in states and self.queued <= states.count("queued")


@dataclass(frozen=True, slots=True, kw_only=True)
class Terms:
    """Under which a run is judged. `may_expire`: there were not workers enough to run everything in time. Those
    requests `may_stay_open` whose end nobody waited for."""

    max_attempts: int = 3
    deadline_s: float = 86_400.0
    slack_s: float = 60.0
    may_expire: bool = False
    may_stay_open: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Violation:
    """`story` is everything that is known of the request."""

    invariant: str
    name: str
    text: str
    story: tuple[str, ...] = ()

    def __str__(self) -> str:
        return "\n  ".join([f"{self.invariant}: {self.name}: {self.text}", *self.story])


DEFAULT_TERMS = Terms()


def violations(
    history: Sequence[Operation], starts: Mapping[str, int], census: Census | None = None, terms: Terms = DEFAULT_TERMS
) -> list[Violation]:
    """Every broken promise; empty if all were kept. `starts` counts the attempts that containers wrote down, by name;
    without a `census` nothing is counted."""
    by_name: dict[str, list[Operation]] = defaultdict(list)
    for operation in history:
        by_name[operation.name].append(operation)
    found: list[Violation] = []
    for name, operations in by_name.items():
        story = (*(str(operation) for operation in operations), f"attempts written down: {starts.get(name, 0)}")
        request = _Request(name, operations, starts.get(name, 0), terms)
        found += [
            Violation(invariant=invariant, name=name, text=text, story=story) for invariant, text in request.broken()
        ]
    found += [
        Violation(invariant="honest refusals", name=name, text="an attempt of what nobody submitted")
        for name in starts
        if name not in by_name
    ]
    if census is not None:
        found += _miscounted(by_name, census)
    return found


@dataclass(frozen=True, slots=True)
class _Request:
    name: str
    operations: Sequence[Operation]
    starts: int
    terms: Terms

    def broken(self) -> Iterator[tuple[str, str]]:
        """The invariant, and how it was broken."""
        submits = [operation for operation in self.operations if operation.kind is Kind.SUBMIT]
        accepted = [operation for operation in submits if operation.ending is Ending.OK]
        if len({operation.request_id for operation in accepted}) > 1:
            yield "one visible result", "one Idempotency-Key led to two requests"
        if self.starts > self.terms.max_attempts:
            yield "attempts", f"{self.starts} attempts, and {self.terms.max_attempts} are allowed"
        if submits and all(operation.ending is Ending.FAILED for operation in submits) and self.starts:
            yield "honest refusals", "it was refused, and it ran"
        shown = [operation for operation in self.operations if operation.state]
        yield from self._unequal(shown)
        if accepted:
            yield from self._lost(shown)
            yield from self._overdue(min(operation.began_at for operation in submits), shown)

    def _unequal(self, shown: Sequence[Operation]) -> Iterator[tuple[str, str]]:
        ends = [operation for operation in shown if operation.terminal]
        results = {(operation.state, operation.digest, operation.attempt) for operation in ends}
        if len(results) > 1:
            yield "one visible result", f"{len(results)} different results were shown"
        if not ends:
            return
        seen_at = min(operation.ended_at for operation in ends)
        if any(operation.began_at > seen_at and not operation.terminal for operation in shown):
            yield "one visible result", "a result that had been shown was gone again"
        if ends[0].state == "fulfilled" and not self.starts:
            yield "one visible result", "a result was shown, and no attempt was made"
        cancelled = [
            operation
            for operation in self.operations
            if operation.kind is Kind.CANCEL and operation.ending is Ending.OK
        ]
        if cancelled and any(operation.state != "cancelled" for operation in ends):
            yield "one visible result", "it was cancelled, and had another end"

    def _lost(self, shown: Sequence[Operation]) -> Iterator[tuple[str, str]]:
        ends = [operation for operation in shown if operation.terminal]
        if any(operation.state == UNKNOWN_ID for operation in shown):
            yield "none lost", "it was accepted, and unknown to who asked for it"
        if not ends:
            if not self.terms.may_stay_open:
                yield "none lost", f"it was accepted, and read {shown[-1].state if shown else 'nothing'} at the end"
            return
        if ends[-1].state == "abandoned":
            yield "none lost", "it was accepted, and abandoned"
        if ends[-1].state == "expired" and not self.terms.may_expire:
            yield "none lost", "it expired, though there was time and there were workers"
        if not self.starts and ends[-1].state not in UNSTARTED:
            yield "none lost", f"it ended {ends[-1].state} without an attempt"

    def _overdue(self, accepted_at: float, shown: Sequence[Operation]) -> Iterator[tuple[str, str]]:
        due_at = accepted_at + self.terms.deadline_s + self.terms.slack_s
        late = [operation for operation in shown if operation.state in OPEN and operation.began_at > due_at]
        if late:
            yield "deadline", f"it still read {late[0].state} {late[0].began_at - accepted_at:.0f} s after it was sent"


def _miscounted(by_name: Mapping[str, Sequence[Operation]], census: Census) -> Iterator[Violation]:
    """accepted = queued + running + done + dead. What was refused because the store's own answer was lost may be there
    too, queued without a message: it never runs, expires, and may have been taken off the count."""
    accepted: dict[str, str] = {}
    others = 0
    for name, operations in by_name.items():
        submits = [operation for operation in operations if operation.kind is Kind.SUBMIT]
        ids = {operation.request_id for operation in submits if operation.ending is Ending.OK}
        accepted |= dict.fromkeys(ids, name)
        others += not ids and bool(submits)
    for request_id, name in accepted.items():
        if request_id not in census.states:
            yield Violation(invariant="conservation", name=name, text=f"{request_id} is in no state at all")
    if len(census.states) > len(accepted) + others:
        yield Violation(
            invariant="conservation",
            name="all",
            text=f"{len(accepted)} were accepted, {others} may be there without, but there are {len(census.states)}",
        )
    for state, counted in (("queued", census.queued), ("running", census.running)):
        held = sum(found == state for found in census.states.values())
        unaccepted = sum(found == state for each, found in census.states.items() if each not in accepted)
        if not held - (unaccepted if state == "queued" else 0) <= counted <= held:
            yield Violation(
                invariant="conservation", name="all", text=f"{counted} are counted as {state}, and {held} are"
            )
