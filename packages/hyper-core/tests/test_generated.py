"""The recursion and the leaf boundary against the twin, over several optimizer steps."""

import pytest
import torch
from torch import nn

from hyper_core import AttentionConfig, GeneratedParameters

CONFIG = AttentionConfig(hidden=4, heads=2, feed_forward=5)
DECAY = 0.9
OUTPUTS = {"p": "unit_rows", "q": "orthonormal"}
NORMS = {"q": 2.0}
# By role, the leaves: stacks of different ranks and widths, and single matrices, two of one shape.
SHAPES = {
    "p": [(2, 3, 4), (1, 2, 3), (3, 3, 4)],
    "lam": [(5, 3, 1), (1, 2, 1)],
    "q": [(3, 4), (2, 5), (3, 4)],
    "free": [(2, 2, 3)],
}
# The stacks that the hypernetwork of each role sees: leaves of one shape, one after the other.
STACKS = {"p": [[0, 2], [1]], "lam": [[0], [1]], "q": [[0, 2], [1]], "free": [[0]]}
# A label for each matrix in the order of the leaves, and the network of each in that of the stacks.
LABELS = {"p": [0, 1, 2, 0, 2, 1], "lam": "each", "q": ["x", "x", "y"], "free": "all"}
NETWORKS = {"p": [0, 1, 0, 2, 1, 2], "lam": list(range(6)), "q": [0, 1, 0], "free": [0, 0]}


class Toy(nn.Module):
    """A loss that reads every factor in a way that couples them."""

    def __init__(self):
        super().__init__()
        self.factors = nn.ParameterDict(
            {
                f"{role}{i}": nn.Parameter(torch.randn(*shape, dtype=torch.float64))
                for role, shapes in SHAPES.items()
                for i, shape in enumerate(shapes)
            }
        )
        with torch.no_grad():
            for name, factor in self.factors.items():
                if name[0] in "pq":
                    factor.div_(factor.norm(dim=-1, keepdim=True))

    def forward(self, x):
        generator = torch.Generator().manual_seed(0)
        total = 0.0
        for factor in self.factors.values():
            target = torch.randn(factor.shape, generator=generator, dtype=factor.dtype)
            total = total + torch.tanh(((factor + x) * target).sum())
        return total.square()

    def leaves(self):
        return {
            role: [self.factors[f"{role}{i}"] for i in range(len(shapes))]
            for role, shapes in SHAPES.items()
        }


class Twin:
    """The same recursion with hypernetworks and model in one graph."""

    def __init__(self, functions, generated, state, decay, grouped=False):
        self.functions, self.state, self.decay = functions, state, decay
        self.grouped = grouped
        self.weights = {
            name: parameter.detach().clone().requires_grad_()
            for name, parameter in generated.named_parameters()
        }
        self.start = {name: b.clone() for name, b in generated.named_buffers() if "state" in name}
        self.averages = {
            name.removeprefix("averages."): torch.zeros_like(b)
            for name, b in generated.named_buffers()
            if "square" in name
        }

    def generate(self):
        """Values by role and stack."""
        values = {}
        for role, members in STACKS.items():
            prefix = f"hypernetworks.{role}."
            weights = {n.removeprefix(prefix): w for n, w in self.weights.items() if prefix in n}
            before = [self.start[f"state_{role}_{i}"] for i in range(len(members))]
            networks = NETWORKS[role] if self.grouped else None
            norm = NORMS.get(role, 1.0)  # the networks read and write tokens of norm one
            read = [stack / norm for stack in before]
            after = self.functions.hypernetwork(weights, CONFIG, read, networks)
            after = [norm * stack for stack in after]
            if self.state == "static":
                after = [p + change for p, change in zip(before, after, strict=True)]
            if self.state == "damped":
                after = [0.7 * p + 0.3 * new for p, new in zip(before, after, strict=True)]
            if role == "p":
                after = [self.functions.unit_rows(stack) for stack in after]
            if role == "q":
                after = [2 * torch.stack([self.functions.polar(m) for m in s]) for s in after]
            values[role] = after
        return values

    def factors(self, values):
        """By name of the toy's factor."""
        named = {}
        for role, members in STACKS.items():
            for stack, leaves in zip(values[role], members, strict=True):
                first = 0
                for leaf in leaves:
                    shape = SHAPES[role][leaf]
                    count = 1 if len(shape) == 2 else shape[0]
                    named[f"factors.{role}{leaf}"] = stack[first : first + count].reshape(shape)
                    first += count
        return named

    def gradients(self, loss, values):
        """Of all weights, by name; and the averages that a commit would keep."""
        weights = list(self.weights.values())
        if self.decay is None:
            return torch.autograd.grad(loss, weights), {}
        named = {f"{r}_{i}": v for r, stacks in values.items() for i, v in enumerate(stacks)}
        kept = {"square_weight": self.decay * self.averages["square_weight"] + 1 - self.decay}
        cotangents = []
        reached = torch.autograd.grad(loss, list(named.values()), retain_graph=True)
        for name, gradient in zip(named, reached, strict=True):
            cotangent, kept[f"square_{name}"] = self.functions.token_rms(
                gradient, self.averages[f"square_{name}"], kept["square_weight"], self.decay
            )
            cotangents.append(cotangent)
        return torch.autograd.grad(list(named.values()), weights, cotangents), kept

    def commit(self, values, kept):
        self.averages.update(kept)
        if self.state != "static":
            for role, stacks in values.items():
                for i, stack in enumerate(stacks):
                    self.start[f"state_{role}_{i}"] = stack.detach()


