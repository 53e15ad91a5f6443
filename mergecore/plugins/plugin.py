"""What all plug-ins are: frozen parameters with a name and a version."""

from __future__ import annotations

from typing import Any, ClassVar

from pydantic import ConfigDict

from mergecore.identity.numbers import Numbers


class Plugin(Numbers):
    """Parameters and nothing else. `name` is how a spec calls it. Bump `version` by hand when numbers change."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, defer_build=True)

    name: ClassVar[str]
    version: ClassVar[int] = 1

    def revision(self, count: int) -> int:
        """Return the version that enters the key: `version`, or a higher one where only some numbers changed.

        A plug-in overrides it where other values, or other counts of experts, keep their numbers, and with them their
        stored results. count: of the experts.
        """
        return self.version

    @property
    def drawn_by(self) -> frozenset[str]:
        """By which ids of the experts its random numbers are drawn: 'tensors', 'files', or none; of its parts too."""
        parts = (getattr(self, name) for name in type(self).model_fields)
        return frozenset[str]().union(*(getattr(part, "drawn_by", ()) for part in parts))

    def parameters(self) -> dict[str, Any]:
        """Return the fields as plain JSON, with defaults. They enter the step's key."""
        return self.model_dump(mode="json")
