"""What the pairs job did with its input, in counts: kept beside the pairs, and told in words.

May import: the standard library.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class EventCounts:
    """What was read.

    Attributes:
        events: Positive train rows.
        repeated_events: Of these, later ones of the same user and item, which count once.
        unknown_item_events: Rows, of any split, that named no item of the catalogue and were
            dropped (``data.unknown_items: drop``).
        users: Users with a positive.
        users_capped: Users with more items than ``max_items_per_user``.
        items_capped: Items with more users than ``max_users_per_item`` (Swing).
        catalogue_items: Items of the catalogue.
        items: Items with a positive; those without stand in no pair.
    """

    events: int
    repeated_events: int
    unknown_item_events: int
    users: int
    users_capped: int
    items_capped: int
    catalogue_items: int
    items: int


@dataclass(frozen=True)
class SourceCounts:
    """Pairs of one source.

    Attributes:
        steps: Pairs left after each step, in order, from what had a score to what is written.
        target_items: Items that stand as a target.
        trigger_items: Items that stand as a trigger.
        seconds: Time it took, the judge included.
    """

    steps: Mapping[str, int]
    target_items: int
    trigger_items: int
    seconds: float

    @property
    def num_pairs(self) -> int:
        """Pairs that are written."""
        return list(self.steps.values())[-1]


@dataclass(frozen=True)
class PairReport:
    """The whole job; ``items_covered`` stand in at least one pair."""

    events: EventCounts
    sources: Mapping[str, SourceCounts]
    items_covered: int

    @property
    def num_pairs(self) -> int:
        """Pairs of all sources."""
        return sum(counts.num_pairs for counts in self.sources.values())

    def to_json(self) -> str:
        """Return the report as JSON, with ``items_without_pair`` spelt out."""
        fields = asdict(self)
        fields["items_without_positive"] = self.events.catalogue_items - self.events.items
        fields["items_without_pair"] = self.events.items - self.items_covered
        return json.dumps(fields, indent=2)

    @classmethod
    def from_json(cls, text: str) -> "PairReport":
        """Return the report that :meth:`to_json` wrote."""
        fields = json.loads(text)
        sources = {name: SourceCounts(**counts) for name, counts in fields["sources"].items()}
        return cls(EventCounts(**fields["events"]), sources, fields["items_covered"])

    def lines(self) -> list[str]:
        """Return the report in words, one line per source."""
        events = self.events
        lines = [
            f"{events.events:,} positive train events of {events.users:,} users on "
            f"{events.items:,} of {events.catalogue_items:,} items "
            f"({events.repeated_events:,} repeat an earlier one, {events.unknown_item_events:,} "
            f"of unknown items dropped, {events.users_capped:,} users and "
            f"{events.items_capped:,} items capped)"
        ]
        for name, counts in self.sources.items():
            steps = ", ".join(f"{step} {number:,}" for step, number in counts.steps.items())
            lines.append(
                f"  {name:<8}{counts.num_pairs:>11,} pairs, {counts.target_items:,} target items, "
                f"{counts.trigger_items:,} trigger items, {counts.seconds:.1f} s ({steps})"
            )
        lines.append(
            f"  {self.items_covered:,} items stand in a pair, "
            f"{events.items - self.items_covered:,} with a positive in none"
        )
        return lines
