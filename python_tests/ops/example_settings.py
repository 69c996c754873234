"""How hypothesis chooses examples for the ops: always the same ones, on one device a test."""

from hypothesis import HealthCheck, settings


def examples(count):
    """The settings of a test with so many examples."""
    return settings(
        max_examples=count,
        deadline=None,
        derandomize=True,
        # The device is the same for all examples of a test.
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
    )
