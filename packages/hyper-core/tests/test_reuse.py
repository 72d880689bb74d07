"""What another run takes over from a trained hypernetwork, and what it says of the rest."""

import pytest
import torch

from hyper_core import AttentionConfig, GeneratedParameters, HyperError, reuse_

CONFIG = AttentionConfig(hidden=4, heads=2, feed_forward=5)


def make(shapes, seed=0, config=CONFIG, **options):
    torch.manual_seed(seed)
    leaves = {role: [torch.randn(*s) for s in sizes] for role, sizes in shapes.items()}
    return GeneratedParameters(leaves, config=config, **options)


def test_another_model_takes_over_bodies_and_the_widths_in_common():
    old = make({"p": [(2, 3, 5), (2, 3, 7)]})
    new = make({"p": [(4, 3, 5), (1, 3, 6)], "b": [(2, 3, 5)]}, seed=1)
    before = {name: value.clone() for name, value in new.state_dict().items()}
    report = reuse_(new, old.state_dict())
    prefix = "hypernetworks.p."
    body = {n for n in old.state_dict() if n.startswith(f"{prefix}trunk.")}
    kept = {f"{prefix}inputs.5.weight", f"{prefix}outputs.5.weight", f"{prefix}outputs.5.bias"}
    assert set(report.carried) == body | kept
    assert set(report.carried) | set(report.fresh) == set(before)
    for name, value in new.state_dict().items():
        expected = old.state_dict()[name] if name in report.carried else before[name]
        assert torch.equal(value, expected), name
    assert report.fresh[f"{prefix}embedding"] == "it belongs to the matrices of the other run"
    assert report.fresh[f"{prefix}inputs.6.weight"] == "saved has none"
    assert report.fresh["hypernetworks.b.trunk.norm.weight"] == "saved has none"
    assert report.fresh["state_p_0"] == "it is the run's own"
    lines = str(report).splitlines()
    assert lines[0] == (
        f"{len(report.carried)} tensors carried over; {len(report.fresh)} start afresh:"
    )
    assert f"{prefix}inputs.6.weight: saved has none" in lines


def test_another_task_on_the_same_model_takes_over_embeddings_too():
    old, new = make({"p": [(2, 3, 5)]}), make({"p": [(2, 3, 5)]}, seed=1)
    report = reuse_(new, old.state_dict(), same_matrices=True)
    assert set(report.fresh) == {"choices", "state_p_0"}
    new.state_p_0.copy_(old.state_p_0)
    for one, other in zip(new.generate()["p"], old.generate()["p"], strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("options", [{"zero_start": {"p"}}, {"state": "static"}])
def test_a_start_at_zero_is_still_one(options):
    old, new = make({"p": [(2, 3, 5)]}), make({"p": [(2, 3, 5)]}, seed=1, **options)
    report = reuse_(new, old.state_dict(), same_matrices=True)
    assert report.fresh["hypernetworks.p.outputs.5.weight"] == "it starts at zero"
    (values,) = new.generate()["p"]
    assert torch.equal(values, new.state_p_0)


def test_one_network_starts_each_of_several():
    old, new = make({"p": [(2, 3, 5)]}), make({"p": [(3, 3, 5)]}, seed=1, sharing="each")
    report = reuse_(new, old.state_dict())
    name = "hypernetworks.p.trunk.body.0.up.weight"
    assert name in report.carried
    shared = old.state_dict()[name]
    assert torch.equal(new.state_dict()[name], shared.expand(3, -1, -1))


def test_networks_of_matrices_are_taken_over_for_the_same_matrices_alone():
    saved = make({"p": [(3, 3, 5)]}, sharing="each").state_dict()
    new = make({"p": [(3, 3, 5)]}, seed=1, sharing="each")
    with pytest.raises(HyperError) as caught:
        reuse_(new, saved)
    assert str(caught.value) == (
        "saved has nothing that can be carried over, for instance hypernetworks.p.embedding starts "
        "afresh: it belongs to the matrices of the other run; make the hypernetworks with the same "
        "roles and the same config."
    )
    assert set(reuse_(new, saved, same_matrices=True).fresh) == {"choices", "state_p_0"}


def test_another_size_is_named_and_nothing_is_written():
    new = make({"p": [(2, 3, 5)]}, config=AttentionConfig(8, 2, 5))
    before = {name: value.clone() for name, value in new.state_dict().items()}
    with pytest.raises(HyperError, match="saved has nothing that can be carried over"):
        reuse_(new, make({"p": [(2, 3, 5)]}).state_dict(), same_matrices=True)
    for name, value in new.state_dict().items():
        assert torch.equal(value, before[name]), name
