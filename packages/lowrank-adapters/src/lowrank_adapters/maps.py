"""The kinds of modules that are linear maps in the mathematical sense, seen as y = x Wᵀ."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from lowrank_adapters.errors import AdapterError


class _Matrix:
    """What the kinds have in common: the weight read and changed as the matrix W (out, in)."""

    def orient(self, weight: Tensor) -> Tensor:
        """Return a weight as W (out, in); a view where one can be had."""
        raise NotImplementedError

    def matrix(self, module: nn.Module) -> Tensor:
        """Return W (out, in) of a module, detached; a view where one can be had.

        Raises:
            AdapterError: the weight is quantised or sharded.
        """
        return self.orient(plain_weight(module))

    def add_(self, module: nn.Module, delta: Tensor) -> None:
        """Add a matrix (out, in) to the module's weight, in place, rounding once.

        Raises:
            AdapterError: the weight is quantised or sharded; it is left as it was.
        """
        self.matrix(module).add_(delta)


@dataclass(frozen=True)
class LinearMap(_Matrix):
    """y = x Wᵀ: `torch.nn.Linear`, what has its features, and `Conv1D` of transformers.

    ``in_width``, ``out_width``: of the matrix W (out, in). ``transposed``: the module keeps Wᵀ.
    """

    in_width: int
    out_width: int
    transposed: bool = False

    def down(self, x: Tensor, rows: Tensor) -> Tensor:
        """Return x rowsᵀ (..., k) for rows (k, in)."""
        return functional.linear(x, rows.to(x.dtype))

    def update(self, y: Tensor, x: Tensor, a: Tensor, b: Tensor, scaling: float) -> Tensor:
        """Return y + scaling · x Aᵀ Bᵀ for A (k, in) and B (out, k), in the dtype of y.

        >>> zeros, ones = torch.zeros(4, 2), torch.ones(4, 3)
        >>> LinearMap(3, 2).update(zeros, ones, torch.ones(1, 3), torch.ones(2, 1), 0.5)[0]
        tensor([1.5000, 1.5000])
        """
        return _add_up(y, self.down(x, a), b, scaling)

    def multiply(self, module: nn.Module, rows: Tensor) -> Tensor:
        """Return rows Wᵀ (k, out) for rows (k, in), without the bias, whatever the weight is."""
        if self.transposed:
            return rows @ module.get_parameter("weight")
        if type(module) is nn.Linear:
            return functional.linear(rows, module.weight)
        bias: Tensor | None = getattr(module, "bias", None)
        if bias is None:
            alone: Tensor = module(rows)
            return alone
        # Rounding with the bias takes least from a large product; float16 ends at 65504.
        scale = 2.0**6 if rows.dtype is torch.float16 else 2.0**16
        y: Tensor = module(rows * scale)
        return (y - bias.to(y.dtype)) / scale

    def orient(self, weight: Tensor) -> Tensor:
        """Return the weight, transposed where the module keeps it so."""
        return weight.T if self.transposed else weight


@dataclass(frozen=True)
class ConvolutionMap(_Matrix):
    """A convolution, whose W is (out_channels, in_channels · kernel): down by one, up by a 1x1.

    ``kernel``: (in_channels, *kernel_size).
    """

    in_width: int
    out_width: int
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...] | str
    dilation: tuple[int, ...]

    _CONVOLVE: ClassVar[dict[int, Callable[..., Tensor]]] = {
        1: functional.conv1d,
        2: functional.conv2d,
    }

    def down(self, x: Tensor, rows: Tensor) -> Tensor:
        """Return the product of every patch of x with rows (k, in), of k channels."""
        kernels = rows.to(x.dtype).reshape(-1, *self.kernel)
        convolve = self._CONVOLVE[len(self.stride)]
        return convolve(x, kernels, None, self.stride, self.padding, self.dilation)

    def update(self, y: Tensor, x: Tensor, a: Tensor, b: Tensor, scaling: float) -> Tensor:
        """Return y plus scaling · B A of every patch of x, in the dtype of y."""
        dimensions = len(self.stride)
        up = (b * scaling).to(y.dtype).reshape(*b.shape, *(1,) * dimensions)
        return y + self._CONVOLVE[dimensions](self.down(x, a).to(y.dtype), up)

    def orient(self, weight: Tensor) -> Tensor:
        """Return the kernels as rows; a copy where the weight's memory is of another order."""
        return weight.flatten(1)

    def add_(self, module: nn.Module, delta: Tensor) -> None:
        """Add a matrix (out, in) to the module's weight, whatever the order of its memory."""
        weight = plain_weight(module)
        weight.add_(delta.reshape(weight.shape))


