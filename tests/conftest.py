"""Every test starts from the same random numbers, regardless of what ran before it."""

import functools

import pytest
import torch

LONG_FILES = (
    "test_simulated.py",
    "test_interpreter.py",
    "test_calibrate.py",
    "test_random.py",
    "test_robustness.py",
    "test_checkout.py",
    "test_packaging.py",
)
"""Files of few tests that take long: they start first, so that one worker is not left with them at the end."""


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: item.path.name not in LONG_FILES)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    torch.manual_seed(0)


@pytest.fixture(scope="session", autouse=True)
def torchlib_read_once():
    """`torch.onnx.export` reads the same two thousand translations for every file, half of a small export's time."""
    try:
        from onnxscript._framework_apis import torch_2_5
    except ImportError:  # other releases have them elsewhere
        yield
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch_2_5, "get_torchlib_ops", functools.cache(torch_2_5.get_torchlib_ops))
        yield
