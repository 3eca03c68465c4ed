"""Settings of the verbs that listen on a port. As in `verbs.py`, the attribute docstrings are the help texts."""

from __future__ import annotations

from dataclasses import dataclass, field

from ..errors import ConfigError
from .verbs import ModelConfig, RunConfig

__all__ = ["ExploreConfig"]


@dataclass(frozen=True)
class ExploreConfig:
    """Look at a model in the browser: a slider for the budget, life maps, answers, FLOPs and time.

    Attributes:
        model: Model and weights.
        paths: Photos, folders or glob patterns: the examples of the page, and the folder that its second tab measures.
            Default for demo: the photos that come with patchlife.
        host: Address to listen on. The default is reachable from this machine only.
        port: Port to listen on. Default: the first free one from 7860 on.
        open: Open the page in the default browser.
        trust: Open an exported .pt2 file. Opening one can run any code, so give only files that you exported.
        run: Device, number format and photo reading.
    """

    model: ModelConfig
    paths: tuple[str, ...] = field(default=(), metadata={"positional": True})
    host: str = field(default="127.0.0.1", metadata={"metavar": "ADDRESS"})
    port: int | None = field(default=None, metadata={"metavar": "PORT"})
    open: bool = False
    trust: bool = False
    run: RunConfig = field(default_factory=RunConfig)

    def __post_init__(self) -> None:
        if self.port is not None and not 1 <= self.port <= 65535:
            raise ConfigError(f"port must be 1 to 65535, got {self.port}")
