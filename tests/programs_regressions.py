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
    # Loops of unlike length whose xs no launch shares: all must be as long as one.
    Batch(
        programs=(
            Program(
                (2, 3),
                "float32",
                (
                    ("conv", 19, 18, 5, 3),
                    ("reshape", 17, 17, 2, 5),
                    ("reduction", 0, 31, 1, 3),
                    ("rnn", 1, 25, 1, 1),
                    ("rnn", 1, 25, 5, 3),
                ),
            ),
            Program(
                (5, 5),
                "float32",
                (
                    ("conv", 19, 18, 5, 1),
                    ("reshape", 17, 17, 1, 1),
                    ("reduction", 0, 31, 3, 5),
                    ("rnn", 1, 25, 7, 7),
                    ("rnn", 1, 25, 2, 7),
                ),
            ),
            Program(
                (3, 7),
                "float32",
                (
                    ("conv", 19, 18, 3, 7),
                    ("reshape", 17, 17, 3, 1),
                    ("reduction", 0, 31, 5, 1),
                    ("rnn", 1, 25, 1, 1),
                    ("rnn", 1, 25, 1, 3),
                ),
            ),
        ),
        members=(0, 1, 2),
        max_waste=0.5,
    ),
    # What two jobs share by chance ends to be shared when one of them is NaN.
    Batch(
        programs=tuple(
            Program(
                shape,
                "float32",
                (("norm", 1, 31, *a), ("norm", 20, 5, *b)),
            )
            for shape, a, b in (
                ((2, 7, 2), (3, 2), (5, 5)),
                ((3, 7, 3), (2, 7), (5, 1)),
                ((2, 2, 7), (7, 2), (5, 7)),
                ((7, 7, 1), (3, 3), (5, 5)),
            )
        ),
        members=(0, 1, 2, 3, 0),
        rows=(0, 0, 2, 2, 3),
    ),
)
