"""The devices on which a test's ops run: every device of the fixture `device`.

Ops on CUDA do not look at values. One that is given an index outside of its table would read
outside of it, and after such an error every later test of the process fails. So the tests of wrong
arguments that may run on CUDA are listed here: in these, shapes, dtypes or numbers are wrong.
"""

import device_ops
import pytest

WRONG_ON_CUDA = {
    "test_arguments_of_the_table_are_right",
    "test_wrong_argument_is_named",
    "test_every_tensor_of_one_axis_too_many_is_named",
    "test_factored_gradient_of_a_computed_matrix_is_refused",
    "test_wrapper_passes_the_message_on",
    "test_copy_of_another_encoder_is_refused",
}


@pytest.hookimpl(tryfirst=True)  # before cases on CUDA are dropped
def pytest_collection_modifyitems(items):
    """Refuse tests of wrong arguments that would run on CUDA and are not listed."""
    for item in items:
        is_of_errors = item.path.name == "test_errors.py"
        runs_on_cuda = item.get_closest_marker("cuda") is not None
        if is_of_errors and runs_on_cuda and item.originalname not in WRONG_ON_CUDA:
            raise pytest.UsageError(
                f"{item.nodeid} would run on CUDA, where values are not checked: give it the "
                "device cpu, or list it in python_tests/ops/conftest.py"
            )


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
