"""Where a graph came from: what exports to the model's own engines need, and the graph does not show."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

_NAME = "_name_or_path"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


@dataclass(frozen=True)
class Origin:
    """The model that was captured.

    Args:
        config: configuration of a model of transformers, as values for JSON; empty for other models.
        aliases: further names of tensors that several modules share, with their first name, by which the graph knows
            them: `lm_head.weight` of a tied head, every weight of a layer that stands in a list twice.
    """

    config: Mapping[str, Any] = field(default_factory=dict)
    aliases: Mapping[str, str] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The hub id or folder that the model was loaded from; empty if it was made in memory."""
        return str(self.config.get(_NAME) or "")

    @property
    def hub_id(self) -> str:
        """`name`, if it is the id of a model on the hub, such as `ByteDance/Ouro-1.4B`; otherwise empty."""
        return self.name if _HUB_ID.fullmatch(self.name) and not Path(self.name).exists() else ""

    def to_dict(self) -> dict[str, Any]:
        """Values for JSON. A folder of this machine is left out, since a saved program may go anywhere."""
        config = {**self.config, _NAME: self.hub_id} if self.config else {}
        return {"config": config, "aliases": dict(self.aliases)}

    @staticmethod
    def from_dict(data: Any) -> Origin:
        """Reads `to_dict`; what is not a name or a mapping is left out, since files are untrusted."""
        data = data if isinstance(data, Mapping) else {}
        config, aliases = (data.get(key) if isinstance(data.get(key), Mapping) else {} for key in ("config", "aliases"))
        return Origin(dict(config or {}), {str(name): str(first) for name, first in (aliases or {}).items()})