def make(state, normalisation, **options):
    model = Toy()
    generated = GeneratedParameters(
        model.leaves(),
        config=CONFIG,
        state=state,
        relaxation=0.3,
        gradient_normalisation=normalisation,
        gradient_decay=DECAY,
        **{"outputs": OUTPUTS, "norms": NORMS, **options},
    )
    return model, generated


@pytest.mark.parametrize("state", ["recurrent", "static", "damped"])
@pytest.mark.parametrize("normalisation", ["none", "token_rms"])
@pytest.mark.parametrize("grouped", [False, True])
def test_steps_equal_end_to_end_autograd_through_the_twin(
    twin, shaken, state, normalisation, grouped
):
    model, generated = make(state, normalisation, sharing=LABELS if grouped else "all")
    shaken(generated.hypernetworks)
    decay = DECAY if normalisation == "token_rms" else None
    reference = Twin(twin, generated, state, decay, grouped)
    optimizers = [
        torch.optim.Adam(weights, lr=1e-2)
        for weights in (generated.parameters(), reference.weights.values())
    ]
    for step in range(4):
        micro_batches = [0.1 * step, 0.3]
        values = reference.generate()
        factors = reference.factors(values)
        loss = sum(torch.func.functional_call(model, factors, (x,)) for x in micro_batches)
        gradients, kept = reference.gradients(loss, values)

        model.zero_grad()
        optimizers[0].zero_grad()
        generated.refresh()
        for x in micro_batches:
            model(x).backward()
        generated.backward()

        torch.testing.assert_close(
            {name: p.detach() for name, p in model.named_parameters()},
            {name: p.detach() for name, p in factors.items()},
            rtol=1e-11,
            atol=1e-12,
        )
        for (name, parameter), gradient in zip(
            generated.named_parameters(), gradients, strict=True
        ):
            torch.testing.assert_close(
                parameter.grad, gradient, rtol=1e-9, atol=1e-11, msg=lambda m, n=name: f"{n}: {m}"
            )
        if step == 2:  # a skipped step leaves no trace
            generated.discard()
            continue
        for parameter, gradient in zip(reference.weights.values(), gradients, strict=True):
            parameter.grad = gradient
        for optimizer in optimizers:
            optimizer.step()
        generated.commit()
        reference.commit(values, kept)
        torch.testing.assert_close(
            {
                name.removeprefix("averages."): b
                for name, b in generated.named_buffers()
                if name.startswith(("state", "averages"))
            },
            {**reference.start, **reference.averages},
            rtol=1e-10,
            atol=1e-11,
        )


