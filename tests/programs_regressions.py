"""Random programs that once went wrong, as hypothesis printed them."""

from tests.programs import Batch, Program

REGRESSIONS = (
    # All of a skeleton's launches are shared, at sizes of one and primes.
    Batch(
        programs=(
            Program(
                (3, 5), "float32", (("dense", 1, 0, 7, 1), ("softmax", 0, 1, 1, 1))
            ),
            Program(
                (7, 1), "float32", (("dense", 1, 0, 2, 1), ("softmax", 0, 1, 1, 1))
            ),
        ),
        members=(0, 1, 1),
        rows=(2, 1, 3),
    ),
)
