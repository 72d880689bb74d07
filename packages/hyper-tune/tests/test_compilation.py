"""What cannot be compiled is refused before the base is read."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from hyper_tune.errors import UserError
from hyper_tune.torchtune.compilation import check_compilation
from hyper_tune.torchtune.settings import RecipeSettings

ConfigMaker = Callable[..., Path]


def settings_of(path: Path) -> RecipeSettings:
    return RecipeSettings.from_config(OmegaConf.load(path))


def test_a_backend_that_torch_has_not_is_refused_before_the_base_is_read(
    make_config: ConfigMaker, run: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_COMPILE_BACKEND", "inductr")
    monkeypatch.setattr("hyper_tune.torchtune.recipe.load_", lambda *_: pytest.fail("loaded"))
    with pytest.raises(UserError, match=r"^TORCH_COMPILE_BACKEND is 'inductr', but must be one of"):
        run(make_config(compile=True))
    check_compilation(settings_of(make_config(compile=False)))
    monkeypatch.setenv("TORCH_COMPILE_BACKEND", "aot_eager")
    check_compilation(settings_of(make_config(compile=True)))


def test_a_backend_whose_package_is_missing_is_refused(
    make_config: ConfigMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_COMPILE_BACKEND", "tvm")  # which torch lists all the same
    with pytest.raises(UserError) as caught:
        check_compilation(settings_of(make_config(compile=True)))
    assert re.fullmatch(
        r"compile is True, but TORCH_COMPILE_BACKEND=tvm compiles nothing here \(Please install "
        r"apache-tvm .*\); choose another backend, or set compile=False\.",
        str(caught.value),
    )


def test_a_machine_without_a_compiler_is_told(
    make_config: ConfigMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch._inductor.config as inductor

    monkeypatch.delenv("TORCH_COMPILE_BACKEND", raising=False)
    monkeypatch.setattr(inductor.cpp, "cxx", ("no-such-compiler",))
    from torch._inductor import cpp_builder

    for cached in ("get_cpp_compiler", "cpp_compiler_search"):
        clear = getattr(getattr(cpp_builder, cached, None), "cache_clear", None)
        if clear is not None:
            clear()
    with pytest.raises(UserError) as caught:
        check_compilation(settings_of(make_config(compile=True)))
    assert str(caught.value) == (
        "compile is True, but this machine has no C++ compiler, which torch compiles with on a "
        "CPU; install g++, name one in CXX, or set compile=False."
    )


def test_a_gpu_needs_triton(make_config: ConfigMaker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCH_COMPILE_BACKEND", raising=False)
    find = "hyper_tune.torchtune.compilation.find_spec"
    settings = settings_of(make_config(compile=True, device="cuda"))
    monkeypatch.setattr(find, lambda _: None)
    with pytest.raises(UserError, match="compile is True, but triton is not installed"):
        check_compilation(settings)
    monkeypatch.setattr(find, lambda name: name)
    check_compilation(settings)