def test_gradient_of_the_leaves_equals_end_to_end_autograd_of_the_package_itself():
    model, generated = make("recurrent", "none", norms={}, outputs={"p": "unit_rows"})
    weights = list(generated.parameters())
    generated.refresh()
    model(0.2).backward()
    generated.backward()
    found = [parameter.grad for parameter in weights]

    network = generated.hypernetworks
    values = {}
    for role, members in STACKS.items():
        state = [generated.get_buffer(f"state_{role}_{i}") for i in range(len(members))]
        values[role] = network[role](state)
        if role == "p":
            values[role] = [rows / rows.norm(dim=-1, keepdim=True) for rows in values[role]]
    factors = Twin.factors(None, values)
    loss = torch.func.functional_call(model, factors, (0.2,))
    torch.testing.assert_close(found, list(torch.autograd.grad(loss, weights)), rtol=0, atol=1e-12)


def test_refresh_is_a_function_of_weights_and_state():
    model, generated = make("recurrent", "token_rms")
    saved = {name: value.clone() for name, value in generated.state_dict().items()}
    generated.refresh()
    first = [p.detach().clone() for p in model.parameters()]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    generated.refresh()
    torch.testing.assert_close(list(model.parameters()), first, rtol=0, atol=0)
    torch.testing.assert_close(dict(generated.state_dict()), saved, rtol=0, atol=0)


def test_commit_takes_what_the_leaves_hold_pruned_components_included():
    model, generated = make("recurrent", "none")
    generated.refresh()
    with torch.no_grad():
        model.factors["lam0"][:, 1] = 0
        model.factors["q2"][2] = 7
    generated.commit()
    assert torch.equal(generated.state_lam_0, model.factors["lam0"])
    assert torch.equal(generated.state_q_0[0], model.factors["q0"])
    assert torch.equal(generated.state_q_0[1], model.factors["q2"])
    assert torch.equal(generated.state_p_0[2:], model.factors["p2"])
    with torch.no_grad():
        model.factors["lam0"].fill_(3)
    assert generated.state_lam_0[:, 1].abs().max() == 0


@pytest.mark.parametrize("ending", ["commit", "discard"])
@pytest.mark.parametrize("grouped", [False, True])
def test_the_end_of_a_step_zeroes_the_leaves_gradients_in_place(ending, grouped):
    """An optimizer of the hypernetworks does not know the leaves: its zero_grad passes them by."""
    runs = []
    for zeroed in (False, True):
        torch.manual_seed(0)
        model, generated = make("recurrent", "none", sharing=LABELS if grouped else "all")
        optimizer = torch.optim.Adam(generated.parameters(), lr=1e-2)
        for step in range(3):
            generated.refresh()
            model(0.1 * step).backward()
            held = {name: p.grad for name, p in model.named_parameters()}
            generated.backward()
            optimizer.step()
            getattr(generated, ending)()
            for name, parameter in model.named_parameters():
                assert parameter.grad is held[name]
                assert parameter.grad.abs().max() == 0
            optimizer.zero_grad()
            if zeroed:
                model.zero_grad()
        runs.append([p.detach() for p in generated.parameters()])
    torch.testing.assert_close(*runs, rtol=0, atol=0)


def test_refresh_keeps_gradients_and_leaves_without_any_are_no_obstacle_to_the_end():
    model, generated = make("recurrent", "none")
    model.factors["p0"].grad = torch.ones_like(model.factors["p0"])
    generated.refresh()
    assert model.factors["p0"].grad.min() == 1
    generated.discard()
    assert model.factors["p0"].grad.max() == 0
    assert model.factors["p1"].grad is None


def test_static_state_never_changes():
    model, generated = make("static", "none")
    before = {name: b.clone() for name, b in generated.named_buffers()}
    for _ in range(2):
        generated.refresh()
        with torch.no_grad():
            model.factors["p0"].normal_()
        generated.commit()
    torch.testing.assert_close(dict(generated.named_buffers()), before, rtol=0, atol=0)


