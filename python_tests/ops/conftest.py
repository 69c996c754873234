"""Where the ops of a test run: on every device of the fixture `device`."""

import device_ops
import pytest


@pytest.fixture
def ops_on_device(device, monkeypatch):
    """`ops` and `public` of device_ops.py compute on the device; all else stays on the CPU."""
    monkeypatch.setattr(device_ops.ops, "device", device)
    monkeypatch.setattr(device_ops.public, "device", device)


@pytest.fixture
def default_device(device):
    """Tensors are made on the device, those of op_samples.py too."""
    with device:
        yield device