@dataclass(frozen=True)
class EmbeddingMap(_Matrix):
    """A look-up, which is y = x Wᵀ for x of one number, the module's ``scale``, among zeros."""

    in_width: int
    out_width: int
    padding_idx: int | None
    scale: float = 1.0

    def down(self, x: Tensor, rows: Tensor) -> Tensor:
        """Return the columns of rows (k, in) at the indices x, scaled: (..., k)."""
        columns = functional.embedding(x, rows.T, self.padding_idx)
        return columns if self.scale == 1 else columns * self.scale

    def update(self, y: Tensor, x: Tensor, a: Tensor, b: Tensor, scaling: float) -> Tensor:
        """Return y plus scaling · B times the scaled columns of A at the indices, in y's dtype."""
        return _add_up(y, self.down(x, a), b, scaling)

    def orient(self, weight: Tensor) -> Tensor:
        """Return the table, transposed."""
        return weight.T


Map = LinearMap | ConvolutionMap | EmbeddingMap


def _add_up(y: Tensor, hidden: Tensor, b: Tensor, scaling: float) -> Tensor:
    # One product that adds: no second tensor as wide as y, and no pass for the scaling.
    flat = torch.addmm(
        y.reshape(-1, y.shape[-1]),
        hidden.reshape(-1, hidden.shape[-1]).to(y.dtype),
        b.T.to(y.dtype),
        alpha=scaling,
    )
    # As torch's own linear layer: a view would lose FSDP2's hooks in an in-place operation.
    result: Tensor = torch.ops.aten._unsafe_view(flat, y.shape)
    return result


@torch.no_grad()
def dense_matrix(linear_map: Map, module: nn.Module) -> Tensor:
    """Return a copy of W (out, in) in float32 or wider, also where it is quantised or sharded.

    A quantised weight is not unpacked: the module is called on the rows of the identity. A sharded
    one is gathered, so that all processes must ask for it.

    Raises:
        AdapterError: the weight is quantised in another module than a linear layer.
    """
    # By its method, because importing DTensor takes as long as half of torch.
    gather = getattr(getattr(module, "weight", None), "full_tensor", None)
    if gather is not None or _plain(module) is not None or not isinstance(linear_map, LinearMap):
        matrix = linear_map.orient(gather() if gather else plain_weight(module))
        return matrix.to(torch.promote_types(matrix.dtype, torch.float32), copy=True)
    first = next(tensor for _, tensor in _tensors(module))
    dtype = first.dtype if _is_wide(first) else torch.float32
    identity = torch.eye(linear_map.in_width, dtype=dtype, device=first.device)
    return linear_map.multiply(module, identity).T.float()


def plain_weight(module: nn.Module) -> Tensor:
    """Return the module's weight, detached, where it is a plain tensor of numbers.

    Raises:
        AdapterError: it is quantised or sharded.
    """
    weight = _plain(module)
    if weight is None:
        found = dict(_tensors(module)).get("weight")
        kind = "missing" if found is None else type(found.data).__name__
        what = f"{found.dtype} numbers" if found is not None and kind == "Tensor" else kind
        raise AdapterError(
            f"the weight of the {type(module).__name__} is {what}, expected a whole floating-point "
            "tensor; its values are not changed or read: dequantise or gather the base first."
        )
    return weight


