"""What an examination found: facts, findings, and how they are told."""

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
_KEPT = 1000  # examples kept of a finding; the rest is counted


@dataclass
class Finding:
    """What a check found: how often, and where at first."""

    check: str
    severity: str
    message: str
    count: int = 0
    examples: list[str] = field(default_factory=list)

    def add(self, example: str) -> None:
        self.count += 1
        if len(self.examples) < _KEPT or self.check == "manifest":  # verify names every record
            self.examples.append(example)


class Report:
    """Facts about a set and what is wrong with it."""

    def __init__(self, dataset: str, allowed: Sequence[str]) -> None:
        self.dataset = dataset
        self.allowed = frozenset(allowed)
        self.facts: dict[str, Any] = {}
        self._findings: dict[tuple[str, str], Finding] = {}

    def add(self, check: str, message: str, example: str | None = None, note: bool = False) -> None:
        """One more case of what `message` says."""
        assert check in CHECKS
        severity = NOTE if note or check in self.allowed else PROBLEM
        finding = self._findings.setdefault((check, message), Finding(check, severity, message))
        finding.add(example or "")

    @property
    def findings(self) -> list[Finding]:
        """Problems first, each kind in the order found."""
        return sorted(self._findings.values(), key=lambda finding: finding.severity == NOTE)

    @property
    def healthy(self) -> bool:
        """Whether nothing but notes was found."""
        return all(finding.severity == NOTE for finding in self.findings)

    def as_json(self) -> dict[str, Any]:
        """What `--json` writes."""
        return {
            "dataset": self.dataset,
            "healthy": self.healthy,
            "facts": self.facts,
            "findings": [asdict(finding) for finding in self.findings],
        }

    def as_text(self) -> str:
        """What people read."""
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
