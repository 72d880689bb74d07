"""A run that is saved and loaded continues bit for bit."""

import pytest
import torch
from torch import nn

from hyper_core import AttentionConfig, GeneratedParameters, HyperError

CONFIG = AttentionConfig(hidden=8, heads=2, feed_forward=8)


class Run:
    """A small network with two generated stacks, and all that its training needs."""

    def __init__(self, seed, state, normalisation, sharing="all"):
        torch.manual_seed(seed)
        self.p = nn.Parameter(torch.randn(2, 3, 5))
        self.lam = nn.Parameter(torch.zeros(2, 3, 1))
        self.generated = GeneratedParameters(
            {"p": [self.p], "lam": [self.lam]},
            config=CONFIG,
            state=state,
            sharing=sharing,
            outputs={"p": "unit_rows"},
            zero_start={"lam"},
            gradient_normalisation=normalisation,
        )
        self.optimizer = torch.optim.Adam(self.generated.parameters(), lr=1e-2)

    def train(self, steps):
        losses = []
        for step in steps:
            self.generated.refresh()
            x = torch.randn(5, generator=torch.Generator().manual_seed(step))
            loss = ((self.p @ x) * self.lam[..., 0]).sum() + (self.lam.sum() - 1).square()
            loss.backward()
            self.generated.backward()
            self.optimizer.step()
            self.generated.commit()
            self.p.grad = self.lam.grad = None
            self.optimizer.zero_grad()
            losses.append(loss.item())
        return losses


@pytest.mark.parametrize("state", ["recurrent", "static", "damped"])
@pytest.mark.parametrize("normalisation", ["none", "token_rms"])
@pytest.mark.parametrize("sharing", ["all", "each", ["x", "y"]])
def test_loaded_run_equals_the_uninterrupted_one_bit_for_bit(
    tmp_path, state, normalisation, sharing
):
    whole = Run(0, state, normalisation, sharing)
    expected = whole.train(range(8))

    first = Run(0, state, normalisation, sharing)
    losses = first.train(range(5))
    saved = {
        "generated": first.generated.state_dict(),
        "optimizer": first.optimizer.state_dict(),
    }
    torch.save(saved, tmp_path / "state.pt")

    second = Run(
        1, state, normalisation, sharing
    )  # other weights, other start: all must be replaced
    loaded = torch.load(tmp_path / "state.pt", weights_only=True)
    second.generated.load_state_dict(loaded["generated"])
    second.optimizer.load_state_dict(loaded["optimizer"])
    losses += second.train(range(5, 8))

    assert losses == expected
    found, wanted = second.generated.state_dict(), whole.generated.state_dict()
    assert list(found) == list(wanted)
    for name, value in wanted.items():
        assert torch.equal(found[name], value), name
    assert torch.equal(second.p, whole.p)
    assert torch.equal(second.lam, whole.lam)


def test_the_state_dict_names_state_and_averages():
    generated = Run(0, "recurrent", "token_rms").generated
    saved = {n: v for n, v in generated.state_dict().items() if n.startswith(("state", "averages"))}
    assert generated.state_dict()["choices"].dtype == torch.uint8
    assert {name for name in generated.state_dict() if "hypernetworks." not in name} == {
        *saved,
        "choices",
    }
    assert {name: tuple(value.shape) for name, value in saved.items()} == {
        "state_p_0": (2, 3, 5),
        "state_lam_0": (2, 3, 1),
        "averages.square_p_0": (2, 3, 1),
        "averages.square_lam_0": (2, 3, 1),
        "averages.square_weight": (),
    }


def plain(state="recurrent", outputs="free", **options):
    return GeneratedParameters(
        {"p": [nn.Parameter(torch.randn(2, 3, 3))]},
        **{"config": CONFIG, "state": state, "outputs": {"p": outputs}, **options},
    )


@pytest.mark.parametrize(
    ("options", "name", "saved", "here"),
    [
        ({"state": "static"}, "state", "'recurrent'", "'static'"),
        ({"outputs": "unit_rows"}, "outputs['p']", "'free'", "'unit_rows'"),
        ({"tokens": {"p": "columns"}}, "tokens['p']", "'rows'", "'columns'"),
        ({"norms": {"p": 2.0}}, "norms['p']", "1.0", "2.0"),
        ({"sharing": [0, 1]}, "networks['p']", "[0, 0]", "[0, 1]"),
        (
            {"config": AttentionConfig(hidden=8, heads=4, feed_forward=8)},
            "config",
            "\"AttentionConfig(hidden=8, heads=2, feed_forward=8, layers=1, norm='post')\"",
            "\"AttentionConfig(hidden=8, heads=4, feed_forward=8, layers=1, norm='post')\"",
        ),
    ],
)
def test_a_state_dict_of_other_choices_is_refused_before_anything_is_loaded(
    options, name, saved, here
):
    other = plain(**options)
    before = {name: value.clone() for name, value in other.state_dict().items()}
    with pytest.raises(HyperError) as caught:
        other.load_state_dict(plain().state_dict())
    assert str(caught.value) == (
        f"the state dict was made with {name} {saved}, expected {here}; make the "
        "GeneratedParameters as that run did."
    )
    for key, value in other.state_dict().items():
        assert torch.equal(value, before[key]), key


