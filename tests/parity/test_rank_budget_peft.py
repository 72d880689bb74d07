"""The allocator in place of PEFT's: the same where PEFT is right; what holds where it is not."""

import copy
import re
from pathlib import Path

import pytest
import torch
from peft import AdaLoraConfig, PeftModel, get_peft_model
from torch.overrides import TorchFunctionMode
from transformers import LlamaConfig, LlamaForCausalLM

from rank_budget import (
    BudgetError,
    CubicBudget,
    FixedPruning,
    Limits,
    RankAllocator,
    SmoothedSensitivity,
    attach_,
    compact_,
    ranked_layers,
    watch_,
)

pytestmark = pytest.mark.filterwarnings(
    "ignore::FutureWarning", "ignore::UserWarning", "ignore::RuntimeWarning"
)
README = Path(__file__).parents[2] / "packages" / "rank-budget" / "README.md"
TARGETS = ["q_proj", "v_proj", "down_proj"]
INITIAL, FINAL, MATRICES = 4, 2, 6


def tiny_llama():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=61,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=32,
    )
    return LlamaForCausalLM(config)


def adalora(**changes):
    options = {"init_r": INITIAL, "target_r": FINAL, "tinit": 20, "tfinal": 40, "deltaT": 5}
    options |= {"total_step": 200, "lora_alpha": 8, "target_modules": TARGETS} | changes
    torch.manual_seed(1)
    return get_peft_model(tiny_llama(), AdaLoraConfig(**options))


def masks_of(model):
    """Where PEFT's λ are not zero, by module."""
    return {name: (layer.lam[:, 0] != 0).tolist() for name, layer in ranked_layers(model).items()}


def pattern_of(model):
    """PEFT's own record of what lives, by module."""
    pattern = model.peft_config["default"].rank_pattern or {}
    return {"base_model.model." + key.rpartition(".lora_E")[0]: v for key, v in pattern.items()}


