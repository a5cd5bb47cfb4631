"""Which backend runs here: probe, choose, load. The only module that knows concrete backends, by name."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from types import ModuleType

from cortexstream.backend import Backend, BackendOptions
from cortexstream.config import backend_from_environment
from cortexstream.errors import BackendUnavailableError

REAL = ("mlx", "cuda", "reference")  # null computes nothing of use: it is never chosen, only asked for


@dataclass(frozen=True, slots=True)
class Probe:
    """What was found about one backend. `accelerator` is the GPU it would use, None for a CPU."""

    name: str
    missing: str | None  # why it cannot run here and what to install; None when it can
    accelerator: str | None = None


def probe(name: str) -> Probe:
    """Ask one backend whether it can run here; imports it, but loads no model."""
    try:
        module = import_module(f"cortexstream.backends.{name}")
    except ModuleNotFoundError as error:
        if error.name is not None and error.name.startswith("cortexstream.backends"):
            return Probe(name, f"this version of CortexStream has no {name} backend yet")
        return Probe(name, f"the Python package {error.name} is missing")
    missing = module.available()
    return Probe(name, missing, None if missing else module.accelerator())


def choose(asked: str = "auto") -> tuple[str, list[Probe]]:
    """The backend to use and what was probed on the way.

    An explicit name wins, then CORTEXSTREAM_BACKEND, then the first usable of: mlx on Metal, cuda on a GPU, mlx on a
    CPU, cuda's PyTorch on a CPU, reference. Raises BackendUnavailableError in one sentence when the one asked for
    cannot run.
    """
    source = "backend"
    if asked == "auto":
        asked, source = backend_from_environment() or "auto", "CORTEXSTREAM_BACKEND"
    if asked != "auto":
        found = probe(asked)
        if found.missing is not None:
            raise BackendUnavailableError(f"{source}: {asked} cannot run here: {found.missing}")
        return asked, [found]
    probes = [probe(name) for name in REAL]
    usable = [p for p in probes if p.missing is None]
    usable.sort(key=lambda p: p.accelerator is None)  # stable: accelerators first, each group in the order of REAL
    if not usable:
        raise BackendUnavailableError("no backend can run here: " + "; ".join(f"{p.name}: {p.missing}" for p in probes))
    return usable[0].name, probes


def load(name: str, options: BackendOptions) -> Backend:
    """Create a backend, which loads the model. Call it on the thread that will use it."""
    module: ModuleType = import_module(f"cortexstream.backends.{name}")
    backend: Backend = module.create(options)
    return backend
