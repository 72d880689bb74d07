"""A method on a model: its budget, its parameters, its warnings and its refusals."""

import re
import warnings
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from hyper_core import GeneratedParameters
from hyper_core.choices import decode
from hyper_core.recursion import Recursion
from hyper_tune import MethodConfig, UserError, assemble
from hyper_tune.hf import adapt
from hyper_tune.method import PruningSettings
from lowrank_adapters import ScaledLoRALinear


def plain_model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 6))


def adalora(init_rank: int, budget: float, **pruning: Any) -> MethodConfig:
    settings = PruningSettings(**pruning)
    return MethodConfig("adalora", init_rank=init_rank, budget=budget, pruning=settings)


@pytest.mark.filterwarnings("ignore:the pruning schedule leaves", "ignore:the first pruning")
@pytest.mark.parametrize("budget", [1, 4 / 3, 1.5, 2, 3, 4])
@pytest.mark.parametrize(("interval", "steps"), [(1, 9), (2, 9), (3, 30), (30, 30), (7, 20)])
@pytest.mark.parametrize("finish_by", [0.1, 0.7, 1.0])
def test_the_budget_is_met_exactly(
    budget: float, interval: int, steps: int, finish_by: float
) -> None:
    model = plain_model()
    config = adalora(4, budget, interval=interval, finish_by=finish_by)
    method = assemble(model, config, total_steps=steps)
    optimizer = torch.optim.Adam(method.parameters(), lr=0.1)
    live = [method.live_ranks]
    for _ in range(steps):
        with method.step(optimizer) as step:
            step.backward(model(torch.randn(3, 6)).square().sum(), tokens=3)
        live.append(step.report.live_ranks)
        masks = {name: layer.rank_mask for name, layer in method.layers.items()}
        assert method.ranks() == {name: int(mask.sum()) for name, mask in masks.items()}
        assert sum(method.ranks().values()) == method.live_ranks == live[-1]
    assert live[0] == method.total_ranks == 12
    assert live[-1] == round(budget * 3)
    assert live == sorted(live, reverse=True)
    falls = [number for number in range(1, steps + 1) if live[number] < live[number - 1]]
    assert all(number % interval == 0 for number in falls)
    if interval <= finish_by * steps:
        assert live[int(finish_by * steps)] == live[-1]


@pytest.mark.parametrize(
    ("pruning", "steps", "left"),
    [
        ({"interval": 10, "count": 2}, 29, 8),
        ({"interval": 10, "count": 2}, 30, 8),
        ({"interval": 100}, 100, 12),
        ({"count": 1}, 200, 11),
    ],
)
def test_a_schedule_that_does_not_meet_the_budget_warns(
    pruning: dict[str, int], steps: int, left: int
) -> None:
    with pytest.warns(UserWarning, match="the pruning schedule") as caught:
        assemble(plain_model(), adalora(4, 2, **pruning), total_steps=steps)
    (warning,) = caught
    interval = pruning.get("interval", 100)
    assert str(warning.message) == (
        f"the pruning schedule leaves {left} of 12 ranks before the last of {steps} steps, above "
        f"the budget of 6; lower method.pruning.interval ({interval}) or raise "
        "method.pruning.count."
    )
    assert warning.filename == __file__


def test_a_schedule_that_meets_the_budget_does_not_warn() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assemble(plain_model(), adalora(4, 2, interval=10, count=2), total_steps=31)
        assemble(plain_model(), adalora(4, 2, interval=10), total_steps=11)


def test_a_budget_without_ranks_is_refused_before_the_number_of_steps_is_known() -> None:
    expected = r"^method\.budget is 0\.1, but leaves none of the 12 ranks; raise it\.$"
    with pytest.raises(UserError, match=expected):
        assemble(plain_model(), adalora(4, 0.1), total_steps=None)


def test_shares_without_others_to_share_with_warn_once() -> None:
    config = MethodConfig("hyperdora", init_rank=2)
    with pytest.warns(UserWarning, match="split_generation") as caught:
        method = assemble(plain_model(), config, total_steps=9, split_generation=True)
    (warning,) = caught
    assert str(warning.message) == (
        "split_generation is True, but there is one process, which generates all; set it to auto, "
        "which splits where that is less work, or start more processes."
    )
    assert warning.filename == __file__
    assert not method.owner.generated.shared
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assemble(plain_model(), config, total_steps=9, split_generation="auto")
        assemble(plain_model(), config, total_steps=9)


def test_methods_without_a_budget_keep_every_rank(small: SimpleNamespace, case: str) -> None:
    run = small.build(case)
    assert run.method.total_ranks == run.method.live_ranks == 12
    assert run.method.ranks() == dict.fromkeys(("0.up", "0.down", "1.up", "1.down"), 3)
    for step in range(4):
        run.step(small.batches(step))
    assert run.method.live_ranks == (9 if "ada" in case else 12)
    assert run.method.total_ranks == 12
    assert list(run.method.ranks()) == ["0.up", "0.down", "1.up", "1.down"]


