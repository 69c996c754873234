"""The devices on which a test's ops run: every device of the fixture `device`."""

import device_ops
import pytest


@pytest.fixture
def ops_on_device(device, monkeypatch):
    """Let `ops` and `public` of device_ops.py compute on the device; all else stays on the CPU."""
    monkeypatch.setattr(device_ops.ops, "device", device)
    monkeypatch.setattr(device_ops.public, "device", device)


@pytest.fixture
def default_device(device):
    """Create tensors on the device, also in op_samples.py."""
    with device:
        yield device