def _plain(module: nn.Module) -> Tensor | None:
    weight = dict(_tensors(module)).get("weight")
    if weight is None or type(weight.data) is not Tensor or not _is_wide(weight):
        return None
    return weight.detach()


def _is_wide(weight: Tensor) -> bool:
    # Numbers of eight bits and less have scales beside them.
    return weight.is_floating_point() and weight.element_size() > 1


def _tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from module.named_parameters(recurse=False)
    yield from module.named_buffers(recurse=False)


def map_of(module: nn.Module) -> Map:
    """Return how a module is a linear map.

    Raises:
        AdapterError: it is none, or one of a form that has no low-rank update here.

    >>> map_of(nn.Conv2d(3, 8, kernel_size=5)).in_width
    75
    """
    kind = type(module).__name__
    if kind == "NonDynamicallyQuantizableLinear":
        raise AdapterError(
            "it is the output projection of a MultiheadAttention, which reads its weight and never "
            "calls it; exclude it."
        )
    if isinstance(module, nn.Embedding):
        return _embedding(module)
    if isinstance(module, nn.Conv1d | nn.Conv2d):
        return _convolution(module)
    if kind == "Conv1D" and hasattr(module, "nf"):
        in_width, out_width = module.get_parameter("weight").shape
        return LinearMap(in_width, out_width, transposed=True)
    widths = getattr(module, "in_features", None), getattr(module, "out_features", None)
    if isinstance(widths[0], int) and isinstance(widths[1], int):
        return LinearMap(widths[0], widths[1])
    raise AdapterError(
        f"it is a {kind}, expected a Linear, Conv1d, Conv2d, Embedding, or a module with "
        "in_features and out_features; exclude it."
    )


def _embedding(module: nn.Embedding) -> EmbeddingMap:
    if module.max_norm is not None:
        raise AdapterError(
            f"its max_norm is {module.max_norm}, by which a forward pass changes the weight; "
            "expected None: set it to None or exclude it."
        )
    scale = _scale(module)
    if scale is None:
        _refuse_other_forward(module, nn.Embedding)
    widths = module.num_embeddings, module.embedding_dim
    return EmbeddingMap(*widths, module.padding_idx, 1.0 if scale is None else scale)


def _scale(module: nn.Embedding) -> float | None:
    """What transformers' scaled word embeddings multiply by; None of other embeddings."""
    scale = getattr(module, "embed_scale", None)
    if scale is None or not type(module).__name__.endswith("ScaledWordEmbedding"):
        return None
    if not isinstance(scale, Tensor):
        return float(scale)
    if scale.is_meta:
        scale = torch.tensor(module.scalar_embed_scale, device="cpu")
    # Rounded as the module does it.
    return float(scale.to(module.weight.dtype))


def _refuse_other_forward(module: nn.Module, known: type[nn.Module]) -> None:
    if type(module).forward is not known.forward:
        raise AdapterError(
            f"it is a {type(module).__name__}, which computes something else than the "
            f"{known.__name__} that it derives from; exclude it."
        )


def _convolution(module: nn.Conv1d | nn.Conv2d) -> ConvolutionMap:
    _refuse_other_forward(module, nn.Conv1d if isinstance(module, nn.Conv1d) else nn.Conv2d)
    for name, expected in (("groups", 1), ("padding_mode", "zeros")):
        found = getattr(module, name)
        if found != expected:
            raise AdapterError(f"its {name} is {found!r}, expected {expected!r}; exclude it.")
    kernel = (module.in_channels, *module.kernel_size)
    return ConvolutionMap(
        in_width=torch.Size(kernel).numel(),
        out_width=module.out_channels,
        kernel=kernel,
        stride=module.stride,
        padding=module.padding,
        dilation=module.dilation,
    )
