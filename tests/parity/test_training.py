"""Twenty steps from the same start and data follow PEFT's losses."""

import pytest
import torch
from peft import get_peft_model

from lowrank_adapters import (
    FactorStack,
    accumulate_orthogonality_gradient_,
    freeze_base_,
    import_peft_,
)

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
STEPS = 20
WEIGHT = 0.5  # PEFT's default orth_reg_weight


def optimizer_of(parameters):
    # Without weight decay, which would move PEFT's base too if it were trained.
    return torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.0)


def labels_of(name, batch):
    return batch if name in ("llama", "qwen2") else batch[:, 0] % 3


def train_peft(kit, name, model):
    """PEFT's losses, to which its AdaLoRA adds the penalty by itself."""
    optimizer = optimizer_of([p for p in model.parameters() if p.requires_grad])
    losses = []
    for step in range(STEPS):
        batch = kit.tokens(step)
        # Without a task_type, PeftModel goes round AdaLoraModel, and so round the penalty.
        loss = model.base_model(input_ids=batch, labels=labels_of(name, batch)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def train_ours(kit, name, model, layers, penalised):
    stack = FactorStack(layers)
    freeze_base_(model)
    groups = [group for group in stack.groups if group.role in ("p", "q")]
    optimizer = optimizer_of(stack.leaf_parameters())
    losses = []
    for step in range(STEPS):
        batch = kit.tokens(step)
        loss = model(input_ids=batch, labels=labels_of(name, batch)).loss
        loss.backward()
        if penalised:
            penalty = accumulate_orthogonality_gradient_(groups, WEIGHT, squared=False)
            loss = loss + WEIGHT * penalty
        optimizer.step()
        stack.zero_grads_()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("name", ["llama", "qwen2", "roberta", "deberta-v3"])
@pytest.mark.parametrize("method", ["lora", "dora", "adalora"])
def test_losses_follow_pefts(kit, tmp_path, name, method):
    torch.manual_seed(1)
    theirs = get_peft_model(kit.build(name), kit.peft_config(method, kit.TARGETS[name]))
    theirs.save_pretrained(tmp_path)
    ours = kit.build(name)
    layers = import_peft_(ours, tmp_path)

    expected = train_peft(kit, name, theirs.eval())
    found = train_ours(kit, name, ours, layers, penalised=method == "adalora")
    torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), rtol=0, atol=1e-5)
    assert abs(expected[0] - expected[-1]) > 1e-2