def test_static_starts_at_the_leaves_first_values():
    model = Toy()
    with torch.no_grad():
        for name, leaf in model.factors.items():
            if name[0] == "q":
                leaf.copy_(3 * torch.linalg.qr(leaf.T)[0].T)
    generated = GeneratedParameters(
        model.leaves(), config=CONFIG, state="static", outputs=OUTPUTS, norms={"q": 3.0}
    )
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    generated.refresh()
    after = {name: p.detach() for name, p in model.named_parameters()}
    for name in before:
        tolerance = {"p": 1e-15, "q": 1e-14}.get(name[len("factors.")], 0)
        torch.testing.assert_close(after[name], before[name], rtol=0, atol=tolerance)


@pytest.mark.parametrize("state", ["recurrent", "static", "damped"])
def test_zero_start_is_exactly_zero_at_first_and_learns(state):
    model, generated = make(state, "none", zero_start={"lam"})
    optimizer = torch.optim.Adam(generated.parameters(), lr=1e-2)
    zero = torch.zeros(5, 3, 1, dtype=torch.float64)
    assert torch.equal(generated.state_lam_0, zero)
    generated.refresh()
    assert torch.equal(model.factors["lam0"], zero)
    model(0.5).backward()
    generated.backward()
    optimizer.step()
    generated.commit()
    generated.refresh()
    assert model.factors["lam0"].abs().min() > 0


def test_a_row_of_zeros_stays_zero_with_finite_gradients_and_others_have_unit_norm():
    rows = nn.Parameter(torch.eye(3, 4))
    with torch.no_grad():
        rows[1] = 0
    generated = GeneratedParameters(
        {"q": [rows]}, config=CONFIG, state="static", outputs={"q": "unit_rows"}
    )
    generated.refresh()
    torch.testing.assert_close(rows.detach().norm(dim=1), torch.tensor([1.0, 0.0, 1.0]))
    rows.sum().backward()
    generated.backward()
    for name, parameter in generated.named_parameters():
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().max() < 100, name


def test_evaluation_leaves_nothing_pending():
    model, generated = make("recurrent", "none")
    with torch.no_grad():
        generated.refresh()
    written = [p.detach().clone() for p in model.parameters()]
    generated.refresh()
    torch.testing.assert_close(list(model.parameters()), written, rtol=0, atol=0)
    with torch.no_grad():
        generated.refresh()
    assert generated._pending == []
    assert not generated._refreshed


def test_narrow_leaves_take_rounded_values_of_a_float32_hypernetwork():
    torch.manual_seed(1)
    start = torch.randn(2, 3, 4).bfloat16()
    narrow, wide = start.clone().requires_grad_(), start.float().requires_grad_()
    pair = []
    for leaf in (narrow, wide):
        torch.manual_seed(2)
        pair.append(GeneratedParameters({"p": [leaf]}, config=CONFIG))
        pair[-1].refresh()
        leaf.grad = torch.ones_like(leaf)
        pair[-1].backward()
        pair[-1].commit()
    assert {parameter.dtype for parameter in pair[0].parameters()} == {torch.float32}
    assert narrow.dtype == torch.bfloat16
    assert torch.equal(narrow, wide.bfloat16())
    assert torch.equal(pair[0].state_p_0, narrow.float())
    for found, expected in zip(pair[0].parameters(), pair[1].parameters(), strict=True):
        assert torch.equal(found.grad, expected.grad)


def test_a_surrounding_autocast_changes_nothing():
    model, generated = make("recurrent", "none")
    generated.to(torch.float32)
    generated.refresh()
    expected = [p.detach().clone() for p in model.parameters()]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        generated.refresh()
    torch.testing.assert_close(list(model.parameters()), expected, rtol=0, atol=0)