def train(model, steps, allocate, *, lr=2e-2, start=1):
    """Adam on random tokens, calling ``allocate`` where PEFT's documentation does."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=lr)
    for step in range(start, start + steps):
        torch.manual_seed(step)
        tokens = torch.randint(61, (4, 12))
        optimizer.zero_grad()
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        yield allocate(step)


def budget(**changes):
    options = {"initial": INITIAL, "final": FINAL, "total_steps": 200}
    options |= {"warmup": 20, "cooldown": 40, "interval": 5} | changes
    return CubicBudget(**options).times(MATRICES)


def test_masks_and_weights_equal_pefts_over_200_steps():
    theirs, ours = adalora(), adalora()
    allocator = RankAllocator(
        ranked_layers(ours), budget(), score=SmoothedSensitivity(), direction="regrow"
    )
    update = theirs.base_model.update_and_allocate
    pairs = zip(
        train(theirs, 200, update), train(ours, 200, lambda _: allocator.step()), strict=True
    )
    allocated = []
    for step, (_, done) in enumerate(pairs, 1):
        live = {name: mask.tolist() for name, mask in allocator.masks().items()}
        if done is not None:
            allocated.append(step)
        if allocated:
            assert pattern_of(theirs) == live, step
        for name, layer in ranked_layers(theirs).items():
            for role in ("p", "lam", "q"):
                mine = getattr(ranked_layers(ours)[name], role)
                torch.testing.assert_close(mine, getattr(layer, role), rtol=0, atol=0)
    assert allocated == [*range(25, 160, 5), 160]
    assert len({done.budget for done in allocator.history}) > 5
    assert sum(map(sum, masks_of(ours).values())) == FINAL * MATRICES
    averages = allocator._scorer.by_matrix()
    assert all(mean.abs().max() > 0 for roles in averages.values() for mean, _ in roles.values())


def test_averages_equal_pefts():
    theirs, ours = adalora(), adalora()
    allocator = RankAllocator(
        ranked_layers(ours), budget(), score=SmoothedSensitivity(), direction="regrow"
    )
    update = theirs.base_model.update_and_allocate
    pairs = zip(train(theirs, 30, update), train(ours, 30, lambda _: allocator.step()), strict=True)
    for _ in pairs:
        peft = theirs.base_model.rankallocator
        for name, roles in allocator._scorer.by_matrix().items():
            for role, letter in (("p", "B"), ("lam", "E"), ("q", "A")):
                key = f"{name.removeprefix('base_model.model.')}.lora_{letter}.default"
                mean, spread = roles[role]
                torch.testing.assert_close(mean, peft.exp_avg_ipt[key], rtol=1e-5, atol=1e-12)
                torch.testing.assert_close(spread, peft.exp_avg_unc[key], rtol=1e-4, atol=1e-12)


def test_ties_do_not_over_prune():
    """After a step with a learning rate of zero, as a warm-up has it, λ and all scores are zero."""
    theirs, ours = adalora(tinit=0, deltaT=1), adalora()
    next(train(theirs, 1, theirs.base_model.update_and_allocate, lr=0.0))
    assert not any(map(any, pattern_of(theirs).values()))
    allocator = RankAllocator(
        ranked_layers(ours), budget(warmup=0, interval=1), score=SmoothedSensitivity()
    )
    done = next(train(ours, 1, lambda _: allocator.step(), lr=0.0))
    assert 0 < done.pruned < 3
    assert sum(allocator.ranks().values()) == done.budget


def test_an_initial_rank_that_is_the_final_one_prunes_nothing():
    theirs, ours = adalora(target_r=INITIAL), adalora()
    with pytest.raises((RuntimeError, IndexError)):
        list(train(theirs, 25, theirs.base_model.update_and_allocate))
    schedule = budget(final=INITIAL, total_steps=30, warmup=5, cooldown=5)
    allocator = RankAllocator(ranked_layers(ours), schedule, direction="regrow")
    list(train(ours, 30, lambda _: allocator.step()))
    assert allocator.live_ranks == INITIAL * MATRICES


def test_an_interval_of_zero_is_refused_before_the_training():
    theirs = adalora(deltaT=0, tinit=0)
    with pytest.raises(ZeroDivisionError):
        list(train(theirs, 2, theirs.base_model.update_and_allocate))
    with pytest.raises(BudgetError, match="interval is 0, but must be at least 1 step"):
        budget(interval=0)


def test_resuming_after_pruning_keeps_the_scheduled_budget(tmp_path):
    theirs = adalora(tinit=2, tfinal=5, total_step=40, deltaT=1)
    list(train(theirs, 6, theirs.base_model.update_and_allocate))
    theirs.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(tiny_llama(), tmp_path, is_trainable=True)
    list(train(again, 1, again.base_model.update_and_allocate, start=7))
    scheduled, _ = theirs.base_model.rankallocator.budget_schedule(7)
    # PEFT counts from the ranks that the file has, towards a budget of those it began with.
    assert sum(map(sum, pattern_of(again).values())) < scheduled - 2

    whole, first = adalora(), adalora()
    schedule = budget(total_steps=40, warmup=2, cooldown=5, interval=1)
    one, two = (
        RankAllocator(ranked_layers(model), schedule, score=SmoothedSensitivity())
        for model in (whole, first)
    )
    list(train(whole, 6, lambda _: one.step(), lr=1e-2))
    list(train(first, 6, lambda _: two.step(), lr=1e-2))
    resumed = adalora()
    resumed.load_state_dict(first.state_dict())
    three = RankAllocator(ranked_layers(resumed), schedule, score=SmoothedSensitivity())
    three.load_state_dict(copy.deepcopy(two.state_dict()))
    list(train(first, 4, lambda _: two.step(), start=7))
    list(train(resumed, 4, lambda _: three.step(), start=7))
    assert three.live_ranks == schedule.live_ranks(10)
    assert three.history == two.history
    torch.testing.assert_close(three.masks(), two.masks())


def test_a_schedule_that_does_not_fit_is_refused_before_the_training():
    """Which PEFT finds out in training, where tfinal is taken for a step."""
    with pytest.raises(BudgetError, match="total_steps is 100, but must be above warmup"):
        budget(total_steps=100, warmup=60, cooldown=90)


def test_the_final_budget_is_met_without_a_cool_down():
    """Trainers count from zero, and PEFT forces its last mask at a step that never comes."""
    theirs, ours = adalora(tinit=0, tfinal=0, total_step=9, deltaT=5), adalora()
    list(train(theirs, 9, theirs.base_model.update_and_allocate, start=0))
    assert sum(map(sum, pattern_of(theirs).values())) > FINAL * MATRICES
    schedule = budget(total_steps=9, warmup=0, cooldown=0, interval=5)
    allocator = RankAllocator(ranked_layers(ours), schedule, score=SmoothedSensitivity())
    list(train(ours, 9, lambda _: allocator.step(), start=0))
    assert allocator.live_ranks == FINAL * MATRICES


def test_a_module_without_gradients_is_named():
    theirs, ours = adalora(), adalora()
    for model in (theirs, ours):
        model.base_model.model.model.layers[1].mlp.down_proj.lora_E["default"].requires_grad_(False)
    with pytest.raises(TypeError, match="NoneType"):
        next(train(theirs, 1, theirs.base_model.update_and_allocate))
    allocator = RankAllocator(ranked_layers(ours), budget(), score=SmoothedSensitivity())
    with pytest.raises(BudgetError, match=r"1 matrices, such as \S*layers.1.mlp.down_proj"):
        next(train(ours, 1, lambda _: allocator.step()))


def test_a_forgotten_call_is_noticed():
    theirs, ours = adalora(), adalora()
    list(train(theirs, 5, lambda _: None))  # trains on at full rank, without a word
    allocator = RankAllocator(ranked_layers(ours), budget(), score=SmoothedSensitivity())
    optimizer = torch.optim.Adam([p for p in ours.parameters() if p.requires_grad])
    with watch_(allocator, optimizer, patience=3):
        optimizer.step()
        optimizer.step()
        with pytest.raises(BudgetError, match="has taken 3 steps"):
            optimizer.step()


class Reads(TorchFunctionMode):
    """Counts by what Python reads a tensor's values."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        self.count += getattr(function, "__name__", "") in ("tolist", "item", "__bool__")
        return function(*args, **(kwargs or {}))


