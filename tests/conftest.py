"""Every test starts from the same random numbers, regardless of what ran before it."""

import functools

import pytest
import torch


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
