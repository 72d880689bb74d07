"""Loggers of torchtune's, several at once, none of which can end a run once it trains."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig
from torchtune.training.metric_logging import TensorBoardLogger, WandBLogger

from hyper_tune import parallel
from hyper_tune.checks import known_fields
from hyper_tune.errors import UserError
from hyper_tune.torchtune.components import build, find_component
from hyper_tune.torchtune.settings import Component

_ACTS = ("log_config", "log_dict", "close")

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class Loggers:
    """What the section ``metric_logger`` names, on rank 0; on the other ranks nothing.

    A logger that cannot be made is refused before the base is loaded. One that raises while the
    run goes on is switched off with one warning: the run's own files have every figure.

    ``step``: the step that a run resumes from. TensorBoard drops what it has of later steps.

    Raises:
        UserError: a logger that cannot be made, or a key that it does not have.
    """

    def __init__(
        self, sections: Sequence[Component], *, step: int, warn: Callable[[str], None]
    ) -> None:
        self._warn = warn
        self._loggers: list[Any] = []
        try:
            for section in sections if parallel.rank() == 0 else ():
                self._loggers.append(_made(section))
        except BaseException:
            self.close()
            raise
        self._each(lambda logger: _begin_after(logger, step))

    def log_config(self, config: DictConfig) -> None:
        """Hand over the settings of the run."""
        self._each(lambda logger: logger.log_config(config))

    def log(self, figures: Mapping[str, float], step: int) -> None:
        """Log numbers by name."""
        self._each(lambda logger: logger.log_dict(figures, step=step))

    def draw(self, name: str, make: Callable[[], "Figure"], step: int) -> None:
        """Show a matplotlib figure where a logger can; elsewhere it is not made."""
        self._each(lambda logger: _draw(logger, name, make, step))

    def close(self) -> None:
        """Flush and close all."""
        self._each(lambda logger: logger.close())
        self._loggers.clear()

    def _each(self, act: Callable[[Any], object]) -> None:
        for logger in list(self._loggers):
            try:
                act(logger)
            except Exception as error:
                self._loggers.remove(logger)
                self._warn(
                    f"warning: {type(logger).__name__} failed and is switched off ({error!r}); the "
                    "run goes on, and metrics.jsonl has every figure."
                )


def _made(section: Component) -> Any:
    builder = find_component("metric_logger", section)
    given = {key: value for key, value in section.items() if key != "_component_"}
    parameters = inspect.signature(builder).parameters
    known = {name for name, each in parameters.items() if each.kind is not each.VAR_KEYWORD}
    if builder is WandBLogger:
        known |= _wandb_options()
    known_fields("metric_logger", given, known)
    missing = [name for name in known - given.keys() if _is_needed(parameters.get(name))]
    if missing:
        raise UserError(
            f"metric_logger.{missing[0]} is missing; {section['_component_']} needs it."
        )
    logger = build("metric_logger", section)
    if not all(callable(getattr(logger, name, None)) for name in _ACTS):
        raise UserError(
            f"metric_logger: {section['_component_']} makes no logger; name one, such as "
            "torchtune.training.metric_logging.TensorBoardLogger."
        )
    return logger


def _is_needed(parameter: inspect.Parameter | None) -> bool:
    if parameter is None or parameter.kind is parameter.VAR_POSITIONAL:
        return False
    return parameter.default is parameter.empty


def _wandb_options() -> set[str]:
    try:
        import wandb
    except ImportError:
        return set()
    return set(inspect.signature(wandb.init).parameters)


def _begin_after(logger: Any, step: int) -> None:
    """Tell TensorBoard that a run begins after ``step``: it drops what an earlier one has later.

    Every start is told, since TensorBoard drops nothing at the first that it hears of.
    """
    if not isinstance(logger, TensorBoardLogger) or logger._writer is None:
        return
    from tensorboard.compat.proto.event_pb2 import Event, SessionLog

    start = SessionLog(status=SessionLog.START)
    logger._writer._get_file_writer().add_event(Event(step=step + 1, session_log=start))


def _draw(logger: Any, name: str, make: Callable[[], "Figure"], step: int) -> None:
    if isinstance(logger, WandBLogger):
        logger._wandb.log({name: logger._wandb.Image(_pixels(make())), "global_step": step})
    elif isinstance(logger, TensorBoardLogger) and logger._writer is not None:
        logger._writer.add_figure(name, make(), step, close=False)


def _pixels(figure: "Figure") -> Any:
    """Return a picture as an array (rows, columns, 4); W&B takes figures of pyplot's alone."""
    import numpy as np
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())
