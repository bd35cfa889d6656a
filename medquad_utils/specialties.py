"""Fields of medicine, and the rows of a data set that belong to one."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass

from medquad_utils import CourseError
from medquad_utils.files import ASSETS, Row
from medquad_utils.splits import focus_of


@dataclass(frozen=True)
class Specialty:
    """A field of medicine: a pattern for the names of its diseases, and UMLS semantic types."""

    names: str
    semantic_types: tuple[str, ...] = ()

    def holds(self, row: Row) -> bool:
        """Return whether a row's focus, a synonym or a semantic type belongs to the field."""
        if set(self.semantic_types) & set(row["semantic_type"] or ()):
            return True
        names = [row["focus"] or "", focus_of(row), *(row["synonyms"] or ())]
        pattern = re.compile(rf"\b(?:{self.names})", re.IGNORECASE)  # re keeps it compiled
        return bool(self.names) and any(map(pattern.search, names))


_TOML = (ASSETS / "specialties.toml").read_text(encoding="utf-8")
SPECIALTIES = {
    name: Specialty("|".join(entry["names"]), tuple(entry.get("semantic_types", ())))
    for name, entry in tomllib.loads(_TOML).items()
}


def select(rows: Sequence[Row], specialty: str, least: int = 50) -> list[Row]:
    """Select the rows of a specialty, a name of ``SPECIALTIES``; ``least`` or more."""
    if specialty not in SPECIALTIES:
        raise CourseError(
            f"no specialty {specialty!r}: there are {', '.join(SPECIALTIES)}. Take one of them."
        )
    selected = [row for row in rows if SPECIALTIES[specialty].holds(row)]
    if len(selected) < least:
        raise CourseError(
            f"{len(selected)} rows about {specialty!r} are too few to train on (at least {least}): "
            "widen it or load more rows."
        )
    return selected
