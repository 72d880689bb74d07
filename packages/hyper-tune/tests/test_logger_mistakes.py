"""A logger that cannot be made is one message, before the base is read."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hyper_tune.errors import UserError
from hyper_tune.torchtune.loggers import Loggers

LOGGING = "torchtune.training.metric_logging"


@pytest.mark.parametrize(
    ("section", "message"),
    [
        (
            {"_component_": f"{LOGGING}.TensorBordLogger"},
            f"metric_logger: {LOGGING}.TensorBordLogger cannot be built: {LOGGING} has no "
            "'TensorBordLogger'; did you mean 'TensorBoardLogger'?",
        ),
        (
            {"_component_": f"{LOGGING}.TensorBoardLogger", "logdir": "x"},
            "metric_logger has no key 'logdir'; did you mean 'log_dir'?",
        ),
        (
            {"_component_": f"{LOGGING}.DiskLogger", "log_dir": "x", "file_name": "y"},
            "metric_logger has no key 'file_name'; did you mean 'filename'?",
        ),
        (
            {"_component_": f"{LOGGING}.WandBLogger", "projekt": "x"},
            "metric_logger has no key 'projekt'; did you mean 'project'?",
        ),
        ({"_component_": f"{LOGGING}.TensorBoardLogger"}, "metric_logger.log_dir is missing; torc"),
        ({"log_dir": "x"}, "configuration: metric_logger names no component; write metric_logger."),
        ([{"log_dir": "x"}], "configuration: metric_logger names no component; write metric_logg"),
        ("tensorboard", "configuration: metric_logger names no component; write metric_logger._c"),
    ],
)
def test_a_logger_that_cannot_be_made_is_refused_before_the_base_is_read(
    make_config: Callable[..., Path],
    run: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
    section: Any,
    message: str,
) -> None:
    monkeypatch.setattr("hyper_tune.torchtune.recipe.load_", lambda *_: pytest.fail("loaded"))
    with pytest.raises(UserError) as caught:
        run(make_config(metric_logger=section))
    assert str(caught.value).startswith(message)


def test_a_library_that_is_not_installed_is_said(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match="package not found") as caught:
        Loggers([{"_component_": f"{LOGGING}.WandBLogger"}], step=0, warn=print)
    assert str(caught.value).startswith(f"metric_logger: {LOGGING}.WandBLogger cannot be built: ")


def test_a_service_that_refuses_is_one_message_for_people(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Refused(Exception):
        """As a service's library may have."""

    def service() -> None:
        raise Refused("no key for the\n  service is set")

    monkeypatch.setattr(f"{LOGGING}.Service", service, raising=False)
    with pytest.raises(UserError) as caught:
        Loggers([{"_component_": f"{LOGGING}.Service"}], step=0, warn=print)
    assert str(caught.value) == (
        f"metric_logger: {LOGGING}.Service cannot be built: no key for the service is set"
    )
