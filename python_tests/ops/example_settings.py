"""The settings of hypothesis for the ops: fixed examples, on one device per test."""

from hypothesis import HealthCheck, settings


def examples(count):
    """Return the settings of a test with the given number of examples."""
    return settings(
        max_examples=count,
        deadline=None,
        derandomize=True,
        # All examples of a test run on one device.
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
    )
