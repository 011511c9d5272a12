"""What a run needs outside its steps: to load, to evaluate, to save and to resume.

From one simulated run: what lies on the device between two steps (`rest`), and how far above that
each of them goes.

    load      what is placed and the one weight that is on its way there (`memrt.load`); a plan
              from a config alone draws random ones, but that one weight of a file is counted
    evaluate  rest, and the forward of one batch without a graph (and without logits, where a
              strategy owns the head)
    save      rest; on the host a file of weights at most, for what comes from a device is copied
              there before it is written, and of the optimizer one tensor
    resume    rest and one tensor; on the host that tensor. Optimizer state is read through a map of
              its file, whose pages the system may drop, so that they are not counted

Not counted: what transformers makes of a model whose files have other weights than the model
(fused experts are split again when they are saved).
"""

from __future__ import annotations

from dataclasses import dataclass, fields

from memrt.profiling.accounts import Account, Place
from memrt.profiling.timeline import Timeline

__all__ = ["EVALUATE", "Outside"]

EVALUATE = "evaluate"
"""The phase in which a ledger counts an evaluation."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outside:
    """Bytes; every one is affine in the number of layers."""

    load_bytes: int
    """Highest of device and host together while the weights come."""
    loaded_bytes: int
    """What stays of it."""
    rest_bytes: int
    rest_host_bytes: int
    evaluate_bytes: int
    evaluate_host_bytes: int
    weights_bytes: int
    largest_weight_bytes: int
    largest_state_bytes: int
    """Of the optimizer, in one tensor."""

    @classmethod
    def of(cls, timeline: Timeline, *, loading: Timeline, steps_end: int) -> Outside:
        """From the log of a run that evaluated after its steps, the last event of which was before
        the instant `steps_end`, and the log of its loading."""
        rest = timeline.breakdown(steps_end - 1).places
        alive = timeline.alive_at(steps_end - 1)
        sizes: dict[Account, list[int]] = {Account.WEIGHTS: [0], Account.OPTIMIZER: [0]}
        for record in alive:
            account = record.account_at(steps_end - 1)
            if account in sizes:
                sizes[account].append(record.num_bytes)
        highest = {
            place: max(
                (
                    live
                    for _, live, region in timeline.live_bytes(place=place)
                    if region is not None and region.phase == EVALUATE
                ),
                default=0,
            )
            for place in (Place.DEVICE, Place.HOST)
        }
        device, host = rest[Place.DEVICE.value], rest[Place.HOST.value]
        return cls(
            load_bytes=max((live for _, live, _ in loading.live_bytes()), default=0),
            loaded_bytes=loading.breakdown(loading.now - 1).places[Place.DEVICE.value],
            rest_bytes=device,
            rest_host_bytes=host,
            evaluate_bytes=max(device, highest[Place.DEVICE]),
            evaluate_host_bytes=max(host, highest[Place.HOST]),
            weights_bytes=sum(sizes[Account.WEIGHTS]),
            largest_weight_bytes=max(sizes[Account.WEIGHTS]),
            largest_state_bytes=max(sizes[Account.OPTIMIZER]),
        )

    def carried(self, below: Outside, steps: int) -> Outside:
        """`steps` layers above this one, `below` being one layer below it."""
        return Outside(
            **{
                name: mine + (mine - getattr(below, name)) * steps
                for name, mine in ((f.name, getattr(self, f.name)) for f in fields(self))
            }
        )

    def phases(self, *, largest_file_bytes: int) -> dict[str, dict[str, int]]:
        """Peaks of each on the device and on the host, files being at most of this size."""
        file = max(min(largest_file_bytes, self.weights_bytes), self.largest_weight_bytes)
        largest = max(self.largest_weight_bytes, self.largest_state_bytes)
        return {
            "load": {
                "device": self.load_bytes,
                "host": max(self.load_bytes - self.loaded_bytes, self.largest_weight_bytes),
            },
            "evaluate": {"device": self.evaluate_bytes, "host": self.evaluate_host_bytes},
            "save": {
                "device": self.rest_bytes,
                "host": self.rest_host_bytes + max(file, self.largest_state_bytes),
            },
            "resume": {"device": self.rest_bytes + largest, "host": self.rest_host_bytes + largest},
        }
