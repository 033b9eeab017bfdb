"""A plug-in of pytest: the certificates of ``nearfar.verify`` as fixtures, for tests of any losses and loaders.

It is loaded wherever nearfar is installed and imports nothing of it until a test asks for a fixture.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from torch import Tensor

    from nearfar.verify import Loader, LossVerdict, ResumeVerdict

__all__ = ["verify_loss", "verify_resume"]


@pytest.fixture(scope="session")
def verify_loss() -> Callable[..., LossVerdict]:
    """``nearfar.verify.loss``, which fails the test where the gradient on several processes is not that of one.

    Called as ``verify_loss(fn, ranks=2, labels=False, timeout=120.0)``; ``fn`` is a function or object of a module that
    other processes can import, such as your package's own. Returns the verdict.
    """

    def certify(
        fn: Callable[..., Tensor], ranks: int = 2, *, labels: bool = False, timeout: float = 120.0
    ) -> LossVerdict:
        __tracebackhide__ = True
        from nearfar import verify

        verdict = verify.loss(fn, ranks, labels=labels, timeout=timeout)
        if not verdict.passed:
            pytest.fail(f"on {ranks} processes the gradient is not that of one: {verdict}")
        return verdict

    return certify


@pytest.fixture(scope="session")
def verify_resume() -> Callable[..., ResumeVerdict]:
    """``nearfar.verify.resume``, which fails the test where a loader repeats or skips data after a resume.

    Called as ``verify_resume(make_loader, epochs=2, stops=None)``. Returns the verdict.
    """

    def certify(
        make_loader: Callable[[], Loader],
        *,
        epochs: int = 2,
        stops: Sequence[int] | None = None,
        most: int = 10_000,
    ) -> ResumeVerdict:
        __tracebackhide__ = True
        from nearfar import verify

        verdict = verify.resume(make_loader, epochs=epochs, stops=stops, most=most)
        if not verdict.passed:
            pytest.fail(f"a resumed loader does not go on where it stopped: {verdict}")
        return verdict

    return certify
