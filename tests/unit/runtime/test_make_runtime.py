from __future__ import annotations

import pytest

from sslscale.errors import UserError
from sslscale.runtime.base import make_runtime


def test_a_runtime_that_there_is_not() -> None:
    with pytest.raises(UserError, match=r"no runtime 'rya'; did you mean 'ray'.*\n.*local, ray"):
        make_runtime("rya")
