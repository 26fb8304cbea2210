"""What requests cost, and the limits on it."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from maxlm.errors import RequestError


@dataclass
class Charge:
    """The cost of a request: at worst until it is known."""

    cost: float


class Ledger:
    """Counts requests and their cost, and stops before a limit is passed; thread-safe.

    Args:
      cost, requests: spent earlier, which the limits include.
      max_cost, max_requests: limits; None sets none.
    """

    def __init__(
        self,
        *,
        cost: float = 0.0,
        requests: int = 0,
        max_cost: float | None = None,
        max_requests: int | None = None,
    ):
        self.cost, self.requests = cost, requests
        self._max_cost, self._max_requests = max_cost, max_requests
        self._in_flight: list[Charge] = []
        self._settled = threading.Condition()

    @contextmanager
    def request(self, worst_cost: float = 0.0) -> Iterator[Charge]:
        """One request, which is charged with what its block sets, or with `worst_cost`.

        It begins only if the limit holds even at its worst, once those in flight that may turn out cheaper are done.

        Raises:
          RequestError: a limit is reached.
        """
        charge = Charge(worst_cost)
        with self._settled:
            while self._in_flight and self._is_too_much(worst_cost):
                self._settled.wait()
            if self._is_too_much(worst_cost):
                raise RequestError(
                    f"the cost is {self.cost:.6g}, and one more request may cost {worst_cost:.6g}: that is above"
                    f" limits.max_cost={self._max_cost:g}"
                )
            if self._max_requests is not None and self.requests >= self._max_requests:
                raise RequestError(f"{self.requests} requests were sent, and limits.max_requests={self._max_requests}")
            self.requests += 1
            self._in_flight.append(charge)
        try:
            yield charge
        finally:
            with self._settled:
                self._in_flight.remove(charge)
                self.cost += charge.cost
                self._settled.notify_all()

    def _is_too_much(self, more: float) -> bool:
        reserved = sum(charge.cost for charge in self._in_flight)
        return self._max_cost is not None and self.cost + reserved + more > self._max_cost