def test_the_model_starts_as_its_base(small: SimpleNamespace, case: str) -> None:
    model = plain_model().double()
    x = torch.randn(5, 6, dtype=torch.float64)
    with torch.no_grad():
        expected = model(x)
    method = assemble(model, small.configure(case), total_steps=12, dtype=torch.float64)
    method.write_factors_()
    with torch.no_grad():
        assert torch.equal(model(x), expected)


def test_only_the_methods_parameters_change(small: SimpleNamespace, case: str) -> None:
    run = small.build(case, optimizer=torch.optim.SGD)
    base = {n: p.detach().clone() for n, p in run.model.named_parameters() if ".base." in n}
    owned = {n: p.detach().clone() for n, p in run.method.owner.named_parameters()}
    assert [id(p) for p in run.method.parameters()] == [
        id(p) for _, p in run.method.owner.named_parameters()
    ]
    run.step(small.batches(0))
    for name, value in base.items():
        parameter = run.model.get_parameter(name)
        assert not parameter.requires_grad
        assert parameter.grad is None
        assert torch.equal(parameter, value)
    changed = [n for n, p in run.method.owner.named_parameters() if not torch.equal(p, owned[n])]
    starts_at_zero = ("hypernetworks.lam.inputs.", "hypernetworks.b.inputs.")
    assert changed == [name for name in owned if not name.startswith(starts_at_zero)]
    assert not {id(p) for p in run.model.parameters()} & {id(p) for p in run.method.parameters()}


def test_factors_may_be_wider_than_the_base() -> None:
    model = plain_model().bfloat16()
    method = assemble(model, MethodConfig("adalora", init_rank=2, budget=2), total_steps=9)
    assert method.stack.values.dtype == torch.float32
    optimizer = torch.optim.SGD(method.parameters(), lr=0.1)
    before = method.stack.values.clone()
    with method.step(optimizer) as step:
        step.backward(model(torch.ones(3, 6).bfloat16()).float().square().sum(), tokens=3)
    assert step.report.finite
    assert not torch.equal(method.stack.values, before)


@pytest.mark.parametrize(
    ("config", "text"),
    [
        (MethodConfig("lora", init_rank=5), "0: rank is 5, but the matrix is 4 x 6; choose a rank"),
        (
            MethodConfig("lora", init_rank=2, target_modules=("q_proj",)),
            "targets: 'q_proj' matches",
        ),
        (MethodConfig("lora", init_rank=2, exclude=("0", "2", "4")), "no module is left to"),
    ],
)
def test_what_does_not_fit_the_model_is_refused(config: MethodConfig, text: str) -> None:
    model = plain_model()
    names = [name for name, _ in model.named_parameters()]
    with pytest.raises(ValueError, match="^" + text):
        assemble(model, config, total_steps=10)
    assert [name for name, _ in model.named_parameters()] == names


WRITE = "expected a MethodConfig; write "
MISUSE = {
    f"config is 'hyperlora', {WRITE}MethodConfig('hyperlora').": "hyperlora",
    f"config is a dictionary, {WRITE}MethodConfig.from_mapping(...).": {"name": "lora"},
    f'config is of the type type, {WRITE}MethodConfig("hyperadalora").': MethodConfig,
}


@pytest.mark.parametrize("put", [assemble, adapt])
def test_what_is_no_model_or_no_configuration_is_refused_with_the_call_to_write(put: Any) -> None:
    for text, config in MISUSE.items():
        with pytest.raises(UserError, match=f"^{re.escape(text)}$"):
            put(plain_model(), config, total_steps=9)
    with pytest.raises(UserError, match=r"^model is of the type MethodConfig, expected a "):
        put(MethodConfig("lora"), plain_model(), total_steps=9)


def test_one_name_in_place_of_a_list_is_refused() -> None:
    with pytest.raises(UserError) as caught:
        assemble(plain_model(), MethodConfig("lora"), total_steps=9, modules_to_save="0")
    assert str(caught.value) == "modules_to_save is '0', expected a list; write ['0']."


def test_a_module_inside_another_that_is_trained_as_a_whole_is_refused() -> None:
    model = nn.Sequential(nn.Linear(6, 4), nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)))
    with pytest.raises(UserError) as caught:
        assemble(model, MethodConfig("lora"), total_steps=1, modules_to_save=["1.0", "1"])
    assert str(caught.value) == (
        "modules_to_save names '1.0', which is inside '1' and trained with it; drop it."
    )


OTHERS = {
    "lora": ["adalora", "hyperlora recurrent none"],
    "adalora": ["lora", "hyperadalora static none"],
    "hyperlora recurrent none": ["lora", "hyperadalora static none", "hyperlora static token_rms"],
    "hyperadalora static none": ["adalora", "hyperlora recurrent none"],
}


