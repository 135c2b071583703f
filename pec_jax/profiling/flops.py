"""Floating-point operations of a function, counted from its jaxpr.

Matrix products and convolutions only, two operations a multiply-add, loops times their length:
what is quoted as the FLOPs of a transformer. What the backward pass computes again (remat) is
counted, for it is computed.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
from jax.extend import core


def count(function: Callable, *arguments: Any) -> int:
    """FLOPs of `function(*arguments)`, over all devices together.

    Args:
      function: traceable.
      *arguments: arrays or `jax.ShapeDtypeStruct`.
    """
    return of_jaxpr(jax.make_jaxpr(function)(*arguments).jaxpr)


def of_jaxpr(jaxpr: core.Jaxpr) -> int:
    """FLOPs of a jaxpr; of a branch, those of its longest; of a while loop, those of one turn."""
    return sum(_of_equation(equation) for equation in jaxpr.eqns)


def _of_equation(equation: core.JaxprEqn) -> int:
    name, params = equation.primitive.name, equation.params
    if name == "dot_general":
        return _of_dot(equation)
    if name == "conv_general_dilated":
        return _of_convolution(equation)
    if name == "cond":
        return max(of_jaxpr(branch.jaxpr) for branch in params["branches"])
    inner = sum(of_jaxpr(jaxpr) for value in params.values() for jaxpr in _jaxprs(value))
    return inner * (params["length"] if name == "scan" else 1)


def _shape(variable: core.Var | core.Literal) -> tuple[int, ...]:
    aval: Any = variable.aval  # an array, by the primitives that are counted
    return aval.shape


def _of_dot(equation: core.JaxprEqn) -> int:
    (contracted, _), _ = equation.params["dimension_numbers"]
    left = _shape(equation.invars[0])
    depth = math.prod(left[axis] for axis in contracted)
    return 2 * math.prod(_shape(equation.outvars[0])) * depth


def _of_convolution(equation: core.JaxprEqn) -> int:
    kernel = _shape(equation.invars[1])
    features = kernel[equation.params["dimension_numbers"].rhs_spec[0]]
    return 2 * math.prod(_shape(equation.outvars[0])) * math.prod(kernel) // features


def _jaxprs(value: Any) -> list[core.Jaxpr]:
    """The jaxprs in a parameter of an equation: of a call, a remat, a derivative, a scan."""
    if isinstance(value, core.ClosedJaxpr):
        return [value.jaxpr]
    if isinstance(value, core.Jaxpr):
        return [value]
    if isinstance(value, tuple | list):
        return [jaxpr for item in value for jaxpr in _jaxprs(item)]
    return []
