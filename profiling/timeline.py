"""The log of births, deaths and tags that a ledger writes, and the questions one can ask of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from memrt.profiling.accounts import Account, Place

__all__ = ["Breakdown", "Record", "Region", "Timeline"]


class Region(NamedTuple):
    """What ran when a storage was born: optimizer step, phase, module."""

    step: int
    phase: str
    module: str


@dataclass(slots=True, eq=False, kw_only=True)
class Record:
    """One storage. `tags` are (instant, account); the first one reaches back to birth."""

    num_bytes: int
    place: Place
    operator: str
    module: str
    owner: str
    birth: int = -1
    death: int | None = None
    num_saved: int = 0
    tags: list[tuple[int, Account]] = field(default_factory=list)

    @property
    def alive(self) -> bool:
        """Whether the storage still exists."""
        return self.death is None

    @property
    def account(self) -> Account | None:
        """The account now; None when nobody has booked it."""
        return self.tags[-1][1] if self.tags else None

    def account_at(self, instant: int) -> Account:
        """The account at an instant of the log."""
        if not self.tags:
            return Account.WORKSPACE
        current = self.tags[0][1]
        for tagged, account in self.tags:
            if tagged > instant:
                break
            current = account
        return current


@dataclass(frozen=True, slots=True, kw_only=True)
class Breakdown:
    """Live bytes at one instant."""

    instant: int
    region: Region
    peak_bytes: int
    accounts: dict[str, int]
    """Bytes on the device by account; they sum to `peak_bytes`."""
    places: dict[str, int]
    """Bytes by place at that instant."""
    owners: dict[str, int]
    """Bytes on the device by owner."""

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "peak_bytes": self.peak_bytes,
            "accounts": dict(self.accounts),
            "places": dict(self.places),
            "owners": dict(self.owners),
            "region": {
                "step": self.region.step,
                "phase": self.region.phase,
                "module": self.region.module,
            },
        }


class Timeline:
    """Append-only log of a run's storages."""

    def __init__(self) -> None:
        self.records: list[Record] = []
        self._events: list[tuple[Record, bool, Region | None]] = []
        self._regions: dict[tuple[int, str, str], Region] = {}

    def region(self, *, step: int, phase: str, module: str) -> Region:
        """The one region object of these three."""
        key = (step, phase, module)
        found = self._regions.get(key)
        if found is None:
            found = self._regions[key] = Region(step, phase, module)
        return found

    def birth(self, record: Record, region: Region) -> None:
        """A storage came to be."""
        record.birth = len(self._events)
        self.records.append(record)
        self._events.append((record, True, region))

    def death(self, record: Record) -> None:
        """A storage is gone."""
        record.death = len(self._events)
        self._events.append((record, False, None))

    def tag(self, record: Record, account: Account, *, reach_back: bool = False) -> None:
        """A storage belongs to an account from now on (from birth on, when it is the first tag).

        Workspace is what nobody has booked: with `reach_back` the account also takes the time since
        the storage was given back by its last one.
        """
        if reach_back and record.tags and record.tags[-1][1] is Account.WORKSPACE:
            record.tags[-1] = (record.tags[-1][0], account)
        else:
            record.tags.append((len(self._events), account))

    @property
    def now(self) -> int:
        """The instant of the next event."""
        return len(self._events)

    # ---------------------------------------------------------------- questions

    def live_bytes(
        self, *, place: Place = Place.DEVICE, size: Callable[[Record], int] | None = None
    ) -> Iterable[tuple[int, int, Region | None]]:
        """(instant, live bytes in `place`, region of the birth or None for a death)."""
        live = 0
        for instant, (record, born, region) in enumerate(self._events):
            if record.place is place:
                num_bytes = size(record) if size else record.num_bytes
                live += num_bytes if born else -num_bytes
                yield instant, live, region

    def peak(
        self,
        *,
        place: Place = Place.DEVICE,
        where: Callable[[Region], bool] | None = None,
        size: Callable[[Record], int] | None = None,
    ) -> Breakdown:
        """The first instant of the highest live bytes, in the regions that `where` admits."""
        best, best_instant = -1, -1
        for instant, live, region in self.live_bytes(place=place, size=size):
            if live > best and region is not None and (where is None or where(region)):
                best, best_instant = live, instant
        return self.breakdown(best_instant, place=place)

    def peaks_by(self, key: Callable[[Region], Any]) -> dict[Any, Breakdown]:
        """The peak of every group of regions with the same key."""
        best: dict[Any, tuple[int, int]] = {}
        for instant, live, region in self.live_bytes():
            if region is not None:
                group = key(region)
                if group not in best or live > best[group][0]:
                    best[group] = (live, instant)
        return {group: self.breakdown(instant) for group, (_, instant) in best.items()}

    def breakdown(self, instant: int, *, place: Place = Place.DEVICE) -> Breakdown:
        """Accounts, places and owners at an instant of the log."""
        accounts = {account.value: 0 for account in Account}
        places = {each.value: 0 for each in Place}
        owners: dict[str, int] = {}
        for record in self.alive_at(instant):
            places[record.place.value] += record.num_bytes
            if record.place is place:
                accounts[record.account_at(instant).value] += record.num_bytes
                owners[record.owner] = owners.get(record.owner, 0) + record.num_bytes
        region = self._events[instant][2] if instant >= 0 else None
        return Breakdown(
            instant=instant,
            region=region or Region(-1, "load", ""),
            peak_bytes=places[place.value],
            accounts=accounts,
            places=places,
            owners=dict(sorted(owners.items(), key=lambda item: -item[1])),
        )

    def alive_at(self, instant: int) -> list[Record]:
        """Records of the storages that live at an instant."""
        return [
            record
            for record in self.records
            if record.birth <= instant and (record.death is None or record.death > instant)
        ]

    def phase_peaks(self) -> dict[str, int]:
        """Highest live bytes on the device of every phase."""
        peaks: dict[str, int] = {}
        for _, live, region in self.live_bytes():
            if region is not None:
                peaks[region.phase] = max(peaks.get(region.phase, 0), live)
        return peaks

    def _account_changes(self) -> list[tuple[int, str, int]]:
        """(instant, account, bytes gained or lost on the device), in order."""
        changes: list[tuple[int, str, int]] = []
        for record in self.records:
            if record.place is not Place.DEVICE:
                continue
            current = record.account_at(record.birth)
            changes.append((record.birth, current.value, record.num_bytes))
            for instant, account in record.tags[1:]:
                changes.append((instant, current.value, -record.num_bytes))
                changes.append((instant, account.value, record.num_bytes))
                current = account
            if record.death is not None:
                changes.append((record.death, current.value, -record.num_bytes))
        changes.sort(key=lambda change: change[0])
        return changes

    def account_maxima(self) -> dict[str, int]:
        """The highest bytes that each account ever held on the device (not at one instant)."""
        held = {account.value: 0 for account in Account}
        highest = dict(held)
        for _, account_name, num_bytes in self._account_changes():
            held[account_name] += num_bytes
            highest[account_name] = max(highest[account_name], held[account_name])
        return highest

    def top_allocations(self, instant: int, *, count: int = 10) -> list[dict[str, Any]]:
        """The largest storages alive on the device at an instant."""
        alive = [r for r in self.alive_at(instant) if r.place is Place.DEVICE]
        alive.sort(key=lambda record: -record.num_bytes)
        return [
            {
                "bytes": record.num_bytes,
                "account": record.account_at(instant).value,
                "owner": record.owner,
                "module": record.module,
                "operator": record.operator,
            }
            for record in alive[:count]
        ]

    def samples(self, *, count: int = 500) -> list[dict[str, Any]]:
        """Live device bytes over the run, thinned to about `count` points that keep the maxima.

        `accounts` sum to `bytes` at every point.
        """
        points = [(i, live, region) for i, live, region in self.live_bytes() if region is not None]
        width = max(1, -(-len(points) // count))
        thinned = [
            max(points[start : start + width], key=lambda point: point[1])
            for start in range(0, len(points), width)
        ]
        accounts = self._accounts_at([instant for instant, _, _ in thinned])
        return [
            {
                "instant": instant,
                "bytes": live,
                "step": region.step,
                "phase": region.phase,
                "accounts": held,
            }
            for (instant, live, region), held in zip(thinned, accounts, strict=True)
        ]

    def _accounts_at(self, instants: Sequence[int]) -> Iterator[dict[str, int]]:
        """Bytes on the device by account at each of `instants`, which must rise."""
        held = {account.value: 0 for account in Account}
        changes = iter(self._account_changes())
        pending = next(changes, None)
        for instant in instants:
            while pending is not None and pending[0] <= instant:
                held[pending[1]] += pending[2]
                pending = next(changes, None)
            yield dict(held)