@pytest.mark.parametrize(("here", "there"), [(h, t) for h in OTHERS for t in OTHERS[h]])
def test_the_state_of_another_method_is_refused(
    small: SimpleNamespace, here: str, there: str
) -> None:
    run = small.build(here)
    state = small.build(there).method.state_dict()
    with pytest.raises(ValueError, match=r"the saved (factors are|state is of another)"):
        run.method.load_state_dict(state)


@pytest.mark.parametrize("blocks", [1, 3])
def test_the_state_of_another_model_is_refused(
    small: SimpleNamespace, case: str, blocks: int
) -> None:
    run = small.build(case)
    state = small.build(case, blocks=blocks).method.state_dict()
    with pytest.raises(ValueError, match=r"the saved (factors are|state is of another)"):
        run.method.load_state_dict(state)


def test_a_state_without_the_optimizer_that_is_asked_for_is_refused(
    small: SimpleNamespace, case: str
) -> None:
    run = small.build(case)
    with pytest.raises(ValueError, match="the saved state has no optimizer"):
        run.method.load_state_dict(run.method.state_dict(), run.optimizer)


def generated(name: str = "hyperadalora", **hypernetwork: Any) -> GeneratedParameters:
    """What generates the factors of two models of equal names under these settings."""
    model = nn.Sequential(*(nn.ModuleDict({"up": nn.Linear(6, 4), "down": nn.Linear(4, 6)})
                            for _ in range(3)))  # fmt: skip
    config = MethodConfig.from_mapping(
        {"name": name, "init_rank": 2, "hypernetwork": {"preset": "mlp-small"} | hypernetwork}
    )
    owner = assemble(model, config, total_steps=1000).owner
    assert isinstance(owner, GeneratedParameters)
    return owner


def test_every_choice_of_a_hypernetwork_reaches_it() -> None:
    plain = generated()
    assert plain.recursion == Recursion("recurrent")
    assert {name: role.output for name, role in plain.roles.items()} == {
        "p": "unit_rows", "lam": "free", "q": "unit_rows"
    }  # fmt: skip
    assert {name: role.zero_start for name, role in plain.roles.items()} == {
        "p": False, "lam": True, "q": False
    }  # fmt: skip
    assert {network.networks for network in networks(plain)} == {1}
    assert {network.trunk.dtype for network in networks(plain)} == {None}
    assert all(network.embedding is not None for network in networks(plain))
    assert generated(state="damped").recursion == Recursion("damped", 0.5)
    assert generated(state="damped", relaxation=0.2).recursion == Recursion("damped", 0.2)
    free = generated(outputs="free", embeddings=False)
    assert {role.output for role in free.roles.values()} == {"free"}
    assert all(network.embedding is None for network in networks(free))
    assert generated(outputs="orthonormal").roles["q"].output == "orthonormal"
    assert {n.networks for n in networks(generated(sharing="each"))} == {6}
    bf16 = networks(generated(dtype="bf16"))
    assert {network.trunk.dtype for network in bf16} == {torch.bfloat16}
    rms = generated(gradient_normalisation="token_rms", gradient_decay=0.5)
    default = generated(gradient_normalisation="token_rms")
    assert [owner.averages._decay for owner in (rms, default)] == [0.5, 0.99]
    assert plain.averages is None


def networks(owner: GeneratedParameters) -> list[Any]:
    return list(owner.hypernetworks.values())


def test_groups_share_a_hypernetwork_by_the_names_of_modules() -> None:
    owner = generated("hyperlora", sharing="groups")
    # A of all six: three of `up` with six inputs, three of `down` with four.
    for role, widths in (("a", (6, 4)), ("b", (4, 6))):
        network = owner.hypernetworks[role]
        assert network.networks == 2
        assert [shape[2] for shape in network.shapes] == list(widths)
    choices = decode(owner.get_buffer("choices"))
    assert choices["networks['a']"] == [0, 0, 0, 1, 1, 1]


def test_layers_have_the_methods_options() -> None:
    def layer(section: dict[str, Any]) -> Any:
        config = MethodConfig.from_mapping({"init_rank": 3, "alpha": 6} | section)
        return assemble(nn.Sequential(nn.Linear(6, 4)), config, total_steps=9).layers["0"]

    assert layer({"name": "dora"}).detach_norm
    assert not layer({"name": "dora", "magnitude": {"detach_norm": False}}).detach_norm
    scalar = layer({"name": "hyperdora", "magnitude": {"form": "scalar"}})
    assert isinstance(scalar, ScaledLoRALinear)
    assert layer({"name": "dylora", "sampling": {"frozen": True}}).frozen
    assert not layer({"name": "hyperdylora"}).frozen
    assert {layer({"name": name}).scaling for name in ("lora", "dora", "dylora")} == {2.0}