def test_a_budget_step_reads_one_flag_not_one_value_per_matrix():
    theirs, ours = adalora(tinit=0, deltaT=1), adalora()
    allocator = RankAllocator(
        ranked_layers(ours), budget(warmup=0, interval=1), score=SmoothedSensitivity()
    )

    def counted(call):
        def run(step):
            with Reads() as reads:
                call(step)
            return reads.count

        return run

    assert next(train(theirs, 1, counted(theirs.base_model.update_and_allocate))) == MATRICES + 1
    assert next(train(ours, 1, counted(lambda _: allocator.step()))) == 1


def test_pruned_components_need_not_stay_allocated():
    model = adalora()
    layers = ranked_layers(model)
    schedule = FixedPruning(INITIAL, FINAL, 1, 2).times(MATRICES)
    allocator = RankAllocator(layers, schedule, score=SmoothedSensitivity())
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    attach_(allocator, optimizer)
    tokens = torch.randint(61, (4, 12))
    for _ in range(4):
        optimizer.zero_grad()
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
    with torch.no_grad():
        expected = model(input_ids=tokens).logits
    compact_(layers, allocator.masks(), optimizer)
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=tokens).logits, expected, rtol=0, atol=1e-6)
    ranks = {name: layer.lam.shape[0] for name, layer in layers.items()}
    assert ranks == {name: max(1, rank) for name, rank in allocator.ranks().items()}
    state = [value for state in optimizer.state.values() for value in state.values()]
    assert sum(value.numel() for value in state if value.dim()) == 2 * sum(
        factor.numel() for layer in layers.values() for factor in (layer.p, layer.lam, layer.q)
    )


