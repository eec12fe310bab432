"""The zoo of models that are not alike: four each of six, every way to share."""

from examples import paper, paper_models
from examples.paper import Part

ZOO = ("resnet18", "resnet34", "resnet50", "mobilenet_v2", "minilm", "minilm4")
WAYS = ("space-time", "in turn", "torch streams")


def run(part: Part) -> None:
    """Measure what is missing, print the table."""
    each, names = (1, ("minilm4", "minilm")) if part.is_small else (4, ZOO)
    members = [(name, i) for name in names for i in range(each)]
    key = {"part": "mixed", "models": len(members)}
    print(f"{each} each of {', '.join(names)}; {part.records.path}")
    paper_models.in_one(part, key, members, WAYS)
    paper_models.in_pools(part, [(key, members)])
    paper_models.print_table(part, key)
    paper.check(part)
