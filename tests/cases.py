"""How many random cases a property-based test tries: few in CI, `LOOPQ_CASES` of them in `make nightly`."""

import os

from hypothesis import HealthCheck, settings


def cases(usual: int) -> settings:
    """Settings of a test that tries `usual` cases, always the same ones, unless the environment asks for more, new
    ones."""
    wanted = int(os.environ.get("LOOPQ_CASES", 0))
    return settings(
        max_examples=wanted or usual,
        deadline=None,
        derandomize=not wanted,
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    )
