"""leanserve.supervisor.orders: what cannot be obeyed is said.

What the orders do is in tests/admin/test_process.py and in test_roll.py.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from leanserve.settings import Settings
from leanserve.supervisor.orders import Orders
from leanserve.supervisor.supervisor import Supervisor


@pytest.fixture
def orders() -> Iterator[Orders]:
    """Of a supervisor that has not started a worker yet."""
    supervisor = Supervisor("obey", Settings.build(port=0, control_socket=None), entry="stand_ins:main")
    yield Orders(supervisor)
    supervisor._close(then_exit=False)


@pytest.mark.parametrize("order", ["reload", "workers", "abort"])
def test_not_before_it_serves(orders: Orders, order: str) -> None:
    with pytest.raises(ValueError, match="no worker has been ready yet"):
        orders.obey(order, 2)


def test_what_is_no_order(orders: Orders) -> None:
    with pytest.raises(ValueError, match="there is no order 'dance'"):
        orders.obey("dance", 0)


def test_nobody_to_dump(orders: Orders) -> None:
    with pytest.raises(ValueError, match="no worker 7 that could"):
        orders.obey("dump", 7)
