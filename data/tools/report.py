"""Collects facts and findings about a data set and renders them as text or JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from utils.files import list_some

PROBLEM, NOTE = "problem", "note"
CHECKS = (
    "index",
    "records",
    "header",
    "identities",
    "labels",
    "images",
    "sizes",
    "channels",
    "gaps",
    "singletons",
    "duplicates",
    "conflicts",
    "overlap",
    "property",
    "manifest",
)
_KEPT = 1000  # examples kept of a finding; further ones are only counted


@dataclass
class Finding:
    """What a check found.

    Attributes:
        check: Name of the check, one of CHECKS.
        severity: PROBLEM or NOTE.
        message: What is wrong.
        count: How often it was found.
        examples: The first places where it was found.
    """

    check: str
    severity: str
    message: str
    count: int = 0
    examples: list[str] = field(default_factory=list)

    def add(self, example: str) -> None:
        """Counts one more case and keeps it as an example if there is room."""
        self.count += 1
        if len(self.examples) < _KEPT or self.check == "manifest":  # `verify` names every record
            self.examples.append(example)


class Report:
    """Facts about a set and what is wrong with it.

    Args:
        dataset: Name of the set.
        allowed: Checks whose findings are only notes.

    Attributes:
        facts: Facts by name.
    """

    def __init__(self, dataset: str, allowed: Sequence[str]) -> None:
        self.dataset = dataset
        self.allowed = frozenset(allowed)
        self.facts: dict[str, Any] = {}
        self._findings: dict[tuple[str, str], Finding] = {}

    def add(self, check: str, message: str, example: str | None = None, note: bool = False) -> None:
        """Adds one case of a finding.

        Args:
            check: Name of the check, one of CHECKS.
            message: What is wrong; cases with the same message are counted together.
            example: Where it was found.
            note: Whether it is a note rather than a problem.
        """
        assert check in CHECKS
        severity = NOTE if note or check in self.allowed else PROBLEM
        finding = self._findings.setdefault((check, message), Finding(check, severity, message))
        finding.add(example or "")

    @property
    def findings(self) -> list[Finding]:
        """Problems first, then notes, each in the order found."""
        return sorted(self._findings.values(), key=lambda finding: finding.severity == NOTE)

    @property
    def healthy(self) -> bool:
        """Whether nothing but notes was found."""
        return all(finding.severity == NOTE for finding in self.findings)

    def as_json(self) -> dict[str, Any]:
        """Returns what `--json` writes."""
        return {
            "dataset": self.dataset,
            "healthy": self.healthy,
            "facts": self.facts,
            "findings": [asdict(finding) for finding in self.findings],
        }

    def as_text(self) -> str:
        """Returns the report as lines of text."""
        lines = [self.dataset]
        lines += [f"  {name.replace('_', ' ')}: {value}" for name, value in self.facts.items()]
        for finding in self.findings:
            times = f" ({finding.count} times)" if finding.count > 1 else ""
            lines.append(f"{finding.severity.upper()} {finding.check}: {finding.message}{times}")
            shown = [example for example in finding.examples if example]
            limit = len(shown) if finding.check == "manifest" else 10
            lines += [f"    {line}" for line in list_some(shown, limit).splitlines()]
        lines.append("healthy" if self.healthy else "NOT healthy: see the problems above")
        return "\n".join(lines)
