"""How far a kernel's product may be from the exact one, in one place for all of them.

Operands are exact bf16 numbers or rounded to bf16 once, products are summed in fp32, and the result is rounded to bf16: each
rounding is a relative error of 2^-9 at most, 1.2e-3 as the root of the mean square. Three of them give 2e-3; a wrong bit of a
code, a swapped register or a lost group gives 1e-2 and more.
"""

from torch import Tensor

TOLERANCE = 4e-3


def error(found: Tensor, expected: Tensor) -> float:
    """Relative error in the Frobenius norm, nan if anything is not a number."""
    return ((found.double() - expected.double()).norm() / expected.double().norm()).item()
