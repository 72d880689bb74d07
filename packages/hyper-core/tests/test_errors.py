"""Errors are for people: the exact text of each."""

import pytest
import torch
from torch import nn

from hyper_core import (
    AttentionConfig,
    ConvConfig,
    GeneratedParameters,
    HyperError,
    MLPConfig,
    name_features,
)

CONFIG = AttentionConfig(hidden=4, heads=2, feed_forward=4)


def leaf(*shape):
    return nn.Parameter(torch.ones(*(shape or (3, 4))))


def text_of(call, *args, **options):
    with pytest.raises(HyperError) as caught:
        call(*args, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def text_of_making(leaves, **options):
    return text_of(GeneratedParameters, leaves, **{"config": CONFIG, **options})


def test_hyper_error_is_a_value_error():
    assert issubclass(HyperError, ValueError)


def test_no_role():
    assert text_of_making({}) == (
        "leaves has no role, expected at least one; give for example {'weight': [tensor]}."
    )


def test_role_without_tensors():
    assert text_of_making({"p": [leaf()], "q": []}) == (
        "the role 'q' has 0 tensors, expected at least one; give it some or drop it."
    )


@pytest.mark.parametrize("role", ["layers.0", "", "values", "training", 5])
def test_role_that_cannot_name_a_module(role):
    assert text_of_making({role: [leaf()]}) == (
        f"the role {role!r} cannot name a module, expected letters, digits and '_' that are not an "
        "attribute of nn.ModuleDict; rename it."
    )


@pytest.mark.parametrize(
    ("tensor", "found"),
    [
        (torch.ones(4), "torch.float32 of the shape (4,)"),
        (torch.ones(2, 0, 3), "torch.float32 of the shape (2, 0, 3)"),
        (torch.ones(2, 3).long(), "torch.int64 of the shape (2, 3)"),
        (torch.ones(1, 1, 2, 3), "torch.float32 of the shape (1, 1, 2, 3)"),
        (
            torch.ones(2, 3).to(torch.float8_e4m3fn),
            "torch.float8_e4m3fn of the shape (2, 3)",
        ),
    ],
)
def test_wrong_tensor(tensor, found):
    assert text_of_making({"p": [leaf(), tensor]}) == (
        f"p[1] is {found}, expected float16, bfloat16, float32 or float64 of the shape "
        "(matrices, rows, columns) or (rows, columns), none of them 0; reshape or convert it."
    )


def test_result_of_an_operation():
    assert text_of_making({"p": [leaf().T]}) == (
        "p[0] is a result of PermuteBackward0, expected a tensor that autograd accumulates .grad "
        "into; give the parameter itself, or a view of it made under torch.no_grad() whose .grad "
        "you set."
    )


def test_the_same_tensor_twice():
    weight = leaf()
    assert text_of_making({"p": [leaf(), weight], "q": [weight]}) == (
        "q[0] is the same tensor as p[1], expected each once; drop one."
    )


@pytest.mark.parametrize("config", ["attention-big", 5, None, AttentionConfig])
def test_unknown_config(config):
    assert text_of_making({"p": [leaf()]}, config=config) == (
        f"config is {config!r}, expected a body's configuration or one of attention-tinybert, "
        "attention-small, attention-tiny, conv-resnet18, conv-small, mlp-15, mlp-small; correct it."
    )


@pytest.mark.parametrize("option", ["tokens", "outputs", "norms", "zero_start", "sharing"])
def test_option_for_an_unknown_role(option):
    assert text_of_making({"p": [leaf()], "q": [leaf()]}, **{option: {"lam": "free"}}) == (
        f"{option} names the role 'lam', expected one of p, q; correct or drop it."
    )


@pytest.mark.parametrize(
    ("options", "what", "choices"),
    [
        ({"state": "fixed"}, "state is 'fixed'", "recurrent, static, damped"),
        (
            {"gradient_normalisation": "rms"},
            "gradient_normalisation is 'rms'",
            "none, token_rms",
        ),
        ({"tokens": {"p": "row"}}, "tokens['p'] is 'row'", "rows, columns, elements, scalars"),
        (
            {"outputs": {"p": "unit"}},
            "outputs['p'] is 'unit'",
            "free, unit_rows, unit_columns, orthonormal",
        ),
    ],
)
def test_unknown_choice(options, what, choices):
    assert text_of_making({"p": [leaf()]}, **options) == (
        f"{what}, expected one of {choices}; choose one."
    )


def test_zero_start_with_unit_rows():
    options = {"outputs": {"p": "unit_rows"}, "zero_start": {"p"}}
    assert text_of_making({"p": [leaf()]}, **options) == (
        "outputs['p'] is 'unit_rows' and zero_start names 'p', but zero has no direction; make "
        "the output 'free' or drop it from zero_start."
    )


@pytest.mark.parametrize("norm", [0, -1.0, float("inf"), float("nan"), "2", True, None, [2.0]])
def test_norm_that_is_not_positive(norm):
    assert text_of_making({"p": [leaf()]}, norms={"p": norm}) == (
        f"norms['p'] is {norm!r}, expected a positive number; the default is 1."
    )


@pytest.mark.parametrize("relaxation", [0, 1.5, "half"])
def test_relaxation_out_of_range(relaxation):
    assert text_of_making({"p": [leaf()]}, state="damped", relaxation=relaxation) == (
        f"relaxation is {relaxation!r}, expected above 0 and at most 1; 1 is the recurrent state."
    )


@pytest.mark.parametrize("sharing", ["every", 5, None, torch.zeros(1)])
def test_unknown_sharing(sharing):
    assert text_of_making({"p": [leaf()]}, sharing=sharing) == (
        f"sharing of 'p' is {sharing!r}, expected 'all', 'each' or a label per matrix; choose one."
    )


def test_labels_that_are_not_one_per_matrix():
    assert text_of_making({"p": [leaf(2, 3, 4)]}, sharing={"p": ["x"]}) == (
        "sharing of 'p' has 1 labels, expected one for each of 2 matrices; give equal labels to "
        "those that share a network."
    )


@pytest.mark.parametrize("label", [[1], torch.tensor(1)])
def test_labels_that_cannot_be_compared(label):
    assert text_of_making({"p": [leaf(2, 3, 4)]}, sharing=[label, label]) == (
        f"sharing of 'p' has the label {label!r}, expected words or numbers; give equal labels to "
        "those that share a network."
    )


@pytest.mark.parametrize("leaves", [[leaf()], leaf(), None])
def test_leaves_that_are_no_mapping(leaves):
    assert text_of_making(leaves) == (
        f"leaves is of type {type(leaves).__name__}, expected a mapping from roles to lists of "
        "tensors; give for example {'weight': [tensor]}."
    )


def test_role_that_is_no_list():
    for tensors, name in ((leaf(2, 3, 4), "Parameter"), ((leaf() for _ in "ab"), "generator")):
        assert text_of_making({"p": tensors}) == (
            f"the role 'p' is of type {name}, expected a list of tensors; put it into a list."
        )
    assert text_of_making({"p": [leaf(), 3.0]}) == (
        "p[1] is of type float, expected a tensor of the shape (matrices, rows, columns) or (rows, "
        "columns); give the parameter itself."
    )
    GeneratedParameters({"p": nn.ParameterList([leaf(), leaf()])}, config=CONFIG).refresh()


def test_module_in_place_of_its_weight():
    assert text_of_making({"p": nn.Linear(2, 3)}) == (
        "the role 'p' is of type Linear, expected a list of tensors; put its parameter, such as "
        ".weight into a list."
    )
    assert text_of_making({"p": [leaf(), nn.Linear(2, 3)]}) == (
        "p[1] is of type Linear, expected a tensor of the shape (matrices, rows, columns) or "
        "(rows, columns); give its parameter, such as .weight."
    )


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_leaf_that_is_not_finite(value):
    broken = leaf()
    with torch.no_grad():
        broken[1, 2] = value
    assert text_of_making({"p": [leaf(), broken]}) == (
        "p[1] has values that are not finite, expected numbers to start from; initialise it "
        "before, or name its role in zero_start."
    )
    GeneratedParameters({"p": [broken]}, config=CONFIG, zero_start={"p"}).refresh()
    assert broken.isfinite().all()


@pytest.mark.parametrize("option", ["tokens", "outputs", "norms"])
def test_choice_by_role_that_is_no_mapping(option):
    assert text_of_making({"p": [leaf()]}, **{option: "rows"}) == (
        f"{option} is 'rows', expected a mapping by role; give for example {{'p': …}}."
    )


@pytest.mark.parametrize("roles", ["p", "lam", 5])
def test_zero_start_that_is_no_collection(roles):
    assert text_of_making({"p": [leaf()]}, zero_start=roles) == (
        f"zero_start is {roles!r}, expected a collection of roles; give for example {{'p'}}."
    )


@pytest.mark.parametrize("width", [-1, 2.0, "2", None])
def test_context_width_that_is_no_size(width):
    assert text_of_making({"p": [leaf()]}, context_width=width) == (
        f"role 'p': context_width is {width!r}, expected a whole number of at least 0; 0 is for no "
        "context."
    )


@pytest.mark.parametrize("dtype", ["bf16", torch.float8_e5m2, torch.int8])
def test_body_dtype_that_autocast_does_not_have(dtype):
    assert text_of_making({"p": [leaf()]}, body_dtype=dtype) == (
        f"role 'p': body_dtype is {dtype!r}, expected torch.bfloat16, torch.float16 or None; None "
        "keeps the dtype of the weights."
    )


def test_scores_and_contexts_are_refused_with_their_role():
    small = AttentionConfig(hidden=4, heads=2, feed_forward=4, max_score_bytes=100)
    text = text_of_making({"q": [leaf(1, 2)], "p": [leaf(2, 3, 4)]}, config=small)
    assert text.startswith("role 'p': attention among 3 tokens in each of 2 matrices has 144 bytes")
    leaves = {"q": [leaf()], "p": [leaf(2, 3, 4)]}
    generated = GeneratedParameters(leaves, config=CONFIG, context_width=2)
    assert text_of(generated.refresh, {"q": torch.ones(2), "p": torch.ones(3)}) == (
        "role 'p': context has the shape (2, 3), expected (2, 2) as context_width says; give a row "
        "of features for each matrix."
    )


@pytest.mark.parametrize("names", ["a.b", ["a", 5]])
def test_names_that_are_no_list_of_words(names):
    assert text_of(name_features, names) == (
        f"names is {names!r}, expected a list of words, one for each matrix; give the modules' "
        "names."
    )


@pytest.mark.parametrize("shape", [(2, 3, 4), ()])
def test_scalars_of_a_wrong_shape(shape):
    assert text_of_making({"p": [torch.ones(shape)]}, tokens={"p": "scalars"}) == (
        f"p[0] is torch.float32 of the shape {shape}, expected float16, bfloat16, float32 or "
        "float64 of the shape (matrices, numbers) or (numbers,), none of them 0; reshape or "
        "convert it."
    )


def test_context_without_the_role_and_of_a_wrong_number_of_rows():
    generated = GeneratedParameters(
        {"p": [leaf(2, 3, 4)], "q": [leaf()]}, config=CONFIG, context_width=2
    )
    assert text_of(generated.refresh, {"p": torch.ones(2)}) == (
        "context has the roles p, expected 'q' among them; give features for every role."
    )
    assert text_of(generated.refresh, torch.ones(3, 2)) == (
        "context for 'p' has the shape (3, 2), expected (features,) or (2, features); give a row "
        "of features for each matrix."
    )


@pytest.mark.parametrize(
    ("what", "known"),
    [("parts", "input_projection, body, output_projection, embeddings"), ("roles", "p")],
)
def test_learning_rate_for_an_unknown_part_or_role(what, known):
    generated = GeneratedParameters({"p": [leaf()]}, config=CONFIG)
    assert text_of(generated.parameter_groups, 1e-3, **{what: {"head": 2.0}}) == (
        f"{what} names 'head', expected one of {known}; correct or drop it."
    )


@pytest.mark.parametrize("rate", [float("nan"), float("inf"), -1e-3, "1e-3", None])
def test_learning_rate_that_is_none(rate):
    generated = GeneratedParameters({"p": [leaf()]}, config=CONFIG)
    assert text_of(generated.parameter_groups, rate) == (
        f"lr is {rate!r}, expected a finite number of at least 0; correct it."
    )
    assert text_of(generated.parameter_groups, 1e-3, parts={"body": rate}) == (
        f"parts['body'] is {rate!r}, expected a finite number of at least 0; correct it."
    )


@pytest.mark.parametrize("decay", [-0.1, 1, "0.9", None])
def test_decay_out_of_range(decay):
    assert text_of_making({"p": [leaf()]}, gradient_decay=decay) == (
        f"gradient_decay is {decay!r}, expected 0 or more and below 1; 0.99 averages about the "
        "last 100 steps."
    )


@pytest.mark.parametrize(
    ("name", "default"), [("hidden", 312), ("heads", 12), ("feed_forward", 1200), ("layers", 1)]
)
@pytest.mark.parametrize("value", [0, 2.5])
def test_size_that_is_no_positive_whole_number(name, default, value):
    assert text_of(AttentionConfig, **{name: value}) == (
        f"AttentionConfig.{name} is {value}, expected a whole number of at least 1; the default "
        f"is {default}."
    )


def test_hidden_not_divisible_by_heads():
    assert text_of(AttentionConfig, hidden=100, heads=12) == (
        "AttentionConfig.hidden is 100, expected a multiple of heads, 12; make it 108."
    )


def test_unknown_norm_of_attention():
    assert text_of(AttentionConfig, norm="both") == (
        "AttentionConfig.norm is 'both', expected one of post, pre; choose one."
    )


def test_sizes_of_a_convolution():
    assert text_of(ConvConfig, kernel=4) == (
        "ConvConfig.kernel is 4, expected an odd number, which has a middle; make it 5."
    )
    assert text_of(ConvConfig, widths=(64, 0, 8)) == (
        "ConvConfig.widths[1] is 0, expected a whole number of at least 1; the default is (64, "
        "128, 256)."
    )
    for widths, blocks in (((4, 8), (1,)), ((), ())):
        assert text_of(ConvConfig, widths=widths, blocks=blocks) == (
            f"ConvConfig.blocks is {blocks}, expected one number for each of widths, {widths}; "
            "give the blocks of each stage."
        )


def test_sizes_of_an_mlp():
    assert text_of(MLPConfig, hidden=-1) == (
        "MLPConfig.hidden is -1, expected a whole number of at least 1; the default is 256."
    )
    assert text_of(MLPConfig, widths=(True,)) == (
        "MLPConfig.widths[0] is True, expected a whole number of at least 1; the default is 512 "
        "and eleven times 1024."
    )


@pytest.mark.parametrize("sizes", [4, "84", None])
def test_sizes_that_are_no_tuple(sizes):
    for config, default in (
        (MLPConfig, "512 and eleven times 1024"),
        (ConvConfig, "(64, 128, 256)"),
    ):
        assert text_of(config, widths=sizes) == (
            f"{config.__name__}.widths is {sizes!r}, expected a tuple of whole numbers of at least "
            f"1; the default is {default}."
        )


BACKWARD_WITHOUT_REFRESH = (
    "backward() was called without a pending refresh(), expected one refresh() before each "
    "backward(); call refresh() with gradients enabled before the model runs."
)
COMMIT_WITHOUT_REFRESH = (
    "commit() was called without a pending refresh(), expected one refresh() before each "
    "commit(); an evaluation's refresh() belongs after commit()."
)


def test_backward_and_commit_without_refresh():
    generated = GeneratedParameters({"p": [leaf()]}, config=CONFIG)
    assert text_of(generated.backward) == BACKWARD_WITHOUT_REFRESH
    assert text_of(generated.commit) == COMMIT_WITHOUT_REFRESH
    with torch.no_grad():
        generated.refresh()
    assert text_of(generated.backward) == BACKWARD_WITHOUT_REFRESH
    assert text_of(generated.commit) == COMMIT_WITHOUT_REFRESH


def test_backward_and_commit_serve_one_refresh_each():
    weight = leaf()
    generated = GeneratedParameters({"p": [weight]}, config=CONFIG)
    generated.refresh()
    weight.sum().backward()
    generated.backward()
    assert text_of(generated.backward) == BACKWARD_WITHOUT_REFRESH
    generated.commit()
    assert text_of(generated.commit) == COMMIT_WITHOUT_REFRESH


def test_commit_ends_a_refresh_that_had_no_backward():
    weight = leaf()
    generated = GeneratedParameters({"p": [weight]}, config=CONFIG)
    generated.refresh()
    weight.sum().backward()
    generated.commit()
    assert text_of(generated.backward) == BACKWARD_WITHOUT_REFRESH


def test_discard_ends_a_refresh():
    generated = GeneratedParameters({"p": [leaf()]}, config=CONFIG)
    generated.refresh()
    generated.discard()
    assert text_of(generated.backward) == BACKWARD_WITHOUT_REFRESH
    assert text_of(generated.commit) == COMMIT_WITHOUT_REFRESH


@pytest.mark.parametrize("shape", [(3, 4), (2, 3, 4)])
def test_leaf_changed_between_refresh_and_backward(shape):
    first, second = leaf(*shape), leaf(*shape)
    generated = GeneratedParameters({"p": [first, second]}, config=CONFIG)
    generated.refresh()
    (first.sum() + second.sum()).backward()
    with torch.no_grad():
        second.view(-1)[0] = 5.0
    assert text_of(generated.backward) == (
        "p[1], or memory it shares, was changed 1 time(s) between refresh() and backward(), "
        "expected none, so its gradient may be of other values; change it before refresh() or "
        "after backward()."
    )


def test_leaf_whose_memory_was_replaced_and_what_cannot_be_seen():
    first, second = leaf(), leaf()
    generated = GeneratedParameters({"p": [first, second]}, config=CONFIG)
    generated.refresh()
    (first.sum() + second.sum()).backward()
    second.data.mul_(2)
    generated.backward()  # in place through .data: neither count nor memory tells
    generated.refresh()
    second.data = second.data.clone()
    assert text_of(generated.backward) == (
        "p[1], or memory it shares, was replaced through .data between refresh() and backward(), "
        "expected none, so its gradient may be of other values; change it before refresh() or "
        "after backward()."
    )


def test_leaf_without_gradient():
    first, second = leaf(), leaf(2, 4)
    generated = GeneratedParameters({"p": [first, second]}, config=CONFIG)
    generated.refresh()
    first.sum().backward()
    expected = (
        "p[1] has no gradient, expected .grad of the shape (2, 4); run the model's backward pass "
        "after refresh(), and make sure the model reads it."
    )
    assert text_of(generated.backward) == expected
    second.sum().backward()
    generated.backward()  # a mended mistake is no obstacle
