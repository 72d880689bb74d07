"""Values that no run can have: each is refused at the start, by its key, with the rule."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file

from hyper_tune.errors import UserError
from hyper_tune.parallel import usable_device
from hyper_tune.torchtune import optimization, recipe
from hyper_tune.torchtune.rehearsal import rehearse
from hyper_tune.torchtune.settings import RecipeSettings

Failing = Callable[..., str]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("method.name=hyperadalor", "method.name is 'hyperadalor', but must be one of lora, "),
        ("method.init_rank=0", "method.init_rank is 0, but must be a whole number at least 1; "),
        ("method.budget=5", "method.budget is 5, but must be at most method.init_rank = 4; "),
        ("method.bugdet=1", "method has no key 'bugdet'; did you mean 'budget'?"),
        ("batchsize=1", "configuration has no key 'batchsize'; did you mean 'batch_size'?"),
        ("batch_size=0", "batch_size is 0, but must be a whole number at least 1; "),
        ("batch_size=two", "batch_size is 'two', but must be a whole number at least 1; "),
        ("optimizer=adam", "optimizer: adam cannot be built"),
        ("method=lora", "configuration: method must be a section of keys, such as name."),
        (
            "optimizer._component_=torch.optim.Adamm",
            "optimizer: torch.optim.Adamm cannot be built: torch.optim has no 'Adamm'; did you ",
        ),
        ("device=mps", "device is 'mps', but must be one of cpu, cuda; "),
        ("seed=abc", "seed is 'abc', but must be a whole number; correct it."),
        ("seed=null", "seed is None, but must be a whole number; correct it."),
        ("output_dir=5", "output_dir is 5, but must be text; put quotes around it if it looks"),
        ("checkpointer.checkpoint_dir=null", "checkpointer.checkpoint_dir is None, but must be te"),
        (
            "checkpointer._component_=torchtune.training.FullModelMetaCheckpointer",
            "but reads other files than .safetensors; use torchtune.training.FullModelHFCheckpo",
        ),
        ("checkpointer.recipe_checkpoint=x.pt", "checkpointer.recipe_checkpoint is not read; rem"),
        ("method.pruning.interval=abc", "method.pruning.interval is 'abc', but must be a whole nu"),
        ("method.pruning.interval=1.5", "method.pruning.interval is 1.5, but must be a whole numb"),
        ("method.pruning.finish_by=x", "method.pruning.finish_by is 'x', but must be a number ab"),
        ("method.target_modules=5", "method.target_modules is 5, but must be names or patterns "),
        ("method.init_rank=3.5", "method.init_rank is 3.5, but must be a whole number at least"),
        ("method.init_rank=true", "method.init_rank is True, but must be a whole number at least"),
        ("method.exclude=q_pro", "exclude: 'q_pro' matches no module that can be adapted; did"),
        ("model.attn_dropout=2", "model: torchtune.models.llama3.llama3 cannot be built: "),
        ("device=cuda", "device is 'cuda', but this machine has no usable GPU; set device=cpu."),
        ("dataset.path=none.jsonl", "none.jsonl"),
        ("resume_from_checkpoint", "'resume_from_checkpoint' is not understood; overrides are "),
        ("~dataset.pth", "~dataset.pth: there is no such key to remove; did you mean 'path'?"),
        ("dataset=null", "configuration: the key 'dataset' is missing; add it to the file."),
        ("~optimizer", "configuration: the key 'optimizer' is missing; add it to the file."),
        ("dataset_val.path=x.jsonl", "configuration: dataset_val names no component; write "),
        ("optimizer.lrr=1", "unexpected keyword argument 'lrr'; did you mean 'lr'?"),
        ("lr_scheduler.num_warmup_step=1", "'num_warmup_step'; did you mean 'num_warmup_steps'?"),
        (
            "tokenizer.max_seq=9",
            "unexpected keyword argument 'max_seq'; did you mean 'max_seq_len'",
        ),
        ("model.num_head=4", "unexpected keyword argument 'num_head'; did you mean 'num_heads'?"),
        ("checkpointer.checkpoint_dr=x", "checkpointer has no key 'checkpoint_dr'; did you mean "),
        ("dataset.pth=x", "dataset has no key 'pth'; did you mean 'path'?"),
        ("validation_fraction=0.9", "validation_fraction is 0.9, but must be a number above 0 and"),
        ("quantize_base=1", "quantize_base is 1, but must be True or False"),
        ("log_every_n_steps=0", "log_every_n_steps is 0, but must be a whole number at least 1; "),
        ("diagnose_every_n_steps=x", "diagnose_every_n_steps is 'x', but must be a whole number"),
        ("metric_logger=Tensorboard", "metric_logger: Tensorboard cannot be built: "),
        ("data=gsm9k", "data=gsm9k is neither a file nor a data set"),
        ("dataset.path=[", "'dataset.path=[': the value is not YAML; put quotes around it."),
        ("exact_match={path: x, max_new_tokens: 0}", "exact_match.max_new_tokens is 0, but must"),
        ("~checkpointer.checkpoint_dir", "checkpointer.checkpoint_dir is missing; "),
        ("exact_match={path: null}", "exact_match.path is missing; "),
        ("exact_match.file=x", "exact_match has no key 'file'; "),
        ("model.vocab_size=200", "model.vocab_size is 200, but "),
        ("method.init_rank=[4]", "method.init_rank is [4], but must be a whole number at least 1"),
        ("method.name=[lora]", "method.name is ['lora'], but must be one of lora, "),
        ("~method.name", "configuration: method.name is missing; choose one of lora, "),
        ("method.budget=0.01", "method.budget is 0.01, but leaves none of the 56 ranks; raise it."),
        ("method.exclude=all-linear", "exclude: 'all-linear' matches no module that can be ad"),
        ("method.hypernetwork.preset=0", "method.hypernetwork.preset is 0, but must be one of "),
        ("method.hypernetwork.sizes=null", "sizes is None, but must be a section of keys."),
        ("model.max_seq_len=-1", "model.max_seq_len is -1, but must be a whole number at least 1"),
        ("tokenizer.max_seq_len=0", "tokenizer.max_seq_len is 0, but must be a whole number at le"),
        ("tokenizer.path=[a]", "tokenizer.path is ['a'], but must be text; "),
        ("base_model=5", "base_model is 5, but must be text; "),
        ("exact_match=[]", "exact_match is [], but must be a section of keys, such as path."),
        ("exact_match={path: 5}", "exact_match.path is 5, but must be text; "),
        ("output_dir=???", "configuration: output_dir is ???, which means missing; give a value."),
        ("checkpointer.resume_from_checkpoint=True", "checkpointer.resume_from_checkpoint is not "),
        ("checkpointer.checkpoint_files={a: 1}", "checkpointer.checkpoint_files: Must pass 'filen"),
        ("optimizer.capturable=True", "optimizer: torch.optim.Adam cannot take a step: If captura"),
        ("lr_scheduler.num_warmup_steps=-1", "num_warmup_steps is -1, but must be a whole number "),
        ("lr_scheduler.num_training_steps=9", "num_training_steps is the length of the run; leave"),
        ("lr_scheduler=torch.optim.lr_scheduler.StepLR", "StepLR takes no num_training_steps; na"),
        ("metric_logger=os.getcwd", "metric_logger: os.getcwd makes no logger; name one, such as"),
        ("method.hypernetwork.preset=big", "method.hypernetwork.preset is 'big', but must be one"),
    ],
)
def test_a_wrong_value_is_named_with_its_rule(fails: Failing, override: str, message: str) -> None:
    assert message in fails(override)


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("model.attn_dropout=low", "model.attn_dropout is 'low', but must be a number"),
        ("model.num_layers=2.0", "model.num_layers is 2.0, but must be a whole number"),
        ("model.rope_base=true", "model.rope_base is True, but must be a whole number"),
        ("optimizer.lr=null", "optimizer.lr is None, but must be a number"),
        ("optimizer.lr=fast", "optimizer.lr is 'fast', but must be a number"),
        ("optimizer.eps=1e-8x", "optimizer.eps is '1e-8x', but must be a number"),
        ("optimizer.weight_decay=x", "optimizer.weight_decay is 'x', but must be a number"),
        ("optimizer.betas=0.9", "optimizer.betas is 0.9, but must be [a number, a number]"),
        ("optimizer.betas=[0.9]", "optimizer.betas is [0.9], but must be [a number, a number]"),
        (
            "optimizer.betas=[0.9,x]",
            "optimizer.betas is [0.9, 'x'], but must be [a number, a number]",
        ),
        (
            "optimizer.betas=[0.9,0.99,0.999]",
            "optimizer.betas is [0.9, 0.99, 0.999], but must be [a number, a number]",
        ),
        ("optimizer.amsgrad=1", "optimizer.amsgrad is 1, but must be True or False"),
        ("optimizer.fused=maybe", "optimizer.fused is 'maybe', but must be True or False or null"),
        ("lr_scheduler.num_cycles=x", "lr_scheduler.num_cycles is 'x', but must be a number"),
        ("dataset.train_on_input=5", "dataset.train_on_input is 5, but must be True or False"),
        ("dataset.path=null", "dataset.path is None, but must be text"),
    ],
)
def test_a_value_of_another_kind_than_the_component_takes_is_refused(
    fails: Failing, override: str, expected: str
) -> None:
    assert fails(override) == f"{expected}; correct it."


@pytest.mark.parametrize(
    ("optimizer", "expected"),
    [
        ({"lr": -1}, "lr is -1, but must be a number at least 0"),
        ({"lr": float("inf")}, "lr is inf, but must be a number at least 0"),
        ({"eps": -1e-8}, "eps is -1e-08, but must be a number at least 0"),
        ({"weight_decay": -0.1}, "weight_decay is -0.1, but must be a number at least 0"),
        ({"betas": [0.9, 1]}, "betas[1] is 1, but must be a number at least 0 and below 1"),
        ({"betas": [-0.1, 0.9]}, "betas[0] is -0.1, but must be a number at least 0 and below 1"),
        (
            {"_component_": "torch.optim.SGD", "momentum": -1},
            "momentum is -1, but must be a number at least 0",
        ),
        (
            {"_component_": "torch.optim.Adafactor", "eps": [None, -1]},
            "eps[1] is -1, but must be a number at least 0",
        ),
        (
            {"_component_": "torch.optim.Adafactor", "eps": [1, None]},
            "eps is [1, None], but must be [a number or null, a number]",
        ),
        ({"_component_": "torch.optim.Unannotated", "lr": "x"}, "lr is 'x', but must be a number"),
        (
            {"_component_": "torch.optim.Unannotated", "betas": [0, "x"]},
            "betas[1] is 'x', but must be a number at least 0 and below 1",
        ),
    ],
)
def test_a_value_that_no_optimizer_has_is_named_before_the_model_is_built(
    fails: Failing, monkeypatch: pytest.MonkeyPatch, optimizer: dict[str, Any], expected: str
) -> None:
    monkeypatch.setattr(torch.optim, "Unannotated", Unannotated, raising=False)
    monkeypatch.setattr(recipe, "build_on_meta", pytest.fail)
    message = fails(optimizer={"_component_": "torch.optim.Adam", **optimizer})
    assert message.startswith(f"optimizer.{expected}")
    assert message.endswith("; correct it.")


class Unannotated(torch.optim.SGD):
    """Says of no argument what it takes."""

    def __init__(self, params, lr=0.1, betas=(0, 0)):  # type: ignore[no-untyped-def]
        del betas
        super().__init__(params, lr=lr)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model=os.getcwd", "model: os.getcwd makes no decoder of torchtune's; name one, such as "),
        ("model=torch.nn.ReLU", "model: torch.nn.ReLU makes no decoder of torchtune's; name one, "),
        ("optimizer=builtins.list", "optimizer: builtins.list makes no optimizer; name torch.opti"),
        (
            "optimizer=torch.optim.LBFGS",
            "optimizer: torch.optim.LBFGS cannot take a step: its step() needs 'closure', which a "
            "run does not give; name torch.optim.Adam, or another.",
        ),
        ("dataset=builtins.id", "dataset: builtins.id makes no data set of a known size; name one"),
    ],
)
def test_a_component_that_makes_something_else_is_refused(
    fails: Failing, override: str, message: str
) -> None:
    section, component = override.split("=")
    assert message in fails(**{section: {"_component_": component}})


class TensorRate(torch.optim.SGD):
    """Keeps its learning rate as torchao's optimizers do."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, lr=torch.tensor(0.1))


