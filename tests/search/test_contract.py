"""Every registered search method keeps the contract."""

from __future__ import annotations

import pytest

from planish import registry
from planish.testing.search import check_search


@pytest.mark.parametrize("name", registry.names("search"))
def test_contract(name):
    check_search(registry.get("search", name))
