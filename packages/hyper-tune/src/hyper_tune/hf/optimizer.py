"""The optimizer that a trainer is handed: its step is one step of the method."""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from torch.optim import Optimizer

from hyper_tune.errors import UserError

if TYPE_CHECKING:
    from hyper_tune.hf.adapted import AdaptedModel


def build_inner(
    kind: Callable[..., Optimizer], groups: list[dict[str, Any]], options: Mapping[str, Any]
) -> Optimizer:
    """Return an optimizer of a kind.

    Raises:
        UserError: it refuses the options.
    """
    try:
        return kind(groups, **options)
    except (TypeError, ValueError, IndexError) as error:
        name = getattr(kind, "__name__", repr(kind))
        given = ", ".join(f"{key}={value!r}" for key, value in options.items())
        reason = " ".join(str(error).split())
        raise UserError(f"{name} refuses the options {given}: {reason}; correct them.") from error


class MethodOptimizer(Optimizer):
    """An optimizer of the model's own trainable parameters, as whoever drives it sees it.

    Its groups hold the factors in the model and the modules trained as a whole, so that gradient
    scalers, device checks and gradient synchronisation meet the parameters that the model has. Its
    `step` is one step of the method: the gradients are carried to the hypernetworks, or to the
    stacked factors, which ``inner`` optimizes with the options of these groups; learning rates that
    a scheduler writes here count there.

    Saved: what ``inner`` saves.

    Raises:
        UserError: `step` without a forward pass with gradients since the last one, or
            `add_param_group` after construction.
    """

    def __init__(self, inner: Optimizer, adapted: "AdaptedModel") -> None:
        self._inner = inner
        self._adapted = adapted
        self._whole = False
        super().__init__(_faces(inner, adapted), inner.defaults)
        self.state = inner.state
        self._whole = True

    @property
    def inner(self) -> Optimizer:
        """The optimizer of what is really trained."""
        return self._inner

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Finish the step that the model's last forward passes belong to."""
        loss = None if closure is None else closure()
        self._hand_options_on()
        self._adapted.finish_step()
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop the gradients of the step under way."""
        self._adapted.method.stack.zero_grads_()
        self._inner.zero_grad(set_to_none)

    def state_dict(self) -> dict[str, Any]:
        """Return the inner optimizer's state."""
        self._hand_options_on()
        return self._inner.state_dict()

    def load_state_dict(self, state_dict: Any) -> None:
        """Restore the inner optimizer's state."""
        self._inner.load_state_dict(state_dict)
        self.state = self._inner.state
        for face, group in zip(self.param_groups, self._inner.param_groups, strict=True):
            face.update(_options(group))

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Refuse: what is trained was settled when the method was put on the model."""
        if self._whole:
            raise UserError(
                "a group cannot be added to the optimizer of a method; name the module in "
                "modules_to_save when the method is put on the model."
            )
        super().add_param_group(param_group)

    def _hand_options_on(self) -> None:
        for face, group in zip(self.param_groups, self._inner.param_groups, strict=True):
            group.update(_options(face))


def _options(group: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in group.items() if key not in ("params", "param_names")}


def _faces(inner: Optimizer, adapted: "AdaptedModel") -> list[dict[str, Any]]:
    """Return the inner groups with the model's factors in place of what stands behind them."""
    behind = {id(parameter) for _, parameter in adapted.method.owner.named_parameters()}
    leaves: list[Any] = list(adapted.method.stack.leaf_parameters())
    faces = []
    for group in inner.param_groups:
        own = [parameter for parameter in group["params"] if id(parameter) not in behind]
        if len(own) < len(group["params"]):
            own, leaves = [*leaves, *own], []
        faces.append({**_options(group), "params": own})
    return faces
