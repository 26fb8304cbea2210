"""Arithmetic that is exact for rational numbers, and complex floating point otherwise."""

from collections.abc import Callable
from fractions import Fraction

Value = Fraction | complex

# Numbers of more bits would take unbounded time and memory.
_MAX_BITS = 4096


class Unreadable(ValueError):  # noqa: N818 - a result, handled by every caller
    """The text is not one of the terms that are read, or has no finite value."""


def both(operation: Callable, left: Value, right: Value) -> Value:
    """The operation, exact if both are rational."""
    if isinstance(left, Fraction) and isinstance(right, Fraction):
        return operation(left, right)
    return operation(complex(left), complex(right))


def small(value: Value) -> Value:
    """The value, unless it is a rational number of too many digits."""
    if isinstance(value, Fraction) and max(value.numerator.bit_length(), value.denominator.bit_length()) > _MAX_BITS:
        raise Unreadable("it has too many digits")
    return value


def exact_power(base: Value, exponent: Value) -> Value:
    """base ** exponent, exact if it is rational and small."""
    if isinstance(base, Fraction) and isinstance(exponent, Fraction):
        if exponent.denominator == 1:
            bits = max(base.numerator.bit_length(), base.denominator.bit_length()) * abs(exponent)
            if bits > _MAX_BITS:
                raise Unreadable("it has too many digits")
            return base ** int(exponent)
        if base > 0:
            return exact_root(exact_power(base, Fraction(exponent.numerator)), Fraction(exponent.denominator))
    return complex(base) ** complex(exponent)


def exact_root(value: Value, index: Value) -> Value:
    """The principal root: exact if it is rational; of negative numbers real for odd indices."""
    if isinstance(value, Fraction) and isinstance(index, Fraction) and index.denominator == 1 and index > 0:
        if value < 0 and index % 2:
            return -exact_root(-value, index)
        if value >= 0:
            exact = [round(part ** (1 / int(index))) for part in (value.numerator, value.denominator)]
            root = Fraction(*exact) if exact[1] else None
            if root is not None and root ** int(index) == value:
                return root
    return complex(value) ** (1 / complex(index))
