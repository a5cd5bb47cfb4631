"""The loop that turns plans into tokens, and the one thread that talks to a backend."""

from cortexstream.engine.core import EngineCore
from cortexstream.engine.stats import EngineStats
from cortexstream.engine.thread import EngineThread

__all__ = ["EngineCore", "EngineStats", "EngineThread"]
