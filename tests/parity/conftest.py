"""Golden cases: results of the published code, found by file name prefix in `--golden-dir`."""

from __future__ import annotations

import pytest


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Parametrise a test marked `golden(prefix, ...)` on `case`, over the cases it names; with
    `kind="function"` over those that record one part of a model."""
    marker = metafunc.definition.get_closest_marker("golden")
    if marker is None:
        return
    # Not at the top: the options must decide first where kernels run.
    from parity.golden import find_cases

    folder = metafunc.config.getoption("--golden-dir")
    cases = find_cases(folder, marker.args, **marker.kwargs)
    if not cases:
        reason = f"no {' or '.join(marker.args)} cases in {folder}"
        cases = [pytest.param(None, marks=pytest.mark.skip(reason=reason))]
    metafunc.parametrize(
        "case",
        cases,
        ids=lambda case: getattr(case, "name", None),
        scope="module",  # one case after the other
    )


@pytest.fixture
def impl(request: pytest.FixtureRequest) -> str:
    """Implementation asked for on the command line."""
    return request.config.getoption("--impl")