def trained_and_pruned(*, kill=None):
    """A model after 4 steps with an attached allocator; ``kill``: a module that loses all.

    Without one each keeps something.
    """
    model = adalora()
    layers = ranked_layers(model)
    limits = Limits(floors={"*": 1}) if kill is None else Limits(ceilings={f"*{kill}": 0})
    allocator = RankAllocator(
        layers,
        FixedPruning(INITIAL, FINAL, 1, 2).times(MATRICES),
        score=SmoothedSensitivity(),
        limits=limits,
    )
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    attach_(allocator, optimizer)
    list(train_on(model, optimizer, 4))
    return model, layers, allocator, optimizer


def train_on(model, optimizer, steps):
    for step in range(steps):
        torch.manual_seed(step)
        tokens = torch.randint(61, (4, 12))
        optimizer.zero_grad()
        model(input_ids=tokens, labels=tokens).loss.backward()
        yield optimizer.step()


def logits_of(model):
    with torch.no_grad():
        return model.eval()(input_ids=torch.arange(24).view(2, 12)).logits


def loaded(model, folder):
    model.save_pretrained(folder)
    return PeftModel.from_pretrained(tiny_llama(), folder)


@pytest.mark.parametrize("kill", [None, "layers.1.mlp.down_proj"])
def test_a_folder_saved_after_compacting_loads_in_peft(tmp_path, kill):
    model, layers, allocator, optimizer = trained_and_pruned(kill=kill)
    whole = logits_of(model)
    masks = allocator.masks()
    compact_(layers, masks, optimizer)
    again = loaded(model, tmp_path / "once")
    torch.testing.assert_close(logits_of(again), whole, rtol=0, atol=1e-6)
    torch.testing.assert_close(logits_of(again), logits_of(model), rtol=0, atol=0)
    ranks = {name: layer.lam.shape[0] for name, layer in ranked_layers(again).items()}
    assert ranks == {name: max(1, rank) for name, rank in allocator.ranks().items()}
    assert (0 in allocator.ranks().values()) == (kill is not None)
    # The training goes on; what is dead stays so; smaller still, it loads again.
    list(train_on(model.train(), optimizer, 2))
    dead = [layers[name].lam for name, rank in allocator.ranks().items() if rank == 0]
    assert bool(dead) == (kill is not None)
    assert not any(lam.any() for lam in dead)
    more = {name: torch.ones(len(layer.lam), dtype=torch.bool) for name, layer in layers.items()}
    cut = next(name for name, rank in ranks.items() if rank > 1)
    more[cut][0] = False
    with torch.no_grad():
        layers[cut].lam[0] = 0
    expected = logits_of(model)
    compact_(layers, more, optimizer)
    twice = loaded(model, tmp_path / "twice")
    torch.testing.assert_close(logits_of(twice), expected, rtol=0, atol=1e-6)
    assert sum(map(len, twice.peft_config["default"].rank_pattern.values())) == INITIAL * MATRICES
    # What was loaded is compacted and saved as well.
    (layer,) = (layer for name, layer in ranked_layers(twice).items() if name == cut)
    assert layer.lam.shape[0] == ranks[cut] - 1


def test_the_readmes_five_lines_attach_to_pefts_model(capsys):
    (code,) = [
        block
        for block in re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)
        if "ranked_layers(model)" in block
    ]
    model = adalora()
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    tokens = torch.randint(61, (4, 12))
    loader = [{"input_ids": tokens, "labels": tokens}] * 20
    names = {"model": model, "optimizer": optimizer, "loader": loader}
    exec(compile(code, str(README), "exec"), names)
    allocator, layers = names["allocator"], names["layers"]
    assert allocator.steps == 20
    assert allocator.live_ranks == FINAL * MATRICES == sum(map(sum, masks_of(model).values()))
    compact_(layers, allocator.masks(), optimizer)
    model(input_ids=tokens, labels=tokens).loss.backward()
    before = {name: layer.lam.detach().clone() for name, layer in layers.items()}
    optimizer.step()
    assert allocator.steps == 21
    for name, layer in layers.items():
        rank = allocator.ranks()[name]
        assert layer.lam.shape[0] == max(1, rank)
        assert (layer.lam != before[name]).all() == bool(rank)
    capsys.readouterr()
