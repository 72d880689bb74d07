"""AdaLoRA's training with its allocator: our layers and rank-budget against PEFT."""

import pytest
import torch
from peft import get_peft_model

from lowrank_adapters import (
    FactorStack,
    accumulate_orthogonality_gradient_,
    freeze_base_,
    import_peft_,
)
from rank_budget import CubicBudget, RankAllocator, SmoothedSensitivity, ranked_layers

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
STEPS, INITIAL, FINAL, WEIGHT = 20, 4, 2, 0.5
SCHEDULE = {"total_step": STEPS, "tinit": 4, "tfinal": 6, "deltaT": 2}


def labels_of(name, batch):
    return batch if name in ("llama", "qwen2") else batch[:, 0] % 3


def train_peft(kit, name, model):
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2, weight_decay=0.0)
    losses = []
    for step in range(1, STEPS + 1):
        batch = kit.tokens(step)
        loss = model.base_model(input_ids=batch, labels=labels_of(name, batch)).loss
        loss.backward()
        optimizer.step()
        model.base_model.update_and_allocate(step)
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def train_ours(kit, name, model, layers):
    stack = FactorStack(layers)
    freeze_base_(model)
    groups = [group for group in stack.groups if group.role in ("p", "q")]
    optimizer = torch.optim.AdamW(stack.leaf_parameters(), lr=1e-2, weight_decay=0.0)
    budget = CubicBudget(
        initial=INITIAL, final=FINAL, total_steps=STEPS, warmup=4, cooldown=6, interval=2
    )
    allocator = RankAllocator(
        ranked_layers(model),
        budget.times(len(layers)),
        score=SmoothedSensitivity(),
        direction="regrow",
    )
    losses = []
    for step in range(1, STEPS + 1):
        batch = kit.tokens(step)
        loss = model(input_ids=batch, labels=labels_of(name, batch)).loss
        loss.backward()
        loss = loss + WEIGHT * accumulate_orthogonality_gradient_(groups, WEIGHT, squared=False)
        optimizer.step()
        allocator.step()
        stack.zero_grads_()
        losses.append(loss.item())
    return losses, allocator


@pytest.mark.parametrize("name", ["llama", "qwen2", "roberta", "deberta-v3"])
def test_losses_and_masks_follow_pefts(kit, tmp_path, name):
    torch.manual_seed(1)
    config = kit.peft_config("adalora", kit.TARGETS[name], target_r=FINAL, **SCHEDULE)
    theirs = get_peft_model(kit.build(name), config)
    theirs.save_pretrained(tmp_path)
    ours = kit.build(name)
    layers = import_peft_(ours, tmp_path)

    expected = train_peft(kit, name, theirs.eval())
    found, allocator = train_ours(kit, name, ours, layers)
    torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), rtol=0, atol=1e-5)
    pattern = {
        key.rpartition(".lora_E")[0]: mask
        for key, mask in theirs.peft_config["default"].rank_pattern.items()
    }
    assert {n: mask.tolist() for n, mask in allocator.masks().items()} == pattern
    assert sum(map(sum, pattern.values())) == FINAL * len(layers)
