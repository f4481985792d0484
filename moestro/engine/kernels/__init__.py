"""Kernels of the engine: what they read (``interface``), numpy (``twin``), C++ (``native``), and which of them runs."""

from moestro.core.errors import ConfigError
from moestro.engine.kernels.interface import Kernels
from moestro.engine.kernels.twin import TwinKernels


def choose(name: str | None = None, *, isa: str | None = None) -> Kernels:
    """The kernels to use: native where the wheel is installed, else the numpy twin.

    Args:
        name: "native" or "twin"; None takes what is there. isa: instruction set of the native ones; None: the best.

    Raises:
        ConfigError: an unknown name, native kernels that are not installed, or an instruction set that does not run.
    """
    if name not in (None, "native", "twin"):
        raise ConfigError(f"kernels {name!r}; known are native and twin")
    if name != "twin":
        from moestro.engine.kernels.native import NativeKernels

        try:
            return NativeKernels(isa)
        except ImportError as error:
            if name == "native":
                raise ConfigError(f"native kernels are not installed ({error}); run pip install ./native") from None
    return TwinKernels()