def test_an_optimizer_whose_rate_is_a_tensor_is_refused(
    fails: Failing, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.optim, "TensorRate", TensorRate, raising=False)
    message = fails(optimizer={"_component_": "torch.optim.TensorRate"})
    assert message.startswith("optimizer: torch.optim.TensorRate keeps its learning rate as a tens")


def test_the_trial_of_an_optimizer_leaves_the_run_as_it_was(
    make_config: Callable[..., Path], run: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    # The same run without the trial.
    states = []
    for attempt in (optimization.try_optimizer, lambda *_: None):
        monkeypatch.setattr(recipe, "try_optimizer", attempt)
        config = make_config()
        folder = config.parent / f"run{len(states)}"
        run(config, f"output_dir={folder}")
        states.append(load_file(folder / "checkpoints/step-00000012/state.safetensors"))
    with_trial, without = states
    assert with_trial.keys() == without.keys()
    assert all(torch.equal(with_trial[name], without[name]) for name in without)


def test_a_plan_refuses_the_optimizer_that_a_run_would(make_config: Callable[..., Path]) -> None:
    component = {"_component_": "torch.optim.LBFGS"}
    settings = RecipeSettings.from_config(OmegaConf.load(make_config(optimizer=component)))
    with pytest.raises(UserError, match=r"^optimizer: torch\.optim\.LBFGS cannot take a step: "):
        rehearse(settings, 8)


@pytest.mark.parametrize("name", ["mps", "tpu", "", "cuda:x"])
def test_a_device_of_another_kind_is_refused(name: str) -> None:
    with pytest.raises(UserError, match=f"^device is '{name}'; expected cpu or cuda\\.$"):
        usable_device(name)