def test_a_narrow_body_writes_and_learns_nearly_the_same_in_float32():
    pairs = []
    for dtype in (None, torch.bfloat16):
        torch.manual_seed(3)
        leaf = torch.randn(4, 3, 16, requires_grad=True)
        generated = GeneratedParameters({"p": [leaf]}, config=CONFIG, body_dtype=dtype)
        generated.refresh()
        leaf.sum().backward()
        generated.backward()
        gradients = torch.cat([p.grad.flatten() for p in generated.parameters()])
        pairs.append((leaf.detach(), gradients))
    for wide, narrow in zip(*pairs, strict=True):
        assert narrow.dtype == torch.float32
        error = (narrow - wide).norm() / wide.norm()
        assert 1e-5 < error < 0.05


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_averages_stay_wide_in_a_narrow_hypernetwork(twin, dtype):
    """A decay of 0.99 adds hundredths, and small gradients have squares below float16's least."""
    leaf = nn.Parameter(torch.randn(2, 3, 4, dtype=dtype))
    generated = GeneratedParameters(
        {"p": [leaf]}, config=CONFIG, gradient_normalisation="token_rms"
    ).to(dtype)
    average, weight = torch.zeros(2, 3, 1, dtype=torch.float64), 0.0
    for _ in range(5):
        generated.refresh()
        leaf.grad = 1e-4 * torch.randn(2, 3, 4, dtype=dtype)
        weight = 0.99 * weight + 0.01
        _, average = twin.token_rms(leaf.grad.double(), average, weight, 0.99)
        generated.backward()
        generated.commit()
        found = generated.averages.square_p_0
        assert found.dtype == torch.float32
        torch.testing.assert_close(found.double(), average, rtol=1e-5, atol=0)
        assert {p.grad.dtype for p in generated.parameters()} == {dtype}
    again = GeneratedParameters({"p": [leaf]}, config=CONFIG, gradient_normalisation="token_rms")
    again.to(dtype).load_state_dict(generated.state_dict())
    assert torch.equal(again.averages.square_p_0, generated.averages.square_p_0)
    assert generated.double().averages.square_p_0.dtype == torch.float64


def test_parameters_are_the_hypernetworks_alone():
    model, generated = make("recurrent", "token_rms")
    own = {id(parameter) for parameter in generated.parameters()}
    assert own == {id(parameter) for parameter in generated.hypernetworks.parameters()}
    assert not own & {id(parameter) for parameter in model.parameters()}


def test_unit_outputs_have_their_norm_from_the_first_step_on():
    leaves = {
        "rows": [torch.randn(2, 3, 4)],
        "columns": [torch.randn(2, 5, 3)],
        "orthonormal": [torch.randn(2, 3, 4)],
    }
    generated = GeneratedParameters(
        leaves,
        config=CONFIG,
        tokens={"columns": "columns"},
        outputs={"rows": "unit_rows", "columns": "unit_columns", "orthonormal": "orthonormal"},
        norms=dict.fromkeys(leaves, 2.5),
    )
    generated.refresh()
    (rows,), (columns,), (factor,) = leaves.values()
    torch.testing.assert_close(rows.norm(dim=-1), torch.full((2, 3), 2.5))
    torch.testing.assert_close(columns.norm(dim=-2), torch.full((2, 3), 2.5))
    gram = 6.25 * torch.eye(3).expand(2, -1, -1)
    torch.testing.assert_close(factor @ factor.mT, gram, rtol=0, atol=0.05)


@pytest.mark.parametrize("tokens", ["rows", "columns"])
def test_free_outputs_start_with_the_expected_norm(tokens):
    leaf = torch.randn(100, 8, 32)
    GeneratedParameters(
        {"w": [leaf]}, config="attention-small", tokens={"w": tokens}, norms={"w": 3.0}
    ).refresh()
    dim = {"rows": -1, "columns": -2}[tokens]
    assert leaf.square().sum(dim).mean().item() == pytest.approx(9.0, rel=0.2)


def test_leaves_on_the_meta_device_show_sizes_without_memory():
    leaves = {"p": [torch.empty(72, 3, 768, device="meta")]}
    generated = GeneratedParameters(leaves)
    assert {value.device.type for value in generated.state_dict().values()} == {"meta"}


@pytest.mark.parametrize("body_dtype", [None, torch.bfloat16])
def test_a_step_on_the_meta_device_has_shapes_alone(body_dtype):
    leaf = nn.Parameter(torch.empty(72, 3, 768, device="meta"))
    generated = GeneratedParameters({"p": [leaf]}, body_dtype=body_dtype)
    generated.refresh()
    leaf.grad = torch.empty_like(leaf)
    generated.backward()
    generated.commit()
    assert all(p.grad.shape == p.shape for p in generated.parameters())