def put(name, value):
    return lambda saved: saved.update({name: value})


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (
            put("state_p_0", torch.zeros(2, 3, 4)),
            "state_p_0 of the state dict is of the shape (2, 3, 4), expected of the shape "
            "(2, 3, 3)",
        ),
        (
            lambda saved: saved.pop("averages.square_p_0"),
            "averages.square_p_0 of the state dict is missing, expected of the shape (2, 3, 1)",
        ),
        (
            put("state_q_0", torch.zeros(2)),
            "state_q_0 of the state dict is of the shape (2,), expected none",
        ),
    ],
)
@pytest.mark.parametrize("prefix", ["", "inner."])
def test_nothing_of_a_state_dict_that_does_not_fit_is_loaded(prefix, change, text):
    """Torch would copy the weights, and then refuse: a mixture of two runs."""
    here = plain(gradient_normalisation="token_rms")
    whole = nn.ModuleDict({"inner": here}) if prefix else here
    before = {name: value.clone() for name, value in whole.state_dict().items()}
    saved = plain(gradient_normalisation="token_rms").state_dict()
    change(saved)
    with pytest.raises(HyperError) as caught:
        whole.load_state_dict({f"{prefix}{name}": value for name, value in saved.items()})
    assert str(caught.value) == (
        f"{text}; load what state_dict() of such a GeneratedParameters returned."
    )
    for name, value in whole.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_a_part_of_a_state_dict_loads_where_that_is_asked_for():
    here, saved = plain(), plain().state_dict()
    kept, extra = here.state_p_0.clone(), {"other": torch.zeros(1)}
    weights = {name: value for name, value in saved.items() if name.startswith("hypernetworks.")}
    found = here.load_state_dict(weights | extra, strict=False)
    assert (set(found.missing_keys), found.unexpected_keys) == ({"state_p_0", "choices"}, ["other"])
    assert torch.equal(here.state_p_0, kept)
    assert all(torch.equal(here.state_dict()[name], value) for name, value in weights.items())
    with pytest.raises(
        HyperError, match=r"of the shape \(2, 4, 3\), expected of the shape \(2, 3, 3"
    ):
        here.load_state_dict(weights | {"state_p_0": torch.zeros(2, 4, 3)}, strict=False)


def test_another_relaxation_is_refused_and_another_limit_is_not():
    damped = plain(state="damped", relaxation=0.5).state_dict()
    with pytest.raises(HyperError, match=r"made with relaxation 0\.5, expected 0\.25; make"):
        plain(state="damped", relaxation=0.25).load_state_dict(damped)
    limited = AttentionConfig(hidden=8, heads=2, feed_forward=8, max_score_bytes=10**6)
    plain(config=limited).load_state_dict(plain().state_dict())


@pytest.mark.parametrize("bad", [torch.zeros(3, dtype=torch.uint8), torch.ones(()), torch.ones(2)])
def test_choices_that_are_not_readable_are_refused(bad):
    with pytest.raises(HyperError) as caught:
        plain().load_state_dict({**plain().state_dict(), "choices": bad})
    assert str(caught.value) == (
        "choices in the state dict is not readable, expected the bytes of a JSON text; load what "
        "state_dict() returned."
    )


def test_a_part_of_a_larger_module_and_one_from_the_meta_device_load_too():
    saved = plain().state_dict()
    whole = nn.ModuleDict({"inner": plain()})
    whole.load_state_dict({f"inner.{name}": value for name, value in saved.items()})
    with pytest.raises(HyperError, match="made with state 'recurrent', expected 'static'"):
        nn.ModuleDict({"inner": plain(state="static")}).load_state_dict(
            {f"inner.{name}": value for name, value in saved.items()}
        )
    empty = plain().to("meta").to_empty(device="cpu")
    empty.load_state_dict(saved)
    for name, value in empty.state_dict().items():
        assert torch.equal(value, saved[name]), name


def test_loading_discards_a_pending_refresh():
    """A commit after it would make the leaves' values of before the state."""
    generated = plain()
    saved = {name: value.clone() for name, value in generated.state_dict().items()}
    generated.refresh()
    generated.load_state_dict(saved)
    with pytest.raises(HyperError, match="without a pending refresh"):
        generated.commit()
    assert torch.equal(generated.state_p_0, saved["state_p_0"])


def test_the_averages_of_a_discarded_step_are_not_committed_by_the_next():
    run = Run(0, "recurrent", "token_rms")
    run.train(range(2))
    averages = {n: v.clone() for n, v in run.generated.averages.state_dict().items()}
    run.generated.refresh()
    run.p.grad, run.lam.grad = torch.full_like(run.p, torch.nan), torch.ones_like(run.lam)
    run.generated.backward()
    run.generated.discard()
    run.generated.refresh()
    run.generated.commit()
    for name, value in run.generated.averages.state_dict().items():
        assert torch.equal(value, averages[name]), name
