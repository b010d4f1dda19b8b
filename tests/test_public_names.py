"""The names of `import tempoquant`: an added or lost name is a decision, not an accident."""

import inspect

import tempoquant

PUBLIC = {
    "QuantizedLinear", "Recipe", "TempoQuantError", "WithExperts", "__version__", "accelerate", "load_pipeline",
    "quantize", "quantize_linear", "set_activation_bits", "set_memory_mode",
}  # fmt: skip


def test_the_public_list_is_this_one():
    assert set(tempoquant.__all__) == PUBLIC
    assert len(tempoquant.__all__) == len(PUBLIC)


def test_every_public_name_is_there_and_explains_itself():
    for name in PUBLIC - {"__version__"}:
        assert inspect.getdoc(getattr(tempoquant, name)), f"{name} has no docstring"
    assert tempoquant.__version__.count(".") == 2


def test_every_error_raised_on_purpose_is_a_tempoquant_error():
    from tempoquant import errors

    for name, value in vars(errors).items():
        if isinstance(value, type):
            assert issubclass(value, tempoquant.TempoQuantError), name
            assert name in errors.__doc__, f"{name} is missing from the tree at the top of errors.py"
