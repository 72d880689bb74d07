"""Whether the decoder's layers can be compiled here, told before anything is loaded."""

import os
from importlib.util import find_spec

import torch

from hyper_tune.checks import require_choice
from hyper_tune.errors import UserError
from hyper_tune.torchtune.settings import RecipeSettings

BACKEND = "TORCH_COMPILE_BACKEND"


def check_compilation(settings: RecipeSettings) -> None:
    """Refuse ``compile`` with a backend that torch has not, or one that does not compile here.

    The backend is that of the environment variable TORCH_COMPILE_BACKEND, as torchtune takes it.

    Raises:
        UserError: what is missing, and that ``compile`` may be turned off.
    """
    if not settings.compile:
        return
    import torch._dynamo

    backend = os.environ.get(BACKEND, "inductor")
    require_choice(BACKEND, backend, tuple(torch._dynamo.list_backends(exclude_tags=None)))
    if backend != "inductor":
        _refuse_unusable(backend, settings.device)
        return
    if settings.device == "cuda" and find_spec("triton") is None:
        raise UserError(
            "compile is True, but triton is not installed; install it, or set it False."
        )
    if settings.device == "cpu":
        _refuse_without_compiler()


def _refuse_unusable(backend: str, device: str) -> None:
    """Compile an addition; torch lists backends whose packages are not installed."""
    compiled = torch.compile(torch.add, backend=backend)
    try:
        compiled(torch.ones(2, device=device), torch.ones(2, device=device))
    except Exception as error:
        cause = getattr(error, "inner_exception", error)
        reason = " ".join(str(cause).split()) or type(cause).__name__
        raise UserError(
            f"compile is True, but {BACKEND}={backend} compiles nothing here ({reason}); choose "
            "another backend, or set compile=False."
        ) from error


def _refuse_without_compiler() -> None:
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler as error:
        raise UserError(
            "compile is True, but this machine has no C++ compiler, which torch compiles with on a "
            "CPU; install g++, name one in CXX, or set compile=False."
        ) from error
