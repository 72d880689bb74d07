"""Table 7: the memory and time of a step."""

import pytest
import torch


def test_what_is_kept_for_the_backward_pass_is_counted_by_hand(recipe):
    weight = torch.nn.Parameter(torch.ones(5, 3))
    rows = torch.ones(8, 3)

    def work():
        y = torch.tanh(rows[:4] @ weight.T)  # the whole of rows (8, 3); its own result (4, 5)
        z = y[:2] * y[2:]  # two views of what is counted already
        (z.exp() * 2).sum().backward()  # the result of exp (2, 5); a number is no tensor

    count = recipe.step_cost.kept_bytes
    assert count(work, besides=[weight]) == 4 * (8 * 3 + 4 * 5 + 2 * 5)
    assert weight.grad is not None
    assert count(work, besides=[weight, rows[5:]]) == 4 * (4 * 5 + 2 * 5)

    def of_weight():
        (rows @ (2 * weight).T).exp().sum().backward()

    # Rows and the result; not 2 * weight, since rows want no gradient.
    assert count(of_weight, besides=[weight]) == 4 * (8 * 3 + 8 * 5)


def assert_parts(found, adapted, generated):
    """Compare the parts with counts of numbers, of four bytes each."""
    method = adapted.method
    factors = 2 * method.stack.values.numel()
    if generated:  # and the state, which is as large, and what was chosen, in bytes
        states = [state for role in method.owner.roles for state in method.owner.state_of(role)]
        assert sum(state.numel() for state in states) == method.stack.values.numel()
        factors += method.stack.values.numel() + method.owner.choices.numel() / 4
    trained = sum(p.numel() for p in method.parameters())
    own = trained if generated else 0  # learned factors are counted as factors
    averages = 2 * trained + len(method.parameters())  # Adam's, and its count of steps
    inside = {id(p) for p in method.stack.leaf_parameters()}
    base = [p for p in adapted.model.parameters() if id(p) not in inside]
    base += [b for name, b in adapted.model.named_buffers() if not name.endswith("rank_mask")]
    expected = {"factors": factors, "trained": 2 * own + averages}
    for part, numbers in expected.items():
        assert found[f"{part} (MiB)"] * 2**20 == 4 * numbers, part
    assert found["base (MiB)"] * 2**20 == pytest.approx(4 * sum(b.numel() for b in base), rel=0.02)


def test_a_steps_cost_is_measured(recipe, monkeypatch):
    small = recipe.step_cost._llama(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    monkeypatch.setitem(recipe.step_cost.SHAPES, "llama-small", (torch.float32, small))
    made, adapt = [], recipe.step_cost.adapt
    monkeypatch.setattr(
        recipe.step_cost,
        "adapt",
        lambda *given, **more: made.append(adapt(*given, **more)) or made[-1],
    )

    def measured(name, batch=2):
        return recipe.step_cost.measure(
            "llama-small", name, batch, 8, 2, torch.device("cpu"), seed=0
        )

    kept = {}
    for name in ("hyperadalora", "adalora"):
        found = measured(name)
        assert made[-1].steps == 2 + 2  # those that warm up, too
        assert found["memory (MiB)"] > 50
        assert_parts(found, made[-1], generated=name == "hyperadalora")
        assert 0 < found["latency (ms)"] < 60_000
        kept[name] = found["kept (MiB)"] * 2**20
    # Beside what the model keeps the hypernetworks keep what they keep alone.
    owner = made[0].method.owner
    alone = recipe.step_cost.kept_bytes(
        owner.refresh, [*owner.parameters(), *owner.buffers(), made[0].method.stack.values]
    )
    assert kept["hyperadalora"] - kept["adalora"] == alone > 0
    assert recipe.step_cost.config("hyperadalora").hypernetwork.preset == "attention-tinybert"
